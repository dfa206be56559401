"""Sampling: greedy tokens and probabilities are the reference's; nothing else moves a draw."""

import itertools

import pytest
import reference
import torch
from ar_pair import CPU_FLOAT32, pair, run
from glm_image.glm_core.ar import sampler as ar_sampler
from glm_image.glm_core.ar import step as ar_step
from glm_image.glm_core.ar.philox import gumbel, sample_keys
from glm_image.glm_core.ar.sampler import sample_tokens
from glm_image.glm_core.ar.step import SamplingOptions, filter_logits, gumbel_max
from glm_image.glm_core.data.grids import preview_grid
from glm_image.glm_core.data.tokens import UNKNOWN, Forced
from glm_image.glm_core.errors import GLMImageError
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

GREEDY = SamplingOptions(temperature=0)
PROMPT = "a cat at the 'mat'"


def reference_greedy(pipeline, prompt, grid):
    inputs = pipeline.processor.apply_chat_template(
        [[{"role": "user", "content": [{"type": "text", "text": prompt}]}]],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"target_h": 32 * grid[0], "target_w": 32 * grid[1]},
    )
    cells = int(inputs["image_grid_thw"].prod(-1).sum())
    out = pipeline.vision_language_encoder.generate(
        **inputs, max_new_tokens=cells + 1, do_sample=False
    )
    return out[0, inputs["input_ids"].shape[1] :][:cells]


@pytest.mark.parametrize("shape", reference.SHAPES)
@pytest.mark.parametrize("grid", [(6, 6), (3, 9), (10, 4)])
def test_greedy_tokens_are_the_references_one_by_one(shape, grid):
    both = pair(shape)
    tokens, preview = both.tokens(PROMPT, grid, options=GREEDY)
    assert tokens.shape == (1, *grid)
    assert preview.shape == (1, *preview_grid(grid))
    ours = torch.cat([preview.flatten(), tokens.flatten()])
    theirs = reference_greedy(both.pipeline, PROMPT, grid)
    assert len(theirs.unique()) > 8
    assert ours.tolist() == theirs.tolist()


OPTIONS = [
    SamplingOptions(),
    SamplingOptions(temperature=1.7, top_p=1.0),
    SamplingOptions(temperature=1.0, top_p=1.0, top_k=5),
    SamplingOptions(temperature=1.3, top_p=0.9, top_k=20),
    SamplingOptions(temperature=1.0, top_p=0.0),
    SamplingOptions(temperature=1.0, top_p=0.5, top_k=10_000),
]


def reference_filter(logits, options):
    logits = TemperatureLogitsWarper(options.temperature)(None, logits)
    if options.top_k:
        logits = TopKLogitsWarper(options.top_k)(None, logits)
    return TopPLogitsWarper(options.top_p)(None, logits)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_filters_are_the_references(options):
    logits = 3 * torch.randn(50, 64, generator=torch.Generator().manual_seed(1))
    logits[0, :10] = 20.0  # ties at the top, across the edge of top-k and top-p
    ours, theirs = filter_logits(logits, options), reference_filter(logits, options)
    assert torch.equal(ours.isinf(), theirs.isinf())
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("options", OPTIONS[:4], ids=str)
def test_draws_follow_the_references_filtered_probabilities(options):
    """Chi-square goodness of fit at one position of a real sequence, over 40,000 seeds."""
    both = pair("wide")
    seen = []
    original = gumbel_max

    def spy(logits, noise, opts):
        seen.append(logits)
        return original(logits, noise, opts)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ar_step, "gumbel_max", spy)
        both.tokens(PROMPT, (1, 1), options=options)
    logits = seen[100][:, 0]
    probabilities = reference_filter(logits, options).softmax(-1)[0]
    draws = 40_000
    noise = gumbel(
        sample_keys(range(99, 99 + draws), CPU_FLOAT32["device"]), 0, 3, torch.tensor([4]), 96
    )[:, 0]
    counts = gumbel_max(logits.expand(draws, -1), noise, options).bincount(minlength=96)
    assert counts[probabilities == 0].sum() == 0
    expected = draws * probabilities.double()
    large = expected >= 5
    assert large.sum() >= 3
    observed = torch.cat([counts[large], counts[~large].sum()[None]]).double()
    expected = torch.cat([expected[large], expected[~large].sum()[None].clamp(min=1e-9)])
    statistic = ((observed - expected) ** 2 / expected).sum()
    freedom = torch.tensor(float(large.sum()))
    p_value = torch.special.gammaincc(freedom / 2, (statistic / 2).float())
    assert p_value > 1e-3


