"""Settings of `autoreg-vit segment` and `autoreg-vit detect`."""

from dataclasses import dataclass
from typing import Any

from ..errors import ConfigError
from .base import adapted, option, pair
from .parts import Compiled, EndToEnd, ImageData, InputChannels, InputSize, InSteps, StartingWeights, TrainedEncoder


@dataclass
@adapted(drop_path_rate=0.1)
class Dense(StartingWeights, InputChannels, TrainedEncoder, ImageData, InSteps, EndToEnd):
    """What dense prediction takes: a network on an encoder's maps, trained end to end, with a schedule in steps."""
    test_images: int | None = option(
        None, 'images to report on at most, drawn by the seed; all of them by default', group='data', least=1)


@dataclass
@adapted(help={'data_dir': 'folder with images/SPLIT and annotations/SPLIT, masks named as their images'})
class SegmentConfig(Dense, Compiled):
    """Settings of `autoreg-vit segment`; the defaults are RandSAC's and SAIM's, which is BEiT's, for ViT-Base."""
    help_group = 'data'

    num_classes: int | None = option(
        None, 'number of classes; by default those that the data\'s info.json names', least=1)
    ignore_index: int | None = option(
        None, 'value of mask pixels without a class; by default what info.json says, else 255')
    reduce_zero_label: bool = option(False, 'masks number the classes from 1, and 0 is ignored (ADE20K)')
    crop_size: tuple[int, ...] = option(
        (512,), 'size of training crops and evaluation windows: height and width, or one number')
    stride: int | None = option(
        None, 'pixels from one evaluation window to the next; by default two thirds of a crop', least=1)
    short_side: int | None = option(
        None, 'shorter side that images are first resized to, the longer up to four times it; by default their own',
        least=1)
    scale: tuple[float, float] = option((0.5, 2.0), 'factors between which training images are enlarged')
    crop_share: float = option(
        0.75, 'largest part of a crop for one class, where ten tries find such a crop', least=0, most=1)
    photometric: bool = option(True, 'distort brightness, contrast, saturation and hue of training images')
    decoder_channels: int | None = option(
        None, 'width of UPerNet\'s head; by default the encoder\'s', group='model', least=1)
    auxiliary: float = option(0.4, 'weight of the second head\'s loss; 0 leaves it out', group='model', least=0)
    dropout: float = option(0.1, 'dropout before the last layer of each head', group='model', least=0, most=1)
    pictures: int = option(4, 'test images in figures/predictions.png; 0 leaves it out', group='logging', least=0)

    def check(self) -> None:
        super().check()
        if self.data_dir is None:
            raise ConfigError('Nothing to segment: --data-dir names a folder with images/SPLIT and annotations/SPLIT.')
        if len(self.crop_size) not in (1, 2) or min(self.crop_size) < 1:
            raise ConfigError(f'crop_size is one number or height and width, got {self.crop_size}.')
        if self.stride is not None and self.stride > min(self.crop):
            raise ConfigError(f'stride={self.stride} would leave pixels between windows of {self.crop[0]} x '
                              f'{self.crop[1]} unseen: use {min(self.crop)} or less.')
        if len(self.scale) != 2 or not 0 < self.scale[0] <= self.scale[1]:
            raise ConfigError(f'scale is two factors above 0, the smaller first; got {self.scale}.')

    @property
    def crop(self) -> tuple[int, int]:
        """Height and width of crops."""
        return pair(self.crop_size)

    @property
    def steps_between_windows(self) -> tuple[int, int]:
        """Pixels from one evaluation window to the next, down and to the right."""
        height, width = self.crop
        return self.stride or max(height * 2 // 3, 1), self.stride or max(width * 2 // 3, 1)


@dataclass
@adapted(img_size=(1024,), train_split='train2017', batch_size=64, lr=2e-5, weight_decay=0.1, steps=183200,
         warmup_steps=458, schedule='cosine', layer_decay=1.0, help={
             'img_size': 'canvas in pixels that images are put on: height and width, or one number',
             'data_dir': 'folder in COCO\'s layout: a folder of images a split, and annotations/instances_SPLIT.json'})
class DetectConfig(Dense, InputSize):
    """Settings of `autoreg-vit detect`; the defaults are those of Li et al. 2021 ("Benchmarking Detection Transfer
    Learning with Vision Transformers") for ViT-B on COCO."""
    help_group = 'model'

    train_annotations: str | None = option(
        None, 'JSON file of the training split; by default that of the layout', group='data')
    eval_annotations: str | None = option(
        None, 'JSON file of the split to report on; by default that of the layout', group='data')
    jitter: tuple[float, float] = option(
        (0.1, 2.0), 'least and greatest size of a training image, in canvases; 1 1 fits it in', group='data')
    attention: str = option('windowed', 'windowed, global in four blocks alone; or global in all')
    window: int = option(14, 'rows and columns of a window, in tokens', least=1)
    norm: str = option('batch', 'norm after convolutions: batch, synchronised over GPUs, or layer')
    width: int = option(256, 'channels of the feature pyramid and of the heads', least=1)
    anchor_sizes: tuple[int, ...] = option(
        (32, 64, 128, 256, 512), 'anchors of the five levels, in pixels of the canvas')
    rois: int = option(512, 'regions of a training image that the box head sees', least=1)
    save_detections: bool = option(
        False, 'write detections.json, in COCO\'s format of results', group='logging', free=True)

    def check(self) -> None:
        super().check()
        if self.data_dir is None:
            raise ConfigError('Nothing to detect on: --data-dir names a folder in COCO\'s layout, with folders of '
                              f'images such as {self.train_split}/ and with annotations/.')
        if self.img_size is None:
            raise ConfigError('img_size needs the height and width of the canvas, or one number, got nothing.')
        if not (len(self.jitter) == 2 and 0 < self.jitter[0] <= self.jitter[1]):
            raise ConfigError(f'jitter is two sizes above 0, the smaller first; got {self.jitter}.')

    @property
    def canvas(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return pair(self.img_size or ())

    def detector_options(self) -> dict[str, Any]:
        """Keyword arguments for `ViTMaskRCNN`."""
        return {'size': self.canvas, **{name: getattr(self, name) for name in (
            'attention', 'window', 'norm', 'width', 'anchor_sizes', 'rois')}}
