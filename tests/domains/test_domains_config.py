"""The system file, names, identities, the registry, the places: plain values in and out."""

from __future__ import annotations

import os
import sqlite3
import tempfile
from pathlib import Path

import pytest

from sluice.domains.model import DOM0, LABELS, DomainConfig, name_error
from sluice.domains.paths import Paths, make_private
from sluice.domains.registry import Registry
from sluice.domains.sandbox import etc
from sluice.domains.sandbox.supplies import supplies
from sluice.domains.store import Store
from sluice.domains.system_file import load
from sluice.errors import ConfigError, LocalError


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "system.toml"
    path.write_text(text)
    return path


# --- names -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a" * 32, "VM name must be shorter than 32 characters"),
        ("1a", "VM name cannot start with hyphen, underscore, dot or numbers"),
        ("-a", "VM name cannot start with hyphen, underscore, dot or numbers"),
        (".a", "VM name cannot start with hyphen, underscore, dot or numbers"),
        ("_a", "VM name cannot start with hyphen, underscore, dot or numbers"),
        ("a/b", "VM name contains illegal characters"),
        ("a b", "VM name contains illegal characters"),
        ("ä", "VM name contains illegal characters"),
        ("", "VM name contains illegal characters"),
        ("Domain-0", "VM name cannot be 'Domain-0'"),
        ("none", "VM name cannot be 'none' nor 'default'"),
        ("default", "VM name cannot be 'none' nor 'default'"),
        ("x-dm", "VM name cannot end with -dm"),
        ("a" * 31, None),
        ("work-2.x_y", None),
    ],
)
def test_names(name: str, message: str | None) -> None:
    assert name_error(name) == message


def test_labels_have_the_specified_colours() -> None:
    assert next(iter(LABELS.items())) == ("red", "0xcc0000")
    assert list(LABELS) == ["red", "orange", "yellow", "green", "gray", "blue", "purple", "black"]


# --- the file --------------------------------------------------------------------------------


def test_a_small_system(tmp_path: Path) -> None:
    (tmp_path / "client").write_text("#!/bin/sh\n")
    (tmp_path / "client").chmod(0o755)
    file = load(
        write(
            tmp_path,
            """
[system]
default_dispvm = "dvm"
[domains.work]
label = "blue"
tags = ["a", "b"]
features = { "sandbox.pids-max" = 10, "service.clock" = true, "off" = false }
[domains.work.files]
"/usr/local/bin/client" = "client"
[domains.dvm]
template_for_dispvms = true
[domains.disp1]
class = "DispVM"
template = "dvm"
""",
        )
    )
    with Store(tmp_path / "store") as store:
        registry = file.registry(store)
    work = registry.get("work")
    assert work is not None
    assert (work.klass, work.label, work.template) == ("AppVM", "blue", "host")
    assert work.tags == {"a", "b"}
    assert dict(work.features) == {"sandbox.pids-max": "10", "service.clock": "1", "off": ""}
    assert work.files["/usr/local/bin/client"] == (0o755, str(tmp_path / "client"))
    assert work.default_dispvm == "dvm"
    assert work.autostart
    dvm, disposable = registry.get("dvm"), registry.get("disp1")
    assert dvm is not None
    assert disposable is not None
    assert not dvm.autostart
    assert not disposable.autostart
    assert disposable.template == "dvm"
    assert [domain.name for domain in registry] == ["dom0", "work", "dvm", "disp1"]


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("[domains.work]\nlable = 'blue'\n", 2, ["domains.work.lable", "'label'"]),
        ("[domains.work]\n\nlabel = 'bleu'\n", 3, ["'bleu'", "'blue'"]),
        ("[domain.work]\n", 1, ["domain", "'domains'"]),
        ("[system]\nkind = 'xen'\n", 2, ["system.kind", "bubblewrap"]),
        ("[domains.a]\n[domains.'x-dm']\n", 2, ["cannot end with -dm"]),
        ("[domains.dom0]\n", 1, ["always exists"]),
        ("[domains.a]\nmemory = '5'\n", 2, ["whole number"]),
        ("[domains.a]\nmemory = true\n", 2, ["whole number"]),
        ("[domains.a]\nautostart = 1\n", 2, ["true or false"]),
        ("[domains.a]\ntags = 'x'\n", 2, ["list of words"]),
        ("[domains.a]\ntags = ['x y']\n", 2, ["not a tag"]),
        ("[domains.a]\nnetvm = 'b'\n", 2, ["no domain 'b'"]),
        ("[domains.a]\ntemplate = 'b'\n", 2, ["no domain 'b'"]),
        ("[domains.a]\ndefault_user = '-x'\n", 2, ["not a user name"]),
        ("[domains.a]\nclass = 'DispVM'\ntemplate = 'host'\n", 3, ["template_for_dispvms=True"]),
        ("[domains.a]\n[domains.a.files]\n'/etc/shadow' = 'x'\n", 3, ["no place for a file"]),
        ("[domains.a.files]\n'/rw/../etc/x' = 'x'\n", 2, ["no place for a file"]),
        ("[domains.a.files]\n'/rw/x' = 'missing'\n", 2, ["No such file"]),
        ("[domains.a.features]\n'x y' = '1'\n", 2, ["not a feature's name"]),
        ("[domains.a.features]\n'sandbox.pid-max' = 5\n", 2, ["'sandbox.pids-max'"]),
        ("[domains.a.features]\n'sandbox.pids-max' = 'many'\n", 2, ["whole number"]),
        ("[system]\ndefault_dispvm = 'b'\n[domains.a]\n", 2, ["system.default_dispvm", "'b'"]),
        ("[domains.a\n", 1, []),
    ],
)
def test_what_is_wrong_is_named_with_its_line(
    tmp_path: Path, text: str, line: int, words: list[str]
) -> None:
    path = write(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        load(path)
    assert str(caught.value).startswith(f"{path}:{line}: ")
    for word in words:
        assert word in str(caught.value)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        load(tmp_path / "nothing.toml")


# --- identities ------------------------------------------------------------------------------


def test_identities_stay(tmp_path: Path) -> None:
    with Store(tmp_path / "store") as store:
        first, second = store.identity("work"), store.identity("vault")
    assert (first.qid, second.qid) == (1, 2)
    assert first.uuid != second.uuid
    with Store(tmp_path / "store") as store:
        assert store.identity("work") == first
        assert store.identities() == [first, second]


@pytest.mark.spec("CORE-176")
def test_a_domain_made_again_is_another(tmp_path: Path) -> None:
    with Store(tmp_path / "store") as store:
        before = store.identity("work")
        store.forget("work")
        after = store.identity("work")
    assert after.qid == before.qid  # the smallest free number
    assert after.uuid != before.uuid
    registry = Registry([DomainConfig("work", after.qid, after.uuid)])
    assert registry.get("uuid:" + before.uuid) is None
    assert registry.get("uuid:" + after.uuid) is registry.get("work")


def test_the_smallest_free_number_is_given(tmp_path: Path) -> None:
    with Store(tmp_path / "store") as store:
        for name in ("a", "b", "c"):
            store.identity(name)
        store.forget("b")
        assert store.identity("d").qid == 2


def test_a_newer_store_is_refused(tmp_path: Path) -> None:
    Store(tmp_path / "store").close()
    with sqlite3.connect(tmp_path / "store") as database:
        database.execute("PRAGMA user_version = 99")
    database.close()
    with pytest.raises(LocalError, match="newer Sluice"):
        Store(tmp_path / "store")


def test_a_store_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "store").write_bytes(b"nothing of the kind" * 100)
    with pytest.raises(LocalError, match="cannot be used"):
        Store(tmp_path / "store")


