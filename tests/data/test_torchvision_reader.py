"""What torchvision reads is what Pillow reads: the same crops and flips, the same pixels but for interpolation, and the
same files refused."""

import io
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.transforms import RandomResizedCropAndInterpolation

pytest.importorskip('sklearn')

from sklearn.datasets import load_sample_images

from autoreg_vit.commands.cli import main
from autoreg_vit.data import torchvision_reader
from autoreg_vit.data.batches import Batches
from autoreg_vit.data.images import DAMAGE, ToMode, open_image
from autoreg_vit.data.sources import open_dataset
from autoreg_vit.data.torchvision_reader import (
    ByteCrops,
    NormalisedBatches,
    choose_reader,
    read_by_torchvision,
    read_image,
)
from autoreg_vit.data.transforms import ImageSpec, training_transform
from autoreg_vit.engine.processes import Processes
from autoreg_vit.engine.seeding import seed_cpu
from autoreg_vit.errors import ConfigError
from tests.support.pictures import write_turned

pytestmark = pytest.mark.skipif(not torchvision_reader.decodes_jpeg(), reason='torchvision without a decoder of JPEG')

PHOTOGRAPH = Image.fromarray(load_sample_images().images[1]).resize((160, 120))
COLOUR = ImageSpec((32, 24), 3, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
GREY = ImageSpec((32, 24), 1, (0.4,), (0.3,))
SCALE, HFLIP = (0.2, 1.0), 0.5
CPU = torch.device('cpu')

# Both interpolate one axis and then the other with the same kernel, and round to whole levels after each; torch's
# weights have fewer bits than Pillow's. A level more or less here and there, of 255, and a few where a sharp edge meets
# both.
MEAN, MOST = 0.5, 8


def jpeg(image: Image.Image, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, 'JPEG', **options)
    return file.getvalue()


def by_pillow(path: Path, spec: ImageSpec, seed: int) -> torch.Tensor:
    seed_cpu(seed)
    return training_transform(spec, SCALE, HFLIP)(open_image(path))


def by_torchvision(path: Path, spec: ImageSpec, seed: int) -> torch.Tensor:
    seed_cpu(seed)
    crop = ByteCrops(spec, SCALE, HFLIP)(read_image(path))
    assert crop.dtype == torch.uint8
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (spec.mean, spec.std))
    return crop.float().div(255).sub(mean).div(std)


def levels(images: torch.Tensor, spec: ImageSpec) -> torch.Tensor:
    return (images * torch.tensor(spec.std).view(-1, 1, 1) + torch.tensor(spec.mean).view(-1, 1, 1)) * 255


def test_same_boxes_flips_and_pixels(tmp_path: Path, monkeypatch):
    draw, boxes = RandomResizedCropAndInterpolation.get_params, []

    def noted(*args) -> tuple[int, ...]:
        boxes.append(draw(*args))
        return boxes[-1]

    monkeypatch.setattr(RandomResizedCropAndInterpolation, 'get_params', staticmethod(noted))
    chance, path = random.Random(0), tmp_path / 'a.jpg'
    for seed in range(200):
        size = chance.randint(9, 160), chance.randint(9, 120)  # shrunk, enlarged, and too narrow for ten draws
        PHOTOGRAPH.resize(size).save(path, quality=chance.randint(60, 95))
        assert isinstance(read_image(path), torch.Tensor)
        one, other = (levels(read(path, COLOUR, seed), COLOUR) for read in (by_pillow, by_torchvision))
        assert boxes[-1] == boxes[-2]
        difference = (one - other).abs()
        assert difference.mean() < MEAN and difference.max() < MOST, (seed, size)
        assert (one.flip(-1) - other).abs().mean() > 2 * MEAN, 'a flip would show'
    assert len(boxes) == 400 and len(set(boxes)) > 150


def test_no_flip_draws_nothing():
    image = torch.zeros(3, 50, 50, dtype=torch.uint8)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    ByteCrops(COLOUR, SCALE, 0.0)(image)
    assert torch.equal(torch.get_rng_state(), before)
    ByteCrops(COLOUR, SCALE, 1.0)(image)
    assert not torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize('spec', [COLOUR, GREY])
