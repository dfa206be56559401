"""Samples as requests: the unit of batches, lists and services, and which of them share a run."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from ..data.grids import Grid, token_grid
from ..data.tokens import Forced
from ..errors import BatchError, InputError
from .cache import span_of
from .model import ARModel
from .prompt import Prompt, PromptTokenizer
from .sampler import (
    Prompts,
    SamplingRun,
    sample_from_references,
    sample_layout,
    sample_tokens,
)
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

    @property
    def forced(self) -> int:
        """How many cells are not drawn."""
        given = (self.preview, self.large)
        return sum(int(cells.mask.sum()) for cells in given if cells is not None)

    def read(self, tokenizer: PromptTokenizer) -> Prompt:
        """
        Raises:
            GLMImageError: the prompt is empty.
        """
        return tokenizer.read(self.prompt, self.grid, self.references)


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
    Forced cells that follow each other are read in one pass, and other cells drawn in steps; in
    bf16 the two round differently. So where a neighbour's locks would change which is which, tokens
    would depend on it.

    Raises:
        GLMImageError: the prompt is empty.
    """
    return (
        request.grid,
        request.kind,
        request.options,
        request.lookahead,
        _places(request.preview),
        _places(request.large),
        bool(request.references),
        span_of(len(request.read(tokenizer))),
    )


def _places(forced: Forced | None) -> bytes | None:
    """Which cells are forced; None if there are none."""
    if forced is None or not forced.mask.any():
        return None
    return forced.mask.numpy().tobytes()


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


def batches(requests: Sequence[SampleRequest]) -> list[list[int]]:
    """The indices of requests that follow each other and have one prompt and one set of references.

    Args:
        requests: of one size, kind, lookahead, and set of options and of locked places.
    """
    indices = range(len(requests))
    return [list(batch) for _, batch in groupby(indices, lambda i: _read_by(requests[i]))]


def _read_by(request: SampleRequest) -> Hashable:
    """What the model reads before the first cell, for requests of one size."""
    return request.prompt, tuple(map(id, request.references))


def write_together(
    model: ARModel,
    tokenizer: PromptTokenizer,
    requests: Sequence[SampleRequest],
    rows: int,
    **how: Any,
) -> list[Written]:
    """Write requests of one key in one run of `rows` rows.

    A request's tokens do not depend on the others. In bf16 they depend on `rows`, so a step always
    has that many: rows without a request repeat the first one, and are left out of what comes back.
    With one row a request is written as `sampler` writes a single sample.

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
    if rows == 1:
        return write_batch(model, tokenizer, requests, **how)
    filled = [*requests, *[requests[0]] * (rows - len(requests))]
    run = _run(filled, how)
    shown = replace(run, show=lambda grids: run.show([grid[: len(requests)] for grid in grids]))
    return _write(model, _prompts(tokenizer, filled), filled, shown)[: len(requests)]


def write_batch(
    model: ARModel, tokenizer: PromptTokenizer, requests: Sequence[SampleRequest], **how: Any
) -> list[Written]:
    """Write requests of one prompt in as many rows, as `sampler` writes a batch.

    Args:
        requests: one of `batches`.
        how: as in `write_together`.
    """
    return _write(model, requests[0].read(tokenizer), requests, _run(requests, how))


def _write(
    model: ARModel, prompts: Prompts, requests: Sequence[SampleRequest], run: SamplingRun
) -> list[Written]:
    one, grid = requests[0], requests[0].grid
    preview = _together([request.preview for request in requests])
    large = _together([request.large for request in requests])
    tokens = previews = [None] * len(requests)
    if one.kind == "layout":
        previews = sample_layout(model, prompts, grid, run, preview=preview)
    elif one.references:
        tokens = sample_from_references(model, prompts, grid, run, large=large)
    else:
        tokens, previews = sample_tokens(model, prompts, grid, run, preview=preview, large=large)
    return [Written(_stored(t), _stored(p)) for t, p in zip(tokens, previews, strict=True)]


def _run(requests: Sequence[SampleRequest], how: dict[str, Any]) -> SamplingRun:
    seeds = [request.seed % 2**64 for request in requests]
    return SamplingRun(seeds, requests[0].options, lookahead=requests[0].lookahead, **how)


def _prompts(tokenizer: PromptTokenizer, requests: Sequence[SampleRequest]) -> list[Prompt]:
    """One for each request; equal ones are one object, which the model reads once."""
    read: dict[Hashable, Prompt] = {}
    for request in requests:
        if _read_by(request) not in read:
            read[_read_by(request)] = request.read(tokenizer)
    return [read[_read_by(request)] for request in requests]


def _together(forced: Sequence[Forced | None]) -> Forced | None:
    """The forced cells of all samples, which have the same mask; None if there are none."""
    if _places(forced[0]) is None:
        return None
    return Forced(torch.cat([cells.values.cpu() for cells in forced]), forced[0].mask)


def _stored(tokens: Tensor | None) -> Tensor | None:
    return None if tokens is None else tokens.to("cpu", torch.int32)
