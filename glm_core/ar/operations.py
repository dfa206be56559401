"""The operations of a block: norms, projections, rotation, attention of a step, the MLP's gate.

The functions here are the plain ones, of torch's own operations. `Operations` holds one for each
purpose; a step may run with faster ones in their place, see `kernels`, `compiled.py`, `choice.py`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..fallbacks import index_copy_


class Rotation(NamedTuple):
    """A `model.rope_table` as layers take it.

    cos, sin: cosines and signed sines, each [L, 1, head_dim], or [B, L, 1, head_dim] where samples
        have positions of their own.
    width: how many features of a head are rotated.
    """

    cos: Tensor
    sin: Tensor
    width: int

    @classmethod
    def of(cls, table: Tensor, width: int) -> "Rotation":
        """table: [2, L, head_dim], or one for each sample, [B, 2, L, head_dim]."""
        cos, sin = table.unsqueeze(-2).unbind(-4)
        return cls(cos, sin, width)


def apply_rope(x: Tensor, rotation: Rotation) -> Tensor:
    """Rotate x [B, L, H, D] in pairs (i, i + width / 2)."""
    half = rotation.width // 2
    first, second, unrotated = x.split((half, half, x.shape[-1] - 2 * half), dim=-1)
    swapped = torch.cat([second, first, unrotated], dim=-1)
    return torch.addcmul(x * rotation.cos, swapped, rotation.sin)


def rotate_together(q: Tensor, k: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor]:
    """Queries [B, L, heads, D] and keys [B, L, kv_heads, D] in one pass."""
    rotated = apply_rope(torch.cat([q, k], dim=2), rotation)
    return rotated.split((q.shape[2], k.shape[2]), dim=2)


def add_norm(
    x: Tensor, y: Tensor, after: nn.Module, following: nn.Module | None
) -> tuple[Tensor, Tensor | None]:
    """Add a layer's output to the hidden states, and normalise for the next layer.

    Args:
        x: hidden states [B, L, C]; y: the output, of the same shape.
        after: the norm of the output.
        following: the norm before the next layer, if that is on the same device.

    Returns:
        x + after(y), and `following` of that.
    """
    x = x + after(y)
    return x, None if following is None else following(x)


def project(
    x: Tensor, q_proj: nn.Module, k_proj: nn.Module, v_proj: nn.Module
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries [B, L, heads * D], keys and values [B, L, kv_heads * D] of x [B, L, C]."""
    return q_proj(x), k_proj(x), v_proj(x)


def rotate_write(
    q: Tensor, k: Tensor, v: Tensor, rotation: Rotation, layer: Tensor, position: Tensor
) -> Tensor:
    """Rotate the queries and keys of a step, and write keys and values into the cache.

    Args:
        q: [B, L, heads, D]; k, v: [B, L, kv_heads, D].
        layer: the layer's cache [(k, v), B, kv_heads, length, D].
        position: int64 [L], where to write.

    Returns:
        The rotated queries.
    """
    q, k = rotate_together(q, k, rotation)
    keys, values = layer
    index_copy_(keys, 2, position, k.transpose(1, 2))
    index_copy_(values, 2, position, v.transpose(1, 2))
    return q


def attend(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor,
    position: Tensor,
    first: Tensor | None = None,
) -> Tensor:
    """The attention of a step over the span of its cache.

    Args:
        q: [B, L, heads, D]; keys, values: [B, kv_heads, span, D].
        mask: see `cache.step_mask`. It says what `position` and `first` say; a kernel may go by
            those.
        position: int64 [L], of the ids that ask; each sees all positions up to its own.
        first: int64 [B], the first position that a sample sees; None if it is 0 for all.

    Returns:
        [B, L, heads * D]
    """
    out = attend_to_span(_grouped(q, keys.shape[1]), keys, values, mask)
    return _ungrouped(out, q)


def attend_by_products(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor,
    position: Tensor,
    first: Tensor | None = None,
) -> Tensor:
    """`attend` as two products and a softmax; in bf16 every score is rounded."""
    grouped = _grouped(q, keys.shape[1])
    scores = grouped * q.shape[-1] ** -0.5 @ keys.mT + mask
    return _ungrouped(scores.softmax(dim=-1) @ values, q)


def attend_to_span(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Few queries, q [B, H, Q, D], over many keys, k and v [B, H, span, D]: [B, H, Q, D]."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def _grouped(q: Tensor, kv_heads: int) -> Tensor:
    """Heads that share keys as queries of one head, so that the keys are read once."""
    batch, length, _, head_dim = q.shape
    q = q.view(batch, length, kv_heads, -1, head_dim).transpose(1, 2)
    return q.reshape(batch, kv_heads, -1, head_dim)


def _ungrouped(out: Tensor, q: Tensor) -> Tensor:
    batch, length, _, head_dim = q.shape
    out = out.view(batch, out.shape[1], length, -1, head_dim)
    return out.transpose(1, 2).reshape(batch, length, -1)


def gate(gate_up: Tensor) -> Tensor:
    """SwiGLU's gate: [..., 2 N], the gate first, to [..., N]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def run(
    block: nn.Module,
    x: Tensor,
    normed: Tensor,
    rotation: Rotation,
    attention: Any,
    following: nn.Module | None,
) -> tuple[Tensor, Tensor | None]:
    """A whole block; see `model.Block.forward` for the arguments."""
    return block(x, normed, rotation, attention, following)


@dataclass(frozen=True)
class Operations:
    """An operation for each purpose; those that are not given are the plain ones."""

    add_norm: Callable[..., tuple[Tensor, Tensor | None]] = add_norm
    project: Callable[..., tuple[Tensor, Tensor, Tensor]] = project
    rotate_write: Callable[..., Tensor] = rotate_write
    attend: Callable[..., Tensor] = attend
    gate: Callable[[Tensor], Tensor] = gate
    run: Callable[..., tuple[Tensor, Tensor | None]] = run


PLAIN = Operations()
