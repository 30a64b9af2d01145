"""Settings of `autoreg-vit pretrain`."""

from dataclasses import dataclass, fields
from typing import Any

from ..errors import ConfigError
from ..ops import IMPLEMENTATIONS
from .base import convert_fields, option


@dataclass
class PretrainConfig:
    """Settings of `autoreg-vit pretrain`. What is None is left to the model's or the paper's own default."""

    model: str = option('randsac_vit_tiny_patch4_32', 'pretraining model, a timm name')
    img_size: tuple[int, ...] | None = option(None, 'image height and width in pixels, or one number for both')
    patch_size: int | None = option(None, 'patch size in pixels')
    in_chans: int | None = option(None, 'image channels: 3, or 1 for grey')
    embed_dim: int | None = option(None, 'encoder width')
    depth: int | None = option(None, 'encoder blocks')
    num_heads: int | None = option(None, 'encoder heads')
    serialization: str | None = option(
        None, 'order of prediction: raster, prefix_raster (AIM), random, squares or blobs')
    segments: tuple[int, ...] | None = option(None, 'segments of squares or blobs a level, finest first: 11 5')
    shuffle: bool | None = option(None, 'break the coherence of segments (RandSAC Table 6)')
    segment_order: str | None = option(None, 'squares or blobs one after the other: random or raster (XTRA)')
    decoder: str | None = option(None, 'masked, parallel or none')
    decoder_depth: int | None = option(None, 'decoder layers')
    decoder_dim: int | None = option(None, 'decoder width')
    decoder_heads: int | None = option(None, 'decoder heads')
    memory: str | None = option(None, 'what the decoder reads: mix or last (masked), output or input (parallel)')
    mix_init: str | None = option(None, 'what the mix of memory=mix starts as: last or uniform')
    shared: bool | None = option(None, 'decode with the encoder\'s own weights (two-stream)')
    first_segment: str | None = option(
        None, 'what the first segment is predicted from: self or none; given leaves it out of the loss (AIM)')
    encode_ratio: float | None = option(None, 'part of the tokens, the first to be predicted, that the encoder takes')
    encode_last: bool | None = option(
        None, 'encode the last segment, which no prediction reads; without it the loss is the same')
    head: str | None = option(None, 'prediction head: linear or mlp')
    norm_pix: bool | None = option(None, 'normalise target patches')
    blur: tuple[float, ...] | None = option(None, 'kernel size and sigma of the target\'s blur; 0 turns it off')
    drop_path_rate: float | None = option(None, 'stochastic depth of the encoder')
    grad_checkpointing: bool = option(False, 'recompute blocks in the backward pass to save memory')

    dataset: str | None = option(
        None, 'digits, folder (the default with --data-dir), or a timm data set name: torch/NAME, hfds/NAME, wds/NAME')
    data_dir: str | None = option(
        None, 'folder of images, flat or one folder a class, with or without splits', free=True)
    image_column: str | None = option(
        None, 'column of the images (hfds, hfids), or ending (wds); by default the one there is')
    label_column: str | None = option(None, 'column of the labels (hfds); by default the one there is')
    train_split: str = option('train', 'split to train on')
    train_images: int | None = option(
        None, 'training images to use at most, drawn by the seed; of a stream, the images of an epoch')
    eval_split: str | None = option(
        None, 'split to report accuracies on; without one, a fifth of the labelled training images')
    eval_images: int = option(10000, 'images used for accuracies at most, of either split', free=True)
    eval_every: int = option(0, 'report accuracies every so many epochs; 0, only before and after training', free=True)
    download: bool = option(False, 'let torch/... data sets download themselves', free=True)
    workers: int | None = option(None, 'processes that load images; none on a CPU by default, else up to 8', free=True)
    max_corrupt: float = option(0.001, 'part of the images that may be unreadable; others stand in for them', free=True)
    check_images: int = option(
        10000, 'images of a folder decoded before training, to find unreadable ones; 0, only file names', free=True)
    crop_scale: tuple[float, ...] | None = option(
        None, 'area of random crops; by default 0.2 1.0 (RandSAC 5) or 0.67 1.0 (SAIM)')
    hflip: float = option(0.5, 'probability of a horizontal flip')

    epochs: int = option(100, 'passes over the training images')
    batch_size: int = option(256, 'images a forward pass, over all processes together')
    accumulate: int = option(1, 'forward passes an optimizer step; the batch of a step is their product')
    fsdp: bool = option(False, 'shard model and optimizer over the processes of torchrun (FSDP2), for ViT-L and up')
    compile: bool = option(False, 'compile the model with torch.compile')
    cache_on_device: bool = option(
        False, 'keep all images on the device as uint8, and crop and flip them there: for small images of one size')
    cuda_graph: bool = option(
        False, 'replay each step as one CUDA graph, for small models; one process, adamw, no accumulation')
    opt: str = option('adamw', 'optimizer, a timm name')
    lr: float = option(1e-3, 'learning rate for 256 images a step, scaled linearly')
    weight_decay: float = option(0.05, 'weight decay')
    betas: tuple[float, ...] = option((0.9, 0.999), 'Adam\'s betas')
    warmup_epochs: float = option(10, 'epochs of linear warm-up from 0')
    precision: str = option('auto', 'auto, float32 or bfloat16 autocast')
    impl: str = option('auto', f'segment attention: auto, {", ".join(IMPLEMENTATIONS)}')
    seed: int = option(0, 'seed of initialisation, order of images, augmentation and ranks')
    device: str = option('auto', 'auto, cpu, cuda, cuda:1, ...')
    log_every: int = option(20, 'steps a line of log.jsonl averages over', free=True)
    output_dir: str | None = option(
        None, 'folder of the run; the same command with the same folder resumes; by default a new one under runs/',
        free=True)
    checkpoint_every_steps: int = option(0, 'steps between checkpoints; 0, by time alone', free=True)
    checkpoint_every_minutes: float = option(10.0, 'minutes between checkpoints; 0, by steps alone', free=True)
    force_resume: bool = option(
        False, 'resume with other settings, processes or threads than the run began with', free=True)
    tracker: str | None = option(None, 'wandb sends the lines of log.jsonl there too', free=True)

    def __post_init__(self):
        convert_fields(self)
        for name in ('epochs', 'batch_size', 'accumulate', 'eval_images', 'log_every', 'train_images'):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ConfigError(f'{name} must be at least 1, got {getattr(self, name)}.')
        for name in ('lr', 'weight_decay', 'warmup_epochs', 'eval_every', 'checkpoint_every_steps',
                     'checkpoint_every_minutes', 'check_images', 'workers'):
            if getattr(self, name) is not None and getattr(self, name) < 0:
                raise ConfigError(f'{name} cannot be negative, got {getattr(self, name)}.')
        if not 0 <= self.max_corrupt <= 1:
            raise ConfigError(f'max_corrupt is a part between 0 and 1, got {self.max_corrupt}.')
        if not 0 <= self.hflip <= 1:
            raise ConfigError(f'hflip is a probability between 0 and 1, got {self.hflip}.')
        if self.crop_scale is not None and not (len(self.crop_scale) == 2
                                                and 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1):
            raise ConfigError(f'crop_scale is two areas between 0 and 1, the smaller first; got {self.crop_scale}.')
        if self.img_size is not None and len(self.img_size) not in (1, 2):
            raise ConfigError(f'img_size is one number or height and width, got {self.img_size}.')
        if len(self.betas) != 2:
            raise ConfigError(f'betas are two numbers, got {self.betas}.')
        if self.precision not in ('auto', 'float32', 'bfloat16'):
            raise ConfigError(f"precision is 'auto', 'float32' or 'bfloat16', got {self.precision!r}.")

    def model_options(self) -> dict[str, Any]:
        """Keyword arguments for `timm.create_model` that were given."""
        names = [f.name for f in fields(self)]
        names = names[names.index('img_size'):names.index('grad_checkpointing')]
        options = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        if 'img_size' in options:
            options['img_size'] = options['img_size'] * 2 if len(options['img_size']) == 1 else options['img_size']
        if 'blur' in options and options['blur'][0] == 0:
            options['blur'] = False
        return options
