"""How well tokens match their prompt, by the AR model that wrote them."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ...glm_core.ar.score import mean_of_cells
from ...glm_core.data.cells import parse_cells
from ...glm_core.data.layout import (
    common_batch,
    require_codebook,
    require_layout_fits,
    require_one_origin,
)
from ...glm_core.data.references import References
from ...glm_core.data.tokens import Layout, SemanticTokens
from ...glm_core.errors import InputError, quoted
from .ar_interface import AnyAR
from .batches import sets_of

PREVIEW, LARGE = "preview", "tokens"
PROMPT_MATCH, LIKELIHOOD = "prompt match", "likelihood"
MEASURES = (PROMPT_MATCH, LIKELIHOOD)
"""The likelihood under the prompt, beside that under another one, or as it is."""


@dataclass(frozen=True)
class Grids:
    """Grids of one kind, for every sample, and which of their cells were drawn.

    cells: int32 [B, rows, columns].
    drawn: bool [B or 1, rows, columns]; the others were locked or forced.
    """

    cells: Tensor
    drawn: Tensor


@dataclass(frozen=True)
class Scores:
    """The scores of a batch.

    means: nats a drawn cell, NaN where no cell was drawn, for each sample.
    cells: float32 [B, rows, columns] of nats for each kind of grid, in the order of writing.
    grids: what was scored.
    measure: one of MEASURES.
    """

    means: list[float]
    cells: dict[str, Tensor]
    grids: dict[str, Grids]
    measure: str

    def mean(self, kind: str, sample: int) -> float:
        """Of the drawn cells of one grid."""
        cells = self.cells[kind][sample, None]
        drawn = self.grids[kind].drawn
        return mean_of_cells([cells], [drawn[sample % len(drawn), None]]).item()


def score_tokens(
    ar: AnyAR,
    prompt: str,
    against: str,
    tokens: SemanticTokens | None,
    layout: Layout | None,
    references: References | None,
    measure: str,
) -> Scores:
    """
    Args:
        against: the prompt to compare with; empty is the scaffold without text.
        measure: one of MEASURES.

    Raises:
        GLMImageError: the prompt is empty; the measure compares with no other prompt, and there is
            one; what was connected does not belong together, or is of another model.
    """
    other = _compared(against, measure)
    grids, size = _grids(ar, tokens, layout, references)
    sets = (
        [None]
        if references is None
        else [[one.tokens for one in images] for images in sets_of(references.sets, tokens)]
    )
    cells = {kind: one.cells for kind, one in grids.items()}
    scored = ar.cell_scores(prompt, other, size, sets, cells)
    means = mean_of_cells(list(scored.values()), [one.drawn for one in grids.values()])
    return Scores(means.tolist(), scored, grids, measure)


def _compared(against: str, measure: str) -> str | None:
    """The prompt to compare with, None for a measure without one."""
    if measure == PROMPT_MATCH:
        return against
    if against.strip():
        raise InputError(
            f'against is {quoted(against)}, but the measure "{measure}" compares with no other '
            f'prompt; empty against, or choose the measure "{PROMPT_MATCH}".'
        )
    return None


def _grids(
    ar: AnyAR,
    tokens: SemanticTokens | None,
    layout: Layout | None,
    references: References | None,
) -> tuple[dict[str, Grids], tuple[int, int]]:
    """What is scored, in the order of writing, for as many samples each; and the image's size."""
    require_one_origin(layout, references)
    if tokens is None:
        if layout is None:
            raise InputError(
                "Score Tokens has nothing to score; connect a layout, or tokens with their layout."
            )
        require_codebook("layout", layout.codebook, ar.codebook)
        return {PREVIEW: _preview(layout)}, (layout.height, layout.width)
    require_codebook("tokens", tokens.codebook, ar.codebook)
    size = tokens.height, tokens.width
    large = Grids(tokens.tokens, ~_forced(tokens))
    if references is not None:
        require_codebook("references", references.codebook, ar.codebook)
        count, sets = len(large.cells), len(sets_of(references.sets, tokens))
        if count % sets:  # a multiple is what a sampler writes with batch_size
            count = common_batch("images in tokens", count, "reference sets", sets)
        return {LARGE: _repeated(large, count)}, size
    if layout is None:
        raise InputError(
            "The tokens were written after a preview, which their score needs; connect the layout "
            "that GLM-Image Sample Tokens gave with them, or the references they were made from."
        )
    require_layout_fits(layout, ar.codebook, *size)
    count = common_batch("images in tokens", len(large.cells), "layouts", len(layout.preview))
    return {PREVIEW: _repeated(_preview(layout), count), LARGE: _repeated(large, count)}, size


def _preview(layout: Layout) -> Grids:
    return Grids(layout.preview, ~layout.locked[None])


def _forced(tokens: SemanticTokens) -> Tensor:
    """bool [B or 1, rows, columns]: the cells that a sampler was given, by its own note."""
    noted = tokens.info.get("forced", "") if isinstance(tokens.info, dict) else ""
    whole = isinstance(noted, list) and len(noted) == len(tokens.tokens)
    grid = tuple(tokens.tokens.shape[1:])
    texts = noted if whole else [noted]
    return torch.stack([parse_cells(text if isinstance(text, str) else "", grid) for text in texts])


def _repeated(grids: Grids, count: int) -> Grids:
    repetitions = count // len(grids.cells)
    drawn = grids.drawn if len(grids.drawn) == 1 else grids.drawn.repeat(repetitions, 1, 1)
    return Grids(grids.cells.repeat(repetitions, 1, 1), drawn)
