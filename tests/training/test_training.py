"""Every stage trains, can be resumed, and writes what it trained as a checkpoint."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from filelock import FileLock
from glm_image.scripts.environment import ROOT
from PIL import Image
from safetensors.torch import load_file
from transformers import GlmImageForConditionalGeneration

from training.assemble import assemble
from training.autoregressive import AutoregressiveStage
from training.codes import INSIDE, cells
from training.decoder import DecoderStage
from training.samples import _weights, collate
from training.scene import Scene, Text, draw_scene, place_item
from training.stage import Run, curves
from training.tokenizer import IMAGE_PLACEHOLDER, make_processor

STAGES = ("vae", "autoregressive", "vision", "glyphs", "decoder")


def train(folder: Path, *arguments: str) -> None:
    command = [sys.executable, "-m", "training", "--folder", str(folder / "run"), "--threads", "1",
               "--target", str(folder / "tiny"), "--batch", "2", *arguments]  # fmt: skip
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("training")
    train(folder, "--steps", "2")
    return folder


def test_every_stage_saves_its_losses_and_their_plot(folder) -> None:
    for stage in STAGES:
        summary = json.loads((folder / "run" / stage / "summary.json").read_text())
        assert summary["steps"] == 2
        assert len(curves(state(folder, stage)["log"])) > 0
        assert Image.open(folder / "run" / stage / "loss.png").format == "PNG"


def test_a_loss_that_some_steps_lack_is_plotted_at_its_own_steps() -> None:
    log = [{"step": i, "all": 2.0} | ({"even": i} if i % 2 == 0 else {}) for i in range(200)]
    found = curves([*log, {"step": 200, "last": 1.0}])
    assert found.keys() == {"all", "even", "last"}
    steps, values = found["even"]
    assert len(steps) == 99  # a hundred, averaged two at a time
    assert np.array_equal(steps, values)
    assert np.allclose(found["all"][1], 2)


def test_an_interrupted_run_equals_an_uninterrupted_one(folder, tmp_path) -> None:
    train(tmp_path, "vision", "--steps", "2", "--stop", "1")
    assert state(tmp_path, "vision")["step"] == 1
    train(tmp_path, "vision", "--steps", "2")
    expected, found = state(folder, "vision"), state(tmp_path, "vision")
    assert found["log"] == expected["log"]
    for weights in ("module", "average"):
        for key, value in expected[weights].items():
            assert torch.equal(found[weights][key], value)


def test_one_command_at_a_time_trains_a_folder(tmp_path) -> None:
    """Two commands would overwrite each other's state."""
    stage = tmp_path / "run" / "vision"
    stage.mkdir(parents=True)
    with FileLock(stage / "lock"), pytest.raises(AssertionError, match="trained by another run"):
        train(tmp_path, "vision", "--steps", "1")
    train(tmp_path, "vision", "--steps", "1")
    assert state(tmp_path, "vision")["step"] == 1


def test_stages_start_from_a_checkpoint(folder, tmp_path) -> None:
    """A stage starts with its weights, and the result replaces only its own component."""
    shutil.copytree(folder / "tiny", tmp_path / "tiny")
    for stage in ("decoder", "autoregressive"):
        train(tmp_path, stage, "--steps", "1", "--start", str(folder / "tiny"))
    assemble(tmp_path / "run", tmp_path / "tiny")
    for component in ("vae", "text_encoder"):
        expected, found = (only_file(each / "tiny" / component) for each in (folder, tmp_path))
        assert all(torch.equal(found[key], weight) for key, weight in expected.items())
    for component in ("transformer", "vision_language_encoder"):
        expected, found = (only_file(each / "tiny" / component) for each in (folder, tmp_path))
        assert found.keys() == expected.keys()
        moved = {
            key: float((found[key].float() - weight.float()).abs().max())
            for key, weight in expected.items()
        }
        assert 0 < max(moved.values()) < 0.01  # one step of warm-up
        assert not any(moved[key] for key in moved if key.startswith("model.v"))


def state(folder: Path, stage: str) -> dict:
    return torch.load(folder / "run" / stage / "state.pt", weights_only=True)


