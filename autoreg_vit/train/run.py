"""A run's folder: its settings, log and checkpoints, and whether to begin, go on or leave it as finished."""

import contextlib
import dataclasses
import importlib.util
import json
import math
import os
import shutil
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..checksums import write_synced
from ..errors import ConfigError
from .checkpoint import load_checkpoint, previous_of, save_checkpoint, write_error, writing
from .config import free_settings, load_recipe, save_config
from .distributed import Processes
from .progress import say
from .runtime import FolderLock, create_folder

CHECKPOINT = 'last.pt'


class Run:
    """The folder of a run, held by one command at a time; a context manager that gives it back.

    Open it on every process once settings, data and model are known to work; only the main process writes.

    Args:
        config: Resolved settings, a dataclass with `output_dir`, `force_resume` and `tracker`; fields declared free may
            change on resume. `output_dir` is set to the folder.
        name: Of the folder, where `output_dir` is None.
        group: The processes of the run.
        facts: What else must be the same for the same weights, such as the number of images; the number of processes,
            and of threads on a CPU, is added.
        steps: After how many the run ends; None for one that saves no checkpoints.

    Attributes:
        folder: Path of the folder.
        state: The checkpoint to go on from, on the CPU of every process, or None at the beginning.
        finished: Whether the run is complete, so that there is nothing to do.
        log: The run's Log.

    Raises:
        ConfigError: for a folder that is in use, holds something else, or a run with other settings or facts, or one
            that has taken all the steps that are asked for.
        CheckpointError: where no whole checkpoint is left.
    """

    def __init__(
            self,
            config: Any,
            name: str,
            group: Processes,
            facts: dict[str, Any] | None = None,
            steps: int | None = None,
    ):
        check_tracker(config.tracker)
        self.group, self._lock, self._config, self._steps, self._ended = group, None, config, steps, False
        self.facts = {**(facts or {}), 'processes': group.world_size,
                      'threads': torch.get_num_threads() if group.device.type == 'cpu' else None}
        try:
            folder, self.finished, resumes = group.on_main(lambda: self._open(config, name))
            self.folder, config.output_dir = Path(folder), folder
            self.state = self._read(config.force_resume) if resumes and not self.finished else None
            if not self.finished:
                group.on_main(self._prepare)
            self.log = Log(self.folder / 'log.jsonl', self.state['log_bytes'] if self.state else 0,
                           writes=group.is_main and not self.finished)
            if not self.finished:
                group.on_main(self._follow)
        except BaseException:
            self.close()
            raise

    def save(self, state: dict[str, Any]) -> None:
        """Save `state` with the log's position and the run's facts, on the main process alone.

        Raises:
            CheckpointError: where it cannot be written; the last good one is kept.
        """
        if self.group.is_main:
            save_config(self._config, self.folder / 'config.yaml')  # by force it may be another one from here on
            state = {**state, 'log_bytes': self.log.sync(), 'facts': self.facts}
            save_checkpoint(state, self.folder / CHECKPOINT)

    def finish(self) -> None:
        """Mark the run as complete."""
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

    def __exit__(self, *exception) -> None:
        self.close()

    def _open(self, config: Any, name: str) -> tuple[str, bool, bool]:
        """The folder, whether the run in it is finished, and whether there is a checkpoint to resume from."""
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
        before = load_recipe(str(folder / 'config.yaml'))
        differences = setting_differences(before, config)
        if differences and not config.force_resume:
            # What 'auto' chose there and would choose otherwise here must be said to be kept.
            kept = ' '.join(f'--{name} {before[name]}' for name in ('device', 'precision')
                            if name in before and before[name] != getattr(config, name))
            raise ConfigError(
                f'{folder} already holds a run with other settings ({"; ".join(differences)}). Repeat its command '
                f'{f"with {kept} " if kept else ""}to resume it, name another --output-dir, or accept a mixed run with '
                '--force-resume.')
        self._ended = _is_finished(folder / 'log.jsonl')
        return str(folder), self._ended and not differences, resumes

    def _read(self, force: bool) -> dict[str, Any] | None:
        # The others read once the main process has found the file whole and fitting.
        def check() -> None:
            self.state = load_checkpoint(self.folder / CHECKPOINT, say)
            differences = difference(self.state['facts'], self.facts) if self.state else []
            if differences and not force:
                raise ConfigError(
                    f'The run in {self.folder} began in other circumstances ({"; ".join(differences)}), which would '
                    'change its result. Restore them (torchrun --nproc-per-node, OMP_NUM_THREADS, the data), name '
                    'another --output-dir, or accept a mixed run with --force-resume.')
            if self.state and self._steps is not None:
                self._check_steps(self.state['step'], self._steps)

        self.group.on_main(check)
        return self.state if self.group.is_main else load_checkpoint(self.folder / CHECKPOINT, lambda message: None)

    def _check_steps(self, taken: int, steps: int) -> None:
        """Before anything in the folder changes: where no step is left, another length was forced on the run."""
        if taken > steps or (taken == steps and self._ended):
            raise ConfigError(
                f'The run in {self.folder} has taken {taken} steps, and with these settings it ends after {steps}: '
                'nothing is left to train. Ask for a longer run, or name another --output-dir.')

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
            self.log.followers = _followers(self._config, self.folder, self.log, resumed=self.state is not None)
        except ConfigError:
            if self._new:  # nothing of a run that did not begin
                self.close()
                shutil.rmtree(self.folder, ignore_errors=True)
            raise


