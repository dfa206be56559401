"""The sizes of the diffusion decoder, from the checkpoint's config."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import CheckpointError
from ..schema import HEADS, LAYERS, WIDTH, read, whole

CONFIG = {
    "patch_size": whole(1, 64),
    "in_channels": whole(1, 1024),
    "out_channels": whole(1, 1024),
    "num_layers": LAYERS,
    "attention_head_dim": WIDTH,
    "num_attention_heads": HEADS,
    "text_embed_dim": WIDTH,
    "time_embed_dim": WIDTH,
    "condition_dim": WIDTH,
    "prior_vq_quantizer_codebook_size": whole(1, 2**20),
}
"""What this network reads of `transformer/config.json`."""
ADVICE = "take it from the transformer folder of a GLM-Image checkpoint"


@dataclass(frozen=True)
class DecoderConfig:
    """The fields of `transformer/config.json`."""

    patch_size: int
    in_channels: int
    out_channels: int
    num_layers: int
    attention_head_dim: int
    num_attention_heads: int
    text_embed_dim: int
    time_embed_dim: int
    condition_dim: int
    prior_vq_quantizer_codebook_size: int

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "DecoderConfig":
        """Read a checkpoint's config; GLMImageError names what is missing or does not fit."""
        return cls(**read(config, CONFIG, "The decoder's config.json", ADVICE))

    def __post_init__(self) -> None:
        if self.attention_head_dim % 4:
            raise CheckpointError(
                f"attention_head_dim is {self.attention_head_dim}; "
                "rows and columns need a quarter of it each, so it must be a multiple of 4."
            )
        if self.time_embed_dim % 2 or self.condition_dim % 2:
            raise CheckpointError(
                f"time_embed_dim {self.time_embed_dim} and condition_dim {self.condition_dim} "
                "hold cosines and sines, so both must be even."
            )
        if self.in_channels != self.out_channels:
            raise CheckpointError(
                f"The decoder's in_channels is {self.in_channels} and its out_channels "
                f"{self.out_channels}, but both are the latent's; {ADVICE}."
            )

    @property
    def hidden_size(self) -> int:
        return self.num_attention_heads * self.attention_head_dim
