"""Images with boxes and masks in COCO's format, checked before anything is trained on them."""

import functools
import json
import math
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn, TypeGuard

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset
from torchvision.ops import masks_to_boxes
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as transforms

from ..engine.processes import Processes
from ..engine.progress import say
from ..errors import DataError, one_line
from ..settings.dense import DetectConfig
from .checks import check_images, some_names
from .images import DAMAGE, ToMode, damaged, open_image, prepared, stored_size
from .labelled import divide, some_of

Target = dict[str, torch.Tensor]


class CocoImages(Dataset):
    """Images and the objects annotated on them.

    An item is an image, uint8 [C, H, W], and its target:

    - image_id: int64 [], the position of the image in `ids`;
    - boxes: float64 [n, 4], left, top, right, bottom in pixels, as annotated;
    - labels: int64 [n], from 1 on, in the order of `categories`; 0 is torchvision's background;
    - masks: uint8 [n, H, W], 1 inside;
    - iscrowd: int64 [n], 1 for a region with many objects that are not told apart;
    - area: float64 [n], pixels of the mask as annotated, 0 where the file does not say.

    Args:
        folder: Of the images.
        file: JSON of COCO's instances: images, annotations, categories.
        channels: 1 (grey) or 3 (RGB).

    Attributes:
        samples: Paths of the images.
        ids: Their ids in the file.
        has_objects: Whether an image has any object that is no crowd, bool [images].
        categories: Names of the classes by their ids in the file, in the order of the ids, which may have gaps.

    Raises:
        DataError: for a file or an annotation that is damaged or refers to nothing, and for missing images.
    """

    def __init__(self, folder: Path, file: Path, channels: int = 3):
        content = read_instances(file)
        self.mode, self.categories = ToMode(channels), categories_of(content, file)
        labels = {identity: label for label, identity in enumerate(self.categories, start=1)}
        images = images_of(content, file)
        objects: dict[int | str, list[dict]] = {identity: [] for identity in images}
        for annotation in content['annotations']:
            check_annotation(annotation, images, labels, file)
            objects[annotation['image_id']].append(annotation)
        self.ids = list(images)
        self.samples = [Path(folder, image['file_name']) for image in images.values()]
        missing = [str(path) for path in self.samples if not path.is_file()]
        if missing:
            raise DataError(f'{len(missing)} of the {len(images)} images that {file} lists are missing: '
                            f'{some_names(missing, 3)}. Name the folder that holds them, or take them out of the file.')
        self.has_objects = np.array([any(not a.get('iscrowd') for a in found) for found in objects.values()])
        self.records = Records(_record(image, objects[identity], labels) for identity, image in images.items())

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, Target]:
        image, record = self.open(index), self.records[index]
        masks = [decode_mask(segmentation, *record['size']) for segmentation in record['segmentations']]
        target = {name: torch.from_numpy(record[name]) for name in ('boxes', 'labels', 'iscrowd', 'area')}
        target['masks'] = torch.from_numpy(np.stack(masks) if masks else np.zeros((0, *record['size']), np.uint8))
        target['image_id'] = torch.tensor(index)
        return transforms.pil_to_tensor(self.mode(image)), target

    def open(self, index: int) -> Image.Image:
        """An image, upright and in 8 bits a channel; one that cannot be read, or has another size than annotated, is a
        DataError."""
        path, (height, width) = self.samples[index], self.records[index]['size']
        try:
            image = prepared(open_image(path))
        except DAMAGE as error:
            raise damaged(path, error) from error
        if image.size != (width, height):
            reason = 'the image or the file of annotations is another one.'
            if stored_size(path) == (width, height):
                reason = 'its EXIF orientation turns it, and annotations should be of the upright picture.'
            raise DataError(f'{path} has {image.width} x {image.height} pixels, and its annotations are for {width} x '
                            f'{height}: {reason}')
        return image


