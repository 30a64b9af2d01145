"""Images kept on the device: crops and flips are what the usual augmentation does, drawn by (seed, step)."""

import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from timm.data.transforms import RandomResizedCropAndInterpolation

from autoreg_vit.data.transforms import ImageSpec

pytest.importorskip('sklearn')

from autoreg_vit.commands.pretraining import pretrain
from autoreg_vit.data.on_device import Crops, DeviceBatches, DeviceImages, draw_crops
from autoreg_vit.engine.processes import Processes
from autoreg_vit.errors import ConfigError, DataError
from autoreg_vit.settings.pretraining import PretrainConfig
from tests.support.launching import SETTINGS, log_of, weights_of

CPU = torch.device('cpu')
SPEC = ImageSpec((16, 12), 3, (0.5,) * 3, (0.25,) * 3)
LENGTHS, EDGES = st.integers(1, 40), st.integers(0, 12)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Pictures(torch.utils.data.Dataset):
    def __init__(self, count: int = 8, size: tuple[int, int] = (16, 12)):
        draws = np.random.default_rng(0)
        self.pixels = draws.integers(0, 256, (count, *size, 3), dtype=np.uint8)

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int):
        return Image.fromarray(self.pixels[index]), index


def crops_of(*boxes: tuple[int, int, int, int], flips: tuple[bool, ...] = ()) -> Crops:
    """Crops at (top, left, height, width), in pixels."""
    return Crops(torch.tensor(boxes), torch.tensor(flips or [False] * len(boxes)))


def test_whole_image_and_its_mirror():
    images = DeviceImages(Pictures(), SPEC, CPU)
    assert images.images.dtype == torch.uint8 and images.images.shape == (8, 3, 16, 12)
    out = images.augment(torch.tensor([5, 5]), crops_of((0, 0, 16, 12), (0, 0, 16, 12), flips=(False, True)))
    expected = (images.images[5].float() / 255 - 0.5) / 0.25
    torch.testing.assert_close(out[0], expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(out[1], expected.flip(-1), atol=1e-5, rtol=0)


@settings(deadline=None, max_examples=60)
@given(size=st.tuples(LENGTHS, LENGTHS), shape=st.tuples(LENGTHS, LENGTHS), before=st.tuples(EDGES, EDGES),
       after=st.tuples(EDGES, EDGES))
@example(size=(7, 18), shape=(2, 12), before=(0, 6), after=(0, 0))  # sums of half a level in both passes
def test_pixels_are_pillows(size, shape, before, after):
    """Of any crop to any size, enlarged or shrunk, to the bit. Which axis comes first is Pillow's choice by size; here
    it is told."""
    (height, width), (rows, columns), (top, left) = size, shape, before
    pictures = Pictures(1, (top + rows + after[0], left + columns + after[1]))
    images = DeviceImages(pictures, ImageSpec(size, 3, (0.0,) * 3, (1.0,) * 3), CPU)
    out = images.augment(torch.tensor([0, 0]), crops_of(*[(top, left, rows, columns)] * 2, flips=(False, True)))
    crop = Image.fromarray(pictures.pixels[0]).crop((left, top, left + columns, top + rows))
    expected = np.asarray(crop.resize((width, rows), Image.BICUBIC).resize((width, height), Image.BICUBIC))
    found = out.permute(0, 2, 3, 1).numpy()
    assert np.array_equal(found, np.stack([expected, expected[:, ::-1]]).astype(np.float32) / 255)


def test_pixels_are_pillows_whichever_axis_it_takes_first():
    """Of crops that are not shrunk, as of most data sets of small images: Pillow is told nothing."""
    pictures = Pictures(200, (16, 12))
    crops = draw_crops(200, (16, 12), (0.2, 1.0), 0.0, generator())
    out = DeviceImages(pictures, ImageSpec((16, 12), 3, (0.0,) * 3, (1.0,) * 3), CPU).augment(torch.arange(200), crops)
    for pixels, (top, left, rows, columns), found in zip(pictures.pixels, crops.boxes.tolist(), out):
        crop = Image.fromarray(pixels).crop((left, top, left + columns, top + rows))
        expected = np.asarray(crop.resize((12, 16), Image.BICUBIC))
        assert np.array_equal(found.permute(1, 2, 0).numpy(), expected.astype(np.float32) / 255)


@pytest.mark.parametrize('size, scale', [((32, 32), (0.2, 1.0)), ((24, 48), (0.05, 0.9)), ((8, 40), (0.5, 1.0))])
def test_boxes_are_as_likely_as_timms(size: tuple[int, int], scale: tuple[float, float]):
    """Each of the boxes' shapes, of 40,000 draws of both, within five standard errors; places on the average; and where
    none of ten draws fits, the middle."""
    count, image = 40_000, Image.new('L', size[::-1])
    random.seed(0)
    theirs = [RandomResizedCropAndInterpolation.get_params(image, scale, (3 / 4, 4 / 3)) for _ in range(count)]
    ours, flips = draw_crops(count, size, scale, 0.3, generator())
    shapes = [Counter(tuple(box[2:]) for box in boxes) for boxes in (theirs, ours.tolist())]
    for shape in shapes[0].keys() | shapes[1].keys():
        a, b = (found[shape] for found in shapes)
        assert abs(a - b) <= 5 * (a + b + 1) ** 0.5, (shape, a, b)
    for place in (0, 1):
        drawn = np.array([box[place] for box in theirs])
        assert abs(drawn.mean() - ours[:, place].double().mean()) <= 8 * drawn.std() / count ** 0.5
    assert (ours[:, 0] + ours[:, 2]).max() <= size[0] and (ours[:, 1] + ours[:, 3]).max() <= size[1]
    assert ours[:, :2].min() == 0 and flips.float().mean().item() == pytest.approx(0.3, abs=0.02)


def test_no_box_is_empty():
    crops = draw_crops(100, (8, 8), (1e-4, 1e-3), 0.5, generator())
    assert crops.boxes[:, 2:].unique().tolist() == [1]
    out = DeviceImages(Pictures(100, (8, 8)), SPEC, CPU).augment(torch.arange(100), crops)
    assert out.isfinite().all() and (out == out[..., :1, :1]).all()


def test_batches_are_functions_of_their_place_and_are_shared_out():
    images = DeviceImages(Pictures(50), SPEC, CPU)

    def take(start: int, count: int, batch_size: int, accumulate: int, rank: int = 0, world_size: int = 1):
        batches = DeviceBatches(images, batch_size, accumulate, 0, Processes(CPU, rank, world_size), (0.3, 1.0), 0.5)
        source = batches.start_at(start)
        return [next(source)[0] for _ in range(count)]

    straight = take(0, 8, 16, 1)  # three an epoch
    assert all(map(torch.equal, take(2, 6, 16, 1), straight[2:]))
    shared = zip(*(take(0, 8, 16, 1, rank, 2) for rank in range(2)))
    assert all(torch.equal(torch.cat(parts), whole) for parts, whole in zip(shared, straight))
    accumulated = take(0, 16, 8, 2)
    assert all(torch.equal(torch.cat(accumulated[2 * i:2 * i + 2]), whole) for i, whole in enumerate(straight))
    assert not torch.equal(straight[0], straight[3])


@pytest.mark.usefixtures('no_figures')
def test_run_on_the_device(tmp_path: Path):
    shared = {**SETTINGS, 'epochs': 1, 'eval_every': 0, 'cache_on_device': True, 'checkpoint_every_steps': 0}
    folders = [pretrain(PretrainConfig(**{**shared, 'batch_size': batch_size, 'accumulate': 32 // batch_size,
                                          'opt': 'sgd', 'lr': 0.1, 'drop_path_rate': 0.0, 'warmup_epochs': 0,
                                          'output_dir': str(tmp_path / str(batch_size))})) for batch_size in (32, 16)]
    losses = [[line['loss'] for line in log_of(folder) if line['event'] == 'step'] for folder in folders]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5) and losses[0][-1] < losses[0][0]
    assert weights_of(folders[0]) != weights_of(folders[1])


