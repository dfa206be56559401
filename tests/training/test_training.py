"""Every training stage, for two steps: it runs, can be taken up, and leaves a checkpoint."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from glm_image.scripts.environment import ROOT
from PIL import Image
from safetensors.torch import load_file

STAGES = ("vae", "autoregressive", "vision", "glyphs", "decoder")


def train(folder: Path, *arguments: str) -> None:
    command = [sys.executable, "-m", "training", "--folder", str(folder / "run"), "--threads", "1",
               "--target", str(folder / "tiny"), "--batch", "2", *arguments]  # fmt: skip
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=300)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("training")
    train(folder, "--steps", "2")
    return folder


def test_every_stage_leaves_its_losses_and_their_plot(folder) -> None:
    for stage in STAGES:
        summary = json.loads((folder / "run" / stage / "summary.json").read_text())
        assert summary["steps"] == 2
        assert Image.open(folder / "run" / stage / "loss.png").width > 300


def test_a_run_that_was_broken_off_goes_on_as_if_it_had_not_been(folder, tmp_path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(whole, "glyphs", "--steps", "4")
    train(parts, "glyphs", "--steps", "4", "--stop", "2")
    assert state(parts)["step"] == 2
    train(parts, "glyphs", "--steps", "4")
    assert state(parts)["log"] == state(whole)["log"]
    for key, value in state(whole)["module"].items():
        assert torch.equal(value, state(parts)["module"][key])


def state(folder: Path) -> dict:
    return torch.load(folder / "run" / "glyphs" / "state.pt", weights_only=True)


def test_the_checkpoint_has_every_component_in_bfloat16(folder) -> None:
    tiny = folder / "tiny"
    for component in ("vision_language_encoder", "transformer", "vae"):
        (file,) = (tiny / component).glob("*.safetensors")
        assert {weight.dtype for weight in load_file(file).values()} == {torch.bfloat16}
    assert sum(file.stat().st_size for file in tiny.rglob("*") if file.is_file()) < 40e6
