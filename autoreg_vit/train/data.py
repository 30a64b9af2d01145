"""Images for pretraining and evaluation: folders, timm's data sets, and scikit-learn's bundled digits."""

import os
import struct
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import create_dataset, create_transform
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset
from torchvision.datasets import ImageFolder, VisionDataset
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms import Compose
from tqdm import tqdm

from ..errors import ConfigError, DataError, suggest
from .distributed import EpochSampler, Processes, check_divisible
from .seeding import kept_random_state, mix_seed, seed_cpu

SPLIT_NAMES = ('train', 'training', 'val', 'valid', 'validation', 'test')


@dataclass(frozen=True)
class ImageSpec:
    """What a model takes: pixels as (height, width), channels, and the normalisation of each channel."""
    size: tuple[int, int]
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self):
        if self.channels not in (1, 3):
            raise DataError(f'Image files have 1 (grey) or 3 (RGB) channels, and this model takes {self.channels}. '
                            'Use in_chans 1 or 3 here, or train on tensors of your own with the model itself.')

    @classmethod
    def of(cls, model: torch.nn.Module, in_chans: int | None = None) -> 'ImageSpec':
        """Of a pretraining model or a timm model: its configured normalisation, and the size of its patch embedding or
        else, for want of one, the configured size and `in_chans`."""
        embed, cfg = getattr(getattr(model, 'encoder', model), 'patch_embed', None), model.pretrained_cfg
        size = getattr(embed, 'img_size', None) or cfg['input_size'][-2:]
        channels = embed.proj.in_channels if hasattr(embed, 'proj') else in_chans or cfg['input_size'][0]
        mean, std = cfg['mean'], cfg['std']
        if channels == 1:
            mean, std = (sum(mean) / len(mean),), (sum(std) / len(std),)
        return cls(tuple(size), channels, tuple(mean), tuple(std))

    def nothing(self, batch: int, device: torch.device) -> torch.Tensor:
        """Empty images [batch, channels, height, width]."""
        return torch.zeros(batch, self.channels, *self.size, device=device)


class ToMode:
    """Convert PIL images to grey or RGB; a named class so that loader processes can receive it."""

    def __init__(self, channels: int):
        self.mode = 'L' if channels == 1 else 'RGB'

    def __call__(self, image: Image.Image) -> Image.Image:
        return image if image.mode == self.mode else image.convert(self.mode)


def training_transform(spec: ImageSpec, crop_scale: tuple[float, float], hflip: float) -> Callable:
    """Random resized crop and horizontal flip, the whole augmentation of both papers (RandSAC 5, SAIM "Training
    configurations")."""
    return Compose([ToMode(spec.channels), create_transform(
        (spec.channels, *spec.size), is_training=True, scale=crop_scale, ratio=(3 / 4, 4 / 3), hflip=hflip,
        color_jitter=None, interpolation='bicubic', mean=spec.mean, std=spec.std)])


def evaluation_transform(spec: ImageSpec, crop_pct: float = 1.0) -> Callable:
    """The middle of the image, `crop_pct` of its shorter side, resized to the model's size."""
    return Compose([ToMode(spec.channels), create_transform(
        (spec.channels, *spec.size), is_training=False, crop_pct=crop_pct, crop_mode='center', interpolation='bicubic',
        mean=spec.mean, std=spec.std)])


