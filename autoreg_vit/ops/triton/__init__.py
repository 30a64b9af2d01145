"""Segment attention in Triton: no mask in memory, layouts read in place, gradients in the layout of their projection.

One custom operator serves q, k, v alone, [q, kv] and [qkv], so that torch.compile sees a single node, and the gradient
of a packed projection is one tensor.
"""

import math

import torch
import triton

from ...errors import ModelError
from ..packing import split
from . import backward as _backward
from . import forward as _forward
from .launches import capability as _capability

HEAD_DIMS = (32, 64)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def reason_unsupported(q: torch.Tensor) -> str | None:
    """Why the kernel cannot take queries like `q` [B, Nq, H, D], or None where it can."""
    if q.shape[-1] not in HEAD_DIMS:
        return f'head dimensions {HEAD_DIMS}, got {q.shape[-1]}'
    if q.dtype not in DTYPES:
        return f'float32, float16 and bfloat16, got {q.dtype}'
    if q.device.type == 'cuda' and _capability(q.device) < 80:
        return f'GPUs of compute capability 8.0 and up, got {_capability(q.device) / 10}'
    if q.device.type != 'cuda' and not _interpreted():
        return f'CUDA tensors, or any under TRITON_INTERPRET=1 set before it is first used, got {q.device.type}'
    return None


def segment_attention(projections: list[torch.Tensor], limits: torch.Tensor, scale: float) -> torch.Tensor:
    """See `autoreg_vit.ops.segment_attention`; projections are [qkv], [q, kv] or [q, k, v], taken as already checked.

    Raises:
        ModelError: for a head dimension, dtype or device that the kernel cannot take.
    """
    reason = reason_unsupported(split(projections)[0])
    if reason:
        raise ModelError(f"impl='triton' takes {reason}. impl='auto' chooses one that fits.")
    return _attend(projections, limits, scale)[0]


@torch.library.custom_op('autoreg_vit::segment_attention', mutates_args=())
def _attend(
        projections: list[torch.Tensor], limits: torch.Tensor, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    q, k, v = map(_unit_stride, split(projections))
    with torch.cuda.device_of(q):
        return _forward.forward(q, k, v, limits.contiguous(), scale * math.log2(math.e))


@_attend.register_fake
def _(projections, limits, scale):
    q = split(projections)[0]
    batch, queries, heads, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((batch, heads, queries), dtype=torch.float32)


@torch.library.custom_op('autoreg_vit::segment_attention_backward', mutates_args=())
def _gradients(
        grad: torch.Tensor,
        projections: list[torch.Tensor],
        limits: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        scale: float,
) -> list[torch.Tensor]:
    q, k, v = map(_unit_stride, split(projections))
    gradients = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in projections]
    with torch.cuda.device_of(q):
        _backward.gradients(
            q, k, v, limits.contiguous(), out, grad.contiguous(), lse, *split(gradients), scale)
    return gradients


@_gradients.register_fake
def _(grad, projections, limits, out, lse, scale):
    return [x.new_empty(x.shape) for x in projections]


def _save(ctx, inputs, output):
    projections, limits, ctx.scale = inputs
    ctx.save_for_backward(limits, *output, *projections)
    ctx.set_materialize_grads(False)


def _differentiate(ctx, grad, _):
    if grad is None:
        return None, None, None
    limits, out, lse, *projections = ctx.saved_tensors
    return _gradients(grad, projections, limits, out, lse, ctx.scale), None, None


_attend.register_autograd(_differentiate, setup_context=_save)


def _unit_stride(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _interpreted() -> bool:
    return not isinstance(_forward.one_loop_kernel, triton.JITFunction)
