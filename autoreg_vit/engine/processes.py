"""The processes of a run: what torchrun or srun started, or this one alone."""

import datetime
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from ..errors import ConfigError, UsageError
from .launcher import find_place
from .machine import resolve_device

T = TypeVar('T')


@dataclass(frozen=True)
class Processes:
    """This process among those of the run: where it computes, its number from 0, and how many there are."""
    device: torch.device
    rank: int = 0
    world_size: int = 1
    #: Group for flags and messages of the host, which never touch the device; None for one process.
    control: Any = field(default=None, repr=False)

    @property
    def is_main(self) -> bool:
        """Whether this process is the one that writes files and talks."""
        return self.rank == 0

    def share(self, batch_size: int) -> slice:
        """This process's part of a batch that all of them share out."""
        size = batch_size // self.world_size
        return slice(self.rank * size, (self.rank + 1) * size)

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.world_size > 1:
            dist.barrier(group=self.control)

    def on_main(self, work: Callable[[], T]) -> T:
        """Do `work` on the main process alone and give its result, or raise its error of use, on all of them."""
        if self.world_size == 1:
            return work()
        outcome: list[Any] = [None, None]
        if self.is_main:
            try:
                outcome[0] = work()
            except UsageError as error:
                outcome[1] = error
        dist.broadcast_object_list(outcome, src=0, group=self.control)
        if outcome[1] is not None:
            outcome[1].said_elsewhere = not self.is_main
            raise outcome[1]
        return outcome[0]

    def gather(self, value: T) -> list[T] | None:
        """The values of all processes on the main one, by rank; None on the others."""
        values: list[Any] | None = [value] * self.world_size if self.is_main else None
        if self.world_size > 1:
            dist.gather_object(value, values, group=self.control)
        return values

    def mean(self, value: torch.Tensor) -> torch.Tensor:
        """The mean of `value` over all processes, on its device; NaN or infinite anywhere is so everywhere."""
        if self.world_size > 1:
            value = value.clone()
            dist.all_reduce(value)
            value /= self.world_size
        return value


@contextmanager
def processes(device: str) -> Iterator[Processes]:
    """Join the processes that torchrun or srun started, and leave them at the end.

    Args:
        device: 'auto', 'cpu', 'cuda', ...; of several processes each takes the GPU of its local rank.

    Raises:
        ConfigError: for a device that is not there, more processes than GPUs, or an environment that says neither one
            process nor how to join the others.
    """
    place, chosen = find_place(), resolve_device(device)
    if place is None:
        yield Processes(chosen)
        return
    if chosen.type == 'cuda':
        if chosen.index is not None and place.world_size > 1:
            raise ConfigError(f'Of several processes each takes a GPU of its own: use --device cuda, not {device}.')
        # srun may show each task its own GPU alone; NCCL refuses one that two processes share.
        alone = place.address is not None and torch.cuda.device_count() == 1
        chosen = resolve_device(f'cuda:{0 if alone else place.local_rank}')
        torch.cuda.set_device(chosen)
    elif chosen.type != 'cpu':
        raise ConfigError(f'Several processes train on cuda or cpu, not on {chosen.type}.')
    # Evaluation on the main process keeps the others waiting, so the limit is long.
    dist.init_process_group(
        'nccl' if chosen.type == 'cuda' else 'gloo', timeout=datetime.timedelta(hours=2), rank=place.rank,
        world_size=place.world_size, init_method=f'tcp://{place.address}' if place.address else 'env://',
        device_id=chosen if chosen.type == 'cuda' else None)
    try:
        control = dist.new_group(backend='gloo', timeout=datetime.timedelta(hours=2))
        yield Processes(chosen, place.rank, place.world_size, control)
    finally:
        dist.destroy_process_group()


class Flags:
    """Wishes of any process, such as to stop, that all of them learn of at the same step.

    The exchange runs beside the step that follows it and is read one step later, so that nobody waits for it.
    """

    def __init__(self, group: Processes):
        self.group = group
        self.pending: tuple[torch.Tensor, dist.Work] | None = None

    def exchange(self, *wishes: bool) -> list[bool]:
        """Say this process's wishes; returns what any process wished at the call before, and with one process now."""
        flags = torch.tensor(wishes, dtype=torch.int32)
        if self.group.world_size == 1:
            return flags.bool().tolist()
        before = self.pending
        self.pending = flags, dist.all_reduce(flags, dist.ReduceOp.MAX, group=self.group.control, async_op=True)
        if before is None:
            return [False] * len(wishes)
        before[1].wait()
        return before[0].bool().tolist()

    def settle(self) -> None:
        """Finish the exchange that is under way."""
        if self.pending is not None:
            self.pending[1].wait()
            self.pending = None
