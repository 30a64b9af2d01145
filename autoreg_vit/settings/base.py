"""Settings of a run: a dataclass whose fields are recipe keys and command-line flags alike."""

import argparse
import dataclasses
import math
import os
import types
import typing
from contextlib import suppress
from dataclasses import MISSING, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from ..errors import ConfigError, suggest


def option(default: Any, help: str, free: bool = False) -> Any:
    """A setting; a free one may change when a run is resumed, since the weights do not depend on it."""
    return field(default=default, metadata={'help': help, 'free': free})


def argument(help: str, default: Any = MISSING) -> Any:
    """A setting that the command line takes by its place, in the order of the fields: one word, or for a tuple the
    words that are left. Without a default it is required, and stands before the options."""
    return field(default=default, metadata={'help': help, 'positional': True})


def free_settings(config_class: type) -> set[str]:
    """Names of the settings that may change when a run is resumed."""
    return {f.name for f in fields(config_class) if f.metadata.get('free')}


def convert_fields(config: Any) -> None:
    """Give every field of a config the type that it declares, since YAML has no tuples and reads 1e-3 as text.

    Raises:
        ConfigError: for a value of another type, a number that is not finite, or a seed out of range.
    """
    hints = typing.get_type_hints(type(config))
    for item in fields(config):
        setattr(config, item.name, _convert(item.name, getattr(config, item.name), hints[item.name]))
    if not 0 <= getattr(config, 'seed', 0) < 2 ** 32:  # what NumPy takes
        raise ConfigError(f'seed is a whole number from 0 to {2 ** 32 - 1}, got {config.seed}.')


def read_settings(path: Path) -> dict[str, Any]:
    """Settings of a YAML file, a recipe or a run's config.yaml.

    Raises:
        ConfigError: for a file that is not a mapping of settings.
    """
    try:
        recipe = yaml.safe_load(path.read_text(encoding='utf-8'))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f'{path} is not valid YAML: {" ".join(str(error).split())}') from error
    if not isinstance(recipe, dict):
        raise ConfigError(f'{path} must hold settings as "key: value" lines, got {type(recipe).__name__}.')
    return recipe


def make_config(config_class: type, recipe: dict[str, Any], flags: dict[str, Any]) -> Any:
    """A config from a recipe with flags over it.

    Raises:
        ConfigError: for an unknown key or a value of the wrong type.
    """
    known = [f.name for f in fields(config_class)]
    for key in recipe:
        if key not in known:
            raise ConfigError(f'Unknown recipe key {key!r}. {suggest(str(key), known)}')
    return config_class(**{**recipe, **flags})


def save_config(config: Any, path: Path) -> None:
    """Write the resolved settings as a recipe."""
    plain = {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(config).items()}
    scratch = path.with_name(path.name + '.new')
    scratch.write_text(yaml.safe_dump(plain, sort_keys=False), encoding='utf-8')
    os.replace(scratch, path)


def add_flags(parser: argparse.ArgumentParser, config_class: type) -> None:
    """One flag a field, spelt as its recipe key, or a place of its own for an `argument`; what is not given stays out
    of the namespace."""
    hints = typing.get_type_hints(config_class)
    for item in fields(config_class):
        kind, several = _element(hints[item.name])
        default = '' if item.default in (None, MISSING, ()) else f' ({_show(item.default)})'
        options: dict[str, Any] = dict(default=argparse.SUPPRESS, help=item.metadata['help'] + default)
        if item.metadata.get('positional'):
            required = item.default is MISSING
            nargs = ('+' if required else '*') if several else (None if required else '?')
            parser.add_argument(item.name, type=kind, metavar=item.name.upper(), nargs=nargs, **options)
            continue
        if kind is bool:
            options['action'] = argparse.BooleanOptionalAction
        else:
            options.update(type=kind, metavar=item.name.split('_')[-1].upper())
            if several:
                options['nargs'] = '+'
        parser.add_argument('--' + item.name.replace('_', '-'), **options)


def _element(hint: Any) -> tuple[type, bool]:
    """Element type of a field and whether it holds several."""
    if isinstance(hint, types.UnionType):
        hint = next(a for a in typing.get_args(hint) if a is not type(None))
    if typing.get_origin(hint) is tuple:
        return typing.get_args(hint)[0], True
    return hint, False


def _convert(name: str, value: Any, hint: Any) -> Any:
    kind, several = _element(hint)
    if value is None:
        if isinstance(hint, types.UnionType):
            return None
        raise ConfigError(f'{name} needs a value of type {kind.__name__}, got nothing.')
    if several:
        values = value if isinstance(value, (list, tuple)) else [value]
        return tuple(_convert(name, v, kind) for v in values)
    if isinstance(value, np.generic):
        value = value.item()
    if kind is str and isinstance(value, (str, os.PathLike)):
        return os.path.expanduser(value)  # no setting but a path begins with a tilde
    if kind is float and isinstance(value, (str, int)) and not isinstance(value, bool):
        with suppress(ValueError, OverflowError):
            value = float(value)  # YAML reads 1e-3 as text
    if type(value) is not kind:
        raise ConfigError(f'{name} must be of type {kind.__name__}, got {value!r} of type {type(value).__name__}.')
    if kind is float and not math.isfinite(value):
        raise ConfigError(f'{name} must be a finite number, got {value}.')
    return value


def _show(value: Any) -> str:
    return ' '.join(map(str, value)) if isinstance(value, tuple) else str(value)
