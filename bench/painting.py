"""The glyph encoder, the decoder's step and its references, and the VAE."""

import math
from collections.abc import Callable, Iterator
from copy import deepcopy

import torch
from diffusers.models.transformers.transformer_glm_image import GlmImageKVCache
from torch import Tensor

from glm_core.data.grids import PIXELS_PER_LATENT
from glm_core.decoder.model import Decoder, KeysValues

from .measure import Bench, Row
from .networks import decoder_pair, glyph_pair, vae_pair
from .presets import Preset

TEXT = 24  # ids of the rendered text
STEPS = 50  # of a whole picture, in a row's name
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.05}


def measure(preset: Preset, bench: Bench) -> Iterator[Row]:
    yield glyph_row(preset, bench)
    ours, reference = decoder_pair(preset.decoder, bench.device, preset.dtype)
    for size in preset.sizes:
        for batch in preset.batches:
            yield from DecoderBench(bench, ours, reference, size, batch, preset.dtype).rows()
    step = DecoderBench(bench, ours, reference, preset.sizes[0], 1, preset.dtype)
    if bench.on_cpu:
        yield step.bf16_row()
    for count in preset.references:
        yield from step.reference_rows(count)
    del ours, reference, step
    yield from vae_rows(preset, bench)


def glyph_row(preset: Preset, bench: Bench) -> Row:
    ours, reference = glyph_pair(preset.glyph, bench.device)
    ids = torch.randint(3, 259, (1, TEXT), device=bench.device)
    _require_equal("glyph encoders", ours(ids), reference(ids)[0], torch.float32)
    return bench.row("glyph encoder", lambda: ours(ids), lambda: reference(ids), rounds=20)


