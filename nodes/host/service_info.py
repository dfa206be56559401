"""What an AR service says about itself, and about what went wrong there."""

import json
from dataclasses import dataclass
from typing import Any

from ...glm_core.ar.protocol import VERSION
from ...glm_core.data.tokens import MAX_CODEBOOK
from ...glm_core.errors import GLMImageError, ServiceError
from ...glm_core.foreign import parse_json
from ...glm_core.schema import OBJECT, TEXT, exactly, read, whole
from ...glm_core.vision.pixels import ImageConfig

LONGEST = 2000  # characters of a sentence
SERVICE = "glm_image_ar"
INFO = {
    "service": exactly(SERVICE),
    "version": exactly(VERSION),
    "checkpoint": TEXT,
    "dtype": TEXT,
    "codebook": whole(1, MAX_CODEBOOK),
    "rows": whole(1, 2**16),
    "image": OBJECT,
}
CODES = {kind.code: kind for kind in GLMImageError.__subclasses__()}


@dataclass(frozen=True)
class Info:
    """The model of a service.

    identity: equal where the same requests give the same tokens: checkpoint, dtype and rows.
    """

    identity: tuple[str, str, int]
    codebook: int
    image: ImageConfig

    @classmethod
    def from_json(cls, content: bytes) -> "Info":
        """
        Raises:
            ValueError: this is no service, or one of another version.
        """
        values = read(parse_json(content.decode(), "It"), INFO, "It", "start another")
        identity = values["checkpoint"], values["dtype"], values["rows"]
        return cls(identity, values["codebook"], ImageConfig.from_dict(values["image"]))


def said_error(content: bytes) -> GLMImageError | None:
    """The error that an answer tells of, of its own kind; None if it tells of none."""
    try:
        data = json.loads(content)
    except (ValueError, RecursionError):
        return None
    return error_of(data)


def error_of(data: Any) -> GLMImageError | None:
    """The error in `{"code": …, "message": …}`; None if there is none."""
    message = data.get("message") if isinstance(data, dict) else None
    if not isinstance(message, str) or not message:
        return None
    kind = CODES.get(str(data.get("code")), ServiceError)
    return kind(message[:LONGEST].removesuffix(f" [{kind.code}]"))
