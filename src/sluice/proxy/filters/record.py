"""The whole call, in a file."""

from __future__ import annotations

from sluice.proxy.options import OptionError, Size
from sluice.proxy.recording import (
    END,
    END_OF,
    Recording,
    RecordingError,
    others_can_write,
    space,
    used,
)
from sluice.proxy.verdicts import CONTINUE, DST2SRC, PASS, SRC2DST, Abort, Direction, Refuse

TYPE_CHECKING = False
if TYPE_CHECKING:
    from sluice.proxy.link import Call, Link
    from sluice.proxy.stage import Cause
    from sluice.proxy.verdicts import Answer


# Calls that are recorded at the same time share the quota: each looks at it again and again.
_LOOK = 1 << 20


class Record:
    """Writes both directions of the call, with times and ends, to a file of its own.

    It records what passes at its place in the chain. The file has a random name, mode 0600, and is
    never made through a link. ``sluice proxy show`` prints it, ``sluice proxy replay`` makes the
    same call again. A call that cannot be recorded whole is aborted: also when the disk is full or
    the quota is used up.
    """

    name = "record"
    inspects = (SRC2DST, DST2SRC)

    class Options:
        """What can be set.

        directory: where the files are made; only we may write there
        max_bytes: the most that one call may record
        quota: the most that all records of the directory may take
        """

        directory: str
        max_bytes: Size = 64 << 20
        quota: Size = 1 << 30

    @staticmethod
    def check(options: Options) -> None:
        """See that the directory is there."""
        import os

        if not os.path.isabs(options.directory) or not os.path.isdir(options.directory):
            raise OptionError("directory", f"'{options.directory}' is no absolute directory")
        if others_can_write(os.stat(options.directory)):
            raise OptionError("directory", f"'{options.directory}' can be written by others")

    def __init__(self, options: Options, link: Link) -> None:
        """Take the options; the file is made when the call is opened."""
        self._options = options
        self._link = link
        self._file: Recording | None = None
        self._begun = 0.0
        self._looked = 0

    def opened(self, call: Call) -> Answer:
        """Make the file."""
        self._begun = self._link.time()
        about = {
            "source": call.source,
            "target": call.target,
            "service": call.service,
            "argument": call.argument,
            "chain": call.chain,
            "id": call.ident,
            "time": self._link.wall_time(),
        }
        try:
            self._file = Recording(self._options.directory, about, self._allowance(0))
        except OSError as error:
            return Refuse(f"cannot record: {error.strerror}")
        self._link.log(f"recorded in {self._file.path}")
        return CONTINUE

    def data(self, direction: Direction, chunk: memoryview) -> Answer:
        """Record bytes, then let them pass."""
        return self._record(int(direction), chunk) or PASS

    def eof(self, direction: Direction) -> Answer:
        """Record the end of a direction."""
        return self._record(END_OF + direction, b"") or PASS

    def closed(self, cause: Cause) -> None:
        """Record how the call ended."""
        if self._file is not None:
            try:
                self._file.frame(END, self._now(), str(cause).encode("ascii", "replace"))
            except RecordingError as error:
                # The cause of the end may be that very thing.
                self._link.log(f"the record has no end: {error.strerror}")
            self._file.close()

    def _allowance(self, own: int) -> int:
        """Return how large the record may become; ``own`` bytes of it are there. Raises OSError."""
        left = self._options.quota - used(self._options.directory) + space(own)
        return min(self._options.max_bytes, max(left, 0))

    def _record(self, kind: int, payload: bytes | memoryview) -> Abort | None:
        assert self._file is not None
        step = min(_LOOK, self._options.quota // 64)
        try:
            if self._file.size + len(payload) - self._looked > step:
                self._looked = self._file.size
                self._file.allowance = self._allowance(self._looked)
        except OSError as error:
            return Abort(f"cannot record: {error.strerror}")
        try:
            self._file.frame(kind, self._now(), payload)
        except RecordingError as error:
            return Abort(f"cannot record: {error.strerror}")
        return None

    def _now(self) -> float:
        return self._link.time() - self._begun
