"""Directories, files, directives, legacy files: docs/spec/policy.md sections 3, 7, 8 and 25.4."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.support.policy import FIXTURE, brief

from sluice.errors import PolicyError
from sluice.policy import loader
from sluice.policy.files import DiskFiles, PolicyStore
from sluice.policy.loader import Loader, select
from sluice.policy.memory import MemoryFiles, Overlay, from_files
from sluice.policy.problems import PolicyLoadError, PolicySyntaxError
from sluice.policy.rules import Request

RULE = "{0}.S * a b allow\n"


def put(base: Path, files: dict[str, str | bytes]) -> None:
    """Write files below a directory."""
    for name, content in files.items():
        path = base / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())


def store(base: Path, *directories: str) -> PolicyStore:
    """Return a store of directories below ``base``."""
    return PolicyStore([base / name for name in directories], legacy_directory=base / "legacy")


def services(base: Path, *directories: str) -> list[str]:
    """Return the services of the rules, without ``.S``, in order."""
    policy = store(base, *(directories or ("d",))).load()
    return [rule.service.removesuffix(".S") for rule in policy.rules]


def failure(files: dict[str, str | bytes], directories: tuple[str, ...] = ("/p",)) -> str:
    """Return the text of the error that a set in memory gives."""
    with pytest.raises(PolicyError) as caught:
        from_files(files, directories)
    return str(caught.value)


@pytest.mark.spec("POL-001")
def test_default_directories() -> None:
    """The runtime directory goes first."""
    assert loader.DIRECTORIES == ("/run/qubes/policy.d", "/etc/qubes/policy.d")
    assert PolicyStore().directories == loader.DIRECTORIES


@pytest.mark.spec("POL-002", "POL-003", "POL-006", "POL-007", "POL-008", "POL-013", "POL-246")
def test_which_files_count(tmp_path: Path) -> None:
    """Regular files that end in .policy, links followed; nothing else is even opened."""
    put(tmp_path, {f"d/{name}": "broken" for name in (
        "README", "x.policy.rpmnew", "x.policy~", "X.txt", ".e.policy", ".policy", "a+b",
        "sub/z.policy", "30-User.txt", "dir.policy/x",
    )})  # fmt: skip
    put(tmp_path, {"d/a.policy": RULE.format("a"), "elsewhere": RULE.format("link")})
    (tmp_path / "d/link.policy").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "d/gone.policy").symlink_to(tmp_path / "nowhere")
    assert services(tmp_path) == ["a", "link"]


@pytest.mark.spec("POL-004", "POL-005", "POL-246")
@pytest.mark.parametrize(
    "name", ["30-User.policy", "a+b.policy", "a b.policy", "!x.policy", "x~.policy", "ä.policy"]
)
def test_bad_names_deny_everything(tmp_path: Path, name: str) -> None:
    """A name that somebody may have meant makes the load fail, naming the path."""
    put(tmp_path, {"d/a.policy": RULE.format("a"), f"d/{name}": ""})
    with pytest.raises(PolicyLoadError, match="invalid filename") as caught:
        services(tmp_path)
    assert not isinstance(caught.value, PolicySyntaxError)


@pytest.mark.spec("POL-009", "POL-020", "POL-246")
def test_order(tmp_path: Path) -> None:
    """By code point of the names, not by number."""
    names = ("10-b", "9-a", "_c", "-d", "a", "05-x")
    put(tmp_path, {f"d/{name}.policy": RULE.format(name.strip("-_")) for name in names})
    put(tmp_path, {"d/20-two.policy": "t1.S * a b allow\n\nt2.S * a b deny\n"})
    expected = ["d", "05-x", "10-b", "t1", "t2", "9-a", "c", "a"]
    assert services(tmp_path) == expected


@pytest.mark.spec("POL-010", "POL-011", "POL-246")
def test_two_directories(tmp_path: Path) -> None:
    """Files interleave by name; the first directory's file masks its namesake, even empty."""
    put(
        tmp_path,
        {
            "run/10-x.policy": RULE.format("runx"),
            "run/30-z.policy": "",
            "etc/05-y.policy": RULE.format("y"),
            "etc/10-x.policy": "broken",
            "etc/20-w.policy": RULE.format("w"),
            "etc/30-z.policy": RULE.format("z"),
        },
    )
    assert services(tmp_path, "run", "etc") == ["y", "runx", "w"]


