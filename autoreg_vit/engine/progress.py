"""What people read while work goes on: text, and progress bars, on a terminal one that redraws itself, in a file a line
a minute. All of it is for a reader who may have left: nothing here ends the work."""

import contextlib
import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

from .console import printable


def progress_bar(items: Iterable | None = None, shown: bool = True, **options: Any) -> tqdm:
    """tqdm's bar over `items`, or one that is moved by hand; `shown` on one process alone."""
    return tqdm(items, mininterval=0.5 if sys.stderr.isatty() else 60, dynamic_ncols=True, disable=not shown, **options)


def with_progress(items: Iterable, what: str, shown: bool = True, unit: str = 'batch') -> Iterable:
    """`items`, with a bar that appears once going through them takes long and is gone at their end: for work beside a
    run's steps, such as an evaluation. `what` is done stands before the bar."""
    return progress_bar(items, shown, desc=what, unit=unit, leave=False, delay=2 if sys.stderr.isatty() else 60)


def say(text: str) -> None:
    """Print without tearing a progress bar, to a reader if there is one."""
    with contextlib.suppress(OSError, ValueError, AttributeError):  # a pipe that broke, a stream that is closed or None
        try:
            tqdm.write(text)
        except UnicodeEncodeError:
            tqdm.write(printable(text, 'ascii'))
