"""Public segment attention: checks arguments once and hands them to an implementation, loaded when first used."""

from importlib import import_module

import torch

from ..errors import ModelError, ShapeError, suggest

#: Implementations by name; each is a module of this folder with a `segment_attention(q, k, v, limits, scale)`.
IMPLEMENTATIONS = ('eager', 'sdpa')


def segment_attention(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        limits: torch.Tensor,
        *,
        scale: float | None = None,
        impl: str = 'auto',
) -> torch.Tensor:
    """Attention in which query i of image b sees the first `limits[b, i]` keys: RandSAC's source and memory masks
    (4.1, Fig. 4) and SAIM's content and query masks (Eq. 3) for tokens sorted by rank.

    Args:
        q: Queries [B, Nq, H, D].
        k: Keys [B, Nk, H, D].
        v: Values [B, Nk, H, D].
        limits: int32 [B, Nq], between 0 and Nk, shared by all heads. Need not be monotone.
        scale: Factor on the scores, D ** -0.5 by default.
        impl: 'eager', 'sdpa', or 'auto', which `choose_implementation` decides.

    Returns:
        [B, Nq, H, D]. A row with limit 0 is zero and sends no gradient.

    Raises:
        ShapeError: for tensors that do not fit together.
        ModelError: for an unknown implementation.
    """
    _check(q, k, v, limits)
    if impl == 'auto':
        impl = choose_implementation(q, k)
    elif impl not in IMPLEMENTATIONS:
        raise ModelError(f'Unknown implementation {impl!r} of segment_attention. '
                         f'{suggest(str(impl), ["auto", *IMPLEMENTATIONS])}')
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return import_module(f'.{impl}', __package__).segment_attention(q, k, v, limits, scale)


def segment_attention_qkvpacked(
        qkv: torch.Tensor,
        limits: torch.Tensor,
        *,
        scale: float | None = None,
        impl: str = 'auto',
) -> torch.Tensor:
    """Self-attention on one projection's own layout: `qkv` [B, N, 3, H, D] → [B, N, H, D]; see `segment_attention`."""
    _check_packed('qkv', qkv, 3)
    return segment_attention(*qkv.unbind(2), limits, scale=scale, impl=impl)


def segment_attention_kvpacked(
        q: torch.Tensor,
        kv: torch.Tensor,
        limits: torch.Tensor,
        *,
        scale: float | None = None,
        impl: str = 'auto',
) -> torch.Tensor:
    """Cross-attention with keys and values in one projection's own layout: `q` [B, Nq, H, D], `kv` [B, Nk, 2, H, D] →
    [B, Nq, H, D]; see `segment_attention`."""
    _check_packed('kv', kv, 2)
    return segment_attention(q, *kv.unbind(2), limits, scale=scale, impl=impl)


def choose_implementation(q: torch.Tensor, k: torch.Tensor) -> str:
    """What `impl='auto'` takes for queries [B, Nq, H, D] and keys [B, Nk, H, D].

    On a CPU in half precision, SDPA's kernel is several times slower than plain matrix products at a few hundred keys;
    in float32 it is level at 64 keys and ahead beyond (`benchmarks/train_step.py` times both in the precision that the
    machine trains in). float64 is for checking, where the oracle is wanted.
    """
    if q.dtype == torch.float64:
        return 'eager'
    if q.device.type == 'cpu' and q.dtype in (torch.bfloat16, torch.float16) and k.shape[1] <= 256:
        return 'eager'
    return 'sdpa'


def _check_packed(name: str, packed: torch.Tensor, parts: int) -> None:
    if packed.ndim != 5 or packed.shape[2] != parts:
        raise ShapeError(f'{name} must have the shape [B, N, {parts}, H, D], got {tuple(packed.shape)}.')


def _check(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, limits: torch.Tensor) -> None:
    if q.ndim != 4 or k.ndim != 4 or k.shape != v.shape or q.shape[0] != k.shape[0] or q.shape[2:] != k.shape[2:]:
        raise ShapeError(
            'segment_attention takes q [B, Nq, H, D] and k, v [B, Nk, H, D] of the same B, H and D; got q '
            f'{tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}.')
    if limits.shape != q.shape[:2] or limits.dtype != torch.int32:
        raise ShapeError(
            f'limits must be torch.int32 of shape {tuple(q.shape[:2])}, one a query; got {limits.dtype} '
            f'{tuple(limits.shape)}. Take them from serialization.source_limits or memory_limits.')
    if not q.dtype == k.dtype == v.dtype:
        raise ShapeError(f'q, k and v must have one dtype, got {q.dtype}, {k.dtype} and {v.dtype}.')
    if not q.device == k.device == v.device == limits.device:
        raise ShapeError(
            f'q, k, v and limits must be on one device, got {q.device}, {k.device}, {v.device} and {limits.device}.')
