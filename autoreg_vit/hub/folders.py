"""Folders that `timm.create_model('local-dir:FOLDER', pretrained=True)` loads."""

import json
from pathlib import Path
from typing import Any, cast

import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from timm.utils import unwrap_model
from torch import nn

from .._compat import loads_channels
from ..artifacts import CONFIG, WEIGHTS, replaced, save_tensors, write_config
from ..errors import ModelError, one_line
from ..models.encoders import STOCK_ARCHITECTURES, SinCosVisionTransformer
from ..models.interface import encoder_of
from ..models.pretraining import AutoregressiveViT


def export_encoder(
        encoder: VisionTransformer, folder: str | Path, *, dtype: torch.dtype = torch.float32, **pretrained_cfg: Any,
) -> None:
    """Write an encoder as a stock timm ViT, which loads where this package is not installed.

    Args:
        encoder: Stand-alone, or `model.encoder` of a pretraining model; also inside DataParallel or torch.compile.
        folder: Replaced if it exists, once what was written has been loaded.
        dtype: What weights are stored in; they load as float32.
        **pretrained_cfg: Entries of timm's configuration to set, such as mean and std.

    Raises:
        ModelError: for a model that was changed into one that its arguments do not describe.
    """
    encoder = cast(SinCosVisionTransformer, unwrap_model(encoder))
    # For a width of no stock model any of them serves as a base: every size is written out in the arguments.
    architecture = STOCK_ARCHITECTURES.get(encoder.embed_dim, STOCK_ARCHITECTURES[192])
    args = {**encoder.init_args, **_current_size(encoder), 'global_pool': encoder.global_pool}
    # transformers passes num_classes itself and fails on a second one.
    args.pop('num_classes', None)
    cfg = {'first_conv': 'patch_embed.proj', 'classifier': 'head', **pretrained_cfg}
    _write(folder, encoder, architecture, args, cfg, dtype)


def export_pretraining(
        model: AutoregressiveViT, folder: str | Path, *, dtype: torch.dtype = torch.float32, **pretrained_cfg: Any,
) -> None:
    """Write a whole pretraining model, encoder and decoder; this package must be imported where it is loaded. Arguments
    are those of `export_encoder`."""
    model = cast(AutoregressiveViT, unwrap_model(model))
    if not hasattr(model, 'init_args'):
        raise ModelError('Only models made by timm.create_model can be exported: others have no name to load by.')
    args = {**model.init_args, **_current_size(model.encoder)}
    if model.target.blur is None:
        args['blur'] = False  # timm drops None, and the model's default may be a blur
    cfg = {'first_conv': 'encoder.patch_embed.proj', 'classifier': None, **pretrained_cfg}
    _write(folder, model, model.pretrained_cfg['architecture'], args, cfg, dtype)


def _check_loads(folder: Path) -> None:
    """Raise ModelError unless the model of a folder loads: what is exported is what the model is."""
    try:
        with torch.random.fork_rng(devices=[]):  # a run draws on as if nothing had been initialised
            timm.create_model(f'local-dir:{folder}', pretrained=True)
    except Exception as error:  # by what does not fit: RuntimeError, ModelError, CheckpointError, TypeError, ...
        raise ModelError(f'The model was changed after it was made, into one that its arguments do not describe '
                         f'({one_line(error, 300)}): export it as it was made, or save its state_dict '
                         'yourself.') from error


def _plain(model_args: dict[str, Any]) -> dict[str, Any]:
    """Arguments as JSON holds them, without those of a place to run at, and without None, which timm drops; raises
    ModelError for an argument that is a class or function."""
    plain = {k: v for k, v in model_args.items() if v is not None and k not in ('device', 'dtype')}
    for name, value in plain.items():
        try:
            json.dumps(value)
        except TypeError as error:
            raise ModelError(f'{name}={value!r} cannot be written to config.json: create the model with a name or a '
                             "number there, such as norm_layer='layernorm'.") from error
    return plain


def _current_size(encoder: VisionTransformer) -> dict[str, Any]:
    embed = encoder.patch_embed
    return {'img_size': list(embed.img_size), 'patch_size': list(embed.patch_size), 'in_chans': embed.proj.in_channels,
            'depth': len(encoder.blocks)}


def _write(
        folder: str | Path, model: nn.Module, architecture: str, model_args: dict[str, Any],
        pretrained_cfg: dict[str, Any], dtype: torch.dtype,
) -> None:
    encoder = encoder_of(model)
    channels = encoder.patch_embed.proj.in_channels
    if not loads_channels(channels):  # timm adapts nothing without it
        pretrained_cfg = {**pretrained_cfg, 'first_conv': None}
    config = {
        'architecture': architecture, 'num_classes': encoder.num_classes, 'num_features': encoder.num_features,
        'global_pool': encoder.global_pool,
        'torch_dtype': 'float32',  # else transformers computes in the dtype that weights are stored in
        'model_args': _plain(model_args),
        'pretrained_cfg': {
            'input_size': [channels, *encoder.patch_embed.img_size], 'fixed_input_size': True, 'crop_pct': 1.0,
            'interpolation': 'bicubic', 'mean': [0.5] * channels, 'std': [0.5] * channels,
            'num_classes': encoder.num_classes, **pretrained_cfg,
        },
    }
    with replaced(Path(folder)) as (new,):
        new.mkdir()
        tensors = {k: v.to(dtype) if v.is_floating_point() else v for k, v in model.state_dict().items()}
        save_tensors(new / WEIGHTS, tensors, checksum=False)  # which export writes for the folder, and a run for itself
        write_config(new / CONFIG, config)
        _check_loads(new)
