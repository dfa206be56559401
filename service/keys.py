"""Who may ask: those with the key, or those on this machine where there is none."""

import hashlib
import hmac

from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from .bounds import CODE, RefusalError

OPEN_PATH = "/health"
LOOPBACK = ("127.", "::1", "::ffff:127.")


def digest(key: str) -> bytes:
    """What a replica knows of the key."""
    return hashlib.sha256(key.encode()).digest()


class KeyCheck:
    """Answers 401 to all who do not have the key, before anything of theirs is read."""

    def __init__(self, app: ASGIApp, digest: bytes | None) -> None:
        """digest: of the key; None where there is none."""
        self._app = app
        self._digest = digest

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] != OPEN_PATH and not self._may(scope):
            await refused(self._refusal())(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def _may(self, scope: Scope) -> bool:
        if self._digest is None:
            host, *_ = scope.get("client") or ("",)
            return host.startswith(LOOPBACK)
        given = dict(scope["headers"]).get(b"authorization", b"")
        kind, _, key = given.partition(b" ")
        found = hashlib.sha256(key.strip()).digest()
        # Both are of one length, and compared in constant time.
        return hmac.compare_digest(found, self._digest) and kind.lower() == b"bearer"

    def _refusal(self) -> RefusalError:
        if self._digest is None:
            return RefusalError(
                401, "This service has no key, so it answers clients on its own machine alone."
            )
        return RefusalError(401, "The key is missing or wrong: send Authorization: Bearer KEY.")


def refused(error: RefusalError) -> Response:
    """The answer to a request that is not accepted."""
    headers = {}
    if error.retry_after is not None:
        headers["Retry-After"] = str(error.retry_after)
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse({"code": CODE, "message": str(error)}, error.status, headers)