@pytest.mark.spec("POL-012", "POL-246")
def test_missing_directory(tmp_path: Path) -> None:
    """A listed directory that is not there makes every call denied."""
    put(tmp_path, {"etc/a.policy": RULE.format("a")})
    with pytest.raises(PolicyLoadError, match="run: cannot be read"):
        services(tmp_path, "run", "etc")


@pytest.mark.spec("POL-014")
def test_one_error_anywhere() -> None:
    """There is no partial loading."""
    text = failure({"/p/a.policy": "t.S * work vault allow\n", "/p/z.policy": "\n\nbad\n"})
    assert text == "/p/z.policy:3: wrong number of fields"


@pytest.mark.spec("POL-015")
@pytest.mark.parametrize("bad", [b"\xff", b"t.S * a b allow\n\xc3\x28", b"\xed\xa0\x80"])
def test_undecodable(bad: bytes) -> None:
    """Bytes that are no UTF-8 are a failure to load, with the line."""
    with pytest.raises(PolicyLoadError, match="not valid UTF-8"):
        from_files({"/p/a.policy": b"\n" + bad}, ("/p",))


@pytest.mark.spec("POL-016", "POL-017", "POL-018", "POL-019")
def test_places_of_errors() -> None:
    """In the included file; at the directive where the include itself fails."""
    main = "# one\n\n!include include/i\n"
    assert failure({"/p/a.policy": main, "/p/include/i": "\n\nbad"}) == (
        "/p/include/i:3: wrong number of fields"
    )
    assert failure({"/p/a.policy": main}) == "/p/a.policy:3: not a file: /p/include/i"


@pytest.mark.spec("POL-062", "POL-063", "POL-064", "POL-073", "POL-246")
def test_include() -> None:
    """At its place, relative to the directory of the top-level file, as often as it is named."""
    files = {
        "/p/a.policy": "a.S * a b allow\n!include include/i\n!include include/i\nz.S * a b deny",
        "/p/include/i": "i.S * a b allow\n!include include/j\n!include /else/k\n",
        "/p/include/j": "j.S * a b allow\n",
        "/else/k": "k.S * a b allow",
    }
    policy = from_files(files, ("/p",))
    names = [rule.service[0] for rule in policy.rules]
    assert names == ["a", "i", "j", "k", "i", "j", "k", "z"]
    files["/p/include/i"] = "!include j"
    assert failure(files) == "/p/include/i:1: not a file: /p/j"


@pytest.mark.spec("POL-063")
def test_include_of_runtime_file(tmp_path: Path) -> None:
    """A runtime file's includes lie below the runtime directory, without fallback."""
    put(
        tmp_path,
        {"run/a.policy": "!include include/x", "etc/include/x": "", "etc/b.policy": ""},
    )
    with pytest.raises(PolicySyntaxError, match=f"not a file: {tmp_path}/run/include/x"):
        store(tmp_path, "run", "etc").load()


@pytest.mark.spec("POL-064", "POL-018")
def test_paths_are_resolved(tmp_path: Path) -> None:
    """Links are followed and dots collapsed; errors cite the resolved path."""
    put(tmp_path, {"d/a.policy": "!include sub/../link", "real": "\nbad"})
    (tmp_path / "d/sub").mkdir()
    (tmp_path / "d/link").symlink_to("../real")
    with pytest.raises(PolicySyntaxError) as caught:
        store(tmp_path, "d").load()
    assert str(caught.value) == f"{(tmp_path / 'real').resolve()}:2: wrong number of fields"


@pytest.mark.spec("POL-065")
def test_include_of_no_file() -> None:
    """A directory is no file; neither is what does not exist, nor a path with a NUL."""
    files: dict[str, str | bytes] = {"/p/a.policy": "!include sub", "/p/sub/x": ""}
    assert failure(files) == "/p/a.policy:1: not a file: /p/sub"


def test_odd_paths(tmp_path: Path) -> None:
    """NUL, too long, a loop of links, a pipe: an error, no crash and no wait."""
    import os

    (tmp_path / "d").mkdir()
    (tmp_path / "d/loop").symlink_to("loop")
    os.mkfifo(tmp_path / "d/pipe")
    os.mkfifo(tmp_path / "d/pipe.policy")
    for path in ("a\0b", "x" * 5000, "loop", "pipe", "/dev/null", "."):
        (tmp_path / "d/a.policy").write_text(f"!include {path}\n")
        with pytest.raises(PolicySyntaxError, match="not a file"):
            store(tmp_path, "d").load()