# --- the registry ----------------------------------------------------------------------------

UUID = "11111111-1111-4111-8111-111111111111"


def test_the_registry_finds_and_refuses_doubles() -> None:
    work = DomainConfig("work", 1, UUID)
    registry = Registry([work])
    assert registry.get("work") is registry.get("uuid:" + UUID) is registry.by_qid(1) is work
    assert registry.get("dom0") is registry.get("uuid:" + DOM0.uuid) is DOM0
    assert registry.get("uuid:work") is None
    assert len(registry) == 2
    assert "work" in registry
    for double in (
        DomainConfig("work", 2, UUID.replace("1", "2")),
        DomainConfig("other", 1, UUID.replace("1", "2")),
        DomainConfig("other", 2, UUID),
    ):
        with pytest.raises(LocalError):
            registry.add(double)
    with pytest.raises(LocalError):
        registry.remove("dom0")
    assert registry.remove("work") is work
    assert registry.get("work") is registry.by_qid(1) is None


def test_what_policy_may_know() -> None:
    work = DomainConfig("work", 1, UUID, tags=frozenset({"t"}), label="blue", default_dispvm="d")
    remote = DomainConfig("far", 2, UUID.replace("1", "2"), klass="RemoteVM", relayvm="work")
    info = Registry([work, remote]).system_info_json(["work"])["domains"]
    assert info["work"] == {
        "internal": None,
        "tags": ["t"],
        "type": "AppVM",
        "template_for_dispvms": False,
        "default_dispvm": "d",
        "icon": "appvm-blue",
        "label": "0x3465a4",
        "guivm": "dom0",
        "relayvm": None,
        "transport_rpc": None,
        "power_state": "Running",
        "uuid": UUID,
    }
    assert info["dom0"]["power_state"] == "Running"
    assert info["far"]["relayvm"] == "work"
    assert Registry([work]).system_info_json([])["domains"]["work"]["power_state"] == "Halted"


# --- places ----------------------------------------------------------------------------------


def test_the_places_of_a_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    paths = Paths.find(None, {"HOME": "/home/u", "XDG_RUNTIME_DIR": "/run/user/1000"})
    assert paths.config == Path("/home/u/.config/sluice")
    assert paths.state == Path("/home/u/.local/state/sluice")
    assert paths.runtime == Path("/run/user/1000/sluice")
    other = {"HOME": "/home/u", "XDG_CONFIG_HOME": "/c", "XDG_STATE_HOME": "relative"}
    paths = Paths.find(None, other)
    assert paths.config == Path("/c/sluice")
    assert paths.state == Path("/home/u/.local/state/sluice")
    assert paths.runtime == paths.state / "run"


