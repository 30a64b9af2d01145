"""The one place that writes files: what a power cut, a full disk or a stopped process leaves is whole, or is what was
there before, and everybody may read it.

Text, JSON, tensors and what torch.save makes are written beside their place and moved there; folders are written
elsewhere and take their places together (`replaced`). Checksums are SHA-256 as `sha256sum` writes and checks them:
PATH.sha256 beside one file, or SHA256SUMS for a folder. Whatever keeps a file from being written is a CheckpointError
that says why, by `writing` where a function does not raise it itself.
"""

import errno
import hashlib
import json
import os
import re
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from .errors import CheckpointError, UsageError, one_line

#: What a folder of weights holds, as timm reads it, and the checksums of a folder's files.
CONFIG, WEIGHTS, SUMS = 'config.json', 'model.safetensors', 'SHA256SUMS'
#: Errors of a system that has no room for a file.
OUT_OF_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

N = TypeVar('N', bound=nn.Module)


def save_tensors(
        path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None, checksum: bool = True,
) -> None:
    """Write tensors as safetensors, and PATH.sha256 beside them; what was there is replaced once the new file is whole.

    Args:
        tensors: By name, on any device; none may share memory with another.
        checksum: False where SHA256SUMS of the folder, or whoever wrote it, names the file.

    Raises:
        OSError, SafetensorError: as `writing` takes them.
    """
    scratch = path.with_name(path.name + '.new')
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, scratch, metadata)
    scratch.chmod(0o644)  # safetensors leaves 0600
    os.replace(scratch, path)
    if checksum:
        write_checksum(path)


def seal(path: Path) -> None:
    """Make of tensors that another package wrote as safetensors what `save_tensors` leaves: a file that everybody may
    read, and PATH.sha256 beside it."""
    path.chmod(0o644)  # safetensors leaves 0600
    write_checksum(path)


