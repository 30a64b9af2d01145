"""Images for pretraining and evaluation: folders, timm's data sets, and scikit-learn's bundled digits."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import create_dataset, dataset_factory
from torch.utils.data import IterableDataset
from torchvision.datasets import VisionDataset
from torchvision.transforms import Compose

from ..errors import ConfigError, DataError, one_line, suggest
from . import huggingface, streams
from .folders import open_folder
from .images import open_image, prepared
from .samples import Samples

#: What timm's names of data sets begin with.
KINDS = ('torch', 'hfds', 'hfids', 'wds', 'tfds')


def open_dataset(
        name: str, data_dir: str | None, split: str, transform: Callable, download: bool = False, *,
        training: bool = False, batch_size: int = 1, seed: int = 0, images: int | None = None,
        image_column: str | None = None, label_column: str | None = None,
) -> Samples | IterableDataset:
    """A data set of (image, label).

    Args:
        name: 'digits', 'folder', or a timm name such as 'torch/cifar10', 'hfds/...', 'wds/...'.
        data_dir: Folder of the data; for 'folder' one of class folders or of images, or with such a folder a split.
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
    if kind in ('hfids', 'wds'):
        source: streams.Shards | streams.HubStream = (
            streams.Shards(name, data_dir, split, image_column) if kind == 'wds' else
            streams.HubStream(rest, data_dir, split, image_column, download))
        return streams.Stream(source, transform, images, training, batch_size, seed)
    streamed: dict[str, Any] = {} if kind == 'torch' else dict(
        is_training=training, batch_size=batch_size, num_samples=images, seed=seed, input_img_mode='RGB')
    return _open_with_timm(name, transform, root=data_dir, split=split, download=download, **streamed)


def _open_with_timm(name: str, transform: Callable, **options: Any) -> Samples | IterableDataset:
    try:
        dataset = create_dataset(name, transform=transform, **options)
    except (AssertionError, ImportError, RuntimeError, OSError, TypeError, ValueError) as error:
        tables = (getattr(dataset_factory, table, {}) for table in ('_TORCH_BASIC_DS', '_EMNIST'))
        known = [f'torch/{key}' for table in tables for key in table if name.startswith('torch/')]
        hint = f' {suggest(name, known)}' if known and name.lower() not in known else ''
        raise DataError(f'Cannot open data set {name!r}, split {options["split"]!r}, under {options["root"]!r}: '
                        f'{one_line(error) or type(error).__name__}.{hint}') from error
    # Torchvision's data sets behind timm take a transform here. The first part decodes, and by it any mode and depth
    # keeps its picture, where timm and torchvision would convert to RGB themselves and cut 16 bits off at 255.
    dataset.transform = Compose([prepared, transform])
    if hasattr(dataset, 'loader'):
        dataset.loader = open_image
    return dataset


def open_split(config: Any, split: str, transform: Callable, **more: Any) -> Samples | IterableDataset:
    """`open_dataset` of a split of the data that the settings of a command name."""
    return open_dataset(config.dataset, config.data_dir, split, transform, config.download,
                        image_column=config.image_column, label_column=config.label_column, **more)


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


def labels_of(dataset: Samples | IterableDataset) -> np.ndarray | None:
    """Labels of a map-style data set [images], or None if it has none or only one class."""
    targets = getattr(dataset, 'targets', None)
    labels = np.asarray([] if targets is None else targets)
    if len(np.unique(labels)) < 2:
        return None
    classes = getattr(dataset, 'classes', None)
    check_labels(labels, len(classes) if classes else None)
    return labels


def check_labels(labels: np.ndarray, num_classes: int | None = None) -> None:
    """Raise DataError for the first label [images] that is no class: negative, or `num_classes` and more."""
    wrong = np.flatnonzero((labels < 0) | (labels >= (np.inf if num_classes is None else num_classes)))
    if len(wrong):
        expected = 'from 0' if num_classes is None else f'between 0 and {num_classes - 1}'
        raise DataError(f'Image {wrong[0]} has the label {labels[wrong[0]]}, and {len(wrong)} of {len(labels)} labels '
                        f'are not {expected}: number the classes from 0, or correct num_classes.')
