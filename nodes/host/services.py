"""AR services by name: the file `glm_image_services.yaml` in a folder of ComfyUI's user folder.

Graphs, sentences, logs and the history have a service's name. Its address and key are only here and
in requests to it, so no error that may quote them is chained to a sentence.
"""

import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import folder_paths
import yaml

from ...glm_core.errors import ServiceError, shown
from ...glm_core.schema import TEXT, Kind, number, optional, whole

FILE = "glm_image_services.yaml"
SHOWN = f"user/__glm_image/{FILE}"
"""Its place below ComfyUI's folder, as the sentences name it."""
MAX_BYTES = 2**20
NAME = re.compile(r"[\w.][\w .-]{0,63}")

TIME_LIMIT = 600.0
AHEAD, MAX_AHEAD = 4, 64


def _is_address(value: Any) -> bool:
    """A URL without a name and a password, which would be another key."""
    try:
        parts = urlsplit(value)
        plain = parts.port != 0 and "@" not in parts.netloc and not (parts.query or parts.fragment)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and plain
    except (ValueError, TypeError, AttributeError):
        return False


def _is_key(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch("[!-~]{1,1024}", value) is not None


ENTRY = {
    "address": Kind("but must be http://HOST:PORT or https://HOST:PORT", _is_address),
    "key": optional(Kind("but must be of 1 to 1024 printable ASCII characters", _is_key)),
    "key_env": optional(TEXT),
    "time_limit": optional(number(1, 86400), TIME_LIMIT),
    "ahead": optional(whole(0, MAX_AHEAD), AHEAD),
}


@dataclass(frozen=True)
class Service:
    """An entry of the file.

    time_limit: seconds to wait without a new cell before a request fails.
    ahead: queued prompts whose tokens are asked for before they run; 0 is off.
    """

    name: str
    address: str = field(repr=False)
    key: str | None = field(repr=False)
    time_limit: float = TIME_LIMIT
    ahead: int = AHEAD


def service_names() -> list[str]:
    """For the node's list; empty if the file is missing or cannot be read."""
    try:
        return sorted(_read())
    except ServiceError:
        return []


def find_service(name: str) -> Service:
    """
    Raises:
        GLMImageError: there is no service of that name, or the file or its entry is broken.
    """
    entries = _read()
    if not isinstance(name, str) or name not in entries:
        known = f"; it has {', '.join(sorted(entries))}" if entries else ""
        raise ServiceError(
            f"There is no AR service '{shown(name)}' in {SHOWN}{known}. Write its name and address "
            "there, as docs/fleet.md shows, or choose another."
        )
    return _service(name, entries[name])


def _service(name: str, entry: Any) -> Service:
    if not isinstance(entry, dict):
        raise ServiceError(f"The AR service '{name}' in {SHOWN} has no address; write one there.")
    for key in entry:
        if key not in ENTRY:
            raise ServiceError(
                f"The AR service '{name}' in {SHOWN} has an entry '{shown(key)}'; use "
                f"{', '.join(ENTRY)}."
            )
    values = {key: _value(name, entry, key, kind) for key, kind in ENTRY.items()}
    return Service(
        name,
        values["address"].rstrip("/"),
        values["key"] or _from_environment(name, values["key_env"]),
        float(values["time_limit"]),
        values["ahead"],
    )


def _value(name: str, entry: dict[str, Any], key: str, kind: Kind) -> Any:
    """The sentences do not show the value, which may be a key."""
    value = entry.get(key)
    if value is None and key != "address":
        return kind.default
    if value is None or not kind.fits(value):
        raise ServiceError(
            f"The {key} of the AR service '{name}' in {SHOWN} {kind.wanted[4:]}, and is "
            f"{'missing' if value is None else 'something else'}; correct it there."
        )
    return value


def _from_environment(name: str, variable: str | None) -> str | None:
    if variable is None:
        return None
    key = os.environ.get(variable)
    if not _is_key(key):
        raise ServiceError(
            f"The key of the AR service '{name}' is in the environment variable "
            f"{shown(variable)}, which is {'not set' if key is None else 'no key'}; set it before "
            "ComfyUI starts."
        )
    return key


def _read() -> dict[str, Any]:
    """The entries of the file by name; none if it is missing."""
    path = Path(folder_paths.get_system_user_directory("glm_image")) / FILE
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES)
        entries = yaml.safe_load(content) or {}
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise ServiceError(f"{SHOWN} cannot be read ({error.strerror}).") from None
    except (yaml.YAMLError, ValueError, RecursionError):  # it would quote the file, keys too
        raise ServiceError(f"{SHOWN} is not YAML; correct it as docs/fleet.md shows.") from None
    if not isinstance(entries, dict) or not all(_is_name(name) for name in entries):
        raise ServiceError(
            f"{SHOWN} must have a name for each service, of up to 64 letters, digits, spaces, dots "
            "and hyphens, with the service's address below it; correct it as docs/fleet.md shows."
        )
    return entries


def _is_name(name: Any) -> bool:
    return isinstance(name, str) and NAME.fullmatch(name) is not None
