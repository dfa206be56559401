"""`python3 -m scripts.gpu.part NAME ...`: runs parts of the report in one process."""

import importlib
import platform
import subprocess
import sys
from dataclasses import dataclass


@dataclass(frozen=True)
class Part:
    """A module of this folder with a `measure`, and the seconds that it may take.

    served: whether it starts servers and computes nothing itself.
    """

    module: str
    seconds: int
    served: bool = False


PARTS = {
    "server": Part("server", 110, served=True),
    "tokens": Part("tokens", 25),
    "AR": Part("ar", 75),
    "decoder": Part("decoder", 75),
    "picture": Part("picture", 60),
    "memory": Part("memory", 90, served=True),
    "compiled": Part("compiled", 90),
}
"""In order of worth: those at the end may find no time left, and are then run by name."""


def main(names: list[str]) -> None:
    import logging

    import torch
    import transformers

    from bench.__main__ import machine
    from bench.measure import Bench
    from bench.presets import PRESETS

    from . import PRESET
    from .report import Report, say

    logging.basicConfig(level=logging.INFO)
    kind = torch.accelerator.current_accelerator() or torch.device("cpu")
    device = torch.empty(0, device=kind).device  # with its number, as tensors have it
    if PRESET == "full" and device.type == "cpu":
        raise SystemExit("PRESET=full needs a GPU; PRESET=tiny runs anywhere.")
    versions = {"transformers": transformers.__version__, "Python": platform.python_version()}
    say({"machine": {"device": machine(device), "driver": _driver(), **versions}})
    if device.type == "cpu":
        torch.set_num_threads(1)
    for name in names:
        torch.manual_seed(0)
        preset, report = PRESETS[PRESET](), Report(name, device)
        with report.attempt("the whole part"), torch.inference_mode():
            module = importlib.import_module(f"{__package__}.{PARTS[name].module}")
            module.measure(preset, Bench(PRESET, device, preset.rounds), report)


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        found = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return "none"
    return found.strip()


if __name__ == "__main__":
    main(sys.argv[1:])