def test_unreadable_images_are_stood_in_for(capsys):
    class Damaged(Pictures):
        def __getitem__(self, index: int):
            if index in (2, 3, 7):
                raise OSError('damaged')
            return super().__getitem__(index)

    with pytest.raises(DataError, match=r'3 of 8 images cannot be read.*image 2 \(damaged\); image 3'):
        DeviceImages(Damaged(), SPEC, CPU)
    found = DeviceImages(Damaged(), SPEC, CPU, max_corrupt=0.5).images
    pixels = torch.from_numpy(Pictures().pixels).permute(0, 3, 1, 2)
    assert torch.equal(found, pixels[[0, 1, 4, 4, 4, 5, 6, 0]])
    assert '3 images cannot be read, and others stand in' in capsys.readouterr().out


def test_errors(tmp_path: Path):
    mixed = Pictures(3)
    mixed.pixels = [mixed.pixels[0], mixed.pixels[1], mixed.pixels[2][:8]]
    with pytest.raises(DataError, match='image 2 has 12 x 8 pixels, the first 12 x 16'):
        DeviceImages(mixed, SPEC, CPU)

    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(())

    with pytest.raises(ConfigError, match='not a stream'):
        DeviceImages(Stream(), SPEC, CPU)
    with pytest.raises(ConfigError, match='A CUDA graph needs a CUDA device'):
        pretrain(PretrainConfig(**{**SETTINGS, 'device': 'cpu', 'cuda_graph': True, 'output_dir': str(tmp_path / 'r')}))
