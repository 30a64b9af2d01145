"""Settings that come with the package: a YAML file a recipe, those of `pretrain` here and those of another command in a
folder of its name."""

from itertools import takewhile
from pathlib import Path
from typing import Any

from ...errors import ConfigError, suggest
from ...settings.base import read_settings

FOLDER = Path(__file__).parent


def load_recipe(name: str, command: str = 'pretrain') -> dict[str, Any]:
    """Settings from a YAML file or a recipe bundled for a command.

    Raises:
        ConfigError: for a recipe that is neither, or that is not a mapping of settings.
    """
    path = _folder_of(command) / f'{name}.yaml'
    if not path.is_file():
        path = Path(name).expanduser()
    if not path.is_file():
        raise ConfigError(f'No recipe {name!r}: it is neither a file nor bundled. '
                          f'{suggest(name, bundled_recipes(command))}')
    return read_settings(path)


def bundled_recipes(command: str = 'pretrain') -> list[str]:
    """Names of the recipes that come with the package for a command."""
    return sorted(p.stem for p in _folder_of(command).glob('*.yaml'))


def describe_recipes(commands: list[str]) -> str:
    """A line for each bundled recipe of commands: its name, and the first sentence of what its file says of itself."""
    lines = []
    for command in commands:
        names = bundled_recipes(command)
        lines.append(f'{command} --config')
        for name in names:
            text = (_folder_of(command) / f'{name}.yaml').read_text(encoding='utf-8')
            comment = takewhile(lambda line: line.startswith('#'), text.splitlines())
            words = ' '.join(line.removeprefix('#') for line in comment).split()
            sentence = ' '.join(words).partition('. ')[0].rstrip('.')
            lines.append(f'  {name:<{max(map(len, names))}}  {sentence}')
    return '\n'.join(lines)


def _folder_of(command: str) -> Path:
    return FOLDER if command == 'pretrain' else FOLDER / command
