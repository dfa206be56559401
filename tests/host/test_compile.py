"""The decoder under torch.compile, whole and split: the same picture, a step in one graph, and no
compiling once it knows a size."""

from dataclasses import dataclass, field
from typing import Any

import comfy.sd
import pytest
import torch
from comfy.ldm.modules.attention import attention_pytorch
from comfy_api.torch_helpers import set_torch_compile_wrapper
from helpers import Stages, planned, same, stages
from torch import Tensor, nn
from torch._dynamo.backends.registry import lookup_backend

SIZE = (64, 96)
PROMPTS = (
    "a poster with the words 'ONE' and 'TWO'",
    "a shop called 'GREENGROCER'",
    "the word 'OPEN' on a door",
)
CUTS = {"whole": "", "split": "cpu=0-0,cpu=1-1"}


@dataclass
class Graphs:
    """A backend that runs graphs as they are, and remembers the tensors that each was given."""

    inputs: list[set[int]] = field(default_factory=list)
    calls: int = 0

    def __call__(self, module: Any, example: list) -> Any:
        run, given = lookup_backend("eager")(module, example), set()
        self.inputs.append(given)

        def call(*args: Any) -> Any:
            self.calls += 1
            given.update(arg.data_ptr() for arg in args if isinstance(arg, Tensor))
            return run(*args)

        return call

    def holds(self, weights: list[Tensor]) -> list[bool]:
        """For each graph, whether it reads all of the weights."""
        wanted = {weight.data_ptr() for weight in weights}
        return [wanted <= given for given in self.inputs]


@pytest.fixture(scope="module", params=CUTS)
def model(nodes, request) -> Any:
    """A MODEL with PyTorch's attention, as on a GPU: that of the host on a CPU asks for the free
    memory in its midst, which no graph can hold."""
    torch._dynamo.reset()
    plan, _ = planned(nodes, decoder_split=CUTS[request.param])
    loaded = nodes["GLMImageLoadDecoder"].execute("small", "default", plan).result[0]
    model = loaded.clone()
    model.model_options["transformer_options"]["optimized_attention_override"] = (
        lambda _, *args, **kwargs: attention_pytorch(*args, **kwargs)
    )
    yield model
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def whole_step(model) -> Any:
    """The MODEL compiled as a whole, once for several tests, and its graphs."""
    return compiled(model)


def compiled(model: Any, keys: list[str] | None = None) -> tuple[Any, Graphs]:
    """As the host's node leaves it."""
    clone, graphs = model.clone(), Graphs()
    set_torch_compile_wrapper(model=clone, backend=graphs, keys=keys)
    return clone, graphs


def blocks(model: Any) -> list[nn.Module]:
    """All blocks of the decoder, wherever they lie."""
    network = model.model.diffusion_model
    return [
        *network.transformer_blocks,
        *(block for part in network.segments for block in part.layers),
    ]


def decode(nodes: dict, model: Any, run: Stages) -> Tensor:
    inputs = (run.positive, run.negative, run.empty, run.seed, 2, 1.5, 1.0)
    return nodes["GLMImageDecode"].execute(model, *inputs).result[0]["samples"]


def test_no_compiling_after_the_second_prompt_of_a_size(nodes, model, whole_step) -> None:
    ours, graphs = whole_step
    counts = []
    for seed, prompt in enumerate(PROMPTS):
        run = stages(nodes, "small", prompt, SIZE, seed=seed, steps=2)
        assert same(decode(nodes, ours, run), decode(nodes, model, run))
        counts.append(len(graphs.inputs))
    assert counts[0] > 0
    assert counts[1] == counts[-1]


def test_a_step_is_one_graph_of_every_block(nodes, model, whole_step) -> None:
    ours, graphs = whole_step
    decode(nodes, ours, stages(nodes, "small", PROMPTS[0], SIZE))
    weights = [weight for block in blocks(model) for weight in block.parameters()]
    whole = graphs.holds(weights)
    assert any(whole)
    for weight in weights:  # a step in pieces would have graphs with some of the weights
        assert graphs.holds([weight]) == whole


def test_a_lora_reaches_the_last_block_of_a_compiled_model(nodes, model, whole_step) -> None:
    run = stages(nodes, "small", PROMPTS[0], SIZE)
    ours, graphs = whole_step
    before = graphs.calls
    plain = decode(nodes, ours, run)
    calls = graphs.calls - before
    layer = blocks(model)[-1].ff.net[2].weight
    generator = torch.Generator().manual_seed(3)
    lora = {
        f"diffusion_model.transformer_blocks.1.ff.net.2.{part}.weight": torch.randn(
            shape, generator=generator
        )
        for part, shape in {"lora_A": (2, layer.shape[1]), "lora_B": (layer.shape[0], 2)}.items()
    }
    eager, patched = (
        comfy.sd.load_lora_for_models(patcher, None, lora, 1.0, 0.0)[0] for patcher in (model, ours)
    )
    expected = decode(nodes, eager, run)
    assert not same(expected, plain)
    assert same(decode(nodes, patched, run), expected)
    assert graphs.calls - before == 2 * calls > 0
    assert same(decode(nodes, ours, run), plain)


def test_compiled_by_block_the_blocks_that_lie_apart_run_as_they_are(nodes, model) -> None:
    """Such nodes list the blocks of the MODEL's own module tree."""
    own = model.model.diffusion_model.transformer_blocks
    keys = [f"diffusion_model.transformer_blocks.{i}" for i in range(len(own))]
    ours, graphs = compiled(model, keys)
    run = stages(nodes, "small", PROMPTS[0], SIZE)
    assert same(decode(nodes, ours, run), decode(nodes, model, run))
    reached = [any(graphs.holds(list(block.parameters()))) for block in blocks(model)]
    assert reached == [i < len(own) for i in range(len(reached))]
