"""The processes of a run: what torchrun or srun started, or this one alone."""

import datetime
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.utils.data import Sampler

from ..errors import ConfigError, UsageError
from .launcher import find_place
from .runtime import resolve_device
from .seeding import mix_seed

T = TypeVar('T')


@dataclass(frozen=True)
class Processes:
    """This process among those of the run.

    Args:
        device: Where this process computes.
        rank: Number of this process, from 0.
        world_size: How many there are.
        control: Group for flags and messages of the host, which never touch the device; None for one process.
    """
    device: torch.device
    rank: int = 0
    world_size: int = 1
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
        outcome = [None, None]
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
        **({'device_id': chosen} if chosen.type == 'cuda' else {}))
    try:
        control = dist.new_group(backend='gloo', timeout=datetime.timedelta(hours=2))
        yield Processes(chosen, place.rank, place.world_size, control)
    finally:
        dist.destroy_process_group()


class Flags:
    """Wishes of any process, such as to stop, that all of them learn of at the same step.

    The exchange runs beside the step that follows it and is read one step later, so that nobody waits for it.

    Args:
        group: The processes of the run.
        count: How many flags.
    """

    def __init__(self, group: Processes, count: int):
        self.group, self.count, self.pending = group, count, None

    def exchange(self, *wishes: bool) -> list[bool]:
        """Say this process's wishes; returns what any process wished at the call before, and with one process now."""
        flags = torch.tensor(wishes, dtype=torch.int32)
        if self.group.world_size == 1:
            return flags.bool().tolist()
        before = self.pending
        self.pending = flags, dist.all_reduce(flags, dist.ReduceOp.MAX, group=self.group.control, async_op=True)
        if before is None:
            return [False] * self.count
        before[1].wait()
        return before[0].bool().tolist()

    def settle(self) -> None:
        """Finish the exchange that is under way."""
        if self.pending is not None:
            self.pending[1].wait()
            self.pending = None


class EpochSampler(Sampler[list[tuple[int, int]]]):
    """Batches of one process in an order that is a function of (seed, epoch); a `batch_sampler` of DataLoader.

    Batch b of an epoch holds images [b * batch_size, (b + 1) * batch_size) of the epoch's order; every process takes
    its share of them, so that the processes together see what one process would. The last images that fill no batch
    are left out. Keys are (epoch, index), as `SeededSamples` takes them.

    Args:
        length: Images of the data set.
        batch_size: Images a batch, over all processes together.
        seed: Of the run.
        group: The processes, of which this one draws its share.
        batches: Batches an epoch, all whole ones by default.
        shuffle: False keeps the data set's order.

    Raises:
        ConfigError: for a batch that the processes cannot share out evenly.
    """

    def __init__(
            self,
            length: int,
            batch_size: int,
            seed: int,
            group: Processes,
            batches: int | None = None,
            shuffle: bool = True,
    ):
        check_divisible(batch_size, group)
        self.length, self.batch_size, self.seed, self.group, self.shuffle = length, batch_size, seed, group, shuffle
        self.batches = length // batch_size if batches is None else batches
        self.epoch, self.offset = 0, 0

    def start_at(self, epoch: int, offset: int = 0) -> None:
        """Make the next pass that of `epoch`, from batch `offset` on."""
        self.epoch, self.offset = epoch, offset

    def order(self, epoch: int) -> torch.Tensor:
        """The order of all images in `epoch`, int64 [length]."""
        if not self.shuffle:
            return torch.arange(self.length)
        generator = torch.Generator().manual_seed(mix_seed(self.seed, 'order', epoch))
        return torch.randperm(self.length, generator=generator)

    def batch(self, epoch: int, number: int, count: int = 1) -> list[int]:
        """Indices of the images of `count` whole batches from `number` on, over all processes."""
        return self.order(epoch)[number * self.batch_size:(number + count) * self.batch_size].tolist()

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch, share = self.epoch, self.group.share(self.batch_size)
        order = self.order(epoch)
        for number in range(self.offset, self.batches):
            batch = order[number * self.batch_size:(number + 1) * self.batch_size]
            yield [(epoch, index) for index in batch[share].tolist()]

    def __len__(self) -> int:
        return self.batches - self.offset


def check_divisible(batch_size: int, group: Processes) -> None:
    """Raise ConfigError unless the processes can share out a batch evenly."""
    if batch_size % group.world_size:
        near = [n for n in (batch_size // group.world_size * group.world_size,
                            (batch_size // group.world_size + 1) * group.world_size) if n]
        raise ConfigError(f'A batch of {batch_size} images cannot be shared out evenly to {group.world_size} '
                          f'processes: use --batch-size {" or ".join(map(str, near))}.')
