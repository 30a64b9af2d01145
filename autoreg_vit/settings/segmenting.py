"""Settings of `autoreg-vit segment`."""

from dataclasses import dataclass

from ..errors import ConfigError
from .base import option
from .classification import DenseConfig


@dataclass
class SegmentConfig(DenseConfig):
    """Settings of `autoreg-vit segment`; the defaults are RandSAC's and SAIM's, which is BEiT's, for ViT-Base."""

    data_dir: str | None = option(
        None, 'folder with images/SPLIT and annotations/SPLIT, masks named as their images', free=True)
    num_classes: int | None = option(None, 'number of classes; by default those that the data\'s info.json names')
    ignore_index: int | None = option(
        None, 'value of mask pixels without a class; by default what info.json says, else 255')
    reduce_zero_label: bool = option(False, 'masks number the classes from 1, and 0 is ignored (ADE20K)')
    in_chans: int | None = option(None, 'image channels: 3, or 1 for grey')
    crop_size: tuple[int, ...] = option(
        (512,), 'size of training crops and evaluation windows: height and width, or one number')
    stride: int | None = option(None, 'pixels from one evaluation window to the next; by default two thirds of a crop')
    short_side: int | None = option(
        None, 'shorter side that images are first resized to, the longer up to four times it; by default their own')
    scale: tuple[float, ...] = option((0.5, 2.0), 'factors between which training images are enlarged')
    crop_share: float = option(0.75, 'largest part of a crop for one class, where ten tries find such a crop')
    photometric: bool = option(True, 'distort brightness, contrast, saturation and hue of training images')
    decoder_channels: int | None = option(None, 'width of UPerNet\'s head; by default the encoder\'s')
    auxiliary: float = option(0.4, 'weight of the second head\'s loss; 0 leaves it out')
    dropout: float = option(0.1, 'dropout before the last layer of each head')
    pictures: int = option(4, 'test images in figures/predictions.png; 0 leaves it out')

    def __post_init__(self):
        super().__post_init__()
        self._at_least(1, 'num_classes', 'stride', 'short_side', 'decoder_channels')
        self._at_least(0, 'auxiliary', 'pictures')
        self._between_0_and_1('crop_share', 'dropout')
        if len(self.crop_size) not in (1, 2) or min(self.crop_size) < 1:
            raise ConfigError(f'crop_size is one number or height and width, got {self.crop_size}.')
        if self.stride is not None and self.stride > min(self.crop):
            raise ConfigError(f'stride={self.stride} would leave pixels between windows of {self.crop[0]} x '
                              f'{self.crop[1]} unseen: use {min(self.crop)} or less.')
        if len(self.scale) != 2 or not 0 < self.scale[0] <= self.scale[1]:
            raise ConfigError(f'scale is two factors above 0, the smaller first; got {self.scale}.')
        if self.data_dir is None:
            raise ConfigError('Nothing to segment: --data-dir names a folder with images/SPLIT and annotations/SPLIT.')

    @property
    def crop(self) -> tuple[int, int]:
        """Height and width of crops."""
        return self.crop_size if len(self.crop_size) == 2 else self.crop_size * 2

    @property
    def steps_between_windows(self) -> tuple[int, int]:
        """Pixels from one evaluation window to the next, down and to the right."""
        return tuple(self.stride or max(side * 2 // 3, 1) for side in self.crop)
