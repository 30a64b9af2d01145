"""Data sets that are read from their beginning to their end, without labels: WebDataset shards (wds/...) and Hugging
Face data sets (hfids/...)."""

import io
import math
import os
import random
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed as dist
from timm.data import create_dataset
from torch.utils.data import IterableDataset, get_worker_info

from .._compat import mixed_shards
from ..errors import DataError, one_line
from . import huggingface
from .images import DAMAGE, image_extensions, open_image

#: Endings of images in shards: the usual ones first, then what else Pillow opens.
ENDINGS = list(dict.fromkeys(['jpg', 'jpeg', 'png', 'webp', *sorted(e.lstrip('.') for e in image_extensions())]))


class Share(NamedTuple):
    """Which part of a stream is read here: in which of the run's processes, and as which of all their loader processes;
    a process that loads by itself counts as one."""
    rank: int
    world_size: int
    number: int
    readers: int


class Order(NamedTuple):
    """How a stream is shuffled: its parts by a seed, the same for all processes, and images by draws of this one."""
    seed: int
    draws: random.Random


class Entry(NamedTuple):
    """An image of a source, not looked at yet: what gives its name, the same in every pass, and what its file or path,
    raising ValueError where there is none."""
    name: Callable[[], str]
    content: Callable[[], str | io.BytesIO]


