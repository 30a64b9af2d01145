"""What the queue does, in order of worth, and how its minutes are shared out. Needs the standard library alone."""

from collections.abc import Collection
from dataclasses import dataclass

#: Seconds to start, to unpack data and to find out what is there; and kept back for the end.
START, RESERVE = 15, 10


@dataclass(frozen=True)
class Part:
    """A part of the queue.

    Args:
        name: In the state and on the command line.
        what: It does.
        seconds: It takes on an H100 with 16 cores, as an estimate from single measurements; None for what the others
            leave.
        least: Seconds without which it is not begun.
    """
    name: str
    what: str
    seconds: float | None
    least: float


PARTS = (
    Part('equality', 'twelve captured steps of RandSAC and of SAIM against plain ones, to the bit', 35, 15),
    Part('tests', 'tests marked gpu (captured runs, two processes by gloo, one by NCCL, SyncBatchNorm), then those of '
         'the kernels', 60, 30),
    Part('launches', "candidates of the attention kernels at every length: the rows of this card's launches", 110, 45),
    Part('attention', 'attention against every peer: RandSAC and SAIM at 64, 196 and 1,024 patches', 70, 30),
    Part('steps', 'whole steps of ViT-B, captured, compiled and plain, batch 64 and 256, and where their time goes',
         80, 30),
    Part('run', 'one pretraining run of randsac-tiny-cifar10, epochs fixed from timed steps, to be exported', None, 90),
)
NAMES = tuple(part.name for part in PARTS)


def shares(seconds: float, wanted: Collection[str] = NAMES, done: Collection[str] = ()) -> dict[str, float]:
    """Seconds for each part that fits, the most worth first; the run gets what the others leave.

    Args:
        seconds: In all, from the start of the command.
        wanted: Names of parts.
        done: Names of parts that earlier calls have finished.
    """
    left, result = seconds - START - RESERVE, {}
    for part in PARTS:
        if part.name in done or part.name not in wanted:
            continue
        share = left if part.seconds is None else min(part.seconds, left)
        if share >= part.least:
            result[part.name] = share
            left -= share
    return result


def describe(minutes: float, wanted: Collection[str] = NAMES, done: Collection[str] = ()) -> str:
    """The plan of a call, a line a part."""
    given, lines = shares(60 * minutes, wanted, done), []
    for part in PARTS:
        if part.name not in wanted:
            continue
        if part.name in done:
            time = 'done'
        elif part.name in given:
            time = clock(given[part.name]) + (f' of {clock(part.seconds)}' if (part.seconds or 0) > given[part.name]
                                              else '')
        else:
            time = 'left'
        lines.append(f'{time:>12}  {part.name:9}  {part.what}')
    total = START + RESERVE + sum(given.values())
    lines.append(f'{clock(total):>12}  of {clock(60 * minutes)}, {clock(START + RESERVE)} of them to begin and to end')
    left = [part.name for part in PARTS if part.name in wanted and part.name not in done and part.name not in given]
    if left:
        lines.append(f'Left for another call with the same --out, for want of time: {", ".join(left)}.')
    if 'run' in given:
        lines.append('Workers compile beside the tests and the run, which come first; what is timed, launches, '
                     'attention and steps, comes after the run and one at a time.')
    lines.append('A sweep of settings takes a call of its own, --sweep FILE: each row trains for an equal part of what '
                 'loading, compiling and judging leave.')
    return '\n'.join(lines)


def clock(seconds: float) -> str:
    return f'{int(seconds) // 60}:{int(seconds) % 60:02d}'