def open_dataset(
        name: str,
        data_dir: str | None,
        split: str,
        transform: Callable,
        download: bool = False,
        *,
        training: bool = False,
        batch_size: int = 1,
        seed: int = 0,
) -> Dataset:
    """A data set of (image, label).

    Args:
        name: 'digits', 'folder', or a timm name such as 'torch/cifar10', 'hfds/...', 'wds/...'.
        data_dir: Folder of the data; for 'folder' one of class folders or of images, or with such a folder a split.
        split: Name of the split.
        transform: From PIL images to tensors.
        download: Let torchvision data sets download themselves.
        training: Shuffle data sets that are streams (wds, hfids, tfds).
        batch_size: Of the loader; streams share out whole batches to its processes.
        seed: Of the shuffling of streams.

    Raises:
        DataError: for data that is not there, is empty or has no such split.
    """
    if name == 'digits':
        return Digits(split, transform)
    if name == 'folder':
        return _open_folder(data_dir, split, transform)
    if '/' not in name:
        raise DataError(f'Unknown data set {name!r}: it is digits, folder, or a timm name such as torch/cifar10, '
                        f'hfds/NAME or wds/NAME. {suggest(name, ["digits", "folder"])}')
    try:
        dataset = create_dataset(
            name, root=data_dir, split=split, transform=transform, download=download, is_training=training,
            batch_size=batch_size, seed=seed)
    except (AssertionError, ImportError, RuntimeError, OSError, TypeError, ValueError) as error:
        reason = ' '.join(str(error).split()) or type(error).__name__
        known = _timm_names(name.split('/')[0])
        hint = f' {suggest(name, known)}' if known and name.lower() not in known else ''
        raise DataError(f'Cannot open data set {name!r}, split {split!r}, under {data_dir!r}: {reason}.{hint}'
                        ) from error
    dataset.transform = transform  # torchvision data sets behind timm take it here
    if hasattr(dataset, '_max_retries'):
        dataset._max_retries = 1  # timm would put the next image in place of a corrupt one, uncounted
    _check_shards(dataset, data_dir)
    return dataset


def _timm_names(prefix: str) -> list[str]:
    """Names of the torchvision data sets that timm opens."""
    from timm.data import dataset_factory

    known = {**getattr(dataset_factory, '_TORCH_BASIC_DS', {}), **getattr(dataset_factory, '_EMNIST', {})}
    return [f'torch/{name}' for name in known] if prefix == 'torch' else []


def _check_shards(dataset: Dataset, data_dir: str | None) -> None:
    """Raise DataError for local WebDataset shards that are missing or cut short, which the reader would pass over."""
    info = getattr(getattr(dataset, 'reader', None), 'split_info', None)
    for name in getattr(info, 'filenames', ()):
        shard = Path(data_dir or '', name)
        if '://' in name or name.startswith('pipe:') or shard.suffix != '.tar':
            continue
        if not shard.is_file():
            raise DataError(f'The shard {shard} is missing: _info.json names it. Fetch it, or correct _info.json.')
        with shard.open('rb') as file:
            size = file.seek(0, 2)
            file.seek(max(size - 1024, 0))
            if size % 512 or file.read() != bytes(1024):  # a tar file is whole blocks, and two of zeros end it
                raise DataError(f'The shard {shard} is cut short at {size} bytes: it does not end as a tar file does. '
                                'Fetch it again.')


class Digits(VisionDataset):
    """scikit-learn's bundled digits, 8 x 8 grey: the first 1,437 to train on, the last 360 to test."""

    def __init__(self, split: str, transform: Callable):
        from sklearn.datasets import load_digits

        super().__init__(transform=transform)
        parts = {'train': slice(0, 1437), 'test': slice(1437, None)}
        if split not in parts:
            raise DataError(f"The digits have the splits 'train' and 'test', got {split!r}.")
        digits = load_digits()
        self.images = (digits.images[parts[split]] * (255 / 16)).astype(np.uint8)
        self.targets = digits.target[parts[split]].tolist()

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.transform(Image.fromarray(self.images[index])), self.targets[index]


class FlatFolder(VisionDataset):
    """Images of a folder and its subfolders, without labels (-1)."""

    def __init__(self, root: Path, transform: Callable):
        super().__init__(root, transform=transform)
        self.samples = sorted(p for p in root.rglob('*') if p.suffix.lower() in IMG_EXTENSIONS and p.is_file())
        if not self.samples:
            raise DataError(f'No images in {root}: expected files ending in {", ".join(IMG_EXTENSIONS)}.')

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.transform(open_image(self.samples[index])), -1


def open_image(path: str | Path) -> Image.Image:
    """Decode a file; raises one of DAMAGE where it cannot be."""
    with Image.open(path) as image:
        if Image.MAX_IMAGE_PIXELS and image.width * image.height > Image.MAX_IMAGE_PIXELS:
            # PIL only warns up to twice as many, and would decode them.
            raise Image.DecompressionBombError(f'{image.width} x {image.height} pixels, more than PIL holds to be safe')
        image.load()
        return image


