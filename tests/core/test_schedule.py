"""Sigmas and timesteps against diffusers' scheduler, called as in its GLM-Image pipeline."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from glm_image.glm_core.decoder.schedule import ScheduleConfig
from glm_image.glm_core.errors import GLMImageError
from reference import FlowMatchEulerDiscreteScheduler

CONFIG = json.loads(
    (Path(__file__).parents[1] / "configs" / "hub" / "scheduler_config.json").read_text()
)
SIZES = [(512, 512), (1024, 1024), (2048, 2048), (768, 1152)]


def reference_schedule(steps: int, shift: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Sigmas and timesteps, as in step 7 of `GlmImagePipeline.__call__`."""
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(CONFIG)
    timesteps = np.linspace(1000, 1.0, steps + 1)[:-1].astype(np.int64).astype(np.float32)
    scheduler.set_timesteps(sigmas=timesteps / 1000, timesteps=timesteps, mu=shift)
    return scheduler.sigmas, scheduler.timesteps


@pytest.mark.parametrize(
    ("size", "expected"), list(zip(SIZES, (1.75, 3.25, 6.25, 0.75 * 13.5**0.5 + 0.25), strict=True))
)
def test_shift(size: tuple[int, int], expected: float) -> None:
    assert ScheduleConfig.from_dict(CONFIG).shift(*size) == pytest.approx(expected)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("steps", [1, 7, 50])
def test_sigmas_and_timesteps_equal_the_reference(size: tuple[int, int], steps: int) -> None:
    schedule = ScheduleConfig.from_dict(CONFIG)
    shift = schedule.shift(*size)
    sigmas, timesteps = reference_schedule(steps, shift)
    ours = schedule.sigmas(steps, shift)
    torch.testing.assert_close(ours, sigmas, rtol=1e-6, atol=0)
    assert torch.equal(schedule.timestep(ours[:-1], shift), timesteps - 1)


def test_denoise_is_the_tail_of_a_longer_run() -> None:
    schedule = ScheduleConfig.from_dict(CONFIG)
    assert torch.equal(schedule.sigmas(10, 3.25, denoise=0.5), schedule.sigmas(20, 3.25)[10:])
    assert schedule.sigmas(10, 3.25, denoise=0.0).numel() == 0


def test_the_tail_equals_that_of_the_whole_linspace_bit_for_bit() -> None:
    schedule = ScheduleConfig.from_dict(CONFIG)
    for steps in (1, 3, 20, 50):
        for denoise in np.linspace(0.01, 1.0, 100):
            total = int(steps / denoise)
            t = np.linspace(1000, 1.0, total + 1)[:-1].astype(np.int64)[-steps:]
            shifted = 3.25 / (3.25 + (1 / (t.astype(np.float32) / 1000) - 1))
            expected = np.append(shifted, 0).astype(np.float32)
            assert np.array_equal(schedule.sigmas(steps, 3.25, denoise).numpy(), expected)


@pytest.mark.parametrize("denoise", [1e-9, 1e-30, 5e-324])
def test_a_tiny_denoise_has_the_last_noise_level_throughout(denoise: float) -> None:
    schedule = ScheduleConfig.from_dict(CONFIG)
    last = schedule.sigmas(1000, 3.25)[-2:]
    assert torch.equal(schedule.sigmas(4, 3.25, denoise), last[[0, 0, 0, 0, 1]])


def test_a_denoise_that_is_nan_is_refused() -> None:
    with pytest.raises(GLMImageError, match="denoise is nan; use a value between 0 and 1"):
        ScheduleConfig.from_dict(CONFIG).sigmas(10, 3.25, float("nan"))


def test_other_schedules_are_refused() -> None:
    with pytest.raises(GLMImageError, match="time_shift_type is 'exponential'"):
        ScheduleConfig.from_dict({**CONFIG, "time_shift_type": "exponential"})
