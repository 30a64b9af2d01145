"""stdout and stderr of a command, whatever they are connected to, and text that they can show."""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any, TextIO


def printable(text: str, encoding: str = 'utf-8') -> str:
    """`text` with what `encoding` lacks escaped: letters of other alphabets, bytes of file names that are no text."""
    return text.encode(encoding, 'backslashreplace').decode(encoding)


@contextlib.contextmanager
def patient_streams() -> Iterator[None]:
    """stdout and stderr that take everything: letters that they cannot show are escaped, and once nobody reads them any
    more (`| head`, a pager that was left, a stream closed before the start) what is written is dropped."""
    with contextlib.ExitStack() as stack:
        for redirect, stream in ((contextlib.redirect_stdout, sys.stdout), (contextlib.redirect_stderr, sys.stderr)):
            if stream is None or stream.closed:
                # The number of one that was closed before the start is free: no file of a run must open as 1 or 2.
                stream = stack.enter_context(open(os.devnull, 'w', encoding='utf-8'))
            stack.enter_context(redirect(_PatientStream(stream)))
        try:
            yield
        finally:
            sys.stdout.flush()
            sys.stderr.flush()


class _PatientStream:
    """A text stream whose `write` and `flush` never fail."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> int:
        def write() -> None:
            try:
                self._stream.write(text)
            except UnicodeEncodeError:
                self._stream.write(printable(text, self._stream.encoding or 'ascii'))

        self._attempt(write)
        return len(text)

    def flush(self) -> None:
        self._attempt(self._stream.flush)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _attempt(self, work: Callable[[], Any]) -> None:
        try:
            work()
        except OSError:
            # Have the rest go nowhere, also what the stream still holds and Python writes at its end.
            with contextlib.suppress(OSError, ValueError):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, self._stream.fileno())
                os.close(nowhere)
        except ValueError:  # the stream is closed
            pass
