"""Shifts the letters of what the source sends; the answer is shifted back."""

import asyncio

from plugins import QrexecProxyPlugin, flush_noblock, read_noblock, write_noblock


def shifted(data, by):
    """Return ASCII letters shifted in the alphabet, all else as it is."""
    return bytes(
        (c - base + by) % 26 + base
        if (base := 97 if 97 <= c <= 122 else 65) <= c < base + 26
        else c
        for c in data
    )


class QrexecProxyPlugin_caesar(QrexecProxyPlugin):
    def __init__(self, logger, meta, config=None):
        super().__init__(logger, meta, config=config)
        self.by = int(self.config.get("by", 13))

    async def shift(self, reader, writer, by):
        while True:
            data = await read_noblock(reader)
            if not data:
                break
            await write_noblock(writer, shifted(data, by))
            await flush_noblock(writer)
        writer.close()

    async def proxy(self, src_r, src_w, dst_r, dst_w):
        self.logger.info("shifting by %d for %s", self.by, self.meta["src"])
        await asyncio.gather(self.shift(src_r, dst_w, self.by), self.shift(dst_r, src_w, -self.by))
