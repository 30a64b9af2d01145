"""Imports run downward only: the floors of the package, read from its syntax trees, and what importing it loads."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.bare import run_bare

ROOT = Path(__file__).parents[1]
PACKAGE = 'autoreg_vit'
#: From top to bottom; a module imports from its own floor and from those below. Several share the last one.
FLOORS = (('__main__',), ('commands',), ('hub',), ('figures',), ('evaluation',), ('data',), ('engine',), ('settings',),
          ('__init__',), ('models',), ('ops',), ('serialization',),
          ('grids',), ('artifacts',), ('_compat',), ('errors', 'version'))
LEVELS = {name: level for level, names in enumerate(FLOORS) for name in names}


def module_of(path: Path, package: Path) -> str:
    """The dotted name of a file, with `__init__` where it is a package's own."""
    return '.'.join((package.name, *path.relative_to(package).with_suffix('').parts))


def is_module(name: str, package: Path) -> bool:
    place = package.parent.joinpath(*name.split('.'))
    return place.with_suffix('.py').is_file() or (place / '__init__.py').is_file()


def imports(path: Path, package: Path) -> Iterator[tuple[int, str]]:
    """Line and dotted name of each module of `package` that a file imports, wherever in it; relative names resolved.

    A name that a package's own `__init__` defines is an import of that package.
    """
    here = module_of(path, package).split('.')
    for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = '.'.join(here[:-node.level] if node.level else []) + ('.' if node.level and node.module else '') + (
                node.module or '')
            found = [inner if is_module(inner := f'{base}.{alias.name}', package) else base for alias in node.names]
        else:
            continue
        yield from ((node.lineno, name) for name in dict.fromkeys(found) if name.split('.')[0] == package.name)


def floor_of(module: str) -> str:
    """The first part of a name below the package's; `__init__` is the package itself."""
    return [*module.split('.'), '__init__'][1]


def broken_floors(package: Path) -> list[str]:
    """An import that goes up, or a module on no floor, a line each."""
    found = []
    for path in sorted(package.rglob('*.py')):
        own = floor_of(module_of(path, package))
        if own not in LEVELS:
            found.append(f'{path.relative_to(package.parent)}:1 is on no floor: add {own} to FLOORS')
            continue
        for line, name in imports(path, package):
            other = floor_of(name)
            where = f'{path.relative_to(package.parent)}:{line} imports {name}'
            if other not in LEVELS:
                found.append(f'{where}, which is on no floor: add {other} to FLOORS')
            elif LEVELS[other] < LEVELS[own] or (LEVELS[other] == LEVELS[own] and other != own):
                below = [name for names in FLOORS[LEVELS[own] + 1:] for name in names]
                found.append(f'{where}: {own} may import from {", ".join([own, *below])} only')
    return found


def test_imports_run_downward():
    found = broken_floors(ROOT / PACKAGE)
    assert not found, '\n'.join(['imports that go up:', *found])


def test_every_folder_has_a_floor():
    inside = [path for path in (ROOT / PACKAGE).iterdir() if path.suffix == '.py' or (path / '__init__.py').is_file()]
    assert {path.stem for path in inside} <= LEVELS.keys()


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A package without an import."""
    package = tmp_path / PACKAGE
    for name in ('__init__', 'errors', 'version', 'commands/__init__', 'commands/cli', 'engine/__init__', 'engine/run',
                 'engine/log', 'models/__init__', 'models/dense/__init__', 'models/dense/neck'):
        (package / f'{name}.py').parent.mkdir(parents=True, exist_ok=True)
        (package / f'{name}.py').touch()
    return package


@pytest.mark.parametrize(('file', 'text', 'imported'), [
    ('engine/run', 'from ..commands.cli import main', 'commands.cli'),
    ('engine/run', 'from ..commands import cli', 'commands.cli'),
    ('engine/run', 'from .. import commands', 'commands'),
    ('engine/run', 'import autoreg_vit.commands.cli as cli', 'commands.cli'),
    ('engine/run', 'from autoreg_vit.commands.cli import main', 'commands.cli'),
    ('engine/run', 'def f():\n    if True:\n        from ..commands import cli', 'commands.cli'),
    ('models/dense/neck', 'from ...engine.run import Run', 'engine.run'),
    ('models/dense/__init__', 'from ...engine import log', 'engine.log'),
    ('models/__init__', 'from ..engine import log', 'engine.log'),
    ('models/dense/neck', 'from ... import __version__', ''),
    ('errors', 'from .version import __version__', 'version'),
    ('__init__', 'from . import engine', 'engine'),
])
def test_an_import_that_goes_up_is_named(file: str, text: str, imported: str, tree: Path):
    (tree / f'{file}.py').write_text(f'import os\n\n{text}\n')
    line = 2 + len(text.splitlines())
    found, = broken_floors(tree)
    name = '.'.join(filter(None, (PACKAGE, imported)))
    own = '__init__' if file == '__init__' else file.partition('/')[0]
    assert found.startswith(f'{PACKAGE}/{file}.py:{line} imports {name}: {own} may import from {own}')


@pytest.mark.parametrize(('file', 'text'), [
    ('commands/cli', 'from ..engine import run\nfrom ..models.dense.neck import Neck\nfrom .. import errors, x'),
    ('engine/run', 'from . import log\nfrom .log import Log\nfrom ..version import __version__\nimport commands'),
    ('models/dense/__init__', 'from . import neck\nfrom .neck import Neck\nfrom ...errors import Error'),
    ('__init__', 'from . import models\nfrom .version import __version__'),
])
def test_imports_of_a_floor_and_of_those_below_pass(file: str, text: str, tree: Path):
    (tree / f'{file}.py').write_text(text)
    assert broken_floors(tree) == []


def test_a_module_on_no_floor_is_named(tree: Path):
    (tree / 'utils.py').touch()
    (tree / 'errors.py').write_text('from . import utils')
    assert broken_floors(tree) == [
        f'{PACKAGE}/errors.py:1 imports {PACKAGE}.utils, which is on no floor: add utils to FLOORS',
        f'{PACKAGE}/utils.py:1 is on no floor: add utils to FLOORS']


def loaded(code: str) -> set[str]:
    """The modules that are there after some code in a process of its own, which has PyTorch and timm."""
    run = run_bare(f'{code}\nimport sys\nprint(*sys.modules)')
    assert run.returncode == 0, run.stderr
    return set(run.stdout.split())


def test_importing_the_package_loads_models_alone():
    """Whoever wants a model from timm gets no kernels before they run, and nothing of what trains or draws."""
    found = loaded(f'import {PACKAGE}')
    assert f'{PACKAGE}.models.encoders' in found
    floors = [f'{PACKAGE}.{name}' for names in FLOORS[:LEVELS['__init__']] for name in names]
    heavy = {'matplotlib', 'sklearn', 'torchmetrics', 'segmentation_models_pytorch', 'faster_coco_eval', 'datasets'}
    assert not found & {f'{PACKAGE}.ops.triton', *floors, *heavy}
