"""`python3 -m scripts.gpu.run`: measures everything, prints each row, and ends within six minutes.

`python3 -m scripts.gpu.run decoder memory` runs these parts alone; the last one has all the time
that is left. The command needs `.gpu/` beside the checkout (`make gpu`), and no network. Under
`$OUT` it leaves `report.json`, `report.md` and `log.txt`. `PRESET=tiny` runs the same on a CPU.
"""

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from contextlib import suppress
from pathlib import Path

from . import COMFYUI, PRESET, STAND_INS, WHEELS
from .part import PARTS
from .report import MARK, heading, table, table_line

SECONDS = 350
"""For all parts; what they leave, the last one may use."""
GRACE_SECONDS = 5
LEAST_SECONDS = 10
"""A part that has less is not begun."""


def main(chosen: list[str]) -> int:
    unknown = [name for name in chosen if name not in PARTS]
    if unknown:
        raise SystemExit(f"No part is called {', '.join(unknown)}: use {', '.join(PARTS)}.")
    if not COMFYUI.is_dir():
        raise SystemExit(f"{COMFYUI} is missing: run `make gpu` where there is a network.")
    out = Path(os.environ.get("OUT") or "output/gpu")
    out.mkdir(parents=True, exist_ok=True)
    report = {"machine": {}, "rows": []}
    with tempfile.TemporaryDirectory() as work, (out / "log.txt").open("w") as log:
        environment = _environment(Path(work))
        deadline = time.monotonic() + SECONDS
        groups = _groups(chosen or list(PARTS))
        for names in groups:
            left = deadline - time.monotonic()
            planned = sum(PARTS[name].seconds for name in names)
            seconds = left if names is groups[-1] else min(planned, left)
            if seconds < LEAST_SECONDS:
                _fail(names, "no time was left; run it by its name", report)
            else:
                _run(names, seconds, environment, report, log)
            (out / "report.json").write_text(json.dumps(report, indent=1) + "\n")
            (out / "report.md").write_text(table(report))
    return int(any(row["failed"] for row in report["rows"]))


def _groups(chosen: list[str]) -> list[list[str]]:
    """Parts that share a process: none on a GPU, which one part's failure may break."""
    if PRESET == "full":
        return [[name] for name in chosen]
    served = [name for name in chosen if PARTS[name].served]
    others = [name for name in chosen if name not in served]
    return [group for group in (others, served) if group]


def _environment(work: Path) -> dict[str, str]:
    """Variables under which Python finds the packages that it lacks. Those it has are not replaced.

    Wheels are unpacked, which installs them as far as they are used here.
    """
    site = work / "site"
    site.mkdir()
    for wheel in sorted(WHEELS.glob("*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            tops = {Path(name).parts[0].removesuffix(".py") for name in archive.namelist()}
            tops = {top for top in tops if not top.endswith((".dist-info", ".data"))}
            if not any(importlib.util.find_spec(top) for top in tops):
                archive.extractall(site)
    for stand_in in STAND_INS.glob("*.py"):
        if importlib.util.find_spec(stand_in.stem) is None:
            shutil.copy(stand_in, site)
    paths = [str(site), *filter(None, [os.environ.get("PYTHONPATH")])]
    offline = {"HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1", "GPU_WORK": str(work)}
    return {**os.environ, **offline, "PYTHONPATH": os.pathsep.join(paths)}


def _run(names: list[str], seconds: float, environment: dict, report: dict, log) -> None:
    """Run parts in a process of their own until they end or their time is over."""
    command = [sys.executable, "-m", "scripts.gpu.part", *names]
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip
    late = threading.Event()

    def end() -> None:
        late.set()
        process.terminate()  # a part that serves stops its server
        with suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_SECONDS)
        with suppress(ProcessLookupError):  # children may outlive it and hold its output open
            os.killpg(process.pid, signal.SIGKILL)

    timer = threading.Timer(seconds, end)
    timer.start()
    for line in process.stdout:
        if not line.startswith(MARK):
            log.write(line)
            continue
        found = json.loads(line.removeprefix(MARK))
        if "machine" in found:
            if not report["machine"]:
                print(heading(found["machine"]), flush=True)
            report["machine"] = found["machine"]
            continue
        report["rows"].append(found)
        print(table_line(found), flush=True)
    process.wait()
    timer.cancel()
    log.flush()
    if late.is_set() or process.returncode:
        why = f"stopped after {seconds:.0f} s" if late.is_set() else f"exit {process.returncode}"
        _fail(names, f"{why}; see log.txt", report)


def _fail(names: list[str], why: str, report: dict) -> None:
    row = {"part": names[0], "name": "the whole part", "value": None, "unit": "", "beside": None,
           "failed": why}  # fmt: skip
    report["rows"].append(row)
    print(table_line(row), flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
