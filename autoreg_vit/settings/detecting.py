"""Settings of `autoreg-vit detect`."""

from dataclasses import dataclass
from typing import Any

from ..errors import ConfigError
from .base import option
from .classification import DenseConfig


@dataclass
class DetectConfig(DenseConfig):
    """Settings of `autoreg-vit detect`; the defaults are those of Li et al. 2021 ("Benchmarking Detection Transfer
    Learning with Vision Transformers") for ViT-B on COCO."""

    data_dir: str | None = option(
        None, 'folder in COCO\'s layout: a folder of images a split, and annotations/instances_SPLIT.json', free=True)
    train_split: str = option('train2017', 'split to train on')
    train_annotations: str | None = option(None, 'JSON file of the training split, where it is another one')
    eval_annotations: str | None = option(None, 'JSON file of the split to report on, where it is another one')
    in_chans: int | None = option(None, 'image channels: 3, or 1 for grey')
    img_size: tuple[int, ...] = option(
        (1024,), 'canvas in pixels that images are put on: height and width, or one number')
    jitter: tuple[float, ...] = option(
        (0.1, 2.0), 'least and greatest size of a training image, in canvases; 1 1 fits it in')

    attention: str = option('windowed', 'windowed, global in four blocks alone; or global in all')
    window: int = option(14, 'rows and columns of a window, in tokens')
    norm: str = option('batch', 'norm after convolutions: batch, synchronised over GPUs, or layer')
    width: int = option(256, 'channels of the feature pyramid and of the heads')
    anchor_sizes: tuple[int, ...] = option(
        (32, 64, 128, 256, 512), 'anchors of the five levels, in pixels of the canvas')
    rois: int = option(512, 'regions of a training image that the box head sees')

    batch_size: int = option(64, 'images a forward pass, over all processes together')
    lr: float = option(2e-5, 'learning rate for 16 images a step, scaled linearly')
    weight_decay: float = option(0.1, 'weight decay')
    steps: int = option(183200, 'optimizer steps')
    warmup_steps: int = option(458, 'steps of linear warm-up from 0')
    schedule: str = option('cosine', 'how the learning rate falls after the warm-up: linear or cosine')
    layer_decay: float = option(1.0, 'factor of the learning rate from a block to the one below')

    save_detections: bool = option(False, 'write detections.json, in COCO\'s format of results', free=True)

    def __post_init__(self):
        super().__post_init__()
        self._at_least(1, 'window', 'width', 'rois')
        if self.data_dir is None:
            raise ConfigError('Nothing to detect on: --data-dir names a folder in COCO\'s layout, with folders of '
                              f'images such as {self.train_split}/ and with annotations/.')
        if len(self.img_size) not in (1, 2):
            raise ConfigError(f'img_size is one number or height and width, got {self.img_size}.')
        if not (len(self.jitter) == 2 and 0 < self.jitter[0] <= self.jitter[1]):
            raise ConfigError(f'jitter is two sizes above 0, the smaller first; got {self.jitter}.')

    @property
    def canvas(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self.img_size * 2 if len(self.img_size) == 1 else self.img_size

    def detector_options(self) -> dict[str, Any]:
        """Keyword arguments for `ViTMaskRCNN`."""
        return {'size': self.canvas, **{name: getattr(self, name) for name in (
            'attention', 'window', 'norm', 'width', 'anchor_sizes', 'rois')}}
