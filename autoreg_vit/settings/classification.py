"""Settings of the commands that train on annotated images: `autoreg-vit probe` and `autoreg-vit finetune`, and what
dense prediction shares."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from .base import convert_fields, option


@dataclass
class RunConfig:
    """What every command that trains on annotated images takes. None is left to the weights' or the data's value."""

    weights: str | None = option(
        None, 'encoder to load: a folder that pretraining wrote, a run\'s folder, or a timm name')
    pretrained: bool = option(True, 'load the weights; --no-pretrained starts from initialisation, to compare with')

    data_dir: str | None = option(None, 'folder of the data', free=True)
    train_split: str = option('train', 'split to train on')
    eval_split: str | None = option(None, 'split to report on; without one, a fifth of the training images')
    train_images: int | None = option(None, 'training images to use at most, drawn by the seed; all by default')
    test_images: int | None = option(None, 'images to report on at most, drawn by the seed; all by default')
    workers: int | None = option(None, 'processes that load images; none on a CPU by default, else up to 8', free=True)
    max_corrupt: float = option(
        0.0, 'part of the training images that may be unreadable; others stand in for them', free=True)
    check_images: int = option(
        10000, 'images of a folder decoded before training, to find unreadable ones; 0, only file names', free=True)
    hflip: float = option(0.5, 'probability of a horizontal flip')

    batch_size: int = option(1024, 'images a forward pass, over all processes together')
    accumulate: int = option(1, 'forward passes an optimizer step; the batch of a step is their product')
    opt: str = option('adamw', 'optimizer, a timm name')
    lr: float = option(5e-4, 'learning rate for 256 images a step, scaled linearly')
    weight_decay: float = option(0.05, 'weight decay')
    min_lr: float = option(0.0, 'learning rate at the end of the schedule')
    clip_grad: float | None = option(None, 'largest norm of the gradient')

    precision: str = option('auto', 'auto, float32 or bfloat16 autocast')
    seed: int = option(0, 'seed of new layers, order of images and augmentation')
    device: str = option('auto', 'auto, cpu, cuda, cuda:1, ...')
    log_every: int = option(20, 'steps a line of log.jsonl averages over', free=True)
    checkpoint_every_steps: int = option(0, 'steps between checkpoints; 0, by time alone', free=True)
    checkpoint_every_minutes: float = option(10.0, 'minutes between checkpoints', free=True)
    tracker: str | None = option(None, 'module with the interface of wandb to log to as well', free=True)
    force_resume: bool = option(False, 'go on with a run although settings or circumstances changed', free=True)
    output_dir: str | None = option(None, 'folder of the run; by default a new one under runs/', free=True)

    def __post_init__(self):
        convert_fields(self)
        if self.weights is None:
            raise ConfigError('Nothing to evaluate: --weights names an encoder, the folder that pretraining wrote '
                              '(runs/NAME/encoder) or a timm name such as vit_base_patch16_224.')
        self._at_least(1, 'batch_size', 'accumulate', 'log_every', 'train_images', 'test_images')
        self._at_least(0, 'lr', 'weight_decay', 'min_lr', 'clip_grad', 'check_images', 'workers')
        self._between_0_and_1('hflip', 'max_corrupt')
        if self.precision not in ('auto', 'float32', 'bfloat16'):
            raise ConfigError(f"precision is 'auto', 'float32' or 'bfloat16', got {self.precision!r}.")

    @property
    def data_name(self) -> str:
        """What results call the data."""
        return Path(self.data_dir or '').name

    def _at_least(self, least: int, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f'{name} must be at least {least}, got {value}.')

    def _between_0_and_1(self, *names: str) -> None:
        for name in names:
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f'{name} is between 0 and 1, got {getattr(self, name)}.')


@dataclass
class SupervisedConfig(RunConfig):
    """What `probe` and `finetune` take: classification, with a schedule in epochs."""

    img_size: tuple[int, ...] | None = option(None, 'image height and width in pixels, or one number for both')
    in_chans: int | None = option(None, 'image channels: 3, or 1 for grey')
    global_pool: str | None = option(None, 'feature of an image: avg or token; by default as the encoder was made')

    dataset: str | None = option(
        None, 'digits, folder (the default with --data-dir), or a timm data set name: torch/NAME, hfds/NAME')
    data_dir: str | None = option(None, 'folder with one folder of images a class, with or without splits', free=True)
    image_column: str | None = option(None, 'column of the images (hfds); by default the one there is')
    label_column: str | None = option(None, 'column of the labels (hfds); by default the one there is')
    num_classes: int | None = option(None, 'number of classes; by default those of the data')
    download: bool = option(False, 'let torch/... data sets download themselves', free=True)
    crop_scale: tuple[float, ...] = option((0.08, 1.0), 'area of random crops')
    crop_pct: float | None = option(
        None, 'part of the image\'s shorter side that evaluation keeps; by default 0.875, and 1 up to 64 pixels')

    epochs: int = option(100, 'passes over the training images')
    warmup_epochs: float = option(5, 'epochs of linear warm-up from 0')
    eval_every: int = option(0, 'report accuracies every so many epochs; 0, only at the end', free=True)

    def __post_init__(self):
        super().__post_init__()
        self._at_least(1, 'epochs', 'num_classes')
        self._at_least(0, 'warmup_epochs', 'eval_every')
        if not (len(self.crop_scale) == 2 and 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1):
            raise ConfigError(f'crop_scale is two areas between 0 and 1, the smaller first; got {self.crop_scale}.')
        if self.crop_pct is not None and not 0 < self.crop_pct <= 1:
            raise ConfigError(f'crop_pct is above 0 and at most 1, got {self.crop_pct}.')
        if self.img_size is not None and len(self.img_size) not in (1, 2):
            raise ConfigError(f'img_size is one number or height and width, got {self.img_size}.')

    @property
    def data_name(self) -> str:
        return self.dataset

    def evaluated_part(self, size: tuple[int, int]) -> float:
        """`crop_pct`, or its default for images of `size` pixels: 0.875 of 256 is 224, as is usual."""
        return self.crop_pct or (1.0 if min(size) <= 64 else 0.875)

    def model_options(self) -> dict[str, Any]:
        """Keyword arguments for `timm.create_model` that were given."""
        options = {name: getattr(self, name) for name in ('img_size', 'in_chans', 'global_pool')}
        if self.img_size is not None:
            options['img_size'] = self.img_size * 2 if len(self.img_size) == 1 else self.img_size
        return {name: value for name, value in options.items() if value is not None}


@dataclass
class ProbeConfig(SupervisedConfig):
    """Settings of `autoreg-vit probe`; the defaults are RandSAC's Table 16 but for the batch, which suits one GPU."""

    epochs: int = option(90, 'passes over the training images')
    opt: str = option('lars', 'optimizer, a timm name')
    lr: float = option(0.1, 'learning rate for 256 images a step, scaled linearly')
    weight_decay: float = option(0.0, 'weight decay')
    warmup_epochs: float = option(10, 'epochs of linear warm-up from 0')
    momentum: float = option(0.9, 'momentum of the optimizer')
    batch_norm: bool = option(False, 'batch norm without parameters before the classifier (SAIM, MAE)')
    fast: bool = option(False, 'fit on cached features without augmentation, sweeping learning rates')
    learning_rates: tuple[float, ...] = option(
        (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0),
        'learning rates that --fast sweeps, for 256 images a step')
    holdout: float = option(0.1, 'part of the training images by which --fast chooses the learning rate')
    knn: int = option(20, 'neighbours of the kNN accuracy; 0 leaves it out')
    knn_images: int = option(50000, 'training images that kNN searches at most')

    def __post_init__(self):
        super().__post_init__()
        self._at_least(0, 'knn')
        self._at_least(1, 'knn_images')
        self._between_0_and_1('momentum')
        if not 0 < self.holdout < 1:
            raise ConfigError(f'holdout is a part between 0 and 1, got {self.holdout}.')
        if not self.learning_rates or min(self.learning_rates) <= 0:
            raise ConfigError(f'learning_rates are positive numbers, got {self.learning_rates}.')


