"""The filter that does nothing: the measure of what a chain costs."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from sluice.proxy.link import Link


class Pass:
    """Lets everything pass, and looks at nothing: both directions are moved by the kernel."""

    name = "pass"
    inspects = ()

    class Options:
        """None."""

    def __init__(self, options: Options, link: Link) -> None:
        """Take the options and the link to the chain."""
