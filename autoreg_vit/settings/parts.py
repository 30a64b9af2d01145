"""The parts that commands' settings are made of, by what they set: weights, model, data, optimisation, the machine and
the run. A command's own settings are a class that joins its parts, in the module of its theme."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, cast

from ..errors import ConfigError
from .base import Auto, Settings, adapted, option, pair


@dataclass
class SeedAndFolder(Settings):
    """What every command takes that draws and writes."""
    seed: int = option(0, 'seed of everything that is drawn: initialisation, order of images, augmentation, ranks',
                       group='optimisation')
    output_dir: str | None = option(
        None, 'folder of the run; the same command with the same folder resumes; by default a new one under runs/',
        group='logging', free=True)

    def check(self) -> None:
        super().check()
        if not 0 <= self.seed < 2 ** 32:  # what NumPy takes
            raise ConfigError(f'seed is a whole number from 0 to {2 ** 32 - 1}, got {self.seed}.')
        if self.output_dir == '':
            raise ConfigError("output_dir is '', perhaps of an unset variable: name a folder, or leave it out.")


@dataclass
class StartingWeights(Settings):
    """What trained weights a command begins with."""
    #: What to say where none are named.
    without_weights: ClassVar[str] = (
        'Nothing to evaluate: --weights names an encoder, the folder that pretraining wrote (runs/NAME/encoder) or a '
        'timm name such as vit_base_patch16_224.')

    weights: str = option('', 'encoder to load: a folder that pretraining wrote, a run\'s folder, or a timm name')
    pretrained: bool = option(True, 'load the weights; --no-pretrained starts from initialisation, to compare with')

    def check(self) -> None:
        if not self.weights:
            raise ConfigError(self.without_weights)
        super().check()


@dataclass
class InputSize(Settings):
    """Images as a model takes them."""
    img_size: tuple[int, ...] | None = option(
        None, 'image height and width in pixels, or one number for both', model=True)

    def check(self) -> None:
        super().check()
        if self.img_size is not None and len(self.img_size) not in (1, 2):
            raise ConfigError(f'img_size is one number or height and width, got {self.img_size}.')

    def model_options(self) -> dict[str, Any]:
        options = super().model_options()
        if 'img_size' in options:
            options['img_size'] = pair(options['img_size'])
        return options


@dataclass
class InputChannels(Settings):
    """Channels of images as a model takes them."""
    in_chans: int | None = option(None, 'image channels: 3, or 1 for grey', model=True)


@dataclass
class TrainedEncoder(Settings):
    """How an encoder is trained as a whole."""
    drop_path_rate: float | None = option(None, 'stochastic depth of the encoder', model=True, least=0, most=1)
    grad_checkpointing: bool = option(False, 'recompute blocks in the backward pass to save memory', group='machine')


@dataclass
class ImageData(Settings):
    """Images to train on and to report on."""
    help_group = 'data'

    data_dir: str | None = option(
        None, 'folder of images, flat or one folder a class, with or without splits', free=True)
    train_split: str = option('train', 'split to train on')
    eval_split: str | None = option(None, 'split to report on; without one, a fifth of the labelled training images')
    train_images: int | None = option(
        None, 'training images to use at most, drawn by the seed; all of them by default', least=1)
    max_corrupt: float = option(
        0.0, 'part of the training images that may be unreadable; others stand in for them', free=True, least=0, most=1)
    check_images: int = option(
        10000, 'images of a folder decoded before training, to find unreadable ones; 0, only file names', free=True,
        least=0)
    hflip: float = option(0.5, 'probability of a horizontal flip', least=0, most=1)

    def check(self) -> None:
        super().check()
        if self.data_dir == '':
            raise ConfigError("data_dir is '', perhaps of an unset variable: name a folder, or leave it out.")

    @property
    def data_name(self) -> str:
        """What results call the data."""
        return Path(self.data_dir or '').name


@dataclass
class NamedData(ImageData):
    """Images by the name of a data set, with labels where there are any."""
    dataset: str | None = option(
        None, 'digits, folder (by default with --data-dir), or a timm data set name: torch/NAME, hfds/NAME, wds/NAME')
    image_column: str | None = option(
        None, 'column of the images (hfds, hfids), or ending (wds); by default the one there is')
    label_column: str | None = option(None, 'column of the labels (hfds); by default the one there is')
    download: bool = option(False, 'let torch/... data sets download themselves', free=True)
    crop_scale: tuple[float, float] | None = option(None, 'least and greatest area of random crops')

    def check(self) -> None:
        super().check()
        if self.crop_scale is not None and not (len(self.crop_scale) == 2
                                                and 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1):
            raise ConfigError(f'crop_scale is two areas between 0 and 1, the smaller first; got {self.crop_scale}.')

    @property
    def data_name(self) -> str:
        return self.dataset or ''


class Length(NamedTuple):
    """How long a run is: in optimizer steps, and in passes over its images, begun ones counted as whole. Between
    evaluations are `eval_every` steps; 0, it evaluates only at the end."""
    steps: int
    eval_every: int
    epochs: int


@dataclass
class Training(SeedAndFolder):
    """What everything that trains takes. How long is a matter of `InEpochs` and `InSteps`."""
    help_group = 'optimisation'
    #: Images that the learning rate is given for.
    images_of_rate: ClassVar[int] = 256
    #: What the length of the warm-up is called.
    warmup_setting: ClassVar[str]

    batch_size: int = option(256, 'images a forward pass, over all processes together', least=1)
    accumulate: int = option(1, 'forward passes an optimizer step; the batch of a step is their product', least=1)
    opt: str = option('adamw', 'optimizer, a timm name')
    lr: float = option(1e-3, 'learning rate for 256 images a step, scaled linearly', least=0)
    weight_decay: float = option(0.05, 'weight decay', least=0)
    min_lr: float = option(0.0, 'learning rate at the end of the schedule, scaled as the rate is', least=0)
    clip_grad: float | None = option(None, 'largest norm of the gradient', least=0)

    precision: str = option('auto', 'auto, float32 or bfloat16 autocast', group='machine')
    device: str = option('auto', 'auto, cpu, cuda, cuda:1, ...', group='machine')
    workers: int | None = option(
        None, 'processes that load images; by default none on a CPU, else up to 8', group='machine', free=True, least=0)

    log_every: int = option(20, 'steps a line of log.jsonl averages over', group='logging', free=True, least=1)
    checkpoint_every_steps: int = option(
        0, 'steps between checkpoints; 0, by time alone', group='logging', free=True, least=0)
    checkpoint_every_minutes: float = option(
        10.0, 'minutes between checkpoints; 0, by steps alone', group='logging', free=True, least=0)
    force_resume: bool = option(
        False, 'resume with other settings, processes or threads than the run began with', group='logging', free=True)
    tracker: str | None = option(None, 'wandb sends the lines of log.jsonl there too', group='logging', free=True)

    def check(self) -> None:
        super().check()
        if self.precision not in ('auto', 'float32', 'bfloat16'):
            raise ConfigError(f"precision is 'auto', 'float32' or 'bfloat16', got {self.precision!r}.")

    @property
    def data_name(self) -> str:
        """What errors call the data."""
        return 'the data'

    @property
    def loaders(self) -> int:
        """Processes that load images, once the trainer's `prepare` has settled how many."""
        return self.workers or 0

    @property
    def images_per_step(self) -> int:
        """Images of an optimizer step, over all processes."""
        return self.batch_size * self.accumulate

    def scaled(self, rate: float) -> float:
        """The learning rate of a step from that for `images_of_rate` images (RandSAC 5)."""
        return rate * self.images_per_step / self.images_of_rate

    def shorten_warmup(self) -> str:
        """Shorten a warm-up that takes more than half of the run to that, in place; what to say about it, or ''."""
        raise NotImplementedError

    def length(self, steps_per_epoch: int) -> Length:
        """How long the run is, where an epoch has `steps_per_epoch` optimizer steps."""
        raise NotImplementedError

    def schedule_options(self, steps_per_epoch: int) -> dict[str, Any]:
        """Arguments of timm's `create_scheduler_v2` that say how the rate rises and falls."""
        raise NotImplementedError

    # What the trainer asks of every run; where a run may have it otherwise, a part makes it a setting.
    # Without annotations, which would make settings of them.
    betas = cast('tuple[float, float] | None', None)
    layer_decay = cast('float | None', None)
    compile = cast(Auto, False)
    fsdp = False
    cuda_graph = cast(Auto, False)
    ema_decay = 0.0


