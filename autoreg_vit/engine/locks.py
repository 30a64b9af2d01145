"""Locks of a run's folder."""

import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

from ..errors import ConfigError
from .progress import say


class FolderLock:
    """Holds a run's folder until `release`, or until the process dies, however it dies. Raises ConfigError where
    another process holds it, or the platform has no locks of files."""

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
    """Keep a file from other processes, by what the platform has; returns what gives it back. Raises BlockingIOError
    where another process has it, and ConfigError on a platform that has no locks."""
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
    windows: Any = msvcrt  # whose functions type checkers know on Windows alone

    def call(mode: int) -> None:
        # A byte behind the text, since nobody else can read what is locked.
        os.lseek(file.fileno(), 1 << 30, os.SEEK_SET)
        windows.locking(file.fileno(), mode, 1)

    try:
        call(windows.LK_NBLCK)
    except OSError as error:
        raise BlockingIOError(*error.args) from error
    return lambda: call(windows.LK_UNLCK)
