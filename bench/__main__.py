"""`python -m bench [PRESET ...]`: small and medium, or full on a GPU; writes `bench/last.json`."""

import argparse
import json
import platform
from collections.abc import Iterator
from datetime import date
from pathlib import Path

import torch

from . import ar, painting, whole
from .measure import Bench, Row
from .presets import PRESETS

LAST = Path(__file__).with_name("last.json")
HEADER = "| preset | stage | ours | reference | ratio | floor |\n|---|---|---|---|---|---|"


def main(names: list[str], out: Path) -> None:
    unknown = set(names) - PRESETS.keys()
    if unknown:
        raise SystemExit(f"No preset is called {', '.join(unknown)}: use {', '.join(PRESETS)}.")
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    if "full" in names and device.type == "cpu":
        raise SystemExit("The preset full needs a GPU of 40 GB or more: use small or medium here.")
    if device.type == "cpu":
        torch.set_num_threads(1)  # steady times on a machine that also does other work
    print(f"{date.today()}, {machine(device)}\n\n{HEADER}", flush=True)
    rows = []
    with torch.inference_mode():
        for name in names:
            for row in measure(name, device):
                print(as_line(row), flush=True)
                rows.append(row.as_dict())
    out.write_text(json.dumps(rows, indent=1) + "\n")


def measure(name: str, device: torch.device) -> Iterator[Row]:
    torch.manual_seed(0)
    preset = PRESETS[name]()
    bench = Bench(name, device, preset.rounds)
    yield from ar.measure(preset, bench)
    yield from painting.measure(preset, bench)
    yield from whole.measure(preset, bench)


def as_line(row: Row) -> str:
    def show(value: float | None) -> str:
        return "" if value is None else f"{value:.3g} {row.unit}"

    ratio = "" if row.ratio is None else f"{row.ratio:.2f}"
    cells = (row.preset, row.stage, show(row.ours), show(row.reference), ratio, show(row.floor))
    return f"| {' | '.join(cells)} |"


def machine(device: torch.device) -> str:
    """The device's name and torch's version."""
    if device.type != "cpu":
        name = torch.get_device_module(device).get_device_name(device)
        return f"{name}, torch {torch.__version__}"
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        cpu = names[0].split(":")[1].strip() if names else cpu
    return f"{cpu}, one thread, torch {torch.__version__}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("presets", nargs="*", metavar="PRESET")
    parser.add_argument("--out", type=Path, default=LAST, help="where the rows go, as JSON")
    arguments = parser.parse_args()
    main(arguments.presets or ["small", "medium"], arguments.out)
