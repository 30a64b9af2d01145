"""SHA-256 checksums as `sha256sum` writes and checks them: PATH.sha256 beside one file, or SHA256SUMS for a folder."""

import hashlib
import os
import re
from pathlib import Path

from .errors import CheckpointError

SUMS = 'SHA256SUMS'


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
    digest = hashlib.sha256()
    with Path(path).open('rb') as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def write_synced(path: Path, text: str) -> None:
    """Write a text file, on disk before it takes the place of the one before it."""
    scratch = path.with_name(path.name + '.new')
    with scratch.open('w', encoding='utf-8') as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(scratch, path)


def sync(path: Path) -> None:
    """Have a file, or the renames in a folder, on disk, where the system can."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    except OSError:
        pass
    finally:
        os.close(descriptor)
