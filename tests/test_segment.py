"""`autoreg-vit segment`: UPerNet on an encoder, its data, its evaluation and its recipes."""

import json
import os
import tempfile
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

pytest.importorskip('segmentation_models_pytorch')
pytest.importorskip('torchmetrics')
pytest.importorskip('sklearn')

from launching import launch_together
from pictures import write_turned
from supervising import log_of, results_of, stop_after

from autoreg_vit.commands import dense
from autoreg_vit.commands.cli import main
from autoreg_vit.commands.recipes import load_recipe
from autoreg_vit.commands.segmenting import segment
from autoreg_vit.data.masks import Augment, MaskedImages, MaskFormat, Plain, _mask_format, find_pairs, open_data
from autoreg_vit.data.transforms import ImageSpec
from autoreg_vit.engine.loop import adam_options, create_optimizer, create_schedule
from autoreg_vit.engine.processes import Processes
from autoreg_vit.engine.seeding import seed_cpu
from autoreg_vit.engine.signals import Stopped
from autoreg_vit.errors import CheckpointError, ConfigError, DataError, UsageError
from autoreg_vit.evaluation.mask_scores import Windows, evaluate, sliding_logits
from autoreg_vit.figures.predicted_masks import palette, predictions_figure
from autoreg_vit.hub.folders import export_encoder
from autoreg_vit.models.dense.segmenter import IGNORED, Segmenter, load_segmenter, pixel_loss
from autoreg_vit.settings.base import make_config
from autoreg_vit.settings.segmenting import SegmentConfig

CPU = Processes(torch.device('cpu'))


def reading(config: SegmentConfig) -> dict:
    """What `evaluate` takes from the settings of a run."""
    return dict(windows=Windows(config.crop, config.steps_between_windows, config.batch_size),
                precision=config.precision, workers=config.workers, group=CPU)


CLASSES = ('ground', 'square', 'disc')
TINY = {'img_size': 16, 'patch_size': 4, 'embed_dim': 32, 'depth': 4, 'num_heads': 2}
SHORT = {'crop_size': (32,), 'steps': 8, 'warmup_steps': 1, 'batch_size': 4, 'lr': 1e-2, 'precision': 'float32',
         'log_every': 2, 'pictures': 2, 'scale': (0.7, 1.4), 'layer_decay': 0.9}


def draw(seed: int, size: tuple[int, int] = (48, 40)) -> tuple[np.ndarray, np.ndarray]:
    """A bright square and a dark disc on grey noise, and their mask, whose frame is ignored."""
    draws, (height, width) = np.random.default_rng(seed), size
    image, mask = draws.integers(100, 150, (height, width, 3)), np.zeros((height, width), np.uint8)
    y, x = np.mgrid[:height, :width]
    (a, b), (c, d) = draws.integers(10, 30, (2, 2))
    for inside, label, colour in (((abs(y - a) < 9) & (abs(x - b) < 9), 1, (230, 60, 60)),
                                  ((y - c) ** 2 + (x - d) ** 2 < 81, 2, (20, 40, 200))):
        image[inside], mask[inside] = colour, label
    mask[0] = 255
    return image.astype(np.uint8), mask


def write_data(folder: Path, train: int = 24, val: int = 6, **info) -> Path:
    for split, first, count in (('train', 0, train), ('val', 1000, val)):
        for kind in ('images', 'annotations'):
            (folder / kind / split).mkdir(parents=True)
        for number in range(count):
            image, mask = draw(first + number)
            Image.fromarray(image).save(folder / 'images' / split / f'{number:03}.png')
            Image.fromarray(mask).save(folder / 'annotations' / split / f'{number:03}.png')
    (folder / 'info.json').write_text(json.dumps({'classes': CLASSES, **info}))
    return folder


@pytest.fixture(scope='module')
def data(tmp_path_factory) -> str:
    return str(write_data(tmp_path_factory.mktemp('data') / 'shapes'))


