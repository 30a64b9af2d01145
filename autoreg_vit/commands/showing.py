"""`autoreg-vit show`: pictures of a model's order, its predictions and its attention, on images of one's own."""

from pathlib import Path
from typing import cast

import numpy as np
import torch
from PIL import Image
from torch import nn

from ..artifacts import writing
from ..data.folders import FlatFolder
from ..data.images import DAMAGE, damaged, open_image
from ..data.sources import Digits
from ..data.transforms import ImageSpec, evaluation_transform
from ..engine.progress import say
from ..engine.run import create_folder
from ..engine.seeding import mix_seed
from ..errors import DataError, ModelError
from ..figures import attention_maps, pictures, plots
from ..hub.lookup import load_model, short_name
from ..models import AutoregressiveViT
from ..models.decoders import MaskedDecoder
from ..models.interface import encoder_of
from ..settings.pictures import FIGURES, MOST_IMAGES, ShowConfig


def show(config: ShowConfig) -> Path:
    """Draw pictures of a model.

    Returns:
        The folder of the pictures: order.png, reconstruction.png and .gif, comparison.png, attention.png, mix.png.

    Raises:
        UsageError: for weights, images or a folder that cannot be used, or a figure that the model does not have.
    """
    model = load_model(config.weights, config.pretrained).eval()
    wanted = _possible(model, config)
    spec = ImageSpec.of(model)
    images = load_images(config.images, spec, encoder_of(model).patch_embed.patch_size, config.count)
    name = short_name(config.weights)
    folder = create_folder(config.output_dir or f'runs/show-{name}', name)
    if isinstance(model, AutoregressiveViT):
        architecture = model.pretrained_cfg['architecture']
        name = name if architecture in name else f'{architecture}, {name}'
        torch.manual_seed(mix_seed(config.seed, 'reconstruction'))
        done = pictures.reconstruct(model, images)
    whole = cast(AutoregressiveViT, model)  # which it is where a figure of order or decoder is possible
    with writing(folder):
        for figure in wanted:
            torch.manual_seed(mix_seed(config.seed, figure))
            files = [folder / f'{figure}.png']
            if figure == 'order':
                pictures.serialization_figure(whole, images, spec, files[0], name)
            elif figure == 'reconstruction':
                files.append(folder / 'reconstruction.gif')
                pictures.reconstruction_figure(done, spec, files[0], name)
                pictures.reconstruction_film(done, spec, files[1], name)
            elif figure == 'comparison':
                pictures.comparison_figure(done, spec, files[0], name)
            elif figure == 'attention':
                encoders = [('pretrained' if config.pretrained else 'untrained', encoder_of(model))]
                if config.pretrained:
                    encoders.insert(0, ('untrained', encoder_of(load_model(config.weights, pretrained=False))))
                attention_maps.attention_figure(encoders, images, spec, files[0], name)
            elif figure == 'mix':
                plots.mix_figure(cast(MaskedDecoder, whole.decoder).mix.detach().cpu().numpy(), files[0], name)
            for file in files:
                say(f'{FIGURES[figure]}: {file}')
    return folder


def load_images(paths: tuple[str, ...], spec: ImageSpec, patch_size: tuple[int, int], count: int) -> torch.Tensor:
    """Images as a model takes them, normalised, [B, C, H, W].

    Args:
        paths: Image files, whose middle is cropped and resized, and folders, of which `count` images are taken, spread
            evenly; where there are none, scikit-learn's digits for a model of such small grey images, else its two
            photographs.
        patch_size: Height and width in pixels, the least that a file may have.

    Raises:
        DataError: for a path that is missing, or a file that is damaged or smaller than a patch.
    """
    transform = evaluation_transform(spec)
    if not paths and spec.channels == 1 and max(spec.size) <= 16:
        digits = Digits('test', transform)
        return torch.stack([digits[i][0] for i in _spread(len(digits), count)])
    files: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            folder = FlatFolder(path, transform)
            if text := folder.left_out.describe(path):
                print(text)
            files += [Path(folder.samples[i][0]) for i in _spread(len(folder.samples), count)]
        elif path.is_file():
            files.append(path)
        else:
            raise DataError(f'No image {path}: name image files or folders of them.')
    if len(files) > MOST_IMAGES:
        raise DataError(f'{len(files)} images are too many for a picture: name up to {MOST_IMAGES}, or a folder, of '
                        'which --count are taken.')
    if not files:
        from sklearn.datasets import load_sample_images

        files = [Path(file) for file in load_sample_images().filenames]
    return torch.stack([transform(_read(file, patch_size)) for file in files])


def _read(file: Path, patch_size: tuple[int, int]) -> Image.Image:
    try:
        image = open_image(file)
    except DAMAGE as error:
        raise damaged(file, error) from error
    if image.height < patch_size[0] or image.width < patch_size[1]:
        raise DataError(f'{file} has {image.width} x {image.height} pixels, less than one patch of this model, '
                        f'{patch_size[1]} x {patch_size[0]}: name a larger image.')
    return image


def _spread(total: int, count: int) -> list[int]:
    return np.linspace(0, total - 1, min(count, total)).round().astype(int).tolist()


def _possible(model: nn.Module, config: ShowConfig) -> list[str]:
    """The figures to draw. One that the model does not have is an error where it was asked for, else said and left
    out."""
    reasons = {}
    if not isinstance(model, AutoregressiveViT):
        reasons = dict.fromkeys(('order', 'reconstruction', 'comparison', 'mix'), (
            f'{config.weights} is an encoder alone, without an order and a decoder: name the pretrain/ folder of its '
            'run, or the folder of the run'))
    elif not hasattr(model.decoder, 'mix'):
        reasons['mix'] = 'the model learned none, as decoder=masked with memory=mix does (RandSAC 4.2)'
    try:
        attention_maps.with_attention(encoder_of(model))
    except ModelError as error:
        reasons['attention'] = str(error).rstrip('.')
    for name, reason in reasons.items():
        if config.figures and name in config.figures:
            raise ModelError(f'No figure {name!r}: {reason}.')
    if config.figures:
        return list(dict.fromkeys(config.figures))
    possible = [name for name in FIGURES if name not in reasons]
    if not possible:
        raise ModelError(f'Nothing to draw of {config.weights}: {reasons["attention"]}.')
    for reason in dict.fromkeys(reasons.values()):
        say(f'Left out {", ".join(name for name in reasons if reasons[name] == reason)}: {reason}.')
    return possible
