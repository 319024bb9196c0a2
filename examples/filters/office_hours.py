"""Refuse a call before it begins: the event ``opened``, and options with a check of their own."""

import time

from sluice.proxy.options import OptionError
from sluice.proxy.verdicts import CONTINUE, Refuse


class OfficeHours:
    """Lets calls begin only at certain hours of the day (UTC)."""

    name = "office-hours"
    inspects = ()

    class Options:
        """What can be set.

        first: the first hour at which calls may begin
        last: the last one
        """

        first: int = 9
        last: int = 17

    @staticmethod
    def check(options):
        for name in ("first", "last"):
            if not 0 <= getattr(options, name) <= 23:
                raise OptionError(name, "must be from 0 to 23")

    def __init__(self, options, link):
        self.options = options
        self.link = link

    def opened(self, call):
        hour = time.gmtime(self.link.wall_time()).tm_hour
        if self.options.first <= hour <= self.options.last:
            return CONTINUE
        return Refuse(f"{call.source} calls at {hour} o'clock")
