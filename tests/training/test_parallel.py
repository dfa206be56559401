"""Processes that train together take the same steps along the mean of their gradients."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from glm_image.scripts.environment import ROOT
from torch import nn

from training import parallel

SHARE = """
import sys
import torch
from torch import nn
from training import parallel

parallel.start(2)
rank = parallel.rank()
module = nn.ParameterDict({"both": torch.zeros(2), "second": torch.zeros(1)})
loss = (rank + 1) * module["both"].sum()
if rank == 1:
    loss = loss + 2 * module["second"].sum()
loss.backward()
parallel.share_gradients(module)
found = {name: parameter.grad for name, parameter in module.items()}
found["furthest"] = parallel.furthest((0.25, 0.75)[rank])
torch.save(found, f"{sys.argv[1]}/{rank}.pt")
parallel.leave()
"""


def run(*arguments: str) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_one_process_keeps_its_gradients() -> None:
    layer = nn.Linear(2, 1, bias=False)
    layer.weight.grad = torch.tensor([[1.0, 2.0]])
    parallel.share_gradients(layer)
    assert layer.weight.grad.tolist() == [[1, 2]]
    assert parallel.furthest(0.25) == 0.25


def test_gradients_are_averaged_and_a_missing_one_is_zero(tmp_path) -> None:
    script = tmp_path / "share.py"
    script.write_text(SHARE)
    run(
        "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script), str(tmp_path)
    )
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert found["both"].tolist() == [1.5, 1.5]  # the mean of 1 and 2
        assert found["second"].tolist() == [1.0]  # the mean of none and 2
        assert found["furthest"] == 0.75


def test_two_processes_train_a_stage(tmp_path) -> None:
    """The first process draws the batches that it would draw alone.

    Its first losses are therefore the same. After one step its weights, and so its losses, differ.
    """
    alone, both = (losses(tmp_path / many, "--processes", many) for many in "12")
    assert both[0] == alone[0]
    assert both[1] != alone[1]


def losses(folder: Path, *arguments: str) -> list[dict]:
    """The losses of two steps of a stage."""
    run("training", "vision", "--folder", str(folder), "--steps", "2", "--batch", "2",
        "--threads", "1", "--device", "cpu", *arguments)  # fmt: skip
    summary = json.loads((folder / "vision" / "summary.json").read_text())
    assert (summary["steps"], summary["processes"]) == (2, int(arguments[-1]))
    return torch.load(folder / "vision" / "state.pt", weights_only=True)["log"]
