"""Images with labels, checked before anything is trained on them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from timm.data import create_transform
from torch.utils.data import Dataset, IterableDataset
from torchvision.transforms import Compose

from ..errors import ConfigError, DataError
from .data import (
    DAMAGE,
    ImageSpec,
    ToMode,
    check_images,
    check_labels,
    evaluation_transform,
    image_name,
    labels_of,
    open_dataset,
    training_transform,
)
from .distributed import Processes
from .supervised_config import SupervisedConfig


class Images(Dataset):
    """Some images of a map-style data set that gives PIL images, under a transform."""

    def __init__(self, dataset: Dataset, indices: np.ndarray, transform: Callable):
        self.dataset, self.indices, self.transform = dataset, indices, transform

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> tuple[torch.Tensor, int]:
        index = int(self.indices[position])
        try:
            image, label = self.dataset[index]
        except DAMAGE as error:
            raise DataError(f'Cannot read {image_name(self.dataset, index)}: it is damaged or no image '
                            f'({" ".join(str(error).split())}). Replace or remove it.') from error
        return self.transform(image), int(label)

    def filename(self, position: int) -> str:
        """File of an image where its data set knows it."""
        return image_name(self.dataset, int(self.indices[position]))


@dataclass(frozen=True)
class LabelledImages:
    """Training and test images of a run.

    Attributes:
        train: Training images under the training transform.
        plain: The same images as evaluation sees them.
        test: Images to report on, as evaluation sees them.
        train_labels: int64 [images of train].
        classes: Names of the classes.
    """
    train: Dataset
    plain: Dataset
    test: Dataset
    train_labels: np.ndarray
    classes: list[str]


def labelled_images(
        config: SupervisedConfig,
        spec: ImageSpec,
        group: Processes,
        **augmentation: Any,
) -> LabelledImages:
    """Open the data of a run and check its labels.

    Args:
        config: Settings; `dataset` is resolved in place.
        spec: What images the model takes.
        group: The processes, of which the main one looks for unreadable images.
        **augmentation: For `augmenting_transform`.

    Raises:
        DataError: for data that is not there, has no labels, labels out of range, or unreadable images.
        ConfigError: for a number of classes that is not the data's.
    """
    if config.dataset is None:
        config.dataset = 'digits' if config.data_dir is None else 'folder'
    augment = augmenting_transform(spec, config.crop_scale, config.hflip, **augmentation)
    plain = evaluation_transform(spec, config.evaluated_part(spec.size))

    train, train_labels = _open(config, config.train_split, group, config.max_corrupt)
    names = getattr(train, 'classes', None)
    if config.eval_split:
        test, test_labels = _open(config, config.eval_split, group, 0.0)
        if config.dataset == 'folder' and test.classes != names:
            odd = sorted(set(names) ^ set(test.classes))
            raise DataError(f'The splits {config.train_split!r} and {config.eval_split!r} have other class folders: '
                            f'{", ".join(odd[:5])} {"is" if len(odd) == 1 else "are"} in one alone.')
        train_indices, test_indices = np.arange(len(train)), np.arange(len(test))
    else:
        test, test_labels = train, train_labels
        train_indices, test_indices = hold_out(len(train), 0.2, config.seed)
    train_indices = some_of(train_indices, config.train_images, config.seed)
    test_indices = some_of(test_indices, config.test_images, config.seed)

    count = len(names) if names else int(train_labels.max()) + 1
    if config.num_classes is not None and (config.num_classes < count or (names and config.num_classes != count)):
        raise ConfigError(f'num_classes={config.num_classes} does not fit the data, which has {count} classes: leave '
                          'it out, or name the right data.')
    count = config.num_classes or count
    for labels in (train_labels, test_labels):
        check_labels(labels, count)
    return LabelledImages(
        Images(train, train_indices, augment), Images(train, train_indices, plain), Images(test, test_indices, plain),
        train_labels[train_indices], list(names) if names and len(names) == count else [str(n) for n in range(count)])


def hold_out(count: int, part: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices of `count` images, those kept and those held out, both sorted; the same ones for the same seed."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).numpy()
    held = min(max(round(count * part), 1), count - 1)
    return np.sort(order[held:]), np.sort(order[:held])


def augmenting_transform(
        spec: ImageSpec,
        crop_scale: tuple[float, float],
        hflip: float,
        auto_augment: str | None = None,
        erase: float = 0.0,
) -> Callable:
    """Random resized crop and flip, with timm's augmentation policy and random erasing where asked for.

    Args:
        spec: What images the model takes; grey images are augmented in RGB.
        crop_scale: Area of crops.
        hflip: Probability of a flip.
        auto_augment: timm's name of a policy, such as 'rand-m9-mstd0.5-inc1' (RandSAC Table 15).
        erase: Probability of erasing a rectangle.

    Raises:
        ConfigError: for an unknown policy.
    """
    if auto_augment is None and not erase:
        return training_transform(spec, crop_scale, hflip)

    def parts(channels: int) -> tuple[Callable, Callable, Callable]:
        mean, std = (v if len(v) == channels else v * channels for v in (spec.mean, spec.std))
        return create_transform(
            (channels, *spec.size), is_training=True, scale=crop_scale, ratio=(3 / 4, 4 / 3), hflip=hflip,
            color_jitter=None, auto_augment=auto_augment, interpolation='bicubic', re_prob=erase, re_mode='pixel',
            mean=mean, std=std, separate=True)

    try:
        crop, policy, _ = parts(3)
    except (AssertionError, ValueError, KeyError, IndexError) as error:
        raise ConfigError(f'Unknown auto_augment {auto_augment!r}: a policy of timm, such as rand-m9-mstd0.5-inc1, '
                          'original, 3a or augmix-m5-w4, or none.') from error
    for transform in policy.transforms:
        for op in [*getattr(transform, 'ops', ()), *(o for ops in getattr(transform, 'policy', ()) for o in ops)]:
            if op.name.startswith('Posterize'):
                op.aug_fn = posterize
    return Compose([ToMode(3), crop, policy, ToMode(spec.channels), parts(spec.channels)[2]])


def some_of(indices: np.ndarray, most: int | None, seed: int) -> np.ndarray:
    """At most `most` of the indices, in their order, the same ones for the same seed."""
    if most is None or most >= len(indices):
        return indices
    draw = torch.randperm(len(indices), generator=torch.Generator().manual_seed(seed)).numpy()
    return indices[np.sort(draw[:most])]


def posterize(image: Image.Image, bits: int, **kwargs: Any) -> Image.Image:
    """Keep the upper bits of each value. timm's policies ask for none at their largest magnitude, which Pillow took for
    black up to version 11 and refuses since."""
    if bits >= 8:
        return image
    return ImageOps.posterize(image, bits) if bits > 0 else image.point(lambda value: 0)


def _open(
        config: SupervisedConfig,
        split: str,
        group: Processes,
        max_corrupt: float,
) -> tuple[Dataset, np.ndarray]:
    dataset = open_dataset(config.dataset, config.data_dir, split, _as_it_is, config.download)
    where = f'{config.dataset!r} {config.data_dir or ""}'.strip()
    if isinstance(dataset, IterableDataset):
        raise DataError(f'Labels of the stream {where} cannot be checked before training: use folders, or torch/NAME '
                        'or hfds/NAME.')
    labels = labels_of(dataset)
    if labels is None:
        raise DataError(f'The split {split!r} of {where} has no labels, or a single class: expected one folder of '
                        'images for each of two classes or more.')
    if not np.issubdtype(labels.dtype, np.integer):
        raise DataError(f'The labels of the split {split!r} of {where} are of type {labels.dtype}, such as '
                        f'{labels.flat[0]!r}: expected whole numbers, the classes.')
    group.on_main(lambda: check_images(dataset, config.check_images, max_corrupt))
    return dataset, labels.astype(np.int64)


def _as_it_is(image: Image.Image) -> Image.Image:
    return image
