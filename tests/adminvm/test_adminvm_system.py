"""The AdminVM as a whole: starts and ends of domains, every ending of a call, its own socket."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import signal
import socket
import stat
import struct
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from tests.support.adminvm import (
    EXEC_CMDLINE,
    SERVICE_CONNECT,
    SERVICE_REFUSED,
    TERMINATED,
    AgentSandbox,
    PlayedJudge,
    PlayedRun,
    PlayedSandbox,
    adminvm,
    domain,
    exec_body,
    hello,
    message,
    open_descriptors,
    short_directory,
    trigger4,
    until,
)
from tests.support.processes import Seen

from sluice.adminvm import api
from sluice.adminvm.decision import Decision
from sluice.adminvm.judge import Ruling
from sluice.adminvm.link import Request
from sluice.adminvm.system import AdminVM
from sluice.domains.model import DomainConfig
from sluice.errors import LocalError, RemoteError, ResourceError, SluiceError
from sluice.policy.files import PolicyStore
from sluice.wire.names import Trigger


class World:
    """A running AdminVM and what the tests ask of it."""

    def __init__(self, directory: Path, system: AdminVM, sandbox: Any) -> None:
        self.directory = directory
        self.system = system
        self.sandbox = sandbox

    def records(self) -> list[dict[str, Any]]:
        text = (self.directory / "state/log/audit.jsonl").read_text()
        return [json.loads(line) for line in text.splitlines()]

    async def recorded(self, count: int = 1) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = await until(
            lambda: len(self.records()) >= count and self.records(), f"{count} records"
        )
        return found

    async def start(self, name: str) -> PlayedRun:
        await self.system.start_domain(name)
        run: PlayedRun = self.sandbox.runs[name]
        await run.greeted()
        return run


Scene = Callable[[World], Awaitable[None]]
ABC = [domain("a", 7, "played"), domain("b", 8, "played"), domain("c", 9, "played")]


def play(
    scene: Scene,
    judge: Any = None,
    sandbox: Any = None,
    domains: list[DomainConfig] | None = None,
    **options: Any,
) -> None:
    async def main() -> None:
        with short_directory() as directory:
            played = PlayedJudge()
            for name in ("a", "b", "c", "dom0"):
                played.allow(name)
            played.allow("sleepy", to="b", autostart=False)
            box = sandbox or PlayedSandbox()
            policy = judge(directory) if judge else played
            async with adminvm(directory, domains or ABC, box, policy, **options) as system:
                async with asyncio.timeout(60):
                    await scene(World(directory, system, box))

    asyncio.run(main())


# --- starting and ending domains ----------------------------------------------------------------


def test_two_that_ask_at_once_get_the_same_start() -> None:
    async def scene(world: World) -> None:
        first, second = await asyncio.gather(
            world.system.start_domain("a"), world.system.start_domain("a")
        )
        assert first is second
        assert world.system.state("a") == "Running"
        assert await world.system.start_domain("a") is first

    play(scene)


@pytest.mark.parametrize("name", ["nobody", "dom0", "remote", "odd"])
def test_what_cannot_be_started(name: str) -> None:
    async def scene(world: World) -> None:
        with pytest.raises(LocalError):
            await world.system.start_domain(name)

    domains = [domain("remote", 10, "played", klass="RemoteVM"), domain("odd", 11, "unknown")]
    play(scene, domains=domains)


def test_an_agent_that_does_not_answer() -> None:
    async def scene(world: World) -> None:
        before = open_descriptors()
        with pytest.raises(ResourceError, match="within 0"):
            await world.system.start_domain("slow")
        await until(lambda: world.system.state("slow") == "Halted", "the end")
        assert world.sandbox.runs["slow"].cleaned
        await until(lambda: open_descriptors() <= before, "descriptors to be closed")

    domains = [domain("slow", 10, "played", qrexec_timeout=0)]
    play(scene, sandbox=PlayedSandbox(greet=None), domains=domains)


@pytest.mark.parametrize("first", [hello(1), b"nonsense", b""])
def test_an_agent_that_answers_wrongly(first: bytes) -> None:
    async def scene(world: World) -> None:
        async def agent() -> None:
            await world.sandbox.started.wait()
            run = world.sandbox.runs["a"]
            if first:
                run.send(first)
            else:
                run.end()

        talking = asyncio.ensure_future(agent())
        with pytest.raises(SluiceError):
            await world.system.start_domain("a")
        await talking
        await until(lambda: world.system.state("a") == "Halted", "the end")

    play(scene, sandbox=PlayedSandbox(greet=None))


@pytest.mark.alone
def test_the_end_does_not_wait_for_domains_that_start() -> None:
    async def main() -> None:
        with short_directory() as directory:
            sandbox = PlayedSandbox(greet=None)
            async with adminvm(directory, ABC, sandbox, PlayedJudge()) as system:
                starting = asyncio.ensure_future(system.start_domain("a"))
                await sandbox.started.wait()
                assert system.state("a") == "Transient"
                began = time.monotonic()
                await system.stop()
                assert time.monotonic() - began < 10
                with pytest.raises(LocalError):
                    await starting
                assert sandbox.runs["a"].cleaned
                with pytest.raises(LocalError, match="stops"):
                    await system.start_domain("b")

    asyncio.run(main())


def test_an_agent_that_breaks_the_protocol_is_not_given_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Stubborn(PlayedRun):
        async def wait(self) -> int:
            await until(lambda: self.killed, "the kill")
            return 0

    class StubbornSandbox(PlayedSandbox):
        async def start(self, domain: DomainConfig, control: socket.socket) -> PlayedRun:
            run = self.runs[domain.name] = Stubborn(control.dup())
            run.send(hello(4))
            return run

    monkeypatch.setattr("sluice.adminvm.system.GRACE", 1000)

    async def scene(world: World) -> None:
        a = await world.start("a")
        a.send(message(0x9999))
        await until(lambda: world.system.state("a") == "Halted", "the end")
        b = await world.start("b")
        b.wire.close()
        await until(lambda: world.system.state("b") == "Halting", "the begin of the end")
        await asyncio.sleep(0.1)
        # One whose channel merely ended may still tidy up.
        assert world.system.state("b") == "Halting"
        b.kill()

    play(scene, sandbox=StubbornSandbox())


def test_a_sandbox_that_fails_to_start() -> None:
    class Failing(PlayedSandbox):
        async def start(self, domain: DomainConfig, control: socket.socket) -> PlayedRun:
            raise ResourceError("no user namespaces")

    async def scene(world: World) -> None:
        before = open_descriptors()
        with pytest.raises(ResourceError, match="no user namespaces"):
            await world.system.start_domain("a")
        await until(lambda: world.system.state("a") == "Halted", "the end")
        await until(lambda: open_descriptors() <= before, "descriptors to be closed")

    play(scene, sandbox=Failing())


def test_what_cannot_be_cleaned_up_keeps_nobody_waiting() -> None:
    class Littered(PlayedSandbox):
        async def start(self, domain: DomainConfig, control: socket.socket) -> PlayedRun:
            run = await super().start(domain, control)
            clean = run.clean

            async def dirty() -> None:
                await clean()
                raise ResourceError("no process for it")

            run.clean = dirty  # type: ignore[method-assign]
            return run

    async def scene(world: World) -> None:
        await world.start("a")
        async with asyncio.timeout(20):
            await world.system.stop_domain("a")
        assert world.system.state("a") == "Halted"
        assert "no process for it" in world.system.paths.domain_log_file.read_text()
        await world.start("a")

    play(scene, sandbox=Littered())


def test_stop_then_start_again() -> None:
    async def scene(world: World) -> None:
        run = await world.start("a")
        stopping = asyncio.ensure_future(world.system.stop_domain("a"))
        await asyncio.sleep(0)
        assert world.system.state("a") == "Halting"
        again = asyncio.ensure_future(world.system.start_domain("a"))
        await stopping
        assert run.cleaned
        await again
        assert world.system.state("a") == "Running"
        await world.system.stop_domain("a", kill=True)
        assert world.sandbox.runs["a"].killed
        with pytest.raises(LocalError, match="powered off"):
            await world.system.stop_domain("a")

    play(scene)


def test_the_sockets_of_a_domain_come_and_go() -> None:
    async def scene(world: World) -> None:
        directory = world.system.paths.daemon_dir
        await world.start("a")
        assert set(os.listdir(directory)) == {
            "qrexec.a",
            "qrexec.7",
            "qrexec.uuid:00000000-0000-4000-8000-000000000007",
        }
        assert stat.S_IMODE(os.lstat(directory / "qrexec.7").st_mode) == 0o600
        await world.system.stop_domain("a")
        assert os.listdir(directory) == []

    play(scene)


def test_domains_with_autostart_run_from_the_beginning() -> None:
    async def scene(world: World) -> None:
        assert world.system.running() == {"a"}
        assert world.system.state("b") == "Halted"

    play(scene, domains=[domain("a", 7, "played", autostart=True), domain("b", 8, "played")])


# --- every ending of a call has one record ------------------------------------------------------


async def refused(world: World, run: PlayedRun, target: bytes, cause: str) -> dict[str, Any]:
    count = len(world.records())
    run.send(trigger4(target, b"test.Svc+x", b"I"))
    assert await run.receive() == (SERVICE_REFUSED, b"I".ljust(32, b"\0"), [])
    record = (await world.recorded(count + 1))[count]
    assert cause in record["cause"]
    assert (record["source"], record["service"], record["argument"]) == ("a", "test.Svc", "x")
    await asyncio.sleep(0.02)
    assert len(world.records()) == count + 1
    return record


def test_refusals_are_recorded() -> None:
    async def scene(world: World) -> None:
        a = await world.start("a")
        record = await refused(world, a, b"nobody", "NO-MATCH")
        assert (record["decision"], record["rule"]) == ("deny", None)
        record = await refused(world, a, b"sleepy", "does not run")
        assert (record["decision"], record["rule"]) == ("allow", "test.policy:1")
        await refused(world, a, b"a", "cannot call itself")

    play(scene)


def test_a_malformed_request_is_recorded() -> None:
    async def scene(world: World) -> None:
        a = await world.start("a")
        a.send(trigger4(b"b", b"", b"I"))
        assert (await a.receive())[0] == SERVICE_REFUSED
        (record,) = await world.recorded()
        assert (record["cause"], record["count"]) == ("empty service name", 1)

    play(scene)


def test_a_target_is_started_for_a_call() -> None:
    async def scene(world: World) -> None:
        a = await world.start("a")
        a.send(trigger4(b"b", b"s", b"I"))
        await until(lambda: world.system.state("b") == "Running", "the target")
        b = world.sandbox.runs["b"]
        await b.greeted()
        kind, body, fds = await b.receive()
        assert kind == EXEC_CMDLINE
        for fd in fds:
            os.close(fd)
        number = struct.unpack_from("<I", body, 4)[0]
        b.send(message(TERMINATED, exec_body(7, number)))
        a.send(message(TERMINATED, exec_body(8, number)))
        (record,) = await world.recorded()
        assert record["stages"]["target_ready"] >= record["stages"]["decided"]

    play(scene)


def test_a_target_that_cannot_be_started_refuses() -> None:
    class Half(PlayedSandbox):
        async def start(self, domain: DomainConfig, control: socket.socket) -> PlayedRun:
            if domain.name == "b":
                raise ResourceError("out of memory")
            return await super().start(domain, control)

    async def scene(world: World) -> None:
        a = await world.start("a")
        await refused(world, a, b"b", "out of memory")

    play(scene, sandbox=Half())


@pytest.mark.alone
def test_a_killed_domain_ends_the_calls_of_others_to_it() -> None:
    async def scene(world: World) -> None:
        a, b = await world.start("a"), await world.start("b")
        a.send(trigger4(b"b", b"s", b"I"))
        _, body, far = await b.receive()
        _, _, near = await a.receive()
        number = struct.unpack_from("<I", body, 4)[0]
        began = time.monotonic()
        killing = asyncio.ensure_future(world.system.stop_domain("b", kill=True))
        for fd in far:
            os.close(fd)  # what the kernel does for a killed process
        assert os.read(near[0], 1) == b""
        await killing
        assert time.monotonic() - began < 10
        assert world.records() == []
        a.send(message(TERMINATED, exec_body(8, number)))
        (record,) = await world.recorded()
        assert "b is gone: killed" in record["cause"]
        for fd in near:
            os.close(fd)

    play(scene)


def test_a_source_that_dies_is_recorded() -> None:
    async def scene(world: World) -> None:
        a, b = await world.start("a"), await world.start("b")
        a.send(trigger4(b"b", b"s", b"I"))
        _, body, far = await b.receive()
        number = struct.unpack_from("<I", body, 4)[0]
        await a.receive()
        a.end()
        await until(lambda: world.system.state("a") == "Halted", "the end of a")
        b.send(message(TERMINATED, exec_body(7, number)))
        (record,) = await world.recorded()
        assert "a is gone" in record["cause"]
        for fd in far:
            os.close(fd)

    play(scene)


def test_a_source_that_dies_before_the_decision() -> None:
    async def scene(world: World) -> None:
        a = await world.start("a")
        asked = asyncio.Event()
        decide = world.system._judge.decide

        async def slowly(*arguments: Any) -> Any:
            asked.set()
            await until(lambda: world.system.state("a") == "Halted", "the end of a")
            return await decide(*arguments)

        world.system._judge.decide = slowly  # type: ignore[method-assign]
        a.send(trigger4(b"b", b"s", b"I"))
        await asked.wait()
        a.end()
        (record,) = await world.recorded()
        assert record["cause"] == "the source is gone"

    play(scene)


def test_what_is_open_when_the_adminvm_stops_is_recorded() -> None:
    async def main() -> None:
        with short_directory() as directory:
            judge = PlayedJudge()
            judge.allow("b")
            judge.allow("dom0")
            sandbox = PlayedSandbox()
            async with adminvm(directory, ABC, sandbox, judge) as system:
                world = World(directory, system, sandbox)
                service = directory / "config/rpc/s"
                service.write_text("#!/bin/sh\nsleep 100\n")
                service.chmod(0o755)
                a, b = await world.start("a"), await world.start("b")
                a.send(trigger4(b"b", b"s", b"I"))
                await b.receive()
                a.send(trigger4(b"dom0", b"s", b"I"))
                run = system.run_of("a")
                assert run is not None
                call = system.dispatcher.open(run, b"u:x")
                await until(lambda: len(system.dispatcher.numbers) == 3, "three calls")
            records = world.records()
            assert [record["cause"] for record in records] == ["the AdminVM stops"] * 3
            assert call.ended.done()
            os.close(call.read_fd)
            os.close(call.write_fd)

    asyncio.run(main())


def test_an_error_of_ours_refuses_and_is_recorded() -> None:
    class Failing(PlayedJudge):
        async def decide(self, *arguments: Any) -> Ruling:
            raise ZeroDivisionError

    async def scene(world: World) -> None:
        a = await world.start("a")
        await refused(world, a, b"b", "internal error")

    play(scene, judge=lambda directory: Failing())


def test_without_descriptors_calls_are_refused_and_nothing_is_stuck(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def scene(world: World) -> None:
        from sluice.adminvm import dispatch

        a = await world.start("a")
        await world.start("b")
        real = dispatch.make_pair

        def none_left() -> Any:
            raise OSError(24, "Too many open files")

        monkeypatch.setattr(dispatch, "make_pair", none_left)
        await refused(world, a, b"b", "Too many open files")
        await refused(world, a, b"dom0", "Too many open files")
        path = str(world.system.paths.daemon_dir / "qrexec.a")
        reader, writer = await asyncio.open_unix_connection(path)
        writer.write(hello(3) + message(EXEC_CMDLINE, exec_body(0, 0, b"u:x\0")))
        assert await reader.read() == hello(3)
        writer.close()
        assert "Too many open files" in (await world.recorded(3))[2]["cause"]
        # A call that failed takes no place among those that live.
        assert [entry["calls"] for entry in world.system.describe()] == [0, 0, 0, 0]
        assert len(world.system.dispatcher.numbers) == 0
        monkeypatch.setattr(dispatch, "make_pair", real)
        a.send(trigger4(b"b", b"s", b"I"))
        assert (await a.receive())[0] == SERVICE_CONNECT

    play(scene)


def test_what_a_local_client_has_written_counts_before_a_refusal() -> None:
    """The ordering rule of 6.3, without the help of any event loop's order."""
    from sluice.adminvm.daemon_calls import refuse
    from sluice.adminvm.local import LocalServer

    async def main() -> None:
        with short_directory() as directory:
            told: list[str] = []
            server = LocalServer(
                asyncio.get_running_loop(),
                str(directory / "s"),
                lambda session, request: told.append("request"),
                told.append,
            )
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
                client.connect(str(directory / "s"))
                client.sendall(hello(3) + message(SERVICE_CONNECT, exec_body(43, 514, b"I\0")))

                class End:
                    local = server

                    async def room(self, seconds: float) -> bool:
                        return True

                    def refuse(self, request: object) -> None:
                        told.append("refusal")

                request = Request(Trigger(None, "dst", b"I".ljust(32, b"\0"), "test.S"))
                await refuse(End(), request)  # type: ignore[arg-type]
                assert told == ["request", "refusal"]
            server.close()

    asyncio.run(main())