@pytest.fixture(scope='module')
def encoder(tmp_path_factory) -> str:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp('weights') / 'encoder'
    export_encoder(timm.create_model('vit_tiny_patch4_32_randsac', **TINY), folder, mean=[0.5] * 3, std=[0.25] * 3)
    return str(folder)


@pytest.fixture(scope='module')
def run(encoder: str, data: str, tmp_path_factory) -> Path:
    """By the command line, with a bundled recipe."""
    folder = tmp_path_factory.mktemp('run') / 'segment'
    assert main(['segment', '--config', 'upernet_camvid', '--weights', encoder, '--data-dir', data, '--crop-size', '32',
                 '--short-side', '40', '--steps', '60', '--warmup-steps', '5', '--batch-size', '8', '--lr', '1e-2',
                 '--layer-decay', '0.9', '--eval-every', '30', '--log-every', '10', '--precision', 'float32',
                 '--output-dir', str(folder)]) == 0
    return folder


class TestRun:
    def test_fewer_steps_than_were_taken_are_no_success(self, run: Path, capsys):
        assert main(['segment', '--config', str(run / 'config.yaml'), '--steps', '30', '--force-resume']) == 2
        assert 'has taken 60 steps, and with these settings it ends after 30' in capsys.readouterr().err

    def test_learns_shapes(self, run: Path):
        log, results = log_of(run), results_of(run)
        losses = [line['loss'] for line in log if line['event'] == 'step']
        scores = [line['miou'] for line in log if line['event'] == 'evaluation']
        assert losses[-1] < 0.6 * losses[0] and len(scores) == 2
        assert scores[1] == pytest.approx(results['miou'], abs=1e-3) and results['miou'] > 60
        assert results['pixel_accuracy'] > results['miou'] and list(results['iou']) == list(CLASSES)
        assert np.mean(list(results['iou'].values())) == pytest.approx(results['miou'], abs=1e-3)
        assert log[-1]['event'] == 'finish'
        for name in ('predictions', 'learning'):
            assert np.asarray(Image.open(run / 'figures' / f'{name}.png').convert('RGB')).std() > 10

    def test_the_network_loads_again(self, run: Path, data: str):
        model = load_segmenter(run / 'model')
        assert model.config['classes'] == list(CLASSES) and model.config['mean'] == [0.5] * 3
        config = make_config(SegmentConfig, load_recipe(str(run / 'config.yaml')), {})
        spec = ImageSpec(config.crop, 3, tuple(model.config['mean']), tuple(model.config['std']))
        found = evaluate(model, open_data(config, spec, CPU).test, 3, **reading(config))
        assert found['miou'] == pytest.approx(results_of(run)['miou'], abs=1e-3)
        (run / 'model' / 'broken').mkdir()
        with pytest.raises(CheckpointError, match='holds no whole segmenter'):
            load_segmenter(run / 'model' / 'broken')

    def test_stopped_and_resumed_gives_the_same_bytes(self, encoder: str, data: str, tmp_path: Path, monkeypatch):
        """With all that draws: scales, crops, flips, distortions, dropout and drop path."""
        settings = {**SHORT, 'weights': encoder, 'data_dir': data, 'eval_split': 'val', 'accumulate': 2,
                    'drop_path_rate': 0.3, 'dropout': 0.3, 'clip_grad': 1.0, 'pictures': 0, 'test_images': 1}
        whole = segment(SegmentConfig(**settings, output_dir=str(tmp_path / 'whole')))
        config = SegmentConfig(**settings, output_dir=str(tmp_path / 'parts'))
        with monkeypatch.context() as patch:
            stop_after(3, patch)
            with pytest.raises(Stopped, match='after step 3 of 8'):
                segment(config)
        parts = segment(config)
        weights = [(folder / 'model' / 'model.safetensors').read_bytes() for folder in (whole, parts)]
        assert weights[0] == weights[1]
        losses = [[line['loss'] for line in log_of(folder) if line['event'] == 'step'] for folder in (whole, parts)]
        assert losses[0] == losses[1] and len(losses[0]) == 4

    def test_two_processes_count_every_image_once(self, encoder: str, data: str, tmp_path: Path):
        """What two processes report is what one finds with the network that they leave."""
        folder = tmp_path / 'two'
        options = {**SHORT, 'weights': encoder, 'data_dir': data, 'eval_split': 'val', 'test_images': 5, 'steps': 3}
        launches = launch_together({**options, 'command': 'segment', 'dataset': None, 'output_dir': str(folder)}, 2)
        assert [launch.wait() for launch in launches] == [0, 0], launches[0].text() + launches[1].text()
        config = SegmentConfig(**options, workers=0)
        spec = ImageSpec(config.crop, 3, (0.5,) * 3, (0.25,) * 3)
        found = evaluate(load_segmenter(folder / 'model'), open_data(config, spec, CPU).test, 3, **reading(config))
        results = results_of(folder)
        assert results['test_images'] == found['images'] == 5
        assert [results['miou'], results['pixel_accuracy']] == pytest.approx(
            [found['miou'], found['pixel_accuracy']], abs=1e-3)

    def test_without_an_eval_split_a_fifth_is_held_out(self, encoder: str, data: str, tmp_path: Path):
        folder = segment(SegmentConfig(**{**SHORT, 'steps': 1}, weights=encoder, data_dir=data, decoder_channels=16,
                                       in_chans=1, output_dir=str(tmp_path / 'run')))
        results, model = results_of(folder), load_segmenter(folder / 'model')
        assert (results['test_images'], results['train_images']) == (5, 19)
        assert model.config['decoder_channels'] == 16 and model(torch.randn(1, 1, 32, 32)).shape == (1, 3, 32, 32)


