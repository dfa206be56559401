"""The decoder under torch.compile: the same picture, and no compiling once it knows a size."""

import pytest
import torch
from comfy_api.torch_helpers import set_torch_compile_wrapper
from helpers import relative_error, stages
from torch._dynamo.backends.registry import lookup_backend

SIZE = (64, 96)
PROMPTS = (
    "a poster with the words 'ONE' and 'TWO'",
    "a shop called 'GREENGROCER'",
    "the word 'OPEN' on a door",
)


@pytest.fixture
def compiled(nodes):
    """A MODEL as the host's node leaves it, with a backend that counts; and the count."""
    torch._dynamo.reset()
    (model,) = nodes["GLMImageLoadDecoder"].execute("small", "default").result
    graphs: list[int] = []

    def backend(module, inputs):
        graphs.append(len(module.graph.nodes))
        return lookup_backend("eager")(module, inputs)

    clone = model.clone()
    set_torch_compile_wrapper(model=clone, backend=backend)
    yield clone, graphs
    torch._dynamo.reset()


def test_no_compiling_after_the_second_prompt_of_a_size(nodes, compiled) -> None:
    model, graphs = compiled
    counts = []
    for seed, prompt in enumerate(PROMPTS):
        run = stages(nodes, "small", prompt, SIZE, seed=seed, steps=2)
        inputs = (run.positive, run.negative, run.empty, seed, 2, 1.5, 1.0)
        (latent,) = nodes["GLMImageDecode"].execute(model, *inputs).result
        assert relative_error(latent["samples"], run.latent["samples"]) < 1e-5
        counts.append(len(graphs))
    assert counts[0] > 0
    assert counts[1] == counts[-1]
    assert max(graphs) > 50  # the blocks are in a graph, not broken into single operations
