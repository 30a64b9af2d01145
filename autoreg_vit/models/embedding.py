"""The patch embedding of a pretraining model: of patches in sorted order, by one product."""

import torch
from timm.layers import PatchEmbed
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.nn import functional as F

from ..serialization import Layout
from .attention import is_untouched
from .interface import positions_of


def embed_patches(encoder: VisionTransformer, images: torch.Tensor, layout: Layout) -> torch.Tensor:
    """Patches of images [B, C, H, W] that the encoder takes, embedded with their positions, [B, encoded, D] in sorted
    order.

    A convolution whose windows tile the image is a product of patches and its weight: pixels are sorted, for which no
    gradient is needed, and only patches that are encoded are multiplied. A patch embedding or projection that is
    wrapped, hooked or of another kind is called as it is, with whole images.
    """
    embed, positions = encoder.patch_embed, positions_of(encoder)[:, encoder.num_prefix_tokens:]
    if not _is_product(embed, images):
        return layout.sort(embed(images) + positions, layout.encoded)
    projection = embed.proj
    patches = layout.sort(unfold(images, projection.kernel_size), layout.encoded)
    x = F.linear(patches, projection.weight.flatten(1), projection.bias)
    return embed.norm(x) + layout.sort(positions, layout.encoded)


def unfold(images: torch.Tensor, patch_size: tuple[int, ...]) -> torch.Tensor:
    """Images [B, C, H, W] to patches [B, N, C * P * P] in raster order, channels first inside a patch, as the weight of
    a convolution has them."""
    height, width = patch_size
    x = images.unflatten(3, (-1, width)).unflatten(2, (-1, height))  # [B, C, rows, P, columns, P]
    return x.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def _is_product(embed: nn.Module, images: torch.Tensor) -> bool:
    """Whether a patch embedding is nothing but a projection of the patches of these images, and a norm."""
    if type(embed) is not PatchEmbed or type(embed.proj) is not nn.Conv2d:
        return False
    projection = embed.proj
    return (is_untouched(embed) and is_untouched(projection) and embed.flatten
            and tuple(images.shape[1:]) == (projection.in_channels, *(embed.img_size or ()))
            and projection.kernel_size == projection.stride == tuple(embed.patch_size)
            and projection.padding == (0, 0) and projection.dilation == (1, 1) and projection.groups == 1)