class Part(Dataset):
    """Some images of a set, under a transform of image and target where there is one."""

    def __init__(self, dataset: CocoImages, indices: np.ndarray, transform: Callable[..., Any] | None = None):
        self.dataset, self.indices, self.transform = dataset, indices, transform
        self.samples = [dataset.samples[index] for index in indices]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> Any:
        image, target = self.read(position)
        return (image, target) if self.transform is None else self.transform(image, target)

    def read(self, position: int) -> tuple[torch.Tensor, Target]:
        """An item as `CocoImages` gives it."""
        return self.dataset[int(self.indices[position])]

    def open(self, position: int) -> Image.Image:
        """The image alone, as `CocoImages.open` does."""
        return self.dataset.open(int(self.indices[position]))


class LargeScaleJitter:
    """Resize an image at random, crop it to the canvas at random, and flip it (Ghiasi et al. 2021, "Simple Copy-Paste",
    as Li et al. 2021 train). Crowds are left out, and so are objects of which no pixel is left; boxes are those of what
    is left of the masks.

    Draws from PyTorch's CPU generator. The model pads what is smaller than the canvas.

    Args:
        size: Height and width of the canvas in pixels.
        scale: Least and greatest size of the image in canvases; 1 fits the whole image in.
        hflip: Probability of a horizontal flip.
    """

    def __init__(self, size: tuple[int, int], scale: tuple[float, float], hflip: float):
        self.size, self.scale, self.hflip = size, scale, hflip

    def __call__(self, image: torch.Tensor, target: Target) -> tuple[torch.Tensor, Target]:
        size = image.shape[-2:]
        draw = torch.rand(4).tolist()
        scale = min(most / s for most, s in zip(self.size, size))
        scale *= self.scale[0] + draw[0] * (self.scale[1] - self.scale[0])
        # Cropped first, in whole pixels of the source, so that no large image or mask is made only to be cut.
        crop = [min(s, max(round(most / scale), 1)) for s, most in zip(size, self.size)]
        top, left = (round(d * (s - c)) for d, s, c in zip(draw[1:3], size, crop))
        new = [min(max(round(c * scale), 1), most) for c, most in zip(crop, self.size)]
        objects = target['iscrowd'] == 0
        image = transforms.resized_crop(image, top, left, *crop, new, InterpolationMode.BILINEAR, antialias=True)
        masks = transforms.resized_crop(
            target['masks'][objects], top, left, *crop, new, InterpolationMode.NEAREST_EXACT)
        if draw[3] < self.hflip:
            image, masks = image.flip(-1), masks.flip(-1)
        left_over = masks.flatten(1).any(1).bool()  # of uint8, any gives uint8
        masks = masks[left_over]
        # masks_to_boxes gives the last pixels at right and bottom, not their far edges.
        boxes = masks_to_boxes(masks) + torch.tensor([0, 0, 1, 1])
        return image, {'boxes': boxes.float(), 'labels': target['labels'][objects][left_over], 'masks': masks}


def collate(samples: list[tuple[torch.Tensor, Target]]) -> tuple[list[torch.Tensor], list[Target]]:
    """Images and targets as lists, since sizes and numbers of objects differ."""
    images, targets = zip(*samples)
    return list(images), list(targets)


