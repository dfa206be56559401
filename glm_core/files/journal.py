"""The journal of a file that is being written: a checksum of every complete tensor.

A run that follows an interrupted one believes the checksums alone: after a power cut a file may
have its length and hold zeros. The journal is locked while a run writes, so that a second run of
the same file ends in a sentence.
"""

import hashlib
import os
from pathlib import Path
from types import TracebackType
from typing import Any

from ..errors import FileError

SLICE = 2**24
"""Bytes that are read at once."""
LOCKED_BYTE = 2**40
"""Windows locks a range of bytes, which nobody else may read."""


class Journal:
    """The journal beside `partial`, a file that begins with `header`.

    Its lines are SHA-256 in hex: the header's, then one per complete tensor.

    Args:
        changed: when the source was last changed; an older journal is not believed.

    Raises:
        GLMImageError: another run writes the file.
    """

    def __init__(self, partial: Path, header: bytes, changed: float) -> None:
        self.partial, self.header, self.changed = partial, header, changed
        self.path = partial.with_name(f"{partial.name}.journal")
        self.stream: Any = None

    def __enter__(self) -> "Journal":
        self.stream = self.path.open("a+b")
        try:
            _lock(self.stream)
            # The other run may have finished, and removed the journal, since it was opened.
            if not os.path.samestat(os.fstat(self.stream.fileno()), os.stat(self.path)):
                raise OSError
        except OSError as error:
            self.stream.close()
            raise FileError(
                f"Another run writes {self.partial}; wait until it has finished."
            ) from error
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        over = not self.partial.is_file()  # complete, or never begun
        if over and os.name != "nt":  # while it is locked, as another run may follow
            self.path.unlink()
        self.stream.close()
        if over and os.name == "nt":  # which removes no open file
            self.path.unlink(missing_ok=True)

    def resume(self, sizes: list[int]) -> int:
        """Count the complete tensors of an interrupted run, and cut off what follows them.

        Args:
            sizes: of all tensors, in bytes.
        """
        sums, header = self._believed(), hashlib.sha256(self.header).hexdigest()
        if not sums or sums[0] != header or not self.partial.is_file():
            self._rewrite([header])
            return 0
        with self.partial.open("r+b") as file:
            end = 0
            for count, size in enumerate((len(self.header), *sizes)):
                if count == len(sums) or _sum_of(file, size) != sums[count]:
                    break
                end += size
            else:
                count = len(sizes) + 1
            file.truncate(end)
        self._rewrite(sums[:count] or [header])
        return max(count - 1, 0)

    def add(self, tensor: Any) -> None:
        """Note a complete tensor by its `hashlib` object."""
        self.stream.write(f"{tensor.hexdigest()}\n".encode())
        self.stream.flush()

    def _believed(self) -> list[str]:
        if os.fstat(self.stream.fileno()).st_mtime < self.changed:
            return []
        self.stream.seek(0)
        return self.stream.read().decode(errors="replace").splitlines()

    def _rewrite(self, sums: list[str]) -> None:
        self.stream.seek(0)
        self.stream.truncate()
        self.stream.write("".join(f"{line}\n" for line in sums).encode())
        self.stream.flush()


def _sum_of(file: Any, size: int) -> str:
    """The checksum of the next `size` bytes, or of those that are left."""
    found = hashlib.sha256()
    while size and (data := file.read(min(size, SLICE))):
        found.update(data)
        size -= len(data)
    return found.hexdigest()


def _lock(stream: Any) -> None:
    """Lock an open file until it is closed. OSError: somebody else has."""
    if os.name == "nt":
        import msvcrt

        stream.seek(LOCKED_BYTE)
        msvcrt.locking(stream.fileno(), msvcrt.LK_NBLCK, 1)
    else:
        import fcntl

        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
