"""SAIM's published checkpoint layout, `{'model': state_dict}` with separate q, k and v, in this package's names.

The layout has one final norm, `norm`, applied to the query stream in pretraining and to the encoder's output in
fine-tuning; here that is the encoder's norm in both.
"""

import logging
import re

import torch
from torch import nn

from ..errors import CheckpointError

_logger = logging.getLogger(__name__)


_PROJECTION = re.compile(r'(.*\.attn\.)([qkv])\.(weight|bias)')


def is_saim_layout(state_dict: dict[str, torch.Tensor]) -> bool:
    """Whether a state dict has SAIM's separate projections."""
    return any(_PROJECTION.fullmatch(key) for key in state_dict)


def convert_saim_encoder(state_dict: dict[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
    """The encoder's weights of a published SAIM checkpoint, pretrained or fine-tuned; any other layout is returned as
    it is. What belongs to pretraining alone is left out and logged by name."""
    if not is_saim_layout(state_dict):
        return state_dict
    converted = _drop(_join_qkv(state_dict), ('query_blocks.', 'prediction_head.', 'gaussian_blur.'))
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
    kept = _drop(_join_qkv(state_dict), ('gaussian_blur.',))
    return {_pretraining_name(k): v for k, v in kept.items()}


def _pretraining_name(key: str) -> str:
    if key.startswith('query_blocks.'):
        return 'decoder.' + key.removeprefix('query_')
    if key.startswith('prediction_head.'):
        return key.removeprefix('prediction_')
    return 'encoder.' + key


def _join_qkv(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    joined = {}
    for key, value in state_dict.items():
        match = _PROJECTION.fullmatch(key)
        if match is None:
            joined[key] = value
            continue
        parts = [f'{match[1]}{letter}.{match[3]}' for letter in 'qkv']
        missing = [part for part in parts if part not in state_dict]
        if missing:
            raise CheckpointError(f'The SAIM checkpoint is incomplete: it has {key} but lacks {", ".join(missing)}.')
        if match[2] == 'q':
            joined[f'{match[1]}qkv.{match[3]}'] = torch.cat([state_dict[part] for part in parts])
    return joined


def _drop(state_dict: dict[str, torch.Tensor], prefixes: tuple[str, ...]) -> dict[str, torch.Tensor]:
    dropped = sorted(k for k in state_dict if k.startswith(prefixes))
    if dropped:
        _logger.warning('SAIM checkpoint: %d tensors have no place in this model and are left out: %s', len(dropped),
                        ', '.join(dropped))
    return {k: v for k, v in state_dict.items() if k not in dropped}
