"""Which images come in which batch of which process."""

from collections.abc import Iterator

import torch
from torch.utils.data import Sampler

from ..engine.processes import Processes
from ..engine.seeding import mix_seed
from ..errors import ConfigError, DataError


class EpochSampler(Sampler[list[tuple[int, int]]]):
    """Batches of one process in an order that is a function of (seed, epoch); a `batch_sampler` of DataLoader.

    Batch b of an epoch holds images [b * batch_size, (b + 1) * batch_size) of the epoch's order; every process takes
    its share of them, so that the processes together see what one process would. The last images that fill no batch
    are left out. Keys are (epoch, index), as `SeededSamples` takes them.

    Args:
        batch_size: Images a batch, over all processes together, which can share it out evenly.
        batches: Batches an epoch, all whole ones by default.
    """

    def __init__(self, length: int, batch_size: int, seed: int, group: Processes, batches: int | None = None):
        self.length, self.batch_size, self.seed, self.group = length, batch_size, seed, group
        self.batches = length // batch_size if batches is None else batches
        self.epoch, self.offset = 0, 0

    def start_at(self, epoch: int, offset: int = 0) -> None:
        """Make the next pass that of `epoch`, from batch `offset` on."""
        self.epoch, self.offset = epoch, offset

    def order(self, epoch: int) -> torch.Tensor:
        """The order of all images in `epoch`, int64 [length]."""
        generator = torch.Generator().manual_seed(mix_seed(self.seed, 'order', epoch))
        return torch.randperm(self.length, generator=generator)

    def describe(self, batch: int, count: int) -> str:
        """The first images of `count` batches from number `batch` of the whole run on, over all processes."""
        epoch, number = divmod(batch, self.batches)
        indices = self.order(epoch)[number * self.batch_size:(number + count) * self.batch_size].tolist()
        return f'images {", ".join(map(str, indices[:8]))}' + (', ...' if len(indices) > 8 else '')

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
        below = batch_size // group.world_size * group.world_size
        near = [n for n in (below, below + group.world_size) if n]
        raise ConfigError(f'A batch of {batch_size} images cannot be shared out evenly to {group.world_size} '
                          f'processes: use --batch-size {" or ".join(map(str, near))}.')


def batches_per_epoch(images: int, batch_size: int, multiple_of: int, group: Processes) -> int:
    """Whole batches of an epoch, a multiple of `multiple_of` for accumulation.

    Raises:
        DataError: for fewer images than a batch.
        ConfigError: for a batch that processes cannot share out, or accumulation over more batches than there are.
    """
    check_divisible(batch_size, group)
    if images < batch_size:
        raise DataError(f'{images} training images are fewer than a batch of {batch_size}: use --batch-size {images} '
                        'or less.')
    batches = images // batch_size
    if batches < multiple_of:
        raise ConfigError(f'accumulate={multiple_of} asks for more batches than the {batches} of an epoch.')
    return batches // multiple_of * multiple_of
