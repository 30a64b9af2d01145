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


def is_saim_layout(state_dict: dict[str, torch.Tensor]) -> bool:
    return 'blocks.0.attn.q.weight' in state_dict


def convert_saim_encoder(state_dict: dict[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
    """The encoder's weights of a published SAIM checkpoint, pretrained or fine-tuned; any other layout is returned as
    it is. Keys that are left out or that the checkpoint lacks are logged by name."""
    if not is_saim_layout(state_dict):
        return state_dict
    converted = _join_qkv(state_dict)
    wanted = model.state_dict()
    if 'head.weight' in wanted and 'head.weight' not in converted:
        # A pretraining checkpoint has no classifier: keep the model's own.
        converted.update({k: wanted[k] for k in ('head.weight', 'head.bias')})
    kept = {k: v for k, v in converted.items() if k in wanted}
    _report(converted, kept, wanted)
    return kept


def convert_saim_pretraining(state_dict: dict[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
    """A published SAIM pretraining checkpoint, encoder, query blocks and prediction head, in the names of
    `AutoregressiveViT`; any other layout is returned as it is."""
    if not is_saim_layout(state_dict):
        return state_dict
    converted = {_pretraining_name(k): v for k, v in _join_qkv(state_dict).items()}
    wanted = model.state_dict()
    kept = {k: v for k, v in converted.items() if k in wanted}
    _report(converted, kept, wanted)
    return kept


def _pretraining_name(key: str) -> str:
    if key.startswith('query_blocks.'):
        return 'decoder.' + key.removeprefix('query_')
    if key.startswith('prediction_head.'):
        return key.removeprefix('prediction_')
    return 'encoder.' + key


def _join_qkv(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    joined = {}
    for key, value in state_dict.items():
        match = re.fullmatch(r'(.*\.attn\.)([qkv])\.(weight|bias)', key)
        if match is None:
            joined[key] = value
        elif match[2] == 'q':
            parts = [f'{match[1]}{letter}.{match[3]}' for letter in 'qkv']
            missing = [p for p in parts if p not in state_dict]
            if missing:
                raise CheckpointError(
                    f'The SAIM checkpoint is incomplete: it has {key} but lacks {", ".join(missing)}.')
            joined[f'{match[1]}qkv.{match[3]}'] = torch.cat([state_dict[p] for p in parts])
    return joined


def _report(converted: dict, kept: dict, wanted: dict) -> None:
    dropped = sorted(k for k in converted if k not in kept)
    missing = sorted(k for k in wanted if k not in kept)
    _logger.warning('SAIM checkpoint: %d tensors loaded.', len(kept))
    if dropped:
        _logger.warning('SAIM checkpoint: %d tensors have no place in this model and were dropped: %s', len(dropped),
                        ', '.join(dropped))
    if missing:
        _logger.warning('SAIM checkpoint: %d tensors of this model are not in the checkpoint: %s', len(missing),
                        ', '.join(missing))
