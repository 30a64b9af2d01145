"""Images for pretraining and evaluation: folders, timm's data sets, and scikit-learn's bundled digits."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import create_dataset, create_transform
from torch.utils.data import Dataset, IterableDataset, Subset
from torchvision.datasets import VisionDataset
from torchvision.transforms import Compose

from ..errors import ConfigError, DataError, suggest
from .folders import FlatFolder, open_folder
from .images import DAMAGE, ToMode, open_image, prepared

#: What timm's names of data sets begin with.
KINDS = ('torch', 'hfds', 'hfids', 'wds', 'tfds')


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
        images: int | None = None,
        image_column: str | None = None,
        label_column: str | None = None,
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
        images: Of an epoch of a stream; by default as many as it says it has.
        image_column: Column of the images (hfds, hfids), or ending (wds); by default the one there is.
        label_column: Column of the labels (hfds); by default the one there is.

    Raises:
        ConfigError: for a column of data that have none.
        DataError: for data that is not there, is empty or has no such split.
    """
    from . import huggingface, streams  # which read images as this module does

    kind, _, rest = name.partition('/')
    kind = kind.lower()
    if name not in ('digits', 'folder') and not (rest and kind in KINDS):  # timm would take another for a folder
        raise DataError(f'Unknown data set {name!r}: it is digits, folder, or a timm name such as torch/cifar10, '
                        f'hfds/NAME or wds/NAME. {suggest(kind, ["digits", "folder", *KINDS])}')
    for flag, column, kinds in (('image', image_column, ('hfds', 'hfids', 'wds')), ('label', label_column, ('hfds',))):
        if column is not None and kind not in kinds:
            raise ConfigError(f'--{flag}-column {column} is for the data sets {", ".join(f"{k}/NAME" for k in kinds)}, '
                              f'and this one is {name!r}: leave it out.')
    if kind == 'digits':
        return Digits(split, transform)
    if kind == 'folder':
        return open_folder(data_dir, split, transform)
    if kind == 'hfds':
        return huggingface.HubImages(rest, data_dir, split, transform, image_column, label_column)
    if kind == 'tfds' or kind == 'torch':
        options = dict(is_training=training, batch_size=batch_size, num_samples=images, seed=seed, input_img_mode='RGB')
        return _open_with_timm(name, data_dir, split, transform, download, **(options if kind == 'tfds' else {}))
    source = (streams.Shards(name, data_dir, split, image_column) if kind == 'wds' else
              streams.HubStream(rest, data_dir, split, image_column, download))
    return streams.Stream(source, transform, images, training, batch_size, seed)


def _open_with_timm(
        name: str,
        data_dir: str | None,
        split: str,
        transform: Callable,
        download: bool,
        **options: Any,
) -> Dataset:
    try:
        dataset = create_dataset(
            name, root=data_dir, split=split, transform=transform, download=download, **options)
    except (AssertionError, ImportError, RuntimeError, OSError, TypeError, ValueError) as error:
        reason = ' '.join(str(error).split()) or type(error).__name__
        known = _timm_names(name.split('/')[0])
        hint = f' {suggest(name, known)}' if known and name.lower() not in known else ''
        raise DataError(f'Cannot open data set {name!r}, split {split!r}, under {data_dir!r}: {reason}.{hint}'
                        ) from error
    # Torchvision's data sets behind timm take a transform here. The first part decodes, and by it any mode and depth
    # keeps its picture, where timm and torchvision would convert to RGB themselves and cut 16 bits off at 255.
    dataset.transform = Compose([prepared, transform])
    if hasattr(dataset, 'loader'):
        dataset.loader = open_image
    return dataset


def open_split(config: Any, split: str, transform: Callable, **more: Any) -> Dataset:
    """`open_dataset` of a split of the data that the settings of a command name."""
    return open_dataset(config.dataset, config.data_dir, split, transform, config.download,
                        image_column=config.image_column, label_column=config.label_column, **more)


def _timm_names(prefix: str) -> list[str]:
    """Names of the torchvision data sets that timm opens."""
    from timm.data import dataset_factory

    known = {**getattr(dataset_factory, '_TORCH_BASIC_DS', {}), **getattr(dataset_factory, '_EMNIST', {})}
    return [f'torch/{name}' for name in known] if prefix == 'torch' else []


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


def labels_of(dataset: Dataset) -> np.ndarray | None:
    """Labels of a map-style data set [images], or None if it has none or only one class."""
    if isinstance(dataset, (IterableDataset, FlatFolder)):
        return None
    labels = getattr(dataset, 'targets', None)
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
        say: Takes messages that name what of the folder is left out, and the unreadable images, where they are few
            enough.
        try_sample: Decodes the sample of an index, raising one of DAMAGE where it cannot be used; by default its image.

    Returns:
        Names of the unreadable images.

    Raises:
        DataError: for more unreadable images, naming them.
    """
    if (left_out := getattr(dataset, 'left_out', None)) and (text := left_out.describe(Path(dataset.root))):
        say(text)
    samples = getattr(dataset, 'samples', None)
    if not samples or most < 1:
        return []
    paths = [Path(image_name(dataset, i)) for i in range(len(samples))]
    chosen = sorted(set(np.linspace(0, len(paths) - 1, min(most, len(paths))).astype(int).tolist()))
    damages = {}
    for path in paths:
        try:
            if path.stat().st_size == 0:
                damages[path] = 'it is empty'
        except OSError as error:
            damages[path] = 'a link to nowhere' if path.is_symlink() else str(error.strerror)

    def decode(index: int) -> None:
        try:
            prepared(open_image(paths[index])) if try_sample is None else try_sample(index)
        except DAMAGE as error:
            damages.setdefault(paths[index], ' '.join(str(error).split()))

    with ThreadPoolExecutor(min(os.cpu_count() or 1, 16)) as pool:  # decoding does not hold the interpreter
        list(pool.map(decode, chosen))
    if damages:
        named = [f'{path} ({reason})' for path, reason in sorted(damages.items())]
        refuse_corrupt(len(named), len(chosen), max_corrupt, named)
        say(f'{len(named)} of {len(chosen)} images cannot be read, and others stand in for them: {some_names(named)}')
    return [str(path) for path in sorted(damages)]


def refuse_corrupt(count: int, images: int, max_corrupt: float, names: list[str]) -> None:
    """Raise DataError where `count` unreadable images of `images` are more than the part `max_corrupt`."""
    if count > max_corrupt * images:
        raise DataError(f'{count} of {images} images cannot be read, more than --max-corrupt {max_corrupt:g} allows: '
                        f'{some_names(names)}. Mend or remove them, or allow more.')


def some_names(names: list[str], most: int = 5) -> str:
    """The first names of a list, and how many more there are."""
    return '; '.join(names[:most]) + (f'; and {len(names) - most} more' if len(names) > most else '')
