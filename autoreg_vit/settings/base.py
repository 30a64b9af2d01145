"""What a setting is: a field of a dataclass that is a recipe's key and a flag of the command line alike."""

import argparse
import dataclasses
import inspect
import math
import os
import types
import typing
from collections.abc import Callable
from contextlib import suppress
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np
import yaml

from ..artifacts import write_synced
from ..errors import ConfigError, one_line, suggest

S = TypeVar('S', bound='Settings')
#: A setting that is turned on, off, or left to the run: `auto` is chosen when it begins.
Auto = typing.Union[bool, typing.Literal['auto']]  # noqa: UP007 (which `|` would not make of a Literal)
#: The groups of --help, in its order; a command adds those of its own before the last.
GROUPS = ('model', 'data', 'optimisation', 'machine', 'logging')


def option(
        default: Any, help: str, group: str = '', free: bool = False, model: bool = False, before: Any = MISSING,
        least: float = -math.inf, most: float = math.inf,
) -> Any:
    """A setting with a default, spelt --name on the command line.

    Args:
        default: None for one that is left to the model, the data or the machine.
        help: What it sets; says what None means where that is not plain.
        group: Of --help; by default that of the class it stands in.
        free: Whether it may change when a run is resumed, since the weights do not depend on it.
        model: Whether `timm.create_model` takes it.
        before: What runs had that began before there was the setting; by default its default.
        least, most: Between which numbers it makes sense.
    """
    added = {} if before is MISSING else {'before': before}
    return field(default=default, metadata={
        'help': help, 'group': group, 'free': free, 'model': model, 'least': least, 'most': most, **added})


def argument(help: str, default: Any = MISSING) -> Any:
    """A setting that the command line takes by its place, in the order of the fields: one word, or for a tuple the
    words that are left. Without a default it is required, and stands before the options."""
    return field(default=default, metadata={'help': help, 'positional': True})


def adapted(help: dict[str, str] | None = None, **defaults: Any) -> Callable[[type], type]:
    """A decorator, under @dataclass, that gives inherited settings other defaults, or other words in --help."""
    def adapt(cls: type) -> type:
        inherited = {f.name: f for parent in reversed(cls.__mro__[1:]) if dataclasses.is_dataclass(parent)
                     for f in fields(parent)}
        hints = typing.get_type_hints(cls)
        for name in dict.fromkeys([*defaults, *(help or {})]):
            before = inherited[name]
            words = (help or {}).get(name, before.metadata['help'])
            setattr(cls, name, field(default=defaults.get(name, before.default),
                                     metadata={**before.metadata, 'help': words}))
            cls.__annotations__[name] = hints[name]
        return cls

    return adapt


@dataclass
class Settings:
    """Base of every command's settings: converts values to the declared types and checks them; raises ConfigError for
    one of another type, a number that is not finite, or one that makes no sense."""
    #: The group of --help that settings declared in a class belong to, if they name no other.
    help_group: ClassVar[str] = 'model'

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for item in fields(self):
            value = _convert(item.name, getattr(self, item.name), hints[item.name])
            least, most = item.metadata.get('least', -math.inf), item.metadata.get('most', math.inf)
            if isinstance(value, (int, float)) and not least <= value <= most:
                allowed = f'is between {least} and {most}' if most < math.inf else f'must be at least {least}'
                raise ConfigError(f'{item.name} {allowed}, got {value}.')
            setattr(self, item.name, value)
        self.check()

    def check(self) -> None:
        """Raise ConfigError for values that make no sense; each part checks its own and calls those it extends. That a
        number is not below its `least` or above its `most` is checked before."""

    def model_options(self) -> dict[str, Any]:
        """Keyword arguments for `timm.create_model`: the settings of the model that were given."""
        options = {f.name: getattr(self, f.name) for f in fields(self) if f.metadata.get('model')}
        return {name: value for name, value in options.items() if value is not None}


def free_settings(config_class: type) -> set[str]:
    """Names of the settings that may change when a run is resumed."""
    return {f.name for f in fields(config_class) if f.metadata.get('free')}


def with_added(settings: dict[str, Any], config_class: type) -> dict[str, Any]:
    """Settings of a run's config.yaml, and what the run had of those that a later version added."""
    return {**{f.name: _as_yaml(f.metadata.get('before', f.default)) for f in fields(config_class)}, **settings}


def pair(values: tuple) -> tuple:
    """Two values of one or two, as height and width are given."""
    return values * 2 if len(values) == 1 else values


