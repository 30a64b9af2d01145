"""Attention in windows, which makes a plain ViT affordable on large images (Li et al. 2021, "Benchmarking Detection
Transfer Learning with Vision Transformers")."""

import torch
from timm.layers import Attention
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from ...errors import ModelError
from ..interface import attention_of, blocks_of


class WindowedAttention(nn.Module):
    """A timm attention among the tokens of each window, in place of one among all tokens.

    The grid is cut into squares from its upper left; those at the right and lower edge hold what is left, so that
    nothing is padded and nothing masked. Prefix tokens (class, registers) belong to every window, and their output is
    the mean of what they become in each. One window as large as the grid is plain attention.

    Args:
        attention: What each window goes through, [B, N, C] to [B, N, C].
        window: Rows and columns of a window.
        prefix: How many prefix tokens stand before the grid's.
    """

    def __init__(self, attention: nn.Module, grid: tuple[int, int], window: int, prefix: int = 0):
        super().__init__()
        self.attention, self.grid, self.window, self.prefix = attention, grid, window, prefix

    def forward(self, x: torch.Tensor, attn_mask: torch.Tensor | None = None, is_causal: bool = False) -> torch.Tensor:
        """From x [B, prefix + rows * columns, C] to the same shape."""
        if attn_mask is not None or is_causal:
            raise ModelError('Attention in windows takes no mask.')
        before, tokens = x[:, :self.prefix], x[:, self.prefix:].unflatten(1, self.grid)
        rows, windows = [], 0
        prefixes: torch.Tensor | int = 0
        for strip in _cut(tokens, 1, self.window):
            outputs = []
            for part in _cut(strip, 2, self.window):
                # [B, rows of windows, h, columns of windows, w, C]
                part = part.unflatten(2, (-1, min(self.window, part.shape[2]))).unflatten(
                    1, (-1, min(self.window, part.shape[1])))
                batch, down, height, across, width, channels = part.shape
                count = down * across
                part = part.transpose(2, 3).reshape(batch * count, height * width, channels)
                if self.prefix:
                    part = torch.cat([before.repeat_interleave(count, dim=0), part], dim=1)
                part = self.attention(part)
                windows += count
                prefixes = prefixes + part[:, :self.prefix].unflatten(0, (batch, count)).sum(1)
                part = part[:, self.prefix:].reshape(batch, down, across, height, width, channels)
                outputs.append(part.transpose(2, 3).flatten(3, 4).flatten(1, 2))
            rows.append(torch.cat(outputs, dim=2))
        tokens = torch.cat(rows, dim=1).flatten(1, 2)
        if not self.prefix:
            return tokens
        return torch.cat([torch.as_tensor(prefixes) / windows, tokens], dim=1)


def use_windows(encoder: VisionTransformer, window: int, global_blocks: tuple[int, ...]) -> None:
    """Give all blocks of a timm ViT for images of one size but those numbered `global_blocks` attention in windows of
    `window` rows and columns of tokens, in place.

    Raises:
        ModelError: for an encoder whose blocks have no plain timm attention.
    """
    for number, block in enumerate(blocks_of(encoder)):
        if number in global_blocks:
            continue
        if not isinstance(getattr(block, 'attn', None), Attention):
            raise ModelError(f'Block {number} of {type(encoder).__name__} has no plain timm Attention to put windows '
                             'around: use attention=global, or a Vision Transformer.')
        block.attn = WindowedAttention(attention_of(block), tuple(encoder.patch_embed.grid_size), window,
                                       encoder.num_prefix_tokens)


def _cut(x: torch.Tensor, dim: int, window: int) -> list[torch.Tensor]:
    """The part of `x` that whole windows fill along `dim`, and what is left, where there is any."""
    whole = x.shape[dim] // window * window
    return [part for part in x.split([whole, x.shape[dim] - whole], dim) if part.shape[dim]]
