"""Finding filters, and checking them when they are loaded (docs/spec/proxy.md 5).

A filter is found as a built-in, as an entry point of the group ``sluice.filters``, or as a class in
a file of a directory that the configuration names. It is loaded only when a chain names it. What is
wrong with it (a misspelt event, an unknown attribute, options without type) is found here, and
names its file and line.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import sys
import traceback
from collections.abc import Iterable
from types import ModuleType
from typing import Any

from sluice.errors import ConfigError
from sluice.proxy.schema import did_you_mean, fields_of, suggest
from sluice.proxy.stage import EVENTS, directions

GROUP = "sluice.filters"
# name -> "module:class" below sluice.proxy.filters.
BUILTIN = {
    "pass": "pass_:Pass",
    "byte-limit": "byte_limit:ByteLimit",
    "stop-src": "stop:StopSrc",
    "stop-dst": "stop:StopDst",
    "timeout": "timeout:Timeout",
    "idle-timeout": "idle_timeout:IdleTimeout",
    "count": "count:Count",
    "concurrent": "concurrent:Concurrent",
    "throttle": "throttle:Throttle",
    "sniff": "sniff:Sniff",
    "record": "record:Record",
    "streamline": "streamline:Streamline",
    "lines": "lines:Lines",
    "json": "json:Json",
    "content": "content:Content",
    "program": "program:Program",
    "metrics": "metrics:Metrics",
}
# Attributes of a filter's class besides its events.
# ``blocking = True``: it may wait for something else than bytes, so that the resident form gives
# its chains a process of their own.
ATTRIBUTES = (
    "name", "aliases", "inspects", "Options", "check", "max_held", "describe", "blocking",
)  # fmt: skip
EVENT_PARAMETERS = {
    "opened": ("call",),
    "data": ("direction", "chunk"),
    "eof": ("direction",),
    "timer": ("key",),
    "closed": ("cause",),
}


class Filters:
    """The filters that can be named in chains: built-in, installed, and of some directories."""

    def __init__(self, directories: Iterable[str] = ()) -> None:
        """Take the directories; their files are read when a name is looked for."""
        self._directories = list(directories)
        self._loaded: dict[str, type[Any]] = {}
        self._installed: dict[str, Any] | None = None
        self._files: dict[str, str] | None = None

    def names(self) -> dict[str, str]:
        """Return all known names with where each is found, without loading one."""
        found = dict.fromkeys(BUILTIN, "built in")
        for name, point in self._entry_points().items():
            found.setdefault(name, f"installed: {point.value}")
        for name, file in self._in_directories().items():
            found.setdefault(name, file)
        return found

    def get(self, name: str) -> type[Any]:
        """Load and check one filter. Raises ConfigError with file and line where it is wrong."""
        name = name.replace("_", "-")
        if name not in self._loaded:
            self._loaded[name] = self._load(name)
        return self._loaded[name]

    def _load(self, name: str) -> type[Any]:
        if name in BUILTIN:
            module_name, class_name = BUILTIN[name].split(":")
            module = importlib.import_module(f"sluice.proxy.filters.{module_name}")
            cls: Any = getattr(module, class_name)
            return checked(cls)
        points = self._entry_points()
        if name in points:
            try:
                cls = points[name].load()
            except (Exception, SystemExit) as error:
                raise ConfigError(
                    f"filter '{name}' ({points[name].value}) cannot be loaded: "
                    f"{type(error).__name__}: {error}"
                ) from error
            return checked(cls)
        files = self._in_directories()
        if name in files:
            return _from_file(name, files[name])
        raise ConfigError(f"unknown filter '{name}'", suggestion=suggest(name, self.names()))

    def _entry_points(self) -> dict[str, Any]:
        if self._installed is None:
            # Dear (it reads the metadata of every package), so only where a name is not built in.
            from importlib.metadata import entry_points

            self._installed = {point.name: point for point in entry_points(group=GROUP)}
        return self._installed

    def _in_directories(self) -> dict[str, str]:
        """Return name -> file of the directories: a file holds the filters that it is named for."""
        if self._files is None:
            self._files = {}
            for directory in self._directories:
                for file in sorted(_python_files(directory)):
                    stem = os.path.basename(file)[:-3].replace("_", "-")
                    self._files.setdefault(stem, file)
        return self._files


def _python_files(directory: str) -> list[str]:
    try:
        entries = os.listdir(directory)
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}", file=directory) from None
    return [
        os.path.join(directory, entry)
        for entry in entries
        if entry.endswith(".py") and not entry.startswith(("_", "."))
    ]


def load_file(file: str) -> ModuleType:
    """Run a file as a module of its own. Raises ConfigError with the line of what is wrong."""
    module_name = "sluice_filter_" + "".join(c if c.isalnum() else "_" for c in file)
    spec = importlib.util.spec_from_file_location(module_name, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    try:
        spec.loader.exec_module(module)
    except SyntaxError as error:
        raise ConfigError(f"syntax error: {error.msg}", file=file, line=error.lineno) from None
    except (Exception, SystemExit) as error:
        line = None
        trace = error.__traceback__
        while trace is not None:
            if trace.tb_frame.f_code.co_filename == file:
                line = trace.tb_lineno
            trace = trace.tb_next
        raise ConfigError(f"{type(error).__name__}: {error}", file=file, line=line) from error
    return module


def filters_in(file: str) -> list[type[Any]]:
    """Return the filter classes that a file defines (public classes with a ``name``)."""
    module = load_file(file)
    return [
        value
        for attribute, value in vars(module).items()
        if inspect.isclass(value)
        and not attribute.startswith("_")
        and value.__module__ == module.__name__
        and any(hasattr(value, known) for known in ("name", "inspects", *EVENTS))
    ]


def _from_file(name: str, file: str) -> type[Any]:
    classes = filters_in(file)
    if not classes:
        raise ConfigError("defines no filter: a class with a name and events", file=file)
    for cls in classes:
        checked(cls)
    for cls in classes:
        if cls.name == name:
            return cls
    raise ConfigError(
        f"defines no filter named '{name}'", file=file, suggestion=suggest(name, _names(classes))
    )


def _names(classes: list[type[Any]]) -> list[str]:
    return [cls.name for cls in classes]


def checked(candidate: Any) -> type[Any]:
    """Return it if it is a filter as section 5 wants it. Raises ConfigError otherwise."""
    if not inspect.isclass(candidate):
        raise ConfigError(f"{candidate!r} is no class")
    cls: type[Any] = candidate
    file, line = _place(cls)
    problem = _attribute_problem(cls)
    if problem is not None:
        message, hint, at = problem
        raise ConfigError(message, file=file, line=at or line, suggestion=hint)
    try:
        fields_of(cls.Options)
    except (TypeError, NameError) as error:
        options_file, options_line = _place(cls.Options)
        raise ConfigError(
            f"the options of '{cls.name}' cannot be understood: {error}",
            file=file,
            line=_line_of(error, options_file) or options_line,
        ) from None
    return cls


def _attribute_problem(cls: type[Any]) -> tuple[str, str | None, int | None] | None:
    """Return what is wrong with a class: message, suggestion, line."""
    public = {
        attribute: value
        for base in cls.__mro__[:-1]
        for attribute, value in vars(base).items()
        if not attribute.startswith("_")
    }
    for attribute, value in public.items():
        if attribute in EVENTS:
            problem = _event_problem(attribute, value)
            if problem:
                return problem, None, _line(value)
        elif attribute not in ATTRIBUTES:
            near = did_you_mean(attribute, (*EVENTS, *ATTRIBUTES))
            if callable(value) or near:
                hint = near or "name helpers with a leading _"
                return f"unknown event '{attribute}' in filter", hint, _line(value)
    name = public.get("name")
    if not isinstance(name, str) or not name.replace("-", "").isalnum() or name != name.lower():
        return "a filter needs a name of lower-case letters, digits and -", None, None
    if "inspects" not in public:
        return f"filter '{name}' does not say which directions it inspects", "inspects = ()", None
    if "Options" not in public or not inspect.isclass(public["Options"]):
        return f"filter '{name}' has no class Options", "an empty one will do", None
    inspects = public["inspects"]
    if inspect.isfunction(inspects):
        return "'inspects' that looks at the options is a @staticmethod of (options)", None, None
    try:
        looks = isinstance(inspects, staticmethod) or len(directions(inspects)) > 0
    except TypeError as error:
        return f"filter '{name}': {error}", None, None
    if looks and "data" not in public:
        return f"filter '{name}' inspects a direction but has no event 'data'", None, None
    return _constructor_problem(cls)


def _constructor_problem(cls: type[Any]) -> tuple[str, str | None, int | None] | None:
    constructor: Any = cls.__init__
    try:
        inspect.signature(constructor).bind(None, None, None)
        good = constructor is not object.__init__
    except TypeError:
        good = False
    if good:
        return None
    return (
        f"the constructor of '{cls.name}' must take (self, options, link)",
        None,
        _line(constructor),
    )


def _event_problem(event: str, value: Any) -> str | None:
    if not inspect.isfunction(value):
        return f"event '{event}' is no method"
    if inspect.iscoroutinefunction(value) or inspect.isgeneratorfunction(value):
        return f"event '{event}' must answer at once: a plain method, no coroutine or generator"
    parameters = list(inspect.signature(value).parameters)[1:]
    expected = EVENT_PARAMETERS[event]
    if len(parameters) != len(expected):
        return f"event '{event}' must take ({', '.join(('self', *expected))})"
    return None


def _place(cls: type[Any]) -> tuple[str | None, int | None]:
    try:
        file = inspect.getsourcefile(cls)
        return file, inspect.getsourcelines(cls)[1]
    except (TypeError, OSError):
        return None, None


def _line_of(error: Exception, file: str | None) -> int | None:
    """Return the last line of ``file`` that had a part in ``error``.

    Since Python 3.14 annotations are functions, which are not run before somebody asks for them.
    """
    frames = traceback.extract_tb(error.__traceback__)
    return next((frame.lineno for frame in reversed(frames) if frame.filename == file), None)


def _line(value: Any) -> int | None:
    function = getattr(value, "__func__", value)
    code = getattr(function, "__code__", None)
    return code.co_firstlineno if code is not None else None
