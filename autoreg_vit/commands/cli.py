"""The command line, `autoreg-vit COMMAND`."""

import argparse
import importlib
import sys
import textwrap
import traceback
from pathlib import Path
from typing import NamedTuple, NoReturn

from .. import __version__
from ..engine.console import patient_streams
from ..engine.launcher import shown_rank
from ..errors import UsageError, suggest


class Command(NamedTuple):
    """A command: its module has a function of its name, and its settings are a dataclass in another module."""
    help: str
    module: str
    config_module: str
    config_class: str
    default_recipe: str | None = None  # where neither data nor a recipe is named
    trains: bool = True  # takes --config RECIPE


COMMANDS = {
    'pretrain': Command('pretrain a model', '.pretraining', 'pretraining', 'PretrainConfig', default_recipe='digits'),
    'probe': Command('evaluate frozen features by linear probing and nearest neighbours', '.probing', 'classification',
                     'ProbeConfig'),
    'finetune': Command('fine-tune an encoder end to end on labelled images', '.finetuning', 'classification',
                        'FinetuneConfig'),
    'segment': Command('train semantic segmentation, UPerNet on an encoder', '.segmenting', 'segmenting',
                       'SegmentConfig'),
    'detect': Command('train object detection and instance segmentation, Mask R-CNN on an encoder', '.detecting',
                      'detecting', 'DetectConfig'),
    'show': Command('draw a model\'s order, predictions and attention on images', '.showing', 'pictures', 'ShowConfig',
                    trains=False),
    'export': Command('write a pretraining run\'s weights as folders to publish', '..hub.publishing', 'weights',
                      'ExportConfig', trains=False),
    'convert': Command('write a published checkpoint of SAIM or MAE as folders that timm loads', '..hub.conversion',
                       'weights', 'ConvertConfig', trains=False),
}


class Parser(argparse.ArgumentParser):
    """Errors are one line."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(' '.join(message.split()))


class HelpFormatter(argparse.HelpFormatter):
    """Names of recipes stay whole at the end of a line."""

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(text, width, break_on_hyphens=False)


def main(argv: list[str] | None = None) -> int:
    """Run a command and return the process's exit status: 0, 2 for an error of use, 128 + N when signal N stopped it
    (130 for Ctrl-C, 143 for SIGTERM)."""
    arguments = sys.argv[1:] if argv is None else argv
    with patient_streams():
        return _main([a for a in arguments if a != '--debug'], debug='--debug' in arguments)


def _main(arguments: list[str], debug: bool) -> int:
    try:
        return _run(arguments)
    except (UsageError, OSError) as error:
        if isinstance(error, OSError):
            from ..artifacts import OUT_OF_SPACE, write_error

            if error.errno not in OUT_OF_SPACE:
                raise
            error = write_error(Path(error.filename or '.'), error)
        if debug:
            traceback.print_exc()
        if not getattr(error, 'said_elsewhere', False):
            rank = shown_rank()
            name = f'autoreg-vit, rank {rank}' if rank else 'autoreg-vit'
            print(f'{name}: {" ".join(str(error).split())}', file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _run(arguments: list[str]) -> int:
    parser = Parser(prog='autoreg-vit', description='Autoregressive pretraining of Vision Transformers.',
                    allow_abbrev=False)
    parser.add_argument('--version', action='version', version=__version__)
    parser.add_argument('--debug', action='store_true', help='show the traceback of errors of use')
    commands = parser.add_subparsers(dest='command', metavar='COMMAND', required=True, parser_class=Parser)
    parsers, configs = {}, {}
    try:
        from ..engine.signals import Stopped
        from ..settings.base import add_flags, make_config
        from .recipes import bundled_recipes, load_recipe

        for name, command in COMMANDS.items():
            default = '' if command.default_recipe is None else (
                f' With neither data nor a recipe named, it runs the recipe "{command.default_recipe}".')
            parsers[name] = commands.add_parser(
                name, allow_abbrev=False, help=command.help,
                description=f'{command.help[0].upper()}{command.help[1:]}.{default}',
                formatter_class=lambda prog: HelpFormatter(prog, max_help_position=32, width=110))
            configs[name] = getattr(importlib.import_module(f'..settings.{command.config_module}', __package__),
                                    command.config_class)
            if command.trains:
                bundled = ', '.join(bundled_recipes(name))
                parsers[name].add_argument('--config', metavar='RECIPE',
                                           help=f'a YAML file or a bundled recipe ({bundled}); flags override it')
            add_flags(parsers[name], configs[name])
        namespace, unknown = parser.parse_known_args(arguments)
        name = namespace.command
        if unknown:
            flags = [flag for action in parsers[name]._actions for flag in action.option_strings]
            raise UsageError(f'Unknown argument {unknown[0]!r}. {suggest(unknown[0], flags)}')
        function = getattr(importlib.import_module(COMMANDS[name].module, __package__), name)
    except ModuleNotFoundError as error:
        raise UsageError(
            f'The command line needs the package {error.name!r}: pip install "autoreg-vit[train]".') from error
    flags = vars(namespace)
    del flags['command'], flags['debug']
    recipe = flags.pop('config', None)
    if recipe is None and not {'dataset', 'data_dir'} & set(flags):
        recipe = COMMANDS[name].default_recipe
    settings = load_recipe(recipe, name) if recipe else {}
    try:
        function(make_config(configs[name], settings, flags))
    except Stopped as stopped:
        if shown_rank() == 0:
            print(f'autoreg-vit: {stopped}', file=sys.stderr)
        return 128 + stopped.signal_number
    return 0
