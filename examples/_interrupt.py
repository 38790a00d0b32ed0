"""Ctrl-C that waits for the end of a step."""

import signal
from typing import Any


class Interrupted(Exception):
    """The run was stopped early, and its checkpoint written."""


class Interrupt:
    """Takes note of Ctrl-C and of SIGTERM. A second one ends the program at once."""

    def __init__(self):
        self.requested = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._request)

    def _request(self, number: int, frame: Any):
        self.requested = True
        signal.signal(number, signal.SIG_DFL)