def _open_folder(data_dir: str | None, split: str, transform: Callable) -> Dataset:
    if data_dir is None:
        raise DataError("dataset='folder' needs --data-dir, the folder of the images.")
    root = Path(data_dir).expanduser()
    if not root.is_dir():
        raise DataError(f'No folder {root}: --data-dir names the folder of the images.')
    folders = sorted(p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith('.'))
    if split in folders:
        root = root / split
        folders = sorted(p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith('.'))
    elif split != 'train' or set(folders) & set(SPLIT_NAMES):
        raise DataError(f'{root} has no split {split!r}: it holds {", ".join(folders[:10]) or "no folders"}. '
                        'Name one with --train-split or --eval-split.')
    if len(folders) < 2:
        return FlatFolder(root, transform)
    try:
        return ImageFolder(str(root), transform=transform, loader=open_image)
    except FileNotFoundError as error:
        raise DataError(f'Class folders without images under {root}: {" ".join(str(error).split())}') from error


def labels_of(dataset: Dataset) -> np.ndarray | None:
    """Labels of a map-style data set [images], or None if it has none or only one class."""
    if isinstance(dataset, (IterableDataset, FlatFolder)):
        return None
    labels = getattr(dataset, 'targets', None)
    if labels is None and hasattr(dataset, 'reader'):
        labels = [dataset.reader[i][1] for i in range(len(dataset))]
    if labels is None:
        return None
    labels = np.asarray(labels)
    if len(np.unique(labels)) < 2:
        return None
    check_labels(labels, len(classes) if (classes := getattr(dataset, 'classes', None)) else None)
    return labels


def check_labels(labels: np.ndarray, num_classes: int | None = None) -> None:
    """Raise DataError for the first label [images] that is no class: negative, or `num_classes` and more."""
    wrong = np.flatnonzero((labels < 0) | (labels >= (np.inf if num_classes is None else num_classes)))
    if len(wrong):
        expected = 'from 0' if num_classes is None else f'between 0 and {num_classes - 1}'
        raise DataError(f'Image {wrong[0]} has the label {labels[wrong[0]]}, and {len(wrong)} of {len(labels)} labels '
                        f'are not {expected}: number the classes from 0, or correct num_classes.')


def sample(dataset: Dataset, most: int, seed: int) -> Dataset:
    """At most `most` images of a map-style data set, the same ones for the same seed."""
    if len(dataset) <= most:
        return dataset
    generator = torch.Generator().manual_seed(seed)
    return Subset(dataset, sorted(torch.randperm(len(dataset), generator=generator)[:most].tolist()))


# What reading and decoding a damaged file raises.
DAMAGE = (OSError, SyntaxError, EOFError, ValueError, RuntimeError, struct.error, zlib.error,
          Image.DecompressionBombError)


class SeededSamples(Dataset):
    """A map-style data set whose augmentation is a function of (seed, epoch, index), whatever process does it.

    Takes keys (epoch, index) and gives what the data set gives for the index. In place of an image that cannot be read
    it gives the next that can, and counts it.

    Attributes:
        corrupt: A mark for every image that could not be read, uint8 [images], shared with loader processes.
        count: How many there may be, a lower bound, int64 [1], shared with loader processes.
    """

    def __init__(self, dataset: Dataset, seed: int):
        self.dataset, self.seed = dataset, seed
        self.corrupt = torch.zeros(len(dataset), dtype=torch.uint8).share_memory_()
        self.count = torch.zeros(1, dtype=torch.int64).share_memory_()

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: tuple[int, int]):
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: list[tuple[int, int]]) -> list:
        with kept_random_state():
            return [self._sample(*key) for key in keys]

    def _sample(self, epoch: int, index: int):
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
                        f'{image_name(self.dataset, index)}: {" ".join(str(last).split())}')


def image_name(dataset: Dataset, index: int) -> str:
    """File of an image where its data set knows it, else its number."""
    while isinstance(dataset, Subset):
        dataset, index = dataset.dataset, dataset.indices[index]
    samples = getattr(dataset, 'samples', None)
    if samples is not None:
        return str(samples[index][0] if isinstance(samples[index], tuple) else samples[index])
    try:
        return str(dataset.filename(index))
    except (AttributeError, AssertionError, KeyError, NotImplementedError, TypeError):
        return f'image {index}'


