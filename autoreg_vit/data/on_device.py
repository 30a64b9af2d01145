"""Small images kept whole on the device as uint8, cropped and flipped there a batch at a time."""

import bisect
import math
from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import IterableDataset

from ..engine.processes import Processes
from ..engine.progress import say
from ..engine.seeding import mix_seed
from ..errors import ConfigError, DataError
from .checks import image_name, refuse_corrupt, some_names
from .images import DAMAGE, ToMode
from .order import EpochSampler
from .samples import Samples
from .transforms import ImageSpec


class DeviceImages:
    """All images of a data set on the device, and training batches from them.

    Random resized crops and flips are as `data.training_transform` describes them, with two differences: boxes are not
    rounded to whole pixels, and one that would stick out of the image is cut to it instead of drawn again. Pixels are
    interpolated bicubically without a filter, right where crops are enlarged: for images no larger than the model's.

    Args:
        dataset: Map-style, of PIL images that are all of one size: opened without a transform.
        spec: What the model takes.
        device: Where images live.
        max_corrupt: Part of the images that may be unreadable; the next readable image stands in for each.

    Raises:
        ConfigError: for a stream, or images that take more than half of the device's free memory.
        DataError: for images of several sizes, and for too many unreadable ones.
    """

    def __init__(
            self,
            dataset: Samples | IterableDataset,
            spec: ImageSpec,
            device: torch.device,
            max_corrupt: float = 0.001,
    ):
        if isinstance(dataset, IterableDataset):
            raise ConfigError('cache_on_device needs a data set that fits on the device, not a stream: leave '
                              '--cache-on-device out.')
        self.spec, self.device = spec, device
        to_mode, size = ToMode(spec.channels), (0, 0)
        images: np.ndarray | None = None
        readable: list[int] = []
        damages: list[str] = []
        for index in range(len(dataset)):
            try:
                image = to_mode(dataset[index][0])
            except DAMAGE as error:
                damages.append(f'{image_name(dataset, index)} ({" ".join(str(error).split())})')
                continue
            readable.append(index)
            if images is None:
                size = image.size
                shape = (len(dataset), image.height, image.width, spec.channels)
                _check_memory(math.prod(shape), device)
                images = np.empty(shape, dtype=np.uint8)
            if image.size != size:
                raise DataError(f'cache_on_device needs images of one size: image {index} has {image.size[0]} x '
                                f'{image.size[1]} pixels, the first {size[0]} x {size[1]}. Leave --cache-on-device '
                                'out, or resize them beforehand.')
            images[index] = np.asarray(image).reshape(images.shape[1:])
        if damages:
            refuse_corrupt(len(damages), len(dataset), max_corrupt if readable else 0, damages)
            say(f'{len(damages)} images cannot be read, and others stand in for them: {some_names(damages)}')
        if images is None:
            raise DataError('cache_on_device: the data set has no images.')
        for index in set(range(len(dataset))) - set(readable):
            images[index] = images[readable[bisect.bisect(readable, index) % len(readable)]]
        self.images = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous().to(device)  # uint8 [N, C, H, W]
        self.mean, self.std = (torch.tensor(v, device=device).view(1, -1, 1, 1) for v in (spec.mean, spec.std))

    def __len__(self) -> int:
        return len(self.images)

    def augment(self, indices: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
        """Crops of images, resized and normalised.

        Args:
            indices: Of the images, int64 [B] on the device.
            boxes: Affine maps from the crop to the image in coordinates from -1 to 1, [B, 2, 3], as `draw_boxes` gives.

        Returns:
            Float32 [B, C, height, width] of the model's size.
        """
        images = self.images[indices].float()
        grid = F.affine_grid(boxes, [len(boxes), self.spec.channels, *self.spec.size], align_corners=False)
        crops = F.grid_sample(images, grid, mode='bicubic', padding_mode='border', align_corners=False)
        return (crops.clamp(0, 255) / 255 - self.mean) / self.std


def draw_boxes(
        batch: int,
        size: tuple[int, int],
        scale: tuple[float, float],
        hflip: float,
        generator: torch.Generator,
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> torch.Tensor:
    """Random resized crops and horizontal flips as affine maps.

    Args:
        batch: How many.
        size: Height and width of the images in pixels.
        scale: Least and greatest area of a crop, of the image's.
        hflip: Probability of a flip.
        generator: Draws come from it, on its device.
        ratio: Least and greatest width over height of a crop.

    Returns:
        Float32 [batch, 2, 3], from the crop's coordinates (x, y) to the image's, both from -1 to 1.
    """
    draws = torch.rand(5, batch, generator=generator, device=generator.device)
    area = scale[0] + draws[0] * (scale[1] - scale[0])
    log_ratio = math.log(ratio[0]) + draws[1] * math.log(ratio[1] / ratio[0])
    # Width and height as parts of the image's.
    shape = (log_ratio - math.log(size[1] / size[0])) / 2
    width = (area.sqrt() * shape.exp()).clamp(max=1)
    height = (area.sqrt() * (-shape).exp()).clamp(max=1)
    boxes = torch.zeros(batch, 2, 3, device=generator.device)
    boxes[:, 0, 0] = torch.where(draws[4] < hflip, -width, width)
    boxes[:, 0, 2] = (2 * draws[2] - 1) * (1 - width)
    boxes[:, 1, 1] = height
    boxes[:, 1, 2] = (2 * draws[3] - 1) * (1 - height)
    return boxes


class DeviceBatches:
    """Training batches of this process from images on the device; stands in for `Batches`.

    Crops are drawn for the whole step from a generator on the device, seeded by (seed, step), so that neither
    processes nor accumulation change them.

    Args:
        images: On the device.
        batch_size: Images a forward pass, over all processes together.
        accumulate: Forward passes a step.
        seed: Of the run.
        group: The processes of the run.
        crop_scale: Least and greatest area of a crop.
        hflip: Probability of a flip.
    """

    def __init__(
            self,
            images: DeviceImages,
            batch_size: int,
            accumulate: int,
            seed: int,
            group: Processes,
            crop_scale: tuple[float, float],
            hflip: float,
    ):
        if len(images) < batch_size:
            raise DataError(f'{len(images)} training images are fewer than a batch of {batch_size}: use --batch-size '
                            f'{len(images)} or less.')
        self.per_epoch = len(images) // batch_size // accumulate * accumulate
        if self.per_epoch == 0:
            raise ConfigError(f'accumulate={accumulate} asks for more batches than the {len(images) // batch_size} of '
                              'an epoch.')
        self.images, self.accumulate, self.seed, self.group = images, accumulate, seed, group
        self.crop_scale, self.hflip = crop_scale, hflip
        self.sampler = EpochSampler(len(images), batch_size, seed, group, self.per_epoch)

    def describe(self, batch: int, count: int) -> str:
        """The images of `count` batches from number `batch` of the whole run on."""
        return self.sampler.describe(batch, count)

    def start_at(self, batch: int) -> Iterator[tuple[torch.Tensor]]:
        """Batches from number `batch` of the whole run on, which must begin a step: (images,) on the device."""
        generator = torch.Generator(self.images.device)
        size, share = self.sampler.batch_size, self.group.share(self.sampler.batch_size)
        epoch, number = divmod(batch, self.per_epoch)
        height, width = self.images.images.shape[2:]
        while True:
            order = self.sampler.order(epoch).to(self.images.device)
            for step in range(number // self.accumulate, self.per_epoch // self.accumulate):
                whole_step = epoch * (self.per_epoch // self.accumulate) + step
                generator.manual_seed(mix_seed(self.seed, 'crops', whole_step))
                boxes = draw_boxes(size * self.accumulate, (height, width), self.crop_scale, self.hflip,
                                   generator)
                indices = order[step * len(boxes):(step + 1) * len(boxes)]
                for part_indices, part_boxes in zip(indices.split(size), boxes.split(size)):
                    yield (self.images.augment(part_indices[share], part_boxes[share]),)
            epoch, number = epoch + 1, 0


def _check_memory(size: int, device: torch.device) -> None:
    if device.type != 'cuda':
        return
    free = torch.cuda.mem_get_info(device)[0]
    if size > free / 2:
        raise ConfigError(f'cache_on_device: the images take {size / 2 ** 30:.1f} GiB of the {free / 2 ** 30:.1f} GiB '
                          'free on the device, more than half. Leave --cache-on-device out.')
