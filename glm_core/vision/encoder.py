"""The vision side of the AR model: a ViT and a vector quantiser turn an image into semantic tokens.

Written after `GlmImageVisionModel` and `GlmImageVQVAE` of transformers; parameter names are the
checkpoint's.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..attention import sdpa
from ..data.grids import Grid
from ..errors import CheckpointError
from ..fallbacks import sample_table
from ..layers import Layers
from ..schema import EPSILON, FLAG, HEADS, LAYERS, WIDTH, exactly, optional, read, whole

VISION_PREFIXES = ("model.visual.", "model.vqmodel.")
"""Prefixes of this network's keys in the AR model's checkpoint."""

# Prefixes of the other keys: the text model, and a layer from codes to features, which is unused.
OTHER_PREFIXES = ("model.language_model.", "lm_head.", "model.vqmodel.post_quant_conv.")

CONFIG = {
    "vision_config.hidden_size": WIDTH,
    "vision_config.intermediate_size": WIDTH,
    "vision_config.depth": LAYERS,
    "vision_config.num_heads": HEADS,
    "vision_config.layer_norm_eps": EPSILON,
    "vision_config.attention_bias": optional(FLAG, True),
    "vision_config.in_channels": exactly(3),
    "vision_config.patch_size": whole(1, 1024),
    "vision_config.image_size": whole(1, 2**15),
    "vision_config.hidden_act": optional(exactly("gelu")),
    "vision_config.spatial_merge_size": optional(exactly(1)),
    "vq_config.num_embeddings": whole(1, 2**20),
    "vq_config.embed_dim": WIDTH,
    "vq_config.latent_channels": WIDTH,
}
"""What this network reads of `vision_language_encoder/config.json`."""
ADVICE = "download the vision_language_encoder folder of a GLM-Image checkpoint again"


@dataclass(frozen=True)
class VisionConfig:
    """Sizes of the ViT and the quantiser, from `vision_language_encoder/config.json`."""

    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    eps: float
    attention_bias: bool
    channels: int
    patch_size: int
    position_side: int  # the learned positions are a square table
    codebook: int
    code_dim: int

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "VisionConfig":
        """Read a checkpoint's config; GLMImageError names what is missing or does not fit."""
        values = read(config, CONFIG, "The AR model's config.json", ADVICE)
        features, width = values["latent_channels"], values["hidden_size"]
        if features != width:
            raise CheckpointError(
                f"The vision encoder's latent_channels is {features}, but only {width} is "
                "supported, its hidden_size."
            )
        return cls(
            hidden_size=width,
            intermediate_size=values["intermediate_size"],
            layers=values["depth"],
            heads=values["num_heads"],
            eps=values["layer_norm_eps"],
            attention_bias=values["attention_bias"],
            channels=values["in_channels"],
            patch_size=values["patch_size"],
            position_side=values["image_size"] // values["patch_size"],
            codebook=values["num_embeddings"],
            code_dim=values["embed_dim"],
        )

    def __post_init__(self) -> None:
        if self.hidden_size % self.heads:
            raise CheckpointError(
                f"The vision encoder's hidden_size {self.hidden_size} is no multiple of its "
                f"{self.heads} heads."
            )
        if self.position_side < 1:
            raise CheckpointError(
                f"The vision encoder's patch_size {self.patch_size} is larger than its image_size; "
                f"{ADVICE}."
            )


class VisionEncoder(nn.Module):
    """The part of `vision_language_encoder` that reads images: pixels in, token ids out."""

    def __init__(
        self,
        config: VisionConfig,
        *,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        operations: Any = nn,
    ) -> None:
        super().__init__()
        self.config = config
        layers = Layers(operations, device, dtype)
        self.model = nn.ModuleDict(
            {"visual": VisionTransformer(config, layers), "vqmodel": Quantiser(config, layers)}
        )

    def forward(self, pixels: Tensor, dtype: torch.dtype) -> Tensor:
        """Read images of one size.

        Args:
            pixels: [B, channels, H, W], see `pixels.vision_pixels`; the sides are multiples of
                the patch size.
            dtype: what to compute in; weights may be stored in another.

        Returns:
            Ids int64 [B, H / patch_size, W / patch_size], all below the codebook's size.
        """
        return self.model["vqmodel"](self.model["visual"](pixels.to(dtype)))


