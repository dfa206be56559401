"""Samples for the service's tests: of the tiny model, and short."""

from pathlib import Path

import torch

from glm_core.ar.requests import SampleRequest
from glm_core.ar.step import SamplingOptions
from glm_core.data.tokens import Forced

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "tiny"
OPTIONS = SamplingOptions()


def locked_rows(rows: int, codebook: int = 2048) -> Forced:
    """A preview of which the first rows are locked."""
    generator = torch.Generator().manual_seed(rows)
    ids = torch.randint(0, codebook, (1, 16, 16), generator=generator, dtype=torch.int32)
    mask = torch.zeros(16, 16, dtype=torch.bool)
    mask[:rows] = True
    return Forced(ids, mask)


def short(prompt: str = "a red circle", seed: int = 1, **more) -> SampleRequest:
    """A layout of which only two rows are written."""
    return SampleRequest(prompt, 256, 256, seed, OPTIONS, "layout", preview=locked_rows(14), **more)


def plain(prompt: str = "a red circle", seed: int = 1, side: int = 128, **more) -> SampleRequest:
    """An image of which two rows of the preview are written, and all tokens."""
    preview = None if "references" in more else locked_rows(14)
    return SampleRequest(prompt, side, side, seed, OPTIONS, preview=preview, **more)
