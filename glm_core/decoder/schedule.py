"""The noise schedule: resolution-dependent shift, sigmas, and the network's timestep."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..data.grids import PIXELS_PER_LATENT
from ..errors import InputError
from ..schema import exactly, number, read, whole

MIN_DENOISE = 1e-9  # below it, every step has the last noise level

CONFIG = {
    "time_shift_type": exactly("linear"),
    "use_dynamic_shifting": exactly(True),
    "num_train_timesteps": whole(1, 10**6),
    "base_shift": number(0, 1000),
    "max_shift": number(0.001, 1000),
    "base_image_seq_len": whole(1, 2**20),
}
"""What this file reads and supports of `scheduler/scheduler_config.json`."""
ADVICE = "take scheduler_config.json from a GLM-Image snapshot"


@dataclass(frozen=True)
class ScheduleConfig:
    """The fields of `scheduler/scheduler_config.json` that the schedule depends on."""

    num_train_timesteps: int
    base_shift: float
    max_shift: float
    base_image_seq_len: int

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "ScheduleConfig":
        """Read a checkpoint's config; GLMImageError names what is missing or does not fit."""
        values = read(config, CONFIG, "The scheduler config", ADVICE)
        return cls(*(values[name] for name in cls.__dataclass_fields__))

    def shift(self, height: int, width: int, patch_size: int = 2) -> float:
        """mu of an image: 0.75 * sqrt(seq / 256) + 0.25 with the checkpoint's numbers.

        Args:
            height, width: pixels of the whole image, even if only a part of it is denoised.
            patch_size: latent cells per token side, from the decoder's config.

        Source: `calculate_shift` in diffusers' pipeline_glm_image.py.
        """
        side = PIXELS_PER_LATENT * patch_size
        tokens = (height // side) * (width // side)
        return self.max_shift * math.sqrt(tokens / self.base_image_seq_len) + self.base_shift

    def sigmas(self, steps: int, shift: float, denoise: float = 1.0) -> Tensor:
        """The noise levels of an Euler run, largest first, ending in 0.

        t_i = int(linspace(N, 1, steps + 1)[i]), s = t / N, sigma = mu s / (1 + (mu - 1) s).
        With `denoise` below 1 the run is the tail of one with steps / denoise steps. Only that part
        of the linspace is computed, in numpy's own arithmetic.

        Returns:
            float32 [steps + 1], or an empty tensor if `denoise` is 0 or less.

        Raises:
            GLMImageError: `steps` is below 1, or `denoise` is not a number.
        """
        if steps < 1:
            raise InputError(f"steps is {steps}; use at least 1.")
        if math.isnan(denoise):
            raise InputError("denoise is nan; use a value between 0 and 1.")
        if denoise <= 0:
            return torch.empty(0)
        total = int(steps / min(max(denoise, MIN_DENOISE), 1))
        i = np.arange(total - steps, total, dtype=np.float64)
        t = i * ((1.0 - self.num_train_timesteps) / total) + self.num_train_timesteps
        s = t.astype(np.int64).astype(np.float32) / self.num_train_timesteps
        shifted = shift / (shift + (1 / s - 1))
        return torch.cat([torch.from_numpy(shifted.astype(np.float32)), torch.zeros(1)])

    def timestep(self, sigma: Tensor, shift: float) -> Tensor:
        """The *unshifted* timestep t - 1 that the network was trained on, for any noise level.

        s = sigma / (mu - (mu - 1) sigma), t = N s. A float32 sigma gives t to about 2e-4. So the
        result is rounded to 1/256, which restores the integers of the checkpoint's own schedule.

        Args:
            sigma: float [B], 0 to 1.

        Returns:
            float32 [B], -1 at sigma 0.
        """
        sigma = sigma.float()
        t = self.num_train_timesteps * sigma / (shift - (shift - 1) * sigma)
        return torch.round(t * 256) / 256 - 1
