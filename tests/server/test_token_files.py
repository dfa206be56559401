"""Semantic tokens through files: saved to output, loaded from output and from input."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from glm_image.scripts.client import PromptError
from graphs import add, fresh, relink, the, upstream
from safetensors import safe_open
from safetensors.torch import load_file, save_file


@pytest.fixture
def saved(client, base, picture):
    """A prompt, its picture and its token file."""
    prompt = fresh(batch_size=2)
    expected = picture(prompt)
    tokens = the(prompt, "GLMImageSampleTokens")
    add(
        prompt,
        "GLMImageSaveTokens",
        tokens=[tokens, 0],
        layout=[tokens, 1],
        filename_prefix="tokens/test",
    )
    before = set((base / "output").rglob("*.safetensors"))
    client.run(prompt)
    (file,) = set((base / "output").rglob("*.safetensors")) - before
    return prompt, expected, file


def _load_instead(prompt, file: str) -> str:
    sampler = the(prompt, "GLMImageSampleTokens")
    loader = add(prompt, "GLMImageLoadTokens", file=file)
    relink(prompt, (sampler, 0), (loader, 0))
    relink(prompt, (sampler, 1), (loader, 1))
    wanted = set(upstream(prompt, the(prompt, "SaveImage")))
    for node_id in set(prompt) - wanted:
        del prompt[node_id]
    return loader


def test_the_file_is_what_the_contract_says(saved):
    _, _, file = saved
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(file)
    assert tensors["tokens"].shape == (2, 2, 3)
    assert tensors["preview"].shape[0] == 2
    assert tensors["tokens"].dtype == tensors["preview"].dtype == torch.int32
    assert metadata["format"] == "glm_image_tokens"
    assert metadata["version"] == "1"
    assert (metadata["width"], metadata["height"]) == ("96", "64")
    assert metadata["codebook"] == "64"
    json.loads(metadata["info"])


def test_the_prefix_may_be_long_and_name_the_size_and_the_date(client):
    prompt = fresh()
    tokens = [the(prompt, "GLMImageSampleTokens"), 0]
    prefix = f"tokens/%width%x%height%_%year%_{'n' * 210}"
    saver = add(prompt, "GLMImageSaveTokens", tokens=tokens, filename_prefix=prefix)
    (file,) = client.run(prompt).outputs[saver]["tokens"]
    assert re.fullmatch(r"96x64_\d{4}_n{210}_00001_\.safetensors", file["filename"])


def test_a_name_that_the_system_refuses_gives_a_sentence(client):
    prompt = fresh()
    tokens = [the(prompt, "GLMImageSampleTokens"), 0]
    add(prompt, "GLMImageSaveTokens", tokens=tokens, filename_prefix="n" * 300)
    with pytest.raises(PromptError, match=r"File name too long.*choose another filename_prefix"):
        client.run(prompt)


def test_loaded_from_output_it_gives_the_same_picture_without_the_ar(client, base, picture, saved):
    prompt, expected, file = saved
    _load_instead(prompt, f"{file.relative_to(base / 'output')} [output]")
    assert the(prompt, "GLMImageLoadTokens") not in client.run(prompt).cached
    np.testing.assert_array_equal(picture(prompt), expected)


def test_loaded_from_input_it_is_found_changed_when_its_content_is(client, base, picture, saved):
    prompt, expected, file = saved
    copy = base / "input" / "copied.safetensors"
    shutil.copy(file, copy)
    loader = _load_instead(prompt, copy.name)
    np.testing.assert_array_equal(picture(prompt), expected)
    assert loader in client.run(prompt).cached
    _rewrite(copy, lambda tensors, metadata: tensors["tokens"].add_(1).remainder_(64))
    run = client.run(prompt)
    assert loader in run.executed
    assert (picture(prompt) != expected).any()


def test_a_link_in_the_input_folder_may_lead_out_of_it(base, tmp_path, picture, saved):
    prompt, expected, file = saved
    target = shutil.copy(file, tmp_path / "target.safetensors")
    (base / "input" / "linked.safetensors").symlink_to(target)
    _load_instead(prompt, "linked.safetensors")
    np.testing.assert_array_equal(picture(prompt), expected)


def _corrupt(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-5])


def _no_safetensors(file: Path) -> None:
    file.write_text("these are no tokens")


def _newer(file: Path) -> None:
    _rewrite(file, lambda tensors, metadata: metadata.update(version="2"))


def _too_large(file: Path) -> None:
    save_file({"tokens": torch.zeros(1, 5000, 5000, dtype=torch.int32)}, file)


def _foreign(file: Path) -> None:
    _rewrite(file, lambda tensors, metadata: metadata.update(format="something else"))


def _illegal_ids(file: Path) -> None:
    _rewrite(file, lambda tensors, metadata: tensors["tokens"].fill_(64))


def _rewrite(file: Path, change) -> None:
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(file)
    change(tensors, metadata)
    save_file(tensors, file, metadata)


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (_corrupt, "spoiled"),
        (_no_safetensors, "spoiled"),
        (_newer, "version"),
        (_too_large, "MiB"),
        (_foreign, "no semantic tokens"),
        (_illegal_ids, "64"),
    ],
)
def test_a_bad_file_is_refused_with_a_sentence(client, base, picture, saved, spoil, sentence):
    prompt, _, file = saved
    copy = base / "input" / "spoiled.safetensors"
    shutil.copy(file, copy)
    spoil(copy)
    loader = _load_instead(prompt, copy.name)
    with pytest.raises(PromptError, match=sentence) as refusal:
        client.run(prompt)
    assert refusal.value.node_id == loader
    assert "Traceback" not in str(refusal.value)
    assert picture(fresh()).std() > 1


@pytest.mark.parametrize(
    "name", ["../models/loras/native.safetensors", "/etc/hostname", "missing.safetensors"]
)
def test_a_file_outside_the_folders_is_refused(client, picture, saved, name):
    prompt, _, _ = saved
    loader = _load_instead(prompt, name)
    with pytest.raises(PromptError, match="input folder") as refusal:
        client.run(prompt)
    assert refusal.value.node_id == loader
    assert picture(fresh()).std() > 1
