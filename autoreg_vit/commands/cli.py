"""The command line, `autoreg-vit COMMAND`."""

import argparse
import sys
import textwrap
import traceback
from pathlib import Path
from typing import Any, NoReturn

from ..engine.console import patient_streams
from ..engine.launcher import shown_rank
from ..errors import UsageError, one_line, suggest
from ..version import __version__


class Parser(argparse.ArgumentParser):
    """Errors are one line."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(' '.join(message.split()))


class HelpFormatter(argparse.HelpFormatter):
    """Names of recipes stay whole at the end of a line."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=32, width=110)

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(text, width, break_on_hyphens=False)


def main(argv: list[str] | None = None) -> int:
    """Run a command and return the process's exit status: 0, 2 for an error of use, 128 + N when signal N stopped it
    (130 for Ctrl-C, 143 for SIGTERM)."""
    arguments = sys.argv[1:] if argv is None else argv
    debug = '--debug' in arguments
    with patient_streams():
        try:
            return _run([a for a in arguments if a != '--debug'])
        except ModuleNotFoundError as error:
            need = f'The command line needs the package {error.name!r}: pip install "autoreg-vit[train]".'
            return _say_error(UsageError(need), debug)
        except UsageError as error:
            return _say_error(error, debug)
        except OSError as error:
            from ..artifacts import OUT_OF_SPACE, write_error

            if error.errno not in OUT_OF_SPACE:
                raise
            return _say_error(write_error(Path(error.filename or '.'), error), debug)
        except KeyboardInterrupt:
            return 130


def _say_error(error: UsageError, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    if not getattr(error, 'said_elsewhere', False):
        place = f', rank {rank}' if (rank := shown_rank()) else ''
        print(f'autoreg-vit{place}: {one_line(error)}', file=sys.stderr)
    return 2


def _run(arguments: list[str]) -> int:
    from ..engine.signals import Stopped
    from ..settings.base import make_config, to_yaml
    from . import COMMANDS
    from .recipes import describe_recipes, load_recipe

    flags = _parse(arguments)
    name = flags.pop('command')
    if name == 'recipes':
        print(describe_recipes([known for known, command in COMMANDS.items() if command.has_recipes]))
        return 0
    command = COMMANDS[name]
    print_config, recipe = flags.pop('print_config'), flags.pop('config', None)
    if recipe is None and not {'dataset', 'data_dir'} & set(flags):
        recipe = command.default_recipe
    config = make_config(command.config(), load_recipe(recipe, name) if recipe else {}, flags)
    if print_config:
        print(to_yaml(config), end='')
        return 0
    try:
        command.function(name)(config)
    except Stopped as stopped:
        if shown_rank() == 0:
            print(f'autoreg-vit: {stopped}', file=sys.stderr)
        return 128 + stopped.signal_number
    return 0


def _parse(arguments: list[str]) -> dict[str, Any]:
    """The command's name as `command`, and what was given of its settings."""
    from ..settings.base import add_flags
    from . import COMMANDS
    from .recipes import bundled_recipes

    parser = Parser(prog='autoreg-vit', description='Autoregressive pretraining of Vision Transformers.',
                    allow_abbrev=False)
    parser.add_argument('--version', action='version', version=__version__)
    parser.add_argument('--debug', action='store_true', default=argparse.SUPPRESS,  # which `main` takes
                        help='show the traceback of errors of use')
    commands = parser.add_subparsers(dest='command', metavar='COMMAND', required=True, parser_class=Parser)
    parsers = {}
    for name, command in COMMANDS.items():
        default = '' if command.default_recipe is None else (
            f' With neither data nor a recipe named, it runs the recipe "{command.default_recipe}".')
        parsers[name] = commands.add_parser(
            name, allow_abbrev=False, help=command.help, formatter_class=HelpFormatter,
            description=f'{command.help[0].upper()}{command.help[1:]}.{default}')
        if name in arguments:  # what the others take needs their settings imported
            if command.has_recipes:
                parsers[name].add_argument('--config', metavar='RECIPE', default=argparse.SUPPRESS, help=(
                    f'a YAML file or a bundled recipe ({", ".join(bundled_recipes(name))}); flags override it'))
            parsers[name].add_argument('--print-config', action='store_true',
                                       help='show the resolved settings, and do nothing else')
            add_flags(parsers[name], command.config())
    parsers['recipes'] = commands.add_parser(
        'recipes', allow_abbrev=False, help='list the bundled recipes', formatter_class=HelpFormatter,
        description='List the bundled recipes, with a line each.')
    namespace, unknown = parser.parse_known_args(arguments)
    if unknown:
        flags = [flag for action in parsers[namespace.command]._actions for flag in action.option_strings]
        raise UsageError(f'Unknown argument {unknown[0]!r}. {suggest(unknown[0], flags)}')
    return vars(namespace)
