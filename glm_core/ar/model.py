"""The autoregressive model: a GLM-4 decoder that writes semantic tokens.

Written after `transformers.models.glm_image`; parameter names are the checkpoint's. The vision
tower of the same checkpoint (`VISION_PREFIXES`) is not part of this network.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import CheckpointError
from ..layers import Layers
from ..schema import (
    EPSILON,
    FLAG,
    HEADS,
    LAYERS,
    WIDTH,
    exactly,
    many,
    number,
    optional,
    read,
    whole,
)
from ..split import LayerSegment, on_device, own_layers
from .cache import AttentionPass, KVCache
from .operations import Operations, Rotation
from .row_linear import RowOperations

VOCABULARY = whole(1, 2**20)
TOKEN = whole(0, 2**20)
CONFIG = {
    "text_config.vocab_size": VOCABULARY,
    "text_config.vision_vocab_size": VOCABULARY,
    "vq_config.num_embeddings": VOCABULARY,
    "text_config.hidden_size": WIDTH,
    "text_config.intermediate_size": WIDTH,
    "text_config.num_hidden_layers": LAYERS,
    "text_config.num_attention_heads": HEADS,
    "text_config.num_key_value_heads": HEADS,
    "text_config.head_dim": optional(WIDTH),
    "text_config.rms_norm_eps": EPSILON,
    "text_config.attention_bias": optional(FLAG, True),  # the hub's file omits it
    "text_config.hidden_act": optional(exactly("silu")),
    "text_config.rope_parameters.rope_type": optional(exactly("default")),
    "text_config.rope_parameters.rope_theta": number(1, 1e12),
    "text_config.rope_parameters.partial_rotary_factor": optional(number(0, 1), 1.0),
    "text_config.rope_parameters.mrope_section": many(WIDTH, 1, 16),
    "image_start_token_id": TOKEN,
    "image_end_token_id": TOKEN,
    "image_token_id": TOKEN,
}
"""What this network reads of `vision_language_encoder/config.json`."""
ADVICE = "download the vision_language_encoder folder of a GLM-Image checkpoint again"


@dataclass(frozen=True)
class ARConfig:
    """Sizes and ids of the AR model, from `vision_language_encoder/config.json`."""

    vocab_size: int
    visual_size: int  # rows of the head: the codes, then image start and end
    codebook: int  # ids below are semantic tokens, the only legal ones in an image
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    rms_eps: float
    attention_bias: bool
    rope_theta: float
    rotary_dim: int
    mrope_section: tuple[int, ...]
    image_start: int
    image_end: int
    image_token: int

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> "ARConfig":
        """Read a checkpoint's config; GLMImageError names what is missing or does not fit."""
        values = read(config, CONFIG, "The AR model's config.json", ADVICE)
        heads, hidden_size = values["num_attention_heads"], values["hidden_size"]
        head_dim = values["head_dim"] or max(1, hidden_size // heads)
        return cls(
            vocab_size=values["vocab_size"],
            visual_size=values["vision_vocab_size"],
            codebook=values["num_embeddings"],
            hidden_size=hidden_size,
            intermediate_size=values["intermediate_size"],
            layers=values["num_hidden_layers"],
            heads=heads,
            kv_heads=values["num_key_value_heads"],
            head_dim=head_dim,
            rms_eps=values["rms_norm_eps"],
            attention_bias=values["attention_bias"],
            rope_theta=values["rope_theta"],
            rotary_dim=int(head_dim * values["partial_rotary_factor"]),
            mrope_section=tuple(values["mrope_section"]),
            image_start=values["image_start_token_id"],
            image_end=values["image_end_token_id"],
            image_token=values["image_token_id"],
        )

    def __post_init__(self) -> None:
        if self.heads % self.kv_heads:
            raise CheckpointError(
                f"The AR model has {self.heads} heads, no multiple of its {self.kv_heads} KV heads."
            )
        if 2 * sum(self.mrope_section) != self.rotary_dim:
            raise CheckpointError(
                f"The AR model's mrope_section {list(self.mrope_section)} does not cover half of "
                f"its {self.rotary_dim} rotary dimensions."
            )
        if not self.codebook <= self.visual_size <= self.vocab_size:
            raise CheckpointError(
                f"The AR model's codebook {self.codebook}, visual vocabulary {self.visual_size} "
                f"and vocabulary {self.vocab_size} must not decrease in this order."
            )
        for name in ("image_start", "image_end", "image_token"):
            if getattr(self, name) >= self.vocab_size:
                raise CheckpointError(
                    f"The AR model's {name} is the id {getattr(self, name)}, and its vocabulary "
                    f"has only {self.vocab_size}; {ADVICE}."
                )


def rope_table(config: ARConfig, positions: Tensor, dtype: torch.dtype) -> Tensor:
    """Cosines and signed sines of positions [3, L]: [2, L, head_dim] in `dtype`.

    The frequencies are cut into `mrope_section` pieces, which take their position from the axes
    (t, h, w) in turn. Computed in float32 and then cast, as the reference does. The first half's
    sines are negative. Features beyond rotary_dim are not rotated: their cosine is 1, their sine 0.
    """
    exponents = torch.arange(0, config.rotary_dim, 2, device=positions.device).float()
    frequencies = 1.0 / config.rope_theta ** (exponents / config.rotary_dim)
    angles = positions[..., None].float() * frequencies  # [3, L, rotary_dim / 2]
    pieces = angles.split(config.mrope_section, dim=-1)
    angles = torch.cat([piece[i % 3] for i, piece in enumerate(pieces)], dim=-1)
    cos, sin = angles.cos(), angles.sin()
    unrotated = (0, config.head_dim - config.rotary_dim)
    cos = F.pad(torch.cat([cos, cos], dim=-1), unrotated, value=1.0)
    sin = F.pad(torch.cat([-sin, sin], dim=-1), unrotated)
    return torch.stack([cos, sin]).to(dtype)


class ARModel(nn.Module):
    """`vision_language_encoder` without its vision tower: ids in, logits of semantic tokens out."""

    def __init__(
        self,
        config: ARConfig,
        *,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        operations: Any = RowOperations,
        segments: Sequence[LayerSegment] = (),
    ) -> None:
        """
        Args:
            operations: the classes of layers to build from, see `Layers`.
            segments: the last layers of a split model, from `layer_segment`.
        """
        super().__init__()
        self.config = config
        self.segments = tuple(segments)
        layers = Layers(operations, device, dtype)
        self.model = nn.ModuleDict({"language_model": TextModel(config, self.segments, layers)})
        self.lm_head = layers.Linear(config.hidden_size, config.visual_size, bias=False)

    def forward(
        self, ids: Tensor, rope: Tensor, attention: AttentionPass, dtype: torch.dtype, tail: int = 1
    ) -> Tensor:
        """Read ids into the cache.

        Args:
            ids: int64 [B, L], with the cache's batch size.
            rope: [2, L, head_dim], the `rope_table` of these ids, or one for each sample,
                [B, 2, L, head_dim].
            attention: the cache, in `dtype`, and the positions of these ids in it.
            dtype: what to compute in; weights may be stored in another.
            tail: after how many of the last ids to return logits.

        Returns:
            Logits over the legal ids: [B, tail, codebook].
        """
        hidden = self.model["language_model"](ids, rope, attention, dtype)
        return self.logits(hidden[:, -tail:])

    def new_cache(
        self, batch: int, length: int, device: torch.device, dtype: torch.dtype
    ) -> KVCache:
        """An empty cache of `batch` samples and `length` positions; `device` is the model's."""
        c = self.config
        own = (device, own_layers(c.layers, self.segments))
        others = ((segment.compute_device, len(segment.layers)) for segment in self.segments)
        return KVCache([own, *others], batch, c.kv_heads, length, c.head_dim, dtype=dtype)

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., hidden_size] to [..., codebook]: ids that are no semantic tokens are cut off."""
        return self.lm_head(hidden)[..., : self.config.codebook]


class TextModel(nn.Module):
    """The decoder stack, from ids to normalised hidden states."""

    def __init__(
        self, config: ARConfig, segments: tuple[LayerSegment, ...], layers: Layers
    ) -> None:
        super().__init__()
        self.segments = segments
        self.rotary_dim = config.rotary_dim
        self.embed_tokens = layers.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            Block(config, i, layers) for i in range(own_layers(config.layers, segments))
        )
        self.norm = layers.RMSNorm(config.hidden_size, eps=config.rms_eps)

    def forward(
        self, ids: Tensor, rope: Tensor, attention: AttentionPass, dtype: torch.dtype
    ) -> Tensor:
        """ids [B, L] to hidden states [B, L, hidden_size]"""
        x = self.embed_tokens(ids).to(dtype)
        rotation = Rotation.of(rope, self.rotary_dim)
        if not self.segments:
            return run_blocks(self.layers, x, rotation, attention, self.norm)[1]
        x, _ = run_blocks(self.layers, x, rotation, attention, None)
        device = x.device
        for segment in self.segments:
            on = segment.compute_device
            x, rotation = x.to(on), Rotation.of(rope.to(on), self.rotary_dim)
            moved = attention.to(on)
            with on_device(on, current=device):
                x, _ = run_blocks(segment.layers, x, rotation, moved, None)
        return self.norm(x.to(device))


def run_blocks(
    blocks: Iterable["Block"],
    x: Tensor,
    rotation: Rotation,
    attention: AttentionPass,
    last: nn.Module | None,
) -> tuple[Tensor, Tensor | None]:
    """Hidden states [B, L, hidden_size] after the blocks, and the norm `last` of them."""
    first, *others = blocks
    run = attention.operations.run
    normed = first.input_layernorm(x)
    for block, following in zip((first, *others), (*others, None), strict=True):
        norm = last if following is None else following.input_layernorm
        x, normed = run(block, x, normed, rotation, attention, norm)
    return x, normed


def layer_segment(
    config: ARConfig,
    numbers: range,
    on: torch.device,
    *,
    device: Any = None,
    dtype: torch.dtype | None = None,
    operations: Any = RowOperations,
) -> LayerSegment:
    """Some of a model's layers, as a segment of their own that computes on the device `on`."""
    layers = Layers(operations, device, dtype)
    path = "model.language_model.layers"
    return LayerSegment(path, numbers, on, lambda i: Block(config, i, layers))


