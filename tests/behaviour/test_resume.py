"""A run that is stopped, however it is stopped, ends in the weights that it would have ended in."""

import errno
import fcntl
import os
import random
import resource
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch

from autoreg_vit.data.transforms import ImageSpec, training_transform

pytest.importorskip('sklearn')

from autoreg_vit import artifacts as checksums
from autoreg_vit.commands import pretraining as pretraining
from autoreg_vit.commands.pretraining import pretrain
from autoreg_vit.data import sources as data
from autoreg_vit.data.batches import Batches
from autoreg_vit.engine import checkpoints as checkpoint
from autoreg_vit.engine import run
from autoreg_vit.engine.locks import FolderLock
from autoreg_vit.engine.processes import Processes
from autoreg_vit.engine.signals import StopSignals
from autoreg_vit.errors import CheckpointError, ConfigError
from autoreg_vit.settings.pretraining import PretrainConfig
from tests.support.launching import SETTINGS, Launch, log_of, weights_of

ONE = Processes(torch.device('cpu'))


@pytest.fixture(scope='module')
def reference(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """The folder of a run that nobody stopped, and its seconds."""
    folder = tmp_path_factory.mktemp('reference') / 'run'
    Launch({**SETTINGS, 'epochs': 1, 'eval_every': 0, 'output_dir': str(folder.with_name('warm'))}).wait()
    begin = time.monotonic()
    launch = Launch({**SETTINGS, 'output_dir': str(folder)})
    assert launch.wait() == 0, launch.text()
    return folder, time.monotonic() - begin


def essence(folder: Path) -> list[dict]:
    """The log without what depends on the clock, on edits of the clone meanwhile, or on resumes."""
    changing = ('time', 'images_per_second', 'commit')
    return [{k: v for k, v in line.items() if k not in changing} for line in log_of(folder)
            if line['event'] != 'resume']


def finish_and_compare(settings: dict, reference: Path) -> None:
    """Launch again, to the end, and expect the reference's weights and log."""
    launch = Launch(settings)
    assert launch.wait() == 0, launch.text()
    folder = Path(settings['output_dir'])
    assert weights_of(folder) == weights_of(reference)
    assert essence(folder) == essence(reference), 'lines are doubled, missing or different'


@pytest.mark.parametrize('workers', [0, 2])
def test_killed_at_random_moments(workers: int, reference: tuple[Path, float], tmp_path: Path):
    folder, seconds = reference
    settings = {**SETTINGS, 'workers': workers, 'output_dir': str(tmp_path / 'run')}
    chance = random.Random(workers)
    for _ in range(5):
        launch = Launch(settings)
        time.sleep(chance.uniform(0.1, 0.3) * seconds)
        launch.kill()
    finish_and_compare(settings, folder)


def killed_in_evaluation() -> None:
    evaluate, calls = pretraining.accuracies, []

    def die_the_second_time(*args):
        calls.append(args)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return evaluate(*args)

    pretraining.accuracies = die_the_second_time


def killed_in_checkpoint() -> None:
    save, calls = torch.save, []

    def die_in_the_third(state, file):
        calls.extend([file] if isinstance(file, checksums.HashingFile) else [])
        if len(calls) == 3 and file is calls[-1]:
            file.write(b'half of it')
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        save(state, file)

    torch.save = die_in_the_third


def killed_in_export() -> None:
    export, calls = pretraining.export_pretraining, []

    def die_after_the_encoder(*args, **kwargs):
        calls.append(args)
        if len(calls) == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        export(*args, **kwargs)

    pretraining.export_pretraining = die_after_the_encoder


def killed_in_figures() -> None:
    pretraining.draw_figures = lambda *args: os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize('sabotage', [killed_in_evaluation, killed_in_checkpoint, killed_in_export, killed_in_figures])
def test_killed_in_a_bad_moment(sabotage, reference: tuple[Path, float], tmp_path: Path):
    settings = {**SETTINGS, 'output_dir': str(tmp_path / 'run')}
    launch = Launch(settings, sabotage)
    assert launch.wait() == -signal.SIGKILL, launch.text()
    finish_and_compare(settings, reference[0])


def hear_hangups() -> None:
    """As in a terminal, also where the tests run under nohup."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signal_saves_and_stops(number: int, reference: tuple[Path, float], tmp_path: Path):
    settings = {**SETTINGS, 'checkpoint_every_steps': 0, 'output_dir': str(tmp_path / 'run')}
    launch = Launch(settings, hear_hangups)
    while not any(line['event'] == 'step' for line in run.read_log(tmp_path / 'run' / 'log.jsonl')):
        time.sleep(0.02)
        assert launch.process.exitcode is None, launch.text()
    os.kill(launch.process.pid, number)
    assert launch.wait() == 128 + number
    assert 'Stopped after step' in launch.text() and 'Traceback' not in launch.text()
    assert (tmp_path / 'run' / 'last.pt').exists()
    finish_and_compare(settings, reference[0])
    # The log says of each part of a run what it ran with.
    begun, resumed = (line for line in log_of(tmp_path / 'run') if line['event'] in ('start', 'resume'))
    changing = ('time', 'event', 'commit')
    assert {k: v for k, v in begun.items() if k not in changing} == {
        k: v for k, v in resumed.items() if k not in changing}


def test_hangup_is_ignored_under_nohup():
    before = signal.getsignal(signal.SIGHUP)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignals() as signals:
            os.kill(os.getpid(), signal.SIGHUP)
            assert signals.received is None and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        with StopSignals() as signals:
            os.kill(os.getpid(), signal.SIGHUP)
            assert signals.received == signal.SIGHUP
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, before)


def test_finished_run_says_so(reference: tuple[Path, float]):
    before = weights_of(reference[0])
    launch = Launch({**SETTINGS, 'output_dir': str(reference[0])})
    assert launch.wait() == 0 and 'is finished' in launch.text()
    assert weights_of(reference[0]) == before


@pytest.fixture(scope='module')
def stopped(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """Settings of a run that was killed half-way."""
    settings = {**SETTINGS, 'epochs': 1, 'eval_every': 0, 'output_dir': str(tmp_path_factory.mktemp('stopped') / 'run')}
    assert Launch(settings, killed_in_checkpoint).wait() == -signal.SIGKILL
    return settings


class TestResumedRuns:
    """In this process, on a run that was stopped half-way."""

    @pytest.mark.parametrize('change, words', [
        ({'seed': 5}, 'seed: was 0, is 5'),
        ({'batch_size': 32}, 'batch_size: was 16, is 32'),
        ({'opt': 'sgd'}, 'opt: was adamw, is sgd'),
        ({'depth': 3}, 'depth: was 2, is 3'),
    ])
    def test_other_settings(self, change: dict, words: str, stopped: dict):
        with pytest.raises(ConfigError, match=f'other settings .*{words}.*--force-resume'):
            pretrain(PretrainConfig(**{**stopped, **change}))

    def test_precision_that_auto_chose_elsewhere(self, stopped: dict, tmp_path: Path):
        """A machine without bfloat16 is told how to go on with a run that began with it."""
        folder = shutil.copytree(stopped['output_dir'], tmp_path / 'run')
        recipe = folder / 'config.yaml'
        recipe.write_text(recipe.read_text().replace('precision: float32', 'precision: bfloat16'))
        settings = {**stopped, 'output_dir': str(folder)}
        with pytest.raises(ConfigError, match=r'was bfloat16, is float32.* with --precision bfloat16 to resume'):
            pretrain(PretrainConfig(**settings))
        assert Launch({**settings, 'precision': 'bfloat16'}).wait() == 0

    @pytest.mark.parametrize('damage', ['removed', 'cut', 'garbled', 'foreign'])
    def test_a_log_beside_a_whole_checkpoint(self, damage: str, stopped: dict, tmp_path: Path):
        folder = shutil.copytree(stopped['output_dir'], tmp_path / 'run')
        log = folder / 'log.jsonl'
        whole = log.read_bytes()
        if damage == 'removed':
            log.unlink()
        else:
            log.write_bytes({'cut': whole[:len(whole) // 2], 'garbled': whole.replace(b'"loss"', b'\xff\xfe\n"lo', 1),
                             'foreign': b'[1, 2]\n"text"\n'}[damage])
        launch = Launch({**stopped, 'output_dir': str(folder)})
        assert launch.wait() == 0, launch.text()
        if damage != 'garbled':  # the same number of bytes and more
            assert 'was removed or cut short' in launch.text()
        assert weights_of(folder)
        lines = run.read_log(log)
        assert [line['event'] for line in lines].count('resume') == 1 and lines[-1]['event'] == 'finish'

    def test_other_threads_or_processes(self, stopped: dict, monkeypatch):
        torch.set_num_threads(2)
        monkeypatch.setenv('OMP_NUM_THREADS', '2')  # else it would go on with one
        try:
            with pytest.raises(ConfigError, match=r'threads: was 1, is 2.*OMP_NUM_THREADS'):
                pretrain(PretrainConfig(**stopped))
        finally:
            torch.set_num_threads(1)

    def test_other_optimizer_or_model_by_force(self, stopped: dict):
        with pytest.raises(CheckpointError, match=r'last\.pt.*Adam.*SGD'):
            pretrain(PretrainConfig(**{**stopped, 'opt': 'sgd', 'force_resume': True}))
        with pytest.raises(CheckpointError, match=r'missing: encoder\.blocks\.2'):
            pretrain(PretrainConfig(**{**stopped, 'depth': 3, 'opt': 'adamw', 'force_resume': True}))
        with pytest.raises(CheckpointError, match=r'of another shape'):
            pretrain(PretrainConfig(**{**stopped, 'embed_dim': 32, 'depth': 2, 'force_resume': True}))

    def test_data_that_changed(self, stopped: dict, monkeypatch):
        monkeypatch.setattr(data.Digits, '__len__', lambda self: min(len(self.targets), 200))
        with pytest.raises(ConfigError, match='train_images: was 240, is 200'):
            pretrain(PretrainConfig(**stopped))

    def test_a_run_with_no_steps_left_is_no_success(self, reference: tuple[Path, float], tmp_path: Path):
        """Of two epochs that are done, one cannot be asked for, nor the same two with another learning rate."""
        folder = tmp_path / 'run'
        shutil.copytree(reference[0], folder)
        before = {path: path.read_bytes() for path in folder.rglob('*') if path.is_file()}
        settings = {**SETTINGS, 'output_dir': str(folder), 'force_resume': True}
        for change, steps in (({'epochs': 1}, 15), ({'lr': 1e-4}, 30)):
            with pytest.raises(ConfigError, match=f'has taken 30 steps, and .* ends after {steps}: nothing is left'):
                pretrain(PretrainConfig(**{**settings, **change}))
        assert all(path.read_bytes() == content for path, content in before.items() if path.name != '.lock')
        assert Launch({**settings, 'epochs': 3}).wait() == 0
        assert [line['step'] for line in log_of(folder) if line['event'] == 'step'][-1] == 45

    def test_moved_data(self, stopped: dict, tmp_path: Path):
        """The digits need no folder, so that any will do."""
        settings = {**stopped, 'data_dir': str(tmp_path), 'download': True, 'output_dir': str(tmp_path / 'run')}
        shutil.copytree(stopped['output_dir'], tmp_path / 'run')
        assert Launch(settings).wait() == 0

    def test_two_runs_in_one_folder(self, stopped: dict):
        lock = FolderLock(Path(stopped['output_dir']))
        with pytest.raises(ConfigError, match=f'Another run is writing to .*process {os.getpid()}'):
            pretrain(PretrainConfig(**stopped))
        lock.release()

    @pytest.mark.parametrize('number', [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF])
    def test_a_file_system_without_locks(self, number: int, tmp_path: Path, monkeypatch, capsys):
        def refuse(*_):
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(fcntl, 'flock', refuse)
        lock = FolderLock(tmp_path)
        assert f'has no locks ({os.strerror(number)})' in capsys.readouterr().out
        lock.release()

    def test_full_disk_ends_the_run_in_one_line(self, stopped: dict, tmp_path: Path):
        settings = {**stopped, 'output_dir': str(tmp_path / 'run')}
        launch = Launch(settings, disk_full_at_the_second_checkpoint)
        assert launch.wait() == 2
        assert 'The disk is full' in launch.text() and 'Traceback' not in launch.text()
        assert checkpoint.load_checkpoint(tmp_path / 'run' / 'last.pt')['step'] == 5
        assert Launch(settings).wait() == 0

    def test_without_config_or_checkpoint(self, tmp_path: Path):
        (tmp_path / 'log.jsonl').write_text('{}')
        with pytest.raises(ConfigError, match=r'without its config\.yaml'):
            pretrain(PretrainConfig(**{**SETTINGS, 'output_dir': str(tmp_path)}))

    def test_killed_before_the_first_checkpoint_begins_anew(self, stopped: dict, tmp_path: Path):
        folder = tmp_path / 'run'
        folder.mkdir()
        (folder / 'log.jsonl').write_text('{"event": "start"}\n{"event": "st')
        (folder / 'config.yaml').write_text((Path(stopped['output_dir']) / 'config.yaml').read_text())
        assert Launch({**stopped, 'output_dir': str(folder)}).wait() == 0
        assert [line['event'] for line in log_of(folder)].count('start') == 1


def disk_full_at_the_second_checkpoint() -> None:
    save, calls = torch.save, []

    def fill(state, file):
        calls.extend([file] if isinstance(file, checksums.HashingFile) else [])
        if len(calls) == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
        save(state, file)

    torch.save = fill


def test_every_draw_is_a_function_of_its_place():
    """The same batches from any place on, with 0 and 2 loader processes; other ones in another epoch."""
    digits = data.open_dataset('digits', None, 'train', training_transform(
        ImageSpec((8, 8), 1, (0.5,), (0.5,)), (0.2, 1.0), 0.5))

    def batches(start: int, count: int, workers: int = 0) -> list[torch.Tensor]:
        source = Batches(digits, 500, 0, ONE, workers).start_at(start)
        return [next(source)[0] for _ in range(count)]

    straight = batches(0, 5)
    assert all(map(torch.equal, batches(3, 2), straight[3:]))
    assert all(map(torch.equal, batches(1, 3, workers=2), straight[1:4]))
    assert not torch.equal(straight[0], straight[2])
