"""The earlier proxy's configuration and plugins, as they are."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from tests.support.processes import alive
from tests.support.proxy import PROGRAM, Vm, eventually, vm
from tests.support.proxy_server import COMMAND, Resident, left_over, resident

from sluice.cli.main import main
from sluice.errors import ConfigError
from sluice.proxy import plugins_package as package
from sluice.proxy.configuration import load
from sluice.proxy.legacy import load_legacy

DATA = Path(__file__).parent / "legacy"
MIB = 1 << 20


class Old:
    """An installation of the earlier proxy with ours in the place of its program."""

    def __init__(self, qube: Vm) -> None:
        self.qube = qube
        self.directory = qube.directory / "old"
        shutil.copytree(DATA / "plugins", self.directory / "plugins")
        self.config = self.directory / "plugins/config.json"
        self.write(json.loads((DATA / "config.json").read_text()))
        self.program = self.directory / "qrexec-proxy"
        self.program.symlink_to(PROGRAM)
        self.link = self.directory / "rpc/qrexec-proxy"
        self.link.parent.mkdir()
        self.link.symlink_to(self.program)
        qube.service("mirror", "#!/bin/sh\nexec cat\n")
        got = qube.directory / "got"
        qube.service("size", f"#!/bin/sh\ncat > {got}\nwc -c < {got}\n")
        qube.service("flood", f"#!/bin/sh\nhead -c {3 * MIB} /dev/zero\n")

    def write(self, chains: dict[str, Any]) -> None:
        self.config.write_text(json.dumps(chains))

    def chain(self, name: str, plugins: list[str], **config: Any) -> None:
        self.write({name: {"plugins": plugins, "config": config}})

    @property
    def state(self) -> Path:
        return self.qube.directory / "xdg/sluice/proxy"

    def start(self, name: str) -> Any:
        environment = self.qube.environment(PATH=f"{self.qube.directory}:/usr/bin:/bin")
        del environment["SLUICE_PROXY_CONFIG"]
        return subprocess.Popen(
            [str(self.link), name], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, env=environment,
        )  # fmt: skip

    def call(self, name: str, data: bytes = b"") -> tuple[int, bytes]:
        process = self.start(name)
        try:
            out, err = process.communicate(data, timeout=60)
        finally:
            process.kill()
            process.wait()
        assert err == b""
        return process.returncode, out

    def records(self) -> list[dict[str, Any]]:
        path = self.state / "proxy.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()]

    def log(self) -> str:
        return (self.state / "proxy.log").read_text()


@pytest.fixture
def old() -> Iterator[Old]:
    if Path("/rw/log/sluice").exists() or Path("/etc/sluice/proxy.toml").exists():
        pytest.skip("this machine has a configuration of its own")
    with vm() as qube:
        yield Old(qube)


# --- the shipped chains ------------------------------------------------------------------------


@pytest.mark.spec("PROXY-016")
@pytest.mark.parametrize("chain", ["pass", "3pass", "none"])
def test_everything_passes(old: Old, chain: str) -> None:
    data = os.urandom(300_000)
    assert old.call(f"{chain}+vault+mirror", data) == (0, data)


@pytest.mark.spec("PROXY-016")
def test_limit(old: Old) -> None:
    assert old.call("limit+vault+size", b"x" * (11 * MIB)) == (0, b"%d\n" % (10 * MIB))
    code, out = old.call("limit+vault+flood")
    assert (code, len(out)) == (0, 2 * MIB)


@pytest.mark.spec("PROXY-016")
def test_one_direction_only(old: Old) -> None:
    assert old.call("src2dst+vault+size", b"12345") == (0, b"")
    assert (old.qube.directory / "got").read_bytes() == b"12345"
    assert old.call("dst2src+vault+size", b"12345") == (0, b"0\n")


@pytest.mark.spec("PROXY-016", "PROXY-017")
def test_sniff_logs_ascii_text(old: Old) -> None:
    """Its position in ``config`` wins over its name, which asks for base64."""
    assert old.call("sniff+vault+mirror", b"hello world") == (0, b"hello world")
    assert "hello world" in old.log() and "aGVsbG8" not in old.log()


@pytest.mark.spec("PROXY-016")
def test_timeout(old: Old) -> None:
    begun = time.monotonic()
    process = old.start("timeout+vault+mirror")
    assert process.wait(30) == 126
    assert time.monotonic() - begun > 0.9


@pytest.mark.spec("PROXY-016")
def test_streamline(old: Old) -> None:
    """What the filter does with these is shown with its own tests, on an injected clock."""
    (use,) = load_legacy(str(old.config)).chain("streamline").uses
    options = use.options
    assert use.name == "streamline"
    assert (options.buf_size, options.delay_read, options.delay_write) == (10 * MIB, 0.5, 10)


@pytest.mark.spec("PROXY-016")
def test_count(old: Old) -> None:
    assert [old.call("count+vault+mirror", b"x")[0] for _ in range(3)] == [0, 0, 126]


@pytest.mark.spec("PROXY-016")
def test_one_way(old: Old) -> None:
    assert old.call("one-way+vault+size", b"12345") == (0, b"")
    assert (old.qube.directory / "got").read_bytes() == b"12345"
    names = [use.name for use in load_legacy(str(old.config)).chain("one-way").uses]
    assert names == ["streamline", "timeout", "stop-dst"]


@pytest.mark.spec("PROXY-016")
def test_all_eleven_are_there_and_check_says_who_may_use_them(old: Old) -> None:
    assert len(load(str(old.directory)).chains) == 11
    done = CliRunner().invoke(main, ["proxy", "check", "--config", str(old.directory)])
    assert done.exit_code == 0 and "any call may use it" in done.output


@pytest.mark.spec("PROXY-017")
def test_a_position_counts_between_the_ends(old: Old) -> None:
    old.chain("x", ["default", "byte_limit", "byte_limit", "default"],
              **{"0": {"src2dst_limit": 5}, "1": {"src2dst_limit": 3}, "byte_limit": {"src2dst_limit": 1}})  # noqa: E501  # fmt: skip
    first, second = load_legacy(str(old.config)).chain("x").uses
    assert (first.options.src2dst, second.options.src2dst) == (5, 3)
    assert old.call("x+vault+mirror", b"123456") == (0, b"123")


# --- plugins ------------------------------------------------------------------------------------


@pytest.mark.spec("PROXY-051")
def test_plugins_alone_and_mixed_with_filters(old: Old) -> None:
    old.chain("a", ["caesar"], caesar={"by": 3})
    assert old.call("a+vault+size", b"Abc xyz!") == (0, b"8\n")
    assert (old.qube.directory / "got").read_bytes() == b"Def abc!"
    assert "shifting by 3 for work" in old.log()
    mixed = ["byte_limit", "caesar", "byte_limit", "pass", "banner", "byte_limit"]
    limits = {"0": {"src2dst_limit": 5}, "2": {"src2dst_limit": 4}, "5": {"dst2src_limit": 9}}
    old.chain("m", mixed, **limits)
    code, out = old.call("m+vault+mirror+arg", b"abcdefgh")
    assert code == 0
    # The far end got the banner and four letters; nine bytes come back, shifted back by 13.
    assert out == package_shift(b"m work>va")
    record = old.records()[-1]
    names = [entry["name"] for entry in record["filters"]]
    assert sorted(names) == sorted(n.replace("_", "-") for n in mixed)
    assert record["cause"] == "done" and record["bytes"]["src2dst"]["read"] == 8


def package_shift(data: bytes) -> bytes:
    import codecs

    return codecs.encode(data.decode(), "rot13").encode()


@pytest.mark.spec("PROXY-051")
def test_plugins_import_each_other_and_see_meta_and_config(old: Old) -> None:
    old.chain("b", ["banner"], banner={"secret": True})
    assert old.call("b+vault+mirror+a+b", b"rest") == (
        0, package_shift(b"b work>vault mirror+a+b\n") + b"rest",
    )  # fmt: skip


@pytest.mark.spec("PROXY-051")
def test_source_and_destination_plugins_are_the_ends(old: Old) -> None:
    answer, box = old.qube.directory / "answer", old.qube.directory / "box"
    letter = {"text": "Hello", "answer": str(answer)}
    ends = {"src_plugin": letter, "dst_plugin": {"box": str(box)}}
    old.chain("both", ["letter", "caesar", "letter"], **ends, caesar={"by": 1})
    assert old.call("both+vault+mirror") == (0, b"")
    assert box.read_bytes() == b"Ifmmp"
    assert answer.read_bytes() == b"5 axsdr enq uztks"
    assert old.qube.calls() == []
    old.chain("src", ["letter", "byte_limit"], src_plugin={"text": "Hello", "answer": str(answer)},
              byte_limit={"src2dst_limit": 4})  # fmt: skip
    assert old.call("src+vault+mirror")[0] == 0
    assert answer.read_bytes() == b"Hell" and old.qube.calls() == ["-- vault mirror"]
    box.unlink()
    old.chain("dst", ["byte_limit", "letter"], dst_plugin={"box": str(box)},
              byte_limit={"src2dst_limit": 3})  # fmt: skip
    assert old.call("dst+vault+mirror", b"Hello") == (0, b"3 bytes for vault")
    assert box.read_bytes() == b"Hel"


@pytest.mark.spec("PROXY-051")
def test_exit_codes_ends_and_aborts_of_plugins(old: Old) -> None:
    old.qube.service("code", "#!/bin/sh\ncat\nexit 42\n")
    old.chain("c", ["caesar", "caesar"])
    assert old.call("c+vault+code", b"x" * 300_000) == (42, b"x" * 300_000)
    old.chain("h", ["pass", "header"], header={"magic": "MAGI"})
    assert old.call("h+vault+size", b"MAGIC") == (0, b"")
    assert (old.qube.directory / "got").read_bytes() == b"C"
    code, out = old.call("h+vault+mirror", b"\x1b[31m!")
    assert (code, out) == (126, b"")
    record = old.records()[-1]
    assert (record["cause"], record["filter"], record["exit_code"]) == ("filter", "header", 126)
    assert "wrong header" in record["reason"] and "\x1b" not in record["reason"]


@pytest.mark.spec("PROXY-051", "PROXY-025")
def test_mishaps_of_a_plugin_end_its_call(old: Old) -> None:
    old.chain("m", ["mishap"], mishap={"how": "raise"})
    code, _ = old.call("m+vault+mirror", b"x")
    record = old.records()[-1]
    assert (code, record["cause"], record["filter"]) == (125, "filter-error", "mishap")
    assert "IndexError" in record["reason"] and "mishap.py:14" in record["reason"]
    old.chain("m", ["mishap"], mishap={"how": "exit"})
    code, _ = old.call("m+vault+mirror", b"x")
    record = old.records()[-1]
    assert (code, record["cause"], record["filter"]) == (125, "filter-error", "mishap")
    assert "SystemExit: 0 at" in record["reason"]
    old.chain("m", ["mishap"], mishap={"how": "print"})
    assert old.call("m+vault+mirror", b"x") == (0, b"on\nx")
    assert "printed" in old.log()
    old.chain("m", ["mishap", "pass"], mishap={"how": "flood"})
    code, out = old.call("m+vault+mirror", b"")
    assert (code, len(out)) == (0, 3 + 64 * 65536)
    old.chain("m", ["mishap"], mishap={"how": "return"})
    old.qube.service("idle", "#!/bin/sh\nexec sleep 600\n")
    code, out = old.call("m+vault+idle", b"x")
    assert out == b"on\n" and code == 125
    eventually(lambda: not left_over(old.qube))


@pytest.mark.spec("PROXY-051")
def test_what_cannot_be_a_plugin_is_told_when_the_configuration_is_read(old: Old) -> None:
    bad = old.directory / "plugins/bad.py"
    for text, what in (("class Other: pass\n", "unknown filter 'bad'"), ("def (:\n", "bad.py:1")):
        bad.write_text(text)
        old.chain("x", ["pass", "bad", "pass"])
        with pytest.raises(ConfigError, match=what):
            load(str(old.directory))
    bad.write_text("import nothing_of_that_name\nclass QrexecProxyPlugin_bad: pass\n")
    assert old.call("x+vault+mirror", b"x") == (125, b"")
    assert "nothing_of_that_name" in old.log() and old.qube.calls() == []
    assert len(old.records()) == 1


@pytest.mark.spec("PROXY-051")
def test_plugins_in_a_toml_chain_and_in_the_command_form(old: Old) -> None:
    qube = old.qube
    qube.configure("", f'legacy_plugins = ["{old.directory}/plugins"]')
    qube.chain("t", "{ use = 'byte-limit', src2dst = 5 }", "{ use = 'caesar', by = 1 }")
    box = qube.directory / "box"
    qube.chain("d", "'pass'", f"{{ use = 'letter', box = '{box}' }}")
    assert qube.call("t+vault+size", b"abcdefgh").stdout == b"5\n"
    assert (qube.directory / "got").read_bytes() == b"bcdef"
    assert qube.call("d+vault+mirror", b"abc").stdout == b"3 bytes for vault"
    assert [part["name"] for part in qube.records()[0]["filters"]] == ["caesar", "byte-limit"]
    words = ["proxy", "run", "--config", str(qube.config), "--chain", "t", "--", "tr", "bc", "BC"]
    done = subprocess.run(
        [*COMMAND, *words],
        input=b"abcdefgh",
        capture_output=True,
        env=qube.environment(),
        timeout=60,
    )
    assert (done.returncode, done.stdout) == (0, b"ABcde")
    qube.chain("typo", "'cesar'")
    with pytest.raises(ConfigError, match="unknown filter 'cesar'"):
        load(str(qube.config))


@pytest.mark.spec("PROXY-016", "PROXY-051")
def test_import_gives_the_same_chains_in_toml(old: Old) -> None:
    chains = json.loads((DATA / "config.json").read_text())
    chains["own"] = {
        "plugins": ["letter", "byte_limit", "caesar", "caesar", "letter"],
        "config": {
            "0": {"src2dst_limit": 5},
            "1": {"by": 1, "text": 'x"\\\x7f\U0001f600', "deep": {"a b": [1, 2.5, True]}},
            "src_plugin": {"text": "Hello", "answer": None},
        },
    }
    old.write(chains)
    before = load(str(old.directory))
    target = old.qube.directory / "new.toml"
    done = CliRunner().invoke(main, ["proxy", "import", str(old.config)])
    assert done.exit_code == 0, done.output
    target.write_text(done.output)
    after = load(str(target))
    assert list(after.chains) == list(before.chains)
    for name, chain in before.chains.items():
        new = after.chains[name]
        assert [(u.cls, u.values) for u in new.uses] == [(u.cls, u.values) for u in chain.uses]
        assert (new.legacy is None) == (chain.legacy is None)
        assert not new.require_exit_code and not chain.require_exit_code
        assert new.services == new.targets == "any"
    listed = CliRunner().invoke(main, ["proxy", "chains", "--config", str(target)]).output
    assert "letter, byte-limit, caesar, caesar, letter" in " ".join(listed.split())
    one, two = before.chains["own"].legacy, after.chains["own"].legacy
    assert one is not None and two is not None
    assert one["elements"] == two["elements"] and one["dst"] == two["dst"]
    assert two["src"]["config"] == {"text": "Hello"}


# --- a process of its own -------------------------------------------------------------------------


@pytest.fixture
def server() -> Iterator[Resident]:
    with resident(start=False) as made:
        made.qube.configure("", f'legacy_plugins = ["{DATA}/plugins"]')
        made.qube.chain("pass", '"pass"')
        for how in ("spin", "block", "raise"):
            made.qube.chain(how, f"{{ use = 'mishap', how = '{how}' }}", "'pass'")
        made.start()
        yield made


def test_a_closed_reader_aborts_in_a_worker_too(server: Resident) -> None:
    server.qube.service("deaf", "#!/bin/sh\nexec <&-\nexec sleep 30\n")
    rules = 'services = "any"\ntargets = "any"\non_closed_reader = "abort"\n'
    server.notices.clear()
    server.qube.chain("abort", "'caesar'", "'pass'", rules=rules)
    server.wait_for("READY=1")
    done = server.call("abort+vault+deaf", b"x" * 1_000_000)
    assert done.returncode == 125
    (record,) = server.qube.records()
    assert record["cause"] == "closed-reader"
    eventually(lambda: not left_over(server.qube))


@pytest.mark.spec("PROXY-065")
@pytest.mark.parametrize("how", ["spin", "block"])
def test_a_plugin_that_blocks_or_spins_hurts_its_own_call_only(server: Resident, how: str) -> None:
    process = server.launch(f"{how}+vault+mirror")
    eventually(lambda: server.qube.pids())
    for _ in range(5):
        assert server.call("pass+vault+mirror", b"x").stdout == b"x"
    (call,) = eventually(lambda: len(server.calls()) == 1 and server.calls())
    worker = _child(server.process.pid)
    assert alive(worker)
    with server.control() as client:
        client.end(call["id"])
    assert process.wait(30) == 125
    eventually(lambda: not alive(worker) and not left_over(server.qube))
    (record,) = [r for r in server.qube.records() if r["chain"] == how]
    assert record["cause"] == "killed"


@pytest.mark.spec("PROXY-065")
def test_a_spinning_plugin_does_not_outlive_its_server(server: Resident) -> None:
    server.launch("spin+vault+mirror")
    eventually(lambda: server.qube.pids())
    worker = _child(server.process.pid)
    server.process.kill()
    eventually(lambda: not alive(worker) and not left_over(server.qube))


@pytest.mark.spec("PROXY-052")
def test_a_worker_that_is_killed_leaves_one_record_and_no_process(server: Resident) -> None:
    process = server.launch("block+vault+mirror")
    eventually(lambda: server.qube.pids())
    os.kill(_child(server.process.pid), signal.SIGKILL)
    assert process.wait(30) == 125
    (record,) = server.qube.records()
    assert record["cause"] == "filter-error" and "without a word" in record["reason"]
    eventually(lambda: not left_over(server.qube))


def _child(pid: int) -> int:
    """Return the one child of a process that lives: others that have ended are reaped soon."""
    path = Path(f"/proc/{pid}/task/{pid}/children")

    def children() -> list[int]:
        return [int(child) for child in path.read_text().split() if alive(int(child))]

    (child,) = eventually(lambda: len(children()) == 1 and children())
    return int(child)


# --- helpers ------------------------------------------------------------------------------------


def run(coroutine: Any) -> Any:
    return asyncio.run(asyncio.wait_for(coroutine, 60))


@pytest.mark.spec("PROXY-051")
def test_helpers_wait_and_lose_nothing() -> None:
    async def work() -> tuple[bytes, int]:
        reader, writer = package.open_single_pipe()
        data = os.urandom(1 << 20)

        async def write() -> None:
            await package.write_noblock(writer, data)
            writer.close()

        writing = asyncio.ensure_future(write())
        head = await package.read_full_noblock(reader, 1000)
        body = await package.read_full_noblock(reader, 2 << 20)
        await writing
        assert len(head) == 1000
        assert head + body == data
        reader.close()
        r1, w1, r2, w2 = package.open_pipe()
        joined = asyncio.ensure_future(package.connect_noblock(r1, w2))
        await package.write_noblock(w1, b"abc")
        got = await package.read_noblock(r2)
        w1.close()
        assert await package.read_noblock(r2) == b""
        return got, await joined

    assert run(work()) == (b"abc", 3)


def test_what_was_written_before_close_arrives_and_a_gone_reader_is_no_error() -> None:
    async def work() -> None:
        reader, writer = package.open_single_pipe()
        writer.write(b"x" * 500_000)
        writer.close()
        assert len(await package.read_full_noblock(reader, 1 << 20)) == 500_000
        reader.close()
        reader, writer = package.open_single_pipe()
        reader.close()
        assert await package.write_noblock(writer, b"y" * 100_000) == 100_000
        await package.flush_noblock(writer)
        writer.close()

    run(work())


def test_a_reader_that_is_finished_ends_although_its_writer_stays() -> None:
    async def work() -> int:
        reader, writer = package.open_single_pipe()
        reading = asyncio.ensure_future(package.discard_noblock(reader))
        await package.write_noblock(writer, b"abc")
        await asyncio.sleep(0)
        reader.finish()
        size = await reading
        writer.close()
        reader.close()
        return int(size)

    assert run(work()) == 3


def test_base_classes_pass_nothing_by_themselves() -> None:
    """A plugin whose coroutine is misspelt must not let everything through."""
    plugin = package.QrexecProxyPlugin(package.get_logger("x"), package.Meta(src="work"))
    assert plugin.config == {} and plugin.meta.src == plugin.meta["src"] == "work"
    with pytest.raises(NotImplementedError):
        run(plugin.proxy(None, None, None, None))
