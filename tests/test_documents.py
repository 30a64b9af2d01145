"""Documents are true to the files: links lead somewhere, examples are Python, and what there is to use is named."""

import ast
import re
from pathlib import Path
from urllib.parse import unquote

import pytest

ROOT = Path(__file__).parents[1]
#: A document of each floor, and those of the whole. Model cards and tables of results are written by the package.
DOCUMENTS = sorted([*ROOT.glob('*.md'), ROOT / 'benchmarks' / 'README.md', *ROOT.glob('autoreg_vit/**/*.md')])
TEXTS = {path: path.read_text(encoding='utf-8') for path in DOCUMENTS}
README = TEXTS[ROOT / 'README.md']
CODE = re.compile(r'^[ ]*```(\w*)\n(.*?)^[ ]*```$', re.MULTILINE | re.DOTALL)
#: Pictures are no part of a source distribution.
PICTURES = any((ROOT / 'benchmarks' / 'results').glob('*.png'))

each_document = pytest.mark.parametrize('path', DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())


def prose(text: str) -> str:
    """A document without its blocks of code."""
    return CODE.sub('', text)


def anchors(text: str) -> set[str]:
    """What links may name after a '#', as GitHub makes it of headings."""
    found: set[str] = set()
    for heading in re.findall(r'^#+ (.+?)\s*$', prose(text), re.MULTILINE):
        plain = re.sub(r'\[([^]]*)\]\([^)]*\)', r'\1', heading).lower()
        name = re.sub(r'[^\w\- ]', '', plain).replace(' ', '-')
        found.add(next(each for each in [name, *(f'{name}-{count}' for count in range(1, 99))] if each not in found))
    return found


def links(text: str) -> list[str]:
    """Targets of links and pictures outside of code."""
    return re.findall(r'\]\(([^)\s]+)\)', re.sub(r'`[^`\n]*`', '', prose(text)))


def broken_links(path: Path, text: str) -> list[str]:
    """Relative links of a document to files or headings that are not there."""
    broken = []
    for link in links(text):
        if re.match(r'[a-z]+:', link):
            continue
        name, _, anchor = unquote(link).partition('#')
        target = path.parent / name if name else path
        if not PICTURES and target.suffix in ('.png', '.gif'):
            continue
        if not target.exists() or (anchor and anchor not in anchors(target.read_text(encoding='utf-8'))):
            broken.append(link)
    return broken


def named(word: str) -> bool:
    """Whether some document has `word` in code, whole."""
    code = (part for text in TEXTS.values()
            for part in [*(block for _, block in CODE.findall(text)), *re.findall(r'`[^`\n]+`', prose(text))])
    pattern = re.compile(rf'(?<![\w-]){re.escape(word)}(?![\w-])')
    return any(pattern.search(part) for part in code)


@each_document
def test_links_lead_somewhere(path: Path):
    assert not broken_links(path, TEXTS[path])


def test_broken_links_are_found(tmp_path: Path):
    text = '[a](README.md) [b](nowhere.md) [c](#here) [d](#there) [e](https://x.org) `[f](code.md)`\n\n## Here\n'
    (tmp_path / 'text.md').write_text(text)
    (tmp_path / 'README.md').write_text('')
    assert broken_links(tmp_path / 'text.md', text) == ['nowhere.md', '#there']


@each_document
def test_blocks_of_code_are_closed_and_tables_have_equal_rows(path: Path):
    assert len(re.findall(r'^[ ]*```', TEXTS[path], re.MULTILINE)) == 2 * len(CODE.findall(TEXTS[path]))
    for table in re.findall(r'(?:^\|.*\|\n)+', prose(TEXTS[path]), re.MULTILINE):
        rows = [len(re.sub(r'`[^`]*`', '', row).split('|')) for row in table.splitlines()]
        assert len(set(rows)) == 1 and set(table.splitlines()[1]) <= set('| -:'), table


@each_document
def test_python_compiles(path: Path):
    for language, block in CODE.findall(TEXTS[path]):
        if language == 'python':
            indent = len(block) - len(block.lstrip(' '))
            code = re.sub(rf'^ {{{indent}}}', '', block, flags=re.MULTILINE)
            try:
                ast.parse(code)
            except SyntaxError:
                ast.parse(f'{{{code}}}')  # an entry of a table


@each_document
def test_lines_are_short_but_in_tables(path: Path):
    assert not [line for line in TEXTS[path].splitlines() if len(line) > 120 and not line.startswith('|')]


def test_the_readme_is_a_front_door():
    assert len(prose(README).split()) <= 1500


def test_the_readme_has_the_command_that_runs_the_tests():
    """`.ci/run` takes it from there."""
    assert any('pip install -e ".[dev]" && pytest' in block.splitlines() for _, block in CODE.findall(README))


def test_the_readme_leads_to_every_document():
    linked = {(ROOT / link.partition('#')[0]).resolve() for link in links(README)}
    assert set(DOCUMENTS) - linked == {ROOT / 'README.md'}


def test_every_command_is_named():
    pytest.importorskip('yaml')
    from autoreg_vit.commands import COMMANDS

    assert not [name for name in (*COMMANDS, 'recipes') if not named(f'autoreg-vit {name}')]


def test_every_recipe_is_named():
    pytest.importorskip('yaml')
    from autoreg_vit.commands.recipes import FOLDER

    names = {path.stem for path in FOLDER.rglob('*.yaml')}
    assert names and not [name for name in sorted(names) if not named(name)]