def write_synced(path: Path, text: str) -> None:
    """Write a text file, on disk before it takes the place of the one before it."""
    scratch = path.with_name(path.name + '.new')
    with scratch.open('w', encoding='utf-8') as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(scratch, path)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file for people too: a list of numbers stands on one line."""
    text = json.dumps(content, indent=2)
    write_synced(path, re.sub(r'\[[^][{}]*\]', lambda match: ' '.join(match[0].split()), text) + '\n')


def write_config(path: Path, content: dict[str, Any]) -> None:
    """Write config.json as timm and the Hub have it, each number of a list on a line."""
    write_synced(path, json.dumps(content, indent=2) + '\n')


def write_file(path: Path, write: Callable[[BinaryIO], None]) -> None:
    """Write or replace a file and its checksum, both on disk when this returns; a failed write leaves neither. `write`
    gets the open file, of which it may call `write` and `flush` alone.

    Raises:
        CheckpointError: for a target that is no regular file, and for a write that failed.
    """
    check_regular(path)
    try:
        with path.open('wb') as raw:
            file = HashingFile(raw)
            try:
                write(cast(BinaryIO, file))
            finally:
                if file.error is not None:
                    raise file.error
            raw.flush()
            os.fsync(raw.fileno())
        write_checksum(path, file.sha256.hexdigest())
    except OSError as error:
        path.unlink(missing_ok=True)
        raise write_error(path, error) from error


@contextmanager
def replaced(*folders: Path) -> Iterator[tuple[Path, ...]]:
    """Paths to write folders of one parent to; they take their places once all are written and on disk, so that a
    stopped export or a power cut leaves the last ones whole."""
    parent = folders[0].parent
    parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=parent, prefix=f'.{folders[0].name}-') as scratch:
        new = tuple(Path(scratch) / folder.name for folder in folders)
        yield new
        for folder in new:
            for path in (*folder.iterdir(), folder):
                sync(path)
        for folder, written in zip(folders, new):
            if folder.exists():
                os.replace(folder, Path(scratch) / f'old-{folder.name}')
            os.replace(written, folder)
        sync(parent)


def sync(path: Path) -> None:
    """Have a file, or the renames in a folder, on disk, where the system can."""
    with suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn the errors of writing to `path` inside into CheckpointError."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise write_error(Path(getattr(error, 'filename', None) or path), error) from error


def write_error(path: Path, error: Exception) -> CheckpointError:
    """What to say when `path` cannot be written."""
    number = getattr(error, 'errno', None)
    found = re.search(r'os error (\d+)', str(error))  # as safetensors says it
    if number is None and found:
        number = int(found[1])
    if number in OUT_OF_SPACE:
        return CheckpointError(f'The disk is full or a quota is reached: cannot write {path} ({os.strerror(number)}). '
                               'The last good checkpoint is kept: free some space and run the same command again.')
    reason = os.strerror(number) if number else one_line(error)
    return CheckpointError(f'Cannot write {path}: {reason}. The last good checkpoint is kept.')


def check_regular(path: Path) -> None:
    """Raise CheckpointError for what a write would replace or fill that is no file: a link, a folder, a device."""
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISREG(mode):
        kind = {stat.S_IFLNK: 'a symbolic link', stat.S_IFDIR: 'a folder', stat.S_IFIFO: 'a pipe'}.get(
            stat.S_IFMT(mode), 'a device or socket')
        raise CheckpointError(f'{path} is {kind}, not a regular file: move it away or name another --output-dir.')


class HashingFile:
    """A file that hashes what is written to it, and keeps the first error for after: torch.save is C++, which turns an
    exception in the middle of a write into a message about file positions."""

    def __init__(self, file: BinaryIO):
        self.file, self.flush, self.sha256 = file, file.flush, hashlib.sha256()
        self.error: OSError | None = None

    def write(self, block: bytes) -> int:
        if self.error is None:
            try:
                self.file.write(block)
                self.sha256.update(block)
            except OSError as error:
                self.error = error
        return len(block)


def checksum_path(path: Path) -> Path:
    """Where the checksum of `path` stands: last.pt.sha256 for last.pt."""
    return path.with_name(path.name + '.sha256')


def write_checksum(path: Path, digest: str | None = None) -> None:
    """Write PATH.sha256, which `sha256sum --check` reads; computed from the file where no digest is given."""
    write_synced(checksum_path(path), f'{digest or sha256_of(path)}  {path.name.removesuffix(".new")}\n')


def write_sums(folder: Path) -> None:
    """Write SHA256SUMS, one line for every other file of a folder."""
    names = sorted(p.name for p in folder.iterdir() if p.is_file() and p.name != SUMS)
    write_synced(folder / SUMS, ''.join(f'{sha256_of(folder / name)}  {name}\n' for name in names))


def read_checksum(path: Path) -> str | None:
    """The digest of `path` in PATH.sha256, else in SHA256SUMS beside it, or None where neither has one."""
    for source in (checksum_path(path), path.with_name(SUMS)):
        try:
            lines = source.read_text(encoding='utf-8', errors='replace').splitlines()
        except OSError:
            continue
        for line in lines:
            digest, name = [*line.split(maxsplit=1), '', ''][:2]
            if re.fullmatch('[0-9a-f]{64}', digest) and (source.name != SUMS or name.lstrip('*') == path.name):
                return digest
    return None


def verify_checksum(path: Path, remedy: str = 'Get a whole copy of it.') -> None:
    """Raise CheckpointError if `path` has a checksum beside it that it does not match."""
    digest = read_checksum(path)
    if digest is not None and digest != sha256_of(path):
        source = checksum_path(path).name if checksum_path(path).exists() else SUMS
        raise CheckpointError(f'{path} does not match its checksum in {source}: it is damaged or was changed. {remedy}')


def sha256_of(path: Path) -> str:
    """The digest of a file."""
    digest = hashlib.sha256()
    with Path(path).open('rb') as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def save_network(model: nn.Module, folder: str | Path, config: dict[str, Any]) -> None:
    """Write a network as a folder, made if it is not there, that `load_network` reads; `config` is what builds the
    network again, as JSON."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_tensors(folder / WEIGHTS, model.state_dict())
    write_config(folder / CONFIG, config)


def load_network(folder: str | Path, build: Callable[[dict[str, Any]], N], kind: str, command: str) -> N:
    """A network in evaluation mode from a folder that `save_network` wrote, made by `build` from the content of
    config.json, which becomes its `config`; errors call it a `kind`, of the `command` of autoreg-vit.

    Raises:
        CheckpointError: for a folder that is missing, of another network, or damaged.
    """
    folder = Path(folder)
    try:
        config = json.loads((folder / CONFIG).read_text(encoding='utf-8'))
        verify_checksum(folder / WEIGHTS)
        model = build(config)
        model.load_state_dict(load_file(folder / WEIGHTS))
    except UsageError:
        raise
    except (OSError, KeyError, ValueError, TypeError, RuntimeError, SafetensorError) as error:
        reason = f'{type(error).__name__}: {one_line(error, 300)}'
        raise CheckpointError(f'{folder} holds no whole {kind} ({reason}): name the folder model/ of a run of '
                              f'autoreg-vit {command}.') from error
    cast(Any, model).config = config
    return model.eval()
