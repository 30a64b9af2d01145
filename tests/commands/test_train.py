"""`autoreg-vit pretrain`, from the command line down to what it leaves behind."""

import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image

from autoreg_vit.engine.run import create_folder

pytest.importorskip('sklearn')

from autoreg_vit.commands.cli import main
from autoreg_vit.commands.pretraining import pretrain
from autoreg_vit.commands.recipes import load_recipe
from autoreg_vit.data import sources as data
from autoreg_vit.data.labelled import hold_out
from autoreg_vit.engine.loss_history import NonFiniteLoss
from autoreg_vit.errors import ConfigError, DataError, UsageError
from autoreg_vit.settings.base import make_config, read_settings
from autoreg_vit.settings.pretraining import PretrainConfig
from tests.support.bare import run_bare

SMALL = {'embed_dim': 32, 'depth': 2, 'num_heads': 1, 'decoder_depth': 1}

DIGITS = {**load_recipe('digits'), **SMALL, 'epochs': 1, 'batch_size': 128, 'eval_images': 200}

FOLDER = {**SMALL, 'img_size': 16, 'patch_size': 4, 'segments': [4, 2], 'epochs': 1, 'batch_size': 4,
          'warmup_epochs': 0}


def log_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / 'log.jsonl').read_text().splitlines()]


def last_of(folder: Path, event: str) -> dict:
    return [line for line in log_of(folder) if line['event'] == event][-1]


def weights_of(folder: Path) -> bytes:
    return (folder / 'pretrain' / 'model.safetensors').read_bytes()


def draw_images(folder: Path, count: int, mode: str = 'RGB', seed: int = 0, size: tuple[int, int] = (20, 14)) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(seed)
    for number in range(count):
        pixels = generator.integers(0, 255, (*size, {'RGB': 3, 'RGBA': 4, 'L': 1}[mode]), dtype=np.uint8)
        Image.fromarray(pixels.squeeze(), mode).save(folder / f'{number}.png')


@pytest.fixture
def class_folders(tmp_path: Path) -> Path:
    root = tmp_path / 'images'
    for number, name in enumerate(('cat', 'dog')):
        draw_images(root / 'train' / name, 8, seed=number)
        draw_images(root / 'test' / name, 3, seed=10 + number)
    return root


