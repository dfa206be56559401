"""Split networks equal whole ones bit for bit, and a second device shows every missing move."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from ar_pair import pair as ar_pair
from glm_image.glm_core.ar.cache import SPAN, BlockPass, StepPass, step_mask
from glm_image.glm_core.ar.model import ARModel, layer_segment, rope_table
from glm_image.glm_core.ar.step import SamplingOptions
from glm_image.glm_core.data.grids import preview_grid
from glm_image.glm_core.data.tokens import Forced
from glm_image.glm_core.decoder.model import Decoder, block_segment
from glm_image.glm_core.split import LayerSegment
from test_decoder import inputs, pair
from test_decoder_references import cached, reference_images
from torch import nn
from torch.overrides import TorchFunctionMode

CPU, META = torch.device("cpu"), torch.device("meta")
CUTS = {"patch of 1": [(1,), (2,), (1, 2)], "small": [(1,)]}
SPLITS = [(shape, cuts) for shape, all_cuts in CUTS.items() for cuts in all_cuts]


def split_decoder(whole: Decoder, cuts: tuple[int, ...], device: torch.device = CPU) -> Decoder:
    """The same network with a segment on `device` for the blocks from each cut on."""
    numbers = numbers_of(cuts, whole.config.num_layers)
    with torch.device("meta"):
        segments = [block_segment(whole.config, some, device) for some in numbers]
        ours = Decoder(whole.config, segments=segments)
    for module in (ours, *segments):
        give_weights(module, whole.state_dict())
    return ours


def split_ar(whole: ARModel, cuts: tuple[int, ...], device: torch.device = CPU) -> ARModel:
    numbers = numbers_of(cuts, whole.config.layers)
    segments = [layer_segment(whole.config, some, device, device="meta") for some in numbers]
    ours = ARModel(whole.config, device="meta", segments=segments)
    for module in (ours, *segments):
        give_weights(module, whole.state_dict())
    return ours


def numbers_of(cuts: tuple[int, ...], total: int) -> list[range]:
    return [range(start, end) for start, end in zip(cuts, (*cuts[1:], total), strict=True)]


def give_weights(module: nn.Module, state: dict[str, torch.Tensor]) -> None:
    mine = {key: state[key] for key in module.state_dict()}
    if isinstance(module, LayerSegment):
        mine = {key: value.to(module.compute_device) for key, value in mine.items()}
    module.load_state_dict(mine, assign=True)


@pytest.mark.parametrize(("shape", "cuts"), SPLITS)
def test_a_split_decoder_is_the_whole_one(shape: str, cuts: tuple[int, ...]) -> None:
    whole, _ = pair(shape)
    split = split_decoder(whole, cuts)
    args = inputs(whole.config, rows=6, cols=4)
    assert torch.equal(split(**args), whole(**args))

    images = reference_images(whole.config)
    ours, theirs = (cached(network, images) for network in (split, whole))
    for ((keys, values),), ((their_keys, their_values),) in zip(ours, theirs, strict=True):
        assert torch.equal(keys, their_keys)
        assert torch.equal(values, their_values)
    assert torch.equal(split(**args, references=ours), whole(**args, references=theirs))


@pytest.mark.parametrize(("shape", "cuts"), [("small", (1,)), ("deep", (1, 3)), ("wide", (2,))])
@pytest.mark.parametrize("lookahead", [1, 4])
def test_a_split_ar_model_writes_the_tokens_of_the_whole_one(shape, cuts, lookahead) -> None:
    whole, grid = ar_pair(shape), (5, 7)
    split = replace(whole, model=split_ar(whole.model, cuts))
    codes = whole.model.config.codebook
    layout = preview_grid(grid)
    mask = torch.eye(*layout) > 0
    mask[2:-2] = True  # most of it, but cells before and after position 256 are drawn
    forced = Forced(torch.arange(layout[0] * layout[1]).view(1, *layout) % codes, mask)
    for options in (SamplingOptions(), SamplingOptions(temperature=0)):
        how = {"seed": 5, "batch": 2, "options": options, "lookahead": lookahead}
        ours = split.tokens("a cat", grid, forced, **how)
        theirs = whole.tokens("a cat", grid, forced, **how)
        assert all(map(torch.equal, ours, theirs))


def split_networks() -> dict:
    whole, _ = pair("patch of 1")
    ar = ar_pair("deep").model
    return {
        "decoder": (whole, split_decoder(whole, (1, 2))),
        "ar": (ar, split_ar(ar, (1, 3))),
    }


@pytest.mark.parametrize("network", ["decoder", "ar"])
def test_segments_have_the_networks_keys_and_are_not_in_it(network: str) -> None:
    whole, split = split_networks()[network]
    keys = [set(module.state_dict()) for module in (split, *split.segments)]
    assert set.union(*keys) == set(whole.state_dict())
    assert sum(map(len, keys)) == len(whole.state_dict())
    parameters = {id(p) for p in split.parameters()}
    assert not any(id(p) in parameters for part in split.segments for p in part.parameters())


def test_a_segment_takes_a_hosts_prefix() -> None:
    whole, _ = pair("patch of 1")
    part = block_segment(whole.config, range(1, 3), CPU, prefix="diffusion_model.")
    assert next(iter(part.state_dict())).startswith("diffusion_model.transformer_blocks.1.")
    assert part.holds("diffusion_model.transformer_blocks.2.attn1.to_q.weight")
    assert not part.holds("diffusion_model.transformer_blocks.20.attn1.to_q.weight")


def test_blocks_are_run_under_the_numbers_of_the_whole(monkeypatch) -> None:
    whole, _ = pair("patch of 1")
    run_block, seen = Decoder.run_block, []

    def numbered(self, index: int, *args):
        seen.append(index)
        return run_block(self, index, *args)

    monkeypatch.setattr(Decoder, "run_block", numbered)
    args = inputs(whole.config, rows=2, cols=2)
    assert torch.equal(split_decoder(whole, (1, 2))(**args), whole(**args))
    assert seen == [0, 1, 2] * 2


# ---- no move between devices is missing ----------------------------------------------------------


class Moves(TorchFunctionMode):
    """Counts the moves of tensors to another device, and leaves one of them out.

    Tensors come back from the meta device, which has no numbers, as zeros. Otherwise torch's own
    rules apply: an operation over tensors of two devices is an error.
    """

    def __init__(self, missing: int | None = None) -> None:
        super().__init__()
        self.missing = missing
        self.count = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.to and isinstance(args[1], torch.device):
            x, device = args
            self.count += x.device != device
            if x.device != device and self.count == self.missing:
                return x
            if x.is_meta and device == CPU:
                return torch.zeros(x.shape, dtype=x.dtype)
        return func(*args, **(kwargs or {}))


def every_move_is_needed(run: Callable[[], object]) -> int:
    """The number of moves in a run, which must fail if any one of them is left out."""

    def run_without(missing: int | None) -> int:
        with Moves(missing) as moves:
            run()
        return moves.count

    total = run_without(None)
    for missing in range(1, total + 1):
        with pytest.raises(RuntimeError):
            run_without(missing)
    return total


@pytest.mark.parametrize("cuts", [(1,), (2,), (1, 2)])
def test_no_move_of_the_decoder_is_missing(cuts: tuple[int, ...]) -> None:
    whole, _ = pair("patch of 1")
    split = split_decoder(whole, cuts, device=META)
    args = inputs(whole.config, rows=2, cols=2)
    found = every_move_is_needed(lambda: split(**args))
    assert found == 2 * len(cuts) + 3 + 1  # cos and sin a segment; img, txt, vec; img back


def test_no_move_of_the_decoder_over_a_reference_is_missing() -> None:
    whole, _ = pair("patch of 1")
    split = split_decoder(whole, (1,), device=META)
    (image, _) = reference_images(whole.config)

    def run() -> None:
        pairs = list(split.reference_keys_values(image["x"], image["tokens"], image["size"]))
        assert [key.device for key, _ in pairs] == [CPU, META, META]

    assert every_move_is_needed(run) == 2 + 3


@pytest.mark.parametrize("cuts", [(1,), (3,), (1, 3)])
@pytest.mark.parametrize("kind", ["step", "block", "block of some samples"])
def test_no_move_of_the_ar_model_is_missing(cuts: tuple[int, ...], kind: str) -> None:
    split = split_ar(ar_pair("deep").model, cuts, device=META)
    ids = torch.zeros(1, 1 if kind == "step" else 3, dtype=torch.int64)
    rope = rope_table(split.config, torch.arange(ids.shape[1]).expand(3, -1), torch.float32)
    cache = split.new_cache(1, SPAN, CPU, torch.float32)
    assert [layer.device for layer in cache.layers] == [
        CPU if i < cuts[0] else META for i in range(split.config.layers)
    ]
    if kind == "step":
        position = torch.tensor([5])
        sharing = split.config.heads // split.config.kv_heads
        reading = StepPass(cache, position, step_mask(position, sharing, SPAN, torch.float32))
    elif kind == "block":
        reading = BlockPass(cache, 5)
    else:
        reading = BlockPass(cache, 5, first=torch.tensor([2]), samples=torch.tensor([0]))

    def run() -> None:
        assert split(ids, rope, reading, torch.float32).device == CPU

    found = every_move_is_needed(run)
    # Once for every segment: rope; a step's position and mask; where samples begin, and which.
    each = 1 if kind == "block" else 3
    assert found == each * len(cuts) + 2  # and the states there and back
