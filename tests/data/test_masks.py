"""Images with masks: what they may hold, their augmentation, and damage that is named."""

import json
import os
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from autoreg_vit.data.masks import Augment, MaskedImages, MaskFormat, _mask_format, find_pairs, open_data
from autoreg_vit.data.transforms import ImageSpec
from autoreg_vit.engine.processes import Processes
from autoreg_vit.engine.seeding import seed_cpu
from autoreg_vit.errors import DataError
from autoreg_vit.models.dense.segmenter import IGNORED
from autoreg_vit.settings.dense import SegmentConfig
from tests.support.pictures import write_turned
from tests.support.shapes import CLASSES, draw, write_data

CPU = Processes(torch.device('cpu'))


class TestData:
    def test_augmentation_keeps_image_and_mask_together(self):
        config = SegmentConfig(weights='x', data_dir='x', crop_size=(24, 40), photometric=False)
        augment = Augment(config, ImageSpec(config.crop, 3, (0.0,) * 3, (1.0,) * 3))
        classes = torch.from_numpy(draw(3)[1].astype(np.int64))
        classes[classes == 255] = IGNORED
        image = (100 * classes.clamp(min=0)).to(torch.uint8).expand(3, -1, -1)
        for seed in range(30):
            seed_cpu(seed)
            pixels, mask = augment(image, classes)
            assert pixels.shape == (3, 24, 40) and mask.shape == (24, 40)
            known = mask != IGNORED
            right = (pixels[0] * 255 / 100).round()[known] == mask[known]
            assert right.float().mean() > 0.85  # all but edges, which are blended in the image
            seed_cpu(seed)
            assert all(torch.equal(a, b) for a, b in zip(augment(image, classes), (pixels, mask)))

    def test_augmentation_varies(self):
        config = SegmentConfig(weights='x', data_dir='x', crop_size=(24,))
        augment = Augment(config, ImageSpec(config.crop, 3, (0.5,) * 3, (0.25,) * 3))
        image, mask = (torch.from_numpy(a.astype(np.uint8)) for a in draw(3))
        seen = []
        for seed in range(8):
            seed_cpu(seed)
            seen.append(augment(image.permute(2, 0, 1), mask.long().clamp(max=2))[0].mean().item())
        assert len(set(seen)) == 8

    def test_beyond_a_small_image_is_ignored(self):
        config = SegmentConfig(weights='x', data_dir='x', crop_size=(64,), scale=(1.0, 1.0))
        pixels, mask = Augment(config, ImageSpec((64, 64), 3, (0.5,) * 3, (0.25,) * 3))(
            torch.full((3, 20, 30), 255, dtype=torch.uint8), torch.ones(20, 30, dtype=torch.long))
        assert (mask[:20, :30] == 1).all() and (mask[20:] == IGNORED).all() and (mask[:, 30:] == IGNORED).all()
        assert (pixels[:, 20:] == 0).all() and (pixels[:, :, 30:] == 0).all() and (pixels[:, :20, :30] != 0).all()

    @pytest.mark.parametrize('mode', ['L', 'P', 'I', 'I;16'])
    def test_values_of_masks(self, mode: str, tmp_path: Path):
        values = np.array([[0, 1, 2], [3, 255, 0]])
        image = Image.fromarray(values.astype({'I': np.int32, 'I;16': np.uint16}.get(mode, np.uint8)))
        if mode == 'P':
            image.putpalette(list(range(256)) * 3)
        path = tmp_path / ('mask.tif' if mode == 'I' else 'mask.png')
        image.save(path)
        plain = MaskFormat(('a', 'b', 'c', 'd'), 255, False).read(path)
        assert plain.tolist() == [[0, 1, 2], [3, IGNORED, 0]]
        ade = MaskFormat(('a', 'b', 'c'), 255, True).read(path)
        assert ade.tolist() == [[IGNORED, 0, 1], [2, IGNORED, IGNORED]]

    @pytest.mark.parametrize('mode', ['I;16B', 'F', '1'])
    def test_masks_of_one_channel(self, mode: str, tmp_path: Path):
        values = np.array([[0, 1], [1, 0]])
        image = Image.frombytes('I;16B', (2, 2), values.astype('>u2').tobytes()) if mode == 'I;16B' else \
            Image.fromarray(values.astype({'F': np.float32, '1': bool}[mode]))
        image.save(tmp_path / 'x.tif')
        assert image.mode == mode and MaskFormat(('a', 'b'), 255, False).read(tmp_path / 'x.tif').equal(
            torch.from_numpy(values))

    @pytest.mark.parametrize('values, words', [
        (np.array([[0.5, 1]], np.float32), 'floats that are no whole numbers, from 0.5 to 1'),
        (np.array([[np.nan, 1]], np.float32), 'floats that are no whole numbers'),
        (np.zeros((2, 2, 2), np.uint8), r'grey with transparency \(LA\): expected one channel .*, not 2'),
        (np.zeros((2, 2, 4), np.uint8), r'a colour picture \(RGBA\): expected one channel .*, not 4'),
        (np.array([[-1, 1]], np.int32), 'holds the value -1'),
    ])
    def test_masks_that_are_none_are_refused_for_what_they_are(self, values: np.ndarray, words: str, tmp_path: Path):
        Image.fromarray(values).save(tmp_path / 'x.tif')
        with pytest.raises(DataError, match=words):
            MaskFormat(('a', 'b'), 255, False).read(tmp_path / 'x.tif')

    @given(st.sampled_from(['L', 'P', '1', 'I', 'I;16', 'I;16B', 'F', 'LA', 'PA', 'RGB', 'RGBA', 'CMYK']),
           st.sampled_from(['.png', '.tif']), st.integers(0, 2 ** 32 - 1))
    @settings(max_examples=40, deadline=None, database=None)
    def test_any_mode_and_depth_of_masks(self, mode: str, suffix: str, seed: int):
        """Every value is kept, or the mode named."""
        values = np.random.default_rng(seed).integers(0, 2 if mode == '1' else 200, (3, 5))
        kind = {'I': np.int32, 'I;16': np.uint16, 'F': np.float32, '1': bool}.get(mode, np.uint8)
        image = Image.frombytes(mode, (5, 3), values.astype('>u2').tobytes()) if mode == 'I;16B' else \
            Image.fromarray(values.astype(kind))
        if mode == 'P':
            image.putpalette(list(range(256)) * 3)
        image = image.convert(mode) if len(Image.new(mode, (1, 1)).getbands()) > 1 else image
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, 'x' + suffix)
            try:
                image.save(path)
            except OSError:
                return  # the format has no such mode
            masks = MaskFormat(tuple(map(str, range(200))), 255, False)
            if len(Image.open(path).getbands()) > 1:
                with pytest.raises(DataError, match='expected one channel'):
                    masks.read(path)
            else:
                assert masks.read(path).equal(torch.from_numpy(values))

    @pytest.mark.parametrize('orientation', range(1, 9))
    def test_images_and_masks_are_upright(self, orientation: int, tmp_path: Path):
        upright = np.zeros((24, 16), np.uint8)
        upright[:8], upright[8:, :4] = 2, 1
        write_turned(tmp_path / 'i.jpg', Image.fromarray(upright * 100), orientation)
        plain, turned = tmp_path / 'plain.png', tmp_path / 'turned.tif'
        Image.fromarray(upright).save(plain)
        write_turned(turned, Image.fromarray(upright), orientation)
        for mask in (plain, turned):
            pair = (tmp_path / 'i.jpg', mask)
            image, classes = MaskedImages([pair], MaskFormat(CLASSES, 255, False), 3, None).read(0)
            assert ((image[0].float() / 100).round().long() == classes).float().mean() > 0.95
            assert classes.equal(torch.from_numpy(upright.astype(int)))
        if orientation > 4:
            Image.fromarray(upright.T).save(plain)
            with pytest.raises(DataError, match=r'differ in size.*The EXIF orientation of the image turns it'):
                MaskedImages([(tmp_path / 'i.jpg', plain)], MaskFormat(CLASSES, 255, False), 3, None).read(0)

    @pytest.mark.parametrize('classes, names', [
        ({'0': 'sky', '2': 'car', '1': 'road'}, ('sky', 'road', 'car')), (['a', 'b', 'a'], ('a', 'b', 'a (2)')),
        ([0, 1], ('0', '1'))])
    def test_names_of_classes(self, classes, names: tuple[str, ...], tmp_path: Path):
        (tmp_path / 'info.json').write_text(json.dumps({'classes': classes}))
        assert _mask_format(SegmentConfig(weights='x', data_dir=str(tmp_path)), tmp_path).classes == names

    @pytest.mark.parametrize('info, words', [
        ({'classes': 'road'}, "classes is 'road', no list of names"),
        ({'classes': {'1': 'sky', '2': 'road'}}, 'keys of classes are not 0, 1'),
        ({'classes': {'sky': 0, 'road': 1}}, 'invalid literal'), ({'classes': None}, 'no list of names'),
        ({'classes': [{'name': 'sky'}]}, 'no list of names'),
        ({'classes': ['a', 'b'], 'ignore_index': 0.5}, 'ignore_index is 0.5'),
        ({'classes': ['a', 'b'], 'ignore_index': [0, 255]}, 'no whole number')])
    def test_what_are_no_names_of_classes(self, info: dict, words: str, tmp_path: Path):
        (tmp_path / 'info.json').write_text(json.dumps(info))
        with pytest.raises(DataError, match=rf'info\.json is damaged.*{words}'):
            _mask_format(SegmentConfig(weights='x', data_dir=str(tmp_path)), tmp_path)

    def test_classes_that_no_mask_has_are_said(self, tmp_path: Path, capsys):
        root = write_data(tmp_path / 'data', train=6, val=2)
        (root / 'info.json').write_text(json.dumps({'classes': [*CLASSES, 'rare', 'rare']}))
        spec = ImageSpec((32, 32), 3, (0.5,) * 3, (0.25,) * 3)
        shared = {'weights': 'x', 'data_dir': str(root), 'eval_split': 'val', 'crop_size': (32,)}
        open_data(SegmentConfig(**shared), spec, CPU)
        text = capsys.readouterr().out
        assert ('No mask of the 6 to train on that were looked at has a pixel of the classes rare; rare (2). '
                'Masks hold 0 to 4 for the classes, and 255 for none.') in text
        assert 'No mask of the 2 to report on' in text

    @pytest.mark.parametrize('ignore', [0, 1])
    def test_a_class_that_is_ignored_is_said(self, ignore: int, tmp_path: Path, capsys):
        root = write_data(tmp_path / 'data', train=4, val=2)
        for path in root.rglob('annotations/*/*.png'):
            values = np.array(Image.open(path))
            Image.fromarray(np.where(values == 255, 0, values)).save(path)
        (root / 'info.json').write_text(json.dumps({'classes': CLASSES, 'ignore_index': ignore}))
        open_data(SegmentConfig(weights='x', data_dir=str(root), eval_split='val', crop_size=(32,)),
                  ImageSpec((32, 32), 3, (0.5,) * 3, (0.25,) * 3), CPU)
        text = capsys.readouterr().out
        assert f'pixel of the class {CLASSES[ignore]}.' in text
        assert f'So the class {CLASSES[ignore]!r} is ignored everywhere' in text
        assert ('% of the pixels of the masks to train on are ignored' in text) == (ignore == 0)

    def test_masks_of_0_and_255_are_refused(self, tmp_path: Path):
        root = write_data(tmp_path / 'data', train=4, val=2)
        for path in root.rglob('annotations/*/*.png'):
            Image.fromarray(np.where(np.array(Image.open(path)) == 1, 255, 0).astype(np.uint8)).save(path)
        (root / 'info.json').unlink()
        settings = {'weights': 'x', 'data_dir': str(root), 'crop_size': (32,), 'eval_split': 'val', 'num_classes': 2}
        spec = ImageSpec((32, 32), 3, (0.5,) * 3, (0.25,) * 3)
        with pytest.raises(DataError, match=r"4 masks to train on hold the class '0' alone, .*255 for none.*gaps"):
            open_data(SegmentConfig(**settings), spec, CPU)
        for path in root.rglob('annotations/*/*.png'):  # as advised
            Image.fromarray(np.array(Image.open(path)) // 255).save(path)
        assert len(open_data(SegmentConfig(**settings), spec, CPU).train) == 4

    @pytest.mark.parametrize('kind, another', [('images', '003.jpg'), ('annotations', '003.tif')])
    def test_two_files_of_one_name(self, kind: str, another: str, tmp_path: Path):
        root = write_data(tmp_path, train=5, val=1)
        Image.open(root / kind / 'train' / '003.png').save(root / kind / 'train' / another)
        with pytest.raises(DataError, match=rf'{kind}/train/003\.\w+ and .*003\.\w+ have one name but for the ending'):
            find_pairs(root, 'train')

    def test_links_hidden_files_and_spellings_of_splits(self, tmp_path: Path):
        root = write_data(tmp_path / 'data', train=4, val=2)
        for kind in ('images', 'annotations'):
            (root / kind / 'train').rename(root / kind / 'training')
            os.symlink(root / kind / 'val', root / kind / 'training' / 'linked')
            (root / kind / 'training' / '.hidden').mkdir()
            (root / kind / 'training' / '._000.png').write_bytes(b'')
        (root / 'annotations' / 'training' / '000.jpg').write_bytes(b'')
        messages = []
        pairs = find_pairs(root, 'train', messages.append)
        assert [p.name for p, _ in pairs] == ['000.png', '001.png', '002.png', '003.png', '000.png', '001.png']
        assert all('1 hidden folder (.hidden), 1 hidden file (._000.png)' in text or '1 hidden file' in text
                   for text in messages) and '1 file of another ending (000.jpg)' in messages[1]
        for kind in ('images', 'annotations'):
            (root / kind / 'Train').mkdir()
        with pytest.raises(DataError, match='several folders that may be the split'):
            find_pairs(root, 'train')

    def test_camvid(self):
        here = Path(__file__).parents[3] / 'shared' / 'data' / 'camvid'
        root = Path(os.environ.get('CAMVID', here))
        if not (root / 'info.json').is_file():
            pytest.skip('CamVid is not there: set CAMVID to its folder')
        config = SegmentConfig(weights='x', data_dir=str(root), eval_split='val', crop_size=(96,), short_side=120,
                               train_images=6, test_images=3)
        data = open_data(config, ImageSpec(config.crop, 3, (0.5,) * 3, (0.25,) * 3), CPU)
        assert len(data.classes) == 11 and data.classes[0] == 'sky' and (len(data.train), len(data.test)) == (6, 3)
        image, mask = data.test[0]
        assert image.shape == (3, 120, 160) and mask.shape == (360, 480) and set(mask.unique().tolist()) <= {
            IGNORED, *range(11)}
        assert all(crop.shape == (3, 96, 96) and target.shape == (96, 96) for crop, target in data.train)
