"""Choosing the operations of a decoder's blocks, on the hidden states of a step."""

from dataclasses import replace

import pytest
import torch
from glm_image.glm_core.decoder.choice import TOLERANCE, BlockChoice
from glm_image.glm_core.decoder.embeddings import rotary
from glm_image.glm_core.decoder.operations import PLAIN, modulate, norm_rotate
from test_ar_kernels import normal

GRID, TEXT, HEADS, WIDTH = (3, 4), 5, 4, 8
ROPE = rotary(GRID, TEXT, WIDTH, "cpu")


def states(batch: int = 2, dtype: torch.dtype = torch.float32) -> tuple:
    """Hidden states of picture and text, and their rotation."""
    img, txt = (
        normal(batch, length, HEADS * WIDTH, seed=seed, dtype=dtype)
        for seed, length in enumerate((GRID[0] * GRID[1], TEXT))
    )
    return img, txt, ROPE


class Counted:
    """A function, which may be faulty, and how often it was called."""

    def __init__(self, function, change=lambda out: out, error=None) -> None:
        self.function, self.change, self.error = function, change, error
        self.calls = 0

    def __call__(self, *args):
        self.calls += 1
        if self.error is not None:
            raise self.error
        return self.change(self.function(*args))


def known(choice: BlockChoice) -> list:
    return [*choice.choice.known.values()]


def test_it_is_made_once_for_a_shape_whatever_the_text(tmp_path) -> None:
    path, same = tmp_path / "blocks.json", Counted(modulate)
    choice = BlockChoice(path, {"modulate": {"same": same}})
    img, txt, rope = states()
    first = choice.choose(img, txt, rope)
    assert first in (PLAIN, replace(PLAIN, modulate=same))
    calls = same.calls
    assert calls
    longer = rotary(GRID, 2 * TEXT, WIDTH, "cpu")
    assert choice.choose(img, torch.cat([txt, txt], dim=1), longer) == first
    assert same.calls == calls
    assert BlockChoice(path, {"modulate": {"same": same}}).choose(*states()) == first
    assert same.calls in (calls, calls + 1)  # if it was chosen, another process runs it once
    choice.choose(*states(batch=1))
    assert same.calls > calls
    assert len(known(choice)) == 2


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_faults_are_seen_in_every_dtype(dtype, caplog) -> None:
    """Swapped vectors, and a rotation the other way."""
    backwards = ROPE[0], -ROPE[1]
    wrong = {
        "modulate": {"swapped": lambda txt, img, vectors: modulate(img, txt, vectors)},
        "norm_rotate": {"backwards": lambda q, k, _: norm_rotate(q, k, backwards)},
    }
    assert BlockChoice(None, wrong).choose(*states(dtype=dtype)) == PLAIN
    assert "without modulate=swapped" in caplog.text
    assert "without norm_rotate=backwards" in caplog.text


def test_a_full_device_is_not_asked_again_at_every_step(tmp_path) -> None:
    full = Counted(modulate, error=torch.OutOfMemoryError("no room"))
    choice = BlockChoice(tmp_path / "blocks.json", {"modulate": {"full": full}})
    for _ in range(3):
        assert choice.choose(*states()) == PLAIN
    assert full.calls == 1
    assert not (tmp_path / "blocks.json").exists()


def test_without_candidates_or_in_another_dtype_nothing_is_tried() -> None:
    other = Counted(modulate)
    assert BlockChoice(None, {}).choose(*states()) == PLAIN
    tried = BlockChoice(None, {"modulate": {"other": other}})
    assert tried.choose(*states(dtype=torch.float64)) == PLAIN
    assert not other.calls
    assert not known(tried)


def test_the_states_of_the_step_are_left_as_they_are() -> None:
    img, txt, rope = states()
    before = img.clone(), txt.clone()
    BlockChoice(None, {"modulate": {"same": modulate}}).choose(img, txt, rope)
    assert torch.equal(img, before[0])
    assert torch.equal(txt, before[1])
