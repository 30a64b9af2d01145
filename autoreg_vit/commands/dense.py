"""What `segment` and `detect` share: the check for optional packages, and the encoder."""

import importlib.util
from typing import Any, cast

from timm.models.vision_transformer import VisionTransformer

from ..errors import ConfigError
from ..hub.lookup import load_encoder, source_config
from ..models.interface import as_timm
from ..settings.dense import Dense


def require(command: str, *packages: str) -> None:
    """Raise ConfigError where packages that a command imports are not installed."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f'autoreg-vit {command} needs {" and ".join(missing)}: pip install "autoreg-vit[dense]".')


def dense_encoder(config: Dense, **options: Any) -> tuple[VisionTransformer, dict[str, Any]]:
    """The encoder of a run as the neck takes it, and what makes it again: timm's `architecture` and its `model_args`,
    `options` among them, of which those that are None are left out. Raises as `load_encoder`."""
    options = {'num_classes': 0, 'dynamic_img_size': True, **{k: v for k, v in options.items() if v is not None}}
    encoder = load_encoder(config.weights, config.pretrained, **options, drop_path_rate=config.drop_path_rate)
    if config.grad_checkpointing:
        as_timm(encoder).set_grad_checkpointing()
    source = {'architecture': as_timm(encoder).pretrained_cfg['architecture'],
              'model_args': {**source_config(config.weights).get('model_args', {}), **options}}
    return cast(VisionTransformer, encoder), source  # the neck refuses any other
