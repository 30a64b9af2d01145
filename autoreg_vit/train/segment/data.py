"""Images with masks of classes, checked before anything is trained on them."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import interpolate, pad
from torch.utils.data import Dataset
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as transforms

from ...errors import ConfigError, DataError
from ...models.segmenter import IGNORED
from ..data import DAMAGE, ImageSpec, ToMode, check_images, open_image
from ..distributed import Processes
from ..labelled import hold_out, some_of
from .config import SegmentConfig

#: Files of masks: of formats that keep every value.
MASK_EXTENSIONS = ('.png', '.tif', '.tiff', '.bmp')

#: An image, uint8 [C, H, W], and its classes, int64 [H, W], to what a data set gives.
Transform = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class MaskFormat:
    """What the values of masks mean.

    Args:
        classes: Their names.
        ignore_index: Value of pixels without a class.
        reduce_zero_label: Classes are numbered from 1, and 0 is ignored too.
    """
    classes: tuple[str, ...]
    ignore_index: int
    reduce_zero_label: bool

    def read(self, path: Path) -> torch.Tensor:
        """Classes of a mask's pixels, int64 [H, W], `IGNORED` where there is none.

        Raises:
            DataError: for a mask that is damaged, a colour picture, or has values that are no classes, or no class at
                all.
        """
        try:
            image = open_image(path)
        except DAMAGE as error:
            raise DataError(f'the mask {path} cannot be read: {" ".join(str(error).split())}') from error
        if image.mode not in ('L', 'P', 'I', 'I;16', '1'):
            raise DataError(f'the mask {path} is a colour picture ({image.mode}): expected one channel that holds the '
                            'index of each pixel\'s class')
        values = torch.from_numpy(np.array(image).astype(np.int64))
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


class MaskedImages(Dataset):
    """Images and their masks, under a transform.

    Args:
        samples: Files of images and of their masks.
        masks: What their values mean.
        channels: Of images, 1 or 3.
        transform: Makes of each what the data set gives.
    """

    def __init__(self, samples: list[tuple[Path, Path]], masks: MaskFormat, channels: int, transform: Transform):
        self.samples, self.masks, self.transform = samples, masks, transform
        self.mode = ToMode(channels)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.transform(*self.read(index))

    def read(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """An image, uint8 [C, H, W], and its classes, int64 [H, W].

        Raises:
            DataError: for a file that is damaged, or a mask that does not fit its image or the classes.
        """
        path, mask_path = self.samples[index]
        try:
            image = transforms.pil_to_tensor(self.mode(open_image(path)))
        except DAMAGE as error:
            raise DataError(f'the image {path} cannot be read: {" ".join(str(error).split())}') from error
        mask = self.masks.read(mask_path)
        if image.shape[1:] != mask.shape:
            sizes = ' and '.join(f'{w} x {h}' for h, w in (mask.shape, image.shape[1:]))
            raise DataError(f'the mask {mask_path} and its image {path} differ in size: {sizes} pixels')
        return image, mask


@dataclass(frozen=True)
class SegmentationData:
    """Images of a run.

    Attributes:
        train: Training images, augmented: float32 [C, h, w] and int64 [h, w] of a crop.
        test: Images to report on: float32 [C, h, w] resized, and int64 [H, W] as they are.
        classes: Names of the classes.
    """
    train: MaskedImages
    test: MaskedImages
    classes: tuple[str, ...]


def open_data(config: SegmentConfig, spec: ImageSpec, group: Processes) -> SegmentationData:
    """Open the data of a run and check it: every image has a mask of its size with no other values than classes.

    Args:
        config: Settings.
        spec: What images the model takes; its size is that of crops.
        group: The processes, of which the main one looks at the files.

    Raises:
        DataError: for a folder that is not there, files without a counterpart, and images or masks that do not do.
        ConfigError: where the number of classes is not known or not the data's.
    """
    root = Path(config.data_dir).expanduser()
    if not root.is_dir():
        raise DataError(f'No folder {root}: --data-dir names a folder with images/SPLIT and annotations/SPLIT.')
    masks = _mask_format(config, root)
    train = find_pairs(root, config.train_split)
    if config.eval_split:
        test = find_pairs(root, config.eval_split)
    else:
        kept, held = hold_out(len(train), 0.2, config.seed)
        train, test = [train[i] for i in kept], [train[i] for i in held]
    train, test = ([pairs[i] for i in some_of(np.arange(len(pairs)), most, config.seed)]
                   for pairs, most in ((train, config.train_images), (test, config.test_images)))
    data = SegmentationData(MaskedImages(train, masks, spec.channels, Augment(config, spec)),
                            MaskedImages(test, masks, spec.channels, Plain(config, spec)), masks.classes)
    for images, max_corrupt in ((data.train, config.max_corrupt), (data.test, 0.0)):
        group.on_main(lambda images=images, most=max_corrupt: check_images(
            images, config.check_images, most, try_sample=images.read))
    return data


def _mask_format(config: SegmentConfig, root: Path) -> MaskFormat:
    """From the settings and the data's info.json, with the keys classes, a list of names, and ignore_index."""
    path, info = root / 'info.json', {}
    if path.is_file():
        try:
            info = json.loads(path.read_text(encoding='utf-8'))
            classes, ignored = [str(name) for name in info.get('classes', ())], int(info.get('ignore_index', 255))
        except (ValueError, TypeError, AttributeError) as error:
            raise DataError(f'{path} is damaged: expected {{"classes": [NAME, ...], "ignore_index": 255}} '
                            f'({" ".join(str(error).split())}).') from error
    else:
        classes, ignored = [], 255
    if config.num_classes is None and not classes:
        raise ConfigError(f'How many classes are there? Say --num-classes, or name them in {path}: '
                          '{"classes": [NAME, ...]}.')
    if config.num_classes is not None and classes and config.num_classes != len(classes):
        raise ConfigError(f'num_classes={config.num_classes} does not fit {path}, which names {len(classes)} classes.')
    names = classes or [str(n) for n in range(config.num_classes)]
    return MaskFormat(tuple(names), ignored if config.ignore_index is None else config.ignore_index,
                      config.reduce_zero_label)


