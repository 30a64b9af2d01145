"""Images with labels, checked before anything is trained on them."""

from collections.abc import Callable
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset, IterableDataset
from torchvision.transforms import Compose

from .._compat import posterize
from ..engine.console import printable
from ..engine.processes import Processes
from ..engine.progress import say
from ..errors import ConfigError, DataError
from ..settings.classification import Classification
from .checks import check_images, image_name, some_names
from .images import DAMAGE, ToMode, damaged, prepared
from .samples import Samples
from .sources import check_labels, labels_of, open_split
from .transforms import CROP_RATIO, ImageSpec, evaluation_transform, timm_transform, training_transform


class Images(Dataset):
    """Some images of a map-style data set that gives PIL images, under a transform; indices and labels are int64."""

    def __init__(self, dataset: Samples, indices: np.ndarray, labels: np.ndarray, transform: Callable = prepared):
        self.dataset, self.indices, self.labels, self.transform = dataset, indices, labels, transform

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> tuple[torch.Tensor, int]:
        index = int(self.indices[position])
        try:
            image, label = self.dataset[index]
        except DAMAGE as error:
            raise damaged(image_name(self.dataset, index), error) from error
        return self.transform(image), int(label)

    def under(self, transform: Callable) -> 'Images':
        """The same images under another transform."""
        return Images(self.dataset, self.indices, self.labels, transform)


class LabelledImages(NamedTuple):
    """Images of a run: those to train on, under the training transform, the same as evaluation sees them (`plain`), and
    those to report on, as evaluation sees them; and names of the classes."""
    train: Samples
    plain: Samples
    test: Samples
    classes: list[str]


def labelled_images(config: Classification, spec: ImageSpec, group: Processes, **augmentation: Any) -> LabelledImages:
    """Open the data of a run, resolving `config.dataset` in place, and check its labels; the main process looks for
    unreadable images. `augmentation` is for `augmenting_transform`.

    Raises:
        DataError: for data that is not there, has no labels, labels out of range, or unreadable images.
        ConfigError: for a number of classes that is not the data's.
    """
    if config.dataset is None:
        config.dataset = 'digits' if config.data_dir is None else 'folder'
    assert config.crop_scale is not None  # which the settings refuse
    augment = augmenting_transform(spec, config.crop_scale, config.hflip, **augmentation)
    plain = evaluation_transform(spec, config.evaluated_part(spec.size))
    splits = open_splits(config, config.train_images, config.test_images, config.num_classes)
    train, test = splits.train, splits.test
    group.on_main(lambda: check_images(train.dataset, config.check_images, config.max_corrupt))
    if test.dataset is not train.dataset:
        group.on_main(lambda: check_images(test.dataset, config.check_images, 0.0))
    group.on_main(lambda: say_untrained(splits))
    return LabelledImages(train.under(augment), train.under(plain), test.under(plain), splits.classes)


class Splits(NamedTuple):
    """Labelled images to train on and to report on, under no transform yet."""
    train: Images
    test: Images
    classes: list[str]


class NoLabels(DataError):
    """Images without labels, or of a single class."""


def open_splits(
        config: Any, train_images: int | None, test_images: int | None, num_classes: int | None = None,
) -> Splits:
    """Open the labelled images of a command and check that their labels agree. Without an eval split a fifth of the
    training split is held out: the same one for the same seed, whatever the command.

    Args:
        train_images: To train on at most, drawn by the seed; None for all.
        test_images: To report on at most, drawn by the seed; None for all.
        num_classes: What they should be, or, where the data do not name their classes, at most are.

    Raises:
        NoLabels: for data without labels or of a single class.
        DataError: for data that is not there, labels out of range, or splits of other classes.
        ConfigError: for a number of classes that is not the data's.
    """
    train, train_labels = _open(config, config.train_split)
    test, test_labels = _open(config, config.eval_split) if config.eval_split else (train, train_labels)
    names, others = (getattr(dataset, 'classes', None) for dataset in (train, test))
    check_same_classes(config, names, others)
    train_indices, test_indices = divide(config, len(train), len(test))
    train_indices = some_of(train_indices, train_images, config.seed)
    test_indices = some_of(test_indices, test_images, config.seed)

    count = len(names) if names else int(train_labels.max()) + 1
    if num_classes is not None and (num_classes < count or (names and num_classes != count)):
        raise ConfigError(f'num_classes={num_classes} does not fit the data, which has {count} classes: leave it out, '
                          'or name the right data.')
    count = num_classes or count
    check_labels(test_labels, count)  # those to train on are within, as they are opened and counted
    return Splits(Images(train, train_indices, train_labels[train_indices]),
                  Images(test, test_indices, test_labels[test_indices]),
                  [printable(name) for name in names or map(str, range(count))])