@pytest.mark.parametrize('write', [
    lambda path: PHOTOGRAPH.save(path),
    lambda path: PHOTOGRAPH.convert('L').save(path),
    lambda path: PHOTOGRAPH.save(path, progressive=True),
    lambda path: PHOTOGRAPH.save(path, subsampling=0, quality=100),
    lambda path: PHOTOGRAPH.save(path, subsampling=2, restart_marker_blocks=2),
    lambda path: PHOTOGRAPH.save(path, keep_rgb=True),  # Adobe's marker: no YCbCr
    lambda path: Image.effect_noise((77, 41), 90).convert('RGB').save(path, quality=30),
    lambda path: Image.merge('RGB', [Image.effect_noise((64, 64), 255) for _ in range(3)]).save(path, quality=20),
    lambda path: path.write_bytes(jpeg(PHOTOGRAPH) + bytes(100)),
], ids=['colour', 'grey', 'progressive', '4:4:4', 'restarts', 'rgb', 'noise', 'colours out of gamut', 'more behind it'])
def test_decoded_by_torchvision(write: Callable, spec: ImageSpec, tmp_path: Path):
    path = tmp_path / 'a.jpg'
    write(path)
    found = read_image(path)
    assert isinstance(found, torch.Tensor)
    expected = np.asarray(open_image(path)).reshape(found.shape[1], found.shape[2], -1)
    assert abs(found.permute(1, 2, 0).numpy().astype(int) - expected).max() <= 1  # of another libjpeg
    for seed in range(5):
        difference = (levels(by_pillow(path, spec, seed), spec) - levels(by_torchvision(path, spec, seed), spec)).abs()
        assert difference.mean() < MEAN and difference.max() < MOST


def write_mpo(path: Path) -> None:
    PHOTOGRAPH.save(path, 'MPO', save_all=True, append_images=[PHOTOGRAPH.rotate(180)])


@pytest.mark.parametrize('spec', [COLOUR, GREY])
@pytest.mark.parametrize('name, write', [
    ('a.png', lambda path: PHOTOGRAPH.save(path)),
    ('png.jpg', lambda path: PHOTOGRAPH.save(path, 'PNG')),
    ('16.png', lambda path: Image.fromarray(np.asarray(PHOTOGRAPH.convert('L')).astype(np.uint16) * 257).save(path)),
    ('palette.png', lambda path: PHOTOGRAPH.quantize(64).save(path)),
    ('alpha.webp', lambda path: PHOTOGRAPH.convert('RGBA').save(path)),
    ('ink.jpg', lambda path: PHOTOGRAPH.convert('CMYK').save(path)),
    *[(f'turned-{n}.jpg', lambda path, n=n: write_turned(path, PHOTOGRAPH, n)) for n in range(2, 9)],
    ('two.mpo', write_mpo),
])
def test_left_to_pillow(name: str, write: Callable, spec: ImageSpec, tmp_path: Path):
    """To the bit."""
    path = tmp_path / name
    write(path)
    assert isinstance(read_image(path), Image.Image)
    assert all(torch.equal(by_pillow(path, spec, seed), by_torchvision(path, spec, seed)) for seed in range(5))


def test_an_upright_orientation_is_no_reason(tmp_path: Path):
    write_turned(tmp_path / 'a.jpg', PHOTOGRAPH, 1)
    assert isinstance(read_image(tmp_path / 'a.jpg'), torch.Tensor)


def test_too_large_an_image_is_refused_as_by_pillow(tmp_path: Path, monkeypatch):
    PHOTOGRAPH.save(tmp_path / 'a.jpg')
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 160 * 120 - 1)
    with pytest.warns(Image.DecompressionBombWarning), pytest.raises(Image.DecompressionBombError):
        read_image(tmp_path / 'a.jpg')


@pytest.mark.parametrize('options', [{}, {'progressive': True}, {'restart_marker_blocks': 3}])
@pytest.mark.parametrize('mode', ['L', 'RGB'])
def test_damaged_files_are_those_of_pillow(mode: str, options: dict, tmp_path: Path):
    """Cut short, with bytes changed and with some left out: refused by both or by none, and the same picture."""
    whole = jpeg(PHOTOGRAPH.resize((60, 45)).convert(mode), **options)
    chance, path = random.Random(0), tmp_path / 'a.jpg'
    damaged = [whole[:-n] for n in (*range(1, 20), *(chance.randrange(20, len(whole)) for _ in range(40)))]
    for _ in range(150):
        changed = bytearray(whole)
        for _ in range(chance.randint(1, 4)):
            changed[chance.randrange(len(changed))] = chance.randrange(256)
        start = chance.randrange(len(whole))
        damaged += [bytes(changed), whole[:start] + whole[start + chance.randint(1, 50):]]
    outcomes = set()
    for content in damaged:
        path.write_bytes(content)
        try:
            expected = np.asarray(open_image(path))
        except DAMAGE:
            with pytest.raises(DAMAGE):
                read_image(path)
            outcomes.add('refused')
            continue
        found = read_image(path)
        found = np.asarray(ToMode(3)(found)) if isinstance(found, Image.Image) else found.permute(1, 2, 0).numpy()
        assert abs(found.astype(int) - expected.reshape(*expected.shape[:2], -1)).max() <= 1
        outcomes.add('read')
    assert outcomes == {'read', 'refused'}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in range(12):
        place = tmp_path / 'train' / str(number % 2)
        place.mkdir(parents=True, exist_ok=True)
        PHOTOGRAPH.rotate(number).save(place / f'{number}.{("jpg", "png")[number % 3 == 2]}')
    return tmp_path


