"""Images of any mode, depth and orientation keep their picture, or are refused for what they are."""

import io
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image

from autoreg_vit.data.checks import check_images
from autoreg_vit.data.transforms import ImageSpec, evaluation_transform
from tests.support.pictures import GREY_KINDS, write_grey, write_turned

pytest.importorskip('sklearn')

from autoreg_vit.data import sources as data
from autoreg_vit.data.images import ToMode, image_extensions, open_image
from autoreg_vit.data.on_device import DeviceImages
from autoreg_vit.errors import DataError

SPEC = ImageSpec((6, 4), 3, (0.0,) * 3, (1.0,) * 3)
CPU = torch.device('cpu')


def pixels(image: Image.Image, channels: int) -> np.ndarray:
    """Grey values [H, W] of an image as a model takes it; of a grey picture all channels agree."""
    found = np.asarray(ToMode(channels)(image)).astype(int)
    if channels == 3:
        assert (found == found[..., :1]).all()
        return found[..., 0]
    return found


@pytest.mark.parametrize('kind', GREY_KINDS)
@given(values=arrays.arrays(np.uint16, st.tuples(st.integers(1, 5), st.sampled_from([2, 4, 8]))),
       channels=st.sampled_from([1, 3]))
@settings(max_examples=10, deadline=None, database=None)
def test_modes_and_depths_keep_the_picture(kind: str, values: np.ndarray, channels: int):
    with tempfile.TemporaryDirectory() as folder:
        expected = write_grey(Path(folder, 'x'), kind, values)
        path, = Path(folder).iterdir()
        found = pixels(open_image(path), channels)
    assert abs(found - expected.astype(int)).max() <= (1 if 'PGM' in kind else 0)  # Pillow rounds twice there


@pytest.mark.parametrize('mode', ['1', 'L', 'LA', 'La', 'P', 'PA', 'RGB', 'RGBA', 'RGBX', 'RGBa', 'CMYK', 'YCbCr',
                                  'HSV', 'LAB', 'I;16', 'I;16L', 'I;16B', 'I;16N', 'F', 'I'])
@pytest.mark.parametrize('channels', [1, 3])
def test_every_mode_of_pillow_is_taken_or_named(mode: str, channels: int):
    image = Image.new(mode, (5, 3))
    if mode == 'I':
        with pytest.raises(DataError, match='its mode I has 32-bit integers whose range is not known'):
            ToMode(channels)(image)
    else:
        found = ToMode(channels)(image)
        assert found.mode == ('L' if channels == 1 else 'RGB') and found.size == (5, 3)


@pytest.mark.parametrize('values, words', [
    (np.array([[0, 70000]], np.int32), 'mode I has 32-bit integers'),
    (np.array([[0, 200]], np.int32), 'mode I has 32-bit integers'),
    (np.array([[0, 255]], np.float32), 'from 0 to 255, and those of mode F should from 0 to 1'),
    (np.array([[-0.5, 1]], np.float32), 'from -0.5 to 1'),
    (np.array([[np.nan, 1]], np.float32), 'from nan'),
])
def test_unknown_ranges_are_refused_by_name_before_training(values: np.ndarray, words: str, tmp_path: Path):
    for number in range(4):
        Image.new('L', (4, 4)).save(tmp_path / f'{number}.png')
    Image.fromarray(values).save(tmp_path / 'x.tif')
    with pytest.raises(DataError, match=words):
        ToMode(1)(open_image(tmp_path / 'x.tif'))
    dataset = data.open_dataset('folder', str(tmp_path), 'train', evaluation_transform(SPEC))
    with pytest.raises(DataError, match=rf'1 of 5 images cannot be read.*x\.tif \(.*{words}'):
        check_images(dataset, 10, 0.0)


def test_endings_are_those_that_pillow_decodes():
    assert {'.jpg', '.jpeg', '.jfif', '.png', '.gif', '.tif', '.tiff', '.bmp', '.pgm', '.webp', '.jp2'
            } <= image_extensions()
    assert not {'.mpg', '.h5', '.eps', '.pdf', '.txt', ''} & image_extensions()


@pytest.fixture(scope='module')
def upright() -> Image.Image:
    """Bright above, and dark but for the left below."""
    values = np.zeros((6, 4), np.uint8)
    values[:3], values[3:, :1] = 240, 120
    return Image.fromarray(values.repeat(8, 0).repeat(8, 1))


def is_upright(image: Image.Image, upright: Image.Image) -> bool:
    return image.size == upright.size and np.allclose(
        np.asarray(image.convert('L')).astype(int), np.asarray(upright), atol=12)