# --- our own log --------------------------------------------------------------------------------


def test_a_full_disk_below_our_log_stops_no_domain(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scene(world: World) -> None:
        with open("/dev/full", "w") as full, monkeypatch.context() as patch:
            patch.setattr(sys, "stderr", full)
            await world.start("a")
            assert world.system.state("a") == "Running"
            await world.system.stop_domain("a")
            with contextlib.suppress(OSError):
                full.close()

    play(scene)


def test_what_calls_warn_of_goes_to_the_rotated_log() -> None:
    def judge(directory: Path) -> PolicyStore:
        policy = directory / "policy"
        policy.mkdir()
        (policy / "10-t.policy").write_text("* * @anyvm @default deny\n")
        return PolicyStore([policy], legacy_directory=directory / "none", quiet=0.0)

    async def scene(world: World) -> None:
        a = await world.start("a")
        a.send(trigger4(b"nobody", b"s", b"I"))
        assert (await a.receive())[0] == SERVICE_REFUSED
        lines = [json.loads(line) for line in world.system.paths.domain_log_file.open()]
        assert [line["domain"] for line in lines if "does not exist" in line["line"]] == ["dom0"]

    play(scene, judge)


def test_what_loading_the_policy_warns_of_is_logged_at_each_load() -> None:
    def judge(directory: Path) -> PolicyStore:
        policy = directory / "policy"
        (directory / "legacy").mkdir()
        policy.mkdir()
        (policy / "35-compat.policy").write_text("\n!compat-4.0\n")
        return PolicyStore([policy], legacy_directory=directory / "legacy", quiet=0.0)

    async def scene(world: World) -> None:
        a = await world.start("a")

        async def warned() -> list[str]:
            a.send(trigger4(b"b", b"s", b"I"))
            assert (await a.receive())[0] == SERVICE_REFUSED
            lines = [json.loads(line) for line in world.system.paths.domain_log_file.open()]
            return [line["line"] for line in lines if "deprecated" in line["line"]]

        (first,) = await warned()
        assert first.endswith("policy/35-compat.policy:2: !compat-4.0 is deprecated")
        assert await warned() == [first]
        (world.directory / "policy/35-compat.policy").write_text("!compat-4.0\n")
        assert len(await warned()) == 2

    play(scene, judge)


# --- policy files -------------------------------------------------------------------------------


@pytest.mark.spec("POL-251")
def test_policy_files_decide() -> None:
    def judge(directory: Path) -> PolicyStore:
        policy = directory / "policy"
        policy.mkdir()
        (policy / "10-t.policy").write_text(
            "test.Svc +x a b allow\n"
            "test.Svc +y a b ask\n"
            "test.Svc +z a @anyvm deny\n"
            "test.Svc +d a @default allow target=b user=alice\n"
        )
        (policy / "15-more.policy").write_text(
            "#!sluice 1\ntest.Via * a b allow via=c+chain\ntest.Limit * a b allow limit=2/1h\n"
            "test.Why +y a b allow reason=ticket \x1b[31m5\ntest.Why +n a b deny reason=never, no\n"
        )
        return PolicyStore([policy], legacy_directory=directory / "none", quiet=0.0)

    async def scene(world: World) -> None:
        a, b = await world.start("a"), await world.start("b")
        rule = str(world.directory / "policy/10-t.policy")

        async def ask(service: bytes, target: bytes = b"b") -> int:
            a.send(trigger4(target, service, b"I"))
            return (await a.receive())[0]

        assert await ask(b"test.Svc+x") == SERVICE_CONNECT
        assert (await b.receive())[1][8:] == b"user:QUBESRPC test.Svc+x a\0"
        assert await ask(b"test.Svc+d", b"") == SERVICE_CONNECT
        assert (await b.receive())[1][8:] == b"alice:QUBESRPC test.Svc+d a\0"
        for service, where in ((b"test.Svc+y", 2), (b"test.Svc+z", 3), (b"other", None)):
            assert await ask(service) == SERVICE_REFUSED
            record = world.records()[-1]
            assert record["rule"] == (None if where is None else f"{rule}:{where}")
            assert record["decision"] == "deny"
        # What cannot be carried out as the rule says is not carried out otherwise.
        assert await ask(b"test.Via") == SERVICE_REFUSED
        assert world.records()[-1]["cause"].startswith("via")
        answers = [await ask(b"test.Limit") for _ in range(3)]
        assert answers == [SERVICE_CONNECT, SERVICE_CONNECT, SERVICE_REFUSED]
        assert world.records()[-1]["cause"].startswith("limit")
        # The operator's reason is in the record, of what was allowed and of what was not.
        assert await ask(b"test.Why+n") == SERVICE_REFUSED
        assert world.records()[-1]["reason"] == "never, no"
        assert "reason" not in world.records()[-2]
        assert await ask(b"test.Why+y") == SERVICE_CONNECT
        assert b"ticket" not in (await b.receive())[1]
        # A broken file denies everything, and says where.
        (world.directory / "policy/20-bad.policy").write_text("nonsense\n")
        assert await ask(b"test.Svc+x") == SERVICE_REFUSED
        assert world.records()[-1]["rule"].endswith("20-bad.policy:1")
        (world.directory / "policy/20-bad.policy").unlink()
        assert await ask(b"test.Svc+x") == SERVICE_CONNECT
        for name in ("a", "b"):
            await world.system.stop_domain(name)
        await until(
            lambda: (
                [r["reason"] for r in world.records() if r["argument"] == "y" and "reason" in r]
                == ["ticket \\x1b[31m5"]
            ),
            "the record of an allowed call",
        )

    play(scene, judge=judge)


# --- the AdminVM's own socket -------------------------------------------------------------------


def test_the_socket_of_the_command_line() -> None:
    async def scene(world: World) -> None:
        path = world.system.paths.control_socket
        assert stat.S_IMODE(os.stat(path).st_mode) == 0o600

        async def ask(method: str, **fields: Any) -> Any:
            return await asyncio.to_thread(lambda: api.request(path, method, **fields))

        assert (await ask("ping"))["pid"] == os.getpid()
        assert [entry["name"] for entry in await ask("list")] == ["dom0", "a", "b", "c"]
        assert await ask("state", name="a") == "Halted"
        assert await ask("start", name="a") is None
        assert await ask("state", name="a") == "Running"
        for method in ("stop", "kill"):
            await ask("start", name="a")
            assert await ask(method, name="a") is None
            assert await ask("state", name="a") == "Halted"
        for method, fields in (
            ("stop", {"name": "a"}),
            ("start", {"name": "nobody"}),
            ("start", {}),
            ("start", {"name": 5}),
            ("nonsense", {}),
        ):
            with pytest.raises(LocalError):
                await ask(method, **fields)

    play(scene)


def test_garbage_on_the_socket_of_the_command_line() -> None:
    async def scene(world: World) -> None:
        path = str(world.system.paths.control_socket)
        for data in (b"garbage\n", b"[]\n", b"\xff\xfe\n", b"null\n"):
            reader, writer = await asyncio.open_unix_connection(path)
            writer.write(data)
            answer = json.loads(await reader.readline())
            assert answer["ok"] is False
            writer.close()
        reader, writer = await asyncio.open_unix_connection(path)
        writer.write(b"x" * (2 << 20))
        with contextlib.suppress(ConnectionResetError):  # closed with bytes of ours unread
            assert await reader.read() == b""
        writer.close()
        reader, writer = await asyncio.open_unix_connection(path)
        writer.write(b'{"method": "ping"}\n{"method": "state", "name": "a"}\n')
        assert json.loads(await reader.readline())["ok"] is True
        assert json.loads(await reader.readline())["result"] == "Halted"
        writer.close()

    play(scene)


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user")
def test_other_users_are_not_served_even_if_they_could_connect() -> None:
    async def scene(world: World) -> None:
        path = world.system.paths.control_socket
        for place in (world.directory, path.parent):
            place.chmod(0o755)
        script = (
            "import socket,sys; s=socket.socket(socket.AF_UNIX); s.connect(sys.argv[1]);"
            's.sendall(b\'{"method": "ping"}\\n\'); print(len(s.recv(100)))'
        )
        argv = ["/usr/bin/python3", "-IS", "-c", script, str(path)]

        async def ask(*before: str) -> bytes:
            process = await asyncio.create_subprocess_exec(
                *before, *argv, stdout=-1, stderr=asyncio.subprocess.DEVNULL
            )
            return (await process.communicate())[0]

        other = ("/usr/bin/setpriv", "--reuid=64126", "--regid=64126", "--clear-groups")
        assert await ask(*other) == b""  # the mode of the socket forbids it
        path.chmod(0o666)
        assert await ask(*other) in (b"", b"0\n")
        assert int(await ask()) > 10

    play(scene)


def test_shutdown_by_the_socket() -> None:
    async def main() -> None:
        with short_directory() as directory:
            async with adminvm(directory, ABC, PlayedSandbox(), PlayedJudge()) as system:
                running = asyncio.ensure_future(system.run_until_stopped())
                await asyncio.to_thread(api.request, system.paths.control_socket, "shutdown")
                await asyncio.wait_for(running, 20)
                assert not system.paths.control_socket.exists()

    asyncio.run(main())


def test_nobody_listens() -> None:
    with short_directory() as directory, pytest.raises(LocalError, match="no AdminVM runs here"):
        api.request(directory / "none", "ping")


# --- real agents --------------------------------------------------------------------------------


def agents(directory: Path, scene: Callable[[AdminVM, AgentSandbox], Awaitable[None]]) -> None:
    import pwd

    user = pwd.getpwuid(os.geteuid()).pw_name

    async def main() -> None:
        sandbox = AgentSandbox(directory / "vm")
        judge = PlayedJudge()
        names = [f"d{number}" for number in range(11)]
        for name in names:
            judge.allow(name)
        domains = [
            domain(name, 10 + number, "agent", default_user=user)
            for number, name in enumerate(names)
        ]
        async with adminvm(directory, domains, sandbox, judge) as system:
            async with asyncio.timeout(60):
                await scene(system, sandbox)

    asyncio.run(main())


def test_calls_from_within_the_process() -> None:
    async def scene(system: AdminVM, sandbox: AgentSandbox) -> None:
        done = await system.run("d0", "cat; echo err >&2; exit 3", input=b"x" * 300_000)
        assert (done.status, len(done.stdout), done.stderr) == (3, 300_000, b"err\n")
        sandbox.service("d0", "test.Echo", '#!/bin/sh\necho "$1 $QREXEC_REMOTE_DOMAIN"\n')
        done = await system.run("d0", "QUBESRPC test.Echo+hi dom0")
        assert (done.status, done.stdout) == (0, b"hi dom0\n")
        assert (await system.run("d0", "QUBESRPC no.Such dom0")).status == 127
        assert await system.just_execute("d0", "true") == 0

    with short_directory() as directory:
        agents(directory, scene)


@pytest.mark.spec("WIRE-254")
def test_a_command_for_which_the_process_waits_no_more_ends() -> None:
    async def scene(system: AdminVM, sandbox: AgentSandbox) -> None:
        with tempfile.TemporaryDirectory(prefix="s-", dir="/tmp") as place:
            note = Path(place, "pid")
            waiting = asyncio.ensure_future(
                system.run("d0", f"echo $$ >{note}.new; mv {note}.new {note}; sleep 1000; true")
            )
            await until(note.exists, "the command")
            process = Seen.of(int(note.read_text()))
            assert process is not None
            waiting.cancel()
            await until(lambda: not process.alive(), "the end of the command")
        with pytest.raises(TimeoutError):
            await system.run("d0", "sleep 100", timeout=0.1)

    with short_directory() as directory:
        agents(directory, scene)


def test_what_a_sandbox_writes_to_stderr_is_logged_escaped() -> None:
    class Talking(PlayedSandbox):
        async def start(self, domain: DomainConfig, control: socket.socket) -> PlayedRun:
            run = await super().start(domain, control)
            read_fd, self.write_fd = os.pipe()
            run.stderr_fd = read_fd  # type: ignore[attr-defined]
            return run

    async def scene(world: World) -> None:
        await world.start("a")
        os.write(world.sandbox.write_fd, b"oo\033ps\n")
        path = world.system.paths.domain_log_file
        await until(lambda: "ps" in path.read_text(), "the line")
        record = json.loads(path.read_text().splitlines()[-1])
        assert (record["domain"], record["line"]) == ("a", "oo\\x1bps")
        os.close(world.sandbox.write_fd)

    play(scene, sandbox=Talking())


def test_a_hostile_agent_harms_itself_only() -> None:
    """Any bytes, in any pieces: the domain ends or is refused; others go on."""

    async def scene(world: World) -> None:
        chance = random.Random(7)
        quiet = await world.start("b")
        pieces = [
            trigger4(b"b", b"s", b"I"),
            trigger4(b"dom0", b"x", b"\xff" * 32),
            message(TERMINATED, exec_body(8, 1024)),
            message(TERMINATED, exec_body(0, 0)),
            hello(4),
            message(EXEC_CMDLINE, b"x" * 9),
            b"\x13\x02\x00\x00\xff\xff\xff\xff",
            b"\0" * 8,
        ]
        for _ in range(25):
            a = await world.start("a")
            data = b"".join(
                chance.choice(pieces) if chance.random() < 0.8 else chance.randbytes(20)
                for _ in range(chance.randrange(1, 12))
            )
            while data:
                size = chance.randrange(1, 400)
                try:
                    a.send(data[:size])
                except OSError:
                    break
                data = data[size:]
                await asyncio.sleep(0)
            if chance.random() < 0.5:
                a.end()
            else:
                await world.system.stop_domain("a") if world.system.run_of("a") else None
            await until(lambda: world.system.state("a") == "Halted", "the end of a")
        assert world.system.state("b") == "Running"
        # The quiet domain's own calls still work.
        while True:
            quiet.send(trigger4(b"nobody", b"s", b"LAST"))
            kind, body, _ = await quiet.receive()
            if kind == SERVICE_REFUSED:
                assert body.startswith(b"LAST")
                break

    play(scene)


def test_rulings_that_cannot_be_carried_out() -> None:
    judge = PlayedJudge()
    judge.rulings["gone"] = Ruling(
        Decision(True, user="u", target="gone", requested_target="gone", autostart=True), "p:1"
    )
    judge.rulings["disp"] = Ruling(
        Decision(True, user="u", target="@dispvm:x", requested_target="disp", autostart=True), "p:1"
    )

    async def scene(world: World) -> None:
        a = await world.start("a")
        await refused(world, a, b"gone", "does not exist")
        await refused(world, a, b"disp", "")

    play(scene, judge=lambda directory: judge)


def test_output_without_end_is_cut_off() -> None:
    from sluice.adminvm.memory import run_to_end

    async def scene(system: AdminVM, sandbox: AgentSandbox) -> None:
        call = await system.call("d0", "cat /dev/zero")
        with pytest.raises(ResourceError):
            await run_to_end(call.read_fd, call.write_fd, b"", max_output=1 << 20)
        await asyncio.wait_for(call.ended, 20)

    with short_directory() as directory:
        agents(directory, scene)


def test_a_service_side_that_breaks_the_protocol() -> None:
    from sluice.adminvm.memory import run_to_end

    async def scene(world: World) -> None:
        a = await world.start("a")
        run = world.system.run_of("a")
        assert run is not None
        call = world.system.dispatcher.open(run, b"u:x")
        _, _, fds = await a.receive()
        os.write(fds[1], hello(4) + message(0x9999))
        with pytest.raises(RemoteError):
            await run_to_end(call.read_fd, call.write_fd, b"")
        for fd in fds:
            os.close(fd)

    play(scene)


# --- bounds that time sets ----------------------------------------------------------------------


def test_few_descriptors_are_held_for_an_agent_that_does_not_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sluice.adminvm.dispatch.ROOM_PATIENCE", 0.4)

    async def scene(world: World) -> None:
        a, b, c = await world.start("a"), await world.start("b"), await world.start("c")
        before = len(open_descriptors())
        count = 250
        a.send(b"".join(trigger4(b"b", b"s" * 200, b"I%d" % n) for n in range(count)))
        answers = []
        # b reads nothing; a is told of each call in the end, c's calls go through meanwhile.
        while len(answers) < count:
            answers.append((await a.receive())[0])
            for fd in a.wire.take_fds():
                os.close(fd)
            assert len(open_descriptors()) - before < 450
            if len(answers) == 60:
                c.send(trigger4(b"nobody", b"s", b"I"))
                assert (await c.receive())[0] == SERVICE_REFUSED
        assert 30 < answers.count(SERVICE_CONNECT) < count
        assert answers.count(SERVICE_REFUSED) > 10
        causes = [record["cause"] for record in world.records()]
        assert sum("does not read its control channel" in cause for cause in causes) > 10
        b.end()

    play(scene)


def test_calls_wait_for_an_agent_that_reads_late() -> None:
    async def scene(world: World) -> None:
        a, b = await world.start("a"), await world.start("b")
        count = 250
        a.send(b"".join(trigger4(b"b", b"s" * 200, b"I%d" % n) for n in range(count)))
        run = world.system.run_of("b")
        assert run is not None
        await until(lambda: run.endpoint.busy, "a full channel")

        async def read(agent: PlayedRun) -> list[int]:
            kinds = []
            for _ in range(count):
                kind, _, fds = await agent.receive()
                kinds.append(kind)
                for fd in fds:
                    os.close(fd)
            return kinds

        sources, targets = await asyncio.gather(read(a), read(b))
        assert set(sources) == {SERVICE_CONNECT}
        assert set(targets) == {EXEC_CMDLINE}

    play(scene)


def test_a_local_client_that_says_nothing_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sluice.adminvm.local.PATIENCE", 0.05)

    async def scene(world: World) -> None:
        await world.start("a")
        path = str(world.system.paths.daemon_dir / "qrexec.a")
        for data in (b"", hello(3)[:5], hello(3), hello(3) + message(EXEC_CMDLINE, b"x" * 20)[:9]):
            reader, writer = await asyncio.open_unix_connection(path)
            writer.write(data)
            assert await asyncio.wait_for(reader.read(), 20) == hello(3)
            writer.close()

    play(scene)


def test_a_local_client_that_was_not_listened_to_is_not_late() -> None:
    async def scene(world: World) -> None:
        a = await world.start("a")
        run = world.system.run_of("a")
        assert run is not None
        assert run.endpoint.local is not None
        path = str(world.system.paths.daemon_dir / "qrexec.a")
        reader, writer = await asyncio.open_unix_connection(path)
        assert await reader.readexactly(12) == hello(3)
        run.endpoint.local.pause()
        writer.write(hello(3) + message(EXEC_CMDLINE, exec_body(0, 0, b"u:x\0")))
        (session,) = run.endpoint.local.sessions
        session._late()  # its time is over
        run.endpoint.local.resume()
        assert (await a.receive())[0] == EXEC_CMDLINE
        assert len(await reader.readexactly(16)) == 16
        writer.close()

    play(scene)


# --- services of dom0 ---------------------------------------------------------------------------


def write_service(world: World, name: str, script: str) -> None:
    path = world.directory / "config/rpc" / name
    path.write_text(script)
    path.chmod(0o755)


@pytest.mark.parametrize("ends_itself", [True, False])
def test_a_service_of_dom0_outlives_a_breach_but_not_the_adminvm(ends_itself: bool) -> None:
    pids: list[int] = []

    async def scene(world: World) -> None:
        mark = world.directory / "pid"
        write_service(world, "s", f"#!/bin/sh\necho $$ >{mark}\nexec sleep 1000\n")
        a = await world.start("a")
        a.send(trigger4(b"dom0", b"s", b"I"))
        _, body, fds = await a.receive()
        os.write(fds[1], hello(4) + message(0x9999))
        await until(lambda: mark.exists() and mark.read_text(), "the service")
        pids.append(int(mark.read_text()))
        while await asyncio.to_thread(os.read, fds[0], 4096):
            pass
        number = struct.unpack_from("<I", body, 4)[0]
        a.send(message(TERMINATED, exec_body(0, number)))
        (record,) = await world.recorded()
        assert record["exit_code"] == 1
        os.kill(pids[0], 0)
        assert len(world.system.dispatcher._served) == 1
        if ends_itself:
            os.kill(pids[0], signal.SIGTERM)
            await until(lambda: not world.system.dispatcher._served, "its end to be noted")
        for fd in fds:
            os.close(fd)

    play(scene)
    with pytest.raises(ProcessLookupError):
        # Killed and reaped by the loop, or at the latest when it is gone.
        for _ in range(2000):
            os.kill(pids[0], 0)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pids[0], os.WNOHANG)
            time.sleep(0.01)


