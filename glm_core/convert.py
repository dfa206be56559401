"""`python -m glm_core.convert SNAPSHOT OUT`: a snapshot as single files, in fewer bits if asked.

OUT may be ComfyUI's own models folder: each component goes to the folder where its loader looks.
"""

import argparse
import sys
import time
from pathlib import Path

import torch

from .errors import GLMImageError
from .files.component import COMPONENTS
from .files.conversion import CHOICES, convert
from .files.opening import open_component

MODEL_FOLDERS = {
    "ar": "text_encoders",
    "decoder": "diffusion_models",
    "glyph": "text_encoders",
    "vae": "vae",
}
"""The folder of ComfyUI's models that single files of each component go into."""


class Bar:
    """Progress on a line of its own, a few times a second."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.start = self.shown = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if now - self.shown < 0.2 and done < total:
            return
        self.shown = now
        filled = 30 * done // total
        sys.stderr.write(
            f"\r{self.title:24} [{'#' * filled}{'.' * (30 - filled)}] {done / 2**30:.2f} of "
            f"{total / 2**30:.2f} GiB, {now - self.start:.0f} s"
        )
        sys.stderr.flush()


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m glm_core.convert", description="GLM-Image components as single files."
    )
    parser.add_argument("snapshot", type=Path, help="a hub snapshot's folder")
    parser.add_argument(
        "out", type=Path, help="gets text_encoders/, diffusion_models/ and vae/; ComfyUI/models"
    )
    parser.add_argument("--dtype", choices=CHOICES, default="bf16")
    parser.add_argument(
        "--component", choices=COMPONENTS, action="append", help="only this one; may be repeated"
    )
    given = parser.parse_args()
    try:
        for name in given.component or COMPONENTS:
            component = open_component(given.snapshot, name)
            folder = given.out / MODEL_FOLDERS[name]
            file = convert(component, given.dtype, folder, Bar(component.title))
            sys.stderr.write(f"\n{file}\n")
    except GLMImageError as error:
        raise SystemExit(f"\n{error}") from error


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
