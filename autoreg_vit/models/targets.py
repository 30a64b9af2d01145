"""What is predicted: the pixels of each patch, raw or normalised, after an optional blur of the image."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..errors import ModelError, ShapeError


def patchify(images: torch.Tensor, patch_size: tuple[int, int]) -> torch.Tensor:
    """Images [B, C, H, W] to patches [B, N, P * P * C] in raster order, channels last inside a patch."""
    height, width = patch_size
    if images.shape[2] % height or images.shape[3] % width:
        raise ShapeError(f'Images of {images.shape[2]} x {images.shape[3]} pixels are not a whole number of patches of '
                         f'{height} x {width}.')
    x = images.unflatten(3, (-1, width)).unflatten(2, (-1, height))  # [B, C, rows, P, columns, P]
    return x.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def unpatchify(patches: torch.Tensor, grid: tuple[int, int], patch_size: tuple[int, int]) -> torch.Tensor:
    """Patches [B, N, P * P * C] in raster order to images [B, C, H, W]; the inverse of `patchify`."""
    x = patches.unflatten(1, grid).unflatten(3, (*patch_size, -1))  # [B, rows, columns, P, P, C]
    return x.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)


def gaussian_blur(images: torch.Tensor, kernel_size: int, sigma: float) -> torch.Tensor:
    """Images [B, C, H, W] under a Gaussian filter (SAIM Eq. 7), with zero padding as in SAIM's published code."""
    offsets = torch.arange(kernel_size, device=images.device, dtype=images.dtype) - kernel_size // 2
    kernel = torch.softmax(-offsets.square() / (2 * sigma ** 2), dim=0).expand(images.shape[1], 1, 1, -1)
    padding = kernel_size // 2
    rows = F.conv2d(images, kernel, padding=(0, padding), groups=images.shape[1])
    return F.conv2d(rows, kernel.transpose(2, 3), padding=(padding, 0), groups=images.shape[1])


def _check_blur(blur: Any) -> tuple[int, float]:
    try:
        kernel_size, sigma = blur
        if kernel_size % 2 == 1 and kernel_size > 0 and sigma > 0:
            return int(kernel_size), float(sigma)
    except (TypeError, ValueError):
        pass
    raise ModelError(f'blur is an odd kernel size and a positive sigma in pixels, such as (9, 1.0); got {blur!r}.')


class PixelTarget(nn.Module):
    """Target and loss of pixel prediction.

    Args:
        patch_size: Height and width of a patch, in pixels.
        channels: Image channels.
        norm_pix: Subtract each patch's mean and divide by its standard deviation (RandSAC 5, following MAE; SAIM's
            published command). The variance is the unbiased one plus 1e-6, as in SAIM's published code.
        blur: Kernel size (odd) and standard deviation in pixels of the Gaussian filter (SAIM Eq. 7, Table 3), or None.

    Raises:
        ModelError: for a kernel that is not centred, or one-value patches, which normalise to nothing.
    """

    def __init__(
            self, patch_size: tuple[int, int], channels: int, norm_pix: bool = True,
            blur: Sequence[float] | bool | None = None):
        super().__init__()
        if norm_pix and patch_size[0] * patch_size[1] * channels == 1:
            raise ModelError('norm_pix=True leaves nothing of a patch that is one value: set norm_pix=False.')
        self.patch_size = patch_size
        self.norm_pix = norm_pix
        self.blur = None if blur is None else _check_blur(blur)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Images [B, C, H, W] to targets, float32 or wider, [B, N, P * P * C] in raster order; sends no gradient."""
        with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
            target = self.pixels(images)
            if self.norm_pix:
                mean, std = self.statistics(target)
                target = (target - mean) / std
        return target

    def pixels(self, images: torch.Tensor) -> torch.Tensor:
        """The target before normalisation, [B, N, P * P * C]."""
        images = images.to(torch.promote_types(images.dtype, torch.float32))
        if self.blur is not None:
            images = gaussian_blur(images, *self.blur)
        return patchify(images, self.patch_size)

    @staticmethod
    def statistics(pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and standard deviation of each patch, [B, N, 1] both."""
        return pixels.mean(-1, keepdim=True), (pixels.var(-1, keepdim=True) + 1e-6).sqrt()

    def to_pixels(self, pred: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
        """Predictions [B, N, P * P * C] as pixels of that shape, for looking at: patch-normalised ones are given the
        true mean and variance of each patch of `images`."""
        if not self.norm_pix:
            return pred
        mean, std = self.statistics(self.pixels(images))
        return pred * std + mean

    def loss(self, pred: torch.Tensor, target: torch.Tensor, predicted: torch.Tensor | None = None) -> torch.Tensor:
        """Mean squared error over all tokens (RandSAC 3, SAIM Eq. 2), or over those that `predicted` [B, N] marks:
        their mean in each image, then the mean of images, so that it does not matter how a step's images are split."""
        if predicted is None:
            return F.mse_loss(pred.to(target.dtype), target)
        errors = (pred.to(target.dtype) - target).square().mean(-1) * predicted  # [B, N]
        return (errors.sum(1) / predicted.sum(1).clamp(min=1)).mean()

    def extra_repr(self) -> str:
        return f'patch_size={self.patch_size}, norm_pix={self.norm_pix}, blur={self.blur}'
