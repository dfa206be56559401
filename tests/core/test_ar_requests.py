"""Requests that share a run: each is written as if it were alone, whatever the others are."""

import copy
from dataclasses import replace

import pytest
import reference
import torch
from ar_pair import CPU_FLOAT32, pair
from glm_image.glm_core.ar import writer
from glm_image.glm_core.ar.cache import SPAN
from glm_image.glm_core.ar.replay import EagerRunner, ReplayRunner
from glm_image.glm_core.ar.requests import SampleRequest, shared_runs, write_together
from glm_image.glm_core.ar.step import SamplingOptions
from glm_image.glm_core.data.grids import preview_grid
from glm_image.glm_core.data.tokens import UNKNOWN, Forced
from glm_image.glm_core.errors import GLMImageError
from glm_image.glm_core.placement import memory
from tape import Recorder

ONE = SampleRequest("a cat at the mat", 96, 64, 3, SamplingOptions())
PREVIEW = preview_grid(ONE.grid)
REFERENCES = (torch.arange(6).view(2, 3), torch.arange(9, 13).view(2, 2))


def locks(seed: int, free: int = 12) -> Forced:
    """Tokens of a seed, in all cells but the same few; some of these follow each other."""
    values = torch.randint(64, (1, *PREVIEW), generator=torch.Generator().manual_seed(seed))
    order = torch.randperm(values.numel(), generator=torch.Generator().manual_seed(1))
    mask = torch.ones(PREVIEW, dtype=torch.bool)
    mask.view(-1)[order[:free]] = False
    mask[9:12, 3:6] = False
    mask[0, 0] = False
    return Forced(values, mask)


def kept(row: int, value: int) -> Forced:
    """A large grid that is drawn anew from a row on."""
    mask = torch.zeros(ONE.grid, dtype=torch.bool)
    mask[:row] = True
    return Forced(torch.full((1, *ONE.grid), value), mask)


def all_but(*free: tuple[int, int]) -> Forced:
    """A preview with these cells free."""
    mask = torch.ones(PREVIEW, dtype=torch.bool)
    for cell in free:
        mask[cell] = False
    return Forced(torch.full((1, *PREVIEW), 7), mask)


LOCKED = [
    replace(ONE, preview=locks(1)),
    replace(ONE, preview=locks(2), seed=2**64 - 1, prompt="the heat " * 7),
    replace(ONE, preview=locks(3), seed=0, prompt="x"),
    replace(ONE, preview=locks(1), seed=9),
]
EDITS = [
    replace(ONE, references=REFERENCES),
    replace(ONE, references=REFERENCES[1:], seed=8, prompt="another"),
    replace(ONE, references=REFERENCES[::-1], seed=2),
]
LAYOUTS = [replace(request, kind="layout") for request in LOCKED[:3]]
MIXED = [
    replace(ONE, preview=all_but((0, 0), (4, 3), (4, 4), (9, 1))),
    replace(ONE, preview=all_but(), prompt="the heat " * 7, seed=4),
    replace(ONE, preview=all_but((0, 1), (4, 4), (4, 5)), large=kept(1, 9), seed=5),
    replace(ONE, preview=all_but((18, 12)), large=kept(2, 3), prompt="x"),
]
"""Other cells are locked and kept in each."""
GROUPS = {"locked": LOCKED, "edits": EDITS, "mixed": MIXED}


def written(requests, rows, model=None, shape="small", **how):
    both = pair(shape)
    model = model or both.model
    return write_together(model, both.tokenizer, requests, rows, **{**CPU_FLOAT32, **how})


def same(ours, expected) -> bool:
    return all(
        (mine is None and theirs is None) or torch.equal(mine, theirs)
        for mine, theirs in ((ours.tokens, expected.tokens), (ours.preview, expected.preview))
    )


def rounded(shape="small"):
    return copy.deepcopy(pair(shape).model).bfloat16()


# ---- alone -------------------------------------------------------------------------------------


def test_with_one_row_a_request_is_a_single_run():
    both = pair("small")
    (ours,) = written(LOCKED[:1], 1)
    tokens, preview = both.tokens(ONE.prompt, ONE.grid, seed=3, preview=LOCKED[0].preview)
    assert torch.equal(ours.tokens, tokens[0].int())
    assert torch.equal(ours.preview, preview[0].int())
    assert ours.tokens.dtype == torch.int32


@pytest.mark.parametrize("lookahead", [1, 4])
@pytest.mark.parametrize("shape", reference.SHAPES)
def test_each_of_a_run_is_its_single_run(shape, lookahead):
    """Prompts of several lengths, seeds, locked tokens; one row has no request."""
    requests = [replace(request, lookahead=lookahead) for request in LOCKED]
    together = written(requests, 5, shape=shape)
    for request, ours in zip(requests, together, strict=True):
        assert same(ours, written([request], 1, shape=shape)[0])
    assert len({tuple(ours.tokens.flatten().tolist()) for ours in together}) == 4


