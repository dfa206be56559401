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
    messages = []
    client.run(prompt, on_picture=messages.append)
    (text,) = [m.decode() for m in messages if b"does not read 'guidance'" in m]
    node = the(prompt, sampler)
    assert text.split("GLM-Image's decoder")[0].endswith(node)
