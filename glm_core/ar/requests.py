"""Samples as requests: the unit of batches, lists and services, and which of them share a run."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..data.grids import Grid, token_grid
from ..data.tokens import Forced
from ..errors import BatchError, InputError
from .cache import span_of
from .model import ARModel
from .prompt import Prompt, PromptTokenizer
from .sampler import SamplingRun, sample_from_references, sample_layout, sample_tokens
from .step import SamplingOptions

KINDS = ("tokens", "layout")


@dataclass(frozen=True, eq=False)
class SampleRequest:
    """One sample to write.

    Args:
        height, width: of the image, in pixels.
        seed: of this very sample, modulo 2^64.
        kind: "tokens", or "layout" for the preview alone.
        preview: locked cells, [1, ph, pw].
        large: cells kept of given tokens, [1, h, w].
        references: semantic tokens of each reference, int [h, w]. With them there is no preview.
        lookahead: see `sampler.SamplingRun`.

    Raises:
        GLMImageError: the kind is unknown, the size has no grid, or a kind has no use for an
            argument.
    """

    prompt: str
    height: int
    width: int
    seed: int
    options: SamplingOptions
    kind: str = "tokens"
    preview: Forced | None = None
    large: Forced | None = None
    references: tuple[Tensor, ...] = ()
    lookahead: int = 1

    def __post_init__(self) -> None:
        token_grid(self.height, self.width)
        if self.kind not in KINDS:
            raise InputError(f"The kind of a sample is {self.kind!r}; use {' or '.join(KINDS)}.")
        if self.kind == "layout" and (self.large is not None or self.references):
            raise InputError("A layout alone has neither tokens nor references; leave them out.")
        if self.preview is not None and self.references:
            raise InputError(
                "A sample with references has no preview to lock cells of; leave out one of them."
            )

    @property
    def grid(self) -> Grid:
        """Of the tokens."""
        return token_grid(self.height, self.width)

    def read(self, tokenizer: PromptTokenizer) -> Prompt:
        """
        Raises:
            GLMImageError: the prompt is empty.
        """
        if self.references:
            return tokenizer.image_to_image(self.prompt, self.grid, self.references)
        return tokenizer.text_to_image(self.prompt, self.grid)


@dataclass(frozen=True, eq=False)
class Written:
    """What came of a request, on the CPU.

    tokens: int32 [h, w]; None for a layout.
    preview: int32 [ph, pw]; None with references.
    """

    tokens: Tensor | None
    preview: Tensor | None


def run_key(tokenizer: PromptTokenizer, request: SampleRequest) -> Hashable:
    """Requests of equal keys may share a run.

    They agree in grid, kind, options and lookahead, in which cells are forced (not in their
    tokens), in whether they have references, and in the spans of the cache that their prompts take.

    Raises:
        GLMImageError: the prompt is empty.
    """
    forced = tuple(
        None if cells is None else tuple(cells.mask.flatten().tolist())
        for cells in (request.preview, request.large)
    )
    return (
        request.grid,
        request.kind,
        request.options,
        request.lookahead,
        forced,
        bool(request.references),
        span_of(len(request.read(tokenizer))),
    )


def shared_runs(
    tokenizer: PromptTokenizer, requests: Sequence[SampleRequest], rows: int
) -> list[list[int]]:
    """The indices of requests that are written together, at most `rows` in each run.

    Raises:
        GLMImageError: a prompt is empty.
    """
    by_key: dict[Hashable, list[int]] = {}
    for i, request in enumerate(requests):
        by_key.setdefault(run_key(tokenizer, request), []).append(i)
    return [
        together[start : start + rows]
        for together in by_key.values()
        for start in range(0, len(together), rows)
    ]


def write_together(
    model: ARModel,
    tokenizer: PromptTokenizer,
    requests: Sequence[SampleRequest],
    rows: int,
    **how: Any,
) -> list[Written]:
    """Write requests of one key in one run of `rows` rows.

    A request's tokens do not depend on the others. In bf16 they depend on `rows`, so a step has
    that many rows however few requests there are.

    Args:
        requests: 1 to `rows` of them, of equal `run_key`.
        how: the arguments of `SamplingRun` that a request does not say: device, dtype, runner,
            choose, progress, show and check_interrupt. `show` gets the requests' grids in order.

    Raises:
        GLMImageError: there are more requests than rows, or they have several keys.
    """
    if not 1 <= len(requests) <= rows:
        raise BatchError(f"There are {len(requests)} requests for a run of {rows} rows.")
    if len({run_key(tokenizer, request) for request in requests}) > 1:
        raise BatchError("Requests that differ in size, options or locks cannot share a run.")
    return [_alone(model, tokenizer, request, how) for request in requests]


def _alone(
    model: ARModel, tokenizer: PromptTokenizer, request: SampleRequest, how: dict[str, Any]
) -> Written:
    prompt = request.read(tokenizer)
    seed = request.seed % 2**64
    run = SamplingRun(seed, 1, request.options, lookahead=request.lookahead, **how)
    if request.kind == "layout":
        preview = sample_layout(model, prompt, request.grid, run, preview=request.preview)
        return Written(None, _stored(preview[0]))
    if request.references:
        tokens = sample_from_references(model, prompt, request.grid, run, large=request.large)
        return Written(_stored(tokens[0]), None)
    tokens, preview = sample_tokens(
        model, prompt, request.grid, run, preview=request.preview, large=request.large
    )
    return Written(_stored(tokens[0]), _stored(preview[0]))


def _stored(tokens: Tensor) -> Tensor:
    return tokens.to("cpu", torch.int32)
