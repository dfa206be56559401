"""Samples as requests: the unit of batches, lists and services, and which of them share a run."""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from ..data.cells import format_cells
from ..data.grids import Grid, preview_grid, token_grid
from ..data.tokens import Forced
from ..errors import BatchError, InputError
from .cache import span_of
from .model import ARModel
from .prompt import Prompt, PromptTokenizer
from .run import SamplingRun
from .sampler import sample_from_references, sample_layout, sample_tokens
from .step import SamplingOptions
from .writer import Prompts, require_forced_fit

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
        lookahead: see `run.SamplingRun`.

    Raises:
        GLMImageError: the kind is unknown, the size has no grid, forced cells are of another, or a
            kind has no use for an argument.
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
        for forced, grid in ((self.preview, preview_grid(self.grid)), (self.large, self.grid)):
            if forced is not None:
                require_forced_fit(forced, grid)
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
    def note(self) -> dict[str, Any]:
        """How its tokens are made, for `SemanticTokens.info`."""
        forced = {} if self.large is None else {"forced": format_cells(self.large.mask)}
        return {"prompt": self.prompt, "seed": self.seed, **vars(self.options), **forced}

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

    They agree in grid, kind, options and lookahead, in whether they have references, and in the
    spans of the cache that their prompts take.

    Raises:
        GLMImageError: the prompt is empty.
    """
    return _key(request, request.read(tokenizer))


def _key(request: SampleRequest, prompt: Prompt) -> Hashable:
    return (
        request.grid,
        request.kind,
        request.options,
        request.lookahead,
        bool(request.references),
        span_of(len(prompt)),
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


def batches(requests: Sequence[SampleRequest]) -> list[list[int]]:
    """The indices of requests that follow each other and have one prompt and one set of references.

    Args:
        requests: of one node; they have the same size, options and forced cells.
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
    finished: Callable[[int, Written], None] = lambda index, written: None,
    **how: Any,
) -> list[Written]:
    """Write requests of one key in one run of `rows` rows.

    A request's tokens do not depend on the others. In bf16 they depend on `rows`, so a pass always
    has that many: rows without a request hold the first one's prompt, and no pass is for them. With
    one row a request is written as `sampler` writes a single sample.

    Args:
        requests: 1 to `rows` of them, of equal `run_key`.
        finished: called with the index of a request that is not gone, and what came of it, as soon
            as its last cell is drawn.
        how: the other arguments of `SamplingRun` that a request does not say. `show` gets the
            requests' grids in order; `gone` gives the indices of requests.

    Raises:
        GLMImageError: there are more requests than rows, or they have several keys.
    """
    if not 1 <= len(requests) <= rows:
        raise BatchError(f"There are {len(requests)} requests for a run of {rows} rows.")
    prompts = _prompts(tokenizer, requests)
    if len({_key(*pair) for pair in zip(requests, prompts, strict=True)}) > 1:
        raise BatchError("Requests that differ in size or options cannot share a run.")
    empty = rows - len(requests)
    filled, prompts = [*requests, *requests[:1] * empty], [*prompts, *prompts[:1] * empty]
    run = _run(filled, how)
    own = replace(
        run,
        show=lambda grids: run.show([grid[: len(requests)] for grid in grids]),
        gone=lambda: [*run.gone(), *range(len(requests), rows)],
        finished=lambda index, grids: finished(index, _of_grids(requests[index], grids)),
    )
    return _write(model, prompts if rows > 1 else prompts[0], filled, own)[: len(requests)]


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
    """The forced cells of all samples, with a mask for each; None if there are none."""
    given = [cells for cells in forced if cells is not None]
    if not given:
        return None
    grid = given[0].mask.shape
    nothing = Forced(torch.zeros(1, *grid, dtype=torch.int64), torch.zeros(grid, dtype=torch.bool))
    every = [nothing if cells is None else cells for cells in forced]
    values = torch.cat([cells.values.cpu().to(torch.int64) for cells in every])
    return Forced(values, torch.stack([cells.mask for cells in every]))


def _of_grids(request: SampleRequest, grids: Sequence[Tensor]) -> Written:
    """What came of a request, from its grids in the order of writing."""
    stored = [_stored(grid) for grid in grids]
    if request.kind == "layout":
        return Written(None, *stored)
    return Written(*stored, None) if request.references else Written(*reversed(stored))


def _stored(tokens: Tensor | None) -> Tensor | None:
    return None if tokens is None else tokens.to("cpu", torch.int32)
