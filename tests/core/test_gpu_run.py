"""The one command for a GPU machine runs here on the CPU, without network, with what is packed."""

import io
import json
import os
import subprocess
import sys
import time

import pytest
from glm_image.scripts.environment import ROOT

LARGEST = 60 * 10**6
LOOPBACK_UP = """
import fcntl, os, socket, struct, sys
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
    up = struct.pack("16sh14s", b"lo", 0x1 | 0x40, b"")
    fcntl.ioctl(probe, 0x8914, up)
os.execv(sys.executable, [sys.executable, "-m", "scripts.gpu.run"])
"""
"""In a namespace of its own a process has no network, and the loopback is down."""
HERE = {"torch", "torchaudio", "torchvision", "triton", "transformers", "tokenizers", "einops",
        "safetensors", "numpy", "aiohttp", "pillow", "pytest", "scipy", "psutil", "requests",
        "sentencepiece", "tqdm", "yarl", "pyyaml", "jinja2", "regex", "filelock"}  # fmt: skip
"""Distributions that such a machine has."""


def run(folder, *command: str, **variables: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "GPU_FOLDER": str(folder), "OMP_NUM_THREADS": "1", **variables}
    return subprocess.run(
        [*command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400
    )


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpu") / "packed"
    found = run(folder, sys.executable, "-m", "scripts.gpu.pack")
    assert found.returncode == 0, found.stderr
    return folder


@pytest.fixture(scope="module")
def report(packed, tmp_path_factory):
    out = tmp_path_factory.mktemp("report")
    command = ("unshare", "-n", sys.executable, "-c", LOOPBACK_UP)
    found = run(packed, *command, PRESET="tiny", OUT=str(out))
    assert (out / "report.json").is_file(), f"`unshare -n` or the run failed: {found.stderr}"
    assert len(list(out.iterdir())) <= 8
    return found.stdout, json.loads((out / "report.json").read_text()), out


def test_what_is_packed_is_small_and_missing_there(packed) -> None:
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.split("\0")
    checkout = sum((ROOT / name).stat().st_size for name in listed if name)
    files = [file for file in packed.rglob("*") if file.is_file()]
    assert checkout + sum(file.stat().st_size for file in files) < LARGEST
    wheels = [file.name for file in files if file.suffix == ".whl"]
    assert wheels
    for wheel in wheels:
        name, _, python = wheel.split("-")[:3]
        assert name.lower().replace("_", "-") not in HERE
        assert python in ("py3", "py2.py3", "cp312")


def test_every_part_runs_and_nothing_fails(report) -> None:
    printed, found, out = report
    failed = [(row["part"], row["name"], row["failed"]) for row in found["rows"] if row["failed"]]
    assert not failed
    rows = {(row["part"], row["name"]) for row in found["rows"]}
    for row in (
        ("server", "default: redo region"),
        ("server", "default: after an interrupt"),
        ("tokens", "tokens, after an interrupt within a recording"),
        ("AR", "step, graphs"),
        ("AR", "step, transformers"),
        ("AR", "the trial's choice"),
        ("AR", "attend=split: relative difference of logits"),
        ("compiled", "run=compiled: relative difference of logits"),
        ("decoder", "norm_rotate=triton, 64x64: relative difference"),
        ("decoder", "step, 64x64, one reference, store cpu, fp8"),
        ("picture", "64x64, 2 steps, CFG 1.5"),
        ("memory", "64 GiB: the plan"),
    ):
        assert row in rows
    table = (out / "report.md").read_text()
    assert all(f"| {part} | {name} |" in table for part, name in rows)
    assert all(f"| {part} | {name} |" in printed for part, name in rows)


def test_a_part_that_takes_too_long_is_stopped_and_told(packed, monkeypatch) -> None:
    monkeypatch.setenv("GPU_FOLDER", str(packed))
    monkeypatch.chdir(ROOT)
    from glm_image.scripts.gpu import run as runner

    log, found = io.StringIO(), {"machine": {}, "rows": []}
    since = time.monotonic()
    runner._run(["decoder"], 1, dict(os.environ), found, log)
    assert time.monotonic() - since < 5 + runner.GRACE_SECONDS
    assert "stopped after 1 s" in found["rows"][-1]["failed"]


def test_a_failure_is_a_row_with_its_traceback(capsys) -> None:
    import torch
    from glm_image.scripts.gpu.report import MARK, Report, table

    report = Report("AR", torch.device("cpu"))
    with report.attempt("a step"):
        raise RuntimeError("no kernel")
    report.row("the next", 2.5, "ms")
    lines = capsys.readouterr().out.splitlines()
    failed, following = (json.loads(line.removeprefix(MARK)) for line in lines)
    assert following["value"] == 2.5
    text = table({"machine": {"device": "a card"}, "rows": [failed, following]})
    assert "| AR | a step | FAILED: RuntimeError: no kernel |" in text
    assert "Traceback (most recent call last)" in text
