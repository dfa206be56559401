"""Attention where no host supplies one."""

from typing import Any

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor


def sdpa(
    q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None, **kwargs: Any
) -> Tensor:
    """Scaled dot-product attention with the call of ComfyUI's `optimized_attention`.

    Args:
        q, k, v: [B, heads, L, D], as the host's functions take them with `skip_reshape=True`.
        mask: boolean or additive, broadcastable to [B, heads, L_q, L_k].
        kwargs: what a host's function takes besides (`skip_reshape`, `transformer_options`).

    Returns:
        [B, L_q, heads * D]
    """
    if not kwargs.get("skip_reshape", False):
        q, k, v = (rearrange(x, "b l (h d) -> b h l d", h=heads) for x in (q, k, v))
    out: Tensor = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return rearrange(out, "b h l d -> b l (h d)")
