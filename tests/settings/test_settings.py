"""Settings of every command, and what of the machine they name: refused before work begins, by name."""

import dataclasses
import typing
from pathlib import Path

import pytest
import torch

pytest.importorskip('sklearn')

from autoreg_vit.commands import COMMANDS
from autoreg_vit.commands.cli import main
from autoreg_vit.data.pretraining import training_batches
from autoreg_vit.data.transforms import ImageSpec
from autoreg_vit.engine.processes import Processes
from autoreg_vit.errors import ConfigError
from autoreg_vit.settings.base import free_settings, make_config
from autoreg_vit.settings.pretraining import PretrainConfig

ONE = Processes(torch.device('cpu'))

#: What the commands cannot do without.
NEEDED = {'weights': 'x', 'data_dir': 'x', 'images': (), 'run': 'x', 'folder': 'x', 'source': 'x'}


def config_class(command: str) -> type:
    entry = COMMANDS[command]
    return entry.config()


def settings_of(kind: type) -> dict:
    return {name: value for name, value in NEEDED.items() if name in {f.name for f in dataclasses.fields(kind)}}


NUMBERS = [(command, field.name) for command in COMMANDS for field in dataclasses.fields(config_class(command))
           if 'float' in str(typing.get_type_hints(config_class(command))[field.name])]


@pytest.mark.parametrize(('command', 'name'), NUMBERS)
def test_numbers_are_finite(command: str, name: str):
    kind = config_class(command)
    make_config(kind, {}, settings_of(kind))
    default = getattr(make_config(kind, {}, settings_of(kind)), name)
    for value in (float('nan'), float('inf'), float('-inf'), 'nan', '.inf', 10 ** 400):
        several = (value, *default[1:]) if isinstance(default, tuple) else value
        with pytest.raises(ConfigError, match=rf'^{name} must be (a finite number|of type float)'):
            make_config(kind, {name: several}, settings_of(kind))


@pytest.mark.parametrize('arguments', [['--lr', 'nan'], ['--weight-decay', 'inf'], ['--betas', '0.9', 'nan'],
                                       ['--betas', '2', '2'], ['--seed', '-1'], ['--seed', str(2 ** 32)],
                                       ['--workers', '-1'], ['--train-images', '0']])
def test_numbers_on_the_command_line(arguments: list[str], tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(['pretrain', *arguments]) == 2
    error = capsys.readouterr().err
    assert arguments[-1].lstrip('-') in error and error.count('\n') == 1 and not list(tmp_path.iterdir())


FOLDERS = [(command, field.name) for command in COMMANDS for field in dataclasses.fields(config_class(command))
           if field.name in ('output_dir', 'data_dir')]


@pytest.mark.parametrize(('command', 'name'), FOLDERS)
def test_folders_have_names(command: str, name: str):
    kind = config_class(command)
    with pytest.raises(ConfigError, match=f"{name} is '', perhaps of an unset variable: name a folder"):
        kind(**{**settings_of(kind), name: ''})


@pytest.mark.parametrize('command', [name for name, command in COMMANDS.items() if command.has_recipes])
def test_moved_data_may_be_resumed(command: str):
    kind = config_class(command)
    names = {'data_dir', 'download'} & {f.name for f in dataclasses.fields(kind)}
    assert 'data_dir' in names and names <= free_settings(kind)


@pytest.mark.parametrize('cached', [False, True])
def test_pretraining_takes_as_many_images_as_are_asked_for(cached: bool):
    config = PretrainConfig(dataset='digits', train_images=100, batch_size=20, crop_scale=(0.2, 1.0), workers=0,
                            cache_on_device=cached)
    batches = training_batches(config, ImageSpec((8, 8), 1, (0.5,), (0.5,)), ONE)
    assert (batches.sampler.length, batches.per_epoch) == (100, 5)
    assert next(batches.start_at(0))[0].shape == (20, 1, 8, 8)
