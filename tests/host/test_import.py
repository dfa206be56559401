"""The time that the pack adds to ComfyUI's start."""

import subprocess
import sys
from pathlib import Path

from glm_image.scripts import environment

TESTS = Path(__file__).resolve().parents[1]
PROGRAM = """
import sys, time
sys.path[:0] = [{host!r}, {tests!r}]
from comfy.cli_args import args
args.cpu = True
import nodes, comfy_api.latest, comfy_execution.graph_utils  # a server imports them before any pack
import conftest  # registers the pack's folder, imports nothing of it
import gc, importlib
gc.disable()  # a collection over all of the host's objects would count as ours
since = time.perf_counter()
importlib.import_module("glm_image.nodes")
sys.stdout.write(f"seconds {{time.perf_counter() - since}}")
"""


def test_importing_the_pack_takes_under_300_ms() -> None:
    program = PROGRAM.format(host=str(environment.host().path), tests=str(TESTS))
    command = [sys.executable, "-c", program]
    runs = [
        subprocess.run(command, capture_output=True, text=True, check=True).stdout for _ in range(2)
    ]
    assert min(float(out.rsplit("seconds ", 1)[1]) for out in runs) < 0.3