@dataclass
class FinetuneConfig(SupervisedConfig):
    """Settings of `autoreg-vit finetune`; the defaults are RandSAC's Table 15."""

    betas: tuple[float, ...] = option((0.9, 0.999), 'Adam\'s betas')
    layer_decay: float = option(0.65, 'factor of the learning rate from a block to the one below')
    drop_path_rate: float = option(0.1, 'stochastic depth')
    auto_augment: str | None = option(
        'rand-m9-mstd0.5-inc1', 'timm\'s name of an augmentation policy; none turns it off')
    erase: float = option(0.0, 'probability of erasing a rectangle of an image')
    label_smoothing: float = option(0.1, 'label smoothing')
    mixup: float = option(0.8, 'alpha of mixup; 0 turns it off')
    cutmix: float = option(1.0, 'alpha of cutmix; 0 turns it off')
    ema_decay: float = option(0.0, 'decay of an average of the weights that is evaluated too; 0 keeps none')
    grad_checkpointing: bool = option(False, 'recompute blocks in the backward pass to save memory')

    def __post_init__(self):
        super().__post_init__()
        self._at_least(0, 'mixup', 'cutmix')
        self._between_0_and_1('layer_decay', 'drop_path_rate', 'erase', 'label_smoothing', 'ema_decay')
        if len(self.betas) != 2:
            raise ConfigError(f'betas are two numbers, got {self.betas}.')
        if self.auto_augment == 'none':
            self.auto_augment = None

    def model_options(self) -> dict[str, Any]:
        return {**super().model_options(), 'drop_path_rate': self.drop_path_rate}


@dataclass
class DenseConfig(RunConfig):
    """What dense prediction takes: a network on an encoder's maps, trained end to end, with a schedule in steps."""

    batch_size: int = option(16, 'images a forward pass, over all processes together')
    lr: float = option(7e-4, 'learning rate for 16 images a step, scaled linearly')
    steps: int = option(160000, 'optimizer steps')
    warmup_steps: int = option(1500, 'steps of linear warm-up from 0')
    schedule: str = option('linear', 'how the learning rate falls after the warm-up: linear or cosine')
    eval_every: int = option(0, 'report every so many steps; 0, only at the end', free=True)
    betas: tuple[float, ...] = option((0.9, 0.999), 'Adam\'s betas')
    layer_decay: float = option(0.65, 'factor of the learning rate from a block to the one below')
    drop_path_rate: float = option(0.1, 'stochastic depth')
    grad_checkpointing: bool = option(False, 'recompute blocks in the backward pass to save memory')

    def __post_init__(self):
        super().__post_init__()
        self._at_least(1, 'steps')
        self._at_least(0, 'warmup_steps', 'eval_every')
        self._between_0_and_1('layer_decay', 'drop_path_rate')
        if len(self.betas) != 2:
            raise ConfigError(f'betas are two numbers, got {self.betas}.')
        if self.schedule not in ('linear', 'cosine'):
            raise ConfigError(f"schedule is 'linear' or 'cosine', got {self.schedule!r}.")
