"""What the versions of other packages differ in: one function each, with the version from which on it can go."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from PIL import Image, ImageOps
from timm.layers import resample_abs_pos_embed_nhwc
from timm.models import adapt_input_conv
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.nn.parallel import DistributedDataParallel


@torch.no_grad()
def refit_positions(encoder: VisionTransformer, before: nn.Parameter | None, grid: tuple[int, int]) -> None:
    """Complete VisionTransformer.set_input_size, given the position embedding and grid before it. Until timm 1.0.31 it
    leaves positions as they are where the new grid has as many tokens, and makes frozen ones trainable."""
    if before is None or encoder.pos_embed is None:
        return
    size = encoder.patch_embed.grid_size
    if encoder.pos_embed is before and size != grid:
        prefix = 0 if encoder.no_embed_class else encoder.num_prefix_tokens
        resized = resample_abs_pos_embed_nhwc(before[:, prefix:].unflatten(1, grid), list(size)).flatten(1, 2)
        encoder.pos_embed = nn.Parameter(torch.cat([before[:, :prefix], resized], dim=1))
    encoder.pos_embed.requires_grad_(before.requires_grad)


def adapts_any_channels() -> bool:
    """Whether timm adapts a patch embedding from any number of channels to any other. Before 1.0.31 it takes weights to
    have three."""
    return 'base_chans' in inspect.signature(adapt_input_conv).parameters


def loads_channels(channels: int) -> bool:
    """Whether every timm loads weights of so many channels into a model of as many. Before 1.0.31 it takes them to have
    three, and leaves others than one and three out in favour of random ones."""
    return channels in (1, 3)


def counted_readers(workers: int) -> int:
    """Loader processes as a stream counts them. Before timm 1.0.31 none would count as no reader at all."""
    return max(workers, 1)


def mixed_shards(shuffle: Callable[..., Any], shards: int, readers: int) -> dict[str, int]:
    """Options by which shuffling a streamed data set leaves a part for every reader. From datasets 5 on it mixes
    several parts into one; up to 4 it knows no such option, and needs none."""
    if 'max_buffer_input_shards' not in inspect.signature(shuffle).parameters:
        return {}
    return {'max_buffer_input_shards': max(1, min(10, shards // readers))}


def own_buffers() -> dict[str, Any]:
    """The option by which DistributedDataParallel leaves each process its own buffers. From PyTorch 2.15 on it has
    another name."""
    renamed = 'forward_sync_buffers' in inspect.signature(DistributedDataParallel.__init__).parameters
    return {'forward_sync_buffers' if renamed else 'broadcast_buffers': False}


def posterize(image: Image.Image, bits: int, **kwargs: Any) -> Image.Image:
    """Keep the upper bits of each value. timm's policies ask for none at their largest magnitude, which Pillow took for
    black up to version 11 and refuses since."""
    if bits >= 8:
        return image
    return ImageOps.posterize(image, bits) if bits > 0 else image.point(lambda value: 0)


def decode_jpeg(file: torch.Tensor, grey: bool) -> torch.Tensor:
    """The picture of a JPEG file's bytes, uint8 [1 or 3, height, width], by the operator that torchvision registers
    where it is built with one. From 0.29 on torchvision's function around it warns at each image that it is deprecated,
    for torchcodec; with torchvision's decoders this goes too.

    Raises:
        RuntimeError: for what it does not decode, and where there is no such operator.
    """
    if not hasattr(torch.ops.image, 'decode_jpeg'):
        raise RuntimeError('torchvision decodes no JPEG')
    return torch.ops.image.decode_jpeg(file, 1 if grey else 3)  # torchvision's numbers of grey and RGB
