"""What is predicted: patches of pixels, blurred and normalised as asked."""

import math

import pytest
import torch

from autoreg_vit.errors import ModelError, ShapeError
from autoreg_vit.models.targets import PixelTarget, gaussian_blur, patchify, unpatchify


@pytest.mark.parametrize(('shape', 'patch'), [
    ((2, 3, 8, 8), (2, 2)), ((1, 1, 6, 15), (2, 3)), ((3, 5, 4, 4), (4, 4)), ((2, 2, 3, 5), (1, 1)),
    ((2, 4, 12, 8), (4, 2))])
def test_patchify_and_unpatchify_are_inverse(shape, patch):
    images = torch.randn(shape)
    rows, columns = shape[2] // patch[0], shape[3] // patch[1]

    patches = patchify(images, patch)

    assert patches.shape == (shape[0], rows * columns, patch[0] * patch[1] * shape[1])
    assert torch.equal(unpatchify(patches, (rows, columns), patch), images)
    again = torch.randn_like(patches)
    assert torch.equal(patchify(unpatchify(again, (rows, columns), patch), patch), again)


def test_patches_are_in_raster_order_with_channels_last():
    images = torch.randn(2, 3, 6, 15)
    patches = patchify(images, (2, 3))
    for token in range(3 * 5):
        row, column = divmod(token, 5)
        for value in range(2 * 3 * 3):
            pixel, channel = divmod(value, 3)
            y, x = divmod(pixel, 3)
            assert torch.equal(patches[:, token, value], images[:, channel, 2 * row + y, 3 * column + x])


@pytest.mark.parametrize(('size', 'patch'), [((8, 8), (3, 2)), ((8, 8), (2, 3)), ((2, 8), (4, 4))])
def test_images_are_a_whole_number_of_patches(size, patch):
    with pytest.raises(ShapeError, match=f'{size[0]} x {size[1]} pixels.*{patch[0]} x {patch[1]}'):
        patchify(torch.zeros(1, 3, *size), patch)


@pytest.mark.parametrize(('kernel_size', 'sigma'), [(9, 1.0), (3, 1.0), (9, 1.5), (5, 0.5), (1, 1.0)])
def test_blur_is_a_normalised_gaussian_on_zero_padding(kernel_size, sigma):
    images = torch.randn(2, 2, 7, 5, dtype=torch.float64)
    reach = kernel_size // 2
    offsets = range(-reach, reach + 1)
    weights = {(dy, dx): math.exp(-(dy * dy + dx * dx) / (2 * sigma ** 2)) for dy in offsets for dx in offsets}
    total = sum(weights.values())
    expected = torch.zeros_like(images)
    for y in range(7):
        for x in range(5):
            for (dy, dx), weight in weights.items():
                if 0 <= y + dy < 7 and 0 <= x + dx < 5:
                    expected[:, :, y, x] += weight / total * images[:, :, y + dy, x + dx]

    torch.testing.assert_close(gaussian_blur(images, kernel_size, sigma), expected, rtol=0, atol=1e-12)


def test_target_is_blurred_before_it_is_cut_into_patches():
    images = torch.randn(2, 3, 12, 12)
    target = PixelTarget((4, 4), 3, norm_pix=False, blur=(9, 1.0))(images)
    torch.testing.assert_close(target, patchify(gaussian_blur(images, 9, 1.0), (4, 4)))
    assert torch.equal(PixelTarget((4, 4), 3, norm_pix=False)(images), patchify(images, (4, 4)))


def test_normalised_target_has_unbiased_statistics():
    images = torch.randn(2, 3, 8, 8, dtype=torch.float64) * 3 + 5
    target = PixelTarget((2, 2), 3)(images)
    patches = patchify(images, (2, 2))
    mean = patches.sum(-1, keepdim=True) / 12
    variance = (patches - mean).square().sum(-1, keepdim=True) / 11

    torch.testing.assert_close(target, (patches - mean) / (variance + 1e-6).sqrt(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(target.var(-1), torch.ones(2, 16, dtype=torch.float64), rtol=1e-5, atol=0)


def test_flat_patches_stay_finite():
    target = PixelTarget((2, 2), 1)(torch.full((1, 1, 4, 4), 7.0))
    assert torch.equal(target, torch.zeros(1, 4, 4))


@pytest.mark.parametrize('blur', [None, (5, 1.0)])
@pytest.mark.parametrize('norm_pix', [True, False])
def test_to_pixels_inverts_the_normalisation(norm_pix, blur):
    target = PixelTarget((2, 4), 3, norm_pix=norm_pix, blur=blur)
    images = torch.randn(2, 3, 8, 8) * 2 + 1
    torch.testing.assert_close(target.to_pixels(target(images), images), target.pixels(images))
    if blur is None:
        pixels = unpatchify(target.to_pixels(target(images), images), (4, 2), (2, 4))
        torch.testing.assert_close(pixels, images)


def test_target_sends_no_gradient():
    images = torch.randn(1, 3, 8, 8, requires_grad=True)
    target = PixelTarget((2, 2), 3, blur=(3, 1.0))
    assert not target(images).requires_grad
    pred = torch.randn(1, 16, 12, requires_grad=True)
    target.loss(pred, target(images)).backward()
    assert pred.grad is not None
    assert images.grad is None


def test_target_is_at_least_float32():
    target = PixelTarget((2, 2), 3, blur=(5, 1.0))
    images = torch.randn(2, 3, 8, 8)
    expected = target(images)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        under_autocast = target(images)
        loss = target.loss(torch.randn(2, 16, 12, dtype=torch.bfloat16), under_autocast)
    assert under_autocast.dtype == loss.dtype == torch.float32
    assert torch.equal(under_autocast, expected)
    assert target(images.bfloat16()).dtype == torch.float32
    assert target(images.double()).dtype == torch.float64
    torch.testing.assert_close(target(images.double()), expected.double(), rtol=1e-3, atol=1e-4)


def test_loss_is_the_mean_squared_error():
    pred, target = torch.randn(2, 16, 12), torch.randn(2, 16, 12)
    torch.testing.assert_close(PixelTarget((2, 2), 3).loss(pred, target), ((pred - target) ** 2).sum() / pred.numel())


@pytest.mark.parametrize('blur', [(8, 1.0), (0, 1.0), (-3, 1.0), (9, 0.0), (9, -1.0), (9.5, 1.0), (9,), (9, 1.0, 2)])
def test_kernels_that_cannot_be(blur):
    with pytest.raises(ModelError, match='odd kernel size and a positive sigma'):
        PixelTarget((2, 2), 3, blur=blur)


def test_kernel_may_come_from_a_recipe():
    assert PixelTarget((2, 2), 3, blur=[9.0, 1]).blur == (9, 1.0)


def test_patches_of_one_value_have_nothing_left_to_normalise():
    with pytest.raises(ModelError, match='norm_pix=False'):
        PixelTarget((1, 1), 1)
    PixelTarget((1, 1), 1, norm_pix=False)
    PixelTarget((1, 1), 3)
