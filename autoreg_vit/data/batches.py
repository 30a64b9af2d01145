"""Batches of images for training: which come when, and with which augmentation, are functions of the seed, so that a
run can go on from any place."""

from collections.abc import Callable, Iterator, Sized
from functools import partial
from itertools import count
from typing import Any, cast

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate

from .._compat import counted_readers
from ..engine.processes import Processes
from ..engine.seeding import kept_random_state, mix_seed, seed_cpu
from ..errors import DataError, one_line
from .checks import image_name, tolerate
from .images import DAMAGE
from .loaders import all_or_none, fitting
from .order import EpochSampler, batches_per_epoch
from .samples import Samples
from .streams import Stream


class SeededSamples(Dataset):
    """A map-style data set whose augmentation is a function of (seed, epoch, index), whatever process does it.

    Takes keys (epoch, index) and gives what the data set gives for the index. In place of an image that cannot be read
    it gives the next that can, and counts it.

    Attributes:
        corrupt: A mark for every image that could not be read, uint8 [images]; with `share` loader processes see it.
        count: How many there may be, a lower bound, int64 [1], shared likewise.
    """

    def __init__(self, dataset: Samples, seed: int, share: bool = False):
        self.dataset, self.seed = dataset, seed
        self.corrupt, self.count = torch.zeros(len(dataset), dtype=torch.uint8), torch.zeros(1, dtype=torch.int64)
        if share:
            self.corrupt.share_memory_()
            self.count.share_memory_()

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: tuple[int, int]) -> Any:
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: list[tuple[int, int]]) -> list:
        with kept_random_state():
            return [self._sample(*key) for key in keys]

    def _sample(self, epoch: int, index: int) -> Any:
        for another in range(min(16, len(self))):
            place = (index + another) % len(self)
            seed_cpu(mix_seed(self.seed, 'image', epoch, index))
            try:
                return self.dataset[place]
            except DAMAGE as error:
                last = error
                if not self.corrupt[place]:
                    self.corrupt[place] = 1
                    self.count += 1
        raise DataError(f'{min(16, len(self))} images in a row cannot be read, the first being '
                        f'{image_name(self.dataset, index)}: {one_line(last)}')


class SeededStream(IterableDataset):
    """A streamed data set whose order and augmentation are functions of (seed, pass, loader process, position). Gives
    samples, each with the images that could not be read since the one before: {name: reason}.

    Resuming is exact with as many loader processes as before. `number` names the pass, and is set before it; loader
    processes learn it when they start.
    """

    def __init__(self, dataset: IterableDataset, seed: int, rank: int = 0):
        self.dataset, self.seed, self.rank, self.number = dataset, seed, rank, (0, 0)

    def __iter__(self) -> Iterator[tuple[Any, dict[str, str]]]:
        worker = torch.utils.data.get_worker_info()
        place = (*self.number, self.rank, worker.id if worker else 0)
        if hasattr(self.dataset, 'set_epoch'):
            self.dataset.set_epoch(mix_seed(self.seed, 'order', *self.number) % 2 ** 31)
        damages = getattr(self.dataset, 'damages', {})
        if isinstance(self.dataset, Stream):
            self.dataset.shuffle_seed = worker.seed if worker else mix_seed(self.seed, 'shuffle', *place)
        samples = iter(self.dataset)
        for position in count():
            with kept_random_state():
                seed_cpu(mix_seed(self.seed, 'image', *place, position))
                sample = next(samples, None)
            if sample is None:
                return
            yield sample, dict(damages)
            damages.clear()


def collate_stream(
        collate: Callable[[list], Any], samples: list[tuple[Any, dict[str, str]]],
) -> tuple[Any, dict[str, str]]:
    """A batch of the samples that `SeededStream` gives, and one dictionary of the images that could not be read."""
    batch, damages = zip(*samples)
    return collate(list(batch)), {name: reason for some in damages for name, reason in some.items()}


