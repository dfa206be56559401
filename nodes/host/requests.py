"""From a sampler's inputs to requests of single samples, and from what is written to outputs.

Nothing here knows where the AR model is: it takes the codebook alone.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ...glm_core.ar.philox import batch_seeds
from ...glm_core.ar.requests import SampleRequest, Written
from ...glm_core.ar.step import SamplingOptions
from ...glm_core.data.layout import (
    cells_outside,
    common_batch,
    locked_cells,
    require_codebook,
    require_layout_fits,
    require_tokens_fit,
)
from ...glm_core.data.references import References
from ...glm_core.data.tokens import Forced, Layout, SemanticTokens
from ...glm_core.errors import InputError
from .batches import sets_of


def requests_of(
    codebook: int,
    prompt: str,
    height: int,
    width: int,
    seed: int,
    batch_size: int,
    options: SamplingOptions,
    *,
    kind: str = "tokens",
    layout: Layout | None = None,
    references: References | None = None,
    tokens: SemanticTokens | None = None,
    mask: Tensor | None = None,
    lookahead: int = 1,
) -> list[SampleRequest]:
    """The samples of one node: `batch_size` for each layout, set of references or image.

    Sample i has the seed + i modulo 2^64, and layout, set and image i modulo their number.

    Args:
        mask: the region of `tokens` to draw anew; without one nothing of them is.

    Raises:
        GLMImageError: the size has no grid, or the layout, the references or the tokens are of
            another model, another size or another batch; or there is a mask and no tokens.
    """
    if tokens is not None:
        require_tokens_fit(tokens, codebook, height, width)
    elif mask is not None:
        raise InputError(
            "mask is connected and tokens are not: connect the tokens to redraw a part of, or "
            "disconnect the mask."
        )
    if layout is not None:
        require_layout_fits(layout, codebook, height, width)
    if references is not None:
        require_codebook("references", references.codebook, codebook)
    sets = [()] if references is None else sets_of(references.sets, tokens)
    name, count = ("layouts", 1) if layout is None else ("layouts", len(layout.preview))
    if references is not None:
        name, count = "reference sets", len(sets)
    images = 1 if tokens is None else len(tokens.tokens)
    samples = batch_size * common_batch(name, count, "images in tokens", images)
    preview = None if layout is None else locked_cells(layout, samples)
    large = None if tokens is None else cells_outside(mask, tokens, samples)
    return [
        SampleRequest(
            prompt,
            height,
            width,
            own_seed,
            options,
            kind=kind,
            preview=_of_sample(preview, i),
            large=_of_sample(large, i),
            references=tuple(image.tokens for image in sets[i % len(sets)]),
            lookahead=lookahead,
        )
        for i, own_seed in enumerate(batch_seeds(seed, samples))
    ]


def tokens_of(
    requests: Sequence[SampleRequest],
    written: Sequence[Written],
    codebook: int,
    palette: Tensor | None = None,
    given: SemanticTokens | None = None,
) -> SemanticTokens:
    """The tokens of one node's samples, with a note of how they were made.

    Args:
        given: those of which a region was drawn anew. As many samples keep their numbers.
    """
    first = requests[0]
    size = codebook, first.height, first.width
    tokens = torch.stack([one.tokens for one in written])
    if given is None or len(given.tokens) != len(tokens):
        return SemanticTokens(tokens, *size, first.note, palette)
    return SemanticTokens(tokens, *size, first.note, palette, given.numbers, given.origin)


def layout_of(
    requests: Sequence[SampleRequest],
    written: Sequence[Written],
    codebook: int,
    palette: Tensor | None = None,
) -> Layout:
    """The previews of one node's samples, with the locks of the layout that was given, if any."""
    first = requests[0]
    previews = torch.stack([one.preview for one in written])
    locked = torch.zeros(previews.shape[1:], dtype=torch.bool)
    if first.preview is not None:
        locked = first.preview.mask
    return Layout(previews, locked, codebook, first.height, first.width, palette)


def _of_sample(forced: Forced | None, i: int) -> Forced | None:
    return forced and Forced(forced.values[i : i + 1], forced.mask)