class TestNetwork:
    def test_any_image_size_and_every_gradient(self):
        encoder = timm.create_model('vit_tiny_patch4_32_saim', **TINY, num_classes=0, dynamic_img_size=True)
        model = Segmenter(encoder, 5, 32)
        images, masks = torch.randn(2, 3, 30, 41), torch.randint(-1, 5, (2, 30, 41))
        model(images, masks).backward()
        assert not [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum()]
        assert model.eval()(images).shape == (2, 5, 30, 41)

    def test_ignored_pixels_count_for_nothing_in_the_sum(self):
        """The mean over parts of a batch is that over the batch, however many pixels of each part are ignored."""
        logits, masks = torch.randn(4, 3, 5, 5), torch.randint(0, 3, (4, 5, 5))
        masks[0] = IGNORED
        masks[1, :2] = IGNORED
        whole = pixel_loss(logits, masks)
        torch.testing.assert_close(whole, (pixel_loss(logits[:2], masks[:2]) + pixel_loss(logits[2:], masks[2:])) / 2)
        changed = torch.where((masks == IGNORED)[:, None], 7.0, logits)
        torch.testing.assert_close(pixel_loss(changed, masks), whole)
        assert pixel_loss(logits[:1], masks[:1]) == 0

    def test_layer_decay(self):
        """The last block learns at 0.65 of the heads' rate, the one below at 0.65 of that, and so on to the stem."""
        encoder = timm.create_model('vit_tiny_patch4_32_saim', **TINY, num_classes=0, dynamic_img_size=True)
        model = Segmenter(encoder, 5, 32)
        config = SegmentConfig(weights='x', data_dir='x')
        optimizer = create_optimizer(config, model, layer_decay=config.layer_decay, **adam_options(config))
        names = {id(p): name for name, p in model.named_parameters()}
        scale, decay = {}, {}
        for group in optimizer.param_groups:
            for p in group['params']:
                scale[names[id(p)]], decay[names[id(p)]] = group['lr_scale'], group['weight_decay']
        inside = 'network.encoder.pyramid.encoder.'
        assert set(scale) == set(names.values())
        for name, power in (('pos_embed', 5), ('cls_token', 5), ('blocks.0.mlp.fc1.weight', 4),
                            ('blocks.3.mlp.fc1.weight', 1)):
            assert scale[inside + name] == pytest.approx(0.65 ** power)
        assert scale['network.segmentation_head.1.weight'] == scale['auxiliary.0.weight'] == 1
        assert decay[inside + 'pos_embed'] == decay[inside + 'blocks.0.norm1.weight'] == 0
        assert decay[inside + 'blocks.0.mlp.fc1.weight'] == 0.05


