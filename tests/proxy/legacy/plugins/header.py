"""Wants four bytes first; what the target answers is thrown away."""

import asyncio

from plugins import (
    AbortException,
    QrexecProxyPlugin,
    connect_noblock,
    discard_noblock,
    read_full_noblock,
)


class QrexecProxyPlugin_header(QrexecProxyPlugin):
    async def proxy(self, src_r, src_w, dst_r, dst_w):
        head = await read_full_noblock(src_r, 4)
        if head != self.config["magic"].encode():
            raise AbortException(f"wrong header {head!r}")
        src_w.close()
        await asyncio.gather(connect_noblock(src_r, dst_w), discard_noblock(dst_r))
