"""The layer of the AR model that looks up what a cell is to show: how it begins, what it must do.

The large grid repeats its preview, and an edited picture its reference, mostly. What says where the
copied cell lies is RoPE alone, whose lowest frequencies a small model would have to tell apart by a
sixteenth of their score from one column to the next. So one layer's heads begin with queries and
keys that do; and as this is right at one size only, training asks two of them for that cell. The
third is asked for the note on what stands there, at the end of the prompt (`tokenizer.PLACES`).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.glm_image.modeling_glm_image import apply_rotary_pos_emb

from .reading import WHERE_LAYER
from .tokenizer import REFERENCE_TO_PICTURE

COPY_LAYER = WHERE_LAYER + 1
FROM_PREVIEW, FROM_REFERENCE, FROM_NOTES = range(3)  # heads
MISSED_WEIGHT = 0.1
ASKED_CELLS = 256  # of a picture, in a step, at the most
SIDE = 16  # cells that a preview's, and a reference's, longer side has at 512 x 512
# A query's cell is the one before the cell to be named, so the copied one is a column less away.
OFFSETS = {
    FROM_PREVIEW: (SIDE, SIDE, SIDE - 1),
    FROM_REFERENCE: (*(SIDE + REFERENCE_TO_PICTURE,) * 2, SIDE + REFERENCE_TO_PICTURE - 1),
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
    frequencies, axis = text.rotary_emb.inv_freq, axes_of(text.rotary_emb.mrope_section)
    loudness, turned = torch.tensor(LOUDNESS)[axis], 2 * len(axis)
    for head, offset in OFFSETS.items():
        angle = torch.tensor(offset)[axis] * frequencies
        query = torch.cat([loudness * angle.cos(), -loudness * angle.sin()])
        attention.q_proj.bias[head * attention.head_dim :][:turned] = query
    attention.k_proj.bias[:turned] = torch.cat([loudness, torch.zeros_like(loudness)])
    attention.v_proj.weight.copy_(torch.linalg.qr(torch.randn_like(attention.v_proj.weight).T)[0].T)
    attention.o_proj.weight[:, : attention.head_dim] = attention.v_proj.weight.T


def missed(
    text: nn.Module,
    head: int,
    states: Tensor,
    positions: Tensor,
    mask: Tensor,
    wanted: Tensor,
    generator: torch.Generator,
) -> Tensor:
    """Weighted loss of a head's attention to the tokens that the next codes are to be read from.

    Args:
        states: [B, S, width] before COPY_LAYER; positions: int64 [3, B, S]; mask: [B, S].
        wanted: int64 [B, N], a token for each of the last N; -1 for those that nothing is asked of.
    """
    (asked,) = torch.where((wanted >= 0).any(0))
    asked = asked[torch.randperm(len(asked), generator=generator, device=asked.device)]
    asked = asked[:ASKED_CELLS]
    tokens = states.shape[1] - wanted.shape[1] + asked
    scores = _scores(text, head, states, positions, tokens)
    later = torch.arange(states.shape[1], device=tokens.device) > tokens[:, None]
    scores = scores.float().masked_fill(later | (mask == 0)[:, None], -torch.inf)
    wanted = wanted[:, asked].flatten()
    return MISSED_WEIGHT * F.cross_entropy(scores.flatten(0, 1), wanted, ignore_index=-1)


def _scores(
    text: nn.Module, head: int, states: Tensor, positions: Tensor, tokens: Tensor
) -> Tensor:
    """[B, T, S]: how much a head of COPY_LAYER wants to look at each key, for T tokens."""
    layer = text.layers[COPY_LAYER]
    attention, given = layer.self_attn, layer.input_layernorm(states)
    cos, sin = text.rotary_emb(given, positions)
    queries = attention.q_proj(given[:, tokens]).unflatten(-1, (-1, attention.head_dim))[:, :, head]
    keys = attention.k_proj(given)
    queries, _ = apply_rotary_pos_emb(
        queries[:, None], queries[:, None], cos[:, tokens], sin[:, tokens]
    )
    _, keys = apply_rotary_pos_emb(keys[:, None], keys[:, None], cos, sin)
    return attention.scaling * (queries @ keys.mT)[:, 0]


def axes_of(sections: tuple[int, int, int]) -> Tensor:
    """int64 [sum of sections]: the axis (t, h, w) that each frequency turns with."""
    return torch.repeat_interleave(torch.arange(3), torch.tensor(sections))
