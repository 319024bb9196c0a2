"""Making a domain's output fit for the user's terminal.

Theory. A terminal obeys what it is sent: it can be told to answer (and its answer is typed into the
shell of the user), to set the clipboard or the title, to report its contents. So the stream is read
with the grammar of ECMA-48, and only sequences that move the cursor, colour, erase and scroll pass.
Everything else (OSC, DCS, APC, PM, SOS, requests for reports, C1 controls also when they are
written as UTF-8, other modes) is dropped. No sequence longer than a bound is held.

What passed may leave the terminal in a state that deceives its user afterwards: text that is not
shown, another screen, no cursor, letters drawn as lines. ``undo`` tells what puts that back.
"""

from __future__ import annotations

import re

GROUND, ESCAPE, CSI, INTERMEDIATE, STRING, STRING_ESCAPE = range(6)
MAX_SEQUENCE = 64

_PLAIN_CONTROLS = frozenset(b"\x07\x08\x09\x0a\x0d")
_PLAIN_RUN = re.compile(rb"[\x07-\x0a\x0d\x20-\x7e]+")
# Cursor, erase, insert and delete, colours, scroll region.
_CSI_FINALS = frozenset(b"@ABCDEFGHJKLMPSTXZ`adefmr")
_ESCAPE_FINALS = frozenset(b"78=>DEHM")
# Cursor keys, wrap, blink, cursor, alternate screen, bracketed paste.
_PRIVATE_MODES = frozenset((1, 7, 12, 25, 47, 1047, 1048, 1049, 2004))
_USUALLY_ON = (b"?7", b"?25")
_CHARSETS = frozenset((b"(B", b"(0", b")B", b")0"))
_STRING_STARTS = frozenset(b"]PX^_")  # OSC, DCS, SOS, PM, APC
_PARAMETERS = frozenset(b"0123456789;:")


class EscapeFilter:
    """A stream filter; ``feed`` takes any cut of the stream and returns what may be shown."""

    def __init__(self) -> None:
        """Begin outside of any sequence."""
        self._state = GROUND
        self._held = bytearray()
        self._utf8 = bytearray()
        self._needed = 0
        # What was changed and not put back: what it is -> what puts it back.
        self._changed: dict[bytes, bytes] = {}

    def undo(self) -> bytes:
        """Return what the terminal is to be sent behind the last output; works once."""
        undone = b"".join(self._changed.values())
        self._changed.clear()
        return undone

    def feed(self, untrusted_data: bytes) -> bytes:
        """Return what of ``untrusted_data`` (and of what was held) the terminal may be sent."""
        out = bytearray()
        at, end = 0, len(untrusted_data)
        while at < end:
            if self._state == GROUND and not self._needed:
                plain = _PLAIN_RUN.match(untrusted_data, at)  # most of what is shown, at once
                if plain:
                    out += plain.group()
                    at = plain.end()
                    continue
            self._step(untrusted_data[at], out)
            at += 1
        return bytes(out)

    def _step(self, byte: int, out: bytearray) -> None:
        if byte == 0x1B and self._state not in (STRING, STRING_ESCAPE):
            self._begin(ESCAPE)
        elif byte in (0x18, 0x1A):  # CAN and SUB end any sequence
            self._state = GROUND
        elif self._state == GROUND:
            self._ground(byte, out)
        elif self._state == ESCAPE:
            self._escape(byte, out)
        elif self._state == CSI:
            self._csi(byte, out)
        elif self._state == INTERMEDIATE:
            self._intermediate(byte, out)
        else:
            self._string(byte)

    def _begin(self, state: int) -> None:
        self._state = state
        self._held.clear()
        self._needed = 0

    def _ground(self, byte: int, out: bytearray) -> None:
        if self._needed:
            if byte & 0xC0 == 0x80:
                self._utf8.append(byte)
                self._needed -= 1
                if not self._needed:
                    self._character(out)
                return
            self._needed = 0
        if byte >= 0x80:
            self._utf8[:] = bytes((byte,))
            self._needed = 1 if 0xC2 <= byte < 0xE0 else 2 if 0xE0 <= byte < 0xF0 else 0
            if 0xF0 <= byte < 0xF5:
                self._needed = 3
        elif byte in _PLAIN_CONTROLS or 0x20 <= byte < 0x7F:
            out.append(byte)

    def _character(self, out: bytearray) -> None:
        """Show one character beyond ASCII, unless it is a control or turns text around."""
        try:
            character = bytes(self._utf8).decode()
        except UnicodeDecodeError:
            return
        code = ord(character)
        if code < 0xA0 or 0x202A <= code <= 0x202E or 0x2066 <= code <= 0x2069:
            return
        out += self._utf8

    def _escape(self, byte: int, out: bytearray) -> None:
        if byte == ord("["):
            self._begin(CSI)
        elif byte in _STRING_STARTS:
            self._begin(STRING)
        elif 0x20 <= byte < 0x30:
            self._begin(INTERMEDIATE)
            self._held.append(byte)
        else:
            self._state = GROUND
            if byte in _ESCAPE_FINALS:
                out += bytes((0x1B, byte))
                if byte in b"=>":
                    self._changed[b"="] = b"\x1b>"

    def _csi(self, byte: int, out: bytearray) -> None:
        if 0x20 <= byte < 0x40:
            if len(self._held) < MAX_SEQUENCE:
                self._held.append(byte)
            return
        self._state = GROUND
        if len(self._held) < MAX_SEQUENCE and 0x40 <= byte < 0x7F and self._allowed(byte):
            out += b"\x1b[" + self._held + bytes((byte,))
            self._note(byte)

    def _allowed(self, final: int) -> bool:
        parameters = bytes(self._held)
        if parameters[:1] == b"?" and final in b"hl":
            numbers = parameters[1:].split(b";")
            return all(number.isdigit() and int(number) in _PRIVATE_MODES for number in numbers)
        if final in b"hl":
            return parameters == b"4"  # insert mode
        return final in _CSI_FINALS and all(byte in _PARAMETERS for byte in parameters)

    def _note(self, final: int) -> None:
        """Remember what a sequence that passed has changed."""
        parameters = bytes(self._held)
        if final == ord("m"):
            self._changed[b"m"] = b"\x1b[0m"
        elif final == ord("r"):
            # To set the scroll region moves the cursor.
            self._changed[b"r"] = b"\x1b7\x1b[r\x1b8"
        elif final in b"hl":
            private = b"?" if parameters[:1] == b"?" else b""
            for number in map(int, parameters.lstrip(b"?").split(b";")):
                mode = b"%s%d" % (private, number)
                usual = b"h" if mode in _USUALLY_ON else b"l"
                self._changed.pop(mode, None)
                if final != usual[0]:
                    self._changed[mode] = b"\x1b[" + mode + usual

    def _intermediate(self, byte: int, out: bytearray) -> None:
        if 0x20 <= byte < 0x30:
            if len(self._held) < MAX_SEQUENCE:
                self._held.append(byte)
            return
        self._state = GROUND
        sequence = bytes(self._held) + bytes((byte,))
        if sequence in _CHARSETS:
            out += b"\x1b" + sequence
            self._changed[sequence[:1]] = b"\x1b" + sequence[:1] + b"B"

    def _string(self, byte: int) -> None:
        """Swallow a string up to BEL or ESC \\; nothing of it is kept."""
        if self._state == STRING_ESCAPE:
            self._state = GROUND if byte == ord("\\") else STRING
        elif byte == 0x07:
            self._state = GROUND
        elif byte == 0x1B:
            self._state = STRING_ESCAPE