@pytest.mark.spec("POL-066", "POL-067", "POL-246")
def test_include_dir() -> None:
    """Sorted and filtered as a policy directory; empty is silent, missing an error."""
    files: dict[str, str | bytes] = {
        "/p/a.policy": "a.S * a b deny\n!include-dir sub\nz.S * a b deny",
        "/p/sub/2.policy": "s2.S * a b deny",
        "/p/sub/1.policy": "s1.S * a b deny",
        "/p/sub/x": "broken",
        "/p/sub/.y.policy": "broken",
    }
    policy = from_files(files, ("/p",))
    assert [rule.service for rule in policy.rules] == ["a.S", "s1.S", "s2.S", "z.S"]
    assert "invalid filename" in failure({**files, "/p/sub/X.policy": ""})
    assert failure({"/p/a.policy": "!include-dir no"}) == "/p/a.policy:1: not a directory: /p/no"
    assert not from_files({"/p/a.policy": "!include-dir no"}, ("/p", "/p/no")).rules


@pytest.mark.spec("POL-068", "POL-069", "POL-070", "POL-071", "POL-089", "POL-078")
@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("!include", "invalid number of params"),
        ("!include a b", "invalid number of params"),
        ("!include-dir", "invalid number of params"),
        ("!include-dir a b", "invalid number of params"),
        ("!include-service t.S *", "invalid number of params"),
        ("!include-service t.S * f g", "invalid number of params"),
        ("!compat-4.0 x", "invalid number of params"),
        ("!", "invalid directive"),
        ("!Include x", "invalid directive"),
        ("!include-service * +x f", "only * argument allowed for * service"),
        ("!include-service t:S * f", "service 't:S' contains invalid characters: (':',)"),
        ("!include-service t.S x f", "argument 'x' does not start with +"),
    ],
)
def test_wrong_directives(line: str, message: str) -> None:
    """Checked before anything is opened."""
    assert failure({"/p/a.policy": line}) == f"/p/a.policy:1: {message}"


@pytest.mark.spec("POL-077", "POL-078", "POL-089")
def test_include_service() -> None:
    """A service-format file for that call; its includes are such files for the same call."""
    files: dict[str, str | bytes] = {
        "/p/a.policy": "!include-service t.S +x include/s",
        "/p/include/s": "# c\n$anyvm b allow,user=u\n$include:include/t\n!include include/t\n",
        "/p/include/t": "c $dispvm:d deny,",
    }
    policy = from_files(files, ("/p",))
    assert [str(rule) for rule in policy.rules] == [
        "t.S\t+x\t@anyvm\tb\tallow user=u",
        "t.S\t+x\tc\t@dispvm:d\tdeny",
        "t.S\t+x\tc\t@dispvm:d\tdeny",
    ]
    for directive in ("!compat-4.0", "!include-dir x", "!include-service a * b", "!x"):
        files["/p/include/s"] = directive
        assert failure(files) == "/p/include/s:1: invalid directive"
    files["/p/include/s"] = "a b\n"
    assert failure(files) == "/p/include/s:1: wrong number of fields"


@pytest.mark.spec("POL-072")
@pytest.mark.parametrize(
    "files",
    [
        {"/p/a.policy": "\n!include a.policy"},
        {"/p/a.policy": "\n!include i", "/p/i": "!include j", "/p/j": "!include i"},
        {"/p/a.policy": "\n!include-dir ."},
        {"/p/a.policy": "\n!include-service t.S * s", "/p/s": "!include s"},
        {"/p/a.policy": "\n!include-service t.S * a.policy"},
    ],
)
def test_include_loop(files: dict[str, str | bytes]) -> None:
    """A file that is being read already is an error at the directive."""
    assert "include loop" in failure(files)


@pytest.mark.spec("POL-072")
def test_loop_through_links(tmp_path: Path) -> None:
    """Another name of the same file does not hide the loop."""
    put(tmp_path, {"d/a.policy": "!include other"})
    (tmp_path / "d/other").symlink_to("a.policy")
    with pytest.raises(PolicySyntaxError, match="include loop"):
        store(tmp_path, "d").load()


def test_depth_is_bounded() -> None:
    """Eight levels are well; a thousand are an error, not a crash."""

    def chain(count: int) -> dict[str, str | bytes]:
        files: dict[str, str | bytes] = {f"/p/i{n}": f"!include i{n + 1}" for n in range(count)}
        return {**files, "/p/a.policy": "!include i0", f"/p/i{count}": "t.S * a b deny"}

    assert len(from_files(chain(8), ("/p",)).rules) == 1
    assert "nested more than 32 deep" in failure(chain(1000))


