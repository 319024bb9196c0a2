"""The proxy as a single file: used in a bare Debian, with plain Python only."""

from __future__ import annotations

import importlib.util
import json
import marshal
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Optional, Union

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support.packaging import IMPORT_ALL, ROOT, BareDebian, reason_against

KEEP = "#!/bin/sh\ncat > /srv/kept\necho an answer that must not arrive\nexit 42\n"
# Where the file lies in the bare Debian, and the names under which it is called.
PLACE = "/usr/local/lib/qrexec-proxy.pyz"


@pytest.fixture(scope="module")
def debian(single: Path) -> Iterator[BareDebian]:
    if reason := reason_against(dpkg=False):
        pytest.skip(reason)
    made = BareDebian()
    for name in ("usr/local/lib", "usr/local/bin", "etc/qubes-rpc", "etc/sluice"):
        (made.root / name).mkdir(parents=True)
    shutil.copy(single, made.root / PLACE.lstrip("/"))
    (made.root / "usr/local/bin/sluice").symlink_to(PLACE)
    (made.root / "etc/qubes-rpc/qrexec-proxy").symlink_to(PLACE)
    (made.root / "usr/local/lib/qrexec-proxy-launcher").symlink_to(PLACE)
    shutil.copy(ROOT / "packaging/proxy.toml", made.root / "etc/sluice/proxy.toml")
    made.script("srv/inbox.Put", KEEP)
    yield made
    made.remove()


def test_it_is_built_alike_each_time(single: Path, tmp_path: Path) -> None:
    again = subprocess.run(
        [sys.executable, str(ROOT / "packaging/build-zipapp"), "--into", str(tmp_path)],
        capture_output=True, text=True, check=True, env={**os.environ, "TZ": "Asia/Tokyo"},
    )  # fmt: skip
    assert Path(again.stdout.strip()).read_bytes() == single.read_bytes()


def test_nothing_in_it_is_compiled_for_a_machine(single: Path) -> None:
    names = zipfile.ZipFile(single).namelist()
    assert "sluice/proxy/program.py" in names and "libraries" in names
    others = [name for name in names if not name.startswith("licences/") and ".py" not in name]
    assert others == ["libraries"]
    _, table = marshal.loads(zipfile.ZipFile(single).read("libraries"))
    assert "click.core" in table and not {"msgspec", "re2", "jsonschema_rs"} & set(table)
    assert not [name for name in names if name.startswith(("sluice/adminvm", "sluice/domains"))]
    assert os.access(single, os.X_OK)


def test_the_commands_work(debian: BareDebian) -> None:
    assert "no mistakes" in debian.check("sluice", "proxy", "check").decode()
    assert b"byte-limit" in debian.check(PLACE, "proxy", "filters")
    passed = debian.check(
        "sluice", "proxy", "run", "--filter", "byte-limit:src2dst=5", "--", "cat",
        data=b"hello world",
    )  # fmt: skip
    assert passed == b"hello"
    unknown = debian.run("sluice", "up")
    assert unknown.returncode == 2 and b"No such command 'up'" in unknown.stderr


def test_the_program_form_makes_calls_and_keeps_its_configuration(debian: BareDebian) -> None:
    for _ in range(2):
        done = debian.run(
            "/etc/qubes-rpc/qrexec-proxy", "one-way+vault+inbox.Put",
            data=b"one way", env={"QREXEC_REMOTE_DOMAIN": "work"},
        )  # fmt: skip
        assert (done.returncode, done.stdout, done.stderr) == (42, b"", b"")
        assert (debian.root / "srv/kept").read_bytes() == b"one way"
        # Kept by the first call, although the modules lie in an archive.
        assert len(list((debian.root / "run/sluice-proxy").glob("*.config"))) == 1
    records = (debian.root / "var/log/sluice/proxy.jsonl").read_text().splitlines()
    assert [json.loads(record)["cause"] for record in records] == ["done", "done"]


