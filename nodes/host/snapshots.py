"""Snapshot folders below ComfyUI's glm_image folders, by name.

A folder's name is its path below the root, with `/`. A folder of a hub cache,
`models--org--name`, is called `org/name`. A root may be a snapshot itself, or such a folder.
"""

import os
from collections import deque
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

from ...glm_core.files.component import COMPONENTS

MAX_DEPTH = 4  # folders between a root and a snapshot, the snapshot included
MAX_ENTRIES = 20_000  # files and folders that are looked at below one root
MAX_IN_FOLDER = 1_000  # of these in one folder that is no root
HUB_PREFIX = "models--"
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
    repository = _repository_of(root)
    if repository is not None:
        yield _hub_name(repository), root if root != repository else _main_snapshot(root)
        return
    folders, looked_at = _children(root, MAX_ENTRIES)
    left = MAX_ENTRIES - looked_at
    if any((folder / "config.json").is_file() for folder in folders if folder.name in FOLDERS):
        yield root.name, root
        folders = [folder for folder in folders if folder.name not in FOLDERS]
    waiting = deque((folder, (os.path.realpath(root),)) for folder in folders)
    while waiting and left > 0:
        folder, above = waiting.popleft()
        if folder.name.startswith(HUB_PREFIX):
            yield _hub_name(folder), _main_snapshot(folder)
            continue
        real = os.path.realpath(folder)
        if real in above:  # links lead in a circle
            continue
        children, looked_at = _children(folder, min(left, MAX_IN_FOLDER))
        left -= 1 + looked_at
        if any(child.name in FOLDERS for child in children):
            yield folder.relative_to(root).as_posix(), folder
        elif len(above) < MAX_DEPTH:
            waiting.extend((child, (*above, real)) for child in children)


def _children(folder: Path, most: int) -> tuple[list[Path], int]:
    """The folders among the first `most` entries, sorted, and how many entries there were.

    Hidden folders are left out: a downloader keeps its own files there.
    """
    try:
        with os.scandir(folder) as opened:
            entries = list(islice(opened, most))
    except OSError:  # it went away, or may not be read
        return [], 0
    visible = (entry for entry in entries if not entry.name.startswith("."))
    return sorted(Path(entry.path) for entry in visible if _is_folder(entry)), len(entries)


def _is_folder(entry: os.DirEntry) -> bool:
    """`entry.is_dir` alone raises at a link to itself; `isdir` alone looks at every file."""
    return os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir()


# ---- hub caches --------------------------------------------------------------------------------


def _repository_of(root: Path) -> Path | None:
    """The `models--org--name` that a root is, or of which it is a snapshot."""
    for folder, expected in ((root, True), (root.parent.parent, root.parent.name == "snapshots")):
        if expected and folder.name.startswith(HUB_PREFIX):
            return folder
    return None


def _hub_name(repository: Path) -> str:
    return repository.name.removeprefix(HUB_PREFIX).replace("--", "/")


def _main_snapshot(repository: Path) -> Path:
    """The snapshot of refs/main; where it is missing, the newest one or the repository itself."""
    snapshots, _ = _children(repository / "snapshots", MAX_IN_FOLDER)
    main = _revision(repository / "refs" / "main")
    newest = max(snapshots, key=lambda folder: folder.stat().st_mtime, default=repository)
    return next((folder for folder in snapshots if folder.name == main), newest)


def _revision(file: Path) -> str | None:
    try:
        with file.open("rb") as opened:
            return opened.read(100).decode(errors="replace").strip()
    except OSError:
        return None
