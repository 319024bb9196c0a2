"""What a request asks for, and how: its command line with the configuration of the service.

Errors are kept instead of raised, because the caller must hear of them over a data channel that
is yet to be connected. docs/spec/wire-protocol.md 7.4.1, 9.1, 9.4.
"""

from __future__ import annotations

from sluice.service.command import Command, ServiceError, parse_command
from sluice.service.configuration import ServiceConfiguration, load_configuration

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable


class Plan:
    """What a request asks for, and how: a command with its configuration, or the reason why not.

    ``user`` is the effective one, after ``force-user``.
    """

    __slots__ = ("command", "configuration", "error", "user")

    def __init__(self) -> None:
        """Begin with nothing; see ``plan``."""
        self.command: Command | None = None
        self.configuration = ServiceConfiguration()
        self.error: ServiceError | None = None
        self.user = b""


def plan(text: bytes, log: Callable[[str], None], *, with_user: bool, configured: bool) -> Plan:
    """Parse a command line and read its configuration; errors are kept in the plan (7.4.1).

    ``configured`` is False for the fork server, which leaves configuration to the agent.
    """
    result = Plan()
    try:
        command = result.command = parse_command(text, with_user=with_user)
        result.user = command.user
        if configured and command.is_service:
            result.configuration = load_configuration(command, warn=log)
            if result.configuration.force_user is not None:
                result.user = result.configuration.force_user
    except ServiceError as error:
        result.error = error
    return result
