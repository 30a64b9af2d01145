"""What images a model takes, and how files become them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from timm.data import create_transform
from torchvision.transforms import Compose

from ..errors import DataError
from ..models.interface import as_timm, encoder_of
from .images import ToMode

#: Least and greatest width over height of random crops.
CROP_RATIO = (3 / 4, 4 / 3)


@dataclass(frozen=True)
class ImageSpec:
    """What a model takes: pixels as (height, width), channels, and the normalisation of each channel."""
    size: tuple[int, int]
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        if self.channels not in (1, 3):
            raise DataError(f'Image files have 1 (grey) or 3 (RGB) channels, and this model takes {self.channels}. '
                            'Use in_chans 1 or 3 here, or train on tensors of your own with the model itself.')

    @classmethod
    def of(cls, model: torch.nn.Module, in_chans: int | None = None) -> 'ImageSpec':
        """Of a pretraining model or a timm model: its configured normalisation, and the size of its patch embedding or
        else, for want of one, the configured size and `in_chans`."""
        cfg = as_timm(model).pretrained_cfg
        embed: Any = getattr(encoder_of(model), 'patch_embed', None)
        size = getattr(embed, 'img_size', None) or cfg['input_size'][-2:]
        channels = embed.proj.in_channels if hasattr(embed, 'proj') else in_chans or cfg['input_size'][0]
        mean, std = cfg['mean'], cfg['std']
        if channels == 1:
            mean, std = (sum(mean) / len(mean),), (sum(std) / len(std),)
        return cls(tuple(size), channels, tuple(mean), tuple(std))

    def nothing(self, batch: int, device: torch.device) -> torch.Tensor:
        """Empty images [batch, channels, height, width]."""
        return torch.zeros(batch, self.channels, *self.size, device=device)


def training_transform(spec: ImageSpec, crop_scale: tuple[float, float], hflip: float) -> Callable:
    """Random resized crop and horizontal flip, the whole augmentation of both papers (RandSAC 5, SAIM "Training
    configurations")."""
    return Compose([ToMode(spec.channels), timm_transform(
        spec, is_training=True, scale=crop_scale, ratio=CROP_RATIO, hflip=hflip, color_jitter=None)])


def evaluation_transform(spec: ImageSpec, crop_pct: float = 1.0) -> Callable:
    """The middle of the image, `crop_pct` of its shorter side, resized to the model's size."""
    return Compose([ToMode(spec.channels), timm_transform(
        spec, is_training=False, crop_pct=crop_pct, crop_mode='center')])


def timm_transform(spec: ImageSpec, **options: Any) -> Any:
    """timm's transform of images in the mode that the model takes."""
    return create_transform(
        (spec.channels, *spec.size), interpolation='bicubic', mean=spec.mean, std=spec.std, **options)
