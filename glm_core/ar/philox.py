"""Random numbers by position: Philox4x32-10, so that a draw depends only on seed and cell.

Salmon, Moraes, Dror, Shaw: "Parallel Random Numbers: As Easy as 1, 2, 3" (SC 2011). Computed with
tensor operations on 32-bit words in int64, which are exact on every device and can be captured in
a graph.
"""

from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor

_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
_WEYL = 0x9E3779B9, 0xBB67AE85
_ROUNDS = 10
_WORD = 0xFFFFFFFF


def philox(counter: tuple[Tensor, ...], key: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Four random words per counter.

    Args:
        counter: four tensors of words, int64, least significant word first, broadcastable.
        key: two such tensors.

    Returns:
        Four int64 tensors of words in [0, 2^32), of the broadcast shape.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        high0, low0 = _multiply(_MULTIPLIERS[0], c0)
        high1, low1 = _multiply(_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _WORD, (k1 + _WEYL[1]) & _WORD
    return c0, c1, c2, c3


def batch_seeds(seed: int, batch: int) -> tuple[int, ...]:
    """The seeds of a batch's samples: (seed + i) mod 2^64."""
    return tuple((seed + i) % 2**64 for i in range(batch))


def sample_keys(seeds: Sequence[int], device: torch.device) -> Tensor:
    """The samples' keys: int64 [B, 2] of words. A seed is below 2^64."""
    return torch.tensor([[s & _WORD, s >> 32] for s in seeds], dtype=torch.int64, device=device)


def gumbel(keys: Tensor, grid: int, row: int, columns: Tensor, n: int) -> Tensor:
    """Standard Gumbel noise for every candidate at the given cells of a row.

    The counter is (candidate // 4, column, row, grid), and candidate % 4 selects the word.

    Args:
        keys: int64 [B, 2], from `sample_keys`.
        columns: int64 [P], on the keys' device.
        n: number of candidates.

    Returns:
        float32 [B, P, n], finite.
    """
    blocks = torch.arange((n + 3) // 4, device=keys.device)
    counter = (
        rearrange(blocks, "c -> 1 1 c"),
        rearrange(columns, "p -> 1 p 1"),
        torch.full_like(blocks, row),
        torch.full_like(blocks, grid),
    )
    low, high = rearrange(keys, "b word -> word b 1 1")
    words = rearrange(torch.stack(philox(counter, (low, high))), "word b p c -> b p (c word)")
    return to_gumbel(words[..., :n])


def to_gumbel(words: Tensor) -> Tensor:
    """Words in [0, 2^32) to float32 Gumbel noise between -2.9 and 22.9, never infinite.

    -log(-log(1 - u)) with u = (word + 1/2) / 2^32. The largest noise wins a draw and has u near 0,
    where float32 holds all 32 bits of the word; 1 - u would hold 24. Near 1, u is clamped to the
    float32 below 1. Words there tie for the smallest noise, which wins no draw.
    """
    u = (words.to(torch.float32) + 0.5) * 2.0**-32
    return -torch.log(-torch.log1p(-u.clamp(max=1 - 2.0**-24)))


def _multiply(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """High and low word of a 32 x 32 bit product. int64 wraps, so all of its 64 bits are right."""
    product = a * b
    return (product >> 32) & _WORD, product & _WORD
