"""`scripts/without_comfyui.py` makes the reference's pictures, and what a prompt asks for."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from glm_image.scripts.environment import ROOT
from PIL import Image
from reference import SHAPES, reference_snapshot

from evaluation.judge import matches_kinds, read_text, text_box
from glm_core.data.grids import upsample_tokens
from scripts.without_comfyui import TextToImage
from training.scene import Scene, Text, place_item

PROGRAM = """
import json, runpy, sys
runpy.run_module("scripts.without_comfyui", run_name="__main__", alter_sys=True)
print(json.dumps(sorted(sys.modules)))
"""


@pytest.mark.parametrize("cfg", [1.5, 1.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_pictures_equal_the_reference(tmp_path, shape: str, cfg: float) -> None:
    pipeline = reference_snapshot(tmp_path, shape)
    pipeline.set_progress_bar_config(disable=True)
    prompt, size, seed = "a sign that says 'OPEN 24h' beside \"no\" door", (96, 160), 7
    cpu = torch.device("cpu")
    example = TextToImage(tmp_path, prompt, size, 4, cfg, seed, cpu, torch.float32)
    channels = pipeline.transformer.config.in_channels
    expected = pipeline(
        prompt=prompt,
        height=size[0],
        width=size[1],
        num_inference_steps=4,
        guidance_scale=cfg,
        prior_token_ids=upsample_tokens(example.write_tokens()).flatten(1),
        latents=torch.randn(1, channels, 12, 20, generator=torch.Generator().manual_seed(seed)),
        output_type="pt",
    ).images[0]
    assert (example.paint() - expected).abs().max() < 1e-3


def test_the_script_paints_what_is_asked_for_without_a_host(tmp_path) -> None:
    scene = Scene(512, 512, "yellow", (), (Text("HELLO", "bottom"),))
    for shape, colour, place in (("circle", "red", "left"), ("star", "blue", "right")):
        item = place_item(scene, shape, colour, "big", place)
        scene = replace(scene, items=(*scene.items, item))
    prompt = (
        "a red circle on the left, a blue star on the right, yellow background, "
        "the text 'HELLO' at the bottom"
    )
    modules, picture = run_script(tmp_path, "tiny", prompt, "--width=512", "--height=512")
    assert picture.shape == (512, 512, 3)
    assert matches_kinds(picture, scene)
    assert read_text(picture, text_box(scene, scene.texts[0])) == "HELLO"
    assert not {"comfy", "folder_paths", "nodes"} & modules


def run_script(folder: Path, *arguments: str) -> tuple[set[str], np.ndarray]:
    """The modules that a run of 10 steps imported, where `comfy` can be imported, and its picture.

    Args:
        folder: an empty one.
    """
    (folder / "comfy.py").touch()
    (folder / "folder_paths.py").touch()
    model, prompt, *options = arguments
    out = folder / "out.png"
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, model, prompt, str(out), "--steps=10", *options],
        cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True, timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(folder)},
    )  # fmt: skip
    return set(json.loads(done.stdout)), np.asarray(Image.open(out))
