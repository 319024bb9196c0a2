"""Kinds of content by their first bytes."""

from __future__ import annotations

# (offset, bytes, kind); the first that fits. Longer and rarer ones stand before shorter ones.
_MAGIC = (
    (0, b"%PDF-", "pdf"),
    (0, b"\x89PNG\r\n\x1a\n", "png"),
    (0, b"\xff\xd8\xff", "jpeg"),
    (0, b"GIF87a", "gif"),
    (0, b"GIF89a", "gif"),
    (0, b"II*\x00", "tiff"),
    (0, b"MM\x00*", "tiff"),
    (0, b"\x00\x00\x01\x00", "ico"),
    (0, b"PK\x03\x04", "zip"),
    (0, b"PK\x05\x06", "zip"),
    (0, b"\x1f\x8b", "gzip"),
    (0, b"BZh", "bzip2"),
    (0, b"\xfd7zXZ\x00", "xz"),
    (0, b"\x28\xb5\x2f\xfd", "zstd"),
    (0, b"7z\xbc\xaf\x27\x1c", "7z"),
    (0, b"Rar!\x1a\x07", "rar"),
    (257, b"ustar", "tar"),
    (0, b"!<arch>\n", "ar"),
    (0, b"\x7fELF", "elf"),
    (0, b"MZ", "pe"),
    (0, b"\xca\xfe\xba\xbe", "java"),
    (0, b"\xfe\xed\xfa\xce", "macho"),
    (0, b"\xfe\xed\xfa\xcf", "macho"),
    (0, b"\xce\xfa\xed\xfe", "macho"),
    (0, b"\xcf\xfa\xed\xfe", "macho"),
    (0, b"\x00asm", "wasm"),
    (0, b"#!", "script"),
    (0, b"OggS", "ogg"),
    (0, b"fLaC", "flac"),
    (0, b"ID3", "mp3"),
    (0, b"\x1aE\xdf\xa3", "matroska"),
    (4, b"ftyp", "mp4"),
    (0, b"SQLite format 3\x00", "sqlite"),
    (0, b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "ole"),
    (0, b"{\\rtf", "rtf"),
    (0, b"%!PS", "postscript"),
    (0, b"-----BEGIN PGP", "pgp"),
    (0, b"BM", "bmp"),
)
_RIFF = {b"WEBP": "webp", b"WAVE": "wav", b"AVI ": "avi"}

GROUPS: dict[str, tuple[str, ...]] = {
    "image": ("png", "jpeg", "gif", "webp", "bmp", "tiff", "ico", "svg"),
    "archive": ("zip", "gzip", "bzip2", "xz", "zstd", "7z", "rar", "tar", "ar"),
    "office": ("ooxml", "odf", "ole", "rtf"),
    "document": ("pdf", "postscript", "ooxml", "odf", "ole", "rtf", "html"),
    "executable": ("elf", "pe", "macho", "java", "wasm", "script"),
    "audio": ("ogg", "flac", "mp3", "wav"),
    "video": ("mp4", "matroska", "avi"),
    "markup": ("html", "xml", "svg"),
}
KINDS = tuple(
    dict.fromkeys(
        [kind for _, _, kind in _MAGIC]
        + list(_RIFF.values())
        + [kind for kinds in GROUPS.values() for kind in kinds]
        + ["json", "text", "empty", "unknown"]
    )
)

# Text: no control characters but these.
_TEXT_CONTROL = bytes(byte for byte in range(32) if byte not in b"\t\n\r\f\x1b") + b"\x7f"


def kind_of(preview: bytes) -> str:
    """Return the kind of what begins with ``preview``: one of KINDS."""
    if not preview:
        return "empty"
    if preview[:4] == b"RIFF" and preview[8:12] in _RIFF:
        return _RIFF[preview[8:12]]
    for offset, magic, kind in _MAGIC:
        if preview.startswith(magic, offset):
            if kind == "zip":
                return _zip_kind(preview)
            if kind == "bmp" and preview[6:10] != b"\0\0\0\0":
                continue
            return kind
    return _text_kind(preview)


def _zip_kind(preview: bytes) -> str:
    name = preview[30:].lstrip()
    if name.startswith(b"mimetypeapplication/vnd.oasis.opendocument"):
        return "odf"
    if name.startswith((b"[Content_Types].xml", b"_rels/", b"docProps/")):
        return "ooxml"
    return "zip"


def _text_kind(preview: bytes) -> str:
    """Tell texts apart; a character cut off at the end of the preview does not matter."""
    try:
        preview.decode("utf-8")
    except UnicodeDecodeError as error:
        if len(preview) - error.start > 3 or error.reason != "unexpected end of data":
            return "unknown"
    if preview.translate(None, _TEXT_CONTROL) != preview:
        return "unknown"
    start = preview.lstrip(b"\xef\xbb\xbf \t\r\n")[:1024].lower()
    if start.startswith((b"<!doctype html", b"<html")):
        return "html"
    if start.startswith((b"<svg", b"<?xml")):
        return "svg" if b"<svg" in start else "xml"
    follows = b'"}' if start[:1] == b"{" else b'"{[]0123456789-tfn'
    if start[:1] in (b"{", b"[") and start[1:].lstrip()[:1] in follows:
        return "json"
    return "text"
