"""`python -m training [STAGE ...]`: trains the stages named, or all in order, and writes the model."""

import argparse
from importlib import import_module
from pathlib import Path

import torch

from .stage import Run, train

STAGES = {
    "vae": ("vae", "VAEStage"),
    "autoregressive": ("autoregressive", "AutoregressiveStage"),
    "vision": ("vision", "VisionStage"),
    "glyphs": ("glyphs", "GlyphStage"),
    "decoder": ("decoder", "DecoderStage"),
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m training", description=__doc__)
    parser.add_argument("stages", nargs="*", choices=[*STAGES, []], help="all, if none is named")
    parser.add_argument("--folder", type=Path, default=Path(".cache/tiny"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help="of each stage, for a short run")
    parser.add_argument("--minutes", type=float, help="end each stage after so long")
    parser.add_argument("--batch", type=int)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    given = vars(parser.parse_args())
    if threads := given.pop("threads"):
        torch.set_num_threads(threads)
    names = given.pop("stages") or list(STAGES)
    run = Run(**given)
    for name in names:
        module, stage = STAGES[name]
        train(getattr(import_module(f"{__package__}.{module}"), stage)(run))


if __name__ == "__main__":
    main()
