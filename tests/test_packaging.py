"""A source distribution holds what its tests need, and its metadata say what is true."""

import email
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

pytest.importorskip('setuptools', minversion='77')

REPOSITORY = Path(__file__).parents[1]
SCRATCH = {'weights', 'build', 'dist', 'runs', 'data'}
IGNORED = shutil.ignore_patterns('__pycache__', '.*', '*.egg-info', '*.png', '*.gif')


def ignored(folder: str, names: list[str]) -> set[str]:
    """What a fresh clone lacks; `data` is scratch at the top alone."""
    return IGNORED(folder, names) | (SCRATCH & set(names) if Path(folder) == REPOSITORY else set())


@pytest.fixture(scope='module')
def contents(tmp_path_factory: pytest.TempPathFactory) -> tuple[set[str], dict[str, bytes]]:
    """The files of a clone, with small weights in place of its own, and those of its source distribution."""
    folder = tmp_path_factory.mktemp('clone') / 'autoreg-vit'
    shutil.copytree(REPOSITORY, folder, ignore=ignored)
    (folder / 'weights' / 'model.tag').mkdir(parents=True)
    (folder / 'weights' / 'model.tag' / 'config.json').write_text('{}')
    files = {path.relative_to(folder).as_posix() for path in folder.rglob('*') if path.is_file()}
    run = subprocess.run([sys.executable, 'setup.py', '-q', 'sdist', '--formats', 'tar', '--dist-dir', folder.parent],
                         cwd=folder, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    archive, = folder.parent.glob('*.tar')
    with tarfile.open(archive) as tar:
        return files, {file.name.partition('/')[2]: tar.extractfile(file).read() for file in tar if file.isfile()}


def test_holds_every_file(contents: tuple[set[str], dict[str, bytes]]):
    files, held = contents
    assert not files - held.keys()
    assert {'hubconf.py', 'pyproject.toml', 'LICENSE', 'tests/support/launching.py', 'benchmarks/kernel_resources.py',
            'autoreg_vit/commands/recipes/digits.yaml', 'weights/model.tag/config.json'} <= files
    assert {name for name in held.keys() - files if '.egg-info/' not in name} == {'PKG-INFO', 'setup.cfg'}


def test_metadata(contents: tuple[set[str], dict[str, bytes]]):
    metadata = email.message_from_bytes(contents[1]['PKG-INFO'])
    assert metadata['License-Expression'] == 'Apache-2.0' and metadata['License-File'] == 'LICENSE'
    assert metadata['Requires-Python'] == '>=3.10'
    assert {'timm', 'RandSAC', 'SAIM'} <= set(metadata['Keywords'].split(','))
    versions = [name.rpartition(' ')[2] for name in metadata.get_all('Classifier') if 'Python :: 3.' in name]
    assert versions == ['3.10', '3.11', '3.12', '3.13']
    assert {'torch>=2.11', 'timm>=1.0.26'} <= set(metadata.get_all('Requires-Dist'))
    # Nobody's name and no address that does not exist.
    assert not {'Author', 'Author-email', 'Maintainer', 'Home-page', 'Project-URL', 'Download-URL'} & set(metadata)
