"""Snapshot folders below ComfyUI's glm_image folders, by name.

A folder's name is its path below the root, with `/`. A folder of a hub cache,
`models--org--name`, is called `org/name`. A root may be a snapshot itself, or such a folder. A
folder of single files counts as a snapshot too.
"""

import os
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path

from ...glm_core.files.component import COMPONENTS
from ...glm_core.files.hub_cache import PREFIX, hub_name, main_snapshot, repository_of
from ...glm_core.files.listing import MAX_IN_FOLDER, Listing, list_folder
from ...glm_core.files.model_folder import components_in, weight_files

MAX_DEPTH = 4  # folders between a root and a snapshot, the snapshot included
MAX_ENTRIES = 20_000  # files and folders that are looked at below one root
MAX_HEADERS = 500  # of files, read below one root to find single files
FOLDERS = frozenset(kind.folder for kind in COMPONENTS.values())


def find_snapshots(roots: Iterable[str]) -> dict[str, Path]:
    """Snapshots by name. Of two with one name, that of the earlier root."""
    found: dict[str, Path] = {}
    for root in map(Path, roots):
        for name, snapshot in _below(root):
            found.setdefault(name, snapshot)
    return found


def _below(root: Path) -> Iterator[tuple[str, Path]]:
    """Names and snapshots of one root, the least deep first."""
    repository = repository_of(root)
    if repository is not None:
        yield hub_name(repository), root if root != repository else main_snapshot(root)
        return
    listed, headers = list_folder(root, MAX_ENTRIES), _Headers()
    left, folders = MAX_ENTRIES - listed.count, listed.folders
    parts = [folder for folder in folders if folder.name in FOLDERS]
    if any((part / "config.json").is_file() for part in parts) or headers.name_ours(listed):
        yield root.name, root
        folders = [folder for folder in folders if folder not in parts]
    waiting = deque((folder, (os.path.realpath(root),)) for folder in folders)
    while waiting and left > 0:
        folder, above = waiting.popleft()
        if folder.name.startswith(PREFIX):
            yield hub_name(folder), main_snapshot(folder)
            continue
        real = os.path.realpath(folder)
        if real in above:  # links lead in a circle
            continue
        listed = list_folder(folder, min(left, MAX_IN_FOLDER))
        left -= 1 + listed.count
        is_snapshot = any(child.name in FOLDERS for child in listed.folders)
        if is_snapshot or headers.name_ours(listed):
            yield folder.relative_to(root).as_posix(), folder
        if not is_snapshot and len(above) < MAX_DEPTH:
            waiting.extend((child, (*above, real)) for child in listed.folders)


class _Headers:
    """Reads headers of files, up to a number of them."""

    def __init__(self) -> None:
        self.left = MAX_HEADERS

    def name_ours(self, listed: Listing) -> bool:
        """Whether a single file of GLM-Image is among a folder's files."""
        files = weight_files(listed.files)[: self.left]
        self.left -= len(files)
        return any(components_in(file) for file in files)