def test_the_checkpoint_holds_what_was_trained_in_bfloat16(folder) -> None:
    decoder, ar = state(folder, "decoder")["average"], state(folder, "autoregressive")["average"]
    saved = only_file(folder / "tiny" / "transformer")
    for key in ("proj_out.weight", "transformer_blocks.0.attn1.to_q.weight"):
        assert torch.equal(saved[key], decoder[f"decoder.{key}"].bfloat16())
    saved = only_file(folder / "tiny" / "vision_language_encoder")
    key = "layers.0.mlp.down_proj.weight"
    assert torch.equal(saved[f"model.language_model.{key}"], ar[f"text.{key}"].bfloat16())
    seen = state(folder, "vision")["average"]["vqmodel.quantize.embedding.weight"]
    assert torch.equal(saved["model.vqmodel.quantize.embedding.weight"], seen.bfloat16())
    assert sum(file.stat().st_size for file in (folder / "tiny").rglob("*.*")) < 40e6
    config = json.loads((folder / "tiny" / "vision_language_encoder" / "config.json").read_text())
    assert config["dtype"] == "bfloat16"


def test_the_tokenizer_has_the_id_of_a_reference() -> None:
    assert make_processor().tokenizer.convert_tokens_to_ids("<|image|>") == IMAGE_PLACEHOLDER


def only_file(component: Path) -> dict[str, torch.Tensor]:
    (file,) = component.glob("*.safetensors")
    return load_file(file)


def test_the_error_names_a_missing_stage(tmp_path) -> None:
    command = [sys.executable, "-m", "training", "decoder", "--folder", str(tmp_path)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert run.returncode == 1
    assert "train the stage vae first" in run.stderr


def test_prompts_and_positions_are_those_of_the_reference(folder) -> None:
    """The AR stage trains on the same prompts and positions that transformers uses."""
    stage = AutoregressiveStage(Run(folder / "run", batch=1))
    network = GlmImageForConditionalGeneration.from_pretrained(
        folder / "tiny" / "vision_language_encoder"
    )
    sample = stage.samples.image(np.random.default_rng(3), 512, 768, whole=True, stress=0)
    ids, positions, _, targets, _ = collate([sample])
    grids = torch.tensor([[1, 16, 24], [1, 13, 19]])
    prompt = len(sample.prompt)
    expected, _ = network.model.get_rope_index(
        ids[:, :prompt], image_grid_thw=grids, images_per_sample=torch.tensor([2])
    )
    assert torch.equal(positions[:, :, :prompt], expected)
    assert targets.shape == (1, 13 * 19 + 16 * 24)
    assert torch.equal(ids[0, prompt:], sample.read[:-1])
    assert torch.equal(sample.read[: 13 * 19], targets[0, : 13 * 19])


def test_the_first_cell_of_each_shape_and_text_counts_more() -> None:
    empty = Scene(512, 512, "white", (), (Text("AB", "bottom"),))
    left = place_item(empty, "circle", "red", "medium", "left")
    right = place_item(empty, "star", "blue", "small", "right")
    codes = cells(replace(empty, items=(left, right)))
    weights = _weights(codes, 4.0).view(16, 16)
    assert sorted(weights.unique().tolist()) == [1, 5]
    first = [tuple(cell) for cell in (weights == 5).nonzero().tolist()]
    shown = [tuple(cell) for cell in np.argwhere(codes >= INSIDE)]
    assert len(first) == 3
    for things in (lambda c: c < 8, lambda c: c >= 8):
        upper = [cell for cell in shown if cell[0] < 12 and things(cell[1])]
        assert min(upper) in first
    assert min(cell for cell in shown if cell[0] >= 12) in first


@pytest.mark.parametrize("window", [(128, 128), (512, 512)])
def test_the_reference_changes_the_loss_of_an_edit(folder, window) -> None:
    stage = DecoderStage(Run(folder / "run", batch=16))
    batch = stage._edited(np.random.default_rng(4), window, 512, 512)
    assert batch.reference.pixels.shape == batch.pixels.shape
    with torch.enable_grad():
        generators = [torch.Generator().manual_seed(2) for _ in range(2)]
        with_reference = stage.loss(batch, generators[0])["velocity"]
        batch.reference.codes.fill_(0)
        batch.reference.pixels.fill_(1)
        other = stage.loss(batch, generators[1])["velocity"]
    assert with_reference.isfinite()
    assert with_reference != other


def test_half_of_the_decoders_scenes_have_a_shape_replaced_by_a_small_star(folder) -> None:
    stage = DecoderStage(Run(folder / "run", batch=16))
    stars = 0
    for i in range(200):
        before = draw_scene(np.random.default_rng([6, i]), 512, 512, texts=0)
        scene = stage._scene(np.random.default_rng([6, i]), 512, 512, [])
        for old, new in zip(before.items, scene.items, strict=True):
            assert new in (old, replace(old, shape="star", size="small"))
        stars += any((item.shape, item.size) == ("star", "small") for item in scene.items)
    assert 90 <= stars <= 130
