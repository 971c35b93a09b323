"""Signals that ask a run to stop: what Ctrl-C, Slurm and the clouds send."""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

AGAIN_SECONDS = 1.0 if "RANK" in os.environ else 0.0  # torchrun passes on what the terminal has sent already
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class Stopped(BaseException):  # as KeyboardInterrupt: an `except Exception`, in an import, say, lets it pass
    """The run was asked to stop; what it has committed stays."""

    status = "stopped"

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class StopRequest:
    """Catches the signals, from its creation on. They raise Stopped, at once, but inside of `with request.deferred():`
    where one sets `signal`, for the loop to act on at the step's edge. A second SIGINT there raises, too.
    """

    def __init__(self) -> None:
        self.signal, self._time, self._wait = 0, 0.0, False
        for number in SIGNALS:
            signal.signal(number, self._receive)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Signals wait, see above."""
        self._wait = True
        try:
            yield
        finally:
            self._wait = False

    def raise_if_asked(self, where: str = "") -> None:
        """Raises Stopped, with exit code 128 + signal, if a signal has come."""
        if self.signal:
            raise Stopped(f"stopped by {signal.Signals(self.signal).name}{where}", 128 + self.signal)

    def ignore(self) -> None:
        """From now on the signals do nothing: the run is being closed."""
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)

    def _receive(self, number: int, frame: Any) -> None:
        again = number == self.signal == signal.SIGINT and time.monotonic() - self._time >= AGAIN_SECONDS
        if number == signal.SIGINT and self._wait and not self.signal:
            os.write(2, b"stopping after this step; Ctrl-C again stops at once\n")
        self.signal, self._time = number, self._time if number == self.signal else time.monotonic()
        if again or not self._wait:
            self.raise_if_asked(", at once; what was committed stays" if again else "")
