"""The AR model's copy heads start on the right cells, and the losses train attention."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from training.autoregressive import HIDDEN, AutoregressiveStage
from training.codes import CODEBOOK, EDGE, INSIDE, cells
from training.copying import (
    ALLOWED_WEIGHT,
    COPY_LAYER,
    FROM_PREVIEW,
    FROM_REFERENCE,
    TARGET_WEIGHT,
    note_attention_loss,
    queries_and_keys,
    shape_attention_loss,
    target_attention_loss,
)
from training.reading import EIGHTHS, REFERENCE_LAYER, notes_on_cells
from training.samples import Sample, collate, collate_tokens
from training.scene import Item, Scene, Text
from training.stage import Run
from training.tokenizer import NOTES

CELLS = 16 * 16
BEGINS_NO_ROW = torch.arange(CELLS) % 16 > 0  # the cell before the first of a row is far away


@pytest.fixture(scope="module")
def stage(tmp_path_factory) -> AutoregressiveStage:
    return AutoregressiveStage(Run(tmp_path_factory.mktemp("copying"), batch=4))


def found(stage: AutoregressiveStage, sample: Sample, head: int) -> torch.Tensor:
    """The token with a head's most attention, for the last CELLS codes that begin no row."""
    text = stage.module["text"]
    text.config._attn_implementation = "eager"  # only this returns the attention
    ids, positions, mask, _, _ = collate([sample])
    weights = []
    attention = text.layers[COPY_LAYER].self_attn
    hook = attention.register_forward_hook(lambda _, given, result: weights.append(result[1]))
    with torch.no_grad():
        text(input_ids=ids, position_ids=positions, attention_mask=mask, use_cache=False)
    hook.remove()
    return weights[0][0, head, -CELLS:].argmax(-1)[BEGINS_NO_ROW]


def test_a_cell_of_the_large_grid_attends_to_its_copy_in_the_preview(stage) -> None:
    sample = stage.samples.image(np.random.default_rng([8, 0]), 512, 512, True, 0.0)
    first = len(sample.prompt)
    assert torch.equal(
        found(stage, sample, FROM_PREVIEW), torch.arange(first, first + CELLS)[BEGINS_NO_ROW]
    )


def test_a_cell_of_an_edited_picture_attends_to_its_copy_in_the_reference(stage) -> None:
    sample = stage.samples.edit(np.random.default_rng([8, 1]), 512, 512, 0.0)
    reference = (sample.prompt.ids < CODEBOOK).nonzero()[:, 0]
    assert torch.equal(found(stage, sample, FROM_REFERENCE), reference[BEGINS_NO_ROW])


def test_the_copy_heads_pass_values_on(stage) -> None:
    """The first head's value and output weights project onto as many channels as it has."""
    text = stage.build()["text"]
    attention = text.layers[COPY_LAYER].self_attn
    size = attention.head_dim
    through = attention.o_proj.weight[:, :size] @ attention.v_proj.weight
    assert torch.allclose(through @ through, through, atol=1e-5)
    assert torch.linalg.matrix_rank(through) == size


def test_attention_to_the_copy_costs_little_and_to_another_cell_much(stage) -> None:
    text = stage.build()["text"]
    samples = [
        stage.samples.image(np.random.default_rng([8, i]), 512, 512, True, 0.0) for i in range(2)
    ]
    ids, positions, mask, _, _ = collate(samples)
    states = []
    before = text.layers[COPY_LAYER - 1]
    hook = before.register_forward_hook(lambda _, given, result: states.append(result))
    with torch.no_grad():
        text(input_ids=ids, position_ids=positions, attention_mask=mask, use_cache=False)
    hook.remove()
    copied = collate_tokens(samples, "copied")
    begins_row = ~BEGINS_NO_ROW.repeat(2)
    copied[:, begins_row] = -1

    def loss(step: int) -> float:
        wanted = torch.where(copied < 0, -1, copied + step)
        generator = torch.Generator().manual_seed(0)
        queries, keys = queries_and_keys(text, COPY_LAYER, states[0], positions)
        lost = target_attention_loss(queries[:, FROM_PREVIEW], keys, mask, wanted, generator)
        return float(lost) / TARGET_WEIGHT

    assert loss(0) < 0.5 < 2 < loss(1)


