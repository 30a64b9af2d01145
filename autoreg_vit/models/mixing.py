"""The learned mix of memories, Z^l = sum over k of W[l, k] H^k (RandSAC 4.2), without a stack of all layers.

Compiled, it is sums of products that torch.compile fuses: each H^k is read once and each Z^l written once, and in the
backward pass each dZ^l and H^k is read once and each dH^k written once. In eager mode, where every term would be a pass
over memory, it is products of a few rows at a time, which stay in a CPU's cache. Sums and products are in float32, or
float64 where that is what goes in, whatever autocast says.
"""

import functools
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.autograd.function import once_differentiable

#: Values of each layer in an eager product: what a CPU's cache holds of a dozen layers; elsewhere launches count.
_ON_CPU, _ELSEWHERE = 2 ** 14, 2 ** 22


def mix_layers(weights: torch.Tensor, layers: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Weighted sums of layers; they can be differentiated once.

    Args:
        weights: W, [mixes, layers].
        layers: H^k, of one shape and dtype.

    Returns:
        Z^l for each row of `weights`, of the layers' shape; in autocast's dtype where that is enabled.
    """
    dtype = torch.promote_types(weights.dtype, layers[0].dtype)
    if dtype != torch.float64:
        dtype = autocast_dtype(layers[0].device) or dtype
    if torch.compiler.is_compiling():
        return _fusible(weights, layers, dtype)
    return list(_Mix.apply(weights, dtype, *layers))


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype of autocast on a device, or None where it is not enabled."""
    # The meta device knows no autocast, and asking for it raises.
    if device.type == 'meta' or not torch.is_autocast_enabled(device.type):
        return None
    return torch.get_autocast_dtype(device.type)


def _fusible(weights: torch.Tensor, layers: Sequence[torch.Tensor], dtype: torch.dtype) -> list[torch.Tensor]:
    """The mixes as one sum of products after another: the plain definition."""
    wide, rows = _wide(dtype), layers[0].shape[:-1]
    wider = [x.to(wide) for x in layers]
    mixes = []
    for row in weights.to(wide).unbind():
        # One weight a token, so that a weight's gradient is first summed over a token's features, as the norm's
        # gradient beside it is, and then over tokens.
        terms = [weight.expand(*rows, 1) * layer for weight, layer in zip(row.unbind(), wider)]
        mixes.append(functools.reduce(torch.add, terms).to(dtype))
    return mixes


class _Mix(torch.autograd.Function):
    """The mixes by products of W and a part of all layers at a time."""

    @staticmethod
    def forward(ctx: Any, weights: torch.Tensor, dtype: torch.dtype, *layers: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.save_for_backward(weights, *layers)
        mixes = [torch.empty_like(layers[0], dtype=dtype, memory_format=torch.contiguous_format) for _ in weights]
        weights = weights.to(_wide(dtype))
        with _exact(weights):
            for into, part in zip(_parts(mixes), _parts(layers)):
                _write(into, weights @ torch.stack(part).to(weights.dtype))
        return tuple(mixes)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        weights, *layers = ctx.saved_tensors
        wide = _wide(gradients[0].dtype)
        turned, of_weights = weights.to(wide).t().contiguous(), torch.zeros_like(weights, dtype=wide)
        # Made from a number of each gradient, so that where vmap runs over gradients it runs over these.
        numbers = torch.stack([x.reshape(-1)[0] for x in gradients])
        of_layers = [numbers.new_empty(x.shape, dtype=x.dtype) for x in layers]
        with _exact(weights):
            for into, part, gradient in zip(_parts(of_layers), _parts(layers), _parts(gradients)):
                above = torch.stack(gradient).to(wide)
                if any(ctx.needs_input_grad[2:]):
                    _write(into, turned @ above)
                if ctx.needs_input_grad[0]:
                    of_weights = of_weights + above @ torch.stack(part).to(wide).t()
        return of_weights.to(weights.dtype), None, *of_layers


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _parts(tensors: Sequence[torch.Tensor]) -> Iterator[tuple[torch.Tensor, ...]]:
    """Tensors of one shape cut alike: for each part, its values of all of them in one dimension."""
    size = _ON_CPU if tensors[0].device.type == 'cpu' else _ELSEWHERE
    return zip(*(x.reshape(-1).split(size) for x in tensors))


def _write(into: Sequence[torch.Tensor], rows: torch.Tensor) -> None:
    for target, row in zip(into, rows.unbind()):
        target.copy_(row)


def _exact(tensor: torch.Tensor) -> AbstractContextManager:
    """A context without autocast, which would round products."""
    kind = tensor.device.type
    return torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()
