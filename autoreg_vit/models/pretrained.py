"""Weights that come with the package: the folders weights/ARCHITECTURE.TAG, as timm's registry sees them."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import timm
from timm.models import DefaultCfg, PretrainedCfg, generate_default_cfgs, resolve_pretrained_cfg
from torch import nn

from ..artifacts import CONFIG, SUMS, WEIGHTS, checksum_path, verify_checksum
from ..errors import CheckpointError, ModelError, suggest

PACKAGE = Path(__file__).parents[1]
#: In an installed package, and in a clone.
ROOTS = (PACKAGE / 'weights', PACKAGE.parent / 'weights')
#: The entry of config.json by which a tag declares itself the one that its model's bare name means.
DEFAULT = 'default_tag'


def shipped_weights() -> dict[str, Path]:
    """The folder of each 'architecture.tag' that comes with the package, by name."""
    root = next((root for root in ROOTS if root.is_dir()), None)
    folders = sorted(root.iterdir()) if root else []
    return {folder.name: folder for folder in folders if '.' in folder.name and (folder / CONFIG).is_file()}


def register_weights(untrained: dict[str, dict[str, Any]]) -> dict[str, DefaultCfg]:
    """timm's `default_cfgs` of architectures, from the configuration of each without weights, with a tag for each of
    their weights. An architecture without one default (`default_tags`) is untrained by its bare name, and asking for
    its weights is an error of `weights_options`."""
    cfgs = {}
    known = {f.name for f in dataclasses.fields(PretrainedCfg)}
    for name, folder in shipped_weights().items():
        cfg = untrained.get(name.partition('.')[0])
        if cfg is not None:
            # A damaged file is an error where the weights are asked for, not here, where everything is registered.
            saved = _mapping(_read(folder / CONFIG).get('pretrained_cfg'))
            saved = {k: tuple(v) if isinstance(v, list) else v for k, v in saved.items() if k in known}
            cfgs[name] = {**cfg, **saved}
            if not hub_repository(folder):
                cfgs[name]['file'] = str(folder / WEIGHTS)
    cfgs.update({f'{architecture}.untrained': cfg for architecture, cfg in untrained.items()})
    defaults = {architecture: default_tags(architecture) for architecture in untrained}
    marked = {f'{architecture}.{tags[0] if len(tags) == 1 else "untrained"}' for architecture, tags in defaults.items()}
    return generate_default_cfgs({f'{name}*' if name in marked else name: cfg for name, cfg in cfgs.items()})


def default_tags(architecture: str) -> list[str]:
    """The tags that declare themselves an architecture's default in their config.json, or its only tag where none does.
    One is as it should be; with several, or none among several, the bare name means none of them."""
    tags = {name.partition('.')[2]: folder for name, folder in shipped_weights().items()
            if name.partition('.')[0] == architecture}
    declared = [tag for tag, folder in tags.items() if _read(folder / CONFIG).get(DEFAULT) is True]
    return declared or (list(tags) if len(tags) == 1 else [])


def weights_options(
        architecture: str, registered: DefaultCfg, pretrained: bool, options: dict[str, Any]) -> dict[str, Any]:
    """Check the weights that a model is asked for, before it is built, and give the arguments it was trained with where
    they come with the package: a tag names them all, not only those that show in a tensor's shape. Of `options`, which
    are those of `timm.create_model`, 'pretrained_cfg' and 'pretrained_cfg_overlay' are read.

    Raises:
        ModelError: for a tag that the architecture does not have, or none where it has several and no default.
        CheckpointError: for a model without weights, and for files that are missing, or that do not match the
            checksums beside them.
    """
    source, overlay = options.get('pretrained_cfg'), options.get('pretrained_cfg_overlay')
    if isinstance(source, str):
        check_tag(architecture, source, registered)
    elif not pretrained:
        return {}
    cfg = resolve_pretrained_cfg(architecture, source, overlay)
    if pretrained and not (cfg.has_weights or cfg.state_dict):
        if source is None and registered.is_pretrained:
            raise ModelError(_ambiguous(architecture, [tag for tag in registered.tags if tag != cfg.tag]))
        raise CheckpointError(_untrained(architecture, f'.{source}' if isinstance(source, str) else ''))
    if cfg.state_dict:
        return {}
    shipped = shipped_weights().get(f'{architecture}.{cfg.tag}')
    if cfg.file:
        path = Path(cfg.file)
    elif shipped and hub_repository(shipped):
        path = shipped / CONFIG
    else:
        return {}
    if pretrained:
        check_files(path)
    return _mapping(_read(shipped / CONFIG).get('model_args')) if path.parent == shipped else {}


def hub_repository(folder: Path) -> str | None:
    """Where the weights of a folder of weights/ lie on the Hugging Face Hub, if they are not in the folder itself:
    `hf_hub_id` of its config.json."""
    if (folder / WEIGHTS).exists():
        return None
    return _mapping(_read(folder / CONFIG).get('pretrained_cfg')).get('hf_hub_id')


def load_folder(folder: Path, **options: Any) -> nn.Module:
    """The model of a folder with its weights, by timm's door `local-dir:`; `options` are those of `create_model`."""
    return timm.create_model(f'local-dir:{folder}', pretrained=True, **options)


