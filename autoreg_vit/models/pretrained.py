"""Weights that come with the package: the folders weights/ARCHITECTURE.TAG, as timm's registry sees them."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import timm
from timm.models import DefaultCfg, PretrainedCfg, generate_default_cfgs, resolve_pretrained_cfg
from torch import nn

from ..checksums import SUMS, checksum_path, verify_checksum
from ..errors import CheckpointError, ModelError, suggest

PACKAGE = Path(__file__).parents[1]
#: In an installed package, and in a clone.
ROOTS = (PACKAGE / 'weights', PACKAGE.parent / 'weights')
CONFIG, WEIGHTS = 'config.json', 'model.safetensors'


def shipped_weights() -> dict[str, Path]:
    """The folder of each 'architecture.tag' that comes with the package, by name."""
    root = next((root for root in ROOTS if root.is_dir()), None)
    folders = sorted(root.iterdir()) if root else []
    return {folder.name: folder for folder in folders if '.' in folder.name and (folder / CONFIG).is_file()}


def register_weights(untrained: dict[str, dict[str, Any]]) -> dict[str, DefaultCfg]:
    """timm's `default_cfgs` of architectures, with a tag for each of their weights; the first by name is the default.

    Args:
        untrained: timm's configuration of each architecture, without weights.
    """
    cfgs = {f'{architecture}.untrained': cfg for architecture, cfg in untrained.items()}
    known = {f.name for f in dataclasses.fields(PretrainedCfg)}
    for name, folder in shipped_weights().items():
        cfg = untrained.get(name.partition('.')[0])
        if cfg is not None:
            # A damaged file is an error where the weights are asked for, not here, where everything is registered.
            saved = _read(folder / CONFIG, 'pretrained_cfg')
            saved = {k: tuple(v) if isinstance(v, list) else v for k, v in saved.items() if k in known}
            cfgs[name] = {**cfg, **saved, 'file': str(folder / WEIGHTS)}
    return generate_default_cfgs(cfgs)


def weights_options(
        architecture: str,
        registered: DefaultCfg,
        pretrained: bool,
        options: dict[str, Any],
) -> dict[str, Any]:
    """Check the weights that a model is asked for, before it is built, and give the arguments it was trained with where
    they come with the package: a tag names them all, not only those that show in a tensor's shape.

    Args:
        architecture: timm's name.
        registered: Its tags.
        pretrained: Whether weights are to be loaded.
        options: Arguments of `timm.create_model`; 'pretrained_cfg' and 'pretrained_cfg_overlay' are read.

    Raises:
        ModelError: for a tag that the architecture does not have.
        CheckpointError: for files that are missing, or that do not match the checksums beside them.
    """
    source, overlay = options.get('pretrained_cfg'), options.get('pretrained_cfg_overlay')
    if isinstance(source, str):
        check_tag(architecture, source, registered)
    elif not pretrained:
        return {}
    cfg = resolve_pretrained_cfg(architecture, source, overlay)
    if not cfg.file:
        return {}
    path = Path(cfg.file)
    if pretrained:
        check_files(path)
    if path.parent != shipped_weights().get(f'{architecture}.{cfg.tag}'):
        return {}
    return _read(path.parent / CONFIG, 'model_args')


def load_folder(folder: Path, **options: Any) -> nn.Module:
    """The model of a folder of safetensors with its weights: the door `local-dir:`, for every timm. Before 1.0.26 that
    door itself takes every file for a pickle.

    Args:
        folder: With config.json and model.safetensors.
        **options: Arguments of `timm.create_model`.
    """
    return timm.create_model(f'local-dir:{folder}', pretrained=True, pretrained_cfg_overlay={
        'source': None, 'file': str(folder / WEIGHTS)}, **options)


def check_tag(architecture: str, tag: str, registered: DefaultCfg) -> None:
    """Raise ModelError for a tag that an architecture does not have."""
    if tag not in registered.cfgs:
        raise ModelError(f'{architecture!r} has no tag {tag!r}. {suggest(tag, list(registered.cfgs))}')


def check_files(path: Path) -> None:
    """Raise CheckpointError unless weights, a file or the folder of one, are there and match the checksums beside
    them. Without checksums there is nothing to match."""
    folder = path if path.is_dir() else path.parent
    listed, remedy = (folder / SUMS).exists(), 'Get a whole copy of it.'
    if folder in shipped_weights().values():
        clone = (folder.parents[1] / '.git').exists()
        listed, remedy = True, 'Restore it: ' + (
            f'git checkout -- weights/{folder.name}' if clone else 'pip install --force-reinstall autoreg-vit')
    names = [n for n in (SUMS, CONFIG, WEIGHTS) if listed or checksum_path(folder / n).exists()]
    for file in dict.fromkeys([folder / name for name in names] + ([] if path == folder else [path])):
        if not file.is_file():
            raise CheckpointError(f'There is no file {file}. {remedy}')
        verify_checksum(file, remedy)


def _read(path: Path, entry: str) -> dict[str, Any]:
    """An entry of a JSON file that is a mapping; an empty one where it or the file is missing or damaged."""
    try:
        content = json.loads(path.read_text(encoding='utf-8'))[entry]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return content if isinstance(content, dict) else {}
