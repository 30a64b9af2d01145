"""Rules of the house, read from the package's syntax trees: sizes, one training step, docstrings."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / 'autoreg_vit'
MOST_LINES, MOST_BODY_LINES = 400, 60
#: Files that may be longer, and why.
LONG_FILES = {
    'serialization.py': 'the one place that defines ranks, order and limits',
}
#: Functions whose bodies may be longer, and why.
LONG_FUNCTIONS = {
    'ops/triton/bordered.py::bordered_backward_kernel': 'one kernel, whose registers no two hold',
}
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def trees(package: Path) -> Iterator[tuple[str, ast.Module]]:
    """Every file of a package: its path in it, and its syntax tree."""
    for path in sorted(package.rglob('*.py')):
        yield path.relative_to(package).as_posix(), ast.parse(path.read_text(encoding='utf-8'))


def long_files(package: Path) -> dict[str, int]:
    """Lines of the files that are too long."""
    lines = {path.relative_to(package).as_posix(): len(path.read_text(encoding='utf-8').splitlines())
             for path in package.rglob('*.py')}
    return {name: count for name, count in lines.items() if count > MOST_LINES}


def body_lines(function: ast.FunctionDef) -> int:
    """From the first statement to the last, without the docstring."""
    body = function.body[ast.get_docstring(function, clean=False) is not None:]
    return function.end_lineno - body[0].lineno + 1 if body else 0


def long_functions(package: Path) -> dict[str, int]:
    """Lines of the function bodies that are too long."""
    return {f'{name}::{node.name}': body_lines(node) for name, tree in trees(package) for node in ast.walk(tree)
            if isinstance(node, FUNCTIONS) and body_lines(node) > MOST_BODY_LINES}


def training_steps(package: Path) -> dict[str, list[str]]:
    """Where `.backward()` is called outside ops/, and where `.step()` of an optimizer."""
    found = {'backward': [], 'step': []}
    for name, tree in trees(package):
        for node in ast.walk(tree):
            if name.startswith('ops/') or not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            what, of = node.func.attr, ast.unparse(node.func.value)
            if what == 'backward' or (what == 'step' and of.lower().endswith(('optimizer', 'scaler'))):
                found[what].append(f'{name}:{node.lineno}')
    return found


def without_docstring(package: Path) -> list[str]:
    """Public functions and classes of modules that say nothing of themselves."""
    return [f'{name}:{node.lineno} {node.name}' for name, tree in trees(package) for node in tree.body
            if isinstance(node, (*FUNCTIONS, ast.ClassDef)) and not node.name.startswith('_')
            and not ast.get_docstring(node)]


def test_files_are_short():
    """And whatever may be longer still needs to."""
    assert long_files(PACKAGE).keys() == LONG_FILES.keys(), long_files(PACKAGE)


def test_functions_are_short():
    assert long_functions(PACKAGE).keys() == LONG_FUNCTIONS.keys(), long_functions(PACKAGE)


@pytest.mark.parametrize('what', ['backward', 'step'])
def test_one_place_trains(what: str):
    """Every command trains by the same step."""
    found = training_steps(PACKAGE)[what]
    assert len(found) == 1 and found[0].startswith('engine/'), found


def test_everything_public_says_what_it_is():
    found = without_docstring(PACKAGE)
    assert not found, '\n'.join(['without a docstring:', *found])


@pytest.fixture
def package(tmp_path: Path) -> Path:
    for folder in ('ops', 'engine'):
        (tmp_path / folder).mkdir()
    return tmp_path


class TestTheRulesCanBeBroken:
    """What each of them finds in a small package."""

    def test_long_files(self, package: Path):
        (package / 'ops' / 'long.py').write_text('"""Long."""\n' + '#\n' * MOST_LINES)
        (package / 'short.py').write_text('#\n' * MOST_LINES)
        assert long_files(package) == {'ops/long.py': MOST_LINES + 1}

    @pytest.mark.parametrize('docstring', ['', '    """A line,\n    and another."""\n'])
    def test_long_functions(self, docstring: str, package: Path):
        text = f'class A:\n  @staticmethod\n  def f(\n      x):\n{docstring}' + '    x = 1\n' * MOST_BODY_LINES
        (package / 'short.py').write_text(text)
        (package / 'long.py').write_text(text + '    return x\n')
        assert long_functions(package) == {'long.py::f': MOST_BODY_LINES + 1}

    def test_training_steps(self, package: Path):
        (package / 'engine' / 'trainer.py').write_text(
            'def step(self, loss):\n    (loss * 2).backward()\n    self.optimizer.step()\n    optimizer.zero_grad()\n')
        (package / 'other.py').write_text(
            'loss().backward(create_graph=True)\nscaler.step(x)\nscheduler.step()\nf(loss.backward)\n')
        (package / 'ops' / 'op.py').write_text('loss.backward()\n')
        assert training_steps(package) == {'backward': ['engine/trainer.py:2', 'other.py:1'],
                                           'step': ['engine/trainer.py:3', 'other.py:2']}

    def test_docstrings(self, package: Path):
        (package / 'said.py').write_text('def f():\n    """Do."""\ndef _g(): pass\nclass A:\n    """An A."""\n')
        (package / 'silent.py').write_text('@d\ndef f(): pass\nasync def g(): pass\nclass A: pass\n')
        assert without_docstring(package) == ['silent.py:2 f', 'silent.py:3 g', 'silent.py:4 A']
