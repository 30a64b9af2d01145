"""`autoreg-vit segment`: runs of it, stopped and shared, its recipes and its errors."""

from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

pytest.importorskip('segmentation_models_pytorch')
pytest.importorskip('torchmetrics')
pytest.importorskip('sklearn')

from autoreg_vit.commands import dense
from autoreg_vit.commands.cli import main
from autoreg_vit.commands.recipes import load_recipe
from autoreg_vit.commands.segmenting import segment
from autoreg_vit.data.masks import find_pairs, open_data
from autoreg_vit.data.transforms import ImageSpec
from autoreg_vit.engine.optimizers import create_optimizer, create_schedule
from autoreg_vit.engine.processes import Processes
from autoreg_vit.engine.signals import Stopped
from autoreg_vit.errors import CheckpointError, ConfigError, DataError, UsageError
from autoreg_vit.evaluation.mask_scores import evaluate
from autoreg_vit.hub.folders import export_encoder
from autoreg_vit.models.dense.segmenter import load_segmenter
from autoreg_vit.settings.base import make_config, read_settings
from autoreg_vit.settings.dense import SegmentConfig
from tests.support.launching import launch_together
from tests.support.segmenting import reading
from tests.support.shapes import CLASSES, TINY, write_data
from tests.support.supervising import log_of, results_of, stop_after

CPU = Processes(torch.device('cpu'))


SHORT = {'crop_size': (32,), 'steps': 8, 'warmup_steps': 1, 'batch_size': 4, 'lr': 1e-2, 'precision': 'float32',
         'log_every': 2, 'pictures': 2, 'scale': (0.7, 1.4), 'layer_decay': 0.9}


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
        config = make_config(SegmentConfig, read_settings(run / 'config.yaml'), {})
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
        optimizer = create_optimizer(config, torch.nn.Linear(1, 1))
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