def plain(config: Settings) -> dict[str, Any]:
    """Settings as YAML holds them: tuples as lists, in the order of --help."""
    return {item.name: _as_yaml(getattr(config, item.name)) for _, item in in_order(type(config))}


def _as_yaml(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def read_settings(path: Path) -> dict[str, Any]:
    """Settings of a YAML file, a recipe or a run's config.yaml; raises ConfigError for one that is no mapping."""
    try:
        recipe = yaml.safe_load(path.read_text(encoding='utf-8'))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f'{path} is not valid YAML: {one_line(error)}') from error
    if not isinstance(recipe, dict):
        raise ConfigError(f'{path} must hold settings as "key: value" lines, got {type(recipe).__name__}.')
    return recipe


def save_config(config: Settings, path: Path) -> None:
    """Write the resolved settings as a recipe."""
    write_synced(path, to_yaml(config))


def to_yaml(config: Settings) -> str:
    """Settings as a recipe spells them."""
    return yaml.safe_dump(plain(config), sort_keys=False)


def make_config(config_class: type[S], recipe: dict[str, Any], flags: dict[str, Any]) -> S:
    """A config from a recipe with flags over it; raises ConfigError for an unknown key or a value of the wrong type."""
    known = [f.name for f in fields(config_class)]
    if unknown := [key for key in recipe if key not in known]:
        raise ConfigError(f'Unknown recipe key {unknown[0]!r}. {suggest(str(unknown[0]), known)}')
    return config_class(**{**recipe, **flags})


def in_order(config_class: type[Settings]) -> list[tuple[str, dataclasses.Field]]:
    """Settings in the order of --help, each with its group: its own, else that of the class that declares it. The order
    of the fields is that of the parts."""
    of_class = {name: part.help_group for part in config_class.__mro__ if issubclass(part, Settings)
                for name in inspect.get_annotations(part)}
    named = [(f.metadata.get('group') or of_class[f.name], f) for f in fields(config_class)]
    return sorted(named, key=lambda pair: GROUPS.index(pair[0]) if pair[0] in GROUPS else len(GROUPS) - 1.5)


def add_flags(parser: argparse.ArgumentParser, config_class: type[Settings]) -> None:
    """One flag a setting, spelt as its recipe key, or a place of its own for an `argument`; what is not given stays out
    of the namespace."""
    hints = typing.get_type_hints(config_class)
    ordered = in_order(config_class)
    groups = {name: parser.add_argument_group(name) for name in dict.fromkeys(name for name, _ in ordered)}
    for name, item in ordered:
        kind, several = _element(hints[item.name])
        options: dict[str, Any] = {'default': argparse.SUPPRESS, 'help': item.metadata['help'].replace('%', '%%')}
        if item.metadata.get('positional'):
            required = item.default is MISSING
            nargs = ('+' if required else '*') if several else (None if required else '?')
            parser.add_argument(item.name, type=kind, metavar=item.name.upper(), nargs=nargs, **options)
            continue
        options['help'] += _shown_default(item)
        if kind is bool:
            options['action'] = argparse.BooleanOptionalAction
        else:
            options.update(type=kind, metavar=item.name.split('_')[-1].upper(), nargs='+' if several else None)
        groups[name].add_argument('--' + item.name.replace('_', '-'), **options)


def _shown_default(item: dataclasses.Field) -> str:
    """The default of a setting as --help shows it, unless its text says what None means."""
    if item.default in (None, (), ''):
        said = any(word in item.metadata['help'] for word in ('by default', 'without', 'all of', 'else '))
        if item.metadata.get('model') and not said:
            return " (the model's own)"
        return '' if said else ' (none)'
    if isinstance(item.default, tuple):
        return f' ({" ".join(map(str, item.default))})'
    if isinstance(item.default, bool):
        return ' (yes)' if item.default else ' (no)'
    return f' ({item.default})'


def _element(hint: Any) -> tuple[type, bool]:
    """Element type of a field and whether it holds several."""
    if hint == Auto:
        return bool, False
    if isinstance(hint, types.UnionType):
        hint = next(a for a in typing.get_args(hint) if a is not type(None))
    if typing.get_origin(hint) is tuple:
        return typing.get_args(hint)[0], True
    return hint, False


def _convert(name: str, value: Any, hint: Any) -> Any:
    """A value in the type that its field declares, since YAML has no tuples and reads 1e-3 as text."""
    if hint == Auto:
        if value != 'auto' and not isinstance(value, bool):
            raise ConfigError(f'{name} is true, false or auto, got {value!r}.')
        return value
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
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f'{name} must be a finite number, got {value}.')
    return value