def find_pairs(root: Path, split: str) -> list[tuple[Path, Path]]:
    """Images under images/SPLIT and the masks of the same names, but for the ending, under annotations/SPLIT.

    Raises:
        DataError: for a folder that is not there or is empty, and for files without a counterpart, naming them.
    """
    found = []
    for kind, extensions in (('images', IMG_EXTENSIONS), ('annotations', MASK_EXTENSIONS)):
        folder = root / kind / split
        if not folder.is_dir():
            there = sorted(p.name for p in (root / kind).iterdir() if p.is_dir()) if (root / kind).is_dir() else []
            raise DataError(f'No folder {folder}: ' + (
                f'{root / kind} has the splits {", ".join(there)}; name one with --train-split or --eval-split.'
                if there else f'--data-dir {root} should hold images/SPLIT and annotations/SPLIT.'))
        files = [p for p in sorted(folder.rglob('*')) if p.suffix.lower() in extensions and p.is_file()]
        if not files:
            raise DataError(f'No {kind} in {folder}: expected files ending in {", ".join(extensions)}.')
        found.append({p.relative_to(folder).with_suffix('').as_posix(): p for p in files})
    images, masks = found
    for some, others, text in ((images, masks, 'images without a mask'), (masks, images, 'masks without an image')):
        alone = sorted(some.keys() - others.keys())
        if alone:
            names = ', '.join(str(some[name]) for name in alone[:3])
            raise DataError(f'{len(alone)} {text} of the same name in the split {split!r}: {names}'
                            f'{", ..." if len(alone) > 3 else ""}.')
    return [(images[name], masks[name]) for name in sorted(images)]


class Resize:
    """Bring an image's shorter side to `short_side`, as long as the longer one is at most four times it (2048 x 512 in
    BEiT's setting), and then by a factor."""

    def __init__(self, short_side: int | None):
        self.short_side = short_side

    def __call__(self, image: torch.Tensor, factor: float = 1.0) -> torch.Tensor:
        """An image [C, H, W], uint8, in its new size."""
        sides = image.shape[1:]
        if self.short_side is not None:
            factor *= min(self.short_side / min(sides), 4 * self.short_side / max(sides))
        size = [max(round(side * factor), 1) for side in sides]
        return transforms.resize(image, size, antialias=True) if size != list(sides) else image


def normalise(image: torch.Tensor, spec: ImageSpec) -> torch.Tensor:
    """A uint8 image [C, H, W] as the model takes it, float32."""
    return transforms.normalize(transforms.to_dtype(image, torch.float32, scale=True), list(spec.mean), list(spec.std))


class Plain:
    """What evaluation sees: an image resized and normalised, and its mask as it is."""

    def __init__(self, config: SegmentConfig, spec: ImageSpec):
        self.resize, self.spec = Resize(config.short_side), spec

    def __call__(self, image: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return normalise(self.resize(image), self.spec), mask


class Augment:
    """What training sees, as in BEiT's setting: a random enlargement, a random crop in which no class fills too much,
    a flip, and a distortion of brightness, contrast, saturation and hue, each in half of the cases. What a crop has
    beyond the image, right and below, is zero after normalisation, and ignored.

    Draws come from PyTorch's CPU generator, which `SeededSamples` seeds for every sample.
    """

    def __init__(self, config: SegmentConfig, spec: ImageSpec):
        self.config, self.spec, self.resize = config, spec, Resize(config.short_side)
        self.distort = v2.Compose([v2.RandomApply([v2.ColorJitter(**{name: amount})], 0.5) for name, amount in (
            ('brightness', 0.125), ('contrast', 0.5), ('saturation', 0.5), ('hue', 0.05))])

    def __call__(self, image: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        config, (height, width) = self.config, self.spec.size
        image = self.resize(image, torch.empty(()).uniform_(*config.scale).item())
        mask = interpolate(mask[None, None].float(), size=image.shape[1:], mode='nearest-exact')[0, 0].long()
        for _ in range(10):
            top, left = (int(torch.randint(max(have - want, 0) + 1, ()))
                         for have, want in zip(mask.shape, (height, width)))
            crop = mask[top:top + height, left:left + width]
            counts = torch.bincount(crop[crop != IGNORED])
            if (counts > 0).sum() > 1 and counts.max() <= config.crop_share * counts.sum():
                break
        image, mask = image[:, top:top + height, left:left + width], crop
        if torch.rand(()) < config.hflip:
            image, mask = image.flip(-1), mask.flip(-1)
        if config.photometric:
            image = self.distort(image)
        beyond = (0, width - mask.shape[1], 0, height - mask.shape[0])
        return pad(normalise(image, self.spec), beyond), pad(mask, beyond, value=IGNORED)
