"""Candidates that `torch.compile` makes for the user's device when they are first used.

Each takes from seconds to minutes to compile, in every process anew, and a compiler which many
machines lack. So they are no candidates unless a host asks for them.
"""

from collections.abc import Callable, Mapping
from functools import cache, partial

import torch
from torch import Tensor, nn

from .cache import LayerPass, StepPass
from .operations import Rotation

Backend = str | Callable
"""What `torch.compile` hands its graphs to."""


def compiled_operations(backend: Backend = "inductor") -> Mapping[str, Mapping[str, Callable]]:
    """The functions by the field of `Operations` that they are for, and by name."""
    return {
        "attend": {"flex": partial(attend_by_flex, backend)},
        "run": {"compiled": partial(run_compiled, backend)},
    }


@cache
def _compiled(function: Callable, backend: Backend) -> Callable:
    """Sizes are variables: one compilation serves all spans, and a graph break is an error."""
    return torch.compile(function, dynamic=True, fullgraph=True, backend=backend)


def attend_by_flex(
    backend: Backend,
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor,
    position: Tensor,
    first: Tensor | None = None,
) -> Tensor:
    """`operations.attend` by torch's `flex_attention`, which has a kernel for few queries."""
    return _compiled(_flex, backend)(q, keys, values, position, first)


def _flex(
    q: Tensor, keys: Tensor, values: Tensor, position: Tensor, first: Tensor | None
) -> Tensor:
    from torch.nn.attention.flex_attention import flex_attention  # since torch 2.5

    def seen(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        visible = key <= position[query]
        if first is not None:
            visible = visible & (key >= first[batch])
        return torch.where(visible, score, -torch.inf)

    out = flex_attention(q.transpose(1, 2), keys, values, score_mod=seen, enable_gqa=True)
    return out.transpose(1, 2).flatten(2)


def run_compiled(
    backend: Backend,
    block: nn.Module,
    x: Tensor,
    normed: Tensor,
    rotation: Rotation,
    attention: StepPass,
    following: nn.Module | None,
) -> tuple[Tensor, Tensor | None]:
    """`operations.run`: a whole block, in which the compiler fuses what it can.

    All blocks share what is compiled, so it is given its layer of the cache, not its number.
    """
    cached = attention.cache.layers[block.self_attn.index]
    of_pass = cached, attention.position, attention.mask, attention.first
    tensors = x, normed, rotation.cos, rotation.sin, *of_pass
    return _compiled(_block, backend)(block, following, rotation.width, *tensors)


def _block(
    block: nn.Module,
    following: nn.Module | None,
    width: int,
    x: Tensor,
    normed: Tensor,
    cos: Tensor,
    sin: Tensor,
    cached: Tensor,
    position: Tensor,
    mask: Tensor,
    first: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    attention = LayerPass(cached, position, mask, first)
    return block(x, normed, Rotation(cos, sin, width), attention, following)
