"""Puts a line of what is known of the call before what the source sends."""

import asyncio

from plugins import QrexecProxyPlugin, connect_noblock, write_noblock
from plugins.caesar import shifted


class QrexecProxyPlugin_banner(QrexecProxyPlugin):
    async def proxy(self, src_r, src_w, dst_r, dst_w):
        meta = self.meta
        line = f"{meta['chain']} {meta['src']}>{meta['dst']} {meta['qrexec']}\n"
        data = line.encode()
        if self.config.get("secret"):
            data = shifted(data, 13)
        await write_noblock(dst_w, data)
        await asyncio.gather(connect_noblock(src_r, dst_w), connect_noblock(dst_r, src_w))
