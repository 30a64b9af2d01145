"""Settings that come with the package: a YAML file a recipe, those of `pretrain` here and those of another command in a
folder of its name."""

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


def _folder_of(command: str) -> Path:
    return FOLDER if command == 'pretrain' else FOLDER / command
