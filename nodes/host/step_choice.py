"""Which operations the AR model's steps run with under ComfyUI, and the file that remembers it."""

import os
from functools import cache
from pathlib import Path
from typing import Any

import folder_paths
from comfy.cli_args import args

from ...glm_core.ar.choice import Chooser, StepChoice, candidates, plainly
from .step_graphs import is_resident, is_trusted

PLAIN_STEP = "GLM_IMAGE_PLAIN_STEP"
"""The environment variable that pins the plain step, set to 1."""


def chooser(patcher: Any) -> Chooser:
    """For a run that begins now; the patcher must be loaded.

    Steps are timed where all weights are on the device. Where some are fetched as a step runs, a
    choice that was made before still holds, so that a seed gives the same tokens.
    """
    if is_pinned() or not is_trusted(patcher.load_device):
        return plainly
    choice = _choice()
    return choice.choose if is_resident(patcher) else choice.recall


def is_pinned() -> bool:
    """Whether the user wants the plain step."""
    return args.deterministic or os.environ.get(PLAIN_STEP) == "1"


@cache
def _choice() -> StepChoice:
    folder = Path(folder_paths.get_system_user_directory("glm_image"))
    triton = not getattr(args, "disable_triton_backend", False)  # of hosts after 0.3.75
    return StepChoice(folder / "ar_steps.json", candidates(triton))
