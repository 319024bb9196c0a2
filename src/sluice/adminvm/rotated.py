"""A file that only grows at its end, is rotated by size, and of which few old ones are kept."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable


class RotatedFile:
    """An append-only file, mode 0600. A full disk loses lines, is said once, and stops nobody."""

    def __init__(
        self,
        path: str | os.PathLike[str],
        max_bytes: int = 16 << 20,
        keep: int = 4,
        *,
        on_trouble: Callable[[str], None] | None = None,
    ) -> None:
        """Open or create ``path``; keep ``keep`` old files ``path.1`` (the newest) and on.

        ``on_trouble`` is told, once for each spell of it, that lines are lost. Raises OSError
        where the file cannot be opened now.
        """
        self.path = os.fspath(path)
        self.lost = 0
        self.written = 0
        self._max_bytes = max_bytes
        self._keep = keep
        self._on_trouble = on_trouble
        self._fd = -1
        self._size = 0
        self._troubled = False
        self._open()

    def append(self, line: bytes) -> None:
        """Append one whole line, newline included, by one write."""
        try:
            if self._size and self._size + len(line) > self._max_bytes:
                self._rotate()
            if self._fd < 0:
                self._open()
            self._size += os.write(self._fd, line)
            self.written += 1
            self._troubled = False
        except OSError as error:
            self.lost += 1
            if not self._troubled and self._on_trouble:
                self._on_trouble(f"{self.path} loses lines: {error.strerror}")
            self._troubled = True

    def close(self) -> None:
        """Close the file."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _open(self) -> None:
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        self._fd = os.open(self.path, flags, 0o600)
        self._size = os.fstat(self._fd).st_size

    def _rotate(self) -> None:
        self.close()
        for number in range(self._keep, 0, -1):
            newer = self.path if number == 1 else f"{self.path}.{number - 1}"
            with contextlib.suppress(FileNotFoundError):
                os.replace(newer, f"{self.path}.{number}")
        if self._keep == 0:
            os.unlink(self.path)
        self._open()