def test_a_sample_of_a_batch_is_the_single_run_of_its_seed():
    both, grid = pair("small"), (6, 4)
    tokens, preview = both.tokens(PROMPT, grid, seed=2**64 - 2, batch=4)
    for i, seed in enumerate((2**64 - 2, 2**64 - 1, 0, 1)):
        single, single_preview = both.tokens(PROMPT, grid, seed=seed)
        assert torch.equal(tokens[i : i + 1], single)
        assert torch.equal(preview[i : i + 1], single_preview)
    assert len({tuple(t.flatten().tolist()) for t in tokens}) == 4


def recorded_noise(both, prompt, monkeypatch, **kwargs):
    noise = []
    original = gumbel_max

    def spy(logits, cell_noise, options):
        noise.append(cell_noise)
        return original(logits, cell_noise, options)

    monkeypatch.setattr(ar_step, "gumbel_max", spy)
    both.tokens(prompt, (2, 3), seed=5, **kwargs)
    return torch.cat(noise, dim=1)


def test_the_noise_depends_neither_on_the_prompt_nor_on_forced_cells(monkeypatch):
    both = pair("small")
    free = recorded_noise(both, "x", monkeypatch)
    assert torch.equal(free, recorded_noise(both, "a much longer prompt", monkeypatch))
    rows, columns = preview_grid((2, 3))
    mask = torch.rand(rows, columns, generator=torch.Generator().manual_seed(0)) < 0.5
    forced = Forced(torch.zeros(1, rows, columns, dtype=torch.int64), mask)
    drawn = torch.cat([~mask.flatten(), torch.ones(6, dtype=torch.bool)])
    assert torch.equal(free[:, drawn], recorded_noise(both, "x", monkeypatch, preview=forced))
    assert len({tuple(n.tolist()) for n in free[0]}) == free.shape[1]  # no address twice


def test_exactly_as_many_tokens_as_cells_and_none_beyond_the_codebook():
    """Also if the model prefers to end the image: its head is scaled towards the end token."""
    both = pair("small")
    head = both.model.lm_head.weight
    before = head.clone()
    try:
        head[both.model.config.codebook :] *= 50
        tokens, preview = both.tokens(PROMPT, (5, 7), options=SamplingOptions(2.0, 1.0))
    finally:
        head.copy_(before)
    assert tokens.shape == (1, 5, 7)
    assert preview.shape == (1, 13, 18)
    assert tokens.dtype == preview.dtype == torch.int64
    assert tokens.max() < both.model.config.codebook
    assert tokens.min() >= 0
    assert len(tokens.unique()) > 10


@pytest.mark.parametrize(
    ("options", "said"),
    [({"temperature": -0.1}, "temperature is -0.1"), ({"top_p": 1.5}, "top_p is 1.5"),
     ({"temperature": 1e-45}, "temperature is 1e-45: use 0"), ({"top_k": -1}, "top_k is -1"),
     ({"temperature": float("nan")}, "temperature is nan"), ({"top_p": float("nan")}, "is nan")],
)  # fmt: skip
def test_options_out_of_range(options, said):
    with pytest.raises(GLMImageError, match=said):
        SamplingOptions(**options)


class Clock:
    """A clock that only the model's steps advance, so that a busy machine changes nothing."""

    def __init__(self, monkeypatch, model_class, step_seconds: float) -> None:
        self.now = 0.0
        forward = model_class.forward

        def timed(model, *args):
            self.now += step_seconds
            return forward(model, *args)

        monkeypatch.setattr(model_class, "forward", timed)
        monkeypatch.setattr(ar_sampler, "time", self)

    def monotonic(self) -> float:
        return self.now


