"""The command line, `autoreg-vit COMMAND`."""

import argparse
import sys
import traceback
from typing import NoReturn

from .. import __version__
from ..errors import UsageError, suggest


class Parser(argparse.ArgumentParser):
    """Errors are one line."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(' '.join(message.split()))


def main(argv: list[str] | None = None) -> int:
    """Run a command and return the process's exit status: 0, 2 for an error of use, 130 when interrupted."""
    arguments = sys.argv[1:] if argv is None else argv
    debug = '--debug' in arguments
    try:
        return _run([a for a in arguments if a != '--debug'])
    except UsageError as error:
        if debug:
            traceback.print_exc()
        print(f'autoreg-vit: {" ".join(str(error).split())}', file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _run(arguments: list[str]) -> int:
    parser = Parser(prog='autoreg-vit', description='Autoregressive pretraining of Vision Transformers.',
                    allow_abbrev=False)
    parser.add_argument('--version', action='version', version=__version__)
    parser.add_argument('--debug', action='store_true', help='show the traceback of errors of use')
    commands = parser.add_subparsers(dest='command', metavar='COMMAND', required=True, parser_class=Parser)
    command = commands.add_parser(
        'pretrain', allow_abbrev=False, help='pretrain a model',
        description='Pretrain a model. With neither data nor a recipe named, it runs the recipe "digits".',
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=32, width=110))
    try:
        from .config import PretrainConfig, add_flags, bundled_recipes, load_recipe, make_config
        from .pretrain import pretrain
    except ModuleNotFoundError as error:
        raise UsageError(f'Training needs the package {error.name!r}: pip install "autoreg-vit[train]".') from error
    command.add_argument('--config', metavar='RECIPE',
                         help=f'a YAML file or a bundled recipe ({", ".join(bundled_recipes())}); flags override it')
    add_flags(command, PretrainConfig)
    namespace, unknown = parser.parse_known_args(arguments)
    if unknown:
        flags = [flag for action in command._actions for flag in action.option_strings]
        raise UsageError(f'Unknown argument {unknown[0]!r}. {suggest(unknown[0], flags)}')
    flags = vars(namespace)
    del flags['command'], flags['debug']
    recipe = flags.pop('config', None)
    if recipe is None and not {'dataset', 'data_dir'} & set(flags):
        recipe = 'digits'
    pretrain(make_config(PretrainConfig, load_recipe(recipe) if recipe else {}, flags))
    return 0
