"""Images with masks of classes, checked before anything is trained on them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn.functional import interpolate, pad
from torch.utils.data import Dataset
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as transforms

from ..engine.processes import Processes
from ..engine.progress import say
from ..errors import ConfigError, DataError, one_line
from ..models.dense.segmenter import IGNORED
from ..settings.dense import SegmentConfig
from .checks import check_images, some_names
from .folders import LeftOut, find_split, list_folder, no_files, walk
from .images import DAMAGE, ToMode, open_image, stored_size
from .labelled import distinct, divide, some_of
from .transforms import ImageSpec

#: Files of masks: of formats that keep every value.
MASK_EXTENSIONS = ('.png', '.tif', '.tiff', '.bmp')

#: An image, uint8 [C, H, W], and its classes, int64 [H, W], to what a data set gives.
Transform = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


class MaskFormat(NamedTuple):
    """What the values of masks mean: names of the classes, the value of pixels without a class, and whether classes are
    numbered from 1 and 0 is ignored too."""
    classes: tuple[str, ...]
    ignore_index: int
    reduce_zero_label: bool

    def read(self, path: Path) -> torch.Tensor:
        """Classes of a mask's pixels, int64 [H, W], `IGNORED` where there is none. A mask that is damaged, a colour
        picture, or has values that are no classes, or no class, is a DataError."""
        try:
            image = open_image(path)
        except DAMAGE as error:
            raise DataError(f'the mask {path} cannot be read: {one_line(error)}') from error
        bands = len(image.getbands())
        if bands > 1:
            kind = 'grey with transparency' if image.mode in ('LA', 'La', 'PA') else 'a colour picture'
            raise DataError(f'the mask {path} is {kind} ({image.mode}): expected one channel that holds the index of '
                            f'each pixel\'s class, not {bands}')
        found = np.array(image)
        with np.errstate(invalid='ignore'):
            values = torch.from_numpy(found.astype(np.int64))
        if image.mode == 'F' and not (found == values.numpy()).all():
            raise DataError(f'the mask {path} holds floats that are no whole numbers, from {found.min():g} to '
                            f'{found.max():g}: expected the index of each pixel\'s class')
        ignored = values == self.ignore_index
        if self.reduce_zero_label:
            ignored |= values == 0
            values = values - 1
        count, first = len(self.classes), int(self.reduce_zero_label)
        wrong = ~ignored & ((values < 0) | (values >= count))
        if wrong.any():
            raise DataError(f'the mask {path} holds the value {int(values[wrong].max()) + first}, and with {count} '
                            f'classes values are {first} to {count - 1 + first}, or {self.ignore_index} for none')
        if ignored.all():
            raise DataError(f'the mask {path} is empty: all its pixels are ignored')
        return values.masked_fill_(ignored, IGNORED)

    def explain(self) -> str:
        """What the values of masks mean, in words."""
        first, last = int(self.reduce_zero_label), len(self.classes) - 1 + int(self.reduce_zero_label)
        ignored = f'0 and {self.ignore_index}' if self.reduce_zero_label else str(self.ignore_index)
        text = f'Masks hold {first} to {last} for the classes, and {ignored} for none.'
        if first <= self.ignore_index <= last:
            text += f' So the class {self.classes[self.ignore_index - first]!r} is ignored everywhere.'
        return text


class MaskedImages(Dataset):
    """Images, of 1 or 3 channels, and their masks, both from the files `samples`, under a transform."""

    def __init__(self, samples: list[tuple[Path, Path]], masks: MaskFormat, channels: int, transform: Transform):
        self.samples, self.masks, self.mode, self.transform = samples, masks, ToMode(channels), transform

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.transform(*self.read(index))

    def read(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """An image, uint8 [C, H, W], and its classes, int64 [H, W]. A file that is damaged, or a mask that does not fit
        its image or the classes, is a DataError."""
        path, mask_path = self.samples[index]
        try:
            image = transforms.pil_to_tensor(self.mode(open_image(path)))
        except DAMAGE as error:
            raise DataError(f'the image {path} cannot be read: {one_line(error)}') from error
        mask = self.masks.read(mask_path)
        if image.shape[1:] != mask.shape:
            sizes = ' and '.join(f'{w} x {h}' for h, w in (mask.shape, image.shape[1:]))
            turned = stored_size(path) == tuple(mask.shape[::-1])
            hint = '. The EXIF orientation of the image turns it: draw masks on the upright picture' if turned else ''
            raise DataError(f'the mask {mask_path} and its image {path} differ in size: {sizes} pixels{hint}')
        return image, mask


class SegmentationData(NamedTuple):
    """Images of a run, and names of the classes. Those to train on are crops, float32 [C, h, w] and int64 [h, w]; those
    to report on are resized, float32 [C, h, w], and their masks as they are, int64 [H, W]."""
    train: MaskedImages
    test: MaskedImages
    classes: tuple[str, ...]


def open_data(config: SegmentConfig, spec: ImageSpec, group: Processes) -> SegmentationData:
    """Open the data of a run and check it: every image has a mask of its size with no other values than classes. The
    size of `spec` is that of crops. The main process looks at the files.

    Raises:
        DataError: for a folder that is not there, files without a counterpart, and images or masks that do not do.
        ConfigError: where the number of classes is not known or not the data's.
    """
    assert config.data_dir is not None  # which the settings refuse
    root = Path(config.data_dir)
    if not root.is_dir():
        raise DataError(f'No folder {root}: --data-dir names a folder with images/SPLIT and annotations/SPLIT.')
    masks = _mask_format(config, root)
    tell = say if group.is_main else lambda text: None
    train = find_pairs(root, config.train_split, tell)
    test = find_pairs(root, config.eval_split, tell) if config.eval_split else train
    train_indices, test_indices = divide(config, len(train), len(test))
    train = [train[i] for i in some_of(train_indices, config.train_images, config.seed)]
    test = [test[i] for i in some_of(test_indices, config.test_images, config.seed)]
    data = SegmentationData(MaskedImages(train, masks, spec.channels, Augment(config, spec)),
                            MaskedImages(test, masks, spec.channels, Plain(config, spec)), masks.classes)
    group.on_main(lambda: check_masks(config, data.train, config.max_corrupt, 'train on'))
    group.on_main(lambda: check_masks(config, data.test, 0.0, 'report on'))
    return data


def check_masks(config: SegmentConfig, images: MaskedImages, max_corrupt: float, purpose: str) -> None:
    """Look at images and masks, up to `check_images` of them, and say what may be wrong with the classes. More that are
    unreadable than the part `max_corrupt`, and masks of a single class to train on, are a DataError."""
    masks, classes = images.masks, images.masks.classes
    counts: list[np.ndarray] = []  # of each mask, pixels that are ignored and those of each class

    def count_pixels(index: int) -> None:
        mask = images.read(index)[1]
        counts.append(torch.bincount(mask.flatten() - IGNORED, minlength=1 + len(classes)).numpy())

    check_images(images, config.check_images, max_corrupt, try_sample=count_pixels)
    ignored, *pixels = np.sum(counts, axis=0).tolist() if counts else [0] * (1 + len(classes))
    part = ignored / max(ignored + sum(pixels), 1)
    absent = [name for name, count in zip(classes, pixels) if not count]
    present = [name for name, count in zip(classes, pixels) if count]
    if counts and absent:
        say(f'No mask of the {len(counts)} to {purpose} that were looked at has a pixel of the class'
            f'{"es" if len(absent) > 1 else ""} {some_names(absent)}. {masks.explain()}')
    if part > 0.5:
        say(f'{part:.0%} of the pixels of the masks to {purpose} are ignored. {masks.explain()}')
    if purpose == 'train on' and len(counts) == len(images) and len(present) == 1 < len(classes):
        raise DataError(
            f'The {len(counts)} masks to train on hold the class {present[0]!r} alone, and {part:.0%} of their pixels '
            f'are ignored: nothing is to be learned from them. {masks.explain()} Where {masks.ignore_index} stands for '
            'a class, number the classes without gaps in the masks, or name another --ignore-index.')


def _mask_format(config: SegmentConfig, root: Path) -> MaskFormat:
    """From the settings and the data's info.json, with the keys classes, a list of names, and ignore_index."""
    path = root / 'info.json'
    try:
        info = json.loads(path.read_text(encoding='utf-8')) if path.is_file() else {}
        classes, ignored = _names(info.get('classes', [])), info.get('ignore_index', 255)
        if type(ignored) is not int:
            raise ValueError(f'ignore_index is {ignored!r}, no whole number')
    except (ValueError, AttributeError) as error:
        raise DataError(f'{path} is damaged: expected {{"classes": [NAME, ...], "ignore_index": 255}} '
                        f'({one_line(error)}).') from error
    if config.num_classes is None and not classes:
        raise ConfigError(f'How many classes are there? Say --num-classes, or name them in {path}: '
                          '{"classes": [NAME, ...]}.')
    if config.num_classes is not None and classes and config.num_classes != len(classes):
        raise ConfigError(f'num_classes={config.num_classes} does not fit {path}, which names {len(classes)} classes.')
    names = distinct(classes) or [str(n) for n in range(config.num_classes or 0)]
    return MaskFormat(tuple(names), ignored if config.ignore_index is None else config.ignore_index,
                      config.reduce_zero_label)