def test_progress_counts_every_cell_and_ends_at_the_total(monkeypatch):
    both, reports = pair("small"), []
    Clock(monkeypatch, type(both.model), 0.005)
    tokens, preview = both.tokens(
        PROMPT, (4, 4), progress=lambda done, total: reports.append((done, total))
    )
    total = tokens.numel() + preview.numel()
    assert reports[-1] == (total, total)
    assert {t for _, t in reports} == {total}
    done = [d for d, _ in reports]
    assert done == sorted(set(done))
    assert len(done) < total / 4


def test_the_shown_grids_hold_exactly_the_known_cells(monkeypatch):
    """With a report for every cell: all cells before it are known, and after it the forced ones."""
    monkeypatch.setattr(ar_sampler, "REPORT_SECONDS", 0)
    mask = torch.zeros(2, 3, dtype=torch.bool)
    mask[1] = True
    forced = Forced(torch.tensor([[[0, 0, 0], [5, 6, 7]]]), mask)
    seen = []
    tokens, preview = pair("small").tokens(PROMPT, (2, 3), batch=2, large=forced, show=seen.append)
    final = torch.cat([preview.flatten(1), tokens.flatten(1)], dim=1)
    assert len(seen) == final.shape[1] - 3
    for drawn, grids in enumerate(seen, 1):
        assert [tuple(grid.shape) for grid in grids] == [(2, *preview.shape[1:]), (2, 2, 3)]
        shown = torch.cat([grid.flatten(1) for grid in grids], dim=1)
        assert torch.equal(shown[:, :drawn], final[:, :drawn])
        assert (shown[:, drawn:-3] == UNKNOWN).all()
        assert shown[:, -3:].tolist() == [[5, 6, 7]] * 2


def test_progress_and_interrupt_come_within_100_ms(monkeypatch):
    """With steps of 5 ms, as long as the full model's on a fast GPU."""
    both, marks = pair("small"), {"progress": [], "interrupt": []}
    clock = Clock(monkeypatch, type(both.model), 0.005)
    both.tokens(
        PROMPT,
        (4, 4),
        progress=lambda done, total: marks["progress"].append(clock.now),
        check_interrupt=lambda: marks["interrupt"].append(clock.now),
    )
    for times in marks.values():
        assert max(b - a for a, b in itertools.pairwise(times)) <= 0.1 + 1e-9
    assert len(marks["interrupt"]) == 272
    assert len(marks["progress"]) < 60


def test_an_interrupt_stops_the_run_at_once():
    class StoppedError(Exception):
        pass

    calls = []

    def interrupt():
        calls.append(1)
        if len(calls) == 20:
            raise StoppedError

    with pytest.raises(StoppedError):
        pair("small").tokens(PROMPT, (8, 8), check_interrupt=interrupt)
    assert len(calls) == 20


def test_weights_of_another_dtype_than_the_computation():
    """The network computes in the dtype it is told, whatever a host's layers store."""
    both = pair("small")
    prompt = both.prompt(PROMPT, (2, 2))
    model = type(both.model)(both.model.config, operations=CastingLayers)
    model.load_state_dict(
        {k: v.bfloat16() for k, v in both.model.state_dict().items()}, assign=True
    )
    tokens, _ = sample_tokens(model, prompt, (2, 2), run())
    rounded = type(both.model)(both.model.config)
    rounded.load_state_dict({k: v.bfloat16().float() for k, v in both.model.state_dict().items()})
    expected, _ = sample_tokens(rounded, prompt, (2, 2), run())
    assert torch.equal(tokens, expected)


class CastingLayers:
    """Layers that cast their weights to the input's dtype when they run, as a host's do."""

    class Linear(torch.nn.Linear):
        def forward(self, x):
            bias = None if self.bias is None else self.bias.to(x.dtype)
            return torch.nn.functional.linear(x, self.weight.to(x.dtype), bias)

    class RMSNorm(torch.nn.RMSNorm):
        def forward(self, x):
            weight = self.weight.to(x.dtype)
            return torch.nn.functional.rms_norm(x, self.normalized_shape, weight, self.eps)

    Embedding = torch.nn.Embedding
