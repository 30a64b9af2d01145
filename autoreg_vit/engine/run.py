"""A run's folder: its settings, log and checkpoints, and whether to begin, go on or leave it as finished."""

import os
import shutil
from dataclasses import fields
from pathlib import Path
from typing import Any

import timm
import torch

from ..artifacts import writing
from ..errors import ConfigError
from ..settings.base import free_settings, plain, read_settings, save_config, with_added
from ..version import __version__
from .checkpoints import load_checkpoint, previous_of, save_checkpoint
from .choices import Choices, begun_with
from .locks import FolderLock
from .log import Log, check_tracker, followers_of, read_log
from .processes import Processes
from .progress import say
from .provenance import hardware, source_commit

CHECKPOINT = 'last.pt'


class Run:
    """The folder of a run, held by one command at a time; a context manager that gives it back.

    Open it on every process once settings, data and model are known to work; only the main process writes.

    Args:
        config: Resolved settings, of which those declared free may change on resume. `output_dir` is set to the folder.
        name: Of the folder, where `output_dir` is None.
        facts: What else must be the same for the same weights, such as the number of images; the number of processes,
            and of threads on a CPU, is added.
        steps: After how many the run ends; None for one that saves no checkpoints.

    Attributes:
        state: The checkpoint to go on from, on the CPU of every process, or None at the beginning.
        finished: Whether the run is complete, so that there is nothing to do.

    Raises:
        ConfigError: for a folder that is in use, holds something else, or a run with other settings or facts, or one
            that has taken all the steps that are asked for.
        CheckpointError: where no whole checkpoint is left.
    """

    def __init__(
            self, config: Any, name: str, group: Processes, facts: dict[str, Any] | None = None,
            steps: int | None = None,
    ):
        check_tracker(config.tracker)
        self.group, self._config, self._steps, self._ended = group, config, steps, False
        self._lock: FolderLock | None = None
        self.facts = {**(facts or {}), 'processes': group.world_size,
                      'threads': torch.get_num_threads() if group.device.type == 'cpu' else None}
        try:
            config.output_dir, self.finished, resumes = group.on_main(lambda: self._open(name))
            self.folder = Path(config.output_dir)
            self.state = self._read() if resumes and not self.finished else None
            if not self.finished:
                group.on_main(self._prepare)
            self.log = Log(self.folder / 'log.jsonl', self.state['log_bytes'] if self.state else 0,
                           writes=group.is_main and not self.finished)
            if not self.finished:
                group.on_main(self._follow)
        except BaseException:
            self.close()
            raise

    def start(self, precision: str, **about: Any) -> None:
        """Log where the run begins or goes on: versions, hardware, what a resume may change, and `about`."""
        self.log.write(
            event='start' if self.state is None else 'resume', version=__version__, commit=source_commit(),
            torch=torch.__version__, timm=timm.__version__, hardware=hardware(self.group.device),
            device=str(self.group.device), processes=self.group.world_size, threads=torch.get_num_threads(),
            precision=precision, **about)

    def save(self, state: dict[str, Any]) -> None:
        """Save `state` with the log's position and the run's facts, on the main process alone. Raises CheckpointError
        where it cannot be written; the last good one is kept."""
        if self.group.is_main:
            save_config(self._config, self.folder / 'config.yaml')  # by force it may be another one from here on
            state = {**state, 'log_bytes': self.log.sync(), 'facts': self.facts}
            save_checkpoint(state, self.folder / CHECKPOINT)

    def finish(self) -> None:
        self.log.write(event='finish')
        self.log.sync()

    def say(self, text: str) -> None:
        """Print on the main process, without tearing a progress bar."""
        if self.group.is_main:
            say(text)

    def close(self) -> None:
        if self._lock is not None:
            self._lock.release()

    def __enter__(self) -> 'Run':
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _open(self, name: str) -> tuple[str, bool, bool]:
        """The folder, whether the run in it is finished, and whether there is a checkpoint to resume from."""
        config = self._config
        self._new = config.output_dir is None or not Path(config.output_dir).exists()
        folder = create_folder(config.output_dir, name)
        with writing(folder / '.lock'):
            self._lock = FolderLock(folder)
        resumes = any(p.exists() for p in (folder / CHECKPOINT, previous_of(folder / CHECKPOINT)))
        if not (folder / 'config.yaml').exists():
            if resumes or (folder / 'log.jsonl').exists():
                raise ConfigError(f'{folder} already holds a run, but without its config.yaml, so it cannot be '
                                  'resumed: name another --output-dir or remove it.')
            return str(folder), False, False
        if not resumes and (folder / 'encoder').exists():
            raise ConfigError(f'{folder} already holds a run, but without {CHECKPOINT}, so it cannot be resumed: name '
                              'another --output-dir or remove it.')
        before = read_settings(folder / 'config.yaml')
        differences = setting_differences(before, config, folder)
        if differences and not config.force_resume:
            # What 'auto' chose there and would choose otherwise here must be said to be kept.
            kept = ' '.join(f'--{name} {before[name]}' for name in ('device', 'precision')
                            if name in before and before[name] != getattr(config, name))
            raise ConfigError(
                f'{folder} already holds a run with other settings ({"; ".join(differences)}). Repeat its command '
                f'{f"with {kept} " if kept else ""}to resume it, name another --output-dir, or accept a mixed run with '
                '--force-resume.')
        lines = read_log(folder / 'log.jsonl')
        self._ended = bool(lines) and lines[-1]['event'] == 'finish'
        return str(folder), self._ended and not differences, resumes

    def _read(self) -> dict[str, Any] | None:
        # The others read once the main process has found the file whole and fitting.
        def check() -> None:
            self.state = load_checkpoint(self.folder / CHECKPOINT, say)
            differences = difference(self.state['facts'], self.facts) if self.state else []
            if differences and not self._config.force_resume:
                raise ConfigError(
                    f'The run in {self.folder} began in other circumstances ({"; ".join(differences)}), which would '
                    'change its result. Restore them (torchrun --nproc-per-node, OMP_NUM_THREADS, the data), name '
                    'another --output-dir, or accept a mixed run with --force-resume.')
            if self.state and self._steps is not None:
                # Where no step is left, another length was forced on the run.
                taken, steps = self.state['step'], self._steps
                if taken > steps or (taken == steps and self._ended):
                    raise ConfigError(
                        f'The run in {self.folder} has taken {taken} steps, and with these settings it ends after '
                        f'{steps}: nothing is left to train. Ask for a longer run, or name another --output-dir.')

        self.group.on_main(check)
        return self.state if self.group.is_main else load_checkpoint(self.folder / CHECKPOINT, lambda message: None)

    def _prepare(self) -> None:
        if self.state is None:
            with writing(self.folder / 'config.yaml'):
                save_config(self._config, self.folder / 'config.yaml')
        # What a kill in the middle of an export left.
        for scratch in self.folder.glob('.[a-z]*-*'):
            if scratch.is_dir():
                shutil.rmtree(scratch, ignore_errors=True)

    def _follow(self) -> None:
        try:
            self.log.followers = followers_of(self._config, self.folder, self.log, resumed=self.state is not None)
        except ConfigError:
            if self._new:  # nothing of a run that did not begin
                self.close()
                shutil.rmtree(self.folder, ignore_errors=True)
            raise