def _names(classes: Any) -> list[str]:
    """Names of classes from a list, or from a mapping of 0, 1, ... to names as transformers' id2label is."""
    if isinstance(classes, dict):
        numbers = [int(key) for key in classes]
        if sorted(numbers) != list(range(len(numbers))):
            raise ValueError('the keys of classes are not 0, 1, ... without gaps')
        classes = [name for _, name in sorted(zip(numbers, classes.values()))]
    if not isinstance(classes, list) or not all(isinstance(name, str | int) for name in classes):
        raise ValueError(f'classes is {str(classes)[:40]!r}, no list of names')
    return [str(name) for name in classes]


def find_pairs(root: Path, split: str, tell: Callable[[str], None] = say) -> list[tuple[Path, Path]]:
    """Images under images/SPLIT and the masks of the same names, but for the ending, under annotations/SPLIT. `tell`
    takes what is left out, in words.

    Raises:
        DataError: for a folder that is not there or is empty, files without a counterpart, and two of one name.
    """
    images = _files_by_name(root / 'images', split, None, tell)
    masks = _files_by_name(root / 'annotations', split, MASK_EXTENSIONS, tell)
    for some, others, text in ((images, masks, 'images without a mask'), (masks, images, 'masks without an image')):
        alone = sorted(some.keys() - others.keys())
        if alone:
            names = some_names([str(some[name]) for name in alone], 3)
            raise DataError(f'{len(alone)} {text} of the same name in the split {split!r}: {names}.')
    return [(images[name], masks[name]) for name in sorted(images)]


