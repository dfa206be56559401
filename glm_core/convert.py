"""`python -m glm_core.convert SNAPSHOT OUT` writes a snapshot as single files, quantised if asked.

OUT may be ComfyUI's models folder: each component goes to the folder where its loader looks.
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
"""ComfyUI's model folder for single files of each component."""


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
        "out", type=Path, help="where text_encoders/, diffusion_models/ and vae/ go: ComfyUI/models"
    )
    parser.add_argument("--dtype", choices=CHOICES, default="bf16")
    parser.add_argument(
        "--component", choices=COMPONENTS, action="append", help="this one only; may be repeated"
    )
    arguments = parser.parse_args()
    try:
        for name in arguments.component or COMPONENTS:
            component = open_component(arguments.snapshot, name)
            folder = arguments.out / MODEL_FOLDERS[name]
            file = convert(component, arguments.dtype, folder, Bar(component.title))
            sys.stderr.write(f"\n{file}\n")
    except GLMImageError as error:
        raise SystemExit(f"\n{error}") from error
    except OSError as error:
        raise SystemExit(
            f"\n{arguments.out} cannot be written ({error.strerror}); run again to continue."
        ) from error
    except KeyboardInterrupt:
        raise SystemExit("\nInterrupted; run again to continue.") from None


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
