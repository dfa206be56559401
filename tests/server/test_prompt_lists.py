"""Lists of prompts through a real server."""

import numpy as np
from graphs import changed, fresh, the, workflow
from pictures import pixels

PROMPTS = ["a red door", "a longer text about the sea and 'TWO BOATS' on it"]


def pictures(client, prompt) -> list[np.ndarray]:
    run = client.run(prompt)
    return [pixels(png) for png in client.images(run, the(prompt, "SaveImage"))]


def set_prompts(prompt, *texts: str):
    prompt[the(prompt, "PrimitiveStringMultiline")]["inputs"]["value"] = "\n".join(texts)
    return prompt


def test_each_picture_of_a_list_is_that_of_its_prompt_alone(client):
    listed = set_prompts(fresh("prompts_from_list"), *PROMPTS)
    sampler = listed[the(listed, "GLMImageSampleTokens")]["inputs"]
    assert sampler["rows"] == 16
    together = pictures(client, listed)
    one_by_one = pictures(client, changed(listed, rows=1))
    alone = [
        pictures(client, set_prompts(workflow(seed=sampler["seed"]), text))[0] for text in PROMPTS
    ]
    for picture, other, single in zip(together, one_by_one, alone, strict=True):
        np.testing.assert_array_equal(picture, single)
        np.testing.assert_array_equal(other, single)
    assert (together[0] != together[1]).any()
