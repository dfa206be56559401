"""The diffusion decoder's stage: from codes, glyph encoder states and references to latents.

It is trained by flow matching on windows of scenes, 128 pixels and more a side, and at the end also
on whole images. Sigma is shifted by the size of the whole image, as the scheduler does; the network
gets the unshifted timestep.
"""

from dataclasses import dataclass, replace
from itertools import chain

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, GlmImageTransformer2DModel
from diffusers.models.transformers.transformer_glm_image import GlmImageKVCache
from einops import rearrange
from torch import Tensor, nn
from transformers import T5EncoderModel

from glm_core.data.grids import upsample_tokens
from glm_core.decoder.schedule import ScheduleConfig
from glm_core.glyph.texts import glyph_ids

from .codes import CODEBOOK, LONGEST, SLOTS, cells, slots_of, vectors
from .edits import draw_edit
from .glyphs import CHARACTERS, WIDTH, byte_slots, draw_kind
from .hints import CHARACTER_BLOCK, Hints, init_neighbour_heads, init_text_lookup
from .render import render
from .scene import Item, Scene, Text, draw_content, draw_scene, draw_size
from .stage import Run, Stage
from .vae import busy_window

HEADS, HEAD_DIM, LAYERS = 2, 128, 5
MARGIN = 16  # pixels around a window that the VAE sees and the decoder does not
# Share of almost pure noise in the first batch, falling to 0 in the last. In such noise only the
# codes and glyphs say what to draw.
NOISY = 0.7
# A small star at 512x512 is the hardest shape: it has two by two cells, and half of their codes are
# the same as a diamond's. These are the shares of scenes with such a star, and of images that size.
SMALL_STARS, SMALLEST = 0.5, 0.3
SCHEDULE = ScheduleConfig(1000, base_shift=0.25, max_shift=0.75, base_image_seq_len=256)


@dataclass(frozen=True)
class Batch:
    """Windows of one size. The first texts of all scenes are equally long, and so are the second.

    pixels: float [B, 3, H, W] with a margin; inner: the window (top, left, height, width) in them.
    codes: int64 [B, H / 32, W / 32]; characters: likewise, indices of CHARACTERS, -1 for none.
    texts: one int64 [B, L] per text; size: (height, width) of the whole images.
    noisy: share of windows that are set to almost pure noise.
    reference: the same windows before the edit.
    """

    pixels: Tensor
    inner: tuple[int, int, int, int]
    codes: Tensor
    characters: Tensor
    texts: list[Tensor]
    size: tuple[int, int]
    noisy: float = 0.0
    reference: "Batch | None" = None