@pytest.mark.parametrize("requests", [EDITS, LAYOUTS], ids=["edits", "layouts"])
def test_references_and_layouts_of_their_own(requests):
    for request, ours in zip(requests, written(requests, 3), strict=True):
        assert same(ours, written([request], 1)[0])
        assert (ours.preview is None) == bool(request.references)
        assert (ours.tokens is None) == (request.kind == "layout")


@pytest.mark.parametrize(("shape", "lookahead"), [("small", 1), ("deep", 4)])
def test_locks_of_their_own(shape, lookahead):
    """All of the preview, and all but some cells, with parts of the large grid."""
    requests = [replace(one, lookahead=lookahead) for one in MIXED]
    for request, ours in zip(requests, written(requests, 5, shape=shape), strict=True):
        assert same(ours, written([request], 1, shape=shape)[0])


def test_forced_cells_are_read_in_parts_of_bounded_size(monkeypatch):
    lengths, read_cells = [], writer.read_cells

    def spied(model, buffers, cells, *rest):
        lengths.append(len(cells))
        return read_cells(model, buffers, cells, *rest)

    expected = written(MIXED[:2], 2)
    monkeypatch.setattr(writer, "MOST_READ", 2 * 50)
    monkeypatch.setattr(writer, "read_cells", spied)
    for ours, before in zip(written(MIXED[:2], 2), expected, strict=True):
        assert same(ours, before)
    assert max(lengths) == 50
    assert sum(length == 50 for length in lengths) > 4


def test_a_run_has_no_pass_that_no_sample_needs():
    """One for each cell that is free in some sample, and one for forced cells of some sample."""

    def passes(requests, **how):
        calls = []
        written(requests, 3, check_interrupt=lambda: calls.append(1), **how)
        return len(calls)

    rows = [replace(ONE, preview=all_but(*((row, c) for c in range(13)))) for row in (0, 5)]
    large = 6
    prompts, forced = 1, 1  # of equal prompts; from the preview's row to the large grid
    assert passes(rows[:1]) == prompts + 12 + forced + large - 1
    assert passes(rows[1:]) == prompts + forced + 12 + forced + large - 1
    assert passes(rows) == prompts + 12 + forced + 12 + 2 * forced + large - 1
    assert passes(rows, gone=lambda: [1]) == passes(rows[:1])


def test_tokens_kept_of_others():
    """Large grids with the same region to redraw."""
    mask = torch.zeros(3, 2, dtype=torch.bool)
    mask[1] = True
    requests = [
        replace(LOCKED[i], large=Forced(torch.full((1, 3, 2), 10 + i), mask)) for i in (0, 1)
    ]
    for i, (request, ours) in enumerate(zip(requests, written(requests, 2), strict=True)):
        assert same(ours, written([request], 1)[0])
        assert ours.tokens[1].tolist() == [10 + i] * 2


@pytest.mark.parametrize("lookahead", [1, 4])
def test_replayed_steps_write_the_same_tokens(lookahead):
    """With recordings of steps that later prompts of other lengths, and locks, replay."""
    recorder = Recorder()
    runner = ReplayRunner(lambda: recorder)
    requests = [replace(one, lookahead=lookahead) for one in (*LOCKED[:2], *MIXED[1:3])]
    for some in (requests[:2], requests[2:], requests[:1]):
        for ours, expected in zip(written(some, 2, runner=runner), written(some, 2), strict=True):
            assert same(ours, expected)
    assert len(recorder.tapes) == 1  # of one span, for all prompts
    assert recorder.tapes[0].calls


# ---- neighbours --------------------------------------------------------------------------------


@pytest.mark.parametrize("lookahead", [1, 4])
@pytest.mark.parametrize(
    ("shape", "group"),
    [("small", "locked"), ("wide", "edits"), ("wide", "mixed")],
)
def test_in_bf16_a_request_does_not_depend_on_its_neighbours(shape, group, lookahead):
    """Nor on the row that it is written in, or on rows without a request: to the bit, in what the
    cache holds."""
    how = {"model": rounded(shape), "shape": shape, "dtype": torch.bfloat16}
    requests = [replace(request, lookahead=lookahead) for request in GROUPS[group]]
    runners = {name: Keeping() for name in ("together", "turned")}
    together = written(requests, 4, runner=runners["together"], **how)
    turned = written(requests[::-1], 4, runner=runners["turned"], **how)[::-1]
    for row, request in enumerate(requests):
        alone = Keeping()
        (expected,) = written([request], 4, runner=alone, **how)
        cached = alone.cached(request, 0)
        for ours, runner, at in (
            (together, "together", row),
            (turned, "turned", len(requests) - 1 - row),
        ):
            assert same(ours[row], expected)
            assert torch.equal(runners[runner].cached(request, at), cached)


