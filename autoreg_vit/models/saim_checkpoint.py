"""SAIM's published checkpoint layout, `{'model': state_dict}` with separate q, k and v, in this package's names.

The layout has one final norm, `norm`, applied to the query stream in pretraining and to the encoder's output in
fine-tuning; here that is the encoder's norm in both.
"""

import logging
import re
from collections.abc import Callable

import torch
from torch import nn

from ..errors import CheckpointError

_logger = logging.getLogger(__name__)

_PROJECTION = re.compile(r'(.*\.attn\.)([qkv])\.(weight|bias)$')


def is_saim_layout(state_dict: dict[str, torch.Tensor]) -> bool:
    """Whether a state dict has SAIM's separate projections."""
    return any(_PROJECTION.fullmatch(key) for key in state_dict)


def encoder_name(key: str) -> str | None:
    """What the encoder calls a tensor of the layout; None for what belongs to pretraining alone."""
    return None if key.startswith(('query_blocks.', 'prediction_head.', 'gaussian_blur.')) else _joined(key)


def pretraining_name(key: str) -> str | None:
    """What `AutoregressiveViT` calls a tensor of the layout; None for the blur's kernel, which is computed here."""
    if key.startswith('gaussian_blur.'):
        return None
    if key.startswith('query_blocks.'):
        return 'decoder.' + _joined(key).removeprefix('query_')
    if key.startswith('prediction_head.'):
        return key.removeprefix('prediction_')
    return 'encoder.' + _joined(key)


def convert_saim_encoder(state_dict: dict[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
    """The encoder's weights of a published SAIM checkpoint, pretrained or fine-tuned; any other layout is returned as
    it is. What belongs to pretraining alone is left out and logged by name."""
    if not is_saim_layout(state_dict):
        return state_dict
    converted = rename(state_dict, encoder_name)
    _log_dropped(state_dict, encoder_name)
    own = model.state_dict()
    if 'head.weight' in own and 'head.weight' not in converted:
        _logger.warning('SAIM checkpoint: it has no classifier; head.weight and head.bias stay untrained.')
        converted.update({k: own[k] for k in ('head.weight', 'head.bias')})
    return converted


def convert_saim_pretraining(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A published SAIM pretraining checkpoint, encoder, query blocks and prediction head, in the names of
    `AutoregressiveViT`; any other layout is returned as it is. The blur's kernel, which is computed here, is left out
    and logged by name."""
    if not is_saim_layout(state_dict):
        return state_dict
    _log_dropped(state_dict, pretraining_name)
    return rename(state_dict, pretraining_name)


def rename(
        state_dict: dict[str, torch.Tensor], name: Callable[[str], str | None],
        source: str = 'The SAIM checkpoint') -> dict[str, torch.Tensor]:
    """The tensors of the layout under their new names, q, k and v of a layer as one; those whose name is None are left
    out.

    Raises:
        CheckpointError: where one of q, k and v is missing.
    """
    renamed = {}
    for key, value in state_dict.items():
        match, new = _PROJECTION.fullmatch(key), name(key)
        if new is None:
            continue
        if match is None:
            renamed[new] = value
            continue
        parts = [f'{match[1]}{letter}.{match[3]}' for letter in 'qkv']
        missing = [part for part in parts if part not in state_dict]
        if missing:
            raise CheckpointError(f'{source} is incomplete: it has {key} but lacks {", ".join(missing)}.')
        if match[2] == 'q':
            renamed[new] = torch.cat([state_dict[part] for part in parts])
    return renamed


def _log_dropped(state_dict: dict[str, torch.Tensor], name: Callable[[str], str | None]) -> None:
    dropped = sorted(key for key in state_dict if name(key) is None)
    if dropped:
        _logger.warning('SAIM checkpoint: %d tensors have no place in this model and are left out: %s', len(dropped),
                        ', '.join(dropped))


def _joined(key: str) -> str:
    return _PROJECTION.sub(r'\1qkv.\3', key)
