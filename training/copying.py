"""Initial weights and losses for the AR model's attention heads that find the cell to copy.

The large grid mostly repeats its preview, and an edited picture its reference. Only RoPE says where
the copied cell lies, and between neighbouring columns its lowest frequencies change a score by a
sixteenth, too little for a small model to learn. So two heads of one layer start with queries and
keys that find the copied cell. These are right at one size only, so a loss trains both heads at the
others. A loss trains the layer's third head to find the note on what the cell shows, at the end of
the prompt (`tokenizer.NOTES`).

In earlier layers, losses train three more kinds of attention: a head of the reference's cells finds
the wish, to compare it with what they show; all heads of a note find the phrase about its subject;
and a head of the preview's cells finds the shapes that have begun, so that none is drawn twice.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.glm_image.modeling_glm_image import apply_rotary_pos_emb

from glm_core.data.grids import PREVIEW_SIDE

from .reading import COPY_LAYER, NOTHING, shown_by
from .tokenizer import REFERENCE_TO_PICTURE

FROM_PREVIEW, FROM_REFERENCE, FROM_NOTES = range(3)  # heads
FROM_WISH = 0  # head of `reading.REFERENCE_LAYER`
FROM_SHAPES = 1  # head of POSITION_LAYER
TARGET_WEIGHT, ALLOWED_WEIGHT = 0.1, 0.5
MAX_CELLS = 256  # the most cells of a picture in the loss of one step
# At 512 x 512, where a preview and a reference have as many cells a side. A query's token is the
# cell before the one to name, so the copied cell is one column nearer.
OFFSETS = {
    head: (away, away, away - 1)
    for head, away in (
        (FROM_PREVIEW, PREVIEW_SIDE),
        (FROM_REFERENCE, PREVIEW_SIDE + REFERENCE_TO_PICTURE),
    )
}
SCALES = (3.0, 5.0, 8.0)  # of a query's and a key's frequencies on the axes (t, h, w)


@torch.no_grad()
def init_copy_heads(text: nn.Module) -> None:
    """Initialise COPY_LAYER: its heads attend to the key `OFFSETS` away and pass its value on.

    The offsets are those of 512 x 512; the model learns those of other sizes.

    Args:
        text: a GlmImageTextModel.
    """
    attention = text.layers[COPY_LAYER].self_attn
    frequencies, sections = text.rotary_emb.inv_freq, text.rotary_emb.mrope_section
    axis = torch.repeat_interleave(torch.arange(3), torch.tensor(sections))
    scale, turned = torch.tensor(SCALES)[axis], 2 * len(axis)
    for head, offset in OFFSETS.items():
        angle = torch.tensor(offset)[axis] * frequencies
        query = torch.cat([scale * angle.cos(), -scale * angle.sin()])
        attention.q_proj.bias[head * attention.head_dim :][:turned] = query
    attention.k_proj.bias[:turned] = torch.cat([scale, torch.zeros_like(scale)])
    attention.v_proj.weight.copy_(torch.linalg.qr(torch.randn_like(attention.v_proj.weight).T)[0].T)
    attention.o_proj.weight[:, : attention.head_dim] = attention.v_proj.weight.T


def queries_and_keys(
    text: nn.Module, index: int, states: Tensor, positions: Tensor
) -> tuple[Tensor, Tensor]:
    """A layer's queries and keys after RoPE; their product is the attention's score.

    Args:
        index: of the layer.
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


def target_attention_loss(
    queries: Tensor, keys: Tensor, mask: Tensor, wanted: Tensor, generator: torch.Generator
) -> Tensor:
    """Weighted loss of a head's attention to one wanted token from each of the last N tokens.

    Args:
        queries: of the head, [B, S, D]; keys: [B, S, D]; mask: [B, S].
        wanted: int64 [B, N], indices of tokens; -1 leaves a token out of the loss.
    """
    (asked,) = torch.where((wanted >= 0).any(0))
    asked = asked[torch.randperm(len(asked), generator=generator, device=asked.device)]
    asked = asked[:MAX_CELLS]
    tokens = keys.shape[1] - wanted.shape[1] + asked
    scores = _scores(queries[:, None], keys, mask, tokens)
    wanted = wanted[:, asked].flatten()
    return TARGET_WEIGHT * F.cross_entropy(scores.flatten(0, 2), wanted, ignore_index=-1)


def note_attention_loss(
    queries: Tensor, keys: Tensor, mask: Tensor, first: int, spoken: Tensor
) -> Tensor:
    """Weighted loss of the notes' attention to phrases that are not about their subject.

    A note whose subject has a phrase must look at it, the others at no phrase. Both kinds count the
    same.

    Args:
        queries: [B, heads, S, D]; keys: [B, S, D]; mask: [B, S].
        first: index of the first note's token.
        spoken: int64 [B, NOTES, 2], `samples.Sample.spoken` as tokens.
    """
    tokens = torch.arange(keys.shape[1], device=keys.device)
    notes = first + torch.arange(spoken.shape[1], device=keys.device)
    about = (tokens >= spoken[..., :1]) & (tokens <= spoken[..., 1:]) & (spoken[..., :1] >= 0)
    silent = ~about.any(-1)
    allowed = torch.where(silent[..., None], ~about.any(1, keepdim=True), about)
    lost = _disallowed_attention(_scores(queries, keys, mask, notes), allowed).mean(1)
    groups = [lost[which] for which in (silent, ~silent) if which.any()]
    return ALLOWED_WEIGHT * sum(group.mean() for group in groups)


def shape_attention_loss(
    queries: Tensor, keys: Tensor, mask: Tensor, codes: Tensor, written: int
) -> Tensor:
    """Weighted loss of a head's attention from a preview's cells to all but the shapes before them.

    Before the first shape it must look at the token in front of the first cell.

    Args:
        queries: of the head, [B, S, D]; keys: [B, S, D]; mask: [B, S].
        codes: int64 [B, N], of the preview.
        written: how many of the last tokens name a cell; the loss is over the first N of them.
    """
    first, count = keys.shape[1] - written, codes.shape[1]
    tokens = first + torch.arange(count, device=keys.device)
    shows = F.pad(shown_by(codes) < NOTHING, (first + 1, written - count - 1))  # by token
    seen = torch.arange(keys.shape[1], device=keys.device) <= tokens[:, None]
    allowed = shows[:, None] & seen
    allowed[..., first] = ~allowed.any(-1)
    scores = _scores(queries[:, None], keys, mask, tokens)
    return ALLOWED_WEIGHT * _disallowed_attention(scores, allowed).mean()


def _disallowed_attention(scores: Tensor, allowed: Tensor) -> Tensor:
    """Nats [B, heads, T] of attention that scores [B, heads, T, S] give to keys not allowed."""
    allowed_scores = scores.masked_fill(~allowed[:, None], -torch.inf)
    return scores.logsumexp(-1) - allowed_scores.logsumexp(-1)


def _scores(queries: Tensor, keys: Tensor, mask: Tensor, tokens: Tensor) -> Tensor:
    """float32 [B, heads, T, S]: scores of these tokens [T]; -inf for keys that they do not see."""
    later = torch.arange(keys.shape[1], device=keys.device) > tokens[:, None]
    unseen = later | (mask == 0)[:, None]  # [B, T, S]
    scores = (queries[:, :, tokens] @ keys[:, None].mT).float()
    return scores.masked_fill(unseen[:, None], -torch.inf)
