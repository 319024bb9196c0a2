"""What the commands have in common: ``--root``, errors, the AdminVM's socket."""

from __future__ import annotations

import functools
import os
import signal
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import click

from sluice.agent.options import die_of_broken_pipe
from sluice.domains.paths import Paths
from sluice.errors import ResourceError, SluiceError

Command = TypeVar("Command", bound=Callable[..., Any])


def root_option(command: Command) -> Command:
    """Add ``--root DIR`` (or SLUICE_ROOT), which gives the system's places to the command."""
    option = click.option(
        "--root",
        metavar="DIR",
        envvar="SLUICE_ROOT",
        help="Keep configuration, state and sockets below DIR.",
    )
    return option(command)


def places(root: str | None) -> Paths:
    """Return the places of the system that ``--root`` names."""
    return Paths.find(chosen_root(root))


def chosen_root(root: str | None) -> str | None:
    """Return the value of ``--root``, which may also stand before the subcommand."""
    context = click.get_current_context(silent=True)
    while root is None and context is not None:
        root = context.params.get("root")
        context = context.parent
    return root


def tell_errors(command: Command) -> Command:
    """End with the error's status and one line on stderr, never with a traceback."""

    @functools.wraps(command)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        try:
            return command(*args, **kwargs)
        except SluiceError as error:
            click.echo(f"sluice: {error}", err=True)
            sys.exit(error.exit_code)
        except BrokenPipeError:
            die_of_broken_pipe()  # `sluice log | head`: nobody reads on
        except OSError as error:
            place = f"{error.filename}: " if error.filename is not None else ""
            click.echo(f"sluice: {place}{error.strerror or error}", err=True)
            sys.exit(ResourceError.exit_code)
        except KeyboardInterrupt:
            # Ended by the signal itself: a shell or a script above us has to see that.
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)

    return wrapper  # type: ignore[return-value]


def ask(paths: Paths, method: str, **fields: Any) -> Any:
    """Ask the AdminVM of the system. Raises LocalError where none runs or it refuses."""
    from sluice.adminvm.api import request

    return request(paths.control_socket, method, **fields)


def make_running(paths: Paths, name: str) -> None:
    """Start a domain if it does not run. Raises LocalError."""
    ask(paths, "start", name=name)
