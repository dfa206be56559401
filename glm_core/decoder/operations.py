"""What a block does between its products and attention: modulated norms, gated residuals, rotation.

The functions here are the plain ones, of torch's own operations. `Operations` holds one for each
purpose; a block may run with faster ones in their place, see `kernels.py` and `choice.py`.

The twelve vectors of a block's modulation [B, 12, hidden] are, for attention and then for the
feed-forward: shift, scale and gate, each of the image and then of the text.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .embeddings import Rope, rotate

EPS = 1e-5
ATTENTION, FEED_FORWARD = 0, 6
"""The first of the vectors for each."""


def modulated_norm(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Weightless LayerNorm, then an affine map given by the conditioning."""
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=EPS), 1 + scale)


def modulate(txt: Tensor, img: Tensor, vectors: Tensor, first: int = ATTENTION) -> Tensor:
    """The modulated norms of text and image, joined.

    Args:
        txt, img: hidden states [B, T, hidden], [B, N, hidden].
        vectors: [B, 12, hidden], or of a batch of 1.
        first: of the vectors to take.

    Returns:
        [B, T + N, hidden]
    """
    shift, shift_txt, scale, scale_txt = vectors[:, first : first + 4].split(1, dim=1)
    parts = modulated_norm(txt, scale_txt, shift_txt), modulated_norm(img, scale, shift)
    return torch.cat(parts, dim=1)


def add(
    txt: Tensor, img: Tensor, out: Tensor, vectors: Tensor, first: int = FEED_FORWARD
) -> tuple[Tensor, Tensor]:
    """Text and image after a gated residual; `out` is a layer's output [B, T + N, hidden]."""
    gate, gate_txt = vectors[:, first + 4 : first + 6].split(1, dim=1)
    length = txt.shape[1]
    # addcmul reads and writes memory once, where a product and a sum do so twice.
    return torch.addcmul(txt, gate_txt, out[:, :length]), torch.addcmul(img, gate, out[:, length:])


def add_modulate(
    txt: Tensor, img: Tensor, attended: Tensor, vectors: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Text and image after attention, and the feed-forward's input [B, T + N, hidden]."""
    txt, img = add(txt, img, attended, vectors, ATTENTION)
    return txt, img, modulate(txt, img, vectors, FEED_FORWARD)


def norm_rotate(q: Tensor, k: Tensor, rope: Rope) -> tuple[Tensor, Tensor]:
    """Queries and keys [B, L, heads, head_dim], each head normalised and rotated in float32."""
    q, k = (rotate(F.layer_norm(x, x.shape[-1:], eps=EPS), rope) for x in (q, k))
    return q, k


@dataclass(frozen=True)
class Operations:
    """An operation for each purpose; those that are not given are the plain ones."""

    modulate: Callable[..., Tensor] = modulate
    add_modulate: Callable[..., tuple[Tensor, Tensor, Tensor]] = add_modulate
    norm_rotate: Callable[..., tuple[Tensor, Tensor]] = norm_rotate


PLAIN = Operations()