class Batches:
    """Training batches of this process without end, in an order and with an augmentation that are functions of the seed
    and the epoch, from any place on.

    Args:
        dataset: Map-style, or a stream.
        batch_size: Images a batch, over all processes together.
        workers: Processes that load images.
        multiple_of: Makes the batches of an epoch a multiple of this, for accumulation.
        max_corrupt: Part of the images that may be unreadable. A process counts those that it has come upon itself.
        collate: Makes a batch of a list of samples; by default tensors are stacked.

    Attributes:
        on_device: False, since files are read again in every epoch.
        per_epoch: Batches an epoch.
        sampler: The EpochSampler of a map-style data set, None for a stream.

    Raises:
        DataError: for fewer images than a batch, and while batches are taken for too many unreadable images.
        ConfigError: for a batch that processes cannot share out, or accumulation over more batches than an epoch has.
    """
    on_device = False

    def __init__(
            self, dataset: Samples | IterableDataset, batch_size: int, seed: int, group: Processes, workers: int = 0,
            multiple_of: int = 1, max_corrupt: float = 0.001, collate: Callable[[list], Any] | None = None,
    ):
        self._images = length_of(dataset, workers, group)
        self.per_epoch = batches_per_epoch(self._images, batch_size, multiple_of, group)
        self.max_corrupt, self._counted = max_corrupt, 0
        self._damages: dict[str, str] = {}
        self.sampler: EpochSampler | None = None
        self.dataset: SeededSamples | SeededStream
        self._collate, self._pin_memory = collate, group.device.type == 'cuda'
        if isinstance(dataset, IterableDataset):
            self.dataset = SeededStream(dataset, seed, group.rank)
            # New processes for every pass, since they learn its number when they start.
            self.loader = DataLoader(
                self.dataset, batch_size // group.world_size, drop_last=True, generator=torch.Generator(),
                collate_fn=partial(collate_stream, collate or default_collate), num_workers=workers,
                pin_memory=self._pin_memory)
        else:
            self.dataset = SeededSamples(dataset, seed, share=workers > 0)
            self.sampler = EpochSampler(self._images, batch_size, seed, group, self.per_epoch)
            self.loader = self._loader_of(self.dataset, workers)

    def start_at(self, batch: int) -> Iterator:
        """Batches from number `batch` of the whole run on, as `collate` makes them. Once they are closed or forgotten,
        the processes that loaded them end."""
        first, offset = divmod(batch, self.per_epoch)
        if isinstance(self.dataset, SeededStream):
            for epoch in count(first):
                yield from self._from_stream(self.dataset, epoch, offset)
                offset = 0
        else:
            try:
                for epoch in count(first):
                    yield from self._from_samples(self.dataset, epoch, offset)
                    offset = 0
            finally:
                self.loader = self._loader_of(self.dataset, self.loader.num_workers)

    def describe(self, batch: int, count: int) -> str:
        """What a person can find `count` batches by, from number `batch` of the whole run on."""
        if self.sampler is None:
            return f'streamed batch {batch % self.per_epoch}'
        return self.sampler.describe(batch, count)

    def _loader_of(self, samples: SeededSamples, workers: int) -> DataLoader:
        # Each pass begins with a draw, which must not be one of the step's: a resumed run begins its pass elsewhere.
        return DataLoader(samples, batch_sampler=self.sampler, num_workers=workers, persistent_workers=workers > 0,
                          pin_memory=self._pin_memory, collate_fn=self._collate, generator=torch.Generator())

    def _from_samples(self, samples: SeededSamples, epoch: int, offset: int) -> Iterator:
        """The batches of an epoch of a map-style data set after the first `offset`."""
        def load(first: int, workers: int) -> DataLoader:
            if workers != self.loader.num_workers:
                self.loader = self._loader_of(samples, workers)
            assert self.sampler is not None
            self.sampler.start_at(epoch, offset + first)
            return self.loader

        for batch in fitting(load, self.loader.num_workers):
            if self._counted != int(samples.count):
                self._counted = int(samples.count)
                corrupt = samples.corrupt.nonzero().flatten().tolist()
                tolerate([image_name(samples.dataset, index) for index in corrupt], len(samples), self.max_corrupt)
            yield batch

    def _from_stream(self, stream: SeededStream, epoch: int, offset: int) -> Iterator:
        """The batches of an epoch after the first `offset`; a stream that ends early begins again."""
        given = 0
        for again in count():
            stream.number = (epoch, again)
            # Loader processes shuffle by the seeds that they take from here.
            self.loader.generator.manual_seed(mix_seed(stream.seed, 'processes', epoch, again))
            before = given
            for batch, damages in all_or_none(self.loader):
                if damages.keys() - self._damages.keys():
                    self._damages.update(damages)
                    described = getattr(getattr(stream.dataset, 'source', None), 'images', None)
                    # Where nothing says how many images there are, each epoch may have had other ones.
                    tolerate([f'{name} ({reason})' for name, reason in self._damages.items()],
                             described or self._images * (epoch + 1), self.max_corrupt)
                given += 1
                if given > offset:
                    yield batch
                if given == self.per_epoch:
                    return
            if given == before:
                raise DataError('The stream gave no whole batch: its shards are empty or damaged, or there are fewer '
                                'of them than processes and loader processes (--workers).')


def batches_of(
        config: Any, dataset: Samples | IterableDataset, group: Processes, collate: Callable[[list], Any] | None = None,
) -> Batches:
    """`Batches` by the settings of a command."""
    return Batches(dataset, config.batch_size, config.seed, group, config.loaders, config.accumulate,
                   config.max_corrupt, collate)


def length_of(dataset: Samples | IterableDataset, workers: int, group: Processes) -> int:
    """Images of an epoch for all processes; of a stream as its description counts them, 0 where it does not."""
    if not isinstance(dataset, IterableDataset):
        return len(dataset)
    if hasattr(dataset, 'set_loader_cfg'):
        dataset.set_loader_cfg(num_workers=counted_readers(workers))
    try:
        return len(cast(Sized, dataset)) * group.world_size
    except TypeError:
        return 0