class Block(nn.Module):
    """Attention and MLP, each between two norms.

    The first norm is applied by the block before, together with the end of its own work.
    """

    def __init__(self, config: ARConfig, index: int, layers: Layers) -> None:
        super().__init__()

        def norm() -> nn.Module:
            return layers.RMSNorm(config.hidden_size, eps=config.rms_eps)

        self.input_layernorm = norm()
        self.self_attn = Attention(config, index, layers)
        self.post_self_attn_layernorm = norm()
        self.post_attention_layernorm = norm()
        self.mlp = MLP(config, layers)
        self.post_mlp_layernorm = norm()

    def forward(
        self,
        x: Tensor,
        normed: Tensor,
        rotation: Rotation,
        attention: AttentionPass,
        following: nn.Module | None,
    ) -> tuple[Tensor, Tensor | None]:
        """
        Args:
            normed: this block's first norm of the hidden states x.
            following: the norm that is applied to the hidden states next.

        Returns:
            The hidden states after the block, and `following` of them.
        """
        operations = attention.operations
        attended = self.self_attn(normed, rotation, attention)
        x, normed = operations.add_norm(
            x, attended, self.post_self_attn_layernorm, self.post_attention_layernorm
        )
        written = self.mlp(normed, operations)
        return operations.add_norm(x, written, self.post_mlp_layernorm, following)