def check_images(
        dataset: Dataset,
        most: int,
        max_corrupt: float,
        say: Callable[[str], None] = print,
        try_sample: Callable[[int], Any] | None = None,
) -> list[str]:
    """Decode up to `most` images of a folder, spread evenly, and look at the sizes of all its files.

    Args:
        dataset: Of the folder kind; others are left unchecked.
        most: Images to decode.
        max_corrupt: Part of the images that may be unreadable.
        say: Takes a message that names the unreadable ones, where they are few enough.
        try_sample: Decodes the sample of an index, raising one of DAMAGE where it cannot be used; by default its image.

    Returns:
        Names of the unreadable images.

    Raises:
        DataError: for more unreadable images, naming them.
    """
    samples = getattr(dataset, 'samples', None)
    if not samples or most < 1:
        return []
    paths = [Path(image_name(dataset, i)) for i in range(len(samples))]
    chosen = sorted(set(np.linspace(0, len(paths) - 1, min(most, len(paths))).astype(int).tolist()))
    damages = {path: 'it is empty' for path in paths if path.stat().st_size == 0}

    def decode(index: int) -> None:
        try:
            open_image(paths[index]) if try_sample is None else try_sample(index)
        except DAMAGE as error:
            damages.setdefault(paths[index], ' '.join(str(error).split()))

    with ThreadPoolExecutor(min(os.cpu_count() or 1, 16)) as pool:  # decoding does not hold the interpreter
        list(pool.map(decode, chosen))
    if damages:
        named = [f'{path} ({reason})' for path, reason in sorted(damages.items())]
        refuse_corrupt(len(named), len(chosen), max_corrupt, named)
        say(f'{len(named)} of {len(chosen)} images cannot be read, and others stand in for them: {_some(named)}')
    return [str(path) for path in sorted(damages)]


def refuse_corrupt(count: int, images: int, max_corrupt: float, names: list[str]) -> None:
    """Raise DataError where `count` unreadable images of `images` are more than the part `max_corrupt`."""
    if count > max_corrupt * images:
        raise DataError(f'{count} of {images} images cannot be read, more than --max-corrupt {max_corrupt:g} allows: '
                        f'{_some(names)}. Mend or remove them, or allow more.')


def _some(names: list[str], most: int = 5) -> str:
    return '; '.join(names[:most]) + (f'; and {len(names) - most} more' if len(names) > most else '')


class SeededStream(IterableDataset):
    """A streamed data set whose order and augmentation are functions of (seed, pass, loader process, position).

    Resuming is exact with as many loader processes as before. `number` names the pass, and is set before it; loader
    processes learn it when they start.
    """

    def __init__(self, dataset: IterableDataset, seed: int, rank: int = 0):
        self.dataset, self.seed, self.rank, self.number = dataset, seed, rank, (0, 0)

    def __iter__(self):
        worker = torch.utils.data.get_worker_info()
        place = (*self.number, self.rank, worker.id if worker else 0)
        if hasattr(self.dataset, 'set_epoch'):
            self.dataset.set_epoch(mix_seed(self.seed, 'order', *self.number) % 2 ** 31)
        reader = getattr(self.dataset, 'reader', None)
        if hasattr(reader, 'worker_seed'):
            # timm's WebDataset reader goes on with the last pass's generator unless it is made anew.
            reader.ds, reader.worker_seed = None, mix_seed(self.seed, 'shuffle', *place)
        samples, position = iter(self.dataset), 0
        while True:
            with kept_random_state():
                seed_cpu(mix_seed(self.seed, 'image', *place, position))
                try:
                    sample = next(samples)
                except StopIteration:
                    return
            yield sample
            position += 1