def test_the_places_of_the_service(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    paths = Paths.find(None, {"HOME": "/root", "XDG_CONFIG_HOME": "/c"})
    assert (paths.config, paths.state, paths.runtime) == (
        Path("/etc/sluice"),
        Path("/var/lib/sluice"),
        Path("/run/sluice"),
    )


def test_the_places_below_a_root() -> None:
    with tempfile.TemporaryDirectory(prefix="s-", dir="/tmp") as short:
        paths = Paths.find(f"{short}/r")
        paths.create()
        assert paths.control_socket == Path(short) / "r/run/control.sock"
        for made in (paths.state, paths.runtime, paths.daemon_dir, paths.log, paths.appvms):
            assert made.stat().st_mode & 0o777 == 0o700


@pytest.mark.spec("CORE-182")
def test_services_of_the_adminvm_are_never_the_hosts(tmp_path: Path) -> None:
    for paths in (Paths.find(str(tmp_path)), Paths(Path("/etc/sluice"), Path("/s"), Path("/r"))):
        for directory in (*paths.rpc, *paths.rpc_config):
            assert not str(directory).startswith(("/etc/qubes", "/usr/local/etc", "/run/qubes"))


def test_paths_that_sockets_cannot_have(tmp_path: Path) -> None:
    with pytest.raises(LocalError, match="too long"):
        Paths.find(str(tmp_path / ("x" * 60))).create()


def test_a_directory_of_somebody_else(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    with pytest.raises(LocalError, match="not a directory"):
        make_private(tmp_path / "link")
    (tmp_path / "open").mkdir(mode=0o777)
    make_private(tmp_path / "open")
    assert (tmp_path / "open").stat().st_mode & 0o777 == 0o700
    if os.geteuid() == 0:
        (tmp_path / "theirs").mkdir()
        os.chown(tmp_path / "theirs", 12345, 12345)
        with pytest.raises(LocalError, match="belongs to uid 12345"):
            make_private(tmp_path / "theirs")


# --- what a domain is given ------------------------------------------------------------------


@pytest.mark.spec("CORE-179")
def test_generated_files_of_etc() -> None:
    domain = DomainConfig("work", 1, UUID)
    files = etc.generated(domain, has_root=True)
    assert files["passwd"].startswith("root:x:0:0:")
    assert "user:x:1000:1000:user:/home/user:/bin/bash\n" in files["passwd"]
    assert files["machine-id"] == UUID.replace("-", "") + "\n"
    assert files["hostname"] == "work\n"
    assert "root" not in etc.generated(domain, has_root=False)["passwd"]
    assert not set(etc.ALLOWED) & {"shadow", "gshadow", "machine-id", "passwd", "ssh", "hostname"}


@pytest.mark.spec("CORE-168")
def test_the_environment_is_made_from_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_OF_THE_SESSION", "x")
    made = etc.environment(DomainConfig("work", 1, UUID), as_root=False)
    always = {"PATH", "PYTHONPATH", "HOME", "USER", "LOGNAME", "SHELL", "LANG"}
    assert set(made) == always | {"XDG_RUNTIME_DIR"}
    assert set(etc.environment(DomainConfig("work", 1, UUID), as_root=True)) == always


def test_supplies(tmp_path: Path) -> None:
    from sluice.agent.inside import EACH_START, FIRST_START, OWNED_BY_USER, unpack

    paths = Paths(tmp_path / "c", tmp_path / "s", tmp_path / "r")
    (tmp_path / "c/template/host/usr/local/bin").mkdir(parents=True)
    (tmp_path / "c/template/host/usr/local/bin/tool").write_text("tool")
    (tmp_path / "c/template/host/etc/skel").mkdir(parents=True)
    (tmp_path / "c/template/host/etc/skel/.rc").write_text("rc")
    (tmp_path / "mine").write_text("mine")
    domain = DomainConfig(
        "work",
        1,
        UUID,
        template="host",
        features={"service.cups": "1", "service.off": "", "vm-config.x": "y"},
        files={"/home/user/mine": (0o644, str(tmp_path / "mine"))},
    )
    laid = {
        path: (flags, mode, data) for flags, mode, path, data in unpack(supplies(domain, paths))
    }
    assert laid[b"home/user/.rc"] == (FIRST_START | OWNED_BY_USER, 0o644, b"rc")
    assert laid[b"usr/local/bin/tool"] == (FIRST_START, 0o644, b"tool")
    assert laid[b"home/user/mine"] == (EACH_START | OWNED_BY_USER, 0o644, b"mine")
    assert laid[b"run/sluice/config/name"][2] == b"work"
    assert laid[b"run/sluice/config/qubes-service/cups"][2] == b"1"
    assert laid[b"run/sluice/config/qubes-service/off"][2] == b"0"
    assert laid[b"run/sluice/config/vm-config/x"][2] == b"y"
    assert b"run/qubes-service/cups" in laid
    assert b"run/qubes-service/off" not in laid
    assert list(laid)[-1] == b"rw/config/rc.local"