def test_services_of_dom0_are_bounded_whatever_their_caller_reports() -> None:
    async def scene(world: World) -> None:
        write_service(world, "s", "#!/bin/sh\nexec cat\n")
        a, b = await world.start("a"), await world.start("b")
        held: list[int] = []
        answers = []
        for _ in range(5):
            a.send(trigger4(b"dom0", b"s", b"I"))
            kind, body, fds = await a.receive()
            answers.append(kind)
            held += fds
            if fds:
                # A hostile agent: the pipes stay open, but the call is said to have ended.
                number = struct.unpack_from("<I", body, 4)[0]
                a.send(message(TERMINATED, exec_body(0, number)))
        assert answers == [SERVICE_CONNECT] * 3 + [SERVICE_REFUSED] * 2
        (record, *_) = await world.recorded(2)
        assert "dom0 answers 3 calls" in record["cause"]
        # Others have a bound of their own, and what has ended makes room.
        b.send(trigger4(b"dom0", b"s", b"I"))
        assert (await b.receive())[0] == SERVICE_CONNECT
        for fd in held:
            os.close(fd)
        await until(lambda: len(world.system.dispatcher._served) == 1, "the end of the services")
        a.send(trigger4(b"dom0", b"s", b"I"))
        assert (await a.receive())[0] == SERVICE_CONNECT

    play(scene, max_calls=3)