class DecoderBench:
    """One conditional prediction of the decoder; a step with guidance takes two."""

    def __init__(
        self,
        bench: Bench,
        ours: Decoder,
        reference: torch.nn.Module,
        size: tuple[int, int],
        batch: int,
        dtype: torch.dtype,
    ) -> None:
        self.bench, self.ours, self.reference = bench, ours, reference
        self.size, self.batch, self.dtype = size, batch, dtype
        config = ours.config
        self.x, self.tokens = self.picture(batch)
        self.glyphs = torch.randn(
            batch, TEXT, config.text_embed_dim, device=bench.device, dtype=dtype
        )
        self.timestep = torch.full((batch,), 500.0, device=bench.device)

    def picture(self, batch: int) -> tuple[Tensor, Tensor]:
        """Random latents [B, C, H / 8, W / 8] and semantic tokens int64 of the same pictures."""
        config, patch = self.ours.config, self.ours.config.patch_size
        height, width = (side // PIXELS_PER_LATENT for side in self.size)
        device = self.bench.device
        latent = torch.randn(batch, config.in_channels, height, width, device=device)
        codes = config.prior_vq_quantizer_codebook_size
        tokens = torch.randint(codes, (batch, height // patch, width // patch), device=device)
        return latent.to(self.dtype), tokens

    def our_prediction(self) -> Callable[[], Tensor]:
        invariants = self.ours.prepare(self.glyphs, self.tokens, self.size, self.dtype)
        return lambda: self.ours.predict(self.x, self.timestep, invariants)

    def bf16_row(self) -> Row:
        """The step in bf16, which the pack uses on a CPU with bf16 instructions."""
        half = deepcopy(self.ours).bfloat16()
        rounded = DecoderBench(
            self.bench, half, self.reference, self.size, self.batch, torch.bfloat16
        )
        return self.bench.row(
            "decoder step, in bf16 beside float32", rounded.our_prediction(), self.our_prediction()
        )

    def rows(self) -> Iterator[Row]:
        ours = self.our_prediction()

        def theirs() -> Tensor:
            return self.their_prediction(self.x, self.glyphs, self.tokens)

        _require_equal("decoders", ours(), theirs(), self.dtype)
        name = f"decoder step, {self.size[1]}x{self.size[0]}, batch {self.batch}"
        floor = self.flops() / self.bench.matrix_rate(self.dtype)
        yield self.bench.row(name, ours, theirs, floor_seconds=floor)
        yield self.bench.memory(name, ours, theirs)

        def prepare() -> None:
            self.ours.prepare(self.glyphs, self.tokens, self.size, self.dtype)

        yield self.bench.row(f"what a run of {STEPS} steps does once", prepare)

    def their_prediction(
        self,
        x: Tensor,
        glyphs: Tensor,
        tokens: Tensor,
        cache: GlmImageKVCache | None = None,
        timestep: Tensor | None = None,
        dropped: bool = False,
    ) -> Tensor:
        batch, ids, device = x.shape[0], tokens.flatten(1), x.device
        return self.reference(
            hidden_states=x,
            encoder_hidden_states=glyphs,
            prior_token_id=ids,
            prior_token_drop=torch.full_like(ids, dropped, dtype=torch.bool),
            timestep=self.timestep[:batch] if timestep is None else timestep,
            target_size=torch.tensor([self.size] * batch, dtype=self.dtype, device=device),
            crop_coords=torch.zeros(batch, 2, dtype=self.dtype, device=device),
            kv_caches=cache,
            return_dict=False,
        )[0]

    def flops(self) -> float:
        """Multiplications and additions of a prediction's linear layers and attention."""
        hidden, blocks = self.ours.config.hidden_size, self.ours.config.num_layers
        length = TEXT + math.prod(self.tokens.shape[1:])
        per_block = 2 * 12 * length * hidden**2 + 4 * length**2 * hidden
        return self.batch * blocks * per_block

    def reference_rows(self, count: int) -> Iterator[Row]:
        """The reference cache, and a step that attends to it."""
        pictures = [self.picture(1) for _ in range(count)]
        invariants = self.ours.prepare(self.glyphs, self.tokens, self.size, self.dtype)

        def keys_values() -> list[list[KeysValues]]:
            runs = [list(self.ours.reference_keys_values(*p, self.size)) for p in pictures]
            return [
                [tuple(torch.cat(parts, dim=2) for parts in zip(*blocks, strict=True))]
                for blocks in zip(*runs, strict=True)
            ]

        def their_cache() -> GlmImageKVCache:
            cache = GlmImageKVCache(self.ours.config.num_layers)
            cache.set_mode("write")
            for latent, tokens in pictures:
                self.their_prediction(latent, self.glyphs[:1, :0], tokens, cache)
            cache.next_sample()
            cache.set_mode("read")
            return cache

        ours, theirs = keys_values(), their_cache()

        def step(references: list[list[KeysValues]]) -> Tensor:
            return self.ours.predict(self.x, self.timestep, invariants, references=references)

        name = f"{count} reference{'s' * (count > 1)}"
        yield self.bench.row(f"cache of {name}", keys_values, their_cache)
        yield self.bench.row(
            f"decoder step with {name}",
            lambda: step(ours),
            lambda: self.their_prediction(self.x, self.glyphs, self.tokens, theirs),
        )
        yield self.bench.row(
            f"the same, beside running the {name} again",
            lambda: step(ours),
            lambda: step(keys_values()),
        )


def vae_rows(preset: Preset, bench: Bench) -> Iterator[Row]:
    ours, reference = vae_pair(preset.vae, bench.device, preset.dtype)
    for height, width in preset.sizes:
        latent = torch.randn(
            1, preset.vae["latent_channels"],
            height // PIXELS_PER_LATENT, width // PIXELS_PER_LATENT,
            device=bench.device,
        ).to(preset.dtype)  # fmt: skip

        def decode(latent: Tensor = latent) -> Tensor:
            return ours.decode(latent)

        def their_decode(latent: Tensor = latent) -> Tensor:
            return reference.decode(latent, return_dict=False)[0]

        _require_equal("VAEs", decode(), their_decode(), preset.dtype)
        yield bench.row(f"VAE decode, {width}x{height}", decode, their_decode, rounds=3)


def _require_equal(what: str, ours: Tensor, theirs: Tensor, dtype: torch.dtype) -> None:
    """Checks that both results agree, so that both sides are timed on the same work.

    Raises:
        RuntimeError: the relative error is above TOLERANCE.
    """
    error = ((ours.float() - theirs.float()).norm() / theirs.float().norm()).item()
    if not error < TOLERANCE[dtype]:
        raise RuntimeError(f"The {what} differ by {error:.2e} of their values.")