class TestChoice:
    def opened(self, name: str, folder: Path | None):
        return open_dataset(name, folder and str(folder), 'train', training_transform(COLOUR, SCALE, HFLIP))

    def test_auto(self, folder: Path, monkeypatch):
        assert choose_reader('auto', self.opened('folder', folder)) == 'torchvision'
        assert choose_reader('pil', self.opened('folder', folder)) == 'pil'
        assert choose_reader('auto', self.opened('torch/image_folder', folder / 'train')) == 'torchvision'
        assert choose_reader('auto', self.opened('digits', None)) == 'pil'
        monkeypatch.setattr(torchvision_reader, 'decodes_jpeg', lambda: False)
        assert choose_reader('auto', self.opened('folder', folder)) == 'pil'

    def test_where_it_cannot_read(self, folder: Path, monkeypatch):
        with pytest.raises(ConfigError, match=r'reads image files.*--reader pil'):
            choose_reader('torchvision', self.opened('digits', None))
        monkeypatch.setattr(torchvision_reader, 'decodes_jpeg', lambda: False)
        with pytest.raises(ConfigError, match='does not decode JPEG: use --reader pil'):
            choose_reader('torchvision', self.opened('folder', folder))

    def test_a_torchvision_without_decoders(self, monkeypatch):
        def refuse(*_, **__):
            raise RuntimeError

        monkeypatch.setattr(torchvision_reader, 'decode_jpeg', refuse)
        assert not torchvision_reader.decodes_jpeg.__wrapped__()

    @pytest.mark.parametrize('arguments, words', [
        (['--reader', 'torchvison'], "got 'torchvison'. Did you mean"),
        (['--reader', 'torchvision'], 'reads image files'),
        (['--reader', 'torchvision', '--cache-on-device'], '--cache-on-device or --reader'),
    ])
    def test_one_line(self, arguments: list[str], words: str, tmp_path: Path, monkeypatch, capsys):
        monkeypatch.chdir(tmp_path)
        assert main(['pretrain', *arguments]) == 2
        error = capsys.readouterr().err
        assert words in error and error.count('\n') == 1 and not list(tmp_path.iterdir())


@pytest.mark.parametrize('name', ['folder', 'torch/image_folder'])
@pytest.mark.parametrize('workers', [0, 2])
def test_batches(name: str, workers: int, folder: Path):
    """Of JPEG and other files together: those of Pillow within interpolation, from any place and for every process."""
    def batches(reader: str, start: int, count: int, group: Processes) -> list[torch.Tensor]:
        data_dir = folder if name == 'folder' else folder / 'train'
        dataset = open_dataset(name, str(data_dir), 'train', training_transform(COLOUR, SCALE, HFLIP))
        if reader == 'torchvision':
            read_by_torchvision(dataset, COLOUR, SCALE, HFLIP)
        source = Batches(dataset, 4, 0, group, workers)
        given = (NormalisedBatches(source, COLOUR, CPU) if reader == 'torchvision' else source).start_at(start)
        return [next(given)[0] for _ in range(count)]

    one, straight = Processes(CPU), batches('torchvision', 0, 5, Processes(CPU))
    assert all(images.shape == (4, 3, 32, 24) and images.dtype == torch.float32 for images in straight)
    for expected, found in zip(batches('pil', 0, 5, one), straight):
        difference = (levels(expected, COLOUR) - levels(found, COLOUR)).abs()
        assert difference.mean() < MEAN and difference.max() < MOST
    assert all(map(torch.equal, batches('torchvision', 2, 3, one), straight[2:]))
    parts = [batches('torchvision', 0, 5, Processes(CPU, rank, 2)) for rank in range(2)]
    assert all(torch.equal(torch.cat(halves), whole) for halves, whole in zip(zip(*parts), straight))
