"""`make gpu`: fills `.gpu/` with what a bare GPU machine lacks, as wheels for Python 3.12 on Linux.

ComfyUI goes without its page, tests and the tokenizers of other models. Nothing here runs on the
machine that packs; the tiny model, in bf16, is in the checkout.
"""

import shutil
import subprocess
import sys
from pathlib import Path

from .. import environment
from . import COMFYUI, FOLDER, PAGE, STAND_INS, WHEELS

PACKAGES = Path(__file__).with_name("packages.txt")
PYTHON = "3.12"
PAIRED = {"pydantic": "pydantic==2.14.4", "pydantic-core": "pydantic-core==2.50.5"}
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")
LEFT_OUT = ("tests*", "__pycache__")
LEFT_OUT_AT_THE_TOP = {"custom_nodes", "models", "output", "comfy_api_nodes", "script_examples",
                       "user", "temp"}  # fmt: skip
LARGE_DATA = 200_000
LARGEST = 60 * 10**6
"""Bytes of the checkout and `.gpu/` together."""
AV = '''"""Stands in for PyAV, which ComfyUI imports and our graphs never use."""

import sys
from types import ModuleType


class _Anything(ModuleType):
    __path__ = []

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


for _name in ("av", "av.container", "av.subtitles", "av.subtitles.stream"):
    sys.modules[_name] = _Anything(_name)
'''


def main() -> None:
    shutil.rmtree(FOLDER, ignore_errors=True)
    shutil.copytree(environment.comfyui(), COMFYUI, ignore=_ignored)
    for folder in ("custom_nodes", "models"):
        (COMFYUI / folder).mkdir()
    PAGE.mkdir()
    (PAGE / "index.html").write_text("<title>No page</title>\n")
    STAND_INS.mkdir()
    (STAND_INS / "av.py").write_text(AV)
    _download()
    total = checkout_bytes() + folder_bytes(FOLDER)
    if total > LARGEST:
        raise SystemExit(f"The checkout and {FOLDER} have {total} bytes; {LARGEST} are allowed.")
    print(
        f"{FOLDER} is ready; with the checkout it has {total / 1e6:.0f} MB. Copy both to the "
        "machine, and run there, in the checkout:\n\n    OUT=results python3 -m scripts.gpu.run"
    )


def _ignored(folder: str, names: list[str]) -> set[str]:
    """What our graphs do not need; large data are vocabularies of other models."""
    ignored = shutil.ignore_patterns(*LEFT_OUT)(folder, names)
    for name in names:
        file = Path(folder) / name
        if file.suffix != ".py" and file.is_file() and file.stat().st_size > LARGE_DATA:
            ignored.add(name)
    return ignored | (LEFT_OUT_AT_THE_TOP & set(names) if "main.py" in names else set())


def _download() -> None:
    command = [sys.executable, "-m", "pip", "download", "-q", "--disable-pip-version-check"]
    command += ["--no-deps", "--only-binary=:all:", "--python-version", PYTHON]
    command += [word for platform in PLATFORMS for word in ("--platform", platform)]
    names = [line for line in PACKAGES.read_text().splitlines() if not line.startswith("#")]
    subprocess.run([*command, "-d", str(WHEELS), *_pinned(names)], check=True)


def _pinned(names: list[str]) -> list[str]:
    """diffusers as in the tests; pydantic and its core belong together."""
    required = (environment.ROOT / "tests" / "requirements.txt").read_text().split()
    pins = {line.split("==")[0]: line for line in required if "==" in line} | PAIRED
    return [pins.get(name, name) for name in names]


def checkout_bytes() -> int:
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=environment.ROOT, check=True, capture_output=True).stdout
    files = (environment.ROOT / name for name in listed.decode().split("\0") if name)
    return sum(file.stat().st_size for file in files if file.is_file())


def folder_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


if __name__ == "__main__":
    main()
