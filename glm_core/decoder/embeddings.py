"""Embeddings of the decoder's timestep and image size, and the rotation of positions."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..layers import Layers

Rope = tuple[Tensor, Tensor]
"""Cosines and signed sines of positions, each float32 [L, head_dim]; see `rotary`."""


class TimeSizeEmbedding(nn.Module):
    """One vector for the timestep and for crop_top, crop_left, height and width in pixels."""

    def __init__(self, time_dim: int, condition_dim: int, layers: Layers) -> None:
        super().__init__()
        self.time_dim = time_dim
        self.condition_dim = condition_dim
        self.timestep_embedder = EmbeddingMLP(time_dim, time_dim, layers)
        self.condition_embedder = EmbeddingMLP(4 * condition_dim, time_dim, layers)

    def embed_size(self, size: tuple[int, int], device: torch.device, dtype: torch.dtype) -> Tensor:
        """(height, width), uncropped -> [1, time_dim]"""
        numbers = torch.tensor((0.0, 0.0, *size), device=device)
        condition = rearrange(sinusoids(numbers, self.condition_dim), "n d -> 1 (n d)")
        return self.condition_embedder(condition.to(dtype))

    def forward(self, timestep: Tensor, size_embedding: Tensor) -> Tensor:
        """timestep [B], `embed_size` [1, time_dim] -> [B, time_dim]"""
        sinusoid = sinusoids(timestep, self.time_dim).to(size_embedding.dtype)
        return F.silu(self.timestep_embedder(sinusoid) + size_embedding)


class EmbeddingMLP(nn.Module):
    def __init__(self, dim: int, out: int, layers: Layers) -> None:
        super().__init__()
        self.linear_1 = layers.Linear(dim, out)
        self.linear_2 = layers.Linear(out, out)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(x)))


def sinusoids(values: Tensor, dim: int) -> Tensor:
    """[B] -> float32 [B, dim]: cosines, then sines, of values * 10000^(-2i / dim)."""
    half = dim // 2
    exponent = torch.arange(half, dtype=torch.float32, device=values.device) / half
    angles = values.float().unsqueeze(-1) * torch.exp(-math.log(10000.0) * exponent)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def rotary(grid: tuple[int, int], text: int, head_dim: int, device: Any) -> Rope:
    """Rotation of every position: none for the text, (row, column) for the image.

    Each axis has head_dim / 4 frequencies 10000^(-2i / (head_dim / 2)).

    Returns:
        cos, sin: float32 [text + rows * cols, head_dim], for `rotate`: the first half of the sines
        is negative.
    """
    rows, cols = grid
    half = head_dim // 2
    frequency = 10000.0 ** -(torch.arange(0, half, 2, dtype=torch.float32, device=device) / half)
    row = torch.arange(rows, device=device).unsqueeze(-1) * frequency
    col = torch.arange(cols, device=device).unsqueeze(-1) * frequency
    angles = torch.cat(
        [
            row.unsqueeze(1).expand(rows, cols, -1),
            col.unsqueeze(0).expand(rows, cols, -1),
        ],
        dim=-1,
    )
    angles = F.pad(rearrange(angles, "h w d -> (h w) d"), (0, 0, text, 0))
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)


def rotate(x: Tensor, rope: Rope) -> Tensor:
    """Rotates the pairs (i, i + head_dim / 2) of x [B, L, heads, head_dim], in float32."""
    cos, sin = (table.unsqueeze(1) for table in rope)
    left, right = x.float().chunk(2, dim=-1)
    return torch.addcmul(x * cos, torch.cat([right, left], dim=-1), sin).to(x.dtype)
