"""qrexec-daemon in this process, where its deadlines can be short."""

from __future__ import annotations

import asyncio
import contextlib
import socket

import pytest
from tests.support.adminvm import hello, short_directory
from tests.support.qrexec_daemon import listener

from sluice.adminvm import daemon as program
from sluice.adminvm.daemon_options import Options


@pytest.mark.spec("WIRE-036")
@pytest.mark.parametrize("said", [b"", hello(4)[:11]])
def test_an_agent_that_does_not_greet_ends_the_daemon(
    said: bytes, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(program, "HANDSHAKE_PATIENCE", 0.05)
    with short_directory() as directory, monkeypatch.context() as patch:
        patch.chdir(directory)
        patch.setenv("VCHAN_SOCKET_DIR", str(directory))
        patch.setenv("VCHAN_DOMAIN", "0")
        with listener(directory / "vchan.42.0.512.sock") as listening:

            async def main() -> int:
                life = asyncio.ensure_future(program.Daemon(Options(42, "src", "u")).run())
                agent: socket.socket = (await asyncio.to_thread(listening.accept))[0]
                with agent:
                    # It may have lost its patience by now.
                    with contextlib.suppress(BrokenPipeError):
                        agent.sendall(said)
                    return await asyncio.wait_for(life, 30)

            assert asyncio.run(main()) == 1
    assert "no proper handshake" in capsys.readouterr().err
