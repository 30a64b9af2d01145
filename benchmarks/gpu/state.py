"""gpu.json: what the queue has found so far, in one file that replaces itself whole and carries its own checksum."""

import hashlib
import json
import time
from pathlib import Path
from typing import Any

from autoreg_vit.artifacts import sha256_of, write_synced
from autoreg_vit.errors import ConfigError

NAME, FORMAT = 'gpu.json', 1
#: What a folder that travels back may hold.
MOST_FILES, MOST_FILE_MIB, MOST_MIB = 8, 15, 60


class State:
    """Facts of the sitting and results by part, written as they come.

    Args:
        folder: Of gpu.json.
        facts: Where results come from; those of `MUST_AGREE` must be those of the results that are there.

    Raises:
        ConfigError: for results of another commit, card or version, or a damaged file.
    """

    MUST_AGREE = ('commit', 'device', 'torch', 'triton', 'timm', 'autoreg_vit', 'toy')

    def __init__(self, folder: Path, facts: dict[str, Any]):
        self.folder = folder
        self.content: dict[str, Any] = {'format': FORMAT, **facts, 'parts': {}}
        if (folder / NAME).exists():
            before = read_state(folder)
            other = [f'{k} was {before.get(k)}, is {facts.get(k)}' for k in self.MUST_AGREE
                     if before.get(k) != facts.get(k)]
            if other:
                raise ConfigError(f'{folder / NAME} holds results of another sitting ({"; ".join(other)}): name '
                                  'another --out.')
            self.content = before
        self._written = 0.0

    def part(self, name: str) -> dict[str, Any]:
        """What is known of a part: its status ('partial', 'done', 'failed'), seconds and results."""
        return self.content['parts'].get(name, {'status': 'partial', 'seconds': 0.0})

    @property
    def done(self) -> list[str]:
        return [name for name, part in self.content['parts'].items() if part['status'] == 'done']

    def update(self, name: str, **results: Any) -> None:
        """Set results of a part; on disk within two seconds of calls like it, or at `save`."""
        part = self.part(name)
        if all(part.get(key) == value for key, value in results.items()):
            return
        self.content['parts'][name] = {**part, **results}
        if time.monotonic() - self._written > 2 or 'status' in results:
            self.save()

    def save(self) -> None:
        self.content['sha256'] = digest(self.content)
        write_synced(self.folder / NAME, json.dumps(self.content, indent=1) + '\n')
        self._written = time.monotonic()


def digest(content: dict[str, Any]) -> str:
    """The SHA-256 of a state but for its checksum."""
    text = json.dumps({k: v for k, v in content.items() if k != 'sha256'}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def read_state(folder: Path) -> dict[str, Any]:
    """The content of gpu.json.

    Raises:
        ConfigError: where it is missing, damaged or of another format.
    """
    path = folder / NAME
    if not path.is_file():
        raise ConfigError(f'{folder} has no {NAME}: expected a folder that python -m benchmarks.gpu --out wrote.')
    try:
        content = json.loads(path.read_text(encoding='utf-8'))
    except ValueError as error:
        raise ConfigError(f'{path} is damaged ({error}): copy it again.') from error
    if not isinstance(content, dict) or content.get('format') != FORMAT:
        raise ConfigError(f'{path} is no state of this queue (format {FORMAT}): use the version that wrote it.')
    if content.get('sha256') != digest(content):
        raise ConfigError(f'{path} does not match the checksum in it: it is damaged or was changed. Copy it again.')
    return content


def check_files(folder: Path, checksums: dict[str, str]) -> None:
    """Raise ConfigError where a file named in `checksums` is missing or another."""
    for name, expected in checksums.items():
        path = folder / name
        if not path.is_file() or sha256_of(path) != expected:
            raise ConfigError(f'{path} is {"damaged" if path.is_file() else "missing"}: copy it again.')


def misfits(folder: Path) -> str | None:
    """What keeps a folder from travelling back, or None."""
    files = sorted(p for p in folder.rglob('*') if p.is_file())
    sizes = {str(p.relative_to(folder)): p.stat().st_size / 2 ** 20 for p in files}
    large = [f'{name} ({size:.1f} MiB)' for name, size in sizes.items() if size > MOST_FILE_MIB]
    if len(files) > MOST_FILES or large or sum(sizes.values()) > MOST_MIB:
        return (f'{folder} holds {len(files)} files of {sum(sizes.values()):.1f} MiB'
                f'{", among them " + ", ".join(large) if large else ""}; at most {MOST_FILES} of {MOST_FILE_MIB} '
                f'MiB and {MOST_MIB} MiB together travel: move what the queue did not write elsewhere.')
    return None