class VisionTransformer(nn.Module):
    """Pixels to one feature a patch. There is no norm after the last block."""

    def __init__(self, config: VisionConfig, layers: Layers) -> None:
        super().__init__()
        self.embeddings = PositionTable(config, layers)
        self.patch_embed = PatchEmbed(config, layers)
        self.blocks = nn.ModuleList(Block(config, layers) for _ in range(config.layers))

    def forward(self, pixels: Tensor) -> Tensor:
        """[B, channels, H, W] to [B, h, w, hidden_size]."""
        x = self.patch_embed(pixels)
        grid = x.shape[1], x.shape[2]
        x = rearrange(x + self.embeddings(grid, x.device).to(x.dtype), "b h w d -> b (h w) d")
        for block in self.blocks:
            x = block(x)
        return rearrange(x, "b (h w) d -> b h w d", h=grid[0])


class PatchEmbed(nn.Module):
    """A linear map of each patch, as a strided convolution over the image."""

    def __init__(self, config: VisionConfig, layers: Layers) -> None:
        super().__init__()
        side = config.patch_size
        self.proj = layers.Conv2d(config.channels, config.hidden_size, side, stride=side)

    def forward(self, pixels: Tensor) -> Tensor:
        """[B, channels, H, W] to [B, h, w, hidden_size]."""
        return rearrange(self.proj(pixels), "b d h w -> b h w d")


class PositionTable(nn.Module):
    """Learned positions of a square grid, resized to the image's grid."""

    def __init__(self, config: VisionConfig, layers: Layers) -> None:
        super().__init__()
        self.side = config.position_side
        self.position_embedding = layers.Embedding(self.side**2, config.hidden_size)

    def forward(self, grid: Grid, device: torch.device) -> Tensor:
        """Sampled bilinearly at the cells' centres, in float32 as in the reference: [h, w, D]."""
        table = whole_table(self.position_embedding, device)
        table = rearrange(table, "(h w) d -> 1 d h w", h=self.side)
        y, x = (((torch.arange(n, device=device) + 0.5) / n) * 2 - 1 for n in grid)
        centres = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1)[None]  # [1, h, w, 2]
        return rearrange(sample_table(table, centres), "1 d h w -> h w d")


class Block(nn.Module):
    """Attention over all patches, then an MLP, each after a norm."""

    def __init__(self, config: VisionConfig, layers: Layers) -> None:
        super().__init__()
        self.norm1 = layers.LayerNorm(config.hidden_size, eps=config.eps)
        self.norm2 = layers.LayerNorm(config.hidden_size, eps=config.eps)
        self.attn = Attention(config, layers)
        self.mlp = MLP(config, layers)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Attention(nn.Module):
    def __init__(self, config: VisionConfig, layers: Layers) -> None:
        super().__init__()
        self.heads = config.heads
        width, bias = config.hidden_size, config.attention_bias
        self.qkv = layers.Linear(width, 3 * width, bias=bias)
        self.proj = layers.Linear(width, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = rearrange(self.qkv(x), "b l (n h d) -> n b h l d", n=3, h=self.heads)
        return self.proj(sdpa(q, k, v, self.heads))


class MLP(nn.Module):
    def __init__(self, config: VisionConfig, layers: Layers) -> None:
        super().__init__()
        self.fc1 = layers.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = layers.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Quantiser(nn.Module):
    """Features to the ids of their nearest codes."""

    def __init__(self, config: VisionConfig, layers: Layers) -> None:
        super().__init__()
        self.quantize = nn.ModuleDict(
            {"embedding": layers.Embedding(config.codebook, config.code_dim)}
        )
        self.quant_conv = layers.Conv2d(config.hidden_size, config.code_dim, 1)

    def forward(self, features: Tensor) -> Tensor:
        """[B, h, w, hidden_size] to int64 [B, h, w].

        Features and codes have length one, so the nearest code has the largest inner product. It
        is computed in float32, because in bfloat16 many codes tie.
        """
        x = self.quant_conv(rearrange(features, "b h w d -> b d h w"))
        x = F.normalize(rearrange(x, "b d h w -> b h w d").float(), dim=-1)
        codes = F.normalize(whole_table(self.quantize["embedding"], features.device), dim=-1)
        return (x @ codes.T).argmax(dim=-1)


def whole_table(embedding: nn.Module, device: torch.device) -> Tensor:
    """All rows of an embedding, float32 [rows, D].

    They are looked up, not read from `.weight`: a host may keep the weights on another device, in
    another dtype or without their LoRA, and only the layer's forward brings these together.
    """
    rows = torch.arange(embedding.num_embeddings, device=device)
    return embedding(rows).float()
