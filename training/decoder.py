"""The diffusion decoder, with the glyph encoder: codes, texts and references to latents.

Trained by flow matching on windows of scenes, of 128 pixels and more, whole images last. Sigma is
shifted by the size of the whole image as the scheduler does, and the network is given the unshifted
timestep.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, GlmImageTransformer2DModel
from diffusers.models.transformers.transformer_glm_image import GlmImageKVCache
from einops import rearrange, repeat
from torch import Tensor, nn
from transformers import T5EncoderModel

from glm_core.glyph import glyph_ids

from .codes import CODEBOOK, cells, vectors
from .edits import draw_edit
from .glyphs import WIDTH, draw_kind, make_glyph_encoder, write_glyph_encoder
from .render import render
from .scene import SIZES, Scene, Text, draw_content, draw_scene
from .stage import Run, Stage
from .vae import busy_window

HEADS, HEAD_DIM, LAYERS = 2, 128, 5
MARGIN = 16  # pixels around a window that the VAE sees and the decoder does not
SHIFT = {"base_shift": 0.25, "max_shift": 0.75, "base_image_seq_len": 256}


@dataclass(frozen=True)
class Batch:
    """Windows of one size, whose texts have one length.

    pixels: float [B, 3, H, W] with a margin; inner: the windows (top, left, height, width) in it.
    codes: int64 [B, H / 32, W / 32]; texts: one int64 [B, L] per text; sizes: of the whole images.
    """

    pixels: Tensor
    inner: tuple[int, int, int, int]
    codes: Tensor
    texts: list[Tensor]
    size: tuple[int, int]
    reference: "Batch | None" = None


class DecoderStage(Stage):
    """Mean squared error of the velocity, noise - latent."""

    name = "decoder"
    steps = 20000
    batch = 40
    learning_rate = 2e-3
    # Orthogonal steps of the modulations and of the glyph encoder would take a third of the time.
    outer = ("image_projector", "proj_out", "norm1.linear", "time_condition", "glyphs.")
    ema = 0.999

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        self.vae = AutoencoderKL.from_pretrained(run.snapshot / "vae").to(run.device)
        self.vae.requires_grad_(False)
        shape = (1, 16, 1, 1)
        self.mean = torch.tensor(self.vae.config.latents_mean, device=run.device).view(shape)
        self.std = torch.tensor(self.vae.config.latents_std, device=run.device).view(shape)

    def build(self) -> nn.Module:
        network = GlmImageTransformer2DModel(
            patch_size=2, in_channels=16, out_channels=16, num_layers=LAYERS,
            attention_head_dim=HEAD_DIM, num_attention_heads=HEADS, text_embed_dim=WIDTH,
            time_embed_dim=128, condition_dim=32, prior_vq_quantizer_codebook_size=CODEBOOK,
        )  # fmt: skip
        table = torch.from_numpy(vectors())
        mix = torch.randn(
            table.shape[1], HEADS * HEAD_DIM, generator=torch.Generator().manual_seed(4)
        )
        with torch.no_grad():
            network.prior_token_embedding.weight.copy_(table @ mix)
            network.proj_out.weight.mul_(0.1)
            for block in network.transformer_blocks:  # gates begin closed
                block.norm1.linear.weight.mul_(0.1)
                block.norm1.linear.bias.zero_()
        encoder = make_glyph_encoder()
        trained = self.run.snapshot / "text_encoder"
        if trained.is_dir():
            encoder = T5EncoderModel.from_pretrained(trained, dtype=torch.float32)
        return nn.ModuleDict({"decoder": network, "glyphs": encoder.train().requires_grad_(True)})

    def draw(self, rng: np.random.Generator, progress: float) -> Batch:
        side = (128, 256, 512)[
            rng.choice(3, p=(0.75, 0.25, 0) if progress < 0.5 else (0.45, 0.35, 0.2))
        ]
        height, width = SIZES[rng.integers(len(SIZES))]
        if rng.random() < 0.12:
            return self._edited(rng, min(side, 256), height, width)
        kinds = [draw_kind(rng) for _ in range(rng.choice(3, p=(0.15, 0.65, 0.2)))]
        if len(kinds) == 2 and kinds[0][0] == kinds[1][0]:
            kinds = kinds[:1]
        scenes = [self._scene(rng, height, width, kinds) for _ in range(self._count(side))]
        windows = [busy_window(rng, scene, side, 32) for scene in scenes]
        return _batch(scenes, windows)

    def loss(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        latents = self._latents(batch)
        count = len(latents)
        uniform = torch.rand(count, generator=generator, device=latents.device)
        height, width = batch.size
        mu = shift_of(height, width)
        sigma = (mu * uniform / (1 + (mu - 1) * uniform)).view(-1, 1, 1, 1)
        noise = torch.randn(latents.shape, generator=generator, device=latents.device)
        draw = torch.rand(2, generator=generator, device=latents.device)
        without = bool(draw[0] < 0.1)  # the unconditional pass has neither codes nor texts
        glyphs = self._glyphs([] if without else batch.texts, count)
        cache = None if batch.reference is None or without else self._cache(batch.reference)
        velocity = self._network(
            (1 - sigma) * latents + sigma * noise, glyphs, batch, 1000 * uniform - 1, without, cache
        )
        return {"velocity": F.mse_loss(velocity, noise - latents)}

    def write(self) -> None:
        self.module["decoder"].save_pretrained(self.run.snapshot / "transformer")
        write_glyph_encoder(self.run, self.module["glyphs"])
        FlowMatchEulerDiscreteScheduler(
            num_train_timesteps=1000, use_dynamic_shifting=True, max_image_seq_len=4096,
            time_shift_type="linear", **SHIFT,
        ).save_pretrained(self.run.snapshot / "scheduler")  # fmt: skip

    def _count(self, side: int) -> int:
        return max(1, self.size * 128 * 128 // side**2)

    def _scene(self, rng: np.random.Generator, height: int, width: int, kinds: list) -> Scene:
        scene = draw_scene(rng, height, width, texts=len(kinds))
        texts = tuple(
            Text(draw_content(rng, *kind), text.place)
            for kind, text in zip(kinds, scene.texts, strict=True)
        )
        return replace(scene, texts=texts)

    def _edited(self, rng: np.random.Generator, side: int, height: int, width: int) -> Batch:
        """Windows of edited scenes, with the same windows of the scenes before as references."""
        edits = [draw_edit(rng, height, width) for _ in range(max(1, self._count(side) // 2))]
        windows = [busy_window(rng, edit.before, side, 32) for edit in edits]
        reference = _batch([edit.before for edit in edits], windows)
        return replace(_batch([edit.after for edit in edits], windows), reference=reference)

    @torch.no_grad()
    def _latents(self, batch: Batch) -> Tensor:
        latents = self.vae.encode(batch.pixels.to(self.run.device)).latent_dist.mean
        top, left, height, width = (value // 8 for value in batch.inner)
        latents = latents[:, :, top : top + height, left : left + width]
        return (latents - self.mean) / self.std

    def _glyphs(self, texts: list[Tensor], count: int) -> Tensor:
        """States of all texts one after another, [B, L, D]; the empty text where there are none."""
        texts = texts or [torch.tensor(glyph_ids([])).expand(count, -1)]
        encode = self.module["glyphs"]
        ids = [text.to(self.run.device) for text in texts]
        return torch.cat([encode(input_ids=text).last_hidden_state for text in ids], 1)

    def _cache(self, reference: Batch) -> GlmImageKVCache:
        cache = GlmImageKVCache(LAYERS)
        cache.set_mode("write")
        latents = self._latents(reference)
        nothing = latents.new_zeros(len(latents), 0, WIDTH)
        self._network(latents, nothing, reference, latents.new_zeros(len(latents)), False, cache)
        cache.set_mode("read")
        return cache

    def _network(
        self, latents: Tensor, glyphs: Tensor, batch: Batch, timestep: Tensor, without: bool, cache
    ) -> Tensor:
        codes = repeat(batch.codes.to(latents.device), "b h w -> b (h p) (w q)", p=2, q=2)
        count = len(latents)
        size = torch.tensor([batch.size], device=latents.device).expand(count, 2)
        drop = torch.full((count,), without, device=latents.device)
        return self.module["decoder"](
            hidden_states=latents, encoder_hidden_states=glyphs,
            prior_token_id=rearrange(codes, "b h w -> b (h w)"), prior_token_drop=drop,
            timestep=timestep, target_size=size.float(), crop_coords=torch.zeros_like(size).float(),
            kv_caches=cache,
        ).sample  # fmt: skip


def shift_of(height: int, width: int) -> float:
    """mu of the checkpoint's schedule."""
    tokens = height * width / 256
    return SHIFT["max_shift"] * (tokens / SHIFT["base_image_seq_len"]) ** 0.5 + SHIFT["base_shift"]


