"""The layer of the AR model that looks up what a cell is to show: how it begins, what it must do.

The large grid repeats its preview, and an edited picture its reference, mostly. What says where the
copied cell lies is RoPE alone, whose lowest frequencies a small model would have to tell apart by a
sixteenth of their score from one column to the next. So one layer's heads begin with queries and
keys that do; and as this is right at one size only, training asks two of them for that cell. The
third is asked for the note on what stands there, at the end of the prompt (`tokenizer.NOTES`).

In earlier layers, a head of a reference's cells is asked for the wish, which they must compare with
what they show, all heads of the notes for the phrase that speaks of what each is about, and a head
of a preview's cells for the shapes that have begun, so that none is drawn twice.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.glm_image.modeling_glm_image import apply_rotary_pos_emb

from glm_core.data.grids import PREVIEW_SIDE

from .reading import COPY_LAYER, NOTHING, shown_by
from .tokenizer import REFERENCE_TO_PICTURE

FROM_PREVIEW, FROM_REFERENCE, FROM_NOTES = range(3)  # heads
FROM_WISH = 0  # head of `reading.TOLD_LAYER`
FROM_SHAPES = 1  # head of WHERE_LAYER
MISSED_WEIGHT, STRAYED_WEIGHT = 0.1, 0.5
ASKED_CELLS = 256  # of a picture, in a step, at the most
# At 512 x 512, where a preview and a reference have as many cells a side. A query's cell is the one
# before the cell to be named, so the copied one is a column less away.
OFFSETS = {
    head: (away, away, away - 1)
    for head, away in (
        (FROM_PREVIEW, PREVIEW_SIDE),
        (FROM_REFERENCE, PREVIEW_SIDE + REFERENCE_TO_PICTURE),
    )
}
LOUDNESS = (3.0, 5.0, 8.0)  # of a query's and a key's frequencies on the axes (t, h, w)


@torch.no_grad()
def find_cells(text: nn.Module) -> None:
    """Begin COPY_LAYER with heads that attend to the key `OFFSETS` away, and keep what is there.

    The offsets are those of 512 x 512; at other sizes a cell's copy lies elsewhere, and is learned.

    Args:
        text: a GlmImageTextModel.
    """
    attention = text.layers[COPY_LAYER].self_attn
    frequencies, sections = text.rotary_emb.inv_freq, text.rotary_emb.mrope_section
    axis = torch.repeat_interleave(torch.arange(3), torch.tensor(sections))
    loudness, turned = torch.tensor(LOUDNESS)[axis], 2 * len(axis)
    for head, offset in OFFSETS.items():
        angle = torch.tensor(offset)[axis] * frequencies
        query = torch.cat([loudness * angle.cos(), -loudness * angle.sin()])
        attention.q_proj.bias[head * attention.head_dim :][:turned] = query
    attention.k_proj.bias[:turned] = torch.cat([loudness, torch.zeros_like(loudness)])
    attention.v_proj.weight.copy_(torch.linalg.qr(torch.randn_like(attention.v_proj.weight).T)[0].T)
    attention.o_proj.weight[:, : attention.head_dim] = attention.v_proj.weight.T


def queries_and_keys(
    text: nn.Module, index: int, states: Tensor, positions: Tensor
) -> tuple[Tensor, Tensor]:
    """What a layer's heads look with, and at: the product of the two is its attention's score.

    Args:
        index: the layer's.
        states: [B, S, width] before the layer; positions: int64 [3, B, S].

    Returns:
        Queries [B, heads, S, D] and keys [B, S, D], which all heads share.
    """
    layer = text.layers[index]
    attention, given = layer.self_attn, layer.input_layernorm(states)
    queries, keys = (
        linear(given).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
        for linear in (attention.q_proj, attention.k_proj)
    )
    queries, keys = apply_rotary_pos_emb(queries, keys, *text.rotary_emb(given, positions))
    return attention.scaling * queries, keys[:, 0]


def missed(
    queries: Tensor, keys: Tensor, mask: Tensor, wanted: Tensor, generator: torch.Generator
) -> Tensor:
    """Weighted loss of a head's attention to the tokens that the next codes are to be read from.

    Args:
        queries: the head's, [B, S, D]; keys: [B, S, D]; mask: [B, S].
        wanted: int64 [B, N], a token for each of the last N; -1 for those that nothing is asked of.
    """
    (asked,) = torch.where((wanted >= 0).any(0))
    asked = asked[torch.randperm(len(asked), generator=generator, device=asked.device)]
    asked = asked[:ASKED_CELLS]
    tokens = keys.shape[1] - wanted.shape[1] + asked
    scores = _scores(queries[:, None], keys, mask, tokens)
    wanted = wanted[:, asked].flatten()
    return MISSED_WEIGHT * F.cross_entropy(scores.flatten(0, 2), wanted, ignore_index=-1)


def strayed(queries: Tensor, keys: Tensor, mask: Tensor, first: int, spoken: Tensor) -> Tensor:
    """Weighted loss of the notes' attention to phrases that do not speak of what they are about.

    Notes that a phrase speaks of are to look there, the others at no phrase; both count the same.

    Args:
        queries: [B, heads, S, D]; keys: [B, S, D]; mask: [B, S].
        first: which token is the first note.
        spoken: int64 [B, NOTES, 2], `samples.Sample.spoken` as tokens.
    """
    tokens = torch.arange(keys.shape[1], device=keys.device)
    notes = first + torch.arange(spoken.shape[1], device=keys.device)
    about = (tokens >= spoken[..., :1]) & (tokens <= spoken[..., 1:]) & (spoken[..., :1] >= 0)
    silent = ~about.any(-1)
    allowed = torch.where(silent[..., None], ~about.any(1, keepdim=True), about)
    lost = _lost(_scores(queries, keys, mask, notes), allowed).mean(1)
    groups = [lost[which] for which in (silent, ~silent) if which.any()]
    return STRAYED_WEIGHT * sum(group.mean() for group in groups)


def overlooked(queries: Tensor, keys: Tensor, mask: Tensor, codes: Tensor, written: int) -> Tensor:
    """Weighted loss of a head's attention, at a preview's cells, to all but the shapes before them.

    Where none has begun it is to look at the token before the first cell.

    Args:
        queries: the head's, [B, S, D]; keys: [B, S, D]; mask: [B, S].
        codes: int64 [B, N], the preview's.
        written: how many of the last tokens are to name a cell, of which the first N are asked.
    """
    first, count = keys.shape[1] - written, codes.shape[1]
    tokens = first + torch.arange(count, device=keys.device)
    shows = F.pad(shown_by(codes) < NOTHING, (first + 1, written - count - 1))  # by token
    seen = torch.arange(keys.shape[1], device=keys.device) <= tokens[:, None]
    allowed = shows[:, None] & seen
    allowed[..., first] = ~allowed.any(-1)
    return STRAYED_WEIGHT * _lost(_scores(queries[:, None], keys, mask, tokens), allowed).mean()


def _lost(scores: Tensor, allowed: Tensor) -> Tensor:
    """Nats [B, heads, T] that attention by scores [B, heads, T, S] loses to others than allowed."""
    right = scores.masked_fill(~allowed[:, None], -torch.inf)
    return scores.logsumexp(-1) - right.logsumexp(-1)


def _scores(queries: Tensor, keys: Tensor, mask: Tensor, tokens: Tensor) -> Tensor:
    """float32 [B, heads, T, S]: scores of these tokens [T]; -inf for what they do not see."""
    later = torch.arange(keys.shape[1], device=keys.device) > tokens[:, None]
    unseen = later | (mask == 0)[:, None]  # [B, T, S]
    scores = (queries[:, :, tokens] @ keys[:, None].mT).float()
    return scores.masked_fill(unseen[:, None], -torch.inf)