def open_data(config: DetectConfig, channels: int, group: Processes) -> tuple[Part, Part]:
    """Images to train on, jittered, and images to report on, of which none is left out. Of the training split those
    without an object are, as is usual on COCO: where all is background, the heads learn nothing.

    Raises:
        DataError: for data that is not there, is damaged, or has no objects, and for splits with other categories.
    """
    assert config.data_dir is not None  # which the settings refuse
    root = Path(config.data_dir)

    def open_split(split: str, file: str | None) -> CocoImages:
        folder = root / split
        if not folder.is_dir():
            raise DataError(f'No folder {folder}: --data-dir names a folder in COCO\'s layout, with the images of each '
                            'split in a folder, and --train-split and --eval-split name the splits.')
        return CocoImages(folder, Path(file or root / 'annotations' / f'instances_{split}.json'), channels)

    train_set = test_set = open_split(config.train_split, config.train_annotations)
    if config.eval_split:
        test_set = open_split(config.eval_split, config.eval_annotations)
        if test_set.categories != train_set.categories:
            odd = sorted(map(str, set(train_set.categories.items()) ^ set(test_set.categories.items())))
            raise DataError(f'The annotations of the splits {config.train_split!r} and {config.eval_split!r} have '
                            f'other categories: {", ".join(odd[:4])} {"is" if len(odd) == 1 else "are"} in one alone.')
    train_indices, test_indices = divide(config, len(train_set), len(test_set))
    train_indices = train_indices[train_set.has_objects[train_indices]]
    if not len(train_indices):
        raise DataError(f'No image of the split {config.train_split!r} has an object to train on: expected annotations '
                        'with iscrowd 0.')
    train_indices = some_of(train_indices, config.train_images, config.seed)
    test_indices = some_of(test_indices, config.test_images, config.seed)
    if group.is_main and not test_set.has_objects[test_indices].any():
        say(f'Of {len(test_indices)} images to report on none has an object: there will be no average precision.')
    jitter = LargeScaleJitter(config.canvas, config.jitter, config.hflip)
    train_part, test_part = Part(train_set, train_indices, jitter), Part(test_set, test_indices)
    for part, most in ((train_part, config.max_corrupt), (test_part, 0.0)):
        group.on_main(functools.partial(check_images, part, config.check_images, most, try_sample=part.open))
    return train_part, test_part


class Records:
    """Read-only records in one array of bytes: loader processes would each come to hold a copy of Python objects, whose
    reference counts change as they are looked at, and COCO has 860,000 annotations."""

    def __init__(self, records: Iterator[Any]):
        parts = [np.frombuffer(pickle.dumps(record, protocol=5), dtype=np.uint8) for record in records]
        self.ends = np.cumsum([0, *map(len, parts)])
        self.bytes = np.concatenate(parts) if parts else np.zeros(0, np.uint8)

    def __getitem__(self, index: int) -> Any:
        return pickle.loads(self.bytes[self.ends[index]:self.ends[index + 1]].data)


def decode_mask(segmentation: list | dict, height: int, width: int) -> np.ndarray:
    """The mask of an annotation, polygons or run lengths (compressed or not), uint8 [height, width]."""
    from faster_coco_eval.core import mask as coco_mask

    if isinstance(segmentation, list):
        segmentation = coco_mask.merge(coco_mask.frPyObjects(segmentation, height, width))
    elif isinstance(segmentation['counts'], list):
        segmentation = coco_mask.frPyObjects(segmentation, height, width)
    return coco_mask.decode(segmentation)


def read_instances(file: Path) -> dict[str, list[dict]]:
    """The content of a JSON file of COCO's instances, of which only the outermost structure is checked."""
    try:
        content = json.loads(Path(file).read_text(encoding='utf-8'))
    except FileNotFoundError as error:
        raise DataError(f'No annotations {file}: expected a JSON file in COCO\'s format.') from error
    except (OSError, ValueError) as error:
        raise DataError(f'{file} is no JSON file, or damaged ({one_line(error)}).') from error
    for part in ('images', 'annotations', 'categories'):
        if not isinstance(content, dict) or not isinstance(content.get(part), list) \
                or not all(isinstance(entry, dict) for entry in content[part]):
            raise DataError(f'{file} is not in COCO\'s format for instances: expected a list "{part}" of objects.')
    return content


def categories_of(content: dict[str, list[dict]], file: Path) -> dict[int, str]:
    """Names of the categories by their ids, in the order of the ids."""
    names = {}
    for category in content['categories']:
        identity = category.get('id')
        if type(identity) is not int or not isinstance(category.get('name'), str) or identity in names:
            raise DataError(f'The category {category} of {file} needs a name and a whole number of its own as id.')
        names[identity] = category['name']
    if not names:
        raise DataError(f'{file} has no categories.')
    return dict(sorted(names.items()))


