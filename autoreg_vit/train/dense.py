"""What dense prediction shares besides `supervised`: its encoder, and the learning rates of its layers."""

from typing import Any

from timm.models.vision_transformer import VisionTransformer
from timm.optim import param_groups_layer_decay
from torch import nn

from .supervised_config import DenseConfig
from .weights import load_encoder, source_config


def dense_encoder(config: DenseConfig) -> tuple[VisionTransformer, dict[str, Any]]:
    """The encoder of a run, as the neck takes it, and what makes it again: timm's `architecture` and its `model_args`.

    Raises:
        UsageError: as `load_encoder`.
    """
    options = {'num_classes': 0, 'dynamic_img_size': True}
    encoder = load_encoder(config.weights, config.pretrained, **options, drop_path_rate=config.drop_path_rate)
    if config.grad_checkpointing:
        encoder.set_grad_checkpointing()
    return encoder, {'architecture': encoder.pretrained_cfg['architecture'],
                     'model_args': {**source_config(config.weights).get('model_args', {}), **options}}


def parameter_groups(model: nn.Module, encoder: VisionTransformer, config: DenseConfig) -> list[dict[str, Any]]:
    """Parameters for the optimizer, each block of the encoder at `layer_decay` of the rate of the block above, and the
    last block at that of the rate of everything else in `model`; no weight decay for vectors and positions.

    Args:
        model: All that is trained.
        encoder: Part of it, after the neck has taken its final norm away.
        config: Gives weight decay and layer decay.
    """
    groups = param_groups_layer_decay(
        encoder, config.weight_decay, encoder.no_weight_decay(), layer_decay=config.layer_decay)
    last = {id(p) for p in encoder.blocks[-1].parameters()}
    scale = config.layer_decay / next(g['lr_scale'] for g in groups if id(g['params'][0]) in last)
    groups = [{**group, 'lr_scale': group['lr_scale'] * scale} for group in groups]
    own = {id(p) for p in encoder.parameters()}
    rest = [p for p in model.parameters() if id(p) not in own and p.requires_grad]
    for weight_decay, chosen in ((0.0, [p for p in rest if p.ndim < 2]),
                                 (config.weight_decay, [p for p in rest if p.ndim > 1])):
        if chosen:
            groups.append({'lr_scale': 1.0, 'weight_decay': weight_decay, 'params': chosen})
    return groups