class TestEvaluation:
    @settings(max_examples=25, deadline=None)
    @given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 16), st.integers(1, 16), st.integers(1, 5))
    def test_windows_cover_the_image(self, height: int, width: int, crop: int, stride: int, at_once: int):
        """Windows of a network that gives back its pixels put the image together again, in order."""
        stride = min(stride, crop)
        images = [torch.randn(2, height, width), torch.randn(2, width, height)]
        sizes = []

        def network(batch: torch.Tensor) -> torch.Tensor:
            sizes.append(batch.shape)
            return batch

        found = sliding_logits(network, images, (crop, crop), (stride, stride), at_once)
        for image, logits in zip(images, found):
            torch.testing.assert_close(logits, image)
        assert all(len(s) == 4 and s[0] <= at_once and s[2:] == (crop, crop) for s in sizes)

    def test_scores_by_hand(self):
        """mIoU is over classes that are there or predicted; ignored pixels count for nothing."""
        masks = torch.tensor([[0, 0, 0, 1], [1, 1, IGNORED, IGNORED]])
        logits = torch.nn.functional.one_hot(torch.tensor([[0, 0, 1, 1], [1, 0, 2, 0]]), 4).permute(2, 0, 1).float()
        config = SegmentConfig(weights='x', data_dir='x', crop_size=(2, 4), precision='float32', workers=0)
        found = evaluate(lambda batch: batch, [(logits, masks)], 4, **reading(config))
        assert found['iou'] == pytest.approx([100 * 2 / 4, 100 * 2 / 4, 0, 0])
        assert found['miou'] == pytest.approx(50) and found['pixel_accuracy'] == pytest.approx(100 * 4 / 6)

    def test_predictions_have_the_size_of_the_masks(self):
        """Images that are resized first are scored at their own size."""
        image, mask = draw(1)
        config = SegmentConfig(weights='x', data_dir='x', crop_size=(16,), short_side=20, precision='float32',
                               workers=0)
        resized, truth = Plain(config, ImageSpec((16, 16), 3, (0.0,) * 3, (1.0,) * 3))(
            torch.from_numpy(image).permute(2, 0, 1), torch.from_numpy(mask.astype(np.int64)).clamp(max=2))
        assert resized.shape == (3, 24, 20) and truth.shape == (48, 40)

        def by_colour(batch: torch.Tensor) -> torch.Tensor:  # a disc is blue, a square red
            return torch.stack([torch.full_like(batch[:, 0], 0.25), batch[:, 0] - batch[:, 2],
                                batch[:, 2] - batch[:, 0]], dim=1)

        assert evaluate(by_colour, [(resized, truth)], 3, **reading(config))['miou'] > 70


    def test_pictures_show_what_they_should(self, tmp_path: Path):
        """Next to a grey image its classes in colour over the same grey, and pixels without a class dark."""
        truth = torch.full((40, 60), 1)
        truth[:20] = IGNORED
        predictions_figure([torch.zeros(3, 20, 30)], [truth], [torch.full((40, 60), 2)], CLASSES,
                           ImageSpec((20, 30), 3, (0.5,) * 3, (0.25,) * 3), tmp_path / 'picture.png')
        pixels = np.asarray(Image.open(tmp_path / 'picture.png').convert('RGB')).reshape(-1, 3).astype(int)
        grey, colours = np.array([128] * 3), 255 * palette(3)
        for part, colour in ((0.2, grey), (0.1, 0.35 * grey), (0.1, 0.35 * grey + 0.65 * colours[1]),
                             (0.2, 0.35 * grey + 0.65 * colours[2])):
            assert (abs(pixels - colour).max(1) <= 2).mean() > part


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

    def test_a_bad_pair_may_be_tolerated(self, encoder: str, tmp_path: Path, capsys):
        """Another image stands in for it, in training alone."""
        root = write_data(tmp_path / 'data', train=8, val=2)
        (root / 'annotations' / 'train' / '003.png').write_bytes(b'')
        settings = {**SHORT, 'steps': 2, 'weights': encoder, 'data_dir': str(root), 'eval_split': 'val', 'pictures': 0}
        with pytest.raises(DataError, match='1 of 8 images cannot be read'):
            segment(SegmentConfig(**settings, output_dir=str(tmp_path / 'refused')))
        segment(SegmentConfig(**settings, max_corrupt=0.2, output_dir=str(tmp_path / 'run')))
        assert '003.png' in capsys.readouterr().out
        assert not (tmp_path / 'refused').exists()

    def test_camvid(self):
        here = Path(__file__).parents[2] / 'shared' / 'data' / 'camvid'
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