def _batch(scenes: list[Scene], windows: list[tuple[int, int, int, int]]) -> Batch:
    """The windows with a margin on every side; beyond the image, its edge is repeated."""
    pixels, codes = [], []
    for scene, (top, left, height, width) in zip(scenes, windows, strict=True):
        image = np.pad(
            _clipped(scene, top, left, height, width),
            _beyond(scene, top, left, height, width),
            "edge",
        )
        pixels.append(torch.from_numpy(image).float() / 127.5 - 1)
        grid = cells(scene)[top // 32 : (top + height) // 32, left // 32 : (left + width) // 32]
        codes.append(torch.from_numpy(grid))
    ids = [glyph_ids([text.content for text in scene.texts]) for scene in scenes]
    texts = [torch.tensor(same) for same in zip(*ids, strict=True)]
    _, _, height, width = windows[0]
    return Batch(
        rearrange(torch.stack(pixels), "b h w c -> b c h w"), (MARGIN, MARGIN, height, width),
        torch.stack(codes), texts, (scenes[0].height, scenes[0].width),
    )  # fmt: skip


def _clipped(scene: Scene, top: int, left: int, height: int, width: int) -> np.ndarray:
    first, start = max(0, top - MARGIN), max(0, left - MARGIN)
    last, end = min(scene.height, top + height + MARGIN), min(scene.width, left + width + MARGIN)
    return render(scene, (first, start, last - first, end - start))


def _beyond(scene: Scene, top: int, left: int, height: int, width: int) -> tuple:
    return (
        (max(0, MARGIN - top), max(0, top + height + MARGIN - scene.height)),
        (max(0, MARGIN - left), max(0, left + width + MARGIN - scene.width)),
        (0, 0),
    )
