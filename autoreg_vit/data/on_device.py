"""Small images kept whole on the device as uint8, cropped and flipped there a batch at a time."""

import bisect
import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import IterableDataset

from ..engine.processes import Processes
from ..engine.seeding import mix_seed
from ..errors import ConfigError, DataError, one_line
from .checks import image_name, tolerate
from .images import DAMAGE, ToMode
from .order import EpochSampler, batches_per_epoch
from .samples import Samples
from .transforms import CROP_RATIO, ImageSpec

#: Images that are loaded to be kept on a device where nobody asked for it.
MOST_UNASKED = 200_000


class SeveralSizes(DataError):
    """Images that are not all of one size."""


class DeviceImages:
    """All images of a data set on the device, and training batches from them.

    Random resized crops and flips are as `transforms.training_transform` has them, but drawn from a generator on the
    device: the same boxes are as likely, and pixels are Pillow's (bicubic, with its filter) but for the last level.

    Args:
        dataset: Map-style, of PIL images that are all of one size: opened without a transform.
        max_corrupt: Part of the images that may be unreadable; the next readable image stands in for each.

    Raises:
        ConfigError: for a stream, or images that take more than half of the device's free memory.
        DataError: for images of several sizes, and for too many unreadable ones.
    """

    def __init__(
            self, dataset: Samples | IterableDataset, spec: ImageSpec, device: torch.device, max_corrupt: float = 0.001,
    ):
        if isinstance(dataset, IterableDataset):
            raise ConfigError('cache_on_device needs a data set that fits on the device, not a stream: leave '
                              '--cache-on-device out.')
        self.spec, self.device = spec, device
        to_mode = ToMode(spec.channels)
        images: np.ndarray | None = None
        readable: list[int] = []
        damages: list[str] = []
        for index in range(len(dataset)):
            try:
                image = to_mode(dataset[index][0])
            except DAMAGE as error:
                damages.append(f'{image_name(dataset, index)} ({one_line(error)})')
                continue
            readable.append(index)
            if images is None:
                size, shape = image.size, (len(dataset), image.height, image.width, spec.channels)
                _check_memory(math.prod(shape), device)
                images = np.empty(shape, dtype=np.uint8)
            if image.size != size:
                raise SeveralSizes(f'cache_on_device needs images of one size: image {index} has {image.size[0]} x '
                                   f'{image.size[1]} pixels, the first {size[0]} x {size[1]}. Leave '
                                   '--cache-on-device out, or resize them beforehand.')
            images[index] = np.asarray(image).reshape(images.shape[1:])
        if damages:
            tolerate(damages, len(dataset), max_corrupt if readable else 0)
        if images is None:
            raise DataError('cache_on_device: the data set has no images.')
        for index in set(range(len(dataset))) - set(readable):
            images[index] = images[readable[bisect.bisect(readable, index) % len(readable)]]
        self.images = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous().to(device)  # uint8 [N, C, H, W]
        self.mean, self.std = (torch.tensor(v, device=device).view(1, -1, 1, 1) for v in (spec.mean, spec.std))

    def __len__(self) -> int:
        return len(self.images)

    def augment(self, indices: torch.Tensor, crops: 'Crops') -> torch.Tensor:
        """Crops of the images of these numbers, int64 [B], resized to the model's size, flipped and normalised: float32
        [B, C, height, width]."""
        images, (height, width) = self.images[indices].float(), self.spec.size
        top, left, rows, columns = crops.boxes.unbind(1)
        # As Pillow resizes: along one axis and then the other, whole levels between the two.
        wide = images @ resampling(left, columns, images.shape[3], width).mT[:, None]  # [B, C, H, width]
        wide = wide.round().clamp(0, 255)
        small = resampling(top, rows, images.shape[2], height)[:, None] @ wide  # [B, C, height, width]
        small = torch.where(crops.flips[:, None, None, None], small.flip(-1), small)
        return (small.round().clamp(0, 255) / 255 - self.mean) / self.std


def suits_device(dataset: Samples | IterableDataset, spec: ImageSpec, device: torch.device) -> bool:
    """Whether images look small and few enough to be kept on a GPU unasked, by the first that can be read: of at most
    twice the model's pixels, in a quarter of the free memory, and no more than are loaded in some minutes. They are PIL
    images, opened without a transform."""
    if isinstance(dataset, IterableDataset) or len(dataset) > MOST_UNASKED:
        return False
    for index in range(min(len(dataset), 16)):
        try:
            pixels = math.prod(dataset[index][0].size)
        except DAMAGE:
            continue
        size = len(dataset) * pixels * spec.channels
        return pixels <= 2 * math.prod(spec.size) and size <= torch.cuda.mem_get_info(device)[0] / 4
    return False


class Crops(NamedTuple):
    """Random resized crops, int64 [B, 4] in pixels: top, left, height, width; and flips, bool [B]."""
    boxes: torch.Tensor
    flips: torch.Tensor


