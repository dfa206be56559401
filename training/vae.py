"""The VAE's stage: from crops of scenes to latents of an eighth of their sides, and back."""

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from einops import rearrange
from torch import Tensor, nn

from .render import render
from .scene import SIZES, Scene, draw_scene
from .stage import Stage

CROPS = (64, 64, 96, 128, 128)  # sides; a batch has as many pixels as `batch` crops of 128
CHANNELS = (8, 16, 32, 64)
KL_WEIGHT = 1e-5
DETAIL_WEIGHT = 2.0


def _details(images: Tensor) -> Tensor:
    """[B, 1, H, W]: weights, large within two pixels of a change, as strokes and outlines are."""
    highest = F.max_pool2d(images, 5, 1, 2)
    lowest = -F.max_pool2d(-images, 5, 1, 2)
    return DETAIL_WEIGHT * (highest - lowest).amax(1, keepdim=True)


class VAEStage(Stage):
    """L1, more of it at edges, and a little KL; the latents' mean and deviation are set last."""

    name = "vae"
    component = "vae"
    keys = (("", ""),)
    steps = 4000
    batch = 4
    learning_rate = 4e-3
    ema = 0.995

    def build(self) -> nn.Module:
        network = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=CHANNELS, layers_per_block=1, latent_channels=16,
            norm_num_groups=1, sample_size=1024, mid_block_add_attention=False,
            use_quant_conv=False, use_post_quant_conv=False, force_upcast=False,
            latents_mean=[0.0] * 16, latents_std=[1.0] * 16,
        )  # fmt: skip
        _init_with_colours(network)
        return network.to(memory_format=torch.channels_last)

    def draw(self, rng: np.random.Generator, progress: float) -> Tensor:
        side = int(rng.choice(CROPS))
        count = max(1, self.batch_size * 128 * 128 // side**2)
        return torch.stack([_pixels(_crop(rng, side)) for _ in range(count)])

    def loss(self, batch: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        batch = batch.to(self.run.device)
        posterior = self.module.encode(batch).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator, device=batch.device)
        image = self.module.decode(posterior.mean + posterior.std * noise).sample
        edges = [F.l1_loss(image.diff(dim=axis), batch.diff(dim=axis)) for axis in (-1, -2)]
        error = (image - batch).abs()
        return {
            "pixels": error.mean(),
            "details": (error * _details(batch)).mean(),
            "edges": sum(edges),
            "kl": KL_WEIGHT * posterior.kl().mean() / posterior.mean[0, 0].numel(),
        }

    def write(self) -> None:
        mean, std = self._measure(np.random.default_rng([self.run.seed, 1]))
        self.module.register_to_config(latents_mean=mean.tolist(), latents_std=std.tolist())
        self.module.save_pretrained(self.run.snapshot / "vae")

    def _measure(self, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """Mean and deviation of each latent channel over crops."""
        images = torch.stack([_pixels(_crop(rng, 256)) for _ in range(64)]).to(self.run.device)
        latents = torch.cat([self.module.encode(part).latent_dist.mean for part in images.split(8)])
        return latents.mean((0, 2, 3)).cpu(), latents.std((0, 2, 3)).cpu()


@torch.no_grad()
def _init_with_colours(network: AutoencoderKL) -> None:
    """Initialise the network so that it reproduces blurred colours through three latent channels.

    Of every eight channels of the residual stream, three start as red, green and blue and three as
    their negatives. All have offsets larger than a picture's values, so that the group norms divide
    by about the same number for every picture and flat colours survive them.
    """
    for name, module in network.named_modules():
        if name.endswith("conv2"):
            module.weight.mul_(0.1)
        elif name.endswith(("conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv")):
            _copy_channels(module)
    for part in (network.encoder, network.decoder):
        _enter_stream(part.conv_in)
        _leave_stream(part.conv_out, gain=2.0)
    network.encoder.conv_out.bias[16:] = -6  # log variance: little noise at first
    network.encoder.conv_out.weight[16:].mul_(0.1)


def _enter_stream(conv: nn.Conv2d) -> None:
    conv.weight.mul_(0.3)
    for i in range(conv.out_channels):
        channel = i % 8
        conv.bias[i] = 1.5 if channel < 6 else -4.5
        if channel < 6:
            conv.weight[i, channel % 3, 1, 1] += 1 - 2 * (channel // 3)


def _leave_stream(conv: nn.Conv2d, gain: float) -> None:
    conv.weight[:3].mul_(0.3)
    copies = conv.in_channels // 8
    for i in range(conv.in_channels):
        if i % 8 < 6:
            conv.weight[i % 8 % 3, i, 1, 1] += gain / copies * (1 - 2 * (i % 8 // 3))


def _copy_channels(conv: nn.Conv2d) -> None:
    """Let output channel i be input channel i; if there are more outputs, inputs repeat."""
    conv.weight.mul_(0.1)
    centre = conv.kernel_size[0] // 2
    for i in range(conv.out_channels):
        conv.weight[i, i % conv.in_channels, centre, centre] += 1


def busy_window(rng: np.random.Generator, scene: Scene, side: int, step: int = 1) -> tuple:
    """A square window (top, left, side, side), mostly on a shape or text of the scene."""
    height, width = scene.cell
    targets = [(r * height, c * width) for item in scene.items for r, c in item.centres]
    for text in scene.texts:
        row, column = scene.text_origin(text)
        targets.append((32 * row + 32, 32 * column + rng.uniform(0, 64 * len(text.content))))
        targets.append(targets[-1])
    if targets and rng.random() < 0.95:
        y, x = targets[rng.integers(len(targets))]
        y, x = y - side / 2, x - side / 2  # the target is in the middle
        y, x = y + rng.uniform(-0.4, 0.4) * side, x + rng.uniform(-0.4, 0.4) * side
    else:
        y, x = rng.uniform(0, scene.height), rng.uniform(0, scene.width)
    top = int(np.clip(y // step * step, 0, scene.height - side))
    left = int(np.clip(x // step * step, 0, scene.width - side))
    return top, left, side, side


def _crop(rng: np.random.Generator, side: int) -> np.ndarray:
    height, width = SIZES[rng.integers(len(SIZES))]
    scene = draw_scene(rng, height, width)
    return render(scene, busy_window(rng, scene, side, 8 if rng.random() < 0.5 else 1))


def _pixels(image: np.ndarray) -> Tensor:
    """uint8 [H, W, 3] -> float [3, H, W] between -1 and 1."""
    return rearrange(torch.from_numpy(image).float() / 127.5 - 1, "h w c -> c h w")