def spoil(root: Path, how: str) -> None:
    """Damage the data of `write_data` in one way."""
    mask, image = (root / kind / 'train' / '003.png' for kind in ('annotations', 'images'))
    values = np.array(Image.open(mask))
    match how:
        case 'no mask':
            mask.unlink()
        case 'no image':
            image.unlink()
        case 'value':
            values[5, 5] = 3
            Image.fromarray(values).save(mask)
        case 'size':
            Image.fromarray(values[:, :-1]).save(mask)
        case 'ignored':
            Image.fromarray(np.full_like(values, 255)).save(mask)
        case 'colour':
            Image.fromarray(values).convert('RGB').save(mask)
        case 'cut':
            mask.write_bytes(mask.read_bytes()[:60])
        case 'image cut':
            image.write_bytes(image.read_bytes()[:60])
        case 'info':
            (root / 'info.json').write_text('{"classes": 3')


class TestErrors:
    @pytest.mark.parametrize('how, message', [
        ('no mask', r'1 images without a mask of the same name.*images/train/003\.png'),
        ('no image', r'1 masks without an image of the same name.*annotations/train/003\.png'),
        ('value', r'annotations/train/003\.png holds the value 3, and with 3 classes values are 0 to 2, or 255'),
        ('size', r'003\.png and its image .*003\.png differ in size: 39 x 48 and 40 x 48 pixels'),
        ('ignored', r'annotations/train/003\.png is empty'),
        ('colour', r'annotations/train/003\.png is a colour picture \(RGB\): expected one channel'),
        ('cut', r'annotations/train/003\.png cannot be read'),
        ('image cut', r'images/train/003\.png cannot be read'),
        ('info', r'info\.json is damaged'),
    ])
    def test_bad_data(self, how: str, message: str, encoder: str, tmp_path: Path):
        root = write_data(tmp_path / 'data', train=5, val=1)
        spoil(root, how)
        config = SegmentConfig(**SHORT, weights=encoder, data_dir=str(root), eval_split='val',
                               output_dir=str(tmp_path / 'run'))
        with pytest.raises(DataError, match=message):
            segment(config)
        assert not (tmp_path / 'run').exists()

    @pytest.mark.parametrize('options, message', [
        ({'data_dir': 'nowhere'}, 'No folder nowhere'),
        ({'eval_split': 'dev'}, r'images has the splits train, val; name one'),
        ({'num_classes': 4}, r'num_classes=4 does not fit .*info\.json, which names 3 classes'),
        ({'batch_size': 1}, 'normalises over the images of a batch.*--batch-size 2'),
        ({'batch_size': 32}, 'fewer than a batch of 32'),
        ({'weights': 'resnet18', 'pretrained': False}, 'resnet18'),
        ({'crop_size': (30,)}, '30 x 30 pixels is not a whole number of patches'),
    ])
    def test_bad_settings(self, options: dict, message: str, encoder: str, data: str, tmp_path: Path):
        settings = {**SHORT, 'weights': encoder, 'data_dir': data, 'eval_split': 'val', **options}
        with pytest.raises(UsageError, match=message):
            segment(SegmentConfig(**settings, output_dir=str(tmp_path / 'run')))
        assert not (tmp_path / 'run').exists()

    @pytest.mark.parametrize('options, message', [
        ({'data_dir': None}, '--data-dir names a folder'), ({'scale': (2.0, 0.5)}, 'scale is two factors'),
        ({'crop_size': (1, 2, 3)}, 'crop_size is one number'), ({'schedule': 'step'}, "'linear' or 'cosine'"),
        ({'steps': 0}, 'steps must be at least 1'),
        ({'stride': 513}, 'would leave pixels between windows'),
        ({'crop_share': 2.0}, 'crop_share is between 0 and 1'),
    ])
    def test_settings_that_cannot_be(self, options: dict, message: str):
        with pytest.raises(ConfigError, match=message):
            SegmentConfig(**{'weights': 'x', 'data_dir': 'x', **options})

    def test_classes_must_be_known(self, encoder: str, tmp_path: Path):
        root = write_data(tmp_path / 'data', train=4, val=1)
        (root / 'info.json').unlink()
        settings = {**SHORT, 'weights': encoder, 'data_dir': str(root), 'eval_split': 'val', 'steps': 1}
        with pytest.raises(ConfigError, match='Say --num-classes'):
            segment(SegmentConfig(**settings, output_dir=str(tmp_path / 'run')))
        folder = segment(SegmentConfig(**settings, num_classes=3, output_dir=str(tmp_path / 'run')))
        assert list(results_of(folder)['iou']) == ['0', '1', '2']

    def test_missing_packages(self, monkeypatch, capsys):
        monkeypatch.setattr(dense.importlib.util, 'find_spec', lambda name: None)
        assert main(['segment', '--weights', 'x', '--data-dir', 'x']) == 2
        assert 'pip install "autoreg-vit[dense]"' in capsys.readouterr().err


