"""The HTTP side of a replica: `docs/service-protocol.md` as a Starlette application."""

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from glm_core.ar import protocol
from glm_core.errors import GLMImageError, InputError

from .bounds import RefusalError, too_large
from .engine import Engine, Order
from .events import EventStream, encoded, sampled, scored
from .keys import KeyCheck, refused
from .model import ServedModel

log = logging.getLogger(__name__)


class Service:
    """The endpoints over a model and its engine."""

    def __init__(self, model: ServedModel, engine: Engine) -> None:
        self._model = model
        self._engine = engine
        self._bounds = model.bounds

    async def health(self, _: Request) -> Response:
        if not self._engine.is_healthy:
            raise RefusalError(503, "This replica is broken and will be replaced: ask again.", 5)
        return JSONResponse({"status": "ok"})

    async def info(self, _: Request) -> Response:
        return JSONResponse(await asyncio.to_thread(lambda: self._model.info))

    async def palette(self, _: Request) -> Response:
        palette = await asyncio.to_thread(lambda: self._model.palette)
        data = protocol.tensors_to_bytes({"palette": palette})
        return Response(data, media_type="application/octet-stream")

    async def samples(self, request: Request) -> EventStream:
        body = await self._body(request, self._bounds.body)

        def submit(wake: Callable[[], None]) -> tuple[Order, Any]:
            samples = self._read_samples(body)
            return self._engine.submit(samples, wake), sampled(samples, self._model.codebook)

        return await self._submitted(submit)

    async def images(self, request: Request) -> EventStream:
        body = await self._body(request, self._bounds.images_body)

        def submit(wake: Callable[[], None]) -> tuple[Order, Any]:
            images = protocol.images_from_bytes(body)
            self._model.require_image(*images.shape[1:3])
            order = self._engine.submit_work(lambda watch: self._model.encode(images, watch), wake)
            return order, encoded(self._model.codebook)

        return await self._submitted(submit)

    async def scores(self, request: Request) -> EventStream:
        body = await self._body(request, self._bounds.body)

        def submit(wake: Callable[[], None]) -> tuple[Order, Any]:
            asked = protocol.score_from_json(_parsed(body), self._model.codebook)
            self._model.require_scorable(asked)
            order = self._engine.submit_work(lambda watch: self._model.score(asked, watch), wake)
            return order, scored

        return await self._submitted(submit)

    async def _submitted(
        self, submit: Callable[[Callable[[], None]], tuple[Order, Any]]
    ) -> EventStream:
        """Check and queue a request in a thread, since reading it may take a while."""
        loop, news = asyncio.get_running_loop(), asyncio.Event()
        work = loop.run_in_executor(None, submit, lambda: loop.call_soon_threadsafe(news.set))
        try:
            order, describe = await asyncio.shield(work)
        except asyncio.CancelledError:  # the client has left; the thread goes on
            work.add_done_callback(self._leave)
            raise
        return EventStream(self._engine, order, news, describe)

    def _leave(self, work: asyncio.Future) -> None:
        if not work.cancelled() and work.exception() is None:
            self._engine.leave(work.result()[0])

    def _read_samples(self, body: bytes) -> list:
        data = _parsed(body)
        entries = data.get("samples") if isinstance(data, dict) else None
        if not isinstance(entries, list) or not entries or len(data) > 1:
            raise InputError("The body must be a JSON object with a list of samples, and no more.")
        if len(entries) > self._bounds.samples:
            raise too_large(
                f"The request has {len(entries)} samples and one may have {self._bounds.samples}: "
                "send several requests."
            )
        return [protocol.sample_from_json(entry, self._model.codebook) for entry in entries]

    async def _body(self, request: Request, most: int) -> bytes:
        """
        Raises:
            RefusalError: the body is too large, or does not arrive in time.
        """
        announced = request.headers.get("content-length", "0")
        if announced.isdecimal() and int(announced) > most:
            raise too_large(_too_many_bytes(most))
        try:
            return await asyncio.wait_for(_read(request, most), self._bounds.body_seconds)
        except asyncio.TimeoutError:
            raise RefusalError(
                408,
                f"The body did not arrive within {self._bounds.body_seconds:.0f} seconds: send it "
                "at once.",
            ) from None


def web_app(model: ServedModel, engine: Engine, key_digest: bytes | None) -> Starlette:
    """
    Args:
        key_digest: `keys.digest` of the key; None answers clients on this machine alone.
    """
    service = Service(model, engine)
    routes = [
        Route("/health", _guarded(service.health), methods=["GET"]),
        Route("/info", _guarded(service.info), methods=["GET"]),
        Route("/v1/palette", _guarded(service.palette), methods=["GET"]),
        Route("/v1/samples", _guarded(service.samples), methods=["POST"]),
        Route("/v1/images", _guarded(service.images), methods=["POST"]),
        Route("/v1/scores", _guarded(service.scores), methods=["POST"]),
    ]
    return Starlette(
        routes=routes,
        middleware=[Middleware(KeyCheck, digest=key_digest)],
        exception_handlers={HTTPException: _unknown_path},
    )


def _guarded(
    endpoint: Callable[[Request], Awaitable[Response]],
) -> Callable[[Request], Awaitable[Response]]:
    """An endpoint whose errors are answers."""

    async def answer(request: Request) -> Response:
        try:
            return await endpoint(request)
        except RefusalError as error:
            return refused(error)
        except GLMImageError as error:
            return JSONResponse({"code": error.code, "message": error.sentence}, 400)
        except ClientDisconnect:
            return Response(status_code=499)  # nobody reads it
        except Exception:
            log.exception("A request failed")
            return refused(
                RefusalError(500, "The service failed at this request; its log says more.")
            )

    return answer


async def _read(request: Request, most: int) -> bytes:
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > most:
            raise too_large(_too_many_bytes(most))
    return bytes(body)


def _too_many_bytes(most: int) -> str:
    return f"The body may have {most / 2**20:.0f} MiB: send fewer samples or smaller images."


def _parsed(body: bytes) -> Any:
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:
        raise InputError("The body is not JSON: send a JSON object.") from error


async def _unknown_path(_: Request, error: HTTPException) -> Response:
    sentence = "There is no such path, or not with this method; see docs/service-protocol.md."
    return refused(RefusalError(error.status_code, sentence))
