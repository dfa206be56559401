"""A device plan through the front door."""

import numpy as np
import pytest
from glm_image.scripts.client import Client, PromptError
from graphs import planned, workflow
from pictures import first_image


def test_a_split_model_paints_the_same_picture(client: Client, picture) -> None:
    expected = picture(workflow(seed=31))
    prompt = workflow(seed=31)
    shown = planned(prompt, ar_split="cpu=0-0,cpu=1-1", decoder_split="cpu=0-0,cpu=1-1")
    run = client.run(prompt)
    assert np.array_equal(first_image(client, run, prompt), expected)
    (table,) = run.outputs[shown]["text"]
    assert "ar layers 0-0" in table
    assert "decoder layers 1-1" in table


def test_a_graph_of_another_machine_opens_here(client: Client, picture) -> None:
    expected = picture(workflow(seed=32))
    prompt = workflow(seed=32)
    shown = planned(prompt, decoder="gpu:6", ar_split="gpu:5=0-0,gpu:6=1-1")
    run = client.run(prompt)
    assert np.array_equal(first_image(client, run, prompt), expected)
    (table,) = run.outputs[shown]["text"]
    assert "decoder asks for gpu:6, which this machine does not have" in table


@pytest.mark.parametrize("split", ["cpu", "cpu=0-0", "cpu=0-0,cpu=0-1", "cpu=0-99999999999"])
def test_a_split_that_does_not_hold_is_one_sentence_at_the_plan(client, picture, split) -> None:
    prompt = workflow(seed=33)
    shown = planned(prompt, ar_split=split)
    with pytest.raises(PromptError, match=r"^[^\n]*ar_split[^\n]*$") as refusal:
        client.run(prompt)
    assert refusal.value.node_id == prompt[shown]["inputs"]["source"][0]
    assert picture(workflow(seed=33)).std() > 1
