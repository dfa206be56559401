"""The command that writes a snapshot as single files, quantised if asked, and checks downloads.

`convert.py` in the pack's folder runs it from anywhere.
"""

import argparse
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from .errors import GLMImageError, InputError
from .files.checking import check_model
from .files.component import COMPONENTS
from .files.conversion import CHOICES, convert, is_converted, output
from .files.hub_cache import main_snapshot, repository_of
from .files.model_folder import find_component
from .files.opening import open_component

MODEL_FOLDERS = {
    "ar": "text_encoders",
    "decoder": "diffusion_models",
    "glyph": "text_encoders",
    "vae": "vae",
}
"""ComfyUI's model folder for single files of each component."""
DESCRIPTION = """\
Writes GLM-Image's components as single files, quantised if asked, or checks a download.

The files go into the model's own folder: the loaders then load them under the name that the model
has. The whole model (36 GB) becomes 22 GB in fp8 or int8 and 15 GB in int4, which took 12 minutes
on two CPU cores. No GPU is used. Run again after an interruption: it continues where it stopped."""
EXAMPLES = """\
in the folder that holds ComfyUI:
  python ComfyUI/custom_nodes/ComfyUI-GLM-Image/convert.py ComfyUI/models/glm_image/GLM-Image --check
  python ComfyUI/custom_nodes/ComfyUI-GLM-Image/convert.py ComfyUI/models/glm_image/GLM-Image --dtype int4
in the folder of ComfyUI's portable version for Windows:
  .\\python_embeded\\python.exe -s ComfyUI\\custom_nodes\\ComfyUI-GLM-Image\\convert.py ComfyUI\\models\\glm_image\\GLM-Image --dtype int4
"""  # noqa: E501


class Bar:
    """A line of progress on stderr, drawn at most five times a second."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.start = self.drawn = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if now - self.drawn < 0.2 and done < total:
            return
        self.drawn = now
        filled = 30 * done // total
        sys.stderr.write(
            f"\r{self.title:24} [{'#' * filled}{'.' * (30 - filled)}] {done / 1e9:.2f} of "
            f"{total / 1e9:.2f} GB, {now - self.start:.0f} s"
        )
        sys.stderr.flush()


def main(arguments: Sequence[str] | None = None) -> None:
    """
    Args:
        arguments: of the command line; None takes this process's.
    """
    parser = _parser()
    given = parser.parse_args(arguments)
    if not given.check and given.dtype is None:
        parser.error(f"say what to convert to: --dtype {{{','.join(CHOICES)}}}")
    try:
        source = _model_folder(given.source)
        if given.check:
            _check(source)
        else:
            _convert(source, given)
    except GLMImageError as error:
        raise SystemExit(f"\n{error}") from error
    except OSError as error:
        path = error.filename or given.models or given.out or given.source  # none on a full disk
        raise SystemExit(
            f"\n{path} cannot be read or written ({error.strerror}); run again to continue."
        ) from error
    except KeyboardInterrupt:
        raise SystemExit("\nInterrupted; run again to continue.") from None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="convert.py",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", type=Path, help="the model's folder, a snapshot of the hub")
    target = parser.add_mutually_exclusive_group()
    target.add_argument(
        "out", type=Path, nargs="?", help="a folder for the files; without it, the model's own"
    )
    target.add_argument(
        "--models",
        type=Path,
        help="ComfyUI's models folder, in place of out: each file goes to text_encoders, "
        "diffusion_models or vae in it",
    )
    parser.add_argument("--dtype", choices=CHOICES, help="of the layers' matrices")
    parser.add_argument(
        "--component", choices=COMPONENTS, action="append", help="this one only; may be repeated"
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="convert nothing: read all headers, and say what is missing or broken",
    )
    return parser


def _model_folder(path: Path) -> Path:
    """The main snapshot of a folder of a hub's cache; any other path in full.

    Links stay, as a hub's cache links names to files that are named by their hash.
    """
    path = path.resolve() if path.name == ".." else path.absolute()
    return main_snapshot(path) if repository_of(path) == path else path


# ---- converting --------------------------------------------------------------------------------


@torch.no_grad()
def _convert(source: Path, given: argparse.Namespace) -> None:
    started = time.monotonic()
    names = given.component or list(COMPONENTS)
    components = {name: open_component(source, name) for name in names}
    out = given.models or given.out or (source if source.is_dir() else source.parent)
    folders = {name: _folder(out, name, given.models is not None) for name in names}
    outputs = {name: output(components[name], given.dtype) for name in names}
    for name, file in outputs.items():
        _say(f"{components[name].title:17} {file.nbytes / 1e9:5.1f} GB  {file.name}")
    left = [n for n in names if not is_converted(components[n], outputs[n], folders[n])]
    needed = sum(outputs[name].nbytes for name in left)
    _say(f"{needed / 1e9:.1f} GB to write into {out}; {_free(out) / 1e9:.1f} GB are free there.")
    for name in left:
        convert(components[name], given.dtype, folders[name], Bar(components[name].title))
        _say("")
    _say(f"Done in {(time.monotonic() - started) / 60:.1f} minutes.")
    if given.models is None:
        _say_how_it_is_loaded(source, out, names)


def _folder(out: Path, component: str, sort: bool) -> Path:
    """
    Raises:
        GLMImageError: files would lie in ComfyUI's models folder, where nothing looks for them.
    """
    if sort:
        return out / MODEL_FOLDERS[component]
    if (out / "diffusion_models").is_dir():
        raise InputError(
            f"{out} is ComfyUI's models folder; give {out / 'glm_image' / 'NAME'}, or give it as "
            f"--models {out} to sort the files into its folders."
        )
    return out


def _free(folder: Path) -> int:
    """Free bytes where a folder is, or will be made."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.is_dir())
    return shutil.disk_usage(existing).free


def _say_how_it_is_loaded(source: Path, out: Path, names: list[str]) -> None:
    for name in names:
        try:
            find_component(out, name)
        except GLMImageError as error:
            _say(str(error))
    if out.absolute() == source and len(names) == len(COMPONENTS):
        folders = ", ".join(kind.folder for kind in COMPONENTS.values())
        _say(
            f"The loaders take these files under the model's own name. They carry all they need: "
            f"{folders} may be deleted in {source}."
        )


def _say(line: str) -> None:
    sys.stderr.write(f"{line}\n")


# ---- checking ----------------------------------------------------------------------------------


def _check(path: Path) -> None:
    """Print what was found. The exit status is 1 if anything is missing or broken."""
    report = check_model(path)
    lines = [*report.good, *report.problems]
    if report.problems:
        lines += [
            f"{file} is a part of a download that has not ended." for file in report.leftovers
        ]
        lines.append(
            f"Not whole: {len(report.problems)} missing or broken. Run the download again: it "
            "fetches what is missing. Delete broken files first."
        )
    else:
        lines += [f"{file} is left of an interrupted download." for file in report.leftovers]
        lines.append(f"OK: {report.nbytes / 1e9:.1f} GB of weights, all of them there.")
    sys.stdout.write("".join(f"{line}\n" for line in lines))
    if report.problems:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