def setting_differences(before: dict[str, Any], config: Any, folder: Path) -> list[str]:
    """What differs between the saved settings of the run in a folder and `config`: free settings aside, and choices
    that `config` leaves to be made, which asks for whatever the run began with."""
    before, now = {**with_added(before, type(config)), **begun_with(folder, type(config))}, plain(config)
    open_to_change = free_settings(type(config)) | {name for name in Choices._fields if now.get(name) == 'auto'}
    return difference(before, now, [field.name for field in fields(config) if field.name not in open_to_change])


def difference(before: dict[str, Any], now: dict[str, Any], keys: list[str] | None = None) -> list[str]:
    """What differs, each as 'name: was X, is Y'."""
    keys = sorted(before.keys() | now.keys()) if keys is None else keys
    return [f'{key}: was {before.get(key)}, is {now.get(key)}' for key in keys if before.get(key) != now.get(key)]


def create_folder(output_dir: str | None, name: str) -> Path:
    """The folder of a run, which exists and can be written to: `output_dir`, or the first free runs/NAME-1, -2, ...
    Raises ConfigError for a path that is a file or cannot be written to."""
    number = 0
    while True:
        number += 1
        folder = Path('runs', f'{name}-{number}') if output_dir is None else Path(output_dir)
        try:
            folder.mkdir(parents=True, exist_ok=output_dir is not None)
            # Root is allowed to do what the file system then refuses, so ask by writing.
            probe = folder / f'.writable-{os.getpid()}'
            probe.touch()
            probe.unlink()
            return folder
        except FileExistsError as error:
            if output_dir is not None:
                raise ConfigError(f'The output folder {folder} is a file. Name another --output-dir.') from error
        except OSError as error:
            raise ConfigError(f'Cannot write to the output folder {folder}: {error.strerror}. Name another '
                              '--output-dir.') from error
