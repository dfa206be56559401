"""Server-sent events: what an engine tells of a request, as its client reads it."""

import asyncio
import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from glm_core.ar import protocol
from glm_core.ar.requests import SampleRequest
from glm_core.errors import GLMImageError

from .bounds import CODE
from .engine import Engine, Event, Failure, Order, Progress

SILENCE_SECONDS = 5
"""After which a line is sent that says nothing, so that a broken connection is noticed."""
SEND_SECONDS = 30
"""For one event; a client that does not read for so long is taken to have left."""
HEADERS = {
    "Content-Type": "text/event-stream",
    "Cache-Control": "no-store",
    "X-Accel-Buffering": "no",  # asks proxies not to hold events back
}

Describe = Callable[[Event], dict[str, Any]]
"""The data of a Progress or a Result."""


class EventStream(Response):
    """The answer to a request in the queue. It ends with the request, or when the client leaves."""

    def __init__(
        self, engine: Engine, order: Order, news: asyncio.Event, describe: Describe
    ) -> None:
        """news: set whenever the order has events."""
        super().__init__(headers=HEADERS)
        del self.headers["content-length"]
        self._engine = engine
        self._order = order
        self._news = news
        self._describe = describe

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        left = asyncio.ensure_future(_left(receive))
        events = asyncio.ensure_future(self._send_all(send))
        try:
            await asyncio.wait((left, events), return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._engine.leave(self._order)
            for task in (left, events):
                task.cancel()
                with suppress(asyncio.CancelledError, OSError, asyncio.TimeoutError):
                    await task

    async def _send_all(self, send: Send) -> None:
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        await send(start)
        while not self._order.finished:
            await self._send(send, await self._next(), more=True)
        await self._send(send, b"", more=False)

    async def _next(self) -> bytes:
        """The text of the events that there are, or of a line that says nothing."""
        try:
            await asyncio.wait_for(self._news.wait(), SILENCE_SECONDS)
        except asyncio.TimeoutError:
            return b": waiting\n\n"
        self._news.clear()
        return b"".join(_text(event, self._describe) for event in self._order.take())

    async def _send(self, send: Send, body: bytes, more: bool) -> None:
        message = {"type": "http.response.body", "body": body, "more_body": more}
        await asyncio.wait_for(send(message), SEND_SECONDS)


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _text(event: Event, describe: Describe) -> bytes:
    if isinstance(event, Failure):
        return _lines("error", _failure(event.error))
    name = "progress" if isinstance(event, Progress) else "result"
    return _lines(name, {"sample": event.sample, **describe(event)})


def _lines(name: str, data: dict[str, Any]) -> bytes:
    return f"event: {name}\ndata: {json.dumps(data, separators=(',', ':'))}\n\n".encode()


def _failure(error: Exception) -> dict[str, str]:
    if isinstance(error, GLMImageError):
        return {"code": error.code, "message": error.sentence}
    return {"code": CODE, "message": str(error)}


# ---- what is told of each kind of request --------------------------------------------------------


def sampled(samples: Sequence[SampleRequest], codebook: int) -> Describe:
    def describe(event: Event) -> dict[str, Any]:
        request = samples[event.sample]
        if isinstance(event, Progress):
            grids = [grid.tolist() for grid in event.grids]
            named = dict(zip(_grid_names(request), grids, strict=False))
            return {"done": event.done, "total": event.total, "grids": named}
        return {"file": protocol.written_to_text(event.value, request, codebook)}

    return describe


def _grid_names(request: SampleRequest) -> tuple[str, ...]:
    """In the order of writing."""
    if request.references:
        return (protocol.TOKENS,)
    return (protocol.PREVIEW,) if request.kind == "layout" else (protocol.PREVIEW, protocol.TOKENS)


def encoded(codebook: int) -> Describe:
    def describe(event: Event) -> dict[str, Any]:
        if isinstance(event, Progress):
            return {"done": event.done, "total": event.total}
        return {"file": protocol.encoded_to_text(event.value, codebook)}

    return describe


def scored(event: Event) -> dict[str, Any]:
    if isinstance(event, Progress):
        return {"done": event.done, "total": event.total}
    return {"file": protocol.tensors_to_text(event.value)}
