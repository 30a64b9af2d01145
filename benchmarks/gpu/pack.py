"""What travels to the machine with the GPU, in one file: the tree, its commit, wheels of what is missing there, data.

The file is a .tar.gz with one folder, in which `python -m benchmarks.gpu --out FOLDER` runs with nothing to download.
"""

import importlib.metadata
import io
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from autoreg_vit.engine.provenance import SOURCE_COMMIT, source_commit
from autoreg_vit.errors import ConfigError

ROOT = Path(__file__).parents[2]
FOLDER = 'autoreg-vit-gpu'
MOST_MIB = 60
#: What a machine for PyTorch lacks.
MISSING = ('timm',)
#: No part of the queue reads them.
LEFT_BEHIND = ('weights/',)


def pack(file: Path, data: Path | None, wheels: Path | None) -> str:
    """Write the pack, and say what is in it and what to do with it.

    Args:
        file: To write.
        data: Archive of images, a .tar file that tar compresses in any way, with train/ in it.
        wheels: Folder of wheels to take along; by default those of `MISSING` are downloaded, for Python 3.12.

    Raises:
        ConfigError: outside a clone, for data or wheels that are not there, or for a pack that is too large.
    """
    commit = source_commit()
    if commit is None or _git('rev-parse', 'HEAD') is None:
        raise ConfigError(f'{ROOT} is no clone with git: a pack is made of the files of a commit.')
    if data is not None and not (data.is_file() and tarfile.is_tarfile(data)):
        raise ConfigError(f'--data {data} is no tar archive: expected one with class folders under train/.')
    # As they are in the tree, changed or not; what is not tracked stays behind, since the commit's name would hide it.
    tracked = [name for name in _git('ls-files', '-z').split('\0')
               if name and (ROOT / name).is_file() and not name.startswith(LEFT_BEHIND)]
    with tempfile.TemporaryDirectory() as scratch:
        found = _wheels(wheels, Path(scratch))
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_name(file.name + '.new')
        with tarfile.open(part, 'w:gz') as tar:
            for name in tracked:
                tar.add(ROOT / name, f'{FOLDER}/{name}', recursive=False)
            info = tarfile.TarInfo(f'{FOLDER}/autoreg_vit/{SOURCE_COMMIT}')
            content = f'{commit}\n'.encode()
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
            for wheel in found:
                tar.add(wheel, f'{FOLDER}/wheels/{wheel.name}')
            if data is not None:
                tar.add(data, f'{FOLDER}/data/{data.name}')
        size = part.stat().st_size / 2 ** 20
        if size > MOST_MIB:
            part.unlink()
            raise ConfigError(f'The pack would be {size:.1f} MiB; at most {MOST_MIB} MiB travel: take a smaller --data '
                              'archive along, or fewer --wheels.')
        os.replace(part, file)
    dirty = ' (with uncommitted changes: results will say so)' if commit.endswith('-dirty') else ''
    return (f'{file}: {size:.1f} MiB, {len(tracked)} files of commit {commit}{dirty}, '
            f'{", ".join(wheel.name for wheel in found) or "no wheels"}, {data.name if data else "no data"}.\n'
            f'There: tar xf {file.name} && cd {FOLDER} && python3 -m benchmarks.gpu --minutes 8 --out FOLDER\n'
            'Back here: python -m benchmarks.gpu --take FOLDER')


def _wheels(folder: Path | None, scratch: Path) -> list[Path]:
    if folder is None:
        wanted = [f'{name}=={importlib.metadata.version(name)}' for name in MISSING]
        run = subprocess.run(
            [sys.executable, '-m', 'pip', 'download', '--quiet', '--no-deps', '--only-binary=:all:',
             '--python-version', '3.12', '--dest', str(scratch), *wanted], capture_output=True, text=True)
        if run.returncode:
            raise ConfigError(f'Cannot download {", ".join(wanted)} ({run.stderr.strip().splitlines()[-1][:200]}): '
                              'give a folder that holds the wheels, --wheels FOLDER.')
        folder = scratch
    found = sorted(folder.glob('*.whl')) if folder.is_dir() else []
    lacking = [name for name in MISSING if not any(w.name.startswith(f'{name}-') for w in found)]
    if lacking:
        raise ConfigError(f'--wheels {folder} has no wheel of {", ".join(lacking)}: pip download --no-deps '
                          f'--only-binary=:all: --dest {folder} {" ".join(lacking)}')
    return found


def _git(*arguments: str) -> str | None:
    try:
        run = subprocess.run(['git', *arguments], cwd=ROOT, capture_output=True, text=True, timeout=60)
    except OSError:
        return None
    return run.stdout if run.returncode == 0 else None
