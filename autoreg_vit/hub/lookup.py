"""Encoders to evaluate or fine-tune: anything that `timm.create_model` makes, from a folder or by name."""

import json
from pathlib import Path
from typing import Any

import timm
from torch import nn

from ..artifacts import CONFIG, WEIGHTS, verify_checksum
from ..errors import CheckpointError, ModelError, UsageError, one_line, suggest
from ..models.designs import pretraining_models
from ..models.encoders import check_sizes


def load_encoder(weights: str, pretrained: bool = True, **options: Any) -> nn.Module:
    """An encoder by `timm.create_model`.

    Args:
        weights: A folder that pretraining wrote (encoder/, or the run's folder around it), a timm name with or without
            a tag, or 'hf-hub:NAME'.
        pretrained: Load the weights; False gives the same architecture as it is initialised.
        **options: Arguments of `timm.create_model`, such as num_classes, img_size or drop_path_rate.

    Raises:
        CheckpointError: for a folder that is missing, empty or damaged, or a name without trained weights.
        ModelError: for an unknown name, or options that the model does not take.
        ShapeError: for an image that is not a whole number of patches.
    """
    return _create(_resolve(weights), weights, pretrained, options)


def load_model(weights: str, pretrained: bool = True) -> nn.Module:
    """A pretraining model where `weights` has one, else an encoder.

    Arguments and errors are those of `load_encoder`; `weights` may also be a folder or timm name of a pretraining
    model, and of a run's folder, pretrain/ comes before encoder/."""
    return _create(_resolve(weights, pretraining=True), weights, pretrained, {})


def _create(name: str, weights: str, pretrained: bool, options: dict[str, Any]) -> nn.Module:
    """The model of timm's `name`; `weights` is what the caller called it."""
    shown = ', '.join(f'{k}={v!r}' for k, v in options.items())
    try:
        model = timm.create_model(name, pretrained=pretrained, **options)
    except UsageError:
        raise
    except (AssertionError, TypeError) as error:  # what timm says of options that it does not take
        reason = one_line(error, 300) or 'timm refuses them'
        raise ModelError(f'{weights!r} cannot be created with {shown}: {reason}') from error
    except Exception as error:  # by the kind of damage: OSError, RuntimeError, SafetensorError, KeyError, ...
        if pretrained and 'No pretrained weights exist' in str(error):
            raise CheckpointError(f'{weights!r} has no trained weights: name a folder that pretraining wrote, or start '
                                  'from initialisation with --no-pretrained.') from error
        raise CheckpointError(f'Cannot load {weights!r} with {shown or "no options"} ({type(error).__name__}: '
                              f'{one_line(error, 300)}).') from error
    embed: Any = getattr(model, 'patch_embed', None)
    if getattr(embed, 'img_size', None) and hasattr(embed, 'patch_size'):
        check_sizes(embed.img_size, embed.patch_size)  # timm rounds down
    return model


def short_name(weights: str) -> str:
    """A name for the folder of a run: the timm name, or that of the run that wrote the weights."""
    path = Path(weights.rpartition(':')[2])
    return path.resolve().parent.name if path.is_dir() and path.name in ('encoder', 'pretrain') else path.name


def source_config(weights: str) -> dict[str, Any]:
    """The config.json of a folder of weights, or an empty one for a timm name."""
    name = _resolve(weights)
    if not name.startswith('local-dir:'):
        return {}
    return json.loads(Path(name.removeprefix('local-dir:'), CONFIG).read_text(encoding='utf-8'))


def _resolve(weights: str, pretraining: bool = False) -> str:
    """The name by which timm knows `weights`: an encoder's, or with `pretraining` rather a pretraining model's."""
    if weights.startswith(('hf-hub:', 'hf_hub:')):
        return weights
    path = Path(weights.removeprefix('local-dir:')).expanduser()
    if path.is_dir():
        folders = [path, path / 'pretrain', path / 'encoder'] if pretraining else [path, path / 'encoder']
        folder = next((f for f in folders if (f / CONFIG).is_file()), None)
        if folder is None:
            raise CheckpointError(f'{path} holds no encoder: expected config.json and model.safetensors, as '
                                  'pretraining writes to runs/NAME/encoder.')
        if (folder / f'{WEIGHTS}.index.json').is_file() and not (folder / WEIGHTS).is_file():
            raise CheckpointError(f'{folder} holds its weights in shards, as transformers writes large ones, and timm '
                                  'reads one file: join them, by saving the model again with '
                                  "save_pretrained(FOLDER, max_shard_size='100GB').")
        if _architecture(folder) in pretraining_models() and not pretraining:
            raise ModelError(f'{folder} holds a pretraining model, encoder and decoder: name the folder '
                             f'{folder.with_name("encoder")} beside it.')
        for file in (folder / WEIGHTS, folder / 'pytorch_model.bin'):  # what timm loads
            if file.is_file():
                verify_checksum(file)
        return f'local-dir:{folder}'
    if path.exists():
        raise CheckpointError(f'{path} is a file: --weights names the folder of an encoder, with config.json and '
                              'model.safetensors.')
    base, _, tag = weights.partition('.')
    if base in pretraining_models() and not pretraining:
        method, size = base.split('_', 1)
        raise ModelError(f'{weights!r} is a pretraining model: its encoder is {size}_{method}.')
    if timm.is_model(base):
        names = timm.list_models(f'{base}.*', pretrained=True, include_tags=True) if tag else []
        tags = [name.partition('.')[2] for name in names]
        if tag and tag not in tags:
            known = suggest(tag, tags) if tags else 'It has no trained weights.'
            raise ModelError(f'{base!r} has no tag {tag!r}. {known}')
        return weights
    if '/' in weights or weights.startswith(('.', 'local-dir:')):
        raise CheckpointError(f'No folder {path}: --weights names the folder of an encoder, as pretraining writes to '
                              'runs/NAME/encoder, or a timm name.')
    raise ModelError(f'Unknown encoder {weights!r}: it is neither a folder nor a timm name. '
                     f'{suggest(base, timm.list_models())}')


def _architecture(folder: Path) -> str:
    """timm's name of the model in a folder, without its tag."""
    try:
        config = json.loads((folder / CONFIG).read_text(encoding='utf-8'))
        if 'architecture' in config or not ('model_type' in config or 'architectures' in config):
            return config['architecture'].partition('.')[0]
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f'{folder / CONFIG} is damaged: it names no architecture ({one_line(error, 300)}).'
                              ) from error
    raise ModelError(f'{folder} holds a model of transformers ({config.get("model_type") or config["architectures"]}), '
                     'not one of timm: --weights takes encoders that pretraining wrote, and models of timm.')
