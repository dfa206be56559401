"""Scores: the likelihoods are the reference's, and those that the sampler's own steps have."""

import pytest
import torch
from ar_pair import CPU_FLOAT32, pair
from glm_image.glm_core.ar import score
from glm_image.glm_core.ar.cache import span_of
from glm_image.glm_core.ar.model import rope_table
from glm_image.glm_core.ar.prompt import positions_with_grids
from glm_image.glm_core.ar.score import ScoringRun, cell_scores, log_likelihoods, mean_of_cells
from glm_image.glm_core.ar.step import (
    SamplingOptions,
    StepBuffers,
    StepShape,
    next_logits,
    prefill,
    set_target,
)

PROMPT, GRID = "a cat at the 'mat'", (4, 6)
RUN = ScoringRun(**CPU_FLOAT32)


@pytest.fixture(scope="module")
def both():
    return pair("small")


@pytest.fixture(scope="module")
def drawn(both):
    """A preview and a large grid for each of 3 samples."""
    tokens, preview = both.tokens(PROMPT, GRID, batch=3, options=SamplingOptions(1.0, 1.0))
    return [preview, tokens]


def test_likelihoods_are_those_of_the_samplers_steps(both, drawn) -> None:
    prompt, shapes = both.prompt(PROMPT, GRID), [tuple(grid.shape[1:]) for grid in drawn]
    cells = torch.cat([grid.flatten(1) for grid in drawn], dim=1)
    positions = positions_with_grids(prompt, shapes)
    length = span_of(positions.shape[1])
    shape = StepShape(
        3, cells.shape[1], GRID[1], length, SamplingOptions(temperature=0), **CPU_FLOAT32
    )
    buffers = StepBuffers.allocate(both.model, shape)
    buffers.tokens.copy_(cells)
    rope = rope_table(both.model.config, positions, torch.float32)
    buffers.rope[..., : positions.shape[1], :] = rope
    logits = [
        prefill(both.model, prompt.ids[None], buffers, [0, 1, 2], len(prompt)).expand(3, -1, -1)
    ]
    for cell in range(1, cells.shape[1]):
        set_target(buffers, cell, 0, len(prompt) + cell - 1, 1)
        logits.append(next_logits(both.model, buffers, length))
    wanted = torch.cat(logits, dim=1).log_softmax(-1).gather(-1, cells[..., None])[..., 0]

    found = log_likelihoods(both.model, prompt, drawn, RUN)
    assert [tuple(grid.shape) for grid in found] == [tuple(grid.shape) for grid in drawn]
    torch.testing.assert_close(torch.cat([grid.flatten(1) for grid in found], 1), wanted)


def test_likelihoods_are_the_references(both, drawn) -> None:
    inputs = both.pipeline.processor.apply_chat_template(
        [[{"role": "user", "content": [{"type": "text", "text": PROMPT}]}]],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"target_h": 32 * GRID[0], "target_w": 32 * GRID[1]},
    )
    cells = torch.cat([grid[0].flatten() for grid in drawn])
    ids = torch.cat([inputs["input_ids"], cells[None]], dim=1)
    grids = inputs["image_grid_thw"]
    logits = both.reference(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        position_ids=positions_with_grids(
            both.prompt(PROMPT, GRID), [tuple(grid.shape[1:]) for grid in drawn]
        )[:, None],
    ).logits[0, -len(cells) - 1 : -1, : both.model.config.codebook]
    wanted = logits.log_softmax(-1).gather(-1, cells[:, None])[:, 0]
    assert len(grids) == 2
    first = [grid[:1] for grid in drawn]
    found = log_likelihoods(both.model, both.prompt(PROMPT, GRID), first, RUN)
    torch.testing.assert_close(
        torch.cat([grid.flatten() for grid in found]), wanted, atol=1e-4, rtol=1e-4
    )


def test_a_batch_is_single_ones_in_blocks_of_any_size(both, drawn, monkeypatch) -> None:
    prompt, against = both.prompt(PROMPT, GRID), both.prompt("a dog", GRID)
    whole = cell_scores(both.model, prompt, against, drawn, RUN)
    assert all(ratios.abs().max() > 1e-3 for ratios in whole)
    monkeypatch.setattr(score, "BLOCK_IDS", 21)
    for i in range(3):
        single = cell_scores(both.model, prompt, against, [grid[i, None] for grid in drawn], RUN)
        for ratios, one in zip(whole, single, strict=True):
            torch.testing.assert_close(ratios[i, None], one, atol=1e-4, rtol=1e-4)


def test_without_another_prompt_the_scores_are_the_likelihoods(both, drawn) -> None:
    prompt = both.prompt(PROMPT, GRID)
    alone = cell_scores(both.model, prompt, None, drawn, RUN)
    for found, wanted in zip(alone, log_likelihoods(both.model, prompt, drawn, RUN), strict=True):
        assert torch.equal(found, wanted)


def test_an_interrupt_is_asked_for_before_every_pass(both, drawn, monkeypatch) -> None:
    monkeypatch.setattr(score, "BLOCK_IDS", 30)
    asked, read = [], []
    run = ScoringRun(**CPU_FLOAT32, progress=read.append, check_interrupt=lambda: asked.append(1))
    prompt = both.prompt(PROMPT, GRID)
    log_likelihoods(both.model, prompt, drawn, run)
    cells = sum(grid[0].numel() for grid in drawn)
    assert len(asked) == len(read) == 1 + -(-(cells - 1) // 10)
    assert sum(read) == len(prompt) + 3 * cells


def test_the_mean_is_over_counted_cells_of_all_grids() -> None:
    values = [torch.tensor([[[1.0, 2.0]], [[5.0, 6.0]]]), torch.tensor([[[4.0]], [[9.0]]])]
    counted = [torch.tensor([[[True, False]]]), torch.tensor([[[True]]])]
    assert mean_of_cells(values, counted).tolist() == [2.5, 7.0]
    each = [torch.tensor([[[True, False]], [[False, True]]]), torch.tensor([[[True]], [[False]]])]
    assert mean_of_cells(values, each).tolist() == [2.5, 6.0]
    none = [torch.zeros_like(mask) for mask in counted]
    assert mean_of_cells(values, none).isnan().all()
