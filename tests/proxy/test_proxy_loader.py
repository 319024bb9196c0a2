"""Finding filters and checking them: directories, entry points, misspelt events and options."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from tests.support.proxy import vm

from sluice.errors import ConfigError
from sluice.proxy.configuration import load
from sluice.proxy.loader import BUILTIN, Filters, checked
from sluice.proxy.schema import fields_of

GOOD = '''
from sluice.proxy.options import Size
from sluice.proxy.verdicts import SRC2DST, PASS, Replace


class Upper:
    """Makes letters large."""

    name = "upper"
    inspects = (SRC2DST,)

    class Options:
        """What can be set.

        most: bytes at most
        """

        most: Size = 10

    def __init__(self, options, link):
        self._most = options.most

    def data(self, direction, chunk):
        return Replace(bytes(chunk).upper())
'''


def written(tmp_path: Path, text: str, name: str = "upper.py") -> Path:
    directory = tmp_path / "filters"
    directory.mkdir(exist_ok=True)
    path = directory / name
    path.write_text(textwrap.dedent(text))
    return path


def configured(tmp_path: Path, use: str = '"upper"') -> str:
    path = tmp_path / "proxy.toml"
    path.write_text(
        f'[proxy]\nfilters = ["{tmp_path}/filters"]\n\n[chains.x]\nfilters = [\n  {use},\n]\n'
    )
    return str(path)


def test_a_filter_in_a_directory_is_found_by_its_file_name(tmp_path: Path) -> None:
    written(tmp_path, GOOD)
    configuration = load(configured(tmp_path, '{ use = "upper", most = "1k" }'))
    (use,) = configuration.chain("x").uses
    assert use.name == "upper" and use.options.most == 1024
    assert Filters([str(tmp_path / "filters")]).names()["upper"].endswith("upper.py")


def test_it_runs_in_the_program_form(tmp_path: Path) -> None:
    written(tmp_path, GOOD)
    with vm() as qube:
        qube.service("mirror", "#!/bin/sh\nexec cat\n")
        qube.configure("", f'filters = ["{tmp_path}/filters"]')
        qube.chain("x", '"upper"')
        assert qube.call("x+vault+mirror", b"hello").stdout == b"HELLO"


WRONG = {
    "misspelt event": (("def data(", "def dta("), "def dta", "did you mean 'data'"),
    "helper without underscore": (
        ("def data(", "def helper(self): ...\n    def data("), "def helper", "leading _"),
    "event with wrong parameters": (
        ("def data(self, direction, chunk)", "def data(self, chunk)"), "def data",
        "(self, direction, chunk)"),
    "misspelt inspects": (("inspects =", "inspect ="), "class Upper", "did you mean 'inspects'"),
    "event that is a coroutine": (("def data(", "async def data("), "def data", "no coroutine"),
    "directions that are words": (("(SRC2DST,)", '("src2dst",)'), "class Upper", "(SRC2DST,)"),
    "one direction, bare": (("(SRC2DST,)", "SRC2DST"), "class Upper", "(SRC2DST,)"),
    "directions that are none": (("(SRC2DST,)", "3"), "class Upper", "(SRC2DST,)"),
    "directions by self": (
        ("    inspects = (SRC2DST,)", "    def inspects(self): ..."), "class Upper",
        "@staticmethod"),
    "a constructor of nothing": (
        ("__init__(self, options, link)", "__init__(self, options)"), "def __init__",
        "(self, options, link)"),
    "no constructor": (("__init__(", "_init("), "class Upper", "(self, options, link)"),
    "no options": (("class Options", "class Option"), "class Upper", "did you mean 'Options'"),
    "no name": (('name = "upper"', ""), "class Upper", "needs a name"),
    "odd name": (('"upper"', '"Up per"'), "class Upper", "lower-case"),
    "unknown type of an option": (("most: Size", "most: Sise"), "most: Sise", "Sise"),
    "syntax": (("def data(", "def data(("), "def data", "syntax error"),
    "cannot be imported": (("import Size", "import Sice"), "import Sice", "Sice"),
    "exits": (("class Upper", "raise SystemExit(0)\n\n\nclass Upper"), "raise", "SystemExit: 0"),
}  # fmt: skip


@pytest.mark.spec("PROXY-049")
@pytest.mark.parametrize("kind", WRONG)
def test_a_defect_is_found_at_load_with_file_and_line(tmp_path: Path, kind: str) -> None:
    (old, new), at, part = WRONG[kind]
    assert old in GOOD
    text = GOOD.replace(old, new)
    path = written(tmp_path, text)
    line = next(n for n, row in enumerate(text.splitlines(), 1) if at in row)
    with pytest.raises(ConfigError) as caught:
        load(configured(tmp_path))
    error = caught.value
    assert error.file == str(path) and part in str(error), str(error)
    if kind != "syntax":
        assert error.line == line


@pytest.mark.spec("PROXY-049")
def test_a_misspelt_option_names_the_configuration(tmp_path: Path) -> None:
    written(tmp_path, GOOD)
    path = configured(tmp_path, '{ use = "upper", mots = 1 }')
    with pytest.raises(ConfigError, match=r"proxy\.toml:6: .*'most'"):
        load(path)


@pytest.mark.spec("PROXY-049")
@pytest.mark.parametrize("event", ["check", "inspects"])
def test_a_filter_that_fails_to_judge_its_options_is_named(tmp_path: Path, event: str) -> None:
    text = GOOD.replace("    inspects = (SRC2DST,)\n", "") if event == "inspects" else GOOD
    path = written(
        tmp_path,
        text + f"\n    @staticmethod\n    def {event}(options):\n        return options.nonesuch\n",
    )
    line = path.read_text().count("\n")
    with pytest.raises(ConfigError) as caught:
        load(configured(tmp_path))
    assert "proxy.toml:6: chains.x.filters[0].use: filter 'upper': " in str(caught.value)
    assert "AttributeError: " in str(caught.value) and f" at {path}:{line}" in str(caught.value)


@pytest.mark.spec("PROXY-049")
def test_directions_that_depend_on_the_options_are_directions_too(tmp_path: Path) -> None:
    inspects = "    @staticmethod\n    def inspects(options):\n        return {}\n"
    for answer, good in (("(SRC2DST,)", True), ("('src2dst',)", False), ("SRC2DST", False)):
        text = GOOD.replace("    inspects = (SRC2DST,)\n", inspects.format(answer))
        written(tmp_path, text)
        if good:
            assert load(configured(tmp_path)).chain("x").uses[0].inspected() == (0,)
            continue
        with pytest.raises(ConfigError, match=r"filter 'upper': .*\(SRC2DST,\)"):
            load(configured(tmp_path))


def test_a_data_event_is_needed_where_bytes_are_inspected(tmp_path: Path) -> None:
    written(tmp_path, GOOD.replace("def data(self, direction, chunk)", "def closed(self, cause)"))
    with pytest.raises(ConfigError, match="no event 'data'"):
        load(configured(tmp_path))


def test_a_file_that_defines_another_name(tmp_path: Path) -> None:
    written(tmp_path, GOOD.replace('"upper"', '"uper"'))
    with pytest.raises(ConfigError, match="defines no filter named 'upper'"):
        load(configured(tmp_path))
    written(tmp_path, "x = 1\n")
    with pytest.raises(ConfigError, match="defines no filter"):
        load(configured(tmp_path))


@pytest.mark.spec("PROXY-050")
def test_an_installed_filter_is_found_by_its_entry_point_and_not_loaded_unless_named(
    tmp_path: Path,
) -> None:
    site = tmp_path / "site"
    info = site / "shouter-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: shouter\nVersion: 1.0\n")
    points = "[sluice.filters]\nupper = shouter:Upper\nother = whisperer:Other\n"
    (info / "entry_points.txt").write_text(points)
    (site / "shouter.py").write_text(f"print('loaded')\n{GOOD}")
    (site / "whisperer.py").write_text("print('the other one too')\n")
    config = tmp_path / "proxy.toml"
    for use, loaded in (("upper", True), ("pass", False)):
        config.write_text(f"[chains.x]\nfilters = ['{use}']\n")
        code = (
            f"import sys; sys.path.insert(0, {str(site)!r})\n"
            "from sluice.cli.main import main\n"
            f"sys.argv[1:] = ['proxy', 'check', '--config', {str(config)!r}]\nmain()\n"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert ("loaded" in done.stdout) is loaded
        assert "the other one too" not in done.stdout
        assert f"1. {use}" in done.stdout


@pytest.mark.parametrize("name", BUILTIN)
def test_every_built_in_filter_passes_the_same_checks_and_is_documented(name: str) -> None:
    cls = Filters().get(name)
    assert checked(cls) is cls and cls.name == name
    assert cls.__doc__
    for field in fields_of(cls.Options).values():
        assert field.help, f"{name}: {field.name} has no help"
