"""Errors that say who is at fault.

Every error of Sluice is one of five kinds. Each kind has the exit status that a program ends
with when it is not caught, and ``public`` gives the text that is safe to show to another domain:
never a detail of ours. This module imports nothing, so that the small programs can use it.
"""


class SluiceError(Exception):
    """What all errors of Sluice have in common.

    ``str(error)`` is for the operator: it may name files, lines and keys, and whatever of it came
    from a domain has been escaped by the one who raised it.
    """

    exit_code = 1
    public = "Internal error"


class LocalError(SluiceError):
    """We, or our own caller, did something wrong: bad arguments, a missing file, a bug."""

    exit_code = 125


class RemoteError(SluiceError):
    """The peer broke the protocol. The connection it came over cannot be used any more."""

    exit_code = 1
    public = "Protocol error"


class ResourceError(SluiceError):
    """A bound was reached: calls at once, descriptors, memory, time."""

    exit_code = 125
    public = "Request refused"


class LocatedError(SluiceError):
    """An error with a place in a file that a person wrote."""

    exit_code = 125

    def __init__(self, message: str, *, file: str | None = None, line: int | None = None) -> None:
        """Take the bare message and where it belongs; ``line`` counts from 1."""
        self.message = message
        self.file = file
        self.line = line
        super().__init__(message)

    def __str__(self) -> str:
        """Render as ``FILE:LINE: MESSAGE``, leaving out what is not known."""
        if self.file is None:
            return self.message
        if self.line is None:
            return f"{self.file}: {self.message}"
        return f"{self.file}:{self.line}: {self.message}"


class PolicyError(LocatedError):
    """The policy forbids the call, or cannot be read. Calls are refused either way."""

    exit_code = 126
    public = "Request refused"


class ConfigError(LocatedError):
    """A configuration file is wrong: ``key`` names the entry, ``suggestion`` what to do."""

    def __init__(
        self,
        message: str,
        *,
        file: str | None = None,
        line: int | None = None,
        key: str | None = None,
        suggestion: str | None = None,
    ) -> None:
        """Take the message, its place, the key path (``chains.x.filters``) and what to do."""
        self.key = key
        self.suggestion = suggestion
        text = message if key is None else f"{key}: {message}"
        if suggestion:
            text = f"{text} ({suggestion})"
        super().__init__(text, file=file, line=line)
