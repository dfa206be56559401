"""The glyph encoder: a T5 encoder over bytes, with the names of transformers' T5EncoderModel."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..errors import CheckpointError
from ..layers import Layers
from ..schema import EPSILON, HEADS, LAYERS, WIDTH, exactly, read, whole
from .texts import BYTE_OFFSET

CONFIG = {
    # T5's name for a gate with the tanh approximation of GELU.
    "feed_forward_proj": exactly("gated-gelu"),
    "d_model": WIDTH,
    "d_ff": WIDTH,
    "d_kv": WIDTH,
    "num_heads": HEADS,
    "num_layers": LAYERS,
    "vocab_size": whole(1, 2**20),
    "relative_attention_num_buckets": whole(1, 4096),
    "relative_attention_max_distance": whole(1, 2**20),
    "layer_norm_epsilon": EPSILON,
}
"""What this network reads and supports of `text_encoder/config.json`."""
ADVICE = "choose GLM-Image's glyph encoder, or download its config.json again"


@dataclass(frozen=True)
class GlyphConfig:
    """The sizes of text_encoder/config.json, by its names."""

    d_model: int
    d_ff: int
    d_kv: int
    num_heads: int
    num_layers: int
    vocab_size: int
    relative_attention_num_buckets: int
    relative_attention_max_distance: int
    layer_norm_epsilon: float

    def __post_init__(self) -> None:
        if self.vocab_size < BYTE_OFFSET + 256:
            raise CheckpointError(
                f"The glyph encoder's vocab_size is {self.vocab_size}, which cannot hold ByT5's "
                f"{BYTE_OFFSET + 256} ids; choose GLM-Image's glyph encoder."
            )
        buckets, distance = (
            self.relative_attention_num_buckets,
            self.relative_attention_max_distance,
        )
        if buckets < 4 or buckets % 4 or distance <= buckets // 4:
            raise CheckpointError(
                f"The glyph encoder's relative_attention_num_buckets {buckets} and "
                f"relative_attention_max_distance {distance} do not fit together; "
                "download its config.json again."
            )

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "GlyphConfig":
        """Read the checkpoint's config.

        Raises:
            GLMImageError: a size is missing or out of range, or it is a T5 of another kind.
        """
        values = read(config, CONFIG, "The glyph encoder's config", ADVICE)
        return cls(**{field.name: values[field.name] for field in fields(cls)})


class GlyphEncoder(nn.Module):
    """ByT5 ids to one vector a byte. Nothing is masked: a batch holds texts of one length."""

    def __init__(
        self,
        config: GlyphConfig,
        *,
        device: Any = None,
        dtype: torch.dtype | None = None,
        operations: Any = nn,
    ) -> None:
        super().__init__()
        layers = Layers(operations, device, dtype)
        self.config = config
        self.shared = layers.Embedding(config.vocab_size, config.d_model)
        self.encoder = Stack(config, layers)

    def forward(self, ids: Tensor) -> Tensor:
        """[B, L] -> [B, L, d_model], in the dtype of the embedding's weights."""
        return self.encoder(self.shared(ids))


class Stack(nn.Module):
    def __init__(self, config: GlyphConfig, layers: Layers) -> None:
        super().__init__()
        self.config = config
        self.block = nn.ModuleList(
            Block(config, layers, holds_bias=i == 0) for i in range(config.num_layers)
        )
        self.final_layer_norm = layers.RMSNorm(config.d_model, eps=config.layer_norm_epsilon)

    def forward(self, x: Tensor) -> Tensor:
        buckets = relative_position_buckets(
            x.shape[1],
            self.config.relative_attention_num_buckets,
            self.config.relative_attention_max_distance,
            x.device,
        )
        # The first block's bias table serves all blocks.
        table = self.block[0].layer[0].SelfAttention.relative_attention_bias
        bias = rearrange(table(buckets), "q k h -> 1 h q k").to(x.dtype)
        for block in self.block:
            x = block(x, bias)
        return self.final_layer_norm(x)


class Block(nn.Module):
    def __init__(self, config: GlyphConfig, layers: Layers, *, holds_bias: bool) -> None:
        super().__init__()
        self.layer = nn.ModuleList(
            [
                AttentionLayer(config, layers, holds_bias=holds_bias),
                FeedForwardLayer(config, layers),
            ]
        )

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        attention, feed_forward = self.layer
        return feed_forward(attention(x, bias))


class AttentionLayer(nn.Module):
    def __init__(self, config: GlyphConfig, layers: Layers, *, holds_bias: bool) -> None:
        super().__init__()
        self.SelfAttention = Attention(config, layers, holds_bias=holds_bias)
        self.layer_norm = layers.RMSNorm(config.d_model, eps=config.layer_norm_epsilon)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        return x + self.SelfAttention(self.layer_norm(x), bias)


class Attention(nn.Module):
    def __init__(self, config: GlyphConfig, layers: Layers, *, holds_bias: bool) -> None:
        super().__init__()
        inner = config.num_heads * config.d_kv
        self.heads = config.num_heads
        self.q = layers.Linear(config.d_model, inner, bias=False)
        self.k = layers.Linear(config.d_model, inner, bias=False)
        self.v = layers.Linear(config.d_model, inner, bias=False)
        self.o = layers.Linear(inner, config.d_model, bias=False)
        if holds_bias:
            self.relative_attention_bias = layers.Embedding(
                config.relative_attention_num_buckets, config.num_heads
            )

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """x [B, L, d_model], bias [1, heads, L, L]; T5 does not scale the scores."""
        q, k, v = (
            rearrange(proj(x), "b l (h d) -> b h l d", h=self.heads)
            for proj in (self.q, self.k, self.v)
        )
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1.0)
        return self.o(rearrange(out, "b h l d -> b l (h d)"))


class FeedForwardLayer(nn.Module):
    def __init__(self, config: GlyphConfig, layers: Layers) -> None:
        super().__init__()
        self.DenseReluDense = GatedGelu(config, layers)
        self.layer_norm = layers.RMSNorm(config.d_model, eps=config.layer_norm_epsilon)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.DenseReluDense(self.layer_norm(x))


class GatedGelu(nn.Module):
    def __init__(self, config: GlyphConfig, layers: Layers) -> None:
        super().__init__()
        self.wi_0 = layers.Linear(config.d_model, config.d_ff, bias=False)
        self.wi_1 = layers.Linear(config.d_model, config.d_ff, bias=False)
        self.wo = layers.Linear(config.d_ff, config.d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.wo(F.gelu(self.wi_0(x), approximate="tanh") * self.wi_1(x))


def relative_position_buckets(
    length: int, num_buckets: int, max_distance: int, device: torch.device | None = None
) -> Tensor:
    """Bucket of key position minus query position: int64 [length, length].

    Half of the buckets are for keys after the query. In each half, the first half of the buckets
    hold one distance each and the rest grow logarithmically up to `max_distance`. Source: T5
    (arXiv:1910.10683) and `T5Attention._relative_position_bucket` in transformers.
    """
    position = torch.arange(length, device=device)
    relative = position[None, :] - position[:, None]
    half = num_buckets // 2
    exact = half // 2
    distance = relative.abs()
    growth = torch.log(distance.clamp(min=1).float() / exact) / math.log(max_distance / exact)
    far = (exact + (growth * (half - exact)).long()).clamp(max=half - 1)
    return torch.where(distance < exact, distance, far) + half * (relative > 0)
