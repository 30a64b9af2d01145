"""Progress bars: on a terminal one that redraws itself, in a file a line a minute."""

import sys
from collections.abc import Iterable, Sized
from typing import Any

from tqdm import tqdm


def progress_bar(items: Iterable | None = None, shown: bool = True, **options: Any) -> tqdm:
    """tqdm's bar over `items`, or one that is moved by hand; `shown` on one process alone."""
    return tqdm(items, mininterval=0.5 if sys.stderr.isatty() else 60, dynamic_ncols=True, disable=not shown, **options)


def passing(items: Sized, what: str, shown: bool = True, unit: str = 'batch') -> Iterable:
    """Go through `items` with a bar that appears once it takes long, and goes when it is done: for work beside a run's
    steps, such as an evaluation."""
    return progress_bar(items, shown, desc=what, unit=unit, leave=False, delay=2 if sys.stderr.isatty() else 60)
