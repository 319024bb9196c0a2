"""The data, in the log."""

from __future__ import annotations

from sluice.proxy.options import OptionError, SizeLimit
from sluice.proxy.verdicts import DST2SRC, PASS, PASS_REST, SRC2DST, Direction
from sluice.wire.names import escape

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Literal

    from sluice.proxy.link import Link
    from sluice.proxy.verdicts import Answer

# Bytes of data in one line of the log.
_LINE = 480


class Sniff:
    """Logs the data of both directions, so that it can be shown on any terminal.

    Whatever is not printable ASCII is escaped. The log of a call is bounded (``log_lines``), so a
    fast call is logged in part only; the filter ``record`` keeps all of it.
    """

    name = "sniff"
    inspects = (SRC2DST, DST2SRC)

    class Options:
        """What can be set.

        decode: how the bytes are written
        encoding: what text is encoded in, where decode is string
        max_bytes: bytes of each direction that are logged; -1 for all
        """

        decode: Literal["base64", "hex", "string"] = "base64"
        encoding: str = "utf-8"
        max_bytes: SizeLimit = -1

    @staticmethod
    def check(options: Options) -> None:
        """See that the encoding exists."""
        try:
            bytes(range(256)).decode(options.encoding, "backslashreplace")
        except UnicodeError:
            text = f"'{options.encoding}' cannot show every byte"
            raise OptionError("encoding", text) from None
        except (LookupError, ValueError):
            raise OptionError("encoding", f"'{options.encoding}' is no known encoding") from None

    def __init__(self, options: Options, link: Link) -> None:
        """Take the options."""
        self._link = link
        self._options = options
        limit = options.max_bytes
        self._left: list[int | None] = [None, None] if limit < 0 else [limit, limit]

    def data(self, direction: Direction, chunk: memoryview) -> Answer:
        """Log what is still to be logged."""
        left = self._left[direction]
        shown = bytes(chunk if left is None else chunk[:left])
        for start in range(0, len(shown), _LINE):
            text = self._decode(shown[start : start + _LINE])
            self._link.log(f"{direction}: {escape(text, 4 * _LINE)}")
        if left is None:
            return PASS
        self._left[direction] = left - len(shown)
        return PASS if left > len(shown) else PASS_REST

    def _decode(self, data: bytes) -> str:
        if self._options.decode == "hex":
            return data.hex(" ")
        if self._options.decode == "base64":
            import binascii

            return binascii.b2a_base64(data, newline=False).decode("ascii")
        return data.decode(self._options.encoding, "backslashreplace")
