"""timm's attention and blocks, run with limits instead of a mask.

Nothing here owns parameters: a pretraining model lends the weights of a stock timm VisionTransformer to these
functions, so that its encoder stays one that timm can run, save and load by itself.
"""

from collections.abc import Callable
from typing import Any

import torch
from timm.layers import Attention
from timm.models.vision_transformer import Block, VisionTransformer
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from .. import ops
from ..errors import ModelError
from .interface import attention_of


def check_encoder(encoder: nn.Module) -> None:
    """Raise ModelError unless `encoder` is a VisionTransformer whose every block these functions can run."""
    if not isinstance(encoder, VisionTransformer):
        raise ModelError(f'The encoder must be a timm VisionTransformer, got {type(encoder).__name__}.')
    other = {type(b).__name__ for b in encoder.blocks if type(b) is not Block}
    if other:
        raise ModelError('The encoder must be a VisionTransformer of plain Blocks: leave block_fn out (got '
                         f'{", ".join(sorted(other))}).')
    attention = encoder.blocks[0].attn
    if type(attention) is not Attention or not isinstance(getattr(attention, 'norm', nn.Identity()), nn.Identity):
        raise ModelError('The encoder must use timm\'s plain Attention without scale_attn_norm, got '
                         f'{type(attention).__name__}.')
    if getattr(attention, 'gate', None) is not None:
        raise ModelError('Gated attention is not supported in pretraining.')
    if attention.attn_drop.p or not isinstance(encoder.patch_drop, nn.Identity):
        raise ModelError(
            'Pretraining drops neither attention weights nor patches: leave attn_drop_rate and patch_drop_rate at 0. '
            'drop_path_rate and proj_drop_rate are available.')
    if isinstance(encoder.norm, nn.Identity) or encoder.num_classes:
        raise ModelError('Pretraining ends in the encoder\'s norm and has no classifier: create the encoder with '
                         f'num_classes=0 (got {encoder.num_classes}) and, where it pools by average, fc_norm=False.')
    unsuited = [option for option, there in (
        ('pos_embed', encoder.pos_embed is None), ('no_embed_class', encoder.no_embed_class),
        ('dynamic_img_size', encoder.dynamic_img_size)) if there]
    if unsuited:
        raise ModelError('Pretraining needs a position embedding for every token of images of one size: leave '
                         f'{" and ".join(unsuited)} at the default. The encoder takes any of them once it is trained.')


def self_attention(attention: Attention, x: torch.Tensor, limits: torch.Tensor) -> torch.Tensor:
    """`attention` on x [B, N, C], each token seeing its first `limits` [B, N] tokens."""
    qkv = attention.qkv(x).unflatten(-1, (3, attention.num_heads, -1))  # [B, N, 3, H, D]
    if isinstance(attention.q_norm, nn.Identity):
        x = ops.segment_attention_qkvpacked(qkv, limits)
    else:
        q, k, v = qkv.unbind(2)
        x = ops.segment_attention(attention.q_norm(q), attention.k_norm(k), v, limits)
    return attention.proj_drop(attention.proj(x.flatten(2)))


def cross_attention(attention: Attention, x: torch.Tensor, memory: torch.Tensor, limits: torch.Tensor) -> torch.Tensor:
    """The weights of a self-attention put to reading x [B, Nq, C] from memory [B, Nk, C] under limits [B, Nq]."""
    heads, width = attention.num_heads, x.shape[-1]
    q, kv = project_apart(attention.qkv, x, memory, width)
    q, kv = q.unflatten(-1, (heads, -1)), kv.unflatten(-1, (2, heads, -1))  # [B, Nq, H, D], [B, Nk, 2, H, D]
    if isinstance(attention.q_norm, nn.Identity):
        x = ops.segment_attention_kvpacked(q, kv, limits)
    else:
        k, v = kv.unbind(2)
        x = ops.segment_attention(attention.q_norm(q), attention.k_norm(k), v, limits)
    return attention.proj_drop(attention.proj(x.flatten(2)))


def project_apart(
        projection: nn.Module, x: torch.Tensor, memory: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The first `width` features of `projection` for x, and the others for memory.

    Of a plain layer each product is done alone. One that is wrapped, hooked or parametrized (adapters, quantization,
    pruning) is called as it is, at twice the cost, since its weight alone does not say what it does.
    """
    if type(projection) is not nn.Linear or not is_untouched(projection):
        return projection(x)[..., :width], projection(memory)[..., width:]
    weight, bias = projection.weight, projection.bias
    q_bias, kv_bias = (None, None) if bias is None else (bias[:width], bias[width:])
    return F.linear(x, weight[:width], q_bias), F.linear(memory, weight[width:], kv_bias)


def is_untouched(module: nn.Module) -> bool:
    """Whether calling a module is what its class says: no hooks, no forward of its own."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return 'forward' not in module.__dict__ and not any(hooks)


def add_to(stream: torch.Tensor, branch: torch.Tensor) -> torch.Tensor:
    """Their sum in the dtype of the residual stream; a layer scale leaves float32 behind, whatever autocast says."""
    return stream + branch.to(stream.dtype)


def content_block(block: Block, x: torch.Tensor, limits: torch.Tensor) -> torch.Tensor:
    """A timm block on x [B, N, C] with self-attention under limits [B, N]."""
    x = add_to(x, block.drop_path1(block.ls1(self_attention(attention_of(block), block.norm1(x), limits))))
    return add_to(x, block.drop_path2(block.ls2(block.mlp(block.norm2(x)))))


def query_block(block: Block, x: torch.Tensor, memory: torch.Tensor, limits: torch.Tensor) -> torch.Tensor:
    """A timm block on queries x [B, Nq, C] that attend to memory [B, Nk, C] under limits [B, Nq] (SAIM Eq. 5).

    One norm serves queries and memory, as in SAIM's published code."""
    attended = cross_attention(attention_of(block), block.norm1(x), block.norm1(memory), limits)
    x = add_to(x, block.drop_path1(block.ls1(attended)))
    return add_to(x, block.drop_path2(block.ls2(block.mlp(block.norm2(x)))))


def run_block(owner: nn.Module, block: Callable[..., torch.Tensor], *args: Any) -> torch.Tensor:
    """`block(*args)`, recomputed in the backward pass where `owner.grad_checkpointing` asks for it."""
    if owner.grad_checkpointing and torch.is_grad_enabled():
        return checkpoint(block, *args, use_reentrant=False)
    return block(*args)