def check_tag(architecture: str, tag: str, registered: DefaultCfg) -> None:
    """Raise ModelError for a tag that an architecture does not have."""
    if tag not in registered.cfgs:
        raise ModelError(f'{architecture!r} has no tag {tag!r}. {suggest(tag, list(registered.cfgs))}')


def _ambiguous(architecture: str, tags: list[str]) -> str:
    """What to say where an architecture's bare name means none of its tags."""
    declared = default_tags(architecture)
    names = ' and '.join(f'weights/{architecture}.{tag}' for tag in declared)
    reason = f'{names} all declare themselves its default' if declared else 'none of them is its default'
    example = f'{architecture}.{(declared or tags)[0]}'
    return (f'{architecture!r} has the weights {", ".join(sorted(tags))}, and {reason}: name one, as in {example!r}, '
            f'or have one config.json, and no other, say "{DEFAULT}": true.')


def _untrained(architecture: str, tag: str) -> str:
    """What to say where weights are asked for and there are none: which there are, and what else there is."""
    encoder = architecture.startswith('vit_')
    trained = [name for name in shipped_weights() if name.startswith('vit_') == encoder]
    folder, stock = ('encoder', ", timm's own ('vit_base_patch16_224.mae')") if encoder else ('pretrain', '')
    return (f'{architecture + tag!r} has no trained weights{", unlike " if trained else ""}{", ".join(trained)}. Take '
            f"instead those of a run of autoreg-vit pretrain ('local-dir:runs/NAME/{folder}'), a published checkpoint "
            f"(pretrained_cfg_overlay=dict(file='saim_base.pth')){stock}, or none (pretrained=False, --no-pretrained).")


def check_files(path: Path) -> None:
    """Raise CheckpointError unless weights, a file or the folder of one, are there and match the checksums beside
    them. Without checksums there is nothing to match."""
    folder = path if path.is_dir() else path.parent
    listed, remedy = (folder / SUMS).exists(), 'Get a whole copy of it.'
    if folder in shipped_weights().values():
        clone = (folder.parents[1] / '.git').exists()
        way = f'git checkout -- weights/{folder.name}' if clone else 'pip install --force-reinstall autoreg-vit'
        listed, remedy = True, f'Restore it: {way}'
    expected = (SUMS, CONFIG) if hub_repository(folder) else (SUMS, CONFIG, WEIGHTS)
    names = [n for n in expected if listed or checksum_path(folder / n).exists()]
    for file in dict.fromkeys([folder / name for name in names] + ([] if path == folder else [path])):
        if not file.is_file():
            raise CheckpointError(f'There is no file {file}. {remedy}')
        verify_checksum(file, remedy)


def _read(path: Path) -> dict[str, Any]:
    """The mapping in a JSON file; an empty one where the file is missing or damaged."""
    try:
        return _mapping(json.loads(path.read_text(encoding='utf-8')))
    except (OSError, ValueError):
        return {}


def _mapping(content: Any) -> dict[str, Any]:
    return content if isinstance(content, dict) else {}
