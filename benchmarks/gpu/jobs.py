"""Commands of the queue, each in a process of its own that can be ended without harm to the others."""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
#: Seconds that a command has to end by itself once it was told to.
GRACE = 6
_received: list[int] = []


def listen() -> None:
    """Have SIGTERM end the queue at the next `pause`: an exception out of the handler itself would be lost in callbacks
    that Python lets nothing out of, as at a fork."""
    signal.signal(signal.SIGTERM, lambda number, _: _received.append(number))


def pause(seconds: float) -> None:
    """Sleep, and leave, through every `finally`, once SIGTERM has come."""
    time.sleep(seconds)
    if _received:
        sys.exit(128 + _received[0])


def end(jobs: Sequence['Job']) -> None:
    """End commands and their children, all at once."""
    for sign in (signal.SIGTERM, signal.SIGKILL):
        for job in jobs:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(job.process.pid, sign)
        stop = time.monotonic() + GRACE
        while time.monotonic() < stop and any(job.process.poll() is None for job in jobs):
            time.sleep(0.02)


class Job:
    """`python -m ARGUMENTS`, running, with its output added to a file.

    Args:
        arguments: After `-m`.
        log: The file.
        environment: Variables to set there.
    """

    def __init__(self, arguments: Sequence[str], log: Path, environment: dict[str, str] | None = None):
        self.log, self.began = log, time.monotonic()
        with log.open('ab') as output:
            self.process = subprocess.Popen(
                [sys.executable, '-m', *arguments], stdin=subprocess.PIPE, stdout=output, stderr=subprocess.STDOUT,
                env={**os.environ, **(environment or {})}, cwd=ROOT, start_new_session=True,
                preexec_fn=_end_with_parent)

    def wait(self, limit: float, poll: Callable[[], None] = lambda: None) -> int | None:
        """The exit status, or None where it did not end within `limit` seconds and was stopped; `poll` is called every
        half second and at the end."""
        stop = time.monotonic() + limit
        try:
            while self.process.poll() is None and time.monotonic() < stop:
                poll()
                pause(0.5 if limit > 5 else 0.05)
        finally:
            stopped = self.stop()
            poll()
        return None if stopped else self.process.returncode

    def tell(self, line: str) -> None:
        """Send a line to its standard input."""
        try:
            self.process.stdin.write(line.encode() + b'\n')
            self.process.stdin.flush()
        except BrokenPipeError:  # it has ended, which `wait` will say
            pass

    def stop(self) -> bool:
        """Whether it was still running; it and its children are not any more."""
        running = self.process.poll() is None
        end([self])
        return running

    def last_words(self, count: int = 3) -> str:
        """The end of its output, as one line."""
        text = self.log.read_text(encoding='utf-8', errors='replace')
        return ' '.join(' '.join(line for line in text.splitlines()[-count:] if line.strip()).split())[-500:]


def _end_with_parent() -> None:
    """Have Linux tell this process to stop when the queue dies, even by SIGKILL."""
    if sys.platform == 'linux':
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
