"""What an encoder attends to, computed from its last block's queries and keys, and pictures of it."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from PIL import Image
from timm.layers import Attention
from timm.models.vision_transformer import Block, VisionTransformer
from torch import nn

from ..data.transforms import ImageSpec
from ..errors import ModelError
from ..models.interface import attention_of, blocks_of
from .panels import HEAT, displayed, label_panel, note, panel_grid, show_image, show_pixels


def with_attention(encoder: nn.Module) -> VisionTransformer:
    """An encoder in whose last block attention can be computed outside it; raises ModelError for a model that is no
    timm VisionTransformer of plain blocks."""
    if isinstance(encoder, VisionTransformer):
        last = encoder.blocks[-1]
        if type(last) is Block and type(last.attn) is Attention:
            return encoder
    raise ModelError('Attention maps are of timm\'s VisionTransformer with plain blocks, and this model is a '
                     f'{type(encoder).__name__}.')


@torch.no_grad()
def attention_weights(encoder: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Attention of the encoder's last block on images [B, C, H, W], normalised: from every token (rows, class and
    register tokens first) to every token, [B, heads, N, N]; rows sum to 1. Raises ModelError as `with_attention`."""
    encoder = with_attention(encoder)
    was_training = encoder.training
    encoder.eval()
    x = encoder.patch_embed(images.to(next(encoder.parameters()).device))
    x = encoder.norm_pre(encoder.patch_drop(encoder._pos_embed(x)))
    *blocks, last = blocks_of(encoder)
    for block in blocks:
        x = block(x)
    attention = attention_of(last)
    q, k, _ = attention.qkv(last.norm1(x)).unflatten(-1, (3, attention.num_heads, -1)).unbind(2)  # [B, N, H, D]
    q, k = attention.q_norm(q), attention.k_norm(k)
    encoder.train(was_training)
    return (attention.scale * q.transpose(1, 2) @ k.permute(0, 2, 3, 1)).softmax(-1).float().cpu()


def attention_maps(encoder: VisionTransformer, weights: torch.Tensor) -> torch.Tensor:
    """What attention weights [B, heads, N, N] give each patch, in multiples of even attention, [B, heads, rows,
    columns]: the class token's attention where there is one, else the average over all patches."""
    prefix = encoder.num_prefix_tokens
    rows = weights[:, :, 0] if encoder.cls_token is not None else weights[:, :, prefix:].mean(2)
    return (rows[..., prefix:] * weights.shape[-1]).unflatten(-1, encoder.patch_embed.grid_size)


def attention_figure(
        encoders: Sequence[tuple[str, VisionTransformer]], images: torch.Tensor, spec: ImageSpec, path: Path, name: str,
) -> None:
    """What the last block attends to (SAIM Figure 2): the mean over heads for each encoder, and heads of the last one.

    Args:
        encoders: Pairs of a heading and an encoder, such as an untrained and a pretrained one.
        images: [B, C, H, W], normalised, which `spec` undoes.

    Raises:
        ModelError: as `with_attention`.
    """
    maps = [attention_maps(encoder, attention_weights(encoder, images)) for _, encoder in encoders]
    (last_heading, last), heads, depth = encoders[-1], maps[-1].shape[1], len(encoders[-1][1].blocks)
    columns = [(f'{heading}, mean', part.mean(1)) for (heading, _), part in zip(encoders, maps)]
    columns += [(f'{last_heading}, head {head + 1}', maps[-1][:, head]) for head in range(min(heads, 4))]
    query = 'of the class token' if last.cls_token is not None else 'averaged over all patches'
    alone = f'the first 4 of {heads} heads' if heads > 4 else 'each head'
    caption = (f'Attention {query}, in block {depth} of {depth}: mean over {heads} heads, and {alone}. '
               'Coloured is what gets more than an even share, up to the multiple of it that each map names (at least '
               '2).')
    figure, axes = panel_grid(len(images), len(columns) + 1, spec.size, 'Attention of the last block', name, caption)
    for row, image in enumerate(images):
        show_image(axes[row, 0], image, spec)
        grey = (38 + 0.6 * displayed(image, spec).mean(-1, keepdims=True).repeat(3, -1)).astype(np.uint8)
        for axis, (_, values) in zip(axes[row, 1:], columns):
            show_pixels(axis, grey)
            _overlay(axis, values[row].numpy())
    for axis, text in zip(axes[0], ('image', *(text for text, _ in columns))):
        label_panel(axis, text)
    figure.savefig(path)


def _overlay(axis: Axes, values: np.ndarray) -> None:
    """Attention [rows, columns] in multiples of even attention over an image: clear up to 1, opaque at the largest."""
    most = values.max()
    _, width, height, _ = axis.images[0].get_extent()
    columns, rows = (max(int(side * 256 / max(width, height)), 1) for side in (width, height))
    coarse = Image.fromarray(((values - 1) / (max(most, 2) - 1)).astype(np.float32))
    excess = np.asarray(coarse.resize((columns, rows), Image.Resampling.BICUBIC)).clip(0, 1)
    colours = np.asarray(HEAT(excess))
    colours[..., 3] = 0.95 * excess ** 0.7
    axis.imshow(colours, extent=(0, width, height, 0), interpolation='bilinear')
    note(axis, f'{most:.1f}×')
