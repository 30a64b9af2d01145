"""The machine a run is on: device, precision, memory, signals, and the folder it writes to."""

import ctypes
import os
import platform
import signal
import socket
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TextIO

import torch

from ..errors import ConfigError, suggest
from .progress import say

#: Kinds of devices that train, and how many of each there are.
DEVICES: dict[str, Callable[[], int]] = {
    'cpu': lambda: 1,
    'cuda': lambda: torch.cuda.device_count() if torch.cuda.is_available() else 0,
    'mps': lambda: int(torch.backends.mps.is_available()),
    'xpu': lambda: torch.xpu.device_count() if torch.xpu.is_available() else 0,
}


def resolve_device(name: str) -> torch.device:
    """The device of a run.

    Raises:
        ConfigError: for a name that PyTorch does not know or a device that is not there.
    """
    if name == 'auto':
        return torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f'Unknown device {name!r}: use auto, cpu, cuda or cuda:1. '
                          f'{suggest(name, ["auto", *DEVICES])}') from error
    if device.type not in DEVICES:
        raise ConfigError(f'Device {name!r} cannot train here: use auto, cpu or cuda.')
    if (device.index or 0) >= (count := DEVICES[device.type]()):
        raise ConfigError(f'Device {name!r} is not there: PyTorch sees {count} of the kind {device.type}. '
                          'Use --device cpu.')
    return device


def resolve_precision(name: str, device: torch.device) -> str:
    """'bfloat16' where the device multiplies it faster than float32, unless `name` says otherwise."""
    if name != 'auto':
        return name
    if device.type == 'cuda':
        return 'bfloat16' if torch.cuda.get_device_capability(device)[0] >= 8 else 'float32'
    if device.type == 'cpu':
        # Without these instructions oneDNN emulates bfloat16, up to a hundred times slower.
        checks = ('_is_amx_tile_supported', '_is_avx512_bf16_supported')
        native = any(getattr(torch.cpu, check, bool)() for check in checks)
        return 'bfloat16' if native else 'float32'
    return 'float32'


def autocast(precision: str, device: torch.device) -> AbstractContextManager:
    """The context of a forward pass."""
    return torch.autocast(device.type, dtype=torch.bfloat16) if precision == 'bfloat16' else nullcontext()


def keep_freed_memory() -> None:
    """Let glibc keep freed blocks for the next tensor of their size instead of returning them to the kernel.

    A training step on a CPU allocates the same large tensors again and again; clearing their pages anew each time cost
    a RandSAC step of ViT-Tiny a fifth of its speed (benchmarks/train_step.py).
    """
    if platform.libc_ver()[0] != 'glibc':
        return
    trim_threshold, top_pad, mmap_threshold = -1, -2, -3  # names of mallopt(3)
    libc = ctypes.CDLL(None)
    libc.mallopt(mmap_threshold, 32 << 20)  # the largest value glibc accepts
    libc.mallopt(trim_threshold, 2 ** 31 - 1)
    libc.mallopt(top_pad, 64 << 20)


class Stopped(Exception):
    """A signal asked the run to stop, and it did, with a checkpoint to go on from.

    Args:
        message: What was kept and how to go on.
        signal_number: SIGINT, SIGTERM or SIGHUP.
    """

    def __init__(self, message: str, signal_number: int):
        super().__init__(message)
        self.signal_number = signal_number


class StopSignals:
    """Turns SIGTERM, SIGINT and SIGHUP (a terminal that was closed) into a wish that the loop reads between steps; a
    second SIGINT interrupts at once. A SIGHUP that is ignored from the start (nohup) stays ignored.

    A context manager: the handlers that were there before return at its end.
    """

    def __init__(self):
        self.received: int | None = None
        self._before = {}

    def __enter__(self) -> 'StopSignals':
        if threading.current_thread() is threading.main_thread():  # Python delivers signals to no other
            numbers = [signal.SIGTERM, signal.SIGINT]
            hangup = getattr(signal, 'SIGHUP', None)  # Windows has none
            if hangup is not None and signal.getsignal(hangup) != signal.SIG_IGN:
                numbers.append(hangup)
            self._before = {n: signal.signal(n, self._handle) for n in numbers}
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame) -> None:
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number


def create_folder(output_dir: str | None, name: str) -> Path:
    """The folder of a run, which exists and can be written to: `output_dir`, or the first free runs/NAME-1, -2, ...

    Raises:
        ConfigError: for a path that is a file or cannot be written to.
    """
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


class FolderLock:
    """Holds a run's folder until `release`, or until the process dies, however it dies.

    Raises:
        ConfigError: where another process holds it, or the platform has no locks of files.
    """

    def __init__(self, folder: Path):
        self.file = (folder / '.lock').open('a+', encoding='utf-8')
        try:
            self._unlock = lock(self.file)
        except BlockingIOError as error:
            self.file.seek(0)
            holder = self.file.read().strip() or 'another process'
            self.file.close()
            raise ConfigError(f'Another run is writing to {folder} ({holder}): wait for it, stop it, or name another '
                              '--output-dir.') from error
        except OSError as error:  # NFS without lockd, Lustre without flock, EFS
            self._unlock = lambda: None
            say(f'The file system of {folder} has no locks ({error.strerror}): nothing keeps a second run out of it, '
                'so give no other command this --output-dir.')
        self.file.truncate(0)
        self.file.write(f'process {os.getpid()} on {socket.gethostname()}')
        self.file.flush()
        # A loader process inherits the file and with it the lock, and may outlive a killed parent by seconds.
        if hasattr(os, 'register_at_fork'):  # Windows does not fork
            os.register_at_fork(after_in_child=self.file.close)

    def release(self) -> None:
        if not self.file.closed:
            self._unlock()
            self.file.close()


def lock(file: TextIO) -> Callable[[], None]:
    """Keep a file from other processes, by what the platform has; returns what gives it back.

    Raises:
        BlockingIOError: where another process has it.
        ConfigError: on a platform that has no locks.
    """
    try:
        import fcntl
    except ImportError:
        return _lock_on_windows(file)
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return lambda: fcntl.flock(file, fcntl.LOCK_UN)


def _lock_on_windows(file: TextIO) -> Callable[[], None]:
    try:
        import msvcrt
    except ImportError as error:
        raise ConfigError('Training locks the folder of its run, and this Python has neither fcntl (Linux, macOS) nor '
                          'msvcrt (Windows): use one of those systems.') from error

    def call(mode: int) -> None:
        # A byte behind the text, since nobody else can read what is locked.
        os.lseek(file.fileno(), 1 << 30, os.SEEK_SET)
        msvcrt.locking(file.fileno(), mode, 1)

    try:
        call(msvcrt.LK_NBLCK)
    except OSError as error:
        raise BlockingIOError(*error.args) from error
    return lambda: call(msvcrt.LK_UNLCK)