@pytest.mark.parametrize("size", [(512, 512), (1024, 1024), (768, 1152)])
def test_the_copied_cell_is_at_the_same_place(stage, size) -> None:
    sample = stage.samples.image(np.random.default_rng([8, 2]), *size, True, 0.0)
    (codes,) = torch.where(sample.copied >= 0)
    copies = sample.copied[codes] - len(sample.prompt)
    assert len(codes) == size[0] * size[1] // 32**2
    low, high = (
        part - part[:, :1] for part in (sample.positions[:, copies], sample.positions[:, codes])
    )
    for axis, side in ((1, size[0]), (2, size[1])):
        cells = sample.grid[axis - 1]
        assert ((high[axis] + 0.5) * 32 * cells // side).equal(low[axis].float())


@pytest.mark.parametrize("size", [(512, 512), (1024, 1024), (768, 512), (1152, 768)])
def test_within_is_the_eighth_of_the_previews_cell(stage, size) -> None:
    sample = stage.samples.image(np.random.default_rng([8, 2]), *size, True, 0.0)
    cells = math.prod(sample.grid)
    grid = size[0] // 32, size[1] // 32
    assert (sample.within[:cells] == -1).all()
    within = sample.within[cells:].unflatten(0, grid)
    for i, many, few in ((0, grid[0], sample.grid[0]), (1, grid[1], sample.grid[1])):
        share = (torch.arange(many, dtype=torch.float64) + 0.5) * few / many
        eighths = ((share + 1e-9) % 1 * EIGHTHS).floor().long()
        assert torch.equal(within.select(1 - i, 0)[:, i], eighths)
        assert (within[..., i] == within.select(1 - i, 0)[:, i].unsqueeze(1 - i)).all()


def test_cells_have_the_note_on_what_they_show(stage) -> None:
    heart = Item("heart", "red", "medium", "left", ((8.0, 4.0),))
    star = Item("star", "blue", "medium", None, ((8.0, 12.0),))
    scene = Scene(512, 512, "white", (heart, star), (Text("HI", "bottom"),))
    notes = notes_on_cells(scene, scene.preview)
    shown = torch.from_numpy(cells(scene, scene.preview)) >= INSIDE
    assert (notes[6:10, 2:6] == NOTES.index("<|at left|>")).all()
    assert (notes[6:10, 10:14] == NOTES.index("<|anywhere 0|>")).all()
    assert (notes[:12, 7:9] == -1).all()
    assert (
        (notes == NOTES.index("<|text bottom|>")) == (shown & (torch.arange(16) > 11)[:, None])
    ).all()
    large = notes_on_cells(replace(scene, height=1024, width=1024), (32, 32))
    assert (large[12:20, 4:12] == NOTES.index("<|at left|>")).all()
    sample = stage.samples.image(np.random.default_rng([8, 3]), 512, 512, True, 0.0)
    named = {
        stage.samples.offsets.id_to_token(int(i))
        for i in sample.prompt.ids[sample.noted.unique()[1:]]
    }
    assert named
    assert named <= set(NOTES)


def test_a_references_attention_to_its_wish_costs_nothing(stage) -> None:
    """All queries match one key: just before the reference that costs nothing, elsewhere much."""
    sample = stage.samples.edit(np.random.default_rng([8, 4]), 512, 512, 0.0)
    ids, positions, mask, _, _ = collate([sample])
    start = int(sample.copied[0]) - 1

    def loss(token: int) -> float:
        attention = stage.module["text"].layers[REFERENCE_LAYER].self_attn
        states = torch.zeros(1, ids.shape[1], HIDDEN)
        states[0, token, 0] = 1
        with torch.no_grad():
            for linear in (attention.q_proj, attention.k_proj):
                linear.weight.zero_()
                linear.bias.zero_()
            attention.q_proj.bias[attention.head_dim // 2 : attention.head_dim] = 20
            attention.k_proj.weight[attention.head_dim // 2 :, 0] = 20
            stage.module["reading"].states[REFERENCE_LAYER - 1] = states
            return float(
                stage._wish_attention_loss(sample.copied[None], positions, mask, torch.Generator())
            )

    assert loss(start) < 1e-3 < loss(start - 1)


def test_notes_must_attend_to_their_phrase_or_to_none() -> None:
    """Of eight tokens, the first is padding, two are the first note's phrase, one the second's."""
    spoken = torch.tensor([[[1, 2], [3, 3], [-1, -1]]])
    mask = torch.tensor([[0, 1, 1, 1, 1, 1, 1, 1]])
    keys = torch.eye(8)[None]

    def loss(*tokens: int) -> float:
        queries = torch.zeros(1, 2, 8, 8)
        for note, token in enumerate(tokens):
            queries[:, :, 5 + note, token] = 30
        return float(note_attention_loss(queries, keys, mask, 5, spoken)) / ALLOWED_WEIGHT

    assert loss(1, 3, 4) < 1e-3  # the token between the phrases and the notes
    assert loss(2, 3, 7) < 1e-3  # the note itself
    assert loss(3, 3, 4) > 10
    assert loss(1, 5, 4) > 10
    assert loss(1, 3, 2) > 10
    for unseen in (0, 6):  # padding and a later note: the first note attends to all five it sees
        assert loss(unseen, 3, 4) == pytest.approx(np.log(5 / 2) / 2, abs=1e-3)


@pytest.mark.parametrize("large", [0, 3])
def test_cells_must_attend_to_the_shapes_before_them_or_to_the_prompts_end(large) -> None:
    """The prompt has two tokens; of the preview's four cells, two and three show shapes."""
    codes = torch.tensor([[0, INSIDE, EDGE, 1]])
    count = 5 + large  # the last code is no token
    keys, mask = torch.eye(count)[None], torch.ones(1, count, dtype=torch.int64)

    def loss(*attended: int) -> float:
        queries = torch.zeros(1, count, count)
        for token, key in enumerate(attended, start=1):
            queries[0, token, key] = 30
        return float(shape_attention_loss(queries, keys, mask, codes, 4 + large)) / ALLOWED_WEIGHT

    assert loss(1, 1, 3, 3) < 1e-3
    assert loss(1, 1, 3, 4) < 1e-3
    for wrong in ((0, 1, 3, 3), (1, 2, 3, 3), (1, 1, 2, 3), (1, 1, 1, 3), (1, 1, 3, 1)):
        assert loss(*wrong) > 7