class Keeping(EagerRunner):
    """Keeps the buffers of its last run."""

    def buffers(self, model, shape):
        self.kept = super().buffers(model, shape)
        return self.kept

    def cached(self, request: SampleRequest, row: int) -> torch.Tensor:
        """Keys and values of all that a sample had read when its last cell was drawn."""
        given = [(request.large, request.grid)]
        if not request.references:
            given.insert(0, (request.preview, PREVIEW))
        free = [torch.ones(grid) if one is None else ~one.mask for one, grid in given]
        end = SPAN + int(torch.cat([cells.flatten() for cells in free]).nonzero().max())
        layers = torch.stack(self.kept.cache.layers)
        return layers[:, :, row, :, int(self.kept.first[row]) : end]


def test_memory_is_what_the_plan_counts():
    """Beside it are rotations and noise, at full size a twentieth of the cache."""
    runner, config = ReplayRunner(Recorder), pair("small").model.config
    written(LOCKED[:1], 5, runner=runner)
    assert runner.nbytes == config.layers * memory.kv_cache(config, 5, 256 + 253, torch.float32)


def test_shown_are_the_requests_alone():
    seen = []
    (ours,) = written(LOCKED[:1], 3, show=seen.append)
    assert {tuple(grid.shape for grid in grids) for grids in seen} == {
        ((1, *PREVIEW), (1, *ONE.grid))
    }
    assert (seen[0][1] == UNKNOWN).all()
    assert torch.equal(seen[-1][1][0].int(), ours.tokens)


def test_each_is_told_when_its_last_cell_is_drawn():
    """Before the run ends, and those that are gone never."""
    told, passes = [], []

    def note(index, one):
        told.append((index, len(passes), one))

    requests = [
        replace(MIXED[0], large=kept(1, 2)),
        replace(MIXED[0], preview=all_but((3, 3)), large=kept(3, 5)),
        MIXED[1],
        replace(MIXED[1], preview=all_but(), large=kept(3, 5)),
    ]
    done = written(
        requests,
        5,
        finished=note,
        check_interrupt=lambda: passes.append(1),
        gone=lambda: [2] * (len(passes) > 8),
    )
    assert [index for index, *_ in told] == [3, 1, 0]
    assert all(count < len(passes) for _, count, _ in told[:2])
    for index, _, one in told:
        assert same(one, done[index])
        assert same(one, written([requests[index]], 1)[0])


def test_an_interrupt_between_prompts_stops_the_run():
    class StoppedError(Exception):
        pass

    calls = []

    def interrupt():
        calls.append(1)
        if len(calls) == 2:
            raise StoppedError

    with pytest.raises(StoppedError):
        written(LOCKED, 4, check_interrupt=interrupt)
    assert len(calls) == 2


# ---- who shares a run --------------------------------------------------------------------------


def test_requests_share_runs_by_size_and_options():
    requests = [
        ONE,
        replace(ONE, prompt="another", seed=9),
        replace(ONE, height=64),
        replace(ONE, preview=locks(1)),
        replace(ONE, options=SamplingOptions(top_k=3)),
        replace(ONE, prompt="far " * 300),
        replace(ONE, references=REFERENCES),
        replace(ONE, seed=10, large=kept(1, 2)),
    ]
    tokenizer = pair("small").tokenizer
    assert shared_runs(tokenizer, requests, 16) == [[0, 1, 3, 7], [2], [4], [5], [6]]
    assert shared_runs(tokenizer, requests, 2) == [[0, 1], [3, 7], [2], [4], [5], [6]]


@pytest.mark.parametrize(
    ("requests", "rows", "said"),
    [
        ([ONE] * 3, 2, "3 requests for a run of 2 rows"),
        ([ONE, replace(ONE, height=64)], 2, "differ in size or options"),
    ],
)
def test_requests_that_cannot_share_a_run(requests, rows, said):
    with pytest.raises(GLMImageError, match=said):
        written(requests, rows)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"kind": "both"}, "'both'; use tokens or layout"),
        ({"kind": "layout", "references": REFERENCES}, "neither tokens nor references"),
        ({"preview": locks(1), "references": REFERENCES}, "no preview to lock cells of"),
        ({"height": 50}, "64x50 pixels has no grid"),
        ({"preview": kept(1, 2)}, "a grid of 3x2 .* but this image has 19x13"),
        ({"large": locks(1)}, "a grid of 19x13 .* but this image has 3x2"),
    ],
)
def test_a_request_that_makes_no_sense(change, said):
    with pytest.raises(GLMImageError, match=said):
        replace(ONE, **change)