def test_number_of_files_is_bounded() -> None:
    """Files that include each other twice at each level end in an error, soon."""
    files: dict[str, str | bytes] = {
        f"/p/i{n}": f"!include i{n + 1}\n!include i{n + 1}" for n in range(30)
    }
    files |= {"/p/a.policy": "!include i0", "/p/i30": ""}
    assert "more than 20000 files" in failure(files)


LEGACY = {
    "/legacy/s.S": "a b deny",
    "/legacy/s.S+b": "a b allow",
    "/legacy/s.S+a": "$anyvm $dispvm allow,target=c",
    "/legacy/Z.z": "a b ask",
    "/legacy/e.E+": "a b allow",
    "/legacy/README": "a b deny",
    "/legacy/x.rpmsave": "broken",
    "/legacy/x.rpmnew": "broken",
    "/legacy/x.swp": "broken",
    "/legacy/x~": "broken",
    "/legacy/.hidden": "broken",
    "/legacy/include/foo": "broken",
    "/p/35-compat.policy": "first.S * a b deny\n!compat-4.0\nlast.S * a b deny",
}


@pytest.mark.spec(
    "POL-080", "POL-081", "POL-082", "POL-083", "POL-084", "POL-086", "POL-087", "POL-246"
)
def test_legacy_directory() -> None:
    """What is ignored, the order, and the two denials after each file with an argument."""
    policy = from_files(dict(LEGACY), ("/p",))
    assert [str(rule).replace("\t", " ") for rule in policy.rules] == [
        "first.S * a b deny",
        "README * a b deny",
        "Z.z * a b ask",
        "e.E + a b allow",
        "e.E + @anyvm @anyvm deny",
        "e.E + @anyvm @adminvm deny",
        "s.S +a @anyvm @dispvm allow target=c",
        "s.S +a @anyvm @anyvm deny",
        "s.S +a @anyvm @adminvm deny",
        "s.S +b a b allow",
        "s.S +b @anyvm @anyvm deny",
        "s.S +b @anyvm @adminvm deny",
        "s.S * a b deny",
        "last.S * a b deny",
    ]
    implied = policy.rules[4]
    assert (implied.file, implied.line, implied.place) == (
        "/legacy/e.E+", None, "/legacy/e.E+:None",
    )  # fmt: skip
    assert policy.warnings == ("/p/35-compat.policy:2: !compat-4.0 is deprecated",)
    assert "cannot be read" in failure({"/p/a.policy": "!compat-4.0"})


@pytest.mark.spec("POL-085")
@pytest.mark.parametrize("target", ["vault", "dom0", "", "@dispvm", "@dispvm:dvm-web"])
def test_implied_denials_stop_later_rules(target: str) -> None:
    """Whatever comes later cannot allow the same service and argument."""
    files = {
        "/legacy/t.S+a": "mail tmpl allow",
        "/p/a.policy": "!compat-4.0\n* * @anyvm * allow target=vault",
    }
    policy = from_files(files, ("/p",))
    denied = policy.evaluate(Request.of("t.S+a", "work", target), FIXTURE)
    assert brief(denied) == "deny POLICY-DENY"
    assert "None" in denied.message  # type: ignore[union-attr]
    other = policy.evaluate(Request.of("t.S+b", "work", target), FIXTURE)
    assert brief(other) == "allow vault"


@pytest.mark.spec("POL-088", "POL-077")
def test_legacy_includes() -> None:
    """Relative to the legacy directory; service format."""
    files = {
        "/p/a.policy": "!compat-4.0",
        "/legacy/t.S+a": "$include:include/foo",
        "/legacy/include/foo": "a b allow",
    }
    assert str(from_files(files, ("/p",)).rules[0]) == "t.S\t+a\ta\tb\tallow"


@pytest.mark.spec("POL-074", "POL-089")
def test_compat_in_an_include() -> None:
    """It works from an included file; not from within a legacy file."""
    files = {
        "/p/a.policy": "!include i",
        "/p/i": "!compat-4.0",
        "/legacy/t.S": "a b allow",
    }
    assert len(from_files(files, ("/p",)).rules) == 1
    with pytest.raises(PolicySyntaxError, match="invalid directive"):
        from_files({**files, "/legacy/t.S": "!compat-4.0"}, ("/p",))


