"""Settings of `autoreg-vit show`."""

from dataclasses import dataclass
from pathlib import Path

from ..errors import ConfigError, suggest
from .base import adapted, argument, option
from .parts import SeedAndFolder, StartingWeights

#: What there is to draw.
FIGURES = {
    'order': 'draws of the order of prediction',
    'reconstruction': 'images segment by segment, as a strip and as a GIF',
    'comparison': 'images, targets, predictions and errors side by side',
    'attention': 'what the encoder\'s last block attends to, untrained and pretrained',
    'mix': 'the learned mix of encoder blocks that each decoder layer reads',
}
#: Images that fit on a picture.
MOST_IMAGES = 8


@dataclass
@adapted(help={
    'weights': 'what to look at: a run\'s folder, the pretrain/ or encoder/ in it, or a timm name',
    'pretrained': 'load the weights; --no-pretrained shows the model as it is initialised',
    'seed': 'seed of the orders that are drawn, and of the untrained encoder',
    'output_dir': 'folder of the pictures; by default runs/show-NAME'})
class ShowConfig(StartingWeights, SeedAndFolder):
    """Settings of `autoreg-vit show`."""
    help_group = 'pictures'
    without_weights = ('Nothing to show: --weights names a run\'s folder (runs/NAME), the pretrain/ or encoder/ in it, '
                       'or a timm name such as vit_base_patch16_224.')

    images: tuple[str, ...] = argument('image files, or folders of them; by default bundled ones', default=())
    figures: tuple[str, ...] | None = option(
        None, f'what to draw: {", ".join(FIGURES)}; by default all that the weights allow')
    count: int = option(4, 'images of a folder to show, spread evenly over it', least=1, most=MOST_IMAGES)

    def check(self) -> None:
        super().check()
        for name in self.figures or ():
            if name not in FIGURES:
                files = ' Name images before the options.' if Path(name).exists() else ''
                raise ConfigError(f'Unknown figure {name!r}.{files} {suggest(name, list(FIGURES))}')
