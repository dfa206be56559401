"""The VAE: pixels to latents and back, with the names of diffusers' AutoencoderKL."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import CheckpointError, quoted
from .layers import Layers
from .schema import TEXT, exactly, many, number, read, whole

EPS = 1e-6  # of every GroupNorm; AutoencoderKL has no config for it

BLOCKS = {"down_block_types": "DownEncoderBlock2D", "up_block_types": "UpDecoderBlock2D"}
CONFIG = {
    # What this file does not build is turned off. A missing key is refused: it means diffusers'
    # default, which turns most of these on.
    "mid_block_add_attention": exactly(False),
    "use_quant_conv": exactly(False),
    "use_post_quant_conv": exactly(False),
    "act_fn": exactly("silu"),
    "block_out_channels": many(whole(1, 2**14), 1, 8),
    "down_block_types": many(TEXT, 1, 8),
    "up_block_types": many(TEXT, 1, 8),
    "in_channels": exactly(3),
    "out_channels": exactly(3),
    "layers_per_block": whole(1, 64),
    "latent_channels": whole(1, 1024),
    "norm_num_groups": whole(1, 2**14),
    "latents_mean": many(number(-1e6, 1e6), 1, 1024),
    "latents_std": many(number(1e-6, 1e6), 1, 1024),
}
"""What this file reads and supports of `vae/config.json`."""
ADVICE = "choose GLM-Image's VAE, or download its config.json again"


@dataclass(frozen=True)
class VAEConfig:
    """The values of vae/config.json, by its names. Latents are normalised by mean and std."""

    in_channels: int
    out_channels: int
    block_out_channels: tuple[int, ...]
    layers_per_block: int
    latent_channels: int
    norm_num_groups: int
    latents_mean: tuple[float, ...]
    latents_std: tuple[float, ...]

    def __post_init__(self) -> None:
        for channels in self.block_out_channels:
            if channels % self.norm_num_groups:
                raise CheckpointError(
                    f"The VAE's block_out_channels {channels} is no multiple of norm_num_groups "
                    f"{self.norm_num_groups}; download its config.json again."
                )
        for name in ("latents_mean", "latents_std"):
            if len(getattr(self, name)) != self.latent_channels:
                raise CheckpointError(
                    f"The VAE's {name} has {len(getattr(self, name))} values and latent_channels "
                    f"is {self.latent_channels}; download its config.json again."
                )

    @property
    def downscale(self) -> int:
        """Pixels a latent cell spans on each side."""
        return 2 ** (len(self.block_out_channels) - 1)

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "VAEConfig":
        """Read the checkpoint's config.

        Raises:
            GLMImageError: a value is missing or out of range, or it is another kind of VAE.
        """
        values = read(config, CONFIG, "The VAE's config", ADVICE)
        blocks = len(values["block_out_channels"])
        for name, block in BLOCKS.items():
            if values[name] != [block] * blocks:
                raise CheckpointError(
                    f"The VAE's {name} is {quoted(values[name])}, but only {blocks} of {block} are "
                    f"supported; {ADVICE}."
                )
        values = {field.name: values[field.name] for field in fields(cls)}
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


class AutoencoderKL(nn.Module):
    """Latents here are the network's own: `latents_mean` and `latents_std` are not applied."""

    def __init__(
        self,
        config: VAEConfig,
        *,
        device: Any = None,
        dtype: torch.dtype | None = None,
        operations: Any = nn,
    ) -> None:
        super().__init__()
        layers = Layers(operations, device, dtype)
        self.config = config
        self.encoder = Encoder(config, layers)
        self.decoder = Decoder(config, layers)

    def encode(self, pixels: Tensor) -> Tensor:
        """[B, 3, H, W] in -1..1 -> the posterior's mode [B, C, H / downscale, W / downscale]."""
        mean, _logvar = self.encoder(pixels).chunk(2, dim=1)
        return mean

    def decode(self, latents: Tensor) -> Tensor:
        """[B, C, h, w] -> pixels [B, 3, h * downscale, w * downscale], about -1..1."""
        return self.decoder(latents)


