"""Load Checkpoint in place of the four loaders, and a model that is converted while served."""

import os
import shutil

import numpy as np
import pytest
from glm_image.glm_core.files.conversion import convert
from glm_image.glm_core.files.opening import open_component
from glm_image.scripts.client import PromptError
from graphs import LOADERS, MODEL, add, fresh, relink, the

CONVERTED = "Converted"


def with_one_loader(prompt: dict, model: str = MODEL) -> str:
    """Puts one loader in the place of four; returns its id."""
    loader = add(prompt, "GLMImageLoadCheckpoint", model_name=model, weight_dtype="default")
    for slot, kind in enumerate(LOADERS):
        old = the(prompt, kind)
        relink(prompt, (old, 0), (loader, slot))
        del prompt[old]
    return loader


def test_one_loader_gives_the_picture_of_four(picture) -> None:
    prompt = fresh()
    expected = picture(prompt)
    with_one_loader(prompt)
    np.testing.assert_array_equal(picture(prompt), expected)


def test_a_model_that_is_converted_is_loaded_anew(base, client, picture) -> None:
    models = base / "models" / "glm_image"
    folder = shutil.copytree(models / MODEL, models / CONVERTED, copy_function=os.link)
    prompt = fresh()
    loader = with_one_loader(prompt, CONVERTED)
    before = picture(prompt)
    assert loader in client.run(prompt).cached
    convert(open_component(folder, "decoder"), "int4", folder, lambda *_: None)
    run = client.run(prompt)
    assert loader in run.executed
    assert picture(prompt).shape == before.shape
    assert (picture(prompt) != before).any()


def test_a_model_without_a_decoder(client) -> None:
    prompt = fresh()
    loader = with_one_loader(prompt, "No-Decoder")
    with pytest.raises(PromptError, match="has no folder 'transformer'") as refusal:
        client.run(prompt)
    assert refusal.value.node_id == loader
