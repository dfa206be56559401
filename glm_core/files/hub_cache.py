"""Folders of a hub's cache: `models--org--name`, with a folder of each revision in `snapshots/`."""

from pathlib import Path

from .listing import list_folder

PREFIX = "models--"


def repository_of(folder: Path) -> Path | None:
    """The `models--org--name` that a folder is, or of which it is a snapshot."""
    below = folder.parent.name == "snapshots"
    for candidate, expected in ((folder, True), (folder.parent.parent, below)):
        if expected and candidate.name.startswith(PREFIX):
            return candidate
    return None


def hub_name(repository: Path) -> str:
    return repository.name.removeprefix(PREFIX).replace("--", "/")


def main_snapshot(repository: Path) -> Path:
    """The snapshot of refs/main; where it is missing, the newest one or the repository itself."""
    snapshots = list_folder(repository / "snapshots").folders
    main = _revision(repository / "refs" / "main")
    newest = max(snapshots, key=lambda folder: folder.stat().st_mtime, default=repository)
    return next((folder for folder in snapshots if folder.name == main), newest)


def _revision(file: Path) -> str | None:
    try:
        with file.open("rb") as opened:
            return opened.read(100).decode(errors="replace").strip()
    except OSError:
        return None
