"""The autoregressive model: a GLM-4 decoder that writes semantic tokens.

Written after `transformers.models.glm_image`; parameter names are the checkpoint's. The vision
tower of the same checkpoint (`VISION_PREFIXES`) is not part of this network.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from .errors import GLMImageError

VISION_PREFIXES = ("model.visual.", "model.vqmodel.")


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
        """Read a checkpoint's config; GLMImageError names what is missing or contradictory."""
        try:
            text = config["text_config"]
            rope = text["rope_parameters"]
            head_dim = text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"]
            parsed = cls(
                vocab_size=text["vocab_size"],
                visual_size=text["vision_vocab_size"],
                codebook=config["vq_config"]["num_embeddings"],
                hidden_size=text["hidden_size"],
                intermediate_size=text["intermediate_size"],
                layers=text["num_hidden_layers"],
                heads=text["num_attention_heads"],
                kv_heads=text["num_key_value_heads"],
                head_dim=head_dim,
                rms_eps=text["rms_norm_eps"],
                attention_bias=text.get("attention_bias", True),  # the hub's file omits it
                rope_theta=rope["rope_theta"],
                rotary_dim=int(head_dim * rope.get("partial_rotary_factor", 1.0)),
                mrope_section=tuple(rope["mrope_section"]),
                image_start=config["image_start_token_id"],
                image_end=config["image_end_token_id"],
                image_token=config["image_token_id"],
            )
        except KeyError as missing:
            raise GLMImageError(
                f"The AR model's config.json has no {missing}: this is not a GLM-Image "
                "vision_language_encoder."
            ) from missing
        for name, value, expected in (
            ("hidden_act", text.get("hidden_act", "silu"), "silu"),
            ("rope_type", rope.get("rope_type", "default"), "default"),
        ):
            if value != expected:
                raise GLMImageError(
                    f"The AR model's {name} is {value!r}, but only {expected!r} is supported."
                )
        return parsed

    def __post_init__(self) -> None:
        if self.heads % self.kv_heads:
            raise GLMImageError(
                f"The AR model has {self.heads} heads, no multiple of its {self.kv_heads} KV heads."
            )
        if 2 * sum(self.mrope_section) != self.rotary_dim:
            raise GLMImageError(
                f"The AR model's mrope_section {list(self.mrope_section)} does not cover half of "
                f"its {self.rotary_dim} rotary dimensions."
            )
        if not self.codebook <= self.visual_size <= self.vocab_size:
            raise GLMImageError(
                f"The AR model's codebook {self.codebook}, visual vocabulary {self.visual_size} "
                f"and vocabulary {self.vocab_size} must not decrease in this order."
            )