@dataclass
class InEpochs(Training):
    """A run whose length is counted in passes over its images."""
    warmup_setting = 'warmup_epochs'

    epochs: int = option(100, 'passes over the training images', least=1)
    warmup_epochs: float = option(5, 'epochs of linear warm-up from 0, at most half of the run', least=0)
    eval_every: int = option(
        0, 'report accuracies every so many epochs; 0, only at the end', group='logging', free=True, least=0)

    def shorten_warmup(self) -> str:
        if self.warmup_epochs <= self.epochs / 2:
            return ''
        self.warmup_epochs = self.epochs / 2
        return f'Warm-up shortened to {self.warmup_epochs:g} epochs, half of the run.'

    def length(self, steps_per_epoch: int) -> Length:
        return Length(self.epochs * steps_per_epoch, self.eval_every * steps_per_epoch, self.epochs)

    def schedule_options(self, steps_per_epoch: int) -> dict[str, Any]:
        return {'sched': 'cosine', 'num_epochs': self.epochs - self.warmup_epochs,
                'warmup_epochs': self.warmup_epochs, 'updates_per_epoch': steps_per_epoch}


@dataclass
@adapted(lr=7e-4, batch_size=16, help={'lr': 'learning rate for 16 images a step, scaled linearly'})
class InSteps(Training):
    """A run whose length is counted in optimizer steps, as in dense prediction."""
    images_of_rate = 16
    warmup_setting = 'warmup_steps'

    steps: int = option(160000, 'optimizer steps', least=1)
    warmup_steps: int = option(1500, 'steps of linear warm-up from 0, at most half of the run', least=0)
    schedule: str = option('linear', 'how the learning rate falls after the warm-up: linear or cosine')
    eval_every: int = option(0, 'report every so many steps; 0, only at the end', group='logging', free=True, least=0)

    def check(self) -> None:
        super().check()
        if self.schedule not in ('linear', 'cosine'):
            raise ConfigError(f"schedule is 'linear' or 'cosine', got {self.schedule!r}.")

    def shorten_warmup(self) -> str:
        if self.warmup_steps <= self.steps // 2:
            return ''
        self.warmup_steps = self.steps // 2
        return f'Warm-up shortened to {self.warmup_steps} steps, half of the run.'

    def length(self, steps_per_epoch: int) -> Length:
        return Length(self.steps, self.eval_every, -(-self.steps // steps_per_epoch))

    def schedule_options(self, steps_per_epoch: int) -> dict[str, Any]:
        return {'sched': {'linear': 'poly', 'cosine': 'cosine'}[self.schedule],
                'num_epochs': self.steps - self.warmup_steps, 'warmup_epochs': self.warmup_steps,
                'updates_per_epoch': 1}


@dataclass
class Adam(Training):
    """An optimizer of Adam's kind."""
    betas: tuple[float, float] = option((0.9, 0.999), 'Adam\'s betas')

    def check(self) -> None:
        super().check()
        if len(self.betas) != 2:
            raise ConfigError(f'betas are two numbers, got {self.betas}.')


@dataclass
class EndToEnd(Adam):
    """A pretrained encoder trained with what is put on it."""
    layer_decay: float = option(0.65, 'factor of the learning rate from a block to the one below', least=0, most=1)


@dataclass
class Compiled(Training):
    """A network that torch.compile can take."""
    compile: Auto = option(False, 'compile the network with torch.compile', group='machine')


@dataclass
class Sharded(Training):
    """A model that may be too large for one device."""
    fsdp: bool = option(False, 'shard model and optimizer over the processes of torchrun (FSDP2), for ViT-L and up',
                        group='machine')
