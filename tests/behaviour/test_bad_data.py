"""Data that cannot be trained on is named in one error, before training where it can be known."""

import os
import shutil
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from autoreg_vit.data.checks import check_images
from autoreg_vit.data.transforms import ImageSpec, training_transform

pytest.importorskip('sklearn')

from autoreg_vit.commands.pretraining import pretrain
from autoreg_vit.data import sources as data
from autoreg_vit.data.batches import Batches
from autoreg_vit.engine.processes import Processes
from autoreg_vit.errors import ConfigError, DataError
from autoreg_vit.settings.pretraining import PretrainConfig
from tests.support.launching import SETTINGS, log_of

ONE = Processes(torch.device('cpu'))
TRANSFORM = training_transform(ImageSpec((8, 8), 3, (0.5,) * 3, (0.5,) * 3), (0.5, 1.0), 0.5)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twenty images of two classes."""
    draws = np.random.default_rng(0)
    for number in range(20):
        path = tmp_path / 'images' / 'ab'[number % 2] / f'{number:02d}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draws.integers(0, 256, (20, 14, 3), dtype=np.uint8)).save(path)
    return tmp_path / 'images'


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def empty(path: Path) -> None:
    os.truncate(path, 0)


def no_image(path: Path) -> None:
    path.write_text('this is no image')


def bomb(path: Path) -> None:
    Image.new('1', (20_000, 10_000)).save(path)


@pytest.mark.parametrize('damage', [truncate, empty, no_image, bomb])
@pytest.mark.filterwarnings('ignore::PIL.Image.DecompressionBombWarning')
class TestCorruptImages:
    def test_too_many_are_refused_before_training(self, damage, folder: Path, tmp_path: Path):
        damage(folder / 'a' / '04.png')
        with pytest.raises(DataError, match=r'1 of 20 images cannot be read.*--max-corrupt 0\.001.*04\.png'):
            pretrain(PretrainConfig(data_dir=str(folder), img_size=8, patch_size=4, segments=2, batch_size=4,
                                    output_dir=str(tmp_path / 'run')))
        assert not (tmp_path / 'run').exists()

    def test_few_are_counted_named_and_stood_in_for(self, damage, folder: Path, capsys):
        damage(folder / 'a' / '04.png')
        dataset = data.open_dataset('folder', str(folder), 'train', TRANSFORM)
        messages = []
        names = check_images(dataset, 100, 0.1, messages.append)
        assert names == [str(folder / 'a' / '04.png')] and '1 of 20 images cannot be read' in messages[0]
        for workers in (0, 1):
            batches = Batches(dataset, 20, 0, ONE, workers=workers, max_corrupt=0.1)
            assert next(batches.start_at(0))[0].shape == (20, 3, 8, 8)
            assert '04.png' in capsys.readouterr().out
        with pytest.raises(DataError, match=r'1 of 20 images cannot be read.*04\.png'):
            next(Batches(dataset, 20, 0, ONE).start_at(0))

    def test_through_timm(self, damage, folder: Path):
        damage(folder / 'a' / '04.png')
        dataset = data.open_dataset('torch/image_folder', str(folder), 'train', TRANSFORM)
        with pytest.raises(DataError, match=r'1 of 20 images cannot be read.*04\.png'):
            next(Batches(dataset, 20, 0, ONE).start_at(0))


def test_nothing_but_corrupt_images(folder: Path):
    for path in folder.rglob('*.png'):
        no_image(path)
    dataset = data.open_dataset('folder', str(folder), 'train', TRANSFORM)
    with pytest.raises(DataError, match=r'16 images in a row cannot be read'):
        next(Batches(dataset, 20, 0, ONE, max_corrupt=1.0).start_at(0))


@pytest.mark.parametrize('labels, words', [([0, 1, 10], 'Image 2 has the label 10'), ([0, -1, 3], 'Image 1.* -1')])
def test_label_out_of_range(labels: list[int], words: str, monkeypatch, tmp_path: Path):
    with pytest.raises(DataError, match=words):
        data.check_labels(np.array(labels), 10)
    data.check_labels(np.array([0, 9]), 10)
    digits = data.Digits.__init__

    def mislabelled(self, split, transform):
        digits(self, split, transform)
        self.targets[5], self.classes = labels[int(np.argmax(np.abs(labels)))] if 10 in labels else -1, list(range(10))

    monkeypatch.setattr(data.Digits, '__init__', mislabelled)
    with pytest.raises(DataError, match='Image 5 has the label'):
        pretrain(PretrainConfig(**{**SETTINGS, 'output_dir': str(tmp_path / 'run')}))
    assert not (tmp_path / 'run').exists()


def test_unknown_names_list_the_known():
    with pytest.raises(DataError, match="'torch/cifar10'"):
        data.open_dataset('torch/cifar11', '.', 'train', TRANSFORM)
    with pytest.raises(DataError, match='digits, folder, or a timm name'):
        data.open_dataset('cifar', None, 'train', TRANSFORM)
    with pytest.raises(DataError, match=r"'wsd/images'.*'wds'"):  # timm would open the folder
        data.open_dataset('wsd/images', '.', 'train', TRANSFORM)


def stand_in(monkeypatch, init) -> None:
    """A package wandb that has `init` alone."""
    module = types.ModuleType('wandb')
    module.__spec__ = types.SimpleNamespace(name='wandb')
    module.init = init
    monkeypatch.setitem(sys.modules, 'wandb', module)


class TestTracker:
    def test_not_installed(self, tmp_path: Path, monkeypatch):
        monkeypatch.setitem(sys.modules, 'wandb', None)
        monkeypatch.setattr('importlib.util.find_spec', lambda name: None)
        with pytest.raises(ConfigError, match='pip install wandb'):
            pretrain(PretrainConfig(**{**SETTINGS, 'tracker': 'wandb', 'output_dir': str(tmp_path / 'run')}))
        with pytest.raises(ConfigError, match="'comet'"):
            pretrain(PretrainConfig(**{**SETTINGS, 'tracker': 'comet', 'output_dir': str(tmp_path / 'run')}))
        assert not (tmp_path / 'run').exists()

    @pytest.mark.usefixtures('no_figures')
    def test_one_id_a_run(self, tmp_path: Path, monkeypatch):
        ids = []

        def begin(id: str, **options):
            assert not set(id) & set(":;,#?/'")  # as wandb has it
            ids.append(id)
            return types.SimpleNamespace(log=lambda line: None)

        stand_in(monkeypatch, begin)
        folder = tmp_path / 'lr:1e-3 #2'
        settings = {**SETTINGS, 'epochs': 1, 'eval_every': 0, 'tracker': 'wandb', 'output_dir': str(folder)}
        pretrain(PretrainConfig(**settings))
        lines = (folder / 'log.jsonl').read_text().splitlines(keepends=True)
        (folder / 'log.jsonl').write_text(''.join(lines[:-1]))  # as if killed just before its end
        pretrain(PretrainConfig(**settings))
        shutil.rmtree(folder)
        pretrain(PretrainConfig(**settings))
        assert ids[0] == ids[1] != ids[2]

    def test_refuses_to_start(self, tmp_path: Path, monkeypatch):
        def begin(**options):
            raise RuntimeError('not logged in')

        stand_in(monkeypatch, begin)
        with pytest.raises(ConfigError, match=r'not logged in.*wandb login.*--tracker'):
            pretrain(PretrainConfig(**{**SETTINGS, 'tracker': 'wandb', 'output_dir': str(tmp_path / 'run')}))
        assert not (tmp_path / 'run').exists()

    def test_gets_the_lines_of_the_log(self, tmp_path: Path, monkeypatch):
        sent, begun = [], []
        stand_in(monkeypatch, lambda **options: begun.append(options) or types.SimpleNamespace(log=sent.append))
        folder = pretrain(PretrainConfig(**{**SETTINGS, 'epochs': 1, 'eval_every': 0, 'tracker': 'wandb',
                                            'output_dir': str(tmp_path / 'run')}))
        losses = [line['loss'] for line in log_of(folder) if line['event'] == 'step']
        assert [line['step/loss'] for line in sent if 'step/loss' in line] == losses and begun[0]['resume'] == 'allow'
        by_rank = next(line for line in log_of(folder) if line['event'] == 'loss_by_rank')
        assert sum(by_rank['tokens']) == 60 * 16 and len(by_rank['loss_by_rank']) <= 5
        events = pytest.importorskip('tensorboard.backend.event_processing.event_accumulator')
        board = events.EventAccumulator(str(folder / 'tensorboard')).Reload()
        assert [point.value for point in board.Scalars('step/loss')] == pytest.approx(losses)