@pytest.fixture(scope='module')
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run on digits by the command line."""
    folder = tmp_path_factory.mktemp('run') / 'digits'
    recipe = folder.parent / 'recipe.yaml'
    recipe.write_text(yaml.safe_dump({**DIGITS, 'epochs': 2, 'eval_every': 1}))
    assert main(['pretrain', '--config', str(recipe), '--output-dir', str(folder), '--log-every', '4']) == 0
    return folder


class TestRun:
    def test_leaves_logs_weights_and_figures(self, run: Path):
        log = log_of(run)
        assert log[0]['event'] == 'start' and log[0]['train_images'] == 1437
        assert [line['images'] for line in log if line['event'] == 'evaluation'] == [0, 1408, 2816]
        steps = [line for line in log if line['event'] == 'step']
        assert [line['step'] for line in steps] == [4, 8, 12, 16, 20, 22]
        assert all(np.isfinite(line['loss']) and line['images_per_second'] > 0 for line in steps)
        assert steps[-1]['loss'] < steps[0]['loss']
        for name in ('loss', 'serialization', 'reconstruction', 'loss_by_rank'):
            pixels = np.asarray(Image.open(run / 'figures' / f'{name}.png').convert('RGB'))
            assert min(pixels.shape[:2]) > 200 and pixels.std() > 10

    def test_config_repeats_the_run(self, run: Path):
        config = make_config(PretrainConfig, read_settings(run / 'config.yaml'), {})
        assert config.epochs == 2 and config.segments == (5, 3) and config.workers == 0 and config.device == 'cpu'

    def test_encoder_loads_without_this_package(self, run: Path):
        code = ('import sys, timm, torch\n'
                f'model = timm.create_model("local-dir:{run / "encoder"}", pretrained=True).eval()\n'
                'print(model(torch.ones(1, 1, 8, 8)).sum().item())\n'
                'assert "autoreg_vit" not in sys.modules\n')
        alone = run_bare(code)
        assert alone.returncode == 0, alone.stderr
        model = timm.create_model(f'local-dir:{run / "pretrain"}', pretrained=True).eval()
        expected = model.encoder(torch.ones(1, 1, 8, 8)).sum().item()
        assert float(alone.stdout) == pytest.approx(expected, abs=1e-4)

    def test_whole_model_loads_with_its_options(self, run: Path):
        model = timm.create_model(f'local-dir:{run / "pretrain"}', pretrained=True)
        assert model.serialization.segments == (5, 3) and not model.target.norm_pix and len(model.encoder.blocks) == 2
        assert torch.isfinite(model(torch.zeros(2, 1, 8, 8)).loss)

    def test_learning_rate_warms_up_and_falls(self, run: Path):
        rates = [line['lr'] for line in log_of(run) if line['event'] == 'step']
        assert max(rates) <= DIGITS['lr'] * 128 / 256 and rates[-1] < max(rates) / 10 and rates[0] < max(rates)


@pytest.mark.usefixtures('no_figures')
def test_same_seed_same_weights(tmp_path: Path):
    settings = {**DIGITS, 'train_images': 512}
    folders = [pretrain(PretrainConfig(**{**settings, 'seed': seed, 'output_dir': str(tmp_path / str(n))}))
               for n, seed in enumerate((1, 1, 2))]
    assert weights_of(folders[0]) == weights_of(folders[1]) != weights_of(folders[2])


@pytest.mark.usefixtures('no_figures')
class TestFolders:
    def test_class_folders_with_splits(self, class_folders: Path, tmp_path: Path):
        folder = pretrain(PretrainConfig(**FOLDER, data_dir=str(class_folders), eval_split='test',
                                         output_dir=str(tmp_path / 'run')))
        log = log_of(folder)
        assert log[0]['train_images'] == 16 and {'knn', 'linear'} <= set(last_of(folder, 'evaluation'))

    def test_held_out_fifth_without_a_split(self, class_folders: Path, tmp_path: Path):
        folder = pretrain(PretrainConfig(**FOLDER, data_dir=str(class_folders), output_dir=str(tmp_path / 'run')))
        assert 'linear' in last_of(folder, 'evaluation')

    @pytest.mark.parametrize('mode', ['RGB', 'RGBA', 'L'])
    @pytest.mark.parametrize('channels', [1, 3])
    def test_flat_folder_without_labels(self, mode: str, channels: int, tmp_path: Path):
        draw_images(tmp_path / 'flat', 9, mode)
        folder = pretrain(PretrainConfig(**FOLDER, in_chans=channels, data_dir=str(tmp_path / 'flat'),
                                         output_dir=str(tmp_path / 'run')))
        assert last_of(folder, 'step') and 'evaluation' not in {line['event'] for line in log_of(folder)}

    def test_loader_processes_and_saim(self, class_folders: Path, tmp_path: Path):
        config = PretrainConfig(
            model='saim_vit_tiny_patch4_32', embed_dim=32, depth=2, num_heads=1, img_size=16, epochs=1, batch_size=8,
            workers=2, data_dir=str(class_folders), output_dir=str(tmp_path / 'run'))
        folder = pretrain(config)
        assert read_settings(folder / 'config.yaml')['crop_scale'] == [0.67, 1.0]

    def test_through_timm(self, class_folders: Path, tmp_path: Path):
        folder = pretrain(PretrainConfig(**FOLDER, dataset='torch/image_folder', data_dir=str(class_folders),
                                         output_dir=str(tmp_path / 'run')))
        assert log_of(folder)[0]['train_images'] == 16

    def test_web_dataset(self, tmp_path: Path):
        webdataset = pytest.importorskip('webdataset')
        draw_images(tmp_path / 'flat', 16)
        with webdataset.TarWriter(str(tmp_path / 'train-0000.tar')) as shard:
            for number in range(16):
                shard.write({'__key__': f'{number:04d}', 'png': (tmp_path / 'flat' / f'{number}.png').read_bytes(),
                             'cls': b'0'})
        (tmp_path / '_info.json').write_text(json.dumps({'splits': {'train': {
            'name': 'train', 'filenames': ['train-0000.tar'], 'shard_lengths': [16], 'num_samples': 16}}}))
        folder = pretrain(PretrainConfig(**FOLDER, dataset='wds/images', data_dir=str(tmp_path),
                                         output_dir=str(tmp_path / 'run')))
        assert last_of(folder, 'step')['images'] == 16

    def test_a_run_survives_a_class_of_one_image_and_a_damaged_one(self, tmp_path: Path, capsys):
        """The only image of a class is held out, so that the classifiers know a single class; one cannot be read."""
        draw_images(tmp_path / 'data' / 'many', 11)
        draw_images(tmp_path / 'data' / 'one', 1)
        (tmp_path / 'data' / 'many' / '10.png').write_bytes(b'no image')
        seed = next(seed for seed in range(99) if 11 in hold_out(12, 0.2, seed)[1])
        folder = pretrain(PretrainConfig(**FOLDER, seed=seed, data_dir=str(tmp_path / 'data'), max_corrupt=0.2,
                                         precision='float32', output_dir=str(tmp_path / 'run')))
        found = [line for line in log_of(folder) if line['event'] == 'evaluation']
        assert len(found) == 2 and all(line['knn'] == line['linear'] == 50 for line in found)
        assert log_of(folder)[-1]['event'] == 'finish'
        text = capsys.readouterr().out
        assert 'without an image to train on: one. 1 of the 2' in text and 'left out of the accuracies' in text


def test_figures_without_labels(tmp_path: Path):
    draw_images(tmp_path / 'flat', 9)
    folder = pretrain(PretrainConfig(**FOLDER, data_dir=str(tmp_path / 'flat'), output_dir=str(tmp_path / 'run')))
    assert (folder / 'figures' / 'reconstruction.png').exists()


class TestErrors:
    @pytest.mark.parametrize('arguments, words', [
        (['--modle', 'x'], ['--modle', '--model']),
        (['--epochs', 'many'], ['--epochs', 'many']),
        (['--model', 'randsac_vit_tinny'], ['randsac_vit_tinny', 'randsac_vit_tiny']),
        (['--model', 'vit_tiny_randsac'], ['is an encoder']),
        (['--model', 'randsac_vit_tiny.cifar11'], ['takes no tag', 'Use --model randsac_vit_tiny,']),
        (['--model', 'randsac_vit_tiny_patch4_32.cifar10_10ep'], ['Use --model randsac_vit_tiny_patch4_32,']),
        (['--config', 'digit'], ['digit', 'digits']),
        (['--opt', 'adamww'], ['adamww', 'adamw']),
        (['--device', 'cuda:99'], ['cuda:99', 'cpu']),
        (['--device', 'toaster'], ['toaster']),
        (['--segments', '3', '5'], ['(3, 5)', 'fine to coarse']),
        (['--segments', '99', '5'], ['99', '16 tokens']),
        (['--serialization', 'squares', '--segments', '5'], ['5 squares', '16, 4']),
        (['--patch-size', '3'], ['8 x 8', '3 x 3']),
        (['--num-heads', '5'], ['5 heads', '128']),
        (['--decoder', 'none'], ['none']),
        (['--batch-size', '5000'], ['5000', '1437']),
        (['--accumulate', '500'], ['500']),
        (['--epochs', '0'], ['epochs', '0']),
        (['--hflip', '2'], ['hflip', '2']),
        (['--data-dir', 'nowhere'], ['nowhere']),
        (['--dataset', 'cifar10'], ['cifar10', 'torch/cifar10']),
        (['--dataset', 'torch/cifar11', '--data-dir', '.'], ['torch/cifar11']),
        (['--eval-split', 'val'], ['val', 'test']),
        (['--precision', 'float8'], ['float8', 'bfloat16']),
        (['--in-chans', '5'], ['5', 'grey']),
        (['--impl', 'spda'], ['spda', 'sdpa']),
        (['--impl', 'triton', '--num-heads', '8'], ['(32, 64)', 'got 16']),
    ])
    def test_one_line_and_status_2(self, arguments: list[str], words: list[str], capsys, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        assert main(['pretrain', *arguments]) == 2
        error = capsys.readouterr().err
        assert error.count('\n') == 1 and 'Traceback' not in error
        for word in words:
            assert word in error
        assert not list(tmp_path.iterdir()), 'nothing is written before the settings are known to work'

    def test_debug_shows_the_traceback(self, capsys):
        assert main(['pretrain', '--debug', '--epochs', '0']) == 2
        assert 'Traceback' in capsys.readouterr().err

    def test_no_command(self, capsys):
        assert main([]) == 2
        assert 'COMMAND' in capsys.readouterr().err

    def test_output_folder(self, tmp_path: Path):
        (tmp_path / 'file').touch()
        with pytest.raises(ConfigError, match='file'):
            create_folder(str(tmp_path / 'file'), 'name')
        with pytest.raises(ConfigError, match='Cannot write'):
            create_folder('/proc/nowhere', 'name')

    def test_unnamed_runs_do_not_meet(self, tmp_path: Path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        assert create_folder(None, 'a') != create_folder(None, 'a')

    @pytest.mark.parametrize('text, words', [
        ('epoch: 3', "'epoch'.*'epochs'"),
        ('epochs: three', "epochs must be of type int, got 'three'"),
        ('epochs: 3.5', 'epochs must be of type int'),
        ('segments: [11, five]', 'segments must be of type int'),
        ('norm_pix: 1', 'norm_pix must be of type bool'),
        ('- epochs', 'key: value'),
        ('epochs: [', 'not valid YAML'),
    ])
    def test_recipes(self, text: str, words: str, tmp_path: Path):
        (tmp_path / 'recipe.yaml').write_text(text)
        with pytest.raises(ConfigError, match=words):
            make_config(PretrainConfig, load_recipe(str(tmp_path / 'recipe.yaml')), {})

    def test_folders(self, tmp_path: Path):
        transform = None
        (tmp_path / 'empty').mkdir()
        with pytest.raises(DataError, match='No images in'):
            data.open_dataset('folder', str(tmp_path / 'empty'), 'train', transform)
        (tmp_path / 'bare' / 'a').mkdir(parents=True)
        (tmp_path / 'bare' / 'b').mkdir()
        with pytest.raises(DataError, match='without images'):
            data.open_dataset('folder', str(tmp_path / 'bare'), 'train', transform)
        draw_images(tmp_path / 'split' / 'val' / 'a', 1)
        draw_images(tmp_path / 'split' / 'test' / 'a', 1)
        with pytest.raises(DataError, match=r"no split 'train'.*test, val"):
            data.open_dataset('folder', str(tmp_path / 'split'), 'train', transform)

    def test_labels_asked_for_but_not_there(self, tmp_path: Path):
        draw_images(tmp_path / 'root' / 'train', 8)
        draw_images(tmp_path / 'root' / 'test', 8)
        with pytest.raises(ConfigError, match='needs labels'):
            pretrain(PretrainConfig(**FOLDER, data_dir=str(tmp_path / 'root'), eval_split='test'))

    def test_diverging_run_says_so_and_keeps_weights(self, tmp_path: Path):
        settings = {**DIGITS, 'epochs': 3, 'opt': 'sgd', 'lr': 1e18, 'output_dir': str(tmp_path / 'run')}
        with pytest.raises(NonFiniteLoss, match=r'at step \d+ \(epoch \d, images \d+, .* of digits\): lower --lr'):
            pretrain(PretrainConfig(**settings))
        assert issubclass(NonFiniteLoss, UsageError)