class DecoderStage(Stage):
    """Mean squared error of the velocity, which is noise - latent."""

    name = "decoder"
    component = "transformer"
    keys = (("", "decoder."),)
    steps = 12000
    batch = 40
    learning_rate = 2e-3
    # Muon on the modulations would take a third of a step's time.
    by_adamw = (
        "image_projector", "proj_out", "norm1.linear", "norm_out", "time_condition", "hints.",
    )  # fmt: skip
    ema = 0.999

    def __init__(self, run: Run) -> None:
        folder = run.component("vae", "vae")
        super().__init__(run)
        self.vae = AutoencoderKL.from_pretrained(folder).to(run.device)
        self.vae.requires_grad_(False)
        shape = (1, 16, 1, 1)
        self.mean = torch.tensor(self.vae.config.latents_mean, device=run.device).view(shape)
        self.std = torch.tensor(self.vae.config.latents_std, device=run.device).view(shape)
        self._init_text_lookup()

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
            # Codes must outweigh the noise and the differences to their neighbours.
            network.image_projector.proj.weight.mul_(0.1)
            network.prior_projector.net[-1].weight.mul_(12)
            for block in network.transformer_blocks:  # gates start closed
                block.norm1.linear.weight.mul_(0.1)
                block.norm1.linear.bias.zero_()
        init_neighbour_heads(network)
        trained = self.run.component("text_encoder", "glyphs")
        encoder = T5EncoderModel.from_pretrained(trained, dtype=torch.float32)
        encoder.eval().requires_grad_(False)
        return nn.ModuleDict({"decoder": network, "glyphs": encoder, "hints": Hints(network)})

    def draw(self, rng: np.random.Generator, progress: float) -> Batch:
        """Windows, mostly of 128 pixels at first, larger later; whole images in the last fifth."""
        height, width = draw_size(rng, SMALLEST)
        side = (128, 256, 512)[
            rng.choice(3, p=(0.75, 0.25, 0) if progress < 0.5 else (0.45, 0.35, 0.2))
        ]
        window = (side, side)
        if progress > 0.8 and rng.random() < 0.3:
            window = (height, width)
        if rng.random() < 0.12:
            batch = self._edited(rng, window, height, width)
        else:
            batch = self._drawn(rng, window, height, width)
        return replace(batch, noisy=NOISY * (1 - progress))

    def _drawn(
        self, rng: np.random.Generator, window: tuple[int, int], height: int, width: int
    ) -> Batch:
        kinds = [draw_kind(rng) for _ in range(rng.choice(3, p=(0.15, 0.65, 0.2)))]
        if len(kinds) == 2 and kinds[0][0] == kinds[1][0]:
            kinds = kinds[:1]
        scenes = [self._scene(rng, height, width, kinds) for _ in range(self._count(window))]
        return _batch(scenes, [_draw_window(rng, scene, window) for scene in scenes])

    def loss(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        latents = self._latents(batch)
        times = _times(batch, generator)
        mu = SCHEDULE.shift(*batch.size)
        sigma = (mu * times / (1 + (mu - 1) * times)).view(-1, 1, 1, 1)
        noise = torch.randn(latents.shape, generator=generator, device=latents.device)
        # The unconditional pass has no codes, texts or references.
        bare = bool(torch.rand((), generator=generator, device=latents.device) < 0.1)
        glyphs = self._glyphs([] if bare else batch.texts, len(latents))
        cache = None if batch.reference is None or bare else self._cache(batch.reference)
        velocity = self._network(
            (1 - sigma) * latents + sigma * noise, glyphs, batch, 1000 * times - 1, bare, cache
        )
        losses = {"velocity": F.mse_loss(velocity, noise - latents)}
        if not bare:
            codes, characters = (
                upsample_tokens(part.to(latents.device)) for part in (batch.codes, batch.characters)
            )
            losses |= self.module["hints"](codes, characters)
        return losses

    def write(self) -> None:
        self.module["decoder"].save_pretrained(self.run.snapshot / "transformer")
        FlowMatchEulerDiscreteScheduler(
            num_train_timesteps=1000, use_dynamic_shifting=True, max_image_seq_len=4096,
            time_shift_type="linear", base_shift=SCHEDULE.base_shift,
            max_shift=SCHEDULE.max_shift, base_image_seq_len=SCHEDULE.base_image_seq_len,
        ).save_pretrained(self.run.snapshot / "scheduler")  # fmt: skip

    @torch.no_grad()
    def _init_text_lookup(self) -> None:
        """Initialise the block that looks up characters from its inputs for texts at pure noise."""
        block = self.module["decoder"].transformer_blocks[CHARACTER_BLOCK]
        given = []
        hook = block.attn1.register_forward_pre_hook(
            lambda _, args, named: given.append(named), with_kwargs=True
        )
        rng = np.random.default_rng(4)
        image_slots, text_slots = [], []
        for script, length in LONGEST.items():
            scenes = [self._scene(rng, 512, 512, [(script, length)]) for _ in range(100)]
            batch = _batch(scenes, [_draw_window(rng, scene, (128, 128)) for scene in scenes])
            noise = torch.from_numpy(rng.standard_normal((100, 16, 16, 16), np.float32))
            glyphs = self._glyphs(batch.texts, 100)
            timestep = glyphs.new_full((100,), 999)
            self._network(noise.to(glyphs), glyphs, batch, timestep, False, None)
            image_slots.append(slots_of(upsample_tokens(batch.codes)).flatten())
            # Each text ends with one byte that belongs to no character.
            text_slots += [[*byte_slots(scene.texts[0].content, script), -1] for scene in scenes]
        hook.remove()
        image, text = (
            torch.cat([inputs[name].flatten(0, 1) for inputs in given])
            for name in ("hidden_states", "encoder_hidden_states")
        )
        init_text_lookup(
            block, image, torch.cat(image_slots), text, torch.tensor([*chain(*text_slots)])
        )

    def _count(self, window: tuple[int, int]) -> int:
        return max(1, self.batch_size * 128 * 128 // (window[0] * window[1]))

    def _scene(self, rng: np.random.Generator, height: int, width: int, kinds: list) -> Scene:
        scene = draw_scene(rng, height, width, texts=len(kinds))
        texts = tuple(
            Text(draw_content(rng, *kind), text.place)
            for kind, text in zip(kinds, scene.texts, strict=True)
        )
        return replace(scene, items=_with_small_star(rng, scene.items), texts=texts)

    def _edited(
        self, rng: np.random.Generator, window: tuple[int, int], height: int, width: int
    ) -> Batch:
        """Windows of edited scenes; the references are the same windows before the edit."""
        edits = [draw_edit(rng, height, width) for _ in range(max(1, self._count(window) // 2))]
        windows = [_draw_window(rng, edit.before, window) for edit in edits]
        reference = _batch([edit.before for edit in edits], windows)
        return replace(_batch([edit.after for edit in edits], windows), reference=reference)

    @torch.no_grad()
    def _latents(self, batch: Batch) -> Tensor:
        latents = self.vae.encode(batch.pixels.to(self.run.device)).latent_dist.mean
        top, left, height, width = (value // 8 for value in batch.inner)
        latents = latents[:, :, top : top + height, left : left + width]
        return (latents - self.mean) / self.std

    def _glyphs(self, texts: list[Tensor], count: int) -> Tensor:
        """States of all texts one after another, [B, L, D]; of an empty text if there are none."""
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
        self, latents: Tensor, glyphs: Tensor, batch: Batch, timestep: Tensor, bare: bool,
        cache: GlmImageKVCache | None,
    ) -> Tensor:  # fmt: skip
        codes = upsample_tokens(batch.codes.to(latents.device))
        count = len(latents)
        size = torch.tensor([batch.size], device=latents.device).expand(count, 2)
        drop = torch.full((count,), bare, device=latents.device)
        return self.module["decoder"](
            hidden_states=latents, encoder_hidden_states=glyphs,
            prior_token_id=rearrange(codes, "b h w -> b (h w)"), prior_token_drop=drop,
            timestep=timestep, target_size=size.float(), crop_coords=torch.zeros_like(size).float(),
            kv_caches=cache,
        ).sample  # fmt: skip


def _with_small_star(rng: np.random.Generator, items: tuple[Item, ...]) -> tuple[Item, ...]:
    """The items; as often as SMALL_STARS says, one becomes a small star."""
    if not items or rng.random() >= SMALL_STARS:
        return items
    index = rng.integers(len(items))
    star = replace(items[index], shape="star", size="small")
    return (*items[:index], star, *items[index + 1 :])


def _draw_window(
    rng: np.random.Generator, scene: Scene, window: tuple[int, int]
) -> tuple[int, int, int, int]:
    """A window (top, left, height, width) of this size in the scene, or all of the scene."""
    if window == (scene.height, scene.width):
        return 0, 0, *window
    return busy_window(rng, scene, window[0], 32)


def _batch(scenes: list[Scene], windows: list[tuple[int, int, int, int]]) -> Batch:
    """A batch of the windows with a margin on every side; beyond the image its edge is repeated."""
    pixels, codes, characters = [], [], []
    for scene, (top, left, height, width) in zip(scenes, windows, strict=True):
        image = np.pad(
            _visible_pixels(scene, top, left, height, width),
            _padding(scene, top, left, height, width),
            "edge",
        )
        pixels.append(torch.from_numpy(image).float() / 127.5 - 1)
        grid = cells(scene)[top // 32 : (top + height) // 32, left // 32 : (left + width) // 32]
        codes.append(torch.from_numpy(grid))
        characters.append(characters_of(scene, codes[-1]))
    ids = [glyph_ids([text.content for text in scene.texts]) for scene in scenes]
    texts = [torch.tensor(same) for same in zip(*ids, strict=True)]
    _, _, height, width = windows[0]
    return Batch(
        rearrange(torch.stack(pixels), "b h w c -> b c h w"), (MARGIN, MARGIN, height, width),
        torch.stack(codes), torch.stack(characters), texts, (scenes[0].height, scenes[0].width),
    )  # fmt: skip


def characters_of(scene: Scene, codes: Tensor) -> Tensor:
    """Indices of CHARACTERS for codes [H, W] of a scene; its texts must differ in script."""
    contents = {text.script: text.content for text in scene.texts}
    characters = torch.full_like(codes, -1)
    slots = slots_of(codes)
    for slot in slots[slots >= 0].unique().tolist():
        script, index = SLOTS[slot]
        characters[slots == slot] = CHARACTERS.index(contents[script][index])
    return characters


def _times(batch: Batch, generator: torch.Generator) -> Tensor:
    """float [B], 1 at pure noise, before the shift: uniform, or above 0.9 for the noisy share."""
    uniform, chance = torch.rand(2, len(batch.codes), generator=generator, device=generator.device)
    return torch.where(chance < batch.noisy, 1 - uniform / 10, uniform)


def _visible_pixels(scene: Scene, top: int, left: int, height: int, width: int) -> np.ndarray:
    """The pixels of a window and its margin that lie in the image."""
    first, start = max(0, top - MARGIN), max(0, left - MARGIN)
    last, end = min(scene.height, top + height + MARGIN), min(scene.width, left + width + MARGIN)
    return render(scene, (first, start, last - first, end - start))


def _padding(scene: Scene, top: int, left: int, height: int, width: int) -> tuple:
    """The padding of those pixels on each axis, for the part of the margin outside the image."""
    return (
        (max(0, MARGIN - top), max(0, top + height + MARGIN - scene.height)),
        (max(0, MARGIN - left), max(0, left + width + MARGIN - scene.width)),
        (0, 0),
    )