class Stream(IterableDataset):
    """Images of a source as (image, -1). Labels are not read: pretraining needs none, and streams are not evaluated.

    In training a process gives its part of an epoch's images, rounded up to whole batches, and reads its share of the
    source as often as that takes; else it reads its share once.

    Args:
        transform: From PIL images to tensors.
        images: Images of an epoch; by default those of a pass.
        training: Whether to shuffle, by `seed`, and go on as above.
        batch_size: Images a batch of this process.

    Attributes:
        damages: Images that could not be read since this was last emptied, by name with the reason; in the process
            that reads.

    Raises:
        DataError: in training, where neither `images` nor the source says how long an epoch is; and while reading,
            where none of a pass's images can be read.
    """
    unlabelled = 'streams are not evaluated, since their labels are not read'

    def __init__(
            self, source: 'Shards | HubStream', transform: Callable, images: int | None = None, training: bool = False,
            batch_size: int = 1, seed: int = 0,
    ):
        self.source, self.transform, self.training, self.batch_size = source, transform, training, batch_size
        self.images = images or source.images
        if training and not self.images:
            raise DataError('How many images the stream has is not known, and so not how long an epoch is: say with '
                            '--train-images how many images to take for one.')
        parallel = dist.is_available() and dist.is_initialized()
        self.rank, self.world_size = (dist.get_rank(), dist.get_world_size()) if parallel else (0, 1)
        self.workers, self.seed, self.epoch, self.shuffle_seed = 1, seed, 0, seed
        self.damages: dict[str, str] = {}

    def set_loader_cfg(self, num_workers: int) -> None:
        """Say how many processes load images, on which the length depends."""
        self.workers = max(num_workers, 1)

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the parts in the next pass."""
        self.epoch = epoch

    def __len__(self) -> int:
        """Images that all loader processes of this process give in an epoch."""
        if not self.images:
            raise TypeError('the length of the stream is not known')
        return self._quota(self.workers) * self.workers

    def __iter__(self) -> Iterator[tuple[Any, int]]:
        worker = get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        share = Share(self.rank, self.world_size, self.rank * workers + number, self.world_size * workers)
        quota, given = self._quota(workers) if self.training else math.inf, 0
        order = Order(self.seed + self.epoch, random.Random(self.shuffle_seed)) if self.training else None
        while given < quota:
            before, read = given, 0
            for entry in self.source.read(share, order):
                read += 1
                try:
                    image = self.transform(open_image(entry.content()))
                except DAMAGE as error:
                    self.damages[entry.name()] = re.sub(r' <_io\S+ object at \w+>', '', one_line(error))
                    continue
                given += 1
                yield image, -1
                if given >= quota:
                    return
            if read and given == before:
                name, reason = next(iter(self.damages.items()))
                raise DataError(f'None of the {read} images that this process reads can be read, the first being '
                                f'{name} ({reason}).')
            if not (self.training and read):
                return

    def _quota(self, workers: int) -> int:
        images = math.ceil((self.images or 0) / (self.world_size * workers))
        return math.ceil(images / self.batch_size) * self.batch_size


class Shards:
    """WebDataset shards, which timm finds: by a split of _info.json, or a split that is a pattern of names such as
    'train-{000..099}.tar|100000', with the number of images.

    Attributes:
        images: How many a pass has, None where nothing says so.

    Raises:
        DataError: for shards that are not described, missing or cut short.
    """

    def __init__(self, name: str, data_dir: str | None, split: str, image_column: str | None = None):
        try:
            import webdataset  # noqa: F401  timm's own message names no package of an index
        except ImportError as error:
            raise DataError(f'The data set {name!r} needs the package webdataset: pip install webdataset.') from error
        try:
            info = create_dataset(name, root=data_dir, split=split).reader.split_info
        except Exception as error:  # by what is wrong with _info.json: RuntimeError, KeyError, TypeError, ...
            raise DataError(
                f'Cannot open the shards of {name!r}, split {split!r}, under {data_dir!r} ({type(error).__name__}: '
                f'{one_line(error)}). Describe the split in _info.json beside them, or name the shards '
                "with --train-split 'train-{000..099}.tar' and their images with --train-images.") from error
        self.urls, self.images = [os.path.join(data_dir or '', file) for file in info.filenames], info.num_samples
        lengths = info.shard_lengths if len(info.shard_lengths) == len(self.urls) else [0] * len(self.urls)
        self.lengths = dict(zip(self.urls, lengths))
        self.column = image_column and image_column.lower().lstrip('.')
        for url in self.urls:
            _check_shard(url)

    def read(self, share: Share, order: Order | None) -> Iterator[Entry]:
        """The images of a share in one pass, shuffled where there is an order; raises DataError for a part that cannot
        be read to its end."""
        from timm.data.readers.reader_wds import SAMPLE_INITIAL_SIZE, SAMPLE_SHUFFLE_SIZE
        from webdataset import shuffle

        urls = iter(self.urls)
        if order:
            urls = shuffle(500, initial=100, rng=random.Random(order.seed))(urls)
        samples = self._samples(list(urls)[share.number::share.readers])
        if order:
            samples = shuffle(SAMPLE_SHUFFLE_SIZE, initial=SAMPLE_INITIAL_SIZE, rng=order.draws)(samples)
        for sample in samples:
            yield Entry(partial('{__key__} of {__url__}'.format_map, sample), partial(self._content, sample))

    def _samples(self, urls: list[str]) -> Iterator[dict[str, Any]]:
        from webdataset import reraise_exception
        from webdataset.tariterators import tarfile_samples

        for url in urls:
            count = 0
            try:
                for sample in tarfile_samples([{'url': url}], handler=reraise_exception):
                    count += 1
                    yield sample
            except Exception as error:  # OSError, tarfile's, ValueError, those of a network: by the cause
                raise DataError(f'The shard {url} cannot be read to its end ({type(error).__name__}: '
                                f'{one_line(error, 200)}). Fetch or write it again.') from error
            if count < self.lengths[url]:  # tarfile takes a damaged header for the end
                raise DataError(f'The shard {url} ends after {count} of {self.lengths[url]} samples that its '
                                'description gives: fetch or write it again, or correct shard_lengths in _info.json.')

    def _content(self, sample: dict[str, Any]) -> io.BytesIO:
        members = [name for name in sample if not name.startswith('__')]
        if self.column is None:
            known = [e for e in ENDINGS if e in sample] or [m for m in members if m.rpartition('.')[2] in ENDINGS]
            if known and (known[0] in ENDINGS or len(known) == 1):
                return io.BytesIO(sample[known[0]])
        elif self.column in sample:
            return io.BytesIO(sample[self.column])
        if self.column or not known:
            raise ValueError(f'no image among its members {", ".join(members)}')
        raise ValueError(f'{" and ".join(known)} could both be its image: name one with --image-column')


class HubStream:
    """A Hugging Face data set, streamed, or with `download` fetched whole and then streamed from the disk; read as
    `Shards` are.

    Raises:
        DataError: for data that cannot be opened, or an image column that is not there or could be several.
    """

    def __init__(self, name: str, data_dir: str | None, split: str, image_column: str | None, download: bool):
        self.name, self.rows = name, huggingface.load(name, data_dir, split, streaming=not download)
        self.column = huggingface.find_image_column(self.rows.features, image_column)
        described = (self.rows.info.splits or {}).get(split)
        self.images = len(self.rows) if download else getattr(described, 'num_examples', None)

    def read(self, share: Share, order: Order | None) -> Iterator[Entry]:
        from datasets import Dataset
        from datasets.distributed import split_dataset_by_node
        from timm.data.readers.reader_hfids import SHUFFLE_SIZE

        rows = self.rows
        if isinstance(rows, Dataset):
            rows = rows.to_iterable_dataset(num_shards=min(share.readers, len(rows)))
        if order:
            mixed = mixed_shards(rows.shuffle, rows.num_shards, share.readers)
            rows = rows.shuffle(seed=order.seed, buffer_size=SHUFFLE_SIZE, **mixed)
        rows = huggingface.undecoded(rows, self.column)
        # The loader processes of a process share out its parts among themselves.
        rows = split_dataset_by_node(rows, rank=share.rank, world_size=share.world_size)
        try:
            for row in rows:
                yield Entry(partial(huggingface.row_name, row, self.column),
                            partial(huggingface.content_of, row[self.column]))
        except Exception as error:  # of pyarrow, of a network, OSError, ValueError: by the cause
            raise DataError(f'The stream {self.name} cannot be read to its end ({type(error).__name__}: '
                            f'{one_line(error, 200)}). Fetch it again, or correct it.') from error


def _check_shard(url: str) -> None:
    """Raise DataError for a local shard that is missing or cut short, before training."""
    shard = Path(url)
    if '://' in url or url.startswith('pipe:') or shard.suffix != '.tar':
        return
    if not shard.is_file():
        raise DataError(f'The shard {shard} is missing: _info.json or the split names it. Fetch it, or correct that.')
    with shard.open('rb') as file:
        size = file.seek(0, 2)
        file.seek(max(size - 1024, 0))
        if size % 512 or file.read() != bytes(1024):  # a tar file is whole blocks, and two of zeros end it
            raise DataError(f'The shard {shard} is cut short at {size} bytes: it does not end as a tar file does. '
                            'Fetch it again.')
