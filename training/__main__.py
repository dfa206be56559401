"""`python -m training [STAGE ...]`: trains these stages, or all of them and then writes `tiny/`.

With `--start tiny` stages continue from the checkpoint `tiny/`. `python -m training.assemble` then
writes the trained components into it.
"""

import argparse
from importlib import import_module
from pathlib import Path

import torch

from . import parallel
from .assemble import ROOT, assemble
from .stage import STAGES, FolderInUseError, Run, train


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m training", description=__doc__)
    parser.add_argument("stages", nargs="*", help=f"of {', '.join(STAGES)}; all, if none is named")
    parser.add_argument("--folder", type=Path, default=ROOT / ".cache" / "tiny", help="of the run")
    parser.add_argument("--target", type=Path, default=ROOT / "tiny", help="of the checkpoint")
    parser.add_argument("--start", type=Path, help="checkpoint to continue from, such as tiny")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help="of each stage, for a short run")
    parser.add_argument("--minutes", type=float, help="of each stage, over all its runs")
    parser.add_argument("--stop", type=int, help="interrupt a stage before this step")
    parser.add_argument("--batch", type=int)
    parser.add_argument("--threads", type=int, help="of each process")
    parser.add_argument("--processes", type=int, default=1, help="that train together on this CPU")
    parser.add_argument("--bf16", action="store_true", help="products in bfloat16")
    parser.add_argument("--compile", action="store_true", help="the AR model; needs a C++ compiler")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    given = vars(parser.parse_args())
    processes = given.pop("processes")
    if threads := given.pop("threads"):
        torch.set_num_threads(threads)
    target, asked = given.pop("target"), given.pop("stages")
    if unknown := set(asked) - STAGES.keys():
        parser.error(f"there is no stage {', '.join(sorted(unknown))}: use {', '.join(STAGES)}")
    if given["stop"] is not None and len(asked) != 1:
        parser.error("--stop needs exactly one stage")
    parallel.start(processes)
    run = Run(**given)
    for name in asked or STAGES:
        stage = getattr(import_module(f"{__package__}.{name}"), STAGES[name])
        train(stage(run))
    if not asked and parallel.rank() == 0:
        assemble(run.folder, target)
    parallel.leave()


if __name__ == "__main__":
    try:
        main()
    except (FileNotFoundError, FolderInUseError) as error:
        raise SystemExit(str(error)) from None
