"""A run's log, and what its lines go to besides the file."""

import contextlib
import dataclasses
import importlib.util
import json
import math
import os
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..artifacts import write_error, write_synced, writing
from ..errors import ConfigError, one_line
from .progress import say


class Log:
    """log.jsonl: one JSON object a line, on disk as soon as it is written; `lines` holds them all.

    Args:
        keep: Bytes of the file to keep; the rest is what a resumed run writes again.
        writes: Whether this process writes; the others only collect lines.
    """

    def __init__(self, path: Path, keep: int = 0, writes: bool = True):
        self.path, self.writes = path, writes
        self.lines: list[dict[str, Any]] = []
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


def check_tracker(tracker: str | None) -> None:
    """Raise ConfigError for a tracker that is unknown or not installed."""
    if tracker not in (None, 'wandb'):
        raise ConfigError(f"tracker is 'wandb' or left out, got {tracker!r}.")
    if tracker == 'wandb' and importlib.util.find_spec('wandb') is None:
        raise ConfigError('tracker=wandb needs the package wandb: pip install wandb, or leave --tracker out '
                          '(log.jsonl and TensorBoard hold the same lines).')


def followers_of(config: Any, folder: Path, log: Log, resumed: bool) -> list[Callable[[dict[str, Any]], None]]:
    """What log lines go to besides the file: TensorBoard where it is installed, and the tracker; raises ConfigError
    where that does not start."""
    followers: list[Callable[[dict[str, Any]], None]] = []
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
    """Begin or go on with the run at Weights & Biases; gives what takes a log line there."""
    import wandb

    try:
        tracked = wandb.init(project='autoreg-vit', id=_tracker_id(folder, resumed), name=folder.name, dir=str(folder),
                             resume='allow', config=dataclasses.asdict(config))
    except Exception as error:  # the library's own, those of its HTTP client, OSError: by version and cause
        reason = f'{type(error).__name__}: {one_line(error, 200)}'
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
