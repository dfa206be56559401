"""A large grid follows its preview, whatever its prompt says and in spite of earlier errors."""

from pathlib import Path

import numpy as np
import pytest
import torch

from glm_core.data.grids import grid_positions, preview_grid
from training.autoregressive import AutoregressiveStage
from training.codes import CODEBOOK, INSIDE
from training.samples import MISREAD, Sample, collate
from training.scene import SIZES
from training.stage import Run


@pytest.fixture(scope="module")
def stage(tmp_path_factory) -> AutoregressiveStage:
    folder: Path = tmp_path_factory.mktemp("samples")
    return AutoregressiveStage(Run(folder, batch=4))


def locked(stage: AutoregressiveStage, i: int, size: tuple[int, int] = (512, 512)) -> Sample:
    return stage.samples.locked(np.random.default_rng([11, i]), *size, 0.0)


def given(sample: Sample) -> torch.Tensor:
    """The preview in a locked sample's prompt; its other ids are no codes."""
    return sample.prompt.ids[sample.prompt.ids < CODEBOOK]


def test_a_locked_large_grid_equals_its_preview_at_512(stage) -> None:
    for i in range(20):
        sample = locked(stage, i)
        assert torch.equal(given(sample), sample.codes)


def test_a_locked_preview_differs_from_its_prompt(stage) -> None:
    """Only cells that agree with the prompt have a note, and not all of them agree."""
    without_note = []
    for i in range(20):
        sample = locked(stage, i)
        other = stage.samples.image(np.random.default_rng([11, i]), 512, 512, True, 0.0)
        assert len(other.codes) == 2 * len(sample.codes)
        shapes = (sample.codes >= INSIDE) & (sample.noted < 0)
        without_note.append(bool(shapes.any()))
    assert sum(without_note) > 5


@pytest.mark.parametrize("size", SIZES)
def test_a_locked_sample_has_the_positions_of_a_whole_image(stage, size) -> None:
    sample = locked(stage, 0, size)
    grid = size[0] // 32, size[1] // 32
    preview = preview_grid(grid)
    cells = preview[0] * preview[1]
    start = int(sample.prompt.positions[0, -cells])
    assert torch.equal(sample.prompt.positions[:, -cells:], grid_positions(preview, start))
    assert torch.equal(sample.positions, grid_positions(grid, start + max(preview)))
    assert sample.copied.min() == len(sample.prompt) - cells
    assert sample.copied.max() == len(sample.prompt) - 1


def test_a_locked_batch_has_every_loss_of_a_large_grid(stage) -> None:
    batch = [locked(stage, i, (512, 768)) for i in range(2)]
    stage.module = stage.build()
    losses = stage.loss(batch, torch.Generator().manual_seed(0))
    assert {"codes", "where", "within", "copied", "noted", "layout"} <= losses.keys()
    assert not {"coming", "begun", "overlooked"} & losses.keys()  # losses of the preview
    assert all(loss.isfinite() for loss in losses.values())


def test_half_of_the_large_grids_are_partly_misread(stage) -> None:
    shares = []
    for i in range(60):
        sample = stage.samples.image(np.random.default_rng([12, i]), 768, 768, True, 0.0)
        wrong = sample.read != sample.codes
        assert not wrong[: 16 * 16].any()
        assert set(sample.read[wrong].tolist()) <= set(sample.codes[16 * 16 :].tolist())
        shares.append(float(wrong[16 * 16 :].float().mean()))
        assert torch.equal(collate([sample])[0][0, len(sample.prompt) :], sample.read[:-1])
    misread = [share for share in shares if share]
    assert 20 < len(misread) < 40
    assert 0.5 * MISREAD < np.mean(misread) < MISREAD  # a replacement may be the same code