def test_all_errors_are_reported() -> None:
    """With a report reading goes on: every fault of every file, in reading order."""
    files = {
        "/p/a.policy": "bad\nt.S * a @foo allow zz\n!include i\n!include no\n",
        "/p/i": "worse\n",
        "/p/b.policy": "t.S * a b deny\n",
        "/p/c.policy": b"\xff",
        "/p/d.policy": "!bogus\n",
    }
    errors: list[PolicyError] = []
    loaded = Loader(MemoryFiles(files), ["/p", "/missing"], report=errors.append).load()
    assert [(error.file, error.line) for error in errors] == [
        ("/missing", None), ("/p/a.policy", 1), ("/p/a.policy", 2), ("/p/a.policy", 2),
        ("/p/i", 1), ("/p/a.policy", 4), ("/p/c.policy", 1), ("/p/d.policy", 1),
    ]  # fmt: skip
    assert len(loaded.rules) == 1


@pytest.mark.spec("POL-004", "POL-005", "POL-066")
def test_bad_names_hide_no_other_error() -> None:
    """Each bad name is reported, and what stands in the files beside it."""
    files = {
        "/p/A.policy": "",
        "/p/a.policy": "bad\n!include-dir sub\n",
        "/p/b+c.policy": "",
        "/p/sub/X.policy": "",
        "/p/sub/Y.policy": "",
        "/p/sub/z.policy": "worse\n",
    }
    errors: list[PolicyError] = []
    Loader(MemoryFiles(files), ["/p"], report=errors.append).load()
    assert [(error.file, error.line) for error in errors] == [
        ("/p/A.policy", None), ("/p/b+c.policy", None), ("/p/a.policy", 1),
        ("/p/sub/X.policy", None), ("/p/sub/Y.policy", None), ("/p/sub/z.policy", 1),
    ]  # fmt: skip


@pytest.mark.spec("POL-015")
def test_undecodable_bytes_are_marked_and_hide_no_other_error() -> None:
    """Line and column of the first bad byte of each line; the other lines are read on."""
    content = "t.S * a ü b".encode() + b"\xff\xfe x\r\n!bogus\rt.S * a b deny\n\xc3\nbad\n"
    errors: list[PolicyError] = []
    loader = Loader(MemoryFiles({"/p/a.policy": content}), ["/p"], report=errors.append)
    assert [rule.line for rule in loader.load().rules] == [3]
    assert [(error.line, error.message) for error in errors] == [
        (1, "not valid UTF-8: byte 0xff"),
        (4, "not valid UTF-8: byte 0xc3"),
        (2, "invalid directive"),
        (5, "wrong number of fields"),
    ]
    assert isinstance(errors[0], PolicyLoadError)
    assert (errors[0].column, errors[0].width) == (12, 1)
    line, mark = errors[0].marked().splitlines()
    assert (line.startswith("t.S * a"), mark.index("^")) == (True, line.index(" b") + 2)
    with pytest.raises(PolicyLoadError, match="0xff") as caught:
        from_files({"/p/a.policy": content}, ("/p",))
    assert (caught.value.line, caught.value.column) == (1, 12)


def test_overlay() -> None:
    """A change can be loaded before it is made."""
    below = MemoryFiles({"/p/a.policy": "t.S * a b deny", "/p/b.policy": "!include i", "/p/i": ""})
    change = Overlay(below, {"/p/c.policy": b"c.S * a b deny", "/p/a.policy": None})
    rules = Loader(change, ["/p"]).load().rules
    assert [rule.service for rule in rules] == ["c.S"]
    with pytest.raises(PolicySyntaxError, match="not a file"):
        Loader(Overlay(below, {"/p/i": None}), ["/p"]).load()


def test_unreadable_file(tmp_path: Path) -> None:
    """A file that vanishes while the set is read names itself in the error."""
    put(tmp_path, {"d/a.policy": ""})

    class Vanishing(DiskFiles):
        def read(self, path: str) -> bytes:
            (tmp_path / "d/a.policy").unlink()
            return super().read(path)

    with pytest.raises(PolicyLoadError, match=r"a\.policy: cannot be read"):
        Loader(Vanishing(), [str(tmp_path / "d")]).load()


def test_select_refuses_before_parsing() -> None:
    """The check of the names covers all candidates of a directory."""
    files = MemoryFiles({"/p/a.policy": "broken", "/p/B.policy": ""})
    with pytest.raises(PolicyLoadError):
        select(files.entries("/p"), "/p", files)


def test_size_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """More bytes than anybody writes are refused, not read."""
    from sluice.policy import files

    monkeypatch.setattr(files, "MAX_BYTES", 100)
    put(tmp_path, {"d/a.policy": "#" * 60, "d/b.policy": "#" * 60})
    with pytest.raises(PolicyLoadError, match="more than 100 bytes"):
        store(tmp_path, "d").load()
