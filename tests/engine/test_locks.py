"""Locks of a run's folder where there is no fcntl."""

import fcntl
import os
import sys
import types
from pathlib import Path

import pytest

pytest.importorskip('sklearn')

from autoreg_vit import __version__
from autoreg_vit.commands import pretraining as pretraining
from autoreg_vit.engine.locks import FolderLock
from autoreg_vit.errors import ConfigError
from autoreg_vit.settings.pretraining import PretrainConfig
from tests.support.bare import run_bare
from tests.support.launching import SETTINGS, log_of


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

    @pytest.mark.usefixtures('no_figures')
    def test_a_run(self, windows, tmp_path: Path):
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
        run = run_bare(code)
        assert (run.returncode, run.stdout) == (0, f'{__version__}\n') and 'autoreg-vit' not in run.stderr