class Log:
    """log.jsonl: one JSON object a line, on disk as soon as it is written; `lines` holds them all.

    Args:
        path: The file; its first `keep` bytes are kept, the rest is what a resumed run writes again.
        keep: Bytes to keep.
        writes: Whether this process writes; the others only collect lines.
    """

    def __init__(self, path: Path, keep: int = 0, writes: bool = True):
        self.path, self.lines, self.writes = path, [], writes
        self.followers: list[Callable[[dict[str, Any]], None]] = []
        if not writes:
            return
        with writing(path), path.open('ab+') as file:
            if file.tell() < keep:
                say(f'{path} was removed or cut short: it holds {file.tell():,} of the {keep:,} bytes that it had at '
                    'the checkpoint. The run goes on; what the missing lines said is left out of figures and cards.')
            file.truncate(min(keep, file.tell()))
            file.seek(max(file.tell() - 1, 0))
            if file.read() not in (b'', b'\n'):
                file.write(b'\n')
        self.lines = read_log(path)

    def write(self, **line: Any) -> None:
        """Add a line and its time, and hand it to TensorBoard and the tracker."""
        self.lines.append({'time': round(time.time(), 3), **line})
        if not self.writes:
            return
        try:
            with self.path.open('a', encoding='utf-8') as file:
                file.write(json.dumps(self.lines[-1]) + '\n')
        except OSError as error:
            raise write_error(self.path, error) from error
        for follower in self.followers:
            follower(self.lines[-1])

    def sync(self) -> int:
        """Have all lines on disk; returns the file's size in bytes."""
        if not self.writes:
            return 0
        with writing(self.path), self.path.open('ab') as file:
            os.fsync(file.fileno())
            return file.tell()


