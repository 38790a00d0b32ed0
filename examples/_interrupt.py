"""Handles Ctrl-C, so that a run stops only at the end of a step."""

import signal
from typing import Any


class Interrupted(Exception):
    """The run was stopped early, and its checkpoint was written."""


class Interrupt:
    """Records Ctrl-C and SIGTERM. A second signal of the same kind ends the program
    immediately."""

    def __init__(self):
        self.requested = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._request)

    def _request(self, number: int, frame: Any):
        self.requested = True
        signal.signal(number, signal.SIG_DFL)
