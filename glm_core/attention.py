"""Attention for networks that no host gives its own."""

from typing import Any

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor


def sdpa(q: Tensor, k: Tensor, v: Tensor, heads: int, **_: Any) -> Tensor:
    """Scaled dot-product attention, called as ComfyUI's `optimized_attention`.

    Args:
        q, k, v: [B, heads, L, D], as ComfyUI's functions take them with `skip_reshape=True`.
        heads: a part of that call, as the other options are; the shapes say it here.

    Returns:
        [B, L_q, heads * D]
    """
    return rearrange(F.scaled_dot_product_attention(q, k, v), "b h l d -> b l (h d)")
