"""How many threads a run on a CPU computes with. PyTorch takes one for each core; where something else keeps a core
busy, all others wait for the one that shares it, spinning: beside one busy process a run on two cores is slower than on
one (benchmarks/busy_cpu.py)."""

import os
import time
from collections.abc import Callable
from pathlib import Path

import torch

from .log import read_log

STATISTICS = Path('/proc/stat')
#: Seconds over which cores are watched.
WATCHED = 0.4


def settle_threads(output_dir: str | None, say: Callable[[str], None]) -> None:
    """Set PyTorch's threads to as many as a run in this folder began with, or for a new one to the cores that are free,
    at least one and at most as many as PyTorch has; `say` takes what was chosen, if it is not that. Results depend on
    it, so the run's log and checkpoints record it. OMP_NUM_THREADS decides where it is set."""
    most = torch.get_num_threads()
    if most == 1 or os.environ.get('OMP_NUM_THREADS', '').strip():
        return
    before = threads_of(output_dir)
    count = before if before is not None else free_cores()
    if count is None or not 1 <= count < most:
        return
    torch.set_num_threads(count)
    reason = 'as the run began' if before is not None else 'other processes keep the rest busy'
    say(f'Computing with {count} of {most} threads: {reason} (OMP_NUM_THREADS sets how many).')


def threads_of(output_dir: str | None) -> int | None:
    """The threads that the log of a run names last, or None where there is no run."""
    lines = read_log(Path(output_dir) / 'log.jsonl') if output_dir is not None else []
    return next((line.get('threads') for line in reversed(lines) if line['event'] in ('start', 'resume')), None)


def free_cores() -> int | None:
    """How many of the cores that this process may use nobody uses now, rounded, and one at least; None where the system
    does not say (it is Linux that does)."""
    first = _ticks()
    if first is None:
        return None
    time.sleep(WATCHED)
    second = _ticks() or first
    free = 0.0
    for core, (idle, total) in first.items():
        later_idle, later_total = second.get(core, (idle, total))
        if later_total > total:
            free += (later_idle - idle) / (later_total - total)
    return max(round(free), 1)


def _ticks() -> dict[int, tuple[int, int]] | None:
    """Idle and all ticks of each core of this process since the system began."""
    try:
        lines, cores = STATISTICS.read_text(encoding='utf-8').splitlines(), os.sched_getaffinity(0)
    except (OSError, AttributeError):
        return None
    found = {}
    for line in lines:
        name, *numbers = line.split()
        if name.startswith('cpu') and name[3:].isdecimal() and int(name[3:]) in cores:
            ticks = [int(number) for number in numbers[:8]]  # what guests take is counted among them
            found[int(name[3:])] = ticks[3] + ticks[4], sum(ticks)
    return found or None