class Encoder(nn.Module):
    def __init__(self, config: VAEConfig, layers: Layers) -> None:
        super().__init__()
        widths, groups = config.block_out_channels, config.norm_num_groups
        self.conv_in = layers.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            DownBlock(
                previous, width, config.layers_per_block, groups, layers, last=i == len(widths) - 1
            )
            for i, (previous, width) in enumerate(zip((widths[0], *widths), widths, strict=False))
        )
        self.mid_block = MidBlock(widths[-1], groups, layers)
        self.conv_norm_out = layers.GroupNorm(groups, widths[-1], eps=EPS)
        self.conv_out = layers.Conv2d(widths[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        return self.conv_out(F.silu(self.conv_norm_out(self.mid_block(x))))


class Decoder(nn.Module):
    def __init__(self, config: VAEConfig, layers: Layers) -> None:
        super().__init__()
        widths, groups = config.block_out_channels[::-1], config.norm_num_groups
        self.conv_in = layers.Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.mid_block = MidBlock(widths[0], groups, layers)
        self.up_blocks = nn.ModuleList(
            UpBlock(
                previous,
                width,
                config.layers_per_block + 1,
                groups,
                layers,
                last=i == len(widths) - 1,
            )
            for i, (previous, width) in enumerate(zip((widths[0], *widths), widths, strict=False))
        )
        self.conv_norm_out = layers.GroupNorm(groups, widths[-1], eps=EPS)
        self.conv_out = layers.Conv2d(widths[-1], config.out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mid_block(self.conv_in(x))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class DownBlock(nn.Module):
    def __init__(
        self, channels: int, width: int, count: int, groups: int, layers: Layers, *, last: bool
    ) -> None:
        super().__init__()
        self.resnets = _resnets(channels, width, count, groups, layers)
        self.downsamplers = nn.ModuleList([] if last else [Downsample(width, layers)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in (*self.resnets, *self.downsamplers):
            x = layer(x)
        return x


class UpBlock(nn.Module):
    def __init__(
        self, channels: int, width: int, count: int, groups: int, layers: Layers, *, last: bool
    ) -> None:
        super().__init__()
        self.resnets = _resnets(channels, width, count, groups, layers)
        self.upsamplers = nn.ModuleList([] if last else [Upsample(width, layers)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in (*self.resnets, *self.upsamplers):
            x = layer(x)
        return x


class MidBlock(nn.Module):
    def __init__(self, width: int, groups: int, layers: Layers) -> None:
        super().__init__()
        self.resnets = _resnets(width, width, 2, groups, layers)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.resnets:
            x = layer(x)
        return x


def _resnets(channels: int, width: int, count: int, groups: int, layers: Layers) -> nn.ModuleList:
    return nn.ModuleList(
        ResnetBlock(channels if i == 0 else width, width, groups, layers) for i in range(count)
    )


class ResnetBlock(nn.Module):
    def __init__(self, channels: int, width: int, groups: int, layers: Layers) -> None:
        super().__init__()
        self.norm1 = layers.GroupNorm(groups, channels, eps=EPS)
        self.conv1 = layers.Conv2d(channels, width, 3, padding=1)
        self.norm2 = layers.GroupNorm(groups, width, eps=EPS)
        self.conv2 = layers.Conv2d(width, width, 3, padding=1)
        self.conv_shortcut = (
            layers.Conv2d(channels, width, 1) if channels != width else nn.Identity()
        )

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return self.conv_shortcut(x) + h


class Downsample(nn.Module):
    """Halves the sides. The one row and column of padding are below and to the right."""

    def __init__(self, width: int, layers: Layers) -> None:
        super().__init__()
        self.conv = layers.Conv2d(width, width, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Doubles the sides."""

    def __init__(self, width: int, layers: Layers) -> None:
        super().__init__()
        self.conv = layers.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
