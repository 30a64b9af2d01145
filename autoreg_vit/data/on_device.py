"""Small images kept whole on the device as uint8, cropped and flipped there a batch at a time."""

import bisect
import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
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

#: Half of the bits after the point in Pillow's weights.
HALF = 11


class SeveralSizes(DataError):
    """Images that are not all of one size."""


class DeviceImages:
    """All images of a data set on the device, and training batches from them.

    Random resized crops and flips are as `transforms.training_transform` has them, but drawn from a generator on the
    device: the same boxes are as likely, and pixels are Pillow's to the bit (bicubic, with its filter) where it changes
    the width first, which it may not do of crops that are higher than the model's images.

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
        self.down, self.across = (Taps(*(t.to(device) for t in pillow_taps(length, size)))
                                  for length, size in zip(self.images.shape[2:], spec.size))
        self.mean, self.std = (torch.tensor(v, device=device).view(1, -1, 1, 1) for v in (spec.mean, spec.std))

    def __len__(self) -> int:
        return len(self.images)

    def augment(self, indices: torch.Tensor, crops: 'Crops') -> torch.Tensor:
        """Crops of the images of these numbers, int64 [B], resized to the model's size, flipped and normalised: float32
        [B, C, height, width]."""
        top, left, rows, columns = crops.boxes.unbind(1)
        images = self.images[indices].float()
        channels, height, width = images.shape[1:]
        # As Pillow resizes: along one axis and then the other, whole levels between the two.
        wide = levels(images.flatten(1, 2) @ self.across.of(left, columns, width).mT, -1)  # [B, C * H, new width]
        wide = wide.unflatten(1, (channels, height))
        small = levels(self.down.of(top, rows, height)[:, None] @ wide, -2)  # [B, C, new height, new width]
        small = torch.where(crops.flips[:, None, None, None], small.flip(-1), small)
        return (small / 255 - self.mean) / self.std


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
    columns, rows = (squared.sqrt().round().clamp(min=1) for squared in (area * shape, area / shape))
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


class Taps(NamedTuple):
    """What each of `size` new pixels is a mean of, for crops of each count of pixels: the first old pixel, int64
    [counts, size], and weights of it and of those after it, whole numbers in float32 [counts, 2, size, most old
    pixels]. A weight is its first number times 2 ** 11, and its second, of 2 ** 22: so short are both that sums of
    levels by them are exact in float32 and in TF32, for up to 32 old pixels."""
    first: torch.Tensor
    weights: torch.Tensor

    def of(self, start: torch.Tensor, count: torch.Tensor, length: int) -> torch.Tensor:
        """Weights for each of `length` old pixels, of crops of `count` pixels from `start` on, int64 [B] each: float32
        [B, 2 * size, length]."""
        weights = self.weights[count - 1]
        place = (start[:, None] + self.first[count - 1])[:, None, :, None] + torch.arange(
            weights.shape[3], device=start.device)
        # Beyond the image there is no pixel, and no weight.
        dense = weights.new_zeros(*weights.shape[:3], length + weights.shape[3])
        return dense.scatter_(3, place.expand_as(weights), weights)[..., :length].flatten(1, 2)


def pillow_taps(length: int, size: int) -> Taps:
    """Pillow's bicubic interpolation (a = -0.5), wider by as much as it shrinks, of crops of 1 to `length` pixels."""
    firsts, weights = zip(*(_taps_of(count, size) for count in range(1, length + 1)))
    whole = pad_sequence(list(weights)).permute(1, 2, 0)
    high = whole.bitwise_right_shift(HALF)
    return Taps(torch.stack(firsts), torch.stack([high, whole - (high << HALF)], 1).float())


def _taps_of(count: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Of crops of `count` pixels: first old pixels, int64 [size], and weights of 2 ** 22, int32 [most old pixels,
    size]. Each sum and product is Pillow's, in its order and precision, so that weights are rounded alike."""
    step = count / size  # old pixels of a new one
    spread = max(step, 1.0)
    centre = (torch.arange(size, dtype=torch.float64) + 0.5) * step
    first = (centre - 2 * spread + 0.5).floor().clamp(min=0)
    last = (centre + 2 * spread + 0.5).floor().clamp(max=count)  # the first without weight
    pixel = first + torch.arange(int((last - first).max()))[:, None]
    distance = ((pixel - centre + 0.5) * (1 / spread)).abs()
    near = (1.5 * distance - 2.5) * distance * distance + 1
    far = (((distance - 5) * distance + 8) * distance - 4) * -0.5
    weights = torch.where(distance < 1, near, torch.where(distance < 2, far, 0.0))
    weights = torch.where(pixel < last, weights, 0.0)
    weights = weights / sum(weights) * 4 ** HALF
    return first.long(), (weights + torch.where(weights < 0, -0.5, 0.5)).int()


def levels(sums: torch.Tensor, axis: int) -> torch.Tensor:
    """Whole levels from 0 to 255, float32, of sums by the first numbers of weights and then by the second ones, along
    an axis, which is half as long afterwards."""
    high, low = sums.chunk(2, axis)
    # Halves go up, as Pillow has it: half a level is added, and the rest cut off. round() takes them to even levels.
    whole = (low * 2 ** -HALF).floor_().add_(high).add_(2 ** (HALF - 1))  # of 2 ** 11
    return whole.mul_(2 ** -HALF).floor_().clamp_(0, 255)


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
