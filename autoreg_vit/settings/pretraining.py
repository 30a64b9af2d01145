"""Settings of `autoreg-vit pretrain`."""

from dataclasses import dataclass
from typing import Any

from ..errors import ConfigError, suggest
from ..ops import IMPLEMENTATIONS
from .base import Auto, adapted, option
from .parts import Adam, Compiled, InEpochs, InputChannels, InputSize, NamedData, Sharded, TrainedEncoder


@dataclass
class Design(InputChannels, InputSize):
    """The model of a pretraining run: encoder, serialization, decoder and target."""
    model: str = option('randsac_vit_tiny_patch4_32', 'pretraining model, a timm name')
    patch_size: int | None = option(None, 'patch size in pixels', model=True)
    embed_dim: int | None = option(None, 'encoder width', model=True)
    depth: int | None = option(None, 'encoder blocks', model=True)
    num_heads: int | None = option(None, 'encoder heads', model=True)
    serialization: str | None = option(
        None, 'order of prediction: raster, prefix_raster (AIM), random, squares or blobs', model=True)
    segments: tuple[int, ...] | None = option(
        None, 'segments of squares or blobs per level, finest first: 11 5', model=True)
    shuffle: bool | None = option(None, 'break the coherence of segments (RandSAC Table 6)', model=True)
    segment_order: str | None = option(
        None, 'squares or blobs one after the other: random or raster (XTRA)', model=True)
    decoder: str | None = option(None, 'masked, parallel or none', model=True)
    decoder_depth: int | None = option(None, 'decoder layers', model=True)
    decoder_dim: int | None = option(None, 'decoder width', model=True)
    decoder_heads: int | None = option(None, 'decoder heads', model=True)
    memory: str | None = option(
        None, 'what the decoder reads: mix or last (masked), output or input (parallel)', model=True)
    mix_init: str | None = option(None, 'what the mix of memory=mix starts as: last or uniform', model=True)
    shared: bool | None = option(None, 'decode with the encoder\'s own weights (two-stream)', model=True)
    first_segment: str | None = option(
        None, 'what the first segment is predicted from: self or none; given leaves it out of the loss (AIM)',
        model=True)
    encode_ratio: float | None = option(
        None, 'part of the tokens, the first to be predicted, that the encoder takes', model=True)
    encode_last: bool | None = option(
        None, 'encode the last segment, which no prediction reads; the loss is the same if it is left out', model=True)
    head: str | None = option(None, 'prediction head: linear or mlp', model=True)
    norm_pix: bool | None = option(None, 'normalise target patches', model=True)
    blur: tuple[float, ...] | None = option(
        None, 'kernel size and sigma of the target\'s blur; 0 turns it off', model=True)

    def model_options(self) -> dict[str, Any]:
        options = super().model_options()
        if 'blur' in options and options['blur'][0] == 0:
            options['blur'] = False
        return options


@dataclass
@adapted(max_corrupt=0.001, warmup_epochs=10, compile='auto', help={
    'compile': 'compile the network with torch.compile; auto does it on a GPU, for a run of some minutes and more',
    'crop_scale': 'area of random crops; by default 0.2 1.0 (RandSAC 5) or 0.67 1.0 (SAIM)',
    'train_images': 'training images to use at most, drawn by the seed, all of them by default; of a stream, the '
                    'images of an epoch',
    'eval_every': 'report accuracies every so many epochs; 0, only before and after training'})
class PretrainConfig(TrainedEncoder, Design, NamedData, InEpochs, Adam, Compiled, Sharded):
    """Settings of `autoreg-vit pretrain`. What is None is left to the model's or the paper's own default."""
    eval_images: int = option(
        10000, 'images used for accuracies at most, of either split', group='data', free=True, least=1)
    residual_in_fp32: Auto = option(
        'auto', 'under bfloat16 autocast, keep the sum that blocks add to in float32; auto does so in runs that began '
        'before there was a choice', group='machine', before=True)
    impl: str = option('auto', f'segment attention: auto, {", ".join(IMPLEMENTATIONS)}', group='machine')
    reader: str = option(
        'auto', 'what decodes and crops images: torchvision (JPEG files; others as pil), pil, or auto', group='data',
        before='pil')
    cache_on_device: Auto = option(
        'auto', 'keep all images on the device as uint8, and crop and flip them there; auto does it on a GPU, for '
        'small images of one size', group='machine')
    cuda_graph: Auto = option(
        'auto', 'replay each step as a CUDA graph; auto does it on a GPU, with one process and adamw, and several '
        'average their gradients after the backward pass then, not during it', group='machine')

    def check(self) -> None:
        super().check()
        if self.reader not in (readers := ['auto', 'torchvision', 'pil']):
            raise ConfigError(f"reader is 'auto', 'torchvision' or 'pil', got {self.reader!r}. "
                              f'{suggest(self.reader, readers)}')
        if self.reader == 'torchvision' and self.cache_on_device is True:
            raise ConfigError('cache_on_device keeps images as pil reads them, and crops them on the device: leave '
                              '--cache-on-device or --reader torchvision out.')

    @property
    def is_saim(self) -> bool:
        """Whether the model is one of SAIM's, whose augmentation and figures differ from RandSAC's."""
        return self.model.startswith('saim')