def test_no_module_is_missing_but_what_two_filters_need(debian: BareDebian) -> None:
    imported = debian.check("python3", "-IS", "-c", IMPORT_ALL, PLACE).decode().splitlines()
    assert imported.pop() == "True"
    missing = {line.split()[0] for line in imported}
    assert missing == {"sluice.proxy.json_rules", "sluice.proxy.line_rules"}, imported


@pytest.mark.spec("PROXY-010")
def test_the_resident_form_serves_calls_of_the_launcher(debian: BareDebian) -> None:
    assert debian.resident("/usr/local/lib/qrexec-proxy-launcher") == "42"
    assert (debian.root / "srv/kept").read_bytes() == b"one way"


def test_plugins_of_the_earlier_proxy_run_in_a_process_of_their_own(debian: BareDebian) -> None:
    plugins = debian.root / "srv/old/plugins"
    plugins.mkdir(parents=True)
    (plugins / "shout.py").write_text(
        "from plugins import QrexecProxyPlugin, read_noblock, write_noblock, flush_noblock\n"
        "class QrexecProxyPlugin_shout(QrexecProxyPlugin):\n"
        "    async def proxy(self, src_r, src_w, dst_r, dst_w):\n"
        "        while data := await read_noblock(src_r):\n"
        "            await write_noblock(dst_w, data.upper())\n"
        "        await flush_noblock(dst_w)\n"
        "        dst_w.close()\n"
        "        while data := await read_noblock(dst_r):\n"
        "            await write_noblock(src_w, data)\n"
        "        await flush_noblock(src_w)\n"
    )
    (plugins / "config.json").write_text('{"loud": {"plugins": ["shout"]}}')
    debian.script("srv/mirror", "#!/bin/sh\nexec cat\n")
    done = debian.run(
        "/etc/qubes-rpc/qrexec-proxy", "loud+vault+mirror", data=b"one way",
        env={"QREXEC_REMOTE_DOMAIN": "work", "SLUICE_PROXY_CONFIG": "/srv/old"},
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, b"ONE WAY", b"")


def test_a_filter_that_needs_a_compiled_library_says_so(debian: BareDebian) -> None:
    (debian.root / "srv/lines.toml").write_text(
        '[chains.words]\nservices = "any"\ntargets = "any"\n'
        'filters = [{ use = "lines", src2dst = { allow = ["[a-z]+"] } }]\n'
    )
    told = debian.run("sluice", "proxy", "check", "--config", "/srv/lines.toml")
    assert told.returncode != 0
    assert b"/srv/lines.toml:4" in told.stderr and b"google-re2" in told.stderr
    assert b"Traceback" not in told.stderr


def newer_pythons() -> list[str]:
    """Return newer interpreters of this machine, as Fedora would have; there may be none."""
    found = {path for n in range(12, 20) if (path := shutil.which(f"python3.{n}"))}
    found |= {str(path) for path in Path.home().glob(".pyenv/versions/3.1[2-9].*/bin/python3")}
    return [
        path
        for path in sorted(found)
        if not subprocess.run([path, "-c", ""], capture_output=True, check=False).returncode
    ]


def test_it_runs_with_a_newer_python(single: Path) -> None:
    pythons = newer_pythons()
    if not pythons:
        pytest.skip("no Python newer than 3.11 on this machine")
    for python in pythons:
        done = subprocess.run(
            [python, "-IS", str(single), "proxy", "run", "--filter", "byte-limit:src2dst=5",
             "--", "cat"],
            input=b"hello world", capture_output=True, check=False,
        )  # fmt: skip
        assert (done.returncode, done.stdout) == (0, b"hello"), (python, done.stderr)