def test_what_a_service_of_dom0_writes_to_stderr_is_logged_escaped(
    capfd: pytest.CaptureFixture[str],
) -> None:
    async def scene(world: World) -> None:
        # What it complains of is what the caller sent.
        write_service(world, "s", "#!/bin/sh\nprintf '%b' 'oo\\033]0;ps\\n' >&2\n")
        a = await world.start("a")
        a.send(trigger4(b"dom0", b"s", b"I"))
        assert (await a.receive())[0] == SERVICE_CONNECT
        path = world.system.paths.domain_log_file
        await until(lambda: "ps" in path.read_text(), "the line")
        record = json.loads(path.read_text().splitlines()[-1])
        assert (record["domain"], record["line"]) == ("a", "oo\\x1b]0;ps")

    play(scene)
    assert "\033" not in capfd.readouterr().err


@pytest.mark.parametrize("prefix", ["", "nogui:"])
def test_waiting_for_a_session_in_dom0(prefix: str) -> None:
    from sluice.adminvm.dom0 import Dom0Call

    async def scene(world: World) -> None:
        loop = asyncio.get_running_loop()
        log = world.directory / "order"
        write_service(
            world,
            "qubes.WaitForSession",
            f"#!/bin/sh\necho w $QREXEC_REMOTE_DOMAIN >>{log}\nexit 1\n",
        )
        write_service(world, "s", f"#!/bin/sh\necho s >>{log}\n")
        config = world.directory / "config/rpc-config"
        config.mkdir()
        (config / "s").write_text("wait-for-session = true\n")
        gone: asyncio.Future[None] = loop.create_future()
        done: asyncio.Future[int] = loop.create_future()
        call = Dom0Call(
            loop,
            f"{prefix}QUBESRPC s work name dom0".encode(),
            environment=dict(os.environb),
            on_done=done.set_result,
            on_gone=lambda: gone.set_result(None),
            log=lambda line: None,
            service_path=str(world.directory / "config/rpc"),
            config_path=str(config),
        )
        call.start()
        await until(lambda: log.exists() and "s" in log.read_text().split(), "the service")
        assert log.read_text().split() == (["s"] if prefix else ["w", "work", "s"])
        call.close()
        call.close()
        await asyncio.wait_for(gone, 20)
        assert not done.done()

    play(scene)