class Attention(nn.Module):
    """Grouped-query attention over the cache."""

    def __init__(self, config: ARConfig, index: int, layers: Layers) -> None:
        super().__init__()
        self.index = index
        self.head_dim = config.head_dim
        width, kv_width = (n * config.head_dim for n in (config.heads, config.kv_heads))
        hidden, bias = config.hidden_size, config.attention_bias
        self.q_proj = layers.Linear(hidden, width, bias=bias)
        self.k_proj = layers.Linear(hidden, kv_width, bias=bias)
        self.v_proj = layers.Linear(hidden, kv_width, bias=bias)
        self.o_proj = layers.Linear(width, hidden, bias=False)

    def forward(self, x: Tensor, rotation: Rotation, attention: AttentionPass) -> Tensor:
        # Views [B, L, heads, D] instead of einops, whose Python code costs time in a step.
        projected = attention.operations.project(x, self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)) for part in projected)
        return self.o_proj(attention.attend(self.index, q, k, v, rotation))


class MLP(nn.Module):
    """SwiGLU, gate and up fused, gate first."""

    def __init__(self, config: ARConfig, layers: Layers) -> None:
        super().__init__()
        width = config.intermediate_size
        self.gate_up_proj = layers.Linear(config.hidden_size, 2 * width, bias=False)
        self.down_proj = layers.Linear(width, config.hidden_size, bias=False)

    def forward(self, x: Tensor, operations: Operations) -> Tensor:
        return self.down_proj(operations.gate(self.gate_up_proj(x)))
