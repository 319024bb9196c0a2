"""Both ends of a call: a letter that is sent, and a box that takes it."""

from plugins import (
    QrexecDestinationPlugin,
    QrexecSourcePlugin,
    read_full_noblock,
    read_noblock,
    write_noblock,
)


class QrexecSourcePlugin_letter(QrexecSourcePlugin):
    async def communicate_src(self, src_r, src_w):
        await write_noblock(src_w, self.config["text"].encode())
        src_w.close()
        with open(self.config["answer"], "wb") as out:
            out.write(await read_full_noblock(src_r, 1 << 20))


class QrexecDestinationPlugin_letter(QrexecDestinationPlugin):
    async def communicate_dst(self, dst_r, dst_w):
        size = 0
        while True:
            data = await read_noblock(dst_r)
            if not data:
                break
            size += len(data)
            with open(self.config["box"], "ab") as out:
                out.write(data)
        await write_noblock(dst_w, b"%d bytes for %s" % (size, self.meta["dst"].encode()))
        dst_w.close()
