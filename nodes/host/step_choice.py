"""Which operations steps run with under ComfyUI, and the files that remember it."""

import os
from functools import cache
from pathlib import Path
from typing import Any

import folder_paths
from comfy.cli_args import args
from torch import Tensor

from ...glm_core.ar.choice import (
    COMPILING_SECONDS,
    Chooser,
    StepChoice,
    candidates,
    plainly,
)
from ...glm_core.choice import SECONDS
from ...glm_core.decoder.choice import BlockChoice
from ...glm_core.decoder.embeddings import Rope
from ...glm_core.decoder.kernels import triton_operations
from ...glm_core.decoder.operations import PLAIN, Operations
from .progress import check_interrupt
from .step_graphs import is_resident, is_trusted

PLAIN_STEP = "GLM_IMAGE_PLAIN_STEP"
"""The environment variable that pins the plain steps, set to 1."""
COMPILED_STEP = "GLM_IMAGE_COMPILED_STEP"
"""The environment variable that adds compiled candidates to those of the AR model's, set to 1."""


def chooser(patcher: Any) -> Chooser:
    """For a run of the AR model that begins now; the patcher must be loaded.

    Steps are timed where all weights are on the device. Where some are fetched as a step runs, a
    choice that was made before still holds, so that a seed gives the same tokens.
    """
    if is_pinned() or not is_trusted(patcher.load_device):
        return plainly
    choice = _step_choice()
    return choice.choose if is_resident(patcher) else choice.recall


def block_operations(img: Tensor, txt: Tensor, rope: Rope) -> Operations:
    """For the decoder's blocks, see `Decoder`. They read no weights, so it does not matter where
    those lie."""
    if is_pinned() or not is_trusted(img.device):
        return PLAIN
    return _block_choice().choose(img, txt, rope, check_interrupt)


def is_pinned() -> bool:
    """Whether the user wants the plain steps."""
    return args.deterministic or os.environ.get(PLAIN_STEP) == "1"


@cache
def _step_choice() -> StepChoice:
    compiled = os.environ.get(COMPILED_STEP) == "1"
    found = candidates(_may_use_triton(), compiled)
    return StepChoice(_file("ar_steps.json"), found, COMPILING_SECONDS if compiled else SECONDS)


@cache
def _block_choice() -> BlockChoice:
    found = triton_operations() if _may_use_triton() else {}
    return BlockChoice(_file("decoder_blocks.json"), found)


def _may_use_triton() -> bool:
    return not getattr(args, "disable_triton_backend", False)  # of hosts after 0.3.75


def _file(name: str) -> Path:
    return Path(folder_paths.get_system_user_directory("glm_image")) / name
