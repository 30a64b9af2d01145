"""Loader processes, within what the machine's shared memory holds."""

import gc
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch.utils.data import DataLoader

from ..engine.processes import Processes
from ..engine.progress import say, with_progress
from ..errors import DataError, UsageError
from .samples import Samples, some

REMEDY = 'In Docker raise it with --shm-size (or --ipc=host); --workers sets how many processes load images.'


class InOrder:
    """Batches of a data set in its order, as so many loader processes make them; by default tensors are stacked."""

    def __init__(self, dataset: Samples, batch_size: int, workers: int, collate: Callable[[list], Any] | None = None):
        self.dataset, self.batch_size, self.workers, self.collate = dataset, batch_size, workers, collate

    def __len__(self) -> int:
        return -(-len(self.dataset) // self.batch_size)

    def __iter__(self) -> Iterator:
        return fitting(lambda first, workers: DataLoader(
            some(self.dataset, range(first * self.batch_size, len(self.dataset))), self.batch_size, num_workers=workers,
            collate_fn=self.collate), self.workers)


def fitting(load: Callable[[int, int], Iterable], workers: int) -> Iterator:
    """Batches by as many loader processes as shared memory holds: where it is too small for them, half as many go on
    from the batch that failed, and in the end this process alone. `load` gives the batches from a number on, by so many
    loader processes."""
    given = 0
    while True:
        try:
            for batch in plainly(load(given, workers)):
                given += 1
                yield batch
            return
        except (RuntimeError, OSError) as error:
            if not workers or not lacks_shared_memory(error):
                raise
            say(f'Shared memory (/dev/shm) is too small for {workers} loader processes: going on with {workers // 2}. '
                f'{REMEDY}')
            workers //= 2
        gc.collect()  # of the failed processes, before others are forked, which would inherit what ends them


def plainly(loader: Iterable) -> Iterator:
    """The batches of a loader, whose processes pack the traceback into the message of an error of use: unpack it."""
    try:
        yield from loader
    except UsageError as error:
        kind = type(error)
        raise kind(str(error).rpartition(f'{kind.__module__}.{kind.__name__}: ')[2].strip()) from error


def all_or_none(loader: DataLoader) -> Iterator:
    """The batches of a stream, which other loader processes would give in another order; raises DataError where shared
    memory is too small."""
    try:
        yield from plainly(loader)
    except (RuntimeError, OSError) as error:
        if not lacks_shared_memory(error):
            raise
        raise DataError(f'Shared memory (/dev/shm) is too small for {loader.num_workers} loader processes. {REMEDY} '
                        'A stream that was begun goes on with as many as before.') from error


def lacks_shared_memory(error: Exception) -> bool:
    """Whether a loader process failed for want of shared memory, by the texts of PyTorch and the kernel."""
    text = str(error)
    return 'out of shared memory' in text or 'Bus error' in text or (
        'No space left on device' in text and any(part in text for part in ('shm', 'shared memory', '/torch_')))


def own_part(
        dataset: Samples, batch_size: int, *, workers: int, collate: Callable[[list], Any] | None = None,
        group: Processes,
) -> Iterator:
    """Batches, of `batch_size` images on each process, of this process's part of a data set, in its order; the
    processes together see each image once."""
    part = some(dataset, range(group.rank, len(dataset), group.world_size))
    if not len(part):
        return iter(())
    return iter(with_progress(InOrder(part, batch_size, workers, collate), 'evaluating', group.is_main))
