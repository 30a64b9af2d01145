"""Settings of every command, and what of the machine they name: refused before work begins, by name."""

import dataclasses
import fcntl
import os
import subprocess
import sys
import types
import typing
from pathlib import Path

import pytest
import torch

pytest.importorskip('sklearn')

from autoreg_vit import __version__
from autoreg_vit.commands import COMMANDS
from autoreg_vit.commands import pretraining as pretraining
from autoreg_vit.commands.cli import main
from autoreg_vit.data.transforms import ImageSpec
from autoreg_vit.engine import machine as runtime
from autoreg_vit.engine.locks import FolderLock
from autoreg_vit.engine.processes import Processes
from autoreg_vit.errors import ConfigError
from autoreg_vit.settings.base import free_settings, make_config
from autoreg_vit.settings.pretraining import PretrainConfig
from tests.support.launching import SETTINGS, log_of

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


@pytest.mark.parametrize('command', [name for name, command in COMMANDS.items() if command.has_recipes])
def test_moved_data_may_be_resumed(command: str):
    kind = config_class(command)
    names = {'data_dir', 'download'} & {f.name for f in dataclasses.fields(kind)}
    assert 'data_dir' in names and names <= free_settings(kind)


@pytest.mark.parametrize('cached', [False, True])
def test_pretraining_takes_as_many_images_as_are_asked_for(cached: bool):
    config = PretrainConfig(dataset='digits', train_images=100, batch_size=20, crop_scale=(0.2, 1.0), workers=0,
                            cache_on_device=cached)
    batches = pretraining.training_batches(config, ImageSpec((8, 8), 1, (0.5,), (0.5,)), ONE)
    assert (batches.sampler.length, batches.per_epoch) == (100, 5)
    assert next(batches.start_at(0))[0].shape == (20, 1, 8, 8)


class TestDevices:
    @pytest.mark.parametrize('kind', ['cuda', 'mps', 'xpu'])
    def test_that_are_not_there(self, kind: str, monkeypatch):
        monkeypatch.setitem(runtime.DEVICES, kind, lambda: 0)
        with pytest.raises(ConfigError, match=f"'{kind}' is not there: PyTorch sees 0 .* --device cpu"):
            runtime.resolve_device(kind)
        monkeypatch.setitem(runtime.DEVICES, kind, lambda: 1)
        assert runtime.resolve_device(f'{kind}:0').type == kind
        with pytest.raises(ConfigError, match=f"'{kind}:1' is not there: PyTorch sees 1 "):
            runtime.resolve_device(f'{kind}:1')

    @pytest.mark.parametrize('name', ['cpuu', 'cdua', 'gpu', 'CPU:', 'meta', 'vulkan', 'cuda:-1', 'cuda:x', ''])
    def test_that_are_misspelt_or_do_not_train(self, name: str):
        with pytest.raises(ConfigError, match=f"evice '{name}'"):
            runtime.resolve_device(name)

    def test_a_second_processor_is_none(self):
        with pytest.raises(ConfigError, match='PyTorch sees 1 of the kind cpu'):
            runtime.resolve_device('cpu:1')


@pytest.fixture
def windows(monkeypatch) -> types.ModuleType:
    """No fcntl and no fork, and msvcrt's locks, which are on bytes, done by fcntl's."""
    module = types.ModuleType('msvcrt')
    module.LK_NBLCK, module.LK_UNLCK, places = 1, 2, []

    def locking(descriptor: int, mode: int, size: int) -> None:
        places.append(os.lseek(descriptor, 0, os.SEEK_CUR))
        try:
            fcntl.flock(descriptor, fcntl.LOCK_UN if mode == module.LK_UNLCK else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise PermissionError(13, 'Permission denied') from error

    module.locking, module.places = locking, places
    monkeypatch.setitem(sys.modules, 'msvcrt', module)
    monkeypatch.setitem(sys.modules, 'fcntl', None)
    monkeypatch.delattr(os, 'register_at_fork')
    return module


class TestWithoutFcntl:
    def test_locks_are_those_of_windows(self, windows, tmp_path: Path):
        lock = FolderLock(tmp_path)
        text = (tmp_path / '.lock').read_text()
        with pytest.raises(ConfigError, match=f'Another run is writing to .*process {os.getpid()}'):
            FolderLock(tmp_path)
        lock.release()
        lock.release()
        FolderLock(tmp_path).release()
        assert text.startswith('process ') and all(place > len(text) for place in windows.places)

    def test_a_run(self, windows, tmp_path: Path, monkeypatch):
        monkeypatch.setattr(pretraining, 'draw_figures', lambda *arguments: None)
        folder = pretraining.pretrain(PretrainConfig(**{**SETTINGS, 'epochs': 1, 'eval_every': 0,
                                                        'output_dir': str(tmp_path / 'run')}))
        assert log_of(folder)[-1]['event'] == 'finish'

    def test_neither_is_one_line(self, tmp_path: Path, monkeypatch):
        for name in ('fcntl', 'msvcrt'):
            monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(ConfigError, match=r'neither fcntl .* nor msvcrt'):
            FolderLock(tmp_path)

    def test_the_command_line(self):
        code = ("import runpy, sys; sys.modules['fcntl'] = sys.modules['resource'] = None; "
                "sys.argv[1:] = ['--version']; runpy.run_module('autoreg_vit', run_name='__main__')")
        run = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=300)
        assert (run.returncode, run.stdout) == (0, f'{__version__}\n') and 'autoreg-vit' not in run.stderr