@pytest.mark.parametrize('orientation', range(1, 9))
class TestOrientation:
    @pytest.mark.parametrize('suffix', ['.jpg', '.png', '.tif', '.webp'])
    def test_files(self, orientation: int, suffix: str, upright: Image.Image, tmp_path: Path):
        write_turned(tmp_path / f'x{suffix}', upright, orientation)
        image = open_image(tmp_path / f'x{suffix}')
        assert is_upright(image, upright)
        assert is_upright(ToMode(3)(image), upright), 'turned once, not twice'
        content = io.BytesIO((tmp_path / f'x{suffix}').read_bytes())
        assert is_upright(ToMode(3)(ToMode(1)(Image.open(content))), upright)

    def test_every_door(self, orientation: int, upright: Image.Image, tmp_path: Path):
        """Folders, flat and of classes, torchvision's data sets and images on the device agree."""
        for name in 'ab':
            (tmp_path / 'classes' / name).mkdir(parents=True)
            write_turned(tmp_path / 'classes' / name / 'x.jpg', upright, orientation)
        (tmp_path / 'flat').mkdir()
        write_turned(tmp_path / 'flat' / 'x.jpg', upright, orientation)
        transform = evaluation_transform(SPEC)
        for name, folder in (('folder', 'flat'), ('folder', 'classes')):
            pixels = data.open_dataset(name, str(tmp_path / folder), 'train', transform)[0][0]
            assert pixels[:, :3].min() > 0.8 and pixels[:, 4:, 2:].max() < 0.2 and 0.3 < pixels[0, 5, 0] < 0.6
        for name in ('folder', 'torch/image_folder'):
            plain = data.open_dataset(name, str(tmp_path / 'classes'), 'train', lambda image: image)
            assert is_upright(plain[0][0], upright)
            assert is_upright(Image.fromarray(DeviceImages(plain, SPEC, CPU).images[1, 0].numpy()), upright)

    def test_depth_and_orientation_together(self, orientation: int, upright: Image.Image, tmp_path: Path):
        deep = Image.fromarray(np.asarray(upright).astype(np.uint16) * 257)
        write_turned(tmp_path / 'x.png', deep, orientation)
        for image in (open_image(tmp_path / 'x.png'), Image.open(tmp_path / 'x.png')):
            assert is_upright(ToMode(3)(image), upright)


@pytest.mark.filterwarnings('ignore:Corrupt EXIF data')
def test_damaged_exif_data_leave_the_picture(upright: Image.Image, tmp_path: Path):
    upright.save(tmp_path / 'x.jpg', exif=b'Exif\0\0MM\0*\0\0\0\x08\xff\xff' + bytes(range(40)))
    assert is_upright(open_image(tmp_path / 'x.jpg'), upright)


def test_depth_survives_torchvision(tmp_path: Path):
    """It converts to RGB, which cuts 16 bits off at 255, unless it is told not to."""
    ramp = np.arange(0, 65536, 257, dtype=np.uint16).reshape(16, 16)
    for label in 'ab':
        (tmp_path / label).mkdir()
        Image.fromarray(ramp).save(tmp_path / label / 'x.png')
    image, _ = data.open_dataset('torch/image_folder', str(tmp_path), 'train', ToMode(3))[0]
    assert (np.asarray(image)[..., 1].ravel() == np.arange(256)).all()


def test_streams_of_shards_keep_depth_and_are_upright(upright: Image.Image, tmp_path: Path):
    webdataset = pytest.importorskip('webdataset')
    ramp = np.arange(0, 65536, 257, dtype=np.uint16).reshape(16, 16)
    Image.fromarray(ramp).save(deep := io.BytesIO(), 'PNG')
    write_turned(tmp_path / 'x.png', upright, 6)
    with webdataset.TarWriter(str(tmp_path / 'train-0.tar')) as tar:
        for number, content in enumerate([deep.getvalue(), (tmp_path / 'x.png').read_bytes()]):
            tar.write({'__key__': str(number), 'png': content, 'cls': b'0'})
    (tmp_path / '_info.json').write_text('{"splits": {"train": {"name": "train", "filenames": ["train-0.tar"], '
                                         '"shard_lengths": [2], "num_samples": 2}}}')
    found = [image for image, _ in data.open_dataset('wds/x', str(tmp_path), 'train', ToMode(3))]
    assert (np.asarray(found[0])[..., 1].ravel() == np.arange(256)).all() and is_upright(found[1], upright)