def images_of(content: dict[str, list[dict]], file: Path) -> dict[int | str, dict]:
    """Images by their ids."""
    images = {}
    for image in content['images']:
        identity, sizes = image.get('id'), (image.get('height'), image.get('width'))
        if not isinstance(identity, (int, str)) or identity in images:
            raise DataError(f'The image {identity!r} of {file} has no id, or the same as another one.')
        if not isinstance(image.get('file_name'), str) or not all(type(s) is int and s > 0 for s in sizes):
            raise DataError(f'The image {identity!r} of {file} needs file_name, height and width, in whole pixels.')
        images[identity] = image
    if not images:
        raise DataError(f'{file} lists no images.')
    return images


def check_annotation(annotation: dict, images: dict[int | str, dict], labels: dict[int, int], file: Path) -> None:
    """Raise DataError, naming file and annotation, for one that refers to nothing or whose box or mask is none."""
    def refuse(problem: str) -> NoReturn:
        raise DataError(f'Annotation {annotation.get("id")!r} of {file} {problem}.')

    identity, category = annotation.get('image_id'), annotation.get('category_id')
    image = images.get(identity) if isinstance(identity, (int, str)) else None
    if image is None:
        refuse(f'is for the image {identity!r}, which the file does not list')
    if type(category) is not int or category not in labels:
        refuse(f'is of the category {category!r}, which the file does not list')
    box = annotation.get('bbox')
    if not _are_numbers(box) or len(box) != 4 or min(box[2:]) < 0:
        refuse(f'has the box {box}: expected left, top, width and height in pixels')
    if not _are_numbers([annotation.get('area', 0)]) or annotation.get('area', 0) < 0:
        refuse(f'has the area {annotation["area"]!r}: expected pixels')
    if annotation.get('iscrowd', 0) not in (0, 1):
        refuse(f'has iscrowd {annotation["iscrowd"]!r}: expected 0 or 1')
    segmentation = annotation.get('segmentation')
    size = image['height'], image['width']
    if isinstance(segmentation, list):
        # Far outside, drawing a polygon takes time and memory without limit.
        if not segmentation or not all(
                _are_numbers(polygon) and len(polygon) >= 6 and len(polygon) % 2 == 0
                and max(map(abs, polygon)) <= 10 * max(size) for polygon in segmentation):
            refuse('has a polygon that is none: expected x1, y1, x2, y2, x3, y3, ... in pixels of the image')
    elif isinstance(segmentation, dict) and {'size', 'counts'} <= segmentation.keys():
        if segmentation['size'] != list(size):
            refuse(f'has a mask of {segmentation["size"]} pixels, and its image has {list(size)}')
        try:
            decode_mask(segmentation, *size)
        except (ValueError, RuntimeError, TypeError) as error:
            refuse(f'has a mask that cannot be read ({one_line(error)})')
    else:
        refuse('has no mask: expected "segmentation", polygons or run lengths')


def _are_numbers(values: Any) -> TypeGuard[list[float]]:
    return isinstance(values, list) and all(type(v) in (int, float) and math.isfinite(v) for v in values)


def _record(image: dict, annotations: list[dict], labels: dict[int, int]) -> dict[str, Any]:
    boxes = np.array([annotation['bbox'] for annotation in annotations], np.float64).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    return {
        'size': (image['height'], image['width']),
        'boxes': boxes,
        'labels': np.array([labels[annotation['category_id']] for annotation in annotations], np.int64),
        'iscrowd': np.array([annotation.get('iscrowd', 0) for annotation in annotations], np.int64),
        'area': np.array([annotation.get('area', 0) for annotation in annotations], np.float64),
        'segmentations': [annotation['segmentation'] for annotation in annotations],
    }
