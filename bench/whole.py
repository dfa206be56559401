"""A whole picture with guidance, from the prompt's ids to pixels."""

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
    pipelines = Pipelines(
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
    yield bench.row(name, pipelines.ours, pipelines.theirs, rounds=1)
    yield bench.memory(name, pipelines.ours, pipelines.theirs)


@dataclass(frozen=True)
class Pipelines:
    """Our pipeline and the reference's, without tokenizer and picture file."""

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
        """The latent [B, C, H / 8, W / 8] after Euler steps with guidance on the hub's schedule.

        It is float32 between the steps.
        """
        schedule = ScheduleConfig.from_dict(scheduler())
        shift = schedule.shift(*self.preset.sizes[0])
        sigmas = schedule.sigmas(self.preset.steps, shift)
        timesteps = schedule.timestep(sigmas, shift).to(self.decoder.x.device)
        x = self.decoder.x.float()
        for i in range(self.preset.steps):
            latent, timestep = x.to(self.decoder.dtype), timesteps[i : i + 1]
            positive = predict(latent, timestep, True).float()
            negative = predict(latent, timestep, False).float()
            flow = negative + CFG * (positive - negative)
            x = x + (sigmas[i + 1] - sigmas[i]).item() * flow
        return x.to(self.decoder.dtype)
