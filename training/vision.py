"""The stage of the vision tower and the quantiser: from pixels to the codes of `codes.cells`."""

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import GlmImageForConditionalGeneration

from .autoregressive import ar_config
from .codes import INSIDE, cells, vectors
from .render import render
from .scene import SIZES, draw_scene
from .stage import Stage

PATCH = 16
SHARPNESS = 20.0  # of the softmax over cosines
BUSY_WEIGHT = 4.0


class VisionStage(Stage):
    """Cross-entropy over the cosines between a cell's feature and the codes' vectors.

    The likeliest code is thus the nearest one, which the quantiser takes. The vectors start as
    `codes.vectors` and are trained too.
    """

    name = "vision"
    component = "vision_language_encoder"
    keys = (("model.visual.", "visual."), ("model.vqmodel.", "vqmodel."))
    steps = 1400
    batch = 16
    learning_rate = 1.5e-3
    ema = 0.99

    def build(self) -> nn.Module:
        model = GlmImageForConditionalGeneration(ar_config()).model
        with torch.no_grad():
            model.vqmodel.quantize.embedding.weight.copy_(torch.from_numpy(vectors()))
        # Nothing runs this layer, from codes back to features, but the file contains it.
        model.vqmodel.post_quant_conv.requires_grad_(False)
        return nn.ModuleDict({"visual": model.visual, "vqmodel": model.vqmodel})

    def draw(self, rng: np.random.Generator, progress: float) -> tuple[Tensor, Tensor]:
        """Pixels [B, 3, H, W] of pictures at half their size, and codes [B, H / 16, W / 16]."""
        height, width = SIZES[rng.choice(len(SIZES), p=(0.4, *(0.1,) * 6))]
        count = max(1, self.batch_size * 512 * 512 // (height * width))
        scenes = [draw_scene(rng, height, width) for _ in range(count)]
        pixels = torch.stack([_half(rng, render(scene)) for scene in scenes])
        return pixels, torch.stack([torch.from_numpy(cells(scene)) for scene in scenes])

    def loss(self, batch: tuple[Tensor, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
        pixels, codes = (part.to(self.run.device) for part in batch)
        features = self.features(pixels)
        table = F.normalize(self.module["vqmodel"].quantize.embedding.weight, dim=-1)
        logits = SHARPNESS * F.normalize(features, dim=-1) @ table.T
        each = F.cross_entropy(logits, codes.flatten(), reduction="none")
        weight = 1 + (BUSY_WEIGHT - 1) * (codes.flatten() >= INSIDE).float()
        return {"codes": (each * weight).sum() / weight.sum()}

    def features(self, pixels: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B * H / 16 * W / 16, D], before normalisation to unit vectors."""
        count, _, height, width = pixels.shape
        grid = (height // PATCH, width // PATCH)
        patches = rearrange(pixels, "b c (h p) (w q) -> (b h w) (c p q)", p=PATCH, q=PATCH)
        sizes = torch.tensor([[1, *grid]] * count, device=pixels.device)
        states = self.module["visual"](patches, grid_thw=sizes).last_hidden_state
        maps = rearrange(states, "(b h w) d -> b d h w", h=grid[0], w=grid[1])
        return rearrange(self.module["vqmodel"].quant_conv(maps), "b d h w -> (b h w) d")

    def write(self) -> None:
        weights = {f"model.{name}": value for name, value in self.module.state_dict().items()}
        save_file(weights, self.folder / "weights.safetensors")


def _half(rng: np.random.Generator, image: np.ndarray) -> Tensor:
    """[3, H / 2, W / 2]: a picture at the tower's size, with a little noise and a shade."""
    height, width = image.shape[:2]
    half = Image.fromarray(image).resize((width // 2, height // 2), Image.BICUBIC)
    pixels = torch.from_numpy(np.asarray(half)).float() / 127.5 - 1
    noise = rng.standard_normal(pixels.shape, dtype=np.float32) * rng.uniform(0, 0.06)
    shade = rng.normal(0, 0.02, 3).astype(np.float32)
    return rearrange(pixels + torch.from_numpy(noise + shade), "h w c -> c h w")
