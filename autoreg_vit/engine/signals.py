"""Signals that ask a run to stop, and the clean stop."""

import signal
import threading
from types import FrameType
from typing import Any


class Stopped(Exception):
    """A signal (SIGINT, SIGTERM or SIGHUP) asked the run to stop, and it did, with a checkpoint to go on from."""

    def __init__(self, message: str, signal_number: int):
        super().__init__(message)
        self.signal_number = signal_number


class StopSignals:
    """Turns SIGTERM, SIGINT and SIGHUP (a terminal that was closed) into a wish that the loop reads between steps; a
    second SIGINT interrupts at once. A SIGHUP that is ignored from the start (nohup) stays ignored. A context manager:
    the handlers that were there before return at its end."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> 'StopSignals':
        if threading.current_thread() is threading.main_thread():  # Python delivers signals to no other
            numbers = [signal.SIGTERM, signal.SIGINT]
            hangup = getattr(signal, 'SIGHUP', None)  # Windows has none
            if hangup is not None and signal.getsignal(hangup) != signal.SIG_IGN:
                numbers.append(hangup)
            self._before = {n: signal.signal(n, self._handle) for n in numbers}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number
