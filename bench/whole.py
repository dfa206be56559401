"""A whole picture, from the prompt's ids to pixels, with guidance."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from glm_core.ar.sampler import sample_tokens
from glm_core.data.grids import preview_grid, token_grid, upsample_tokens
from glm_core.decoder.model import DROPPED
from glm_core.decoder.schedule import ScheduleConfig

from .ar import ARBench
from .measure import Bench, Row
from .networks import ar_pair, decoder_pair, vae_pair
from .painting import DecoderBench
from .presets import Preset, scheduler

CFG = 1.5


def measure(preset: Preset, bench: Bench) -> Iterator[Row]:
    if not preset.steps:
        return
    whole = Whole(
        ARBench(bench, *ar_pair(preset.ar, bench.device, preset.ar_dtype), preset.ar_dtype),
        DecoderBench(
            bench,
            *decoder_pair(preset.decoder, bench.device, preset.dtype),
            preset.sizes[0],
            1,
            preset.dtype,
        ),
        *vae_pair(preset.vae, bench.device, preset.dtype),
        preset,
    )
    height, width = preset.sizes[0]
    name = f"{width}x{height}, {preset.steps} steps, CFG {CFG}, end to end"
    yield bench.row(name, whole.ours, whole.theirs, rounds=1)
    yield bench.memory(name, whole.ours, whole.theirs)


@dataclass(frozen=True)
class Whole:
    """Both pipelines without what is around them: no tokenizer, no picture file."""

    ar: ARBench
    decoder: DecoderBench
    our_vae: torch.nn.Module
    their_vae: torch.nn.Module
    preset: Preset

    def ours(self) -> Tensor:
        size, decoder = self.preset.sizes[0], self.decoder
        tokens, _ = sample_tokens(self.ar.ours, self.ar.prompt, token_grid(*size), self.ar.run())
        ids = upsample_tokens(tokens)
        dropped = torch.full_like(ids, DROPPED)
        invariants = [
            decoder.ours.prepare(glyphs, prior, size, decoder.dtype)
            for glyphs, prior in ((decoder.glyphs, ids), (decoder.glyphs[:, :1], dropped))
        ]

        def predict(x: Tensor, timestep: Tensor, conditional: bool) -> Tensor:
            return decoder.ours.predict(x, timestep, invariants[not conditional])

        return self.our_vae.decode(self.denoised(predict))

    def theirs(self) -> Tensor:
        size, decoder = self.preset.sizes[0], self.decoder
        grid = token_grid(*size)
        cells = preview_grid(grid)[0] * preview_grid(grid)[1] + grid[0] * grid[1]
        written = self.ar.generate(grid, 1, cells)[:, -grid[0] * grid[1] :]
        ids = upsample_tokens(written.view(1, *grid))

        def predict(x: Tensor, timestep: Tensor, conditional: bool) -> Tensor:
            glyphs = decoder.glyphs if conditional else decoder.glyphs[:, :1]
            return decoder.their_prediction(
                x, glyphs, ids, timestep=timestep, dropped=not conditional
            )

        return self.their_vae.decode(self.denoised(predict), return_dict=False)[0]

    def denoised(self, predict: Callable[[Tensor, Tensor, bool], Tensor]) -> Tensor:
        """Euler with guidance over the checkpoint's schedule, from noise, in float32 between."""
        schedule = ScheduleConfig.from_dict(scheduler())
        shift = schedule.shift(*self.preset.sizes[0])
        sigmas = schedule.sigmas(self.preset.steps, shift)
        timesteps = schedule.timestep(sigmas, shift).to(self.decoder.x.device)
        x = self.decoder.x.float()
        for i in range(self.preset.steps):
            low, at = x.to(self.decoder.dtype), timesteps[i : i + 1]
            with_text, without = (predict(low, at, c).float() for c in (True, False))
            flow = without + CFG * (with_text - without)
            x = x + (sigmas[i + 1] - sigmas[i]).item() * flow
        return x.to(self.decoder.dtype)
