"""What the decoder does not do for other nodes is shown on the node that samples."""

import pytest
from graphs import add, fresh, relink, the


@pytest.mark.parametrize(
    ("name", "sampler"),
    [("text_to_image", "GLMImageDecode"), ("text_to_image_ksampler", "KSampler")],
)
def test_the_sampling_node_says_what_is_not_read(client, name, sampler):
    prompt = fresh(name=name)
    apply = the(prompt, "GLMImageApplyTokens")
    guidance = add(prompt, "FluxGuidance", guidance=3.5)
    relink(prompt, (apply, 0), (guidance, 0))
    prompt[guidance]["inputs"]["conditioning"] = [apply, 0]
    events = []
    client.run(prompt, on_event=events.append)
    (notice,) = [event["data"] for event in events if event["type"] == "glm_image.notice"]
    assert notice["node"] == the(prompt, sampler)
    assert "does not read 'guidance'" in notice["text"]
