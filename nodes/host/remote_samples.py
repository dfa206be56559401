"""Samples that services write: in flight, or written and kept for a while.

A running node asks for them, or `ahead.py` before it runs. Each is found by the bytes of its
request and by the model, so a request that differs in a letter or in its seed is sent anew, and an
equal one is never sent twice. A sample that nobody holds any more is cancelled.
"""

import asyncio
import json
import math
import threading
import time
from collections.abc import Hashable, Sequence
from concurrent.futures import Future
from typing import Any

import torch
from torch import Tensor

from ...glm_core.ar.protocol import sample_to_json, written_from_text
from ...glm_core.ar.requests import SampleRequest, Written
from ...glm_core.data.grids import preview_grid
from ...glm_core.errors import ServiceError
from .service_client import JSON, Clock, RetryError, ServiceClient, persist
from .service_info import Info
from .services import Service

SAMPLES = "/v1/samples"
IN_FLIGHT = 64
"""Requests that are sent together, of all samples of a node."""
KEPT = 256
KEPT_SECONDS = 600.0
"""A sample's tokens are some kilobytes."""


class RemoteSample:
    """One sample, and how far it is.

    done, total: cells.
    grids: what is written so far, int64 [1, rows, columns] each, `UNKNOWN` where nothing is yet;
        the preview comes before the tokens.
    """

    def __init__(self, request: SampleRequest) -> None:
        self.request = request
        self.clock = Clock()
        self.done, self.total = 0, _cells_to_draw(request)
        self.grids: list[Tensor] = []
        self.holders: set[Hashable] = set()
        self.released = 0.0
        self.future: Future[Written]

    def progressed(self, data: dict[str, Any]) -> None:
        """A repeated request begins again at the first cell; the clock waits for a new one."""
        done = min(int(data["done"]), self.total)
        if done > self.done:
            self.clock.restart()
            self.done = done
        if grids := data.get("grids"):
            named = [grids[name] for name in ("preview", "tokens") if name in grids]
            self.grids = [torch.tensor([rows], dtype=torch.int64) for rows in named]

    def finished(self, written: Written) -> None:
        grids = [grid for grid in (written.preview, written.tokens) if grid is not None]
        self.done, self.grids = self.total, [grid[None].long() for grid in grids]

    @property
    def written(self) -> bool:
        return self.future.done() and not self.failed

    @property
    def failed(self) -> bool:
        return self.future.done() and (
            self.future.cancelled() or self.future.exception() is not None
        )


def _cells_to_draw(request: SampleRequest) -> int:
    cells = 0
    if not request.references:
        cells += math.prod(preview_grid(request.grid))
    if request.kind != "layout":
        cells += math.prod(request.grid)
    forced = (one for one in (request.preview, request.large) if one is not None)
    return cells - sum(int(one.mask.sum()) for one in forced)


class RemoteSamples:
    """All samples of this process; any thread may call it."""

    def __init__(self, client: ServiceClient) -> None:
        self._client = client
        self._lock = threading.Lock()
        self._samples: dict[Hashable, RemoteSample] = {}

    def hold(
        self, holder: Hashable, service: Service, info: Info, requests: Sequence[SampleRequest]
    ) -> list[RemoteSample]:
        """Samples that are in flight or written already, or else are asked for now."""
        slots = asyncio.Semaphore(IN_FLIGHT)
        with self._lock:
            self._forget()
            return [self._held(holder, service, info, request, slots) for request in requests]

    def release(self, holder: Hashable) -> None:
        """Cancels what nobody else holds and is not written."""
        with self._lock:
            for key, sample in list(self._samples.items()):
                if holder not in sample.holders:
                    continue
                sample.holders.discard(holder)
                sample.released = time.monotonic()
                if not sample.holders and not sample.written:
                    sample.future.cancel()
                    del self._samples[key]

    def _held(
        self,
        holder: Hashable,
        service: Service,
        info: Info,
        request: SampleRequest,
        slots: asyncio.Semaphore,
    ) -> RemoteSample:
        data = {"samples": [sample_to_json(request, info.codebook)]}
        body = json.dumps(data, sort_keys=True).encode()
        key = (service, info.identity, body)
        sample = self._samples.get(key)
        if sample is None or sample.failed:
            sample = self._samples[key] = RemoteSample(request)
            sample.future = self._client.start(self._write(sample, service, info, body, slots))
        sample.clock.restart()
        sample.holders.add(holder)
        return sample

    def _forget(self) -> None:
        """Drops samples that nobody has held for a while, and the oldest of too many."""
        idle = [(sample.released, key) for key, sample in self._samples.items()]
        idle = [entry for entry in idle if not self._samples[entry[1]].holders]
        idle.sort(key=lambda entry: entry[0])
        old = time.monotonic() - KEPT_SECONDS
        for number, (released, key) in enumerate(idle):
            if released < old or number < len(idle) - KEPT:
                del self._samples[key]

    async def _write(
        self,
        sample: RemoteSample,
        service: Service,
        info: Info,
        body: bytes,
        slots: asyncio.Semaphore,
    ) -> Written:
        broken = False

        async def attempt() -> Written:
            nonlocal broken
            if broken and (await self._client.info(service)).identity != info.identity:
                raise ServiceError(
                    f"The AR service '{service.name}' has another model since this prompt began; "
                    "queue it again."
                )
            broken = True
            return await self._stream(sample, service, info, body)

        async with slots:
            sample.clock.restart()
            return await persist(service, sample.clock, attempt)

    async def _stream(
        self, sample: RemoteSample, service: Service, info: Info, body: bytes
    ) -> Written:
        result = None
        async for name, data in self._client.events(service, SAMPLES, body, JSON):
            if name == "progress":
                sample.progressed(data)
            elif name == "result":
                result = data["file"]
        if result is None:
            raise RetryError("broke off its answer")
        written = written_from_text(result, sample.request, info.codebook)
        sample.finished(written)
        return written