def _files_by_name(
        parent: Path, split: str, extensions: tuple[str, ...] | None, tell: Callable[[str], None],
) -> dict[str, Path]:
    """Files of a split by their names without the ending, from the folder of all splits."""
    splits = list_folder(parent).folders if parent.is_dir() else []
    name = find_split(parent, splits, split)
    if name is None:
        remedy = f'--data-dir {parent.parent} should hold images/SPLIT and annotations/SPLIT.'
        if splits:
            remedy = f'{parent} has the splits {", ".join(splits)}; name one with --train-split or --eval-split.'
        raise DataError(f'No folder {parent / split}: {remedy}')
    folder, left_out = parent / name, LeftOut()
    found: dict[str, Path] = {}
    for path in sorted(map(Path, walk(folder, extensions, left_out))):
        key = path.relative_to(folder).with_suffix('').as_posix()
        if key in found:
            raise DataError(f'{found[key]} and {path} have one name but for the ending, so that it is open which '
                            'belongs to which image or mask: rename or remove one.')
        found[key] = path
    if not found:
        raise no_files(parent.name, folder, ', '.join(extensions or ('.jpg', '.png', '.tif or what else Pillow reads')),
                       left_out)
    if text := left_out.describe(folder):
        tell(text)
    return found


def resize(image: torch.Tensor, short_side: int | None, factor: float = 1.0) -> torch.Tensor:
    """Bring the shorter side of an image, uint8 [C, H, W], to `short_side`, as long as the longer one is at most four
    times it (2048 x 512 in BEiT's setting), and then by a factor."""
    sides = image.shape[1:]
    if short_side is not None:
        factor *= min(short_side / min(sides), 4 * short_side / max(sides))
    size = [max(round(side * factor), 1) for side in sides]
    return transforms.resize(image, size, antialias=True) if size != list(sides) else image