class TestRecipe:
    def test_of_the_papers(self):
        """RandSAC C and, where both papers point to it, BEiT's setting for weights without labels."""
        config = make_config(SegmentConfig, load_recipe('upernet_ade20k', 'segment'), {'weights': 'x', 'data_dir': 'x'})
        assert (config.opt, config.batch_size * config.accumulate, config.layer_decay, config.crop, config.steps) == (
            'adamw', 16, 0.65, (512, 512), 160000)
        assert (config.lr, config.weight_decay, config.warmup_steps, config.schedule, config.drop_path_rate,
                config.auxiliary, config.steps_between_windows, config.scale, config.short_side) == (
            7e-4, 0.05, 1500, 'linear', 0.1, 0.4, (341, 341), (0.5, 2.0), 512)
        assert (config.num_classes, config.reduce_zero_label) == (150, True)
        default = SegmentConfig(weights='x', data_dir='x')
        assert default.steps_between_windows == (341, 341) and default.lr == config.lr

    @pytest.mark.parametrize('schedule', ['linear', 'cosine'])
    def test_schedule_in_steps(self, schedule: str):
        """From 0 up to the rate at the end of the warm-up, and down to 0 at the last step; scaled by the batch."""
        config = SegmentConfig(weights='x', data_dir='x', steps=100, warmup_steps=20, batch_size=8, schedule=schedule)
        optimizer = create_optimizer(config, torch.nn.Linear(1, 1), **adam_options(config))
        schedule = create_schedule(config, optimizer, steps_per_epoch=7)
        rates = []
        for step in range(101):
            schedule.step_update(step)
            rates.append(optimizer.param_groups[0]['lr'])
        assert rates[0] == 0 and rates[10] == pytest.approx(1.75e-4) and rates[20] == pytest.approx(3.5e-4)
        assert rates[60] == pytest.approx(1.75e-4) and rates[100] == pytest.approx(0)
        assert (rates[30] == pytest.approx(3.5e-4 * 70 / 80)) == (config.schedule == 'linear')

    def test_find_pairs_in_subfolders(self, tmp_path: Path):
        for kind, ending in (('images', 'jpg'), ('annotations', 'png')):
            (tmp_path / kind / 'train' / 'town').mkdir(parents=True)
            Image.new('L', (4, 4)).save(tmp_path / kind / 'train' / 'town' / f'a.{ending}')
        assert [(a.name, b.name) for a, b in find_pairs(tmp_path, 'train')] == [('a.jpg', 'a.png')]
