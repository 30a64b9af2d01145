"""Segment attention in Triton: no mask in memory, layouts read in place, gradients in the layout of their projection.

Two doors lead to the kernels, for [q, k, v], [q, kv] and [qkv] alike, so that a packed projection has one gradient:

- An eager call takes a plain `torch.autograd.Function`: a custom operator costs the host several times as much
  (`benchmarks/host_cost.py`).
- What traces or watches operators (torch.compile, torch.export, fake tensors, dispatch modes, subclasses of tensors)
  is shown one opaque custom operator. Not `torch.library.triton_op`: of the options of a traced kernel's launch, torch
  2.11 passes on warps and stages alone, and `enable_fp_fusion` and `maxnreg` are lost without a word.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
import triton
from torch.autograd import forward_ad
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from ...errors import ModelError
from ..packing import shapes, split
from . import backward as _backward
from . import forward as _forward
from .addressing import LARGEST_OFFSET, addressable
from .launches import capability

HEAD_DIMS = (32, 64)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LOG2_E = math.log2(math.e)
_PLAIN = frozenset({torch.Tensor, torch.nn.Parameter})
INTERPRETED = not isinstance(_forward.one_loop_kernel, triton.JITFunction)


def reason_unsupported(q: Sequence[int], k: Sequence[int], dtype: torch.dtype, device: torch.device) -> str | None:
    """Why the kernel cannot take queries and keys of the shapes `q` and `k`, [B, N, H, D], here and now, or None where
    it can."""
    if q[-1] not in HEAD_DIMS:
        return f'head dimensions {HEAD_DIMS}, got {q[-1]}'
    if dtype not in DTYPES:
        return f'float32, float16 and bfloat16, got {dtype}'
    if INTERPRETED and dtype == torch.bfloat16:
        return "float32 and float16 in Triton's interpreter, which multiplies bfloat16 wrongly, got torch.bfloat16"
    if device.type == 'cuda':
        if capability(device) < 80:
            return f'GPUs of compute capability 8.0 and up, got {capability(device) / 10}'
    elif not INTERPRETED:
        return f'CUDA tensors, or any under TRITON_INTERPRET=1 set before it is first used, got {device.type}'
    if q[1] * q[2] * q[3] > LARGEST_OFFSET or k[1] * k[2] * k[3] > LARGEST_OFFSET:
        return f'images of at most {LARGEST_OFFSET:,} elements of q and of k, got q {tuple(q)}, k {tuple(k)}'
    return _transformation()


def segment_attention(projections: list[torch.Tensor], limits: torch.Tensor, scale: float) -> torch.Tensor:
    """See `autoreg_vit.ops.segment_attention`; projections are [qkv], [q, kv] or [q, k, v], taken as already checked,
    and such as `reason_unsupported` has nothing against."""
    if observed(limits, *projections):
        return _run_forward_operator(projections, limits, scale)[0]
    return _SegmentAttention.apply(limits, scale, *projections)


def _run_forward(
        projections: list[torch.Tensor], limits: torch.Tensor, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    q, k, v = addressable(projections, split(projections))
    with torch.cuda.device_of(q):
        return _forward.forward(q, k, v, limits.contiguous(), scale * LOG2_E)


def _run_backward(
        grad: torch.Tensor, projections: list[torch.Tensor], limits: torch.Tensor, out: torch.Tensor, lse: torch.Tensor,
        scale: float) -> list[torch.Tensor]:
    q, k, v = addressable(projections, split(projections))
    gradients = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in projections]
    parts = split(gradients)
    filled = addressable(gradients, parts)
    dq, dk, dv = filled
    with torch.cuda.device_of(q):
        _backward.gradients(q, k, v, limits.contiguous(), out, grad.contiguous(), lse, dq, dk, dv, scale)
    if filled is not parts:
        for part, x in zip(parts, filled):
            part.copy_(x)
    return gradients


class _SegmentAttention(torch.autograd.Function):
    """The light door. Without `setup_context`, which makes a call look up its own signature."""

    @staticmethod
    def forward(ctx: Any, limits: torch.Tensor, scale: float, *projections: torch.Tensor) -> torch.Tensor:
        out, lse = _run_forward(list(projections), limits, scale)
        ctx.save_for_backward(limits, out, lse, *projections)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        # Under create_graph the operator stands in the graph, to say that it has no second derivative.
        run = _run_backward_operator if torch.is_grad_enabled() or observed(grad) else _run_backward
        return None, None, *_gradients(ctx, grad, run)


def _gradients(ctx: Any, grad: torch.Tensor, run: Callable[..., list[torch.Tensor]]) -> list[torch.Tensor]:
    """Gradients of the saved projections by `run`, one of the two backward functions here."""
    reason = _transformation()
    if reason is not None:
        raise ModelError(f"The backward pass of impl='triton' takes {reason}. That of impl='eager' does.")
    limits, out, lse, *projections = ctx.saved_tensors
    return run(grad, projections, limits, out, lse, ctx.scale)


_run_forward_operator = torch.library.custom_op('autoreg_vit::segment_attention', _run_forward, mutates_args=())
_run_backward_operator = torch.library.custom_op(
    'autoreg_vit::segment_attention_backward', _run_backward, mutates_args=())


@_run_forward_operator.register_fake
def _(projections: list[torch.Tensor], limits: torch.Tensor, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    (batch, queries, heads, head_dim), _, _ = shapes(projections)
    x = projections[0]
    return x.new_empty((batch, queries, heads, head_dim)), x.new_empty((batch, heads, queries), dtype=torch.float32)


@_run_backward_operator.register_fake
def _(grad: torch.Tensor, projections: list[torch.Tensor], *rest: Any) -> list[torch.Tensor]:
    return [x.new_empty(x.shape) for x in projections]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    projections, limits, ctx.scale = inputs
    ctx.save_for_backward(limits, *output, *projections)
    ctx.set_materialize_grads(False)


def _backward_of_operator(
        ctx: Any, grad: torch.Tensor | None, _: torch.Tensor | None) -> tuple[list[torch.Tensor] | None, None, None]:
    if grad is None:
        return None, None, None
    return _gradients(ctx, grad, _run_backward_operator), None, None


def _refuse_second_derivative(ctx: Any, *grads: torch.Tensor | None) -> NoReturn:
    raise ModelError("impl='triton' has no second derivative. impl='eager' has one.")


_run_forward_operator.register_autograd(_backward_of_operator, setup_context=_save)
_run_backward_operator.register_autograd(_refuse_second_derivative)


def observed(*tensors: torch.Tensor) -> bool:
    """Whether anything but autograd wants to see which operators run on these tensors."""
    return (torch.compiler.is_compiling() or is_in_torch_dispatch_mode() or torch._C._is_tracing() or
            not _PLAIN.issuperset(map(type, tensors)) or (INTERPRETED and tensors[0].is_meta))


def _transformation() -> str | None:
    """What is being done to the program that the kernels would leave out in silence, or None."""
    if torch._C._are_functorch_transforms_active():
        return 'no part in transforms of torch.func (grad, vmap, jvp, ...)'
    if forward_ad._current_level >= 0:
        return 'no part in forward-mode differentiation'
    return None
