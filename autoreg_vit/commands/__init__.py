"""What `autoreg-vit` does: the commands, and the table of them. From Python the same as functions:

    from autoreg_vit.commands import PretrainConfig, pretrain
    folder = pretrain(PretrainConfig(data_dir='photographs', epochs=10))

Each is imported when it is asked for, so that `--help` waits for none of them.
"""

import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from ..settings.base import Settings

if TYPE_CHECKING:
    from ..hub.conversion import convert
    from ..hub.publishing import export
    from ..settings.classification import FinetuneConfig, ProbeConfig
    from ..settings.dense import DetectConfig, SegmentConfig
    from ..settings.pictures import ShowConfig
    from ..settings.pretraining import PretrainConfig
    from ..settings.weights import ConvertConfig, ExportConfig
    from .detecting import detect
    from .finetuning import finetune
    from .pretraining import pretrain
    from .probing import probe
    from .segmenting import segment
    from .showing import show

__all__ = [
    'COMMANDS', 'Command', 'ConvertConfig', 'DetectConfig', 'ExportConfig', 'FinetuneConfig', 'PretrainConfig',
    'ProbeConfig', 'SegmentConfig', 'ShowConfig', 'convert', 'detect', 'export', 'finetune', 'pretrain', 'probe',
    'segment', 'show',
]


class Command(NamedTuple):
    """A command of the command line.

    Args:
        module: Of the function of its name, in the package.
        settings: Module of its settings, in the package.
        config_class: Name of the class there.
        default_recipe: Taken where neither data nor a recipe is named.
        has_recipes: Whether it takes --config RECIPE.
    """
    help: str
    module: str
    settings: str
    config_class: str
    default_recipe: str | None = None
    has_recipes: bool = True

    def config(self) -> type[Settings]:
        """The class of its settings."""
        return getattr(importlib.import_module(f'..{self.settings}', __name__), self.config_class)

    def function(self, name: str) -> Callable[[Any], Any]:
        """The function that does it, from settings to what it wrote."""
        return getattr(importlib.import_module(f'..{self.module}', __name__), name)


COMMANDS = {
    'pretrain': Command('pretrain a model', 'commands.pretraining', 'settings.pretraining', 'PretrainConfig',
                        default_recipe='digits'),
    'probe': Command('evaluate frozen features by linear probing and nearest neighbours', 'commands.probing',
                     'settings.classification', 'ProbeConfig'),
    'finetune': Command('fine-tune an encoder end to end on labelled images', 'commands.finetuning',
                        'settings.classification', 'FinetuneConfig'),
    'segment': Command('train semantic segmentation, UPerNet on an encoder', 'commands.segmenting', 'settings.dense',
                       'SegmentConfig'),
    'detect': Command('train object detection and instance segmentation, Mask R-CNN on an encoder',
                      'commands.detecting', 'settings.dense', 'DetectConfig'),
    'show': Command('draw a model\'s order, predictions and attention on images', 'commands.showing',
                    'settings.pictures', 'ShowConfig', has_recipes=False),
    'export': Command('write a pretraining run\'s weights as folders to publish', 'hub.publishing', 'settings.weights',
                      'ExportConfig', has_recipes=False),
    'convert': Command('write a published checkpoint of SAIM or MAE as folders that timm loads', 'hub.conversion',
                       'settings.weights', 'ConvertConfig', has_recipes=False),
}


def __getattr__(name: str) -> Any:
    if name in COMMANDS:
        return COMMANDS[name].function(name)
    for command in COMMANDS.values():
        if name == command.config_class:
            return command.config()
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