def normalise(image: torch.Tensor, spec: ImageSpec) -> torch.Tensor:
    """A uint8 image [C, H, W] as the model takes it, float32."""
    return transforms.normalize(transforms.to_dtype(image, torch.float32, scale=True), list(spec.mean), list(spec.std))


class Plain:
    """What evaluation sees: an image resized and normalised, and its mask as it is."""

    def __init__(self, config: SegmentConfig, spec: ImageSpec):
        self.config, self.spec = config, spec

    def __call__(self, image: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return normalise(resize(image, self.config.short_side), self.spec), mask


class Augment:
    """What training sees, as in BEiT's setting: a random enlargement, a random crop in which no class fills too much,
    a flip, and a distortion of brightness, contrast, saturation and hue, each in half of the cases. What a crop has
    beyond the image, right and below, is zero after normalisation, and ignored.

    Draws come from PyTorch's CPU generator, which `SeededSamples` seeds for every sample.
    """

    def __init__(self, config: SegmentConfig, spec: ImageSpec):
        self.config, self.spec = config, spec
        self.distort = v2.Compose([v2.RandomApply([v2.ColorJitter(**{name: amount})], 0.5) for name, amount in (
            ('brightness', 0.125), ('contrast', 0.5), ('saturation', 0.5), ('hue', 0.05))])

    def __call__(self, image: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        config, (height, width) = self.config, self.spec.size
        image = resize(image, config.short_side, torch.empty(()).uniform_(*config.scale).item())
        mask = interpolate(mask[None, None].float(), size=image.shape[1:], mode='nearest-exact')[0, 0].long()
        top, left = self._corner_of_crop(mask)
        image, mask = image[:, top:top + height, left:left + width], mask[top:top + height, left:left + width]
        if torch.rand(()) < config.hflip:
            image, mask = image.flip(-1), mask.flip(-1)
        if config.photometric:
            image = self.distort(image)
        beyond = (0, width - mask.shape[1], 0, height - mask.shape[0])
        return pad(normalise(image, self.spec), beyond), pad(mask, beyond, value=IGNORED)

    def _corner_of_crop(self, mask: torch.Tensor) -> tuple[int, int]:
        """The upper left of a crop in which no class fills too much: the first of ten draws, or else the tenth."""
        height, width = self.spec.size
        top = left = 0
        for _ in range(10):
            top = int(torch.randint(max(mask.shape[0] - height, 0) + 1, ()))
            left = int(torch.randint(max(mask.shape[1] - width, 0) + 1, ()))
            crop = mask[top:top + height, left:left + width]
            counts = torch.bincount(crop[crop != IGNORED])
            if (counts > 0).sum() > 1 and counts.max() <= self.config.crop_share * counts.sum():
                break
        return top, left
