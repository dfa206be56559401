"""Text and JSON files of a checkpoint, read with a sentence for what is wrong."""

import json
from pathlib import Path
from typing import Any

from ..errors import GLMImageError


def read_text(file: Path) -> str:
    if not file.is_file():
        raise GLMImageError(f"{file} is missing; download it with the rest of its folder.")
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise GLMImageError(f"{file} cannot be read ({error}); download it again.") from error


def read_json(file: Path) -> dict[str, Any]:
    return parse_json(read_text(file), str(file))


def parse_json(text: str, source: str) -> dict[str, Any]:
    """A JSON object; `source` names the text in an error sentence."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise GLMImageError(f"{source} is not valid JSON ({error}); download it again.") from error
    if not isinstance(value, dict):
        raise GLMImageError(f"{source} is not a JSON object; download it again.")
    return value
