"""HTTP requests to AR services, in a thread of their own. The protocol: docs/service-protocol.md.

A request is asked again until it succeeds: its answer depends on the request and the model alone.
"""

import asyncio
import atexit
import concurrent.futures
import json
import random
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from functools import cached_property
from typing import Any, TypeVar

from ...glm_core.errors import GLMImageError, ServiceError
from .progress import check_interrupt
from .service_info import Info, error_of, said_error
from .services import Service

JSON, TENSORS = "application/json", "application/octet-stream"

POLL_SECONDS = 0.1
CONNECT_SECONDS = 10
SILENT_SECONDS = 30  # the service sends a line every few seconds
PAUSES = (0.25, 0.5, 1.0, 2.0, 4.0)  # seconds before a request is sent again
MAX_PAUSE = 30.0
MOST_FAILURES = 3
"""Of a service at one request, which it tells of. A replica that stops tells of one, too."""
MAX_ANSWER_BYTES = 2**28
MAX_LINE_BYTES = 2**25
Result = TypeVar("Result")
Event = tuple[str, dict[str, Any]]


class RetryError(Exception):
    """Why a request has to be sent again.

    Args:
        reason: for a sentence, without address and key.
        pause: seconds that the service asks to wait.
        failure: of the service at this very request, which is not sent for ever.
    """

    def __init__(
        self, reason: str, pause: float | None = None, failure: ServiceError | None = None
    ) -> None:
        super().__init__(reason)
        self.pause = pause
        self.failure = failure


class Clock:
    """The time that a request has made no progress."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        self._since = time.monotonic()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._since


class ServiceClient:
    """Sends requests in an event loop of its own thread; any thread may start and await them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: asyncio.AbstractEventLoop | None = None

    @property
    def _loop(self) -> asyncio.AbstractEventLoop:
        with self._lock:
            if self._running is None:
                self._running = asyncio.new_event_loop()
                work = self._running.run_forever
                threading.Thread(target=work, name="GLM-Image services", daemon=True).start()
            return self._running

    @cached_property
    def _session(self) -> Any:
        import aiohttp  # ComfyUI's server has it; a quarter of a second where nothing else did

        # No limit: a service says itself when it is full. Cookies are not kept.
        session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0), cookie_jar=aiohttp.DummyCookieJar()
        )
        atexit.register(lambda: self.start(session.close()).result(CONNECT_SECONDS))
        return session

    def start(self, work: Coroutine[Any, Any, Result]) -> "concurrent.futures.Future[Result]":
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def soon(self, call: Callable[[], object]) -> None:
        """Calls a function in the thread of the requests."""
        self._loop.call_soon_threadsafe(call)

    def run(self, work: Coroutine[Any, Any, Result]) -> Result:
        """The result of requests, for the thread of a running node."""
        future = self.start(work)
        try:
            wait([future])
        finally:
            future.cancel()
        return future.result()

    # ---- in the thread of the requests ----

    async def info(self, service: Service) -> Info:
        """The service's model.

        Raises:
            RetryError: it cannot be reached, or is being replaced.
            GLMImageError: it refuses the key, or is none of this version.
        """
        content = await self.content(service, "/info")
        try:
            return Info.from_json(content)
        except ValueError:
            raise _stranger(service) from None

    async def content(self, service: Service, path: str) -> bytes:
        async with self._open(service, "GET", path) as answer:
            return await _content(answer)

    async def events(
        self, service: Service, path: str, body: bytes, kind: str
    ) -> AsyncIterator[Event]:
        """The events of a stream as they come.

        Raises:
            RetryError: the stream breaks.
            GLMImageError: the service refuses the request, or fails at it.
        """
        async with self._open(service, "POST", path, body, kind) as answer:
            async for name, data in _events(answer):
                if name == "error":
                    raise _failure(error_of(data)) or ValueError(name)
                yield name, data

    @asynccontextmanager
    async def _open(
        self, service: Service, method: str, path: str, body: bytes | None = None, kind: str = ""
    ) -> AsyncIterator[Any]:
        """An answer of status 200. Leaving it closes the connection if it was not read to its end.

        No error of the library goes on: they quote the address.
        """
        import aiohttp

        headers = {"Content-Type": kind} if kind else {}
        if service.key is not None:
            headers["Authorization"] = f"Bearer {service.key}"
        patience = aiohttp.ClientTimeout(
            total=None, sock_connect=CONNECT_SECONDS, sock_read=SILENT_SECONDS
        )
        try:
            async with self._session.request(
                method,
                service.address + path,
                data=body,
                headers=headers,
                timeout=patience,
                allow_redirects=False,
            ) as answer:
                if answer.status != 200:
                    raise _refusal(service, answer, await _content(answer))
                yield answer
        except GLMImageError:
            raise
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError):
            raise RetryError("cannot be reached") from None
        except (aiohttp.ClientError, OSError, asyncio.TimeoutError):
            raise RetryError("broke off its answer") from None
        except (ValueError, LookupError):  # an answer that is none of this protocol
            raise _stranger(service) from None


