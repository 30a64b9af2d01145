"""JPEG files decoded and cropped by torchvision: the pictures and crops of `training_transform` in half of its time.

Samples leave the loader as bytes, and are normalised on the device. What torchvision would take for another picture, or
refuses, Pillow reads as everywhere else.
"""

import functools
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from timm.data.transforms import RandomResizedCropAndInterpolation
from torch.utils.data import IterableDataset
from torchvision.transforms import functional as pictures

from .._compat import decode_jpeg
from ..engine.machine import to_device
from ..errors import ConfigError
from .batches import Batches
from .images import DAMAGE, ToMode, open_image, orientation
from .samples import Samples
from .transforms import CROP_RATIO, ImageSpec


def choose_reader(name: str, dataset: Samples | IterableDataset) -> str:
    """'torchvision' for a data set of image files where torchvision decodes JPEG, else 'pil', unless `name` says
    otherwise; raises ConfigError for torchvision where it cannot read."""
    files = getattr(dataset, 'loader', None) is open_image
    if name == 'auto':
        return 'torchvision' if files and decodes_jpeg() else 'pil'
    if name == 'torchvision' and not files:
        raise ConfigError("reader='torchvision' reads image files, and these images are none (arrays, shards, a "
                          'hub): use --reader pil, or leave it to auto.')
    if name == 'torchvision' and not decodes_jpeg():
        raise ConfigError('The installed torchvision does not decode JPEG: use --reader pil, or another torchvision.')
    return name


@functools.cache
def decodes_jpeg() -> bool:
    """Whether the installed torchvision was built with a decoder of JPEG."""
    file = io.BytesIO()
    Image.new('L', (8, 8)).save(file, 'JPEG')
    try:
        decode_jpeg(torch.frombuffer(bytearray(file.getvalue()), dtype=torch.uint8), grey=True)
    except RuntimeError:
        return False
    return True


def read_by_torchvision(files: Any, spec: ImageSpec, crop_scale: tuple[float, float], hflip: float) -> None:
    """Let a data set of files give crops as `ByteCrops` makes them: for `NormalisedBatches`."""
    files.loader, files.transform = read_image, ByteCrops(spec, crop_scale, hflip)


def read_image(path: str | Path) -> torch.Tensor | Image.Image:
    """The picture of a file: uint8 [1 or 3, height, width] of an upright JPEG in grey or RGB, else as `open_image`."""
    decoded = _decode(path)
    return open_image(path) if decoded is None else decoded


def _decode(path: str | Path) -> torch.Tensor | None:
    """The picture of a file by torchvision, None for what Pillow has to read or to judge."""
    try:
        with open(path, 'rb') as file:
            if file.read(3) != b'\xff\xd8\xff':
                return None
            file.seek(0)
            header = Image.open(file)  # reads no pixels
            too_large = Image.MAX_IMAGE_PIXELS and header.width * header.height > Image.MAX_IMAGE_PIXELS
            # Of ink (CMYK) Pillow alone knows the colours.
            if header.format != 'JPEG' or header.mode not in ('L', 'RGB') or too_large or orientation(header) != 1:
                return None
            file.seek(0)
            data = torch.frombuffer(bytearray(file.read()), dtype=torch.uint8)
        return decode_jpeg(data, grey=header.mode == 'L')
    except DAMAGE:
        return None


class ByteCrops:
    """The random resized crop and flip of `training_transform` as bytes, uint8 [channels, height, width], by the same
    draws in the same order. Of a PIL image the crop is Pillow's. A named class so that loader processes can receive it.
    """

    def __init__(self, spec: ImageSpec, crop_scale: tuple[float, float], hflip: float):
        self.channels, self.hflip, self.to_mode = spec.channels, hflip, ToMode(spec.channels)
        self.crop = RandomResizedCropAndInterpolation(spec.size, crop_scale, CROP_RATIO, 'bicubic')

    def __call__(self, image: torch.Tensor | Image.Image) -> torch.Tensor:
        if isinstance(image, Image.Image):
            crop = pictures.pil_to_tensor(self.crop(self.to_mode(image)))
        else:
            top, left, height, width = self.crop.get_params(image, self.crop.scale, self.crop.ratio)
            crop = image[:, top:top + height, left:left + width]
            if len(crop) > self.channels:
                crop = pictures.pil_to_tensor(self.to_mode(pictures.to_pil_image(crop)))
            # On bytes, and of the view: without the copy to floats that torchvision's own resize makes of some.
            crop = F.interpolate(crop[None], self.crop.size, mode='bicubic', antialias=True)[0]
            crop = crop.expand(self.channels, -1, -1)
        # Here and not on the device: a flip of bytes is a hundredth of the work on an image.
        return crop.flip(-1) if self.hflip > 0 and torch.rand(1) < self.hflip else crop


class NormalisedBatches:
    """Training batches of a data set that `read_by_torchvision` has prepared, normalised on the device; stands in for
    `Batches`, whose attributes it has."""
    on_device = False

    def __init__(self, batches: Batches, spec: ImageSpec, device: torch.device):
        self.batches, self.device = batches, device
        self.dataset, self.sampler, self.per_epoch = batches.dataset, batches.sampler, batches.per_epoch
        self.describe = batches.describe
        self.mean, self.std = (torch.tensor(v, device=device).view(-1, 1, 1) for v in (spec.mean, spec.std))

    def start_at(self, batch: int) -> Iterator[tuple[torch.Tensor, Any]]:
        """Batches from number `batch` of the whole run on: (images, labels) on the device."""
        for given in self.batches.start_at(batch):
            crops, labels = to_device(given, self.device)
            yield crops.float().div_(255).sub_(self.mean).div_(self.std), labels
