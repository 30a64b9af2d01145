"""The neck of dense prediction: the one scale of a Vision Transformer becomes maps of strides 4, 8, 16 and 32.

Two doors lead on from it: `register_smp_encoder` gives it to segmentation-models-pytorch, and `DetectionBackbone` to
torchvision's detection.
"""

import math
import re
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import torch
from timm.layers import LayerNorm2d
from timm.models import FeatureInfo
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.nn.functional import pad
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from ..._compat import refit_positions
from ...errors import ModelError
from ..encoders import check_sizes, pair

#: What heads are built for: UPerNet predicts at a quarter of the image, and the anchors and levels of Mask R-CNN begin
#: at stride 4. Cost decides too: at patch 4 a map of the image's own size would have 16 times the tokens.
STRIDES = (4, 8, 16, 32)


class FeaturePyramid(nn.Module):
    """Maps of strides 4, 8, 16 and 32 from a timm ViT, after its blocks at a quarter, half, three quarters and the end
    of the depth. Each is brought to its stride by powers of two: at patch 16 by two transposed convolutions, one, none,
    and max-pooling, as in BEiT, whose setting both papers take over (RandSAC C, SAIM "Semantic segmentation on
    ADE20K"); at patch 4 by none and max-pooling alone; and so on.

    Maps are the residual stream as it leaves the blocks, without the encoder's final norm, as in BEiT: heads bring
    their own, smp's UPerNet a layer norm of each map, `DetectionBackbone` one after each convolution. Between two
    transposed convolutions stands a layer norm where BEiT has a batch norm, so that no map depends on the other images
    of a batch.

    Args:
        encoder: Made with `dynamic_img_size=True`; changed in place. Its final norm and head are removed, since nothing
            reads them, and a patch that is no power of two is resampled to the nearest one by timm's own means (14 to
            16), so that strides are exact.
        img_size: Height and width in pixels to which positions are interpolated once and for all; for other images they
            are interpolated in each forward pass. By default the encoder's own.

    Attributes:
        feature_info: timm's description of the maps: `channels()`, `reduction()`, `module_name()`.
        multiple: Images are padded with zeros, right and below, to a multiple of so many pixels.

    Raises:
        ModelError: for an encoder that is no timm VisionTransformer, takes one image size alone or has patches that are
            not square.
        ShapeError: for an `img_size` that is not a whole number of patches.
    """

    def __init__(self, encoder: VisionTransformer, img_size: int | tuple[int, int] | None = None):
        super().__init__()
        patch = _fit(encoder, img_size)
        depth, width = len(encoder.blocks), encoder.embed_dim
        self.blocks = _spread(depth, len(STRIDES))
        encoder.prune_intermediate_layers([depth - 1], prune_norm=True)
        self.encoder = encoder
        self.levels = nn.ModuleList(_resample(width, patch, stride) for stride in STRIDES)
        self.multiple = max(patch, STRIDES[-1])
        self.feature_info = FeatureInfo(
            [dict(num_chs=width, reduction=s, module=f'levels.{i}') for i, s in enumerate(STRIDES)], (0, 1, 2, 3))

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        """Maps [B, C, ceil(H / s), ceil(W / s)] of images [B, in_chans, H, W] for strides s = 4, 8, 16, 32."""
        return self.maps(images, self.blocks, self.levels, STRIDES)

    def maps(
            self, images: torch.Tensor, blocks: Sequence[int], levels: Iterable[nn.Module],
            strides: Sequence[int]) -> list[torch.Tensor]:
        """Maps of images [B, in_chans, H, W] after some blocks, each brought to its stride by its level."""
        height, width = images.shape[-2:]
        images = pad(images, (0, -width % self.multiple, 0, -height % self.multiple))
        taken = sorted(set(blocks))  # with fewer blocks than levels some serve two of them
        outputs = cast('list[torch.Tensor]', self.encoder.forward_intermediates(
            images, indices=taken, intermediates_only=True))
        maps = [level(outputs[taken.index(block)]) for level, block in zip(levels, blocks)]
        return [m[..., :-(-height // s), :-(-width // s)] for m, s in zip(maps, strides)]


def _spread(depth: int, count: int) -> list[int]:
    """The last block of each of `count` parts of the depth."""
    return [math.ceil(depth * part / count) - 1 for part in range(1, count + 1)]


def _fit(encoder: VisionTransformer, img_size: int | tuple[int, int] | None) -> int:
    """Bring an encoder to a power of two as its patch and to `img_size`; returns the patch in pixels."""
    if not isinstance(encoder, VisionTransformer) or not hasattr(encoder.patch_embed, 'proj'):
        raise ModelError(f'The neck takes a timm VisionTransformer, such as vit_base_patch16_224, got '
                         f'{type(encoder).__name__}.')
    if not encoder.dynamic_img_size:
        raise ModelError('Dense prediction sees images of many sizes: create the encoder with dynamic_img_size=True.')
    height, width = encoder.patch_embed.patch_size
    if height != width:
        raise ModelError(f'The neck takes square patches, got {height} x {width} pixels.')
    patch = 2 ** round(math.log2(height))
    if img_size is not None:
        check_sizes(img_size, patch)
    if img_size is not None or patch != height:
        positions, grid = encoder.pos_embed, encoder.patch_embed.grid_size
        encoder.set_input_size(img_size=pair(img_size), patch_size=(patch, patch))
        refit_positions(encoder, positions, grid)
    return patch


def _resample(width: int, patch: int, stride: int) -> nn.Module:
    """From a map of stride `patch` to one of `stride`, both powers of two."""
    if patch < stride:
        return nn.MaxPool2d(stride // patch)
    layers: list[nn.Module] = []
    for _ in range(int(math.log2(patch // stride))):
        layers += [LayerNorm2d(width), nn.GELU(), nn.ConvTranspose2d(width, width, kernel_size=2, stride=2)]
    return nn.Sequential(*layers[2:])  # norm and activation stand between convolutions


class SmpEncoder(nn.Module):
    """A FeaturePyramid as an encoder of segmentation-models-pytorch: the image, an empty map of stride 2, as in smp's
    other transformers, and the pyramid's four, or the first ones where a head takes fewer, spread over all blocks.

    Args:
        depth: smp's `encoder_depth`, maps beside the image: 2 to 5.

    Raises:
        ModelError: for another depth.
    """

    def __init__(self, pyramid: FeaturePyramid, depth: int = 5):
        super().__init__()
        if depth not in range(2, len(STRIDES) + 2):
            raise ModelError(f'A Vision Transformer gives smp maps of strides 4, 8, 16 and 32, beside an empty one of '
                             f'stride 2: encoder_depth is 2 to 5, got {depth}.')
        self.pyramid = pyramid
        self.strides = list(STRIDES[:depth - 1])
        self.blocks = _spread(len(pyramid.encoder.blocks), len(self.strides))
        self.finer = nn.ModuleDict()  # levels in place of the pyramid's, by number; see make_dilated
        self.in_channels = pyramid.encoder.patch_embed.proj.in_channels
        self.out_channels = [self.in_channels, 0, *pyramid.feature_info.channels()[:depth - 1]]

    @property
    def output_stride(self) -> int:
        """Stride of the coarsest map."""
        return self.strides[-1]

    def make_dilated(self, output_stride: int) -> None:
        """smp's door to maps no coarser than `encoder_output_stride`, which DeepLabV3, DeepLabV3Plus and PAN ask for.
        Other encoders dilate their convolutions; here the coarser maps are brought to that stride, by levels of their
        own.

        Raises:
            ModelError: for a stride that no map has.
        """
        if output_stride not in STRIDES:
            raise ModelError(f'encoder_output_stride is one of {", ".join(map(str, STRIDES))}, got {output_stride}.')
        encoder = self.pyramid.encoder
        for number, stride in enumerate(self.strides):
            if stride > output_stride:
                self.strides[number] = output_stride
                self.finer[str(number)] = _resample(encoder.embed_dim, encoder.patch_embed.patch_size[0], output_stride)

    def set_in_channels(self, in_channels: int, pretrained: bool = True) -> None:
        """smp's door to other channels; the encoder brings its own.

        Raises:
            ModelError: for other ones.
        """
        if in_channels != self.in_channels:
            raise ModelError(f'in_channels={in_channels}, but the encoder was made for {self.in_channels}: create it '
                             f'with in_chans={in_channels}.')

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        """Maps of images [B, in_chans, H, W] of strides 1, 2, 4, 8, 16 and 32, up to the depth and output stride."""
        batch, _, height, width = images.shape
        finer = dict(self.finer.items())
        levels = [finer.get(str(i), level) for i, level in enumerate(self.pyramid.levels)]
        maps = self.pyramid.maps(images, self.blocks, levels, self.strides)
        return [images, images.new_empty(batch, 0, height // 2, width // 2), *maps]


class DenseNetwork:
    """Part of a network whose encoder is the module named `encoder_path`: what timm's optimizer factory asks it."""
    encoder_path: str

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Layers for timm's layer decay: the encoder's stem, its blocks, and all the rest at the full rate."""
        prefix = '^' + re.escape(self.encoder_path) + r'\.'
        return {'stem': prefix + r'(?:cls_token|reg_token|pos_embed|patch_embed|norm_pre)',
                'blocks': [(prefix + r'blocks\.(\d+)', None)]}

    def no_weight_decay(self) -> set[str]:
        """Parameters without weight decay beside those of one dimension."""
        encoder = cast(VisionTransformer, cast(nn.Module, self).get_submodule(self.encoder_path))
        return {f'{self.encoder_path}.{name}' for name in encoder.no_weight_decay()}


def register_smp_encoder(name: str, pyramid: FeaturePyramid) -> None:
    """Let segmentation-models-pytorch's models find a pyramid: `smp.UPerNet(name, encoder_weights=None, ...)`, and FPN,
    Unet and the others alike, but for DPT, which takes smp's own encoders alone, and FPN of less than its depth of 5,
    which would read the empty map, as of smp's other transformers. Models made with the name share the pyramid;
    registering another replaces it."""
    from segmentation_models_pytorch.encoders import encoders

    # What output_stride asks for, smp calls make_dilated for.
    encoders[name] = {'encoder': lambda depth, output_stride: SmpEncoder(pyramid, depth), 'params': {},
                      'pretrained_settings': {}}


class DetectionBackbone(nn.Module):
    """A FeaturePyramid as a backbone of torchvision's detection: a feature pyramid network on its maps gives them all
    one width, `out_channels`, and max-pooling adds a fifth of stride 64. After each convolution of the network stands a
    `norm_layer`, made with a number of channels.
    """

    def __init__(
            self, pyramid: FeaturePyramid, out_channels: int = 256,
            norm_layer: Callable[[int], nn.Module] = LayerNorm2d):
        super().__init__()
        self.pyramid, self.out_channels = pyramid, out_channels
        self.fpn = FeaturePyramidNetwork(
            pyramid.feature_info.channels(), out_channels, LastLevelMaxPool(), norm_layer=norm_layer)

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Maps '0' to '3' of strides 4 to 32 and 'pool' of stride 64, [B, out_channels, h, w]."""
        return self.fpn(OrderedDict((str(i), m) for i, m in enumerate(self.pyramid(images))))
