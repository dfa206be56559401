"""What a folder holds, of a bounded number of entries."""

import os
from itertools import islice
from pathlib import Path
from typing import NamedTuple

MAX_IN_FOLDER = 1_000


class Listing(NamedTuple):
    """Folders and files, sorted and without hidden ones, and how many entries were looked at."""

    folders: list[Path]
    files: list[Path]
    count: int


def list_folder(folder: Path, most: int = MAX_IN_FOLDER) -> Listing:
    """The first `most` entries of a folder; none of one that went away or may not be read.

    Hidden ones are left out: a downloader keeps its own files there.
    """
    try:
        with os.scandir(folder) as opened:
            entries = list(islice(opened, most))
    except OSError:
        return Listing([], [], 0)
    folders: list[Path] = []
    files: list[Path] = []
    for entry in sorted(entries, key=lambda entry: entry.name):
        if not entry.name.startswith("."):
            (folders if _is_folder(entry) else files).append(Path(entry.path))
    return Listing(folders, files, len(entries))


def _is_folder(entry: os.DirEntry) -> bool:
    """`entry.is_dir` alone raises at a link to itself; `isdir` alone looks at every file."""
    return os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir()
