"""Images kept on the device: crops and flips are what the usual augmentation does, drawn by (seed, step)."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from autoreg_vit.data.transforms import ImageSpec

pytest.importorskip('sklearn')

from autoreg_vit.commands.pretraining import pretrain
from autoreg_vit.data.on_device import DeviceBatches, DeviceImages, draw_boxes
from autoreg_vit.engine.processes import Processes
from autoreg_vit.errors import ConfigError, DataError
from autoreg_vit.settings.pretraining import PretrainConfig
from tests.support.launching import SETTINGS, log_of, weights_of

CPU = torch.device('cpu')
SPEC = ImageSpec((16, 12), 3, (0.5,) * 3, (0.25,) * 3)


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


def boxes_of(*rows: tuple[float, float, float, float]) -> torch.Tensor:
    """From (width, height, x, y), the parts and centres of crops in coordinates from -1 to 1."""
    return torch.tensor([[[w, 0, x], [0, h, y]] for w, h, x, y in rows], dtype=torch.float32)


def test_whole_image_and_its_mirror():
    images = DeviceImages(Pictures(), SPEC, CPU)
    assert images.images.dtype == torch.uint8 and images.images.shape == (8, 3, 16, 12)
    indices = torch.tensor([5, 5])
    out = images.augment(indices, boxes_of((1, 1, 0, 0), (-1, 1, 0, 0)))
    expected = (images.images[5].float() / 255 - 0.5) / 0.25
    torch.testing.assert_close(out[0], expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(out[1], expected.flip(-1), atol=1e-4, rtol=0)


def test_crop_is_pils_crop_and_resize():
    """The left upper quarter, enlarged: away from the crop's border, where PIL does not look beyond, they agree."""
    smooth = Pictures(1, (64, 64))
    smooth.pixels = np.asarray(Image.fromarray(smooth.pixels[0]).resize((8, 8)).resize((64, 64), Image.BICUBIC))[None]
    spec = ImageSpec((64, 64), 3, (0.0,) * 3, (1.0,) * 3)
    out = DeviceImages(smooth, spec, CPU).augment(torch.tensor([0]), boxes_of((0.5, 0.5, -0.5, -0.5)))
    expected = Image.fromarray(smooth.pixels[0]).crop((0, 0, 32, 32)).resize((64, 64), Image.BICUBIC)
    expected = torch.from_numpy(np.asarray(expected).copy()).permute(2, 0, 1) / 255
    torch.testing.assert_close(out[0, :, 4:-4, 4:-4], expected[:, 4:-4, 4:-4], atol=0.02, rtol=0)


def test_boxes_have_the_areas_ratios_and_places_asked_for():
    boxes = draw_boxes(20_000, (32, 48), (0.2, 1.0), 0.3, generator())
    width, height = boxes[:, 0, 0].abs(), boxes[:, 1, 1]
    assert (boxes[:, 0, 2].abs() + width <= 1 + 1e-5).all() and (boxes[:, 1, 2].abs() + height <= 1 + 1e-5).all()
    whole = (width < 0.999) & (height < 0.999)  # not cut to the image
    area, ratio = (width * height)[whole], (width * 48 / (height * 32))[whole]
    assert area.min() >= 0.2 - 1e-5 and area.max() <= 1 and area.min() < 0.21
    assert ratio.min() >= 3 / 4 - 1e-4 and ratio.max() <= 4 / 3 + 1e-4
    assert (boxes[:, 0, 0] < 0).float().mean().item() == pytest.approx(0.3, abs=0.02)
    assert boxes[:, 0, 2].mean().item() == pytest.approx(0, abs=0.02)
    fixed = draw_boxes(4, (32, 32), (1.0, 1.0), 0.0, generator(), ratio=(1.0, 1.0))
    torch.testing.assert_close(fixed, boxes_of(*[(1, 1, 0, 0)] * 4))


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


def test_run_on_the_device(tmp_path: Path):
    settings = {**SETTINGS, 'epochs': 1, 'eval_every': 0, 'cache_on_device': True, 'checkpoint_every_steps': 0}
    folders = [pretrain(PretrainConfig(**{**settings, 'batch_size': batch_size, 'accumulate': 64 // batch_size,
                                          'opt': 'sgd', 'lr': 0.1, 'drop_path_rate': 0.0, 'warmup_epochs': 0,
                                          'output_dir': str(tmp_path / str(batch_size))})) for batch_size in (64, 32)]
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
    with pytest.raises(ConfigError, match='cuda_graph needs a CUDA device'):
        pretrain(PretrainConfig(**{**SETTINGS, 'device': 'cpu', 'cuda_graph': True, 'output_dir': str(tmp_path / 'r')}))