def check_same_classes(config: Any, train: list[str] | None, test: list[str] | None) -> None:
    """Raise DataError for splits with other classes, or with the same under other labels, where they name them."""
    if not train or not test or list(train) == list(test):
        return
    splits = f'The splits {config.train_split!r} and {config.eval_split!r} have'
    odd = sorted(map(str, set(train) ^ set(test)))
    if not odd:
        raise DataError(f'{splits} the same classes in another order: their labels would not mean the same.')
    kind = 'class folders' if config.dataset == 'folder' else 'classes'
    raise DataError(f'{splits} other {kind}: {", ".join(odd[:5])}{", ..." if len(odd) > 5 else ""} '
                    f'{"is" if len(odd) == 1 else "are"} in one alone.')


def say_untrained(splits: Splits) -> None:
    """Name the classes of which there is no image to train on, and how many images to report on are of them."""
    lacking = sorted(set(range(len(splits.classes))) - set(splits.train.labels.tolist()))
    if lacking:
        reported = int(np.isin(splits.test.labels, lacking).sum())
        say(f'Classes without an image to train on: {some_names([str(splits.classes[n]) for n in lacking])}. '
            f'{reported} of the {len(splits.test.labels)} images to report on are of them.')


def distinct(names: list[str]) -> list[str]:
    """Names of classes, each its own: the second "screen" becomes "screen (2)"."""
    found = []
    for name in names:
        number, new = 1, name
        while new in found or (number > 1 and new in names):
            number += 1
            new = f'{name} ({number})'
        found.append(new)
    return found


def hold_out(count: int, part: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices of `count` images, those kept and those held out, both sorted; the same ones for the same seed. A single
    image, which cannot be both, is a DataError."""
    if count < 2:
        raise DataError(f'Of {count} training image{"" if count == 1 else "s"} none can be held out to report on: name '
                        '--eval-split, or add images.')
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).numpy()
    held = min(max(round(count * part), 1), count - 1)
    return np.sort(order[held:]), np.sort(order[:held])


def augmenting_transform(
        spec: ImageSpec, crop_scale: tuple[float, float], hflip: float, auto_augment: str | None = None,
        erase: float = 0.0,
) -> Callable:
    """Random resized crop and flip, with a policy of timm's, such as 'rand-m9-mstd0.5-inc1' (RandSAC Table 15), and the
    erasing of a rectangle, of probability `erase`, where asked for; grey images are augmented in RGB.

    Raises:
        ConfigError: for an unknown policy.
    """
    if auto_augment is None and not erase:
        return training_transform(spec, crop_scale, hflip)

    def parts(spec: ImageSpec) -> tuple[Callable, Any, Callable]:
        return timm_transform(
            spec, is_training=True, scale=crop_scale, ratio=CROP_RATIO, hflip=hflip, color_jitter=None,
            auto_augment=auto_augment, re_prob=erase, re_mode='pixel', separate=True)

    try:
        crop, policy, _ = parts(ImageSpec(spec.size, 3, *(v * (3 // len(v)) for v in (spec.mean, spec.std))))
    except (AssertionError, ValueError, KeyError, IndexError) as error:
        raise ConfigError(f'Unknown auto_augment {auto_augment!r}: a policy of timm, such as rand-m9-mstd0.5-inc1, '
                          'original, 3a or augmix-m5-w4, or none.') from error
    for transform in policy.transforms:
        for op in chain(getattr(transform, 'ops', ()), *getattr(transform, 'policy', ())):
            if op.name.startswith('Posterize'):
                op.aug_fn = posterize
    return Compose([ToMode(3), crop, policy, ToMode(spec.channels), parts(spec)[2]])


def divide(config: Any, train: int, test: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the images of both splits, or without an eval split those kept and those held out of one."""
    return (np.arange(train), np.arange(test)) if config.eval_split else hold_out(train, 0.2, config.seed)


def some_of(indices: np.ndarray, most: int | None, seed: int) -> np.ndarray:
    """At most `most` of the indices, in their order, the same ones for the same seed."""
    if most is None or most >= len(indices):
        return indices
    draw = torch.randperm(len(indices), generator=torch.Generator().manual_seed(seed)).numpy()
    return indices[np.sort(draw[:most])]


def _open(config: Any, split: str) -> tuple[Samples, np.ndarray]:
    dataset = open_split(config, split, prepared)
    where = f'{config.dataset!r} {config.data_dir or ""}'.strip()
    if isinstance(dataset, IterableDataset):
        reason = getattr(dataset, 'unlabelled', 'labels of a stream cannot be checked before training')
        raise NoLabels(f'The stream {where} is without labels here ({reason}): use folders, or torch/NAME or '
                       'hfds/NAME.')
    labels = labels_of(dataset)
    if labels is None:
        reason = getattr(dataset, 'unlabelled', None) or 'expected one folder of images for each of two classes or more'
        raise NoLabels(f'The split {split!r} of {where} has no labels, or a single class: {reason}.')
    if not np.issubdtype(labels.dtype, np.integer):
        raise DataError(f'The labels of the split {split!r} of {where} are of type {labels.dtype}, such as '
                        f'{labels.flat[0]!r}: expected whole numbers, the classes.')
    return dataset, labels.astype(np.int64)