def draw_crops(
        batch: int, size: tuple[int, int], scale: tuple[float, float], hflip: float, generator: torch.Generator,
) -> Crops:
    """Random resized crops as torchvision and timm draw them: of ten draws of area and ratio the first that fits, in
    whole pixels, at a place that is as likely as any; the middle of the image where none fits.

    Args:
        size: Height and width of the images in pixels.
        scale: Least and greatest area of a crop, of the image's.
        hflip: Probability of a flip.
        generator: Draws come from it, on its device.
    """
    (height, width), ratio = size, CROP_RATIO
    draws = torch.rand(41, batch, generator=generator, device=generator.device)
    area, shape, down, right = draws[:40].view(4, 10, batch)
    area = (scale[0] + area * (scale[1] - scale[0])) * height * width
    shape = (math.log(ratio[0]) + shape * math.log(ratio[1] / ratio[0])).exp()
    columns, rows = (area * shape).sqrt().round(), (area / shape).sqrt().round()
    fits = (columns <= width) & (rows <= height)
    boxes = torch.stack([(down * (height - rows + 1)).floor(), (right * (width - columns + 1)).floor(), rows, columns])
    first = fits.float().argmax(0)  # [batch], 0 where none fits
    chosen = boxes.gather(1, first.expand(4, 1, batch))[:, 0]
    columns_left = min(width, round(height * ratio[1]))
    rows_left = min(height, round(width / ratio[0]))
    middle = (height - rows_left) // 2, (width - columns_left) // 2, rows_left, columns_left
    found = fits.any(0)
    chosen = torch.stack([torch.where(found, values, number) for values, number in zip(chosen, middle)], dim=1)
    return Crops(chosen.long(), draws[40] < hflip)


def resampling(start: torch.Tensor, count: torch.Tensor, length: int, size: int) -> torch.Tensor:
    """The weights by which each of `size` new pixels is a mean of `length` old ones: bicubic (a = -0.5), and wider by
    as much as it shrinks them, as Pillow resizes; float32 [B, size, length], rows sum to 1. A crop has `count` pixels
    from `start` on, int64 [B] each, and pixels outside of it have no weight."""
    step = (count / size)[:, None, None]  # old pixels of a new one
    centre = (torch.arange(size, device=start.device)[None, :, None] + 0.5) * step
    pixel = torch.arange(length, device=start.device) - start[:, None, None]
    distance = ((pixel + 0.5 - centre) / step.clamp(min=1)).abs()
    near = (1.5 * distance - 2.5) * distance.square() + 1
    far = ((-0.5 * distance + 2.5) * distance - 4) * distance + 2
    weights = torch.where(distance < 1, near, torch.where(distance < 2, far, 0.0))
    weights = torch.where((pixel >= 0) & (pixel < count[:, None, None]), weights, 0.0)
    return weights / weights.sum(2, keepdim=True)


class DeviceBatches:
    """Training batches of this process from images on the device; stands in for `Batches`.

    Crops are drawn for the whole step from a generator on the device, seeded by (seed, step), so that neither
    processes nor accumulation change them.

    Args:
        batch_size: Images a forward pass, over all processes together.
        accumulate: Forward passes a step.
        crop_scale: Least and greatest area of a crop, of the image's.
        hflip: Probability of a flip.
    """
    on_device = True

    def __init__(
            self, images: DeviceImages, batch_size: int, accumulate: int, seed: int, group: Processes,
            crop_scale: tuple[float, float], hflip: float,
    ):
        self.per_epoch = batches_per_epoch(len(images), batch_size, accumulate, group)
        self.images, self.accumulate, self.seed, self.group = images, accumulate, seed, group
        self.crop_scale, self.hflip = crop_scale, hflip
        self.sampler = EpochSampler(len(images), batch_size, seed, group, self.per_epoch)
        self.describe = self.sampler.describe

    def start_at(self, batch: int) -> Iterator[tuple[torch.Tensor]]:
        """Batches from number `batch` of the whole run on, which must begin a step: (images,) on the device."""
        generator = torch.Generator(self.images.device)
        size, share = self.sampler.batch_size, self.group.share(self.sampler.batch_size)
        count, steps = size * self.accumulate, self.per_epoch // self.accumulate  # images of a step, steps of an epoch
        height, width = self.images.images.shape[2:]
        epoch, first = divmod(batch // self.accumulate, steps)
        while True:
            order = self.sampler.order(epoch).to(self.images.device)
            for step in range(first, steps):
                generator.manual_seed(mix_seed(self.seed, 'crops', epoch * steps + step))
                crops = draw_crops(count, (height, width), self.crop_scale, self.hflip, generator)
                indices = order[step * count:(step + 1) * count]
                for part, boxes, flips in zip(*(of_step.split(size) for of_step in (indices, *crops))):
                    yield (self.images.augment(part[share], Crops(boxes[share], flips[share])),)
            epoch, first = epoch + 1, 0


def _check_memory(size: int, device: torch.device) -> None:
    free = torch.cuda.mem_get_info(device)[0] if device.type == 'cuda' else math.inf
    if size > free / 2:
        raise ConfigError(f'cache_on_device: the images take {size / 2 ** 30:.1f} GiB of the {free / 2 ** 30:.1f} GiB '
                          'free on the device, more than half. Leave --cache-on-device out.')