class KVCache:
    """Keys and values of all layers, allocated once: [layer, (k, v), B, kv_heads, length, D]."""

    def __init__(
        self,
        config: ARConfig,
        batch: int,
        length: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        shape = (config.layers, 2, batch, config.kv_heads, length, config.head_dim)
        self.data = torch.zeros(shape, device=device, dtype=dtype)
        self.filled = 0

    def write(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append a block's [B, kv_heads, L, D]; returns all keys and values up to its end."""
        end = self.filled + k.shape[2]
        block = self.data[layer, :, :, :, self.filled : end]
        block[0] = k
        block[1] = v
        keys, values = self.data[layer, :, :, :, :end]
        return keys, values

    def copy_prefix(self, other: "KVCache") -> None:
        """Begin with what `other`, of this batch or of batch 1, holds."""
        self.data[..., : other.filled, :] = other.data[..., : other.filled, :]
        self.filled = other.filled


def rope_table(config: ARConfig, positions: Tensor, dtype: torch.dtype) -> Tensor:
    """Cosines and sines of positions [3, L]: [2, L, rotary_dim] in `dtype`.

    The frequencies are cut into `mrope_section` pieces, which take their position from the axes
    (t, h, w) in turn. Computed in float32 and then cast, as the reference does.
    """
    exponents = torch.arange(0, config.rotary_dim, 2, device=positions.device).float()
    frequencies = 1.0 / config.rope_theta ** (exponents / config.rotary_dim)
    angles = positions[..., None].float() * frequencies  # [3, L, rotary_dim / 2]
    pieces = angles.split(config.mrope_section, dim=-1)
    angles = torch.cat([piece[i % 3] for i, piece in enumerate(pieces)] * 2, dim=-1)
    return torch.stack([angles.cos(), angles.sin()]).to(dtype)


def apply_rope(x: Tensor, rope: Tensor) -> Tensor:
    """Rotate the first rotary_dim features of x [B, H, L, D] in pairs (i, i + rotary_dim / 2)."""
    cos, sin = rope
    rotary_dim = cos.shape[-1]
    rotated, passed = x[..., :rotary_dim], x[..., rotary_dim:]
    first, second = rotated.chunk(2, dim=-1)
    rotated = rotated * cos + torch.cat([-second, first], dim=-1) * sin
    return torch.cat([rotated, passed], dim=-1)


class ARModel(nn.Module):
    """`vision_language_encoder` without its vision tower: ids in, logits of semantic tokens out."""

    def __init__(
        self,
        config: ARConfig,
        *,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        operations: Any = nn,
    ) -> None:
        super().__init__()
        self.config = config
        layer = {"device": device, "dtype": dtype, "operations": operations}
        self.model = nn.ModuleDict({"language_model": TextModel(config, **layer)})
        self.lm_head = operations.Linear(
            config.hidden_size, config.visual_size, bias=False, device=device, dtype=dtype
        )

    def forward(self, ids: Tensor, rope: Tensor, cache: KVCache, dtype: torch.dtype) -> Tensor:
        """Append a block of ids to the sequence in `cache`.

        Args:
            ids: int64 [B, L], of the cache's batch.
            rope: [2, L, rotary_dim], the block's part of `rope_table`.
            cache: in `dtype`, with room for L more.
            dtype: what to compute in; weights may be stored in another.

        Returns:
            Logits of the id after the block over the legal ids: [B, codebook].
        """
        hidden = self.model["language_model"](ids, rope, cache, dtype)
        return self.logits(hidden[:, -1])

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., hidden_size] to [..., codebook]: ids that are no semantic tokens are cut off."""
        return self.lm_head(hidden)[..., : self.config.codebook]


class TextModel(nn.Module):
    """The decoder stack, from ids to normalised hidden states."""

    def __init__(self, config: ARConfig, *, device: Any, dtype: Any, operations: Any) -> None:
        super().__init__()
        layer = {"device": device, "dtype": dtype}
        self.embed_tokens = operations.Embedding(config.vocab_size, config.hidden_size, **layer)
        self.layers = nn.ModuleList(
            Block(config, i, operations=operations, **layer) for i in range(config.layers)
        )
        self.norm = operations.RMSNorm(config.hidden_size, eps=config.rms_eps, **layer)

    def forward(self, ids: Tensor, rope: Tensor, cache: KVCache, dtype: torch.dtype) -> Tensor:
        """ids [B, L] to hidden states [B, L, hidden_size]; the cache is filled by L more."""
        x = self.embed_tokens(ids).to(dtype)
        mask = block_mask(cache.filled, ids.shape[1], ids.device)
        for layer in self.layers:
            x = layer(x, rope, cache, mask)
        cache.filled += ids.shape[1]
        return self.norm(x)


def block_mask(filled: int, length: int, device: torch.device) -> Tensor | None:
    """Causal mask [L, filled + L] of a block that continues a sequence, where it needs one.

    A single position sees everything; a block that starts the sequence is plainly causal, which
    attention kernels do without a mask.
    """
    if filled == 0 or length == 1:
        return None
    return torch.ones(length, filled + length, dtype=torch.bool, device=device).tril(filled)


class Block(nn.Module):
    """Attention and MLP, each between two norms."""

    def __init__(
        self, config: ARConfig, index: int, *, device: Any, dtype: Any, operations: Any
    ) -> None:
        super().__init__()
        layer = {"device": device, "dtype": dtype}

        def norm() -> nn.Module:
            return operations.RMSNorm(config.hidden_size, eps=config.rms_eps, **layer)

        self.input_layernorm = norm()
        self.self_attn = Attention(config, index, operations=operations, **layer)
        self.post_self_attn_layernorm = norm()
        self.post_attention_layernorm = norm()
        self.mlp = MLP(config, operations=operations, **layer)
        self.post_mlp_layernorm = norm()

    def forward(self, x: Tensor, rope: Tensor, cache: KVCache, mask: Tensor | None) -> Tensor:
        attended = self.self_attn(self.input_layernorm(x), rope, cache, mask)
        x = x + self.post_self_attn_layernorm(attended)
        return x + self.post_mlp_layernorm(self.mlp(self.post_attention_layernorm(x)))


class Attention(nn.Module):
    """Grouped-query attention over the cache."""

    def __init__(
        self, config: ARConfig, index: int, *, device: Any, dtype: Any, operations: Any
    ) -> None:
        super().__init__()
        self.index = index
        self.head_dim = config.head_dim
        width, kv_width = (n * config.head_dim for n in (config.heads, config.kv_heads))
        layer = {"bias": config.attention_bias, "device": device, "dtype": dtype}
        self.q_proj = operations.Linear(config.hidden_size, width, **layer)
        self.k_proj = operations.Linear(config.hidden_size, kv_width, **layer)
        self.v_proj = operations.Linear(config.hidden_size, kv_width, **layer)
        self.o_proj = operations.Linear(width, config.hidden_size, **layer | {"bias": False})

    def forward(self, x: Tensor, rope: Tensor, cache: KVCache, mask: Tensor | None) -> Tensor:
        q, k, v = (
            rearrange(project(x), "b l (h d) -> b h l d", d=self.head_dim)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        k, v = cache.write(self.index, apply_rope(k, rope), v)
        out = F.scaled_dot_product_attention(
            apply_rope(q, rope),
            k,
            v,
            attn_mask=mask,
            is_causal=mask is None and x.shape[1] > 1,
            enable_gqa=True,
        )
        return self.o_proj(rearrange(out, "b h l d -> b l (h d)"))


class MLP(nn.Module):
    """SwiGLU, gate and up fused, gate first."""

    def __init__(self, config: ARConfig, *, device: Any, dtype: Any, operations: Any) -> None:
        super().__init__()
        layer = {"bias": False, "device": device, "dtype": dtype}
        width = config.intermediate_size
        self.gate_up_proj = operations.Linear(config.hidden_size, 2 * width, **layer)
        self.down_proj = operations.Linear(width, config.hidden_size, **layer)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(F.silu(gate) * up)
