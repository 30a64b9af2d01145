"""Settings of `autoreg-vit probe` and `autoreg-vit finetune`."""

from dataclasses import dataclass

from ..errors import ConfigError
from . import parts
from .base import adapted, option


@dataclass
@adapted(batch_size=1024, lr=5e-4, crop_scale=(0.08, 1.0), help={
    'data_dir': 'folder with one folder of images for each class, with or without splits',
    'dataset': 'digits, folder (by default with --data-dir), or a timm data set name: torch/NAME, hfds/NAME',
    'image_column': 'column of the images (hfds); by default the one there is'})
class Classification(parts.StartingWeights, parts.InputSize, parts.InputChannels, parts.NamedData, parts.InEpochs):
    """What `probe` and `finetune` take: a classifier of labelled images, with a schedule in epochs."""
    global_pool: str | None = option(
        None, 'feature of an image: avg or token; by default as the encoder was made', group='model', model=True)
    test_images: int | None = option(
        None, 'images to report on at most, drawn by the seed; all of them by default', group='data', least=1)
    num_classes: int | None = option(None, 'number of classes; by default those of the data', group='data', least=1)
    crop_pct: float | None = option(
        None, 'part of the image\'s shorter side that evaluation keeps; by default 0.875, and 1 up to 64 pixels',
        group='data')

    def check(self) -> None:
        super().check()
        if self.crop_scale is None:
            raise ConfigError('crop_scale needs two areas between 0 and 1, got nothing.')
        if self.crop_pct is not None and not 0 < self.crop_pct <= 1:
            raise ConfigError(f'crop_pct is above 0 and at most 1, got {self.crop_pct}.')

    def evaluated_part(self, size: tuple[int, int]) -> float:
        """`crop_pct`, or its default for images of `size` pixels: 0.875 of 256 is 224, as is usual."""
        return self.crop_pct or (1.0 if min(size) <= 64 else 0.875)


@dataclass
@adapted(epochs=90, opt='lars', lr=0.1, weight_decay=0.0, warmup_epochs=10)
class ProbeConfig(Classification):
    """Settings of `autoreg-vit probe`; the defaults are RandSAC's Table 16 but for the batch, which suits one GPU."""
    help_group = 'optimisation'

    momentum: float = option(0.9, 'momentum of the optimizer', least=0, most=1)
    batch_norm: bool = option(False, 'batch norm without parameters before the classifier (SAIM, MAE)', group='model')
    fast: bool = option(False, 'fit on cached features without augmentation, sweeping learning rates')
    learning_rates: tuple[float, ...] = option(
        (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0),
        'learning rates that --fast sweeps, for 256 images a step')
    holdout: float = option(0.1, 'part of the training images by which --fast chooses the learning rate')
    knn: int = option(20, 'neighbours of the kNN accuracy; 0 leaves it out', group='data', least=0)
    knn_images: int = option(50000, 'training images that kNN searches at most', group='data', least=1)

    def check(self) -> None:
        super().check()
        if not 0 < self.holdout < 1:
            raise ConfigError(f'holdout is a part between 0 and 1, got {self.holdout}.')
        if not self.learning_rates or min(self.learning_rates) <= 0:
            raise ConfigError(f'learning_rates are positive numbers, got {self.learning_rates}.')


@dataclass
@adapted(drop_path_rate=0.1)
class FinetuneConfig(Classification, parts.TrainedEncoder, parts.EndToEnd, parts.Compiled, parts.Sharded):
    """Settings of `autoreg-vit finetune`; the defaults are RandSAC's Table 15."""
    help_group = 'optimisation'

    auto_augment: str | None = option(
        'rand-m9-mstd0.5-inc1', 'timm\'s name of an augmentation policy; none turns it off', group='data')
    erase: float = option(0.0, 'probability of erasing a rectangle of an image', group='data', least=0, most=1)
    label_smoothing: float = option(0.1, 'label smoothing', least=0, most=1)
    mixup: float = option(0.8, 'alpha of mixup; 0 turns it off', least=0)
    cutmix: float = option(1.0, 'alpha of cutmix; 0 turns it off', least=0)
    ema_decay: float = option(
        0.0, 'decay of an average of the weights that is evaluated too; 0 keeps none', least=0, most=1)

    def check(self) -> None:
        super().check()
        if self.auto_augment == 'none':
            self.auto_augment = None
        if self.ema_decay and self.fsdp:
            raise ConfigError(f'ema_decay={self.ema_decay} averages whole weights, and fsdp divides them: leave '
                              '--ema-decay or --fsdp out.')
