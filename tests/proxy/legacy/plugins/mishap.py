"""Goes wrong in the ways that its configuration names."""

import asyncio
import time

from plugins import QrexecProxyPlugin, connect_noblock, write_noblock


class QrexecProxyPlugin_mishap(QrexecProxyPlugin):
    async def proxy(self, src_r, src_w, dst_r, dst_w):
        how = self.config["how"]
        await write_noblock(src_w, b"on\n")
        if how == "raise":
            [][1]
        if how == "exit":
            raise SystemExit(0)
        if how == "block":
            time.sleep(60)
        if how == "spin":
            while True:
                pass
        if how == "return":
            return
        if how == "print":
            print("printed")
        if how == "flood":
            # Writes without waiting, and closes.
            for _ in range(64):
                src_w.write(b"x" * 65536)
            src_w.close()
        await asyncio.gather(connect_noblock(src_r, dst_w), connect_noblock(dst_r, src_w))