class Batches:
    """Training batches of this process without end, in an order and with an augmentation that are functions of the seed
    and the epoch, from any place on.

    Args:
        dataset: Map-style, or a stream.
        batch_size: Images a batch, over all processes together.
        seed: Of the run.
        group: The processes of the run.
        workers: Processes that load images.
        multiple_of: Makes the batches of an epoch a multiple of this, for accumulation.
        max_corrupt: Part of a map-style data set's images that may be unreadable.
        collate: Makes a batch of a list of samples; by default tensors are stacked.

    Attributes:
        per_epoch: Batches an epoch.
        sampler: The EpochSampler of a map-style data set, None for a stream.

    Raises:
        DataError: for fewer images than a batch, and while batches are taken for too many unreadable images.
        ConfigError: for a batch that processes cannot share out, or accumulation over more batches than an epoch has.
    """

    def __init__(
            self,
            dataset: Dataset,
            batch_size: int,
            seed: int,
            group: Processes,
            workers: int = 0,
            multiple_of: int = 1,
            max_corrupt: float = 0.001,
            collate: Callable[[list], Any] | None = None,
    ):
        check_divisible(batch_size, group)
        self.max_corrupt, self._counted = max_corrupt, 0
        self.is_stream = isinstance(dataset, IterableDataset)
        images = stream_length(dataset, workers) * group.world_size if self.is_stream else len(dataset)
        if images < batch_size:
            raise DataError(f'{images} training images are fewer than a batch of {batch_size}: use --batch-size '
                            f'{images} or less.')
        self.per_epoch = images // batch_size // multiple_of * multiple_of
        if self.per_epoch == 0:
            raise ConfigError(
                f'accumulate={multiple_of} asks for more batches than the {images // batch_size} of an epoch.')
        shared = dict(num_workers=workers, pin_memory=group.device.type == 'cuda', collate_fn=collate)
        if self.is_stream:
            self.sampler = None
            self.dataset = SeededStream(dataset, seed, group.rank)
            # New processes for every pass, since they learn its number when they start.
            self.loader = DataLoader(self.dataset, batch_size // group.world_size, drop_last=True,
                                     generator=torch.Generator(), **shared)
        else:
            self.dataset = SeededSamples(dataset, seed)
            self.sampler = EpochSampler(images, batch_size, seed, group, self.per_epoch)
            self.loader = DataLoader(
                self.dataset, batch_sampler=self.sampler, persistent_workers=workers > 0, **shared)

    def start_at(self, batch: int) -> Iterator:
        """Batches from number `batch` of the whole run on, as `collate` makes them."""
        epoch, offset = divmod(batch, self.per_epoch)
        while True:
            if self.is_stream:
                yield from self._stream(epoch, offset)
            else:
                self.sampler.start_at(epoch, offset)
                for batch in self.loader:
                    self._check_corrupt()
                    yield batch
            epoch, offset = epoch + 1, 0

    def _check_corrupt(self) -> None:
        """Name images that turned out to be unreadable since the last batch; too many are a DataError."""
        if self._counted != (count := int(self.dataset.count)):
            self._counted = count
            names = [image_name(self.dataset.dataset, i) for i in self.dataset.corrupt.nonzero().flatten().tolist()]
            refuse_corrupt(len(names), len(self.dataset), self.max_corrupt, names)
            tqdm.write(f'{len(names)} images cannot be read, and others stand in for them: {_some(names)}')

    def _stream(self, epoch: int, offset: int) -> Iterator:
        """The batches of an epoch after the first `offset`; a stream that ends early begins again."""
        given, again = 0, 0
        while given < self.per_epoch:
            self.dataset.number = (epoch, again)
            # timm's readers take what they shuffle by from the seeds of loader processes.
            self.loader.generator.manual_seed(mix_seed(self.dataset.seed, 'processes', epoch, again))
            before = given
            for batch in self.loader:
                given += 1
                if given > offset:
                    yield batch
                if given == self.per_epoch:
                    return
            if given == before:
                raise DataError('The stream gave no whole batch: its shards are empty or damaged, or there are fewer '
                                'of them than processes and loader processes (--workers).')
            again += 1


def stream_length(dataset: IterableDataset, workers: int) -> int:
    """Images of a stream for each process, as its description counts them; 0 where it does not."""
    if hasattr(dataset, 'set_loader_cfg'):
        dataset.set_loader_cfg(num_workers=max(workers, 1))  # before timm 1.0.31 none would count as no reader at all
    try:
        return len(dataset)
    except TypeError:
        return 0
