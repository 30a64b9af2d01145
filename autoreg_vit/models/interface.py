"""What timm's models have beyond `nn.Module`, under the types that timm does not declare."""

from typing import Any, Protocol, cast

import timm
import torch
from timm.layers import Attention, Mlp
from timm.models.vision_transformer import Block, VisionTransformer
from torch import nn


class TimmModel(Protocol):
    """A model of `timm.create_model`."""
    pretrained_cfg: dict[str, Any]  # timm's configuration of its weights
    num_classes: int  # 0 without a classifier
    num_features: int
    head_hidden_size: int  # width of what its classifier reads

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Features of images before they are pooled."""

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Logits from what `forward_features` gives, or pooled features."""

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute blocks in the backward pass."""

    def reset_classifier(self, num_classes: int) -> None:
        """Give it another classifier."""

    def get_classifier(self) -> nn.Module:
        """Its classifier."""


def as_timm(model: nn.Module) -> TimmModel:
    """A model of timm's, which every encoder and pretraining model here is, as one."""
    return cast(TimmModel, model)


def create_encoder(name: str, **options: Any) -> VisionTransformer:
    """`timm.create_model` of an encoder, which is a VisionTransformer or refused where it is used."""
    return cast(VisionTransformer, timm.create_model(name, **options))


def encoder_of(model: nn.Module) -> VisionTransformer:
    """The encoder of a pretraining model, or the model itself, which is an encoder then."""
    return cast(VisionTransformer, getattr(model, 'encoder', model))


def positions_of(encoder: VisionTransformer) -> nn.Parameter:
    """The position embedding of an encoder that has one."""
    return cast(nn.Parameter, encoder.pos_embed)


def blocks_of(encoder: VisionTransformer) -> list[Block]:
    """The blocks of an encoder, in their order."""
    return cast('list[Block]', list(encoder.blocks))


def attention_of(block: Block) -> Attention:
    """The attention of a block."""
    return cast(Attention, block.attn)


def mlp_width(encoder: VisionTransformer) -> int:
    """Hidden features of the MLP of an encoder's blocks."""
    return cast(nn.Linear, cast(Mlp, blocks_of(encoder)[0].mlp).fc1).out_features