async def persist(
    service: Service, clock: Clock, attempt: Callable[[], Awaitable[Result]]
) -> Result:
    """The result of an attempt that is repeated after each `RetryError`.

    Raises:
        GLMImageError: an attempt fails for good, or the clock passes the service's time limit.
    """
    pauses, failures = iter(PAUSES), 0
    while True:
        try:
            return await attempt()
        except RetryError as error:
            reason, pause, failure = str(error), error.pause, error.failure
        failures += failure is not None
        if failures == MOST_FAILURES:
            raise failure
        if pause is None:  # spread, as all clients of a service lose it together
            pause = next(pauses, PAUSES[-1]) * random.uniform(0.7, 1.3)
        if clock.seconds + pause > service.time_limit:
            raise failure or ServiceError(
                f"The AR service '{service.name}' {reason}, and for {service.time_limit:g} s no "
                "answer came; start the service, or raise its time_limit."
            )
        await asyncio.sleep(pause)


def wait(
    futures: Sequence["concurrent.futures.Future[Any]"],
    meanwhile: Callable[[], None] = lambda: None,
) -> None:
    """Wait for all, as the thread of a running node: an interrupt raises at once.

    Args:
        meanwhile: called about every 100 ms and at the end.

    Raises:
        GLMImageError: one of them failed.
    """
    pending = set(futures)
    while pending:
        done, pending = concurrent.futures.wait(
            pending, POLL_SECONDS, concurrent.futures.FIRST_COMPLETED
        )
        check_interrupt()
        for future in done:
            future.result()
        meanwhile()


def _refusal(service: Service, answer: Any, content: bytes) -> Exception:
    """What an answer of another status than 200 means."""
    if answer.status in (401, 403):
        return ServiceError(
            f"The AR service '{service.name}' refuses "
            f"{'the key' if service.key else 'requests without a key'}; correct its key in "
            "glm_image_services.yaml."
        )
    said = said_error(content)
    if answer.status == 503:
        return RetryError("is full or being replaced", _seconds(answer.headers.get("Retry-After")))
    if answer.status in (408, 502, 504) or (answer.status == 500 and said is None):
        return RetryError("is being replaced")
    return _failure(said) if answer.status == 500 else said or _stranger(service)


def _failure(said: GLMImageError | None) -> Exception | None:
    """What a service tells of: an error of its own is worth another try."""
    if isinstance(said, ServiceError):
        return RetryError("fails", failure=said)
    return said


def _stranger(service: Service) -> ServiceError:
    return ServiceError(
        f"What answers for the AR service '{service.name}' is no AR service of this version; "
        "correct its address, or start the service of the same release as this pack."
    )


def _seconds(text: str | None) -> float | None:
    return min(float(text), MAX_PAUSE) if text and text.isdecimal() else None


async def _content(answer: Any) -> bytes:
    content = bytearray()
    async for piece in answer.content.iter_any():
        content += piece
        if len(content) > MAX_ANSWER_BYTES:
            raise ValueError("The answer is too long.")
    return bytes(content)


async def _events(answer: Any) -> AsyncIterator[Event]:
    """Server-sent events: lines `event: NAME` and `data: JSON`, ended by an empty line."""
    name, data, rest = "", b"", b""
    async for piece in answer.content.iter_any():
        *lines, rest = (rest + piece).split(b"\n")
        if len(rest) > MAX_LINE_BYTES:
            raise ValueError("The line is too long.")
        for line in lines:
            line = line.removesuffix(b"\r")
            if line.startswith(b"event:"):
                name = line[6:].strip().decode()
            elif line.startswith(b"data:"):
                data = line[5:].strip()
            elif not line and name:
                yield name, json.loads(data)
                name, data = "", b""
