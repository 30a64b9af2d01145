"""What a run began with is kept when it is resumed: what reads its images, and the precision of its residual stream. Of
runs that began before there was a choice, Pillow read, and the stream was in float32."""

import os
import signal
from pathlib import Path

import pytest
import torch

pytest.importorskip('sklearn')

from autoreg_vit.commands.pretraining import pretrain
from autoreg_vit.data.sources import Digits
from autoreg_vit.data.torchvision_reader import decodes_jpeg
from autoreg_vit.engine.log import read_log
from autoreg_vit.errors import ConfigError
from autoreg_vit.hub.publishing import read_run
from autoreg_vit.settings.base import read_settings
from autoreg_vit.settings.pretraining import PretrainConfig
from autoreg_vit.settings.weights import ExportConfig
from tests.support.launching import SETTINGS, Launch, weights_of

pytestmark = pytest.mark.skipif(not decodes_jpeg(), reason='torchvision without a decoder of JPEG')


@pytest.fixture(scope='module')
def settings(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """Of a run on JPEG files, without accuracies."""
    digits, folder = Digits('train', lambda image: image), tmp_path_factory.mktemp('files')
    for number in range(192):
        image, _ = digits[number]
        # Some that Pillow has to read.
        image.resize((20, 15)).convert('CMYK' if number % 10 == 9 else 'RGB').save(folder / f'{number}.jpg')
    return {**SETTINGS, 'dataset': None, 'data_dir': str(folder), 'eval_split': None, 'in_chans': 3, 'epochs': 1,
            'train_images': None, 'eval_every': 0}


@pytest.fixture(scope='module')
def whole(settings: dict, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The weights of runs that nobody stopped, by what read for them."""
    folder = tmp_path_factory.mktemp('whole')
    weights = {}
    for reader, change in (('torchvision', {}), ('pil', {'reader': 'pil'})):
        weights[reader], recorded = finish({**settings, **change}, folder / reader)
        assert recorded == reader
    assert weights['pil'] != weights['torchvision']
    return weights


def killed_after_a_checkpoint() -> None:
    save, calls = torch.save, []

    def die_in_the_second(state, file):
        calls.append(file)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        save(state, file)

    torch.save = die_in_the_second


def stop(settings: dict, folder: Path) -> None:
    """Begin a run and kill it half-way."""
    launch = Launch({**settings, 'output_dir': str(folder)}, killed_after_a_checkpoint)
    assert launch.wait() == -signal.SIGKILL, launch.text()
    assert (folder / 'last.pt').exists()


def finish(settings: dict, folder: Path) -> tuple[bytes, str]:
    """The weights of a run to its end, and the reader that its config.yaml names."""
    launch = Launch({**settings, 'output_dir': str(folder)})
    assert launch.wait() == 0, launch.text()
    return weights_of(folder), read_settings(folder / 'config.yaml')['reader']


@pytest.mark.parametrize('workers', [0, 2])
def test_the_same_weights_by_torchvision(workers: int, settings: dict, whole: dict, tmp_path: Path):
    stop({**settings, 'workers': workers}, tmp_path / 'run')
    assert finish(settings, tmp_path / 'run') == (whole['torchvision'], 'torchvision')


def test_a_run_of_before_keeps_pil(settings: dict, whole: dict, tmp_path: Path):
    folder = tmp_path / 'run'
    stop({**settings, 'reader': 'pil'}, folder)
    recipe = folder / 'config.yaml'
    recipe.write_text(recipe.read_text().replace('reader: pil\n', ''))
    other = PretrainConfig(**{**settings, 'reader': 'torchvision', 'output_dir': str(folder)})
    with pytest.raises(ConfigError, match='reader: was pil, is torchvision'):
        pretrain(other)
    assert 'reader' not in read_settings(recipe)
    assert read_run(folder, ExportConfig(str(folder), str(tmp_path)))[1].config.reader == 'pil'
    assert finish(settings, folder) == (whole['pil'], 'pil')
    recipe.write_text(recipe.read_text().replace('reader: pil\n', ''))
    launch = Launch({**settings, 'output_dir': str(folder)})
    assert launch.wait() == 0 and 'is finished' in launch.text()


def test_a_run_of_before_keeps_its_stream_in_float32(settings: dict, tmp_path: Path):
    settings = {**settings, 'precision': 'bfloat16'}
    new, _ = finish(settings, tmp_path / 'new')
    assert read_settings(tmp_path / 'new/config.yaml')['residual_in_fp32'] is False
    whole, _ = finish({**settings, 'residual_in_fp32': True}, tmp_path / 'whole')
    assert new != whole
    folder = tmp_path / 'run'
    stop({**settings, 'residual_in_fp32': True}, folder)
    recipe = folder / 'config.yaml'
    recipe.write_text(recipe.read_text().replace('residual_in_fp32: true\n', ''))
    other = PretrainConfig(**{**settings, 'residual_in_fp32': False, 'output_dir': str(folder)})
    with pytest.raises(ConfigError, match='residual_in_fp32: was True, is False'):
        pretrain(other)
    assert 'residual_in_fp32' not in read_settings(recipe)
    assert finish(settings, folder)[0] == whole


def test_what_was_chosen_is_kept(settings: dict, whole: dict, tmp_path: Path):
    stop({**settings, 'reader': 'pil'}, tmp_path / 'run')
    assert finish(settings, tmp_path / 'run') == (whole['pil'], 'pil')


@pytest.mark.usefixtures('no_figures')
def test_passes_of_a_step_make_the_same_step(settings: dict, tmp_path: Path):
    """Four passes of 16 images, and one of 64, but for rounding."""
    losses = []
    for name, change in (('one', {'batch_size': 64}), ('four', {'batch_size': 16, 'accumulate': 4})):
        config = PretrainConfig(**{**settings, **change, 'drop_path_rate': 0.0, 'log_every': 1,
                                   'output_dir': str(tmp_path / name)})
        pretrain(config)
        losses.append([line['loss'] for line in read_log(tmp_path / name / 'log.jsonl') if line['event'] == 'step'])
        assert read_settings(tmp_path / name / 'config.yaml')['reader'] == 'torchvision'
    assert losses[0] == pytest.approx(losses[1], rel=1e-4) and len(losses[0]) == 3
