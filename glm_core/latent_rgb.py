"""The colours of latents: a linear map from their channels to RGB, for pictures while sampling.

The map is fitted by least squares to what the VAE makes of pictures of overlapping discs ("dead
leaves"; Lee, Mumford and Huang, 2001). Their flat parts, edges and sizes are spread as in
photographs, and their colours evenly.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from .vae import AutoencoderKL

PICTURES, SIDE, DISCS = 8, 128, 80
SMALLEST, LARGEST = 8, 64  # radii in pixels


@dataclass(frozen=True)
class LatentColours:
    """RGB of a cell, about -1 to 1, is `bias` plus its normalised channels times `factors`.

    Args:
        factors: [channels][3]
        bias: [3]
    """

    factors: list[list[float]]
    bias: list[float]


def fit_colours(
    vae: AutoencoderKL, device: torch.device, dtype: torch.dtype
) -> LatentColours | None:
    """Fits the colours of a VAE's latents, one picture of `SIDE` pixels at a time.

    Args:
        device, dtype: what the network takes.

    Returns:
        None if the network's numbers overflow.
    """
    latents, colours = [], []
    for picture in dead_leaves().split(1):
        modes = vae.encode(picture.to(device, dtype))
        pixels = vae.decode(modes).float().clamp(-1, 1)
        latents.append(modes.float().cpu())
        colours.append(F.avg_pool2d(pixels, vae.config.downscale).cpu())
    x, rgb = (rearrange(torch.cat(part), "b c h w -> (b h w) c") for part in (latents, colours))
    mean, std = (
        torch.tensor(values) for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    x = F.pad((x - mean) / std, (0, 1), value=1)
    if not (x.isfinite().all() and rgb.isfinite().all()):
        return None
    solution = torch.linalg.lstsq(x.double(), rgb.double()).solution
    *factors, bias = [[round(value, 4) for value in row] for row in solution.tolist()]
    return LatentColours(factors, bias)


def dead_leaves() -> Tensor:
    """Always the same pictures: float32 [PICTURES, 3, SIDE, SIDE], -1 to 1.

    Discs hide those before them. A radius r is as likely as r**-3, between its bounds.
    """
    generator = torch.Generator().manual_seed(0)
    shares = torch.rand(DISCS, PICTURES, generator=generator)
    radii = (SMALLEST**-2 + shares * (LARGEST**-2 - SMALLEST**-2)) ** -0.5
    centres = torch.rand(DISCS, PICTURES, 2, 1, 1, generator=generator) * SIDE
    colours = torch.rand(DISCS, PICTURES, 3, 1, 1, generator=generator) * 2 - 1
    rows, columns = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    pictures = colours[0].expand(-1, -1, SIDE, SIDE)
    for radius, centre, colour in zip(radii, centres, colours, strict=True):
        distance = (rows - centre[:, 0]) ** 2 + (columns - centre[:, 1]) ** 2
        inside = distance < radius[:, None, None] ** 2
        pictures = torch.where(inside[:, None], colour, pictures)
    return pictures
