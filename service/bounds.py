"""What one client may ask of a service, and what the service answers beyond it."""

import math
from dataclasses import dataclass

CODE = "GLM-SERVICE"


@dataclass(frozen=True)
class Bounds:
    """
    Args:
        queued: samples that may wait.
        samples: of one request.
        body: bytes of a JSON body.
        images_body: bytes of images.
        prompt: characters of a prompt.
        positions: of a sample: the ids of its prompt and references, and all cells.
        body_seconds: in which a body has to arrive.
    """

    queued: int = 32
    samples: int = 16
    body: int = 2**23
    images_body: int = 2**26
    prompt: int = 20_000
    positions: int = 2**16
    body_seconds: float = 30


class RefusalError(Exception):
    """A request that is not accepted: an HTTP status and a sentence.

    Args:
        retry_after: seconds after which to ask again.
    """

    def __init__(self, status: int, sentence: str, retry_after: float | None = None) -> None:
        super().__init__(sentence)
        self.status = status
        self.retry_after = None if retry_after is None else max(1, math.ceil(retry_after))


def too_large(sentence: str) -> RefusalError:
    return RefusalError(413, sentence)
