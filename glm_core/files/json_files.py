"""Text and JSON files of a checkpoint, read with a sentence for what is wrong."""

from pathlib import Path
from typing import Any

from ..errors import FileError
from ..foreign import parse_json, wall

MAX_TEXT_BYTES = 100_000_000
"""GLM-Image's tokenizer.json, the longest of these files, has about 20 MB."""


def is_file(path: Path) -> bool:
    """Whether a regular file is there. A name that the system refuses is no file."""
    try:
        return path.is_file()
    except OSError:
        return False


def read_text(file: Path) -> str:
    if not is_file(file):
        raise FileError(f"{file} is missing; download it with the rest of its folder.")
    with wall(f"{file} cannot be read"):
        size = file.stat().st_size
        if size > MAX_TEXT_BYTES:
            raise FileError(
                f"{file} has {size} bytes, and this pack reads at most {MAX_TEXT_BYTES}; "
                "download it again."
            )
        return file.read_text(encoding="utf-8")


def read_json(file: Path) -> dict[str, Any]:
    return parse_json(read_text(file), str(file))
