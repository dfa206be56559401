"""Choosing the operations of blocks by a trial of these operations alone, once for each shape.

They move memory and wait for nothing, so their times add up in a step, which takes far longer.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from .. import choice
from ..choice import Candidates, Choice, mean_milliseconds
from .embeddings import Rope
from .kernels import VERSION
from .operations import PLAIN, Operations

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}
"""The largest relative difference: numbers are rounded in the same places, some to the next one."""
ROWS = 256
"""About as many rows are compared, so that a trial needs no more memory than a step."""


class BlockChoice:
    """A choice for the blocks of each shape."""

    def __init__(
        self, path: Path | None, found: Candidates, seconds: float = choice.SECONDS
    ) -> None:
        """See `Choice`."""
        self.choice = Choice("The decoder's blocks", PLAIN, found, path, seconds)
        self._chosen: dict[str, Operations] = {}

    def choose(
        self,
        img: Tensor,
        txt: Tensor,
        rope: Rope,
        check_interrupt: Callable[[], None] = lambda: None,
    ) -> Operations:
        """What is remembered, or else the outcome of a short trial; see `model.Chooser`.

        After a full device the plain operations hold for this process: steps are many.
        """
        if not self.choice.found or img.dtype not in TOLERANCE:
            return PLAIN
        key = self.key(img, rope)
        if key not in self._chosen:
            trial = _Trial(img, txt, rope)
            self._chosen[key] = self.choice.choose(key, trial, check_interrupt)
        return self._chosen[key]

    def key(self, img: Tensor, rope: Rope) -> str:
        """What a choice depends on; the length of the text is left out, since it is small."""
        batch, length, hidden = img.shape
        width = rope[0].shape[-1]
        return self.choice.key(
            img.device,
            VERSION,
            f"heads {hidden // width} of {width}",
            str(img.dtype).removeprefix("torch."),
            f"batch {batch}",
            f"{length} image tokens",
        )


class _Trial:
    """A block's operations, one after the other, on the hidden states of a step."""

    def __init__(self, img: Tensor, txt: Tensor, rope: Rope) -> None:
        self._img = img
        self._txt = txt
        self._rope = rope
        batch, hidden = img.shape[0], img.shape[-1]
        vectors = torch.linspace(-1, 1, 12 * hidden, device=img.device, dtype=img.dtype)
        self._vectors = vectors.view(1, 12, hidden).repeat(batch, 1, 1)
        self.tolerance = TOLERANCE[img.dtype]

    def results(self, operations: Operations) -> Sequence[Tensor]:
        """Some rows of what the operations give."""
        return [x[:, :: math.ceil(x.shape[1] / ROWS) or 1].clone() for x in self._run(operations)]

    def milliseconds(self, operations: Operations) -> float:
        def run(times: int) -> None:
            for _ in range(times):
                last = self._run(operations)[-1]
            float(last[0, 0, 0, 0])  # waits for the device

        return mean_milliseconds(run)

    def _run(self, operations: Operations) -> Sequence[Tensor]:
        joint = operations.modulate(self._txt, self._img, self._vectors)
        txt, img, following = operations.add_modulate(self._txt, self._img, joint, self._vectors)
        width = self._rope[0].shape[-1]
        q, k = (x.unflatten(-1, (-1, width)) for x in (joint, following))
        return (joint, txt, img, following, *operations.norm_rotate(q, k, self._rope))