def stand_in() -> Any:
    """Return the module that the single file has in place of msgspec."""
    where = ROOT / "packaging/zipapp/msgspec"
    spec = importlib.util.spec_from_file_location(
        "msgspec_stand_in", where / "__init__.py", submodule_search_locations=[str(where)]
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["msgspec_stand_in"] = module
    spec.loader.exec_module(module)
    return module


PLAIN = stand_in()
KINDS: list[Any] = [
    str, int, float, bool, list[str], list[int], list[list[int]], dict[str, int],
    dict[str, list[str]], dict[str, Any], tuple[int, ...], tuple[int, str],
    Literal["a", "b"], Literal[1, 2], Literal["a", 1], int | None, str | bool, float | int,
    str | list[str], Optional[list[int]], Union[str, dict[str, str], None],  # noqa: UP007, UP045
    list[str] | dict[str, str] | None, dict[str, list[str] | dict[str, str]] | None,
]  # fmt: skip
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.sampled_from(["a", "b", ""])
    | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.sampled_from(["a", "b"]), inner, max_size=2),
    max_leaves=6,
)  # fmt: skip


def outcome(module: Any, value: Any, kind: Any) -> tuple[str, Any]:
    try:
        return "fits", module.convert(value, kind)
    except module.ValidationError as error:
        return "refused", str(error)


@pytest.mark.parametrize("kind", KINDS, ids=str)
@given(value=VALUES)
def test_the_stand_in_for_msgspec_judges_as_it_does(kind: Any, value: Any) -> None:
    real, plain = outcome(msgspec, value, kind), outcome(PLAIN, value, kind)
    assert real[0] == plain[0], (real, plain)
    if real[0] == "fits":
        assert real[1] == plain[1] and type(real[1]) is type(plain[1])
    else:
        # The place is the same; the order of the words of a choice of types may differ.
        assert real[1].partition(" - at ")[2] == plain[1].partition(" - at ")[2]
        if "|" not in real[1]:
            assert real[1] == plain[1]


@pytest.mark.parametrize(
    ("bounds", "value"),
    [
        ({"ge": 1}, 0),
        ({"ge": 1}, 1),
        ({"gt": 1}, 1),
        ({"le": 1}, 2),
        ({"lt": 1}, 1),
        ({"lt": 1}, 0),
    ],
)
def test_the_stand_in_keeps_bounds(bounds: dict[str, int], value: int) -> None:
    real = outcome(msgspec, value, Annotated[int, msgspec.Meta(**bounds)])
    assert outcome(PLAIN, value, Annotated[int, PLAIN.Meta(**bounds)]) == real


STRUCTS = """
class Base(Struct):
    name: str

class Options(Base):
    most: int = 3
    some: list[str] = []
"""


@pytest.mark.parametrize("before", ["", "from __future__ import annotations\n"])
def test_the_stand_in_knows_the_fields_of_filters_that_people_wrote(before: str) -> None:
    code = compile(before + STRUCTS, "filter.py", "exec", dont_inherit=True)
    for module in (msgspec, PLAIN):
        names: dict[str, Any] = {"Struct": module.Struct}
        exec(code, names)
        found = {field.name: field.type for field in module.structs.fields(names["Options"])}
        assert list(found) == ["name", "most", "some"]
        # What they mean as text, `schema` finds out.
        assert before or list(found.values()) == [str, int, list[str]]
        made = names["Options"]("x", some=["y"])
        assert (made.name, made.most, made.some) == ("x", 3, ["y"])


def test_the_stand_in_has_structs_with_fields_and_defaults() -> None:
    for module in (msgspec, PLAIN):
        made = type(
            "Options",
            (module.Struct,),
            {"__annotations__": {"a": int, "b": list, "c": str}, "b": [], "c": "x"},
        )
        fields = {field.name: field for field in module.structs.fields(made)}
        assert list(fields) == ["a", "b", "c"]
        assert fields["a"].default is module.NODEFAULT
        assert fields["a"].default_factory is module.NODEFAULT
        assert fields["b"].default_factory() == [] and fields["c"].default == "x"
        one, two = made(a=1), made(a=2)
        one.b.append(1)
        assert two.b == [] and one.c == "x" and one != two and one == made(a=1, b=[1])
        with pytest.raises(TypeError):
            made()
        with pytest.raises(TypeError):
            made(a=1, d=2)