def read_log(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a log.jsonl; one that a kill cut short, or that was damaged, is left out."""
    lines = []
    for text in path.read_text(encoding='utf-8', errors='replace').splitlines() if path.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):
            lines.append(json.loads(text))
    return [line for line in lines if isinstance(line, dict) and 'event' in line]


def logged(lines: list[dict[str, Any]], name: str) -> str | None:
    """What the lines of a run's start and resumes say of a circumstance, such as 'commit': each value once, joined
    by 'and'; None where none does."""
    values = [line.get(name) for line in lines if line['event'] in ('start', 'resume')]
    return ' and '.join(dict.fromkeys(str(value) for value in values if value is not None)) or None


def setting_differences(before: dict[str, Any], config: Any) -> list[str]:
    """What differs between a run's saved settings and `config`, free settings aside."""
    free = free_settings(type(config))
    now = {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(config).items()}
    # A setting that a later version added has its default in an earlier run.
    defaults = {f.name: f.default for f in dataclasses.fields(config)}
    before = {k: list(v) if isinstance(v, tuple) else v for k, v in {**defaults, **before}.items()}
    return difference(before, now, [k for k in now if k not in free])


def difference(before: dict[str, Any], now: dict[str, Any], keys: list[str] | None = None) -> list[str]:
    """What differs, each as 'name: was X, is Y'."""
    keys = sorted(before.keys() | now.keys()) if keys is None else keys
    return [f'{key}: was {before.get(key)}, is {now.get(key)}' for key in keys if before.get(key) != now.get(key)]


def check_tracker(tracker: str | None) -> None:
    """Raise ConfigError for a tracker that is unknown or not installed."""
    if tracker not in (None, 'wandb'):
        raise ConfigError(f"tracker is 'wandb' or left out, got {tracker!r}.")
    if tracker == 'wandb' and importlib.util.find_spec('wandb') is None:
        raise ConfigError('tracker=wandb needs the package wandb: pip install wandb, or leave --tracker out '
                          '(log.jsonl and TensorBoard hold the same lines).')


def _followers(config: Any, folder: Path, log: Log, resumed: bool) -> list[Callable[[dict[str, Any]], None]]:
    """What log lines go to besides the file: TensorBoard where it is installed, and the tracker."""
    followers = []
    if importlib.util.find_spec('tensorboard') is not None:
        from torch.utils.tensorboard import SummaryWriter

        seen = [line['images'] for line in log.lines if 'images' in line]
        writer = SummaryWriter(str(folder / 'tensorboard'), purge_step=seen[-1] + 1 if seen else 0)

        def follow(line: dict[str, Any]) -> None:
            for name, value in numbers(line).items():
                writer.add_scalar(name, value, line['images'])
            writer.flush()

        followers.append(follow)
    if config.tracker == 'wandb':
        followers.append(_track(config, folder, resumed))
    return followers


def _track(config: Any, folder: Path, resumed: bool) -> Callable[[dict[str, Any]], None]:
    """Begin or go on with the run at Weights & Biases; gives what takes a log line there.

    Raises:
        ConfigError: where the tracker does not start.
    """
    import wandb

    try:
        tracked = wandb.init(project='autoreg-vit', id=_tracker_id(folder, resumed), name=folder.name, dir=str(folder),
                             resume='allow', config=dataclasses.asdict(config))
    except Exception as error:  # the library's own, those of its HTTP client, OSError: by version and cause
        reason = f'{type(error).__name__}: {" ".join(str(error).split())[:200]}'
        raise ConfigError(f'wandb does not start ({reason}): log in (wandb login), set WANDB_MODE=offline, or leave '
                          '--tracker out.') from error
    return lambda line: tracked.log({**numbers(line), 'images': line['images']}) if 'images' in line else None


def _tracker_id(folder: Path, resumed: bool) -> str:
    """The id under which a run is tracked, drawn once and kept in its folder."""
    file = folder / 'wandb-id'
    if file.exists():
        return file.read_text(encoding='utf-8').strip()
    # Up to version 0.1.0 a run had its id from its path.
    identity = folder.resolve().as_posix().replace('/', '-').strip('-')[-64:] if resumed else uuid.uuid4().hex[:16]
    with writing(file):
        write_synced(file, identity + '\n')
    return identity


def numbers(line: dict[str, Any]) -> dict[str, float]:
    """The curves that a log line continues: 'event/name' to value; none for lines without 'images'."""
    if 'images' not in line:
        return {}
    return {f'{line["event"]}/{k}': v for k, v in line.items()
            if k not in ('time', 'images') and type(v) in (int, float) and math.isfinite(v)}


def _is_finished(log: Path) -> bool:
    lines = read_log(log)
    return bool(lines) and lines[-1].get('event') == 'finish'
