"""Public segment attention: checks arguments once and hands them to an implementation."""

import contextlib
import importlib.util
from collections.abc import Iterator, Sequence

import torch
from torch.autograd import forward_ad

from ..errors import ModelError, ShapeError, suggest
from . import eager, sdpa
from .packing import shapes, split

IMPLEMENTATIONS = ('eager', 'sdpa', 'triton')

# Looked up, not imported: `import autoreg_vit` stays quick and works where there is no Triton.
TRITON_INSTALLED = importlib.util.find_spec('triton') is not None

_forced = 'auto'


def segment_attention(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, limits: torch.Tensor, *, scale: float | None = None,
        impl: str = 'auto') -> torch.Tensor:
    """Attention in which query i of image b sees the first `limits[b, i]` keys: RandSAC's source and memory masks
    (4.1, Fig. 4) and SAIM's content and query masks (Eq. 3) for tokens sorted by rank.

    Args:
        q: Queries [B, Nq, H, D].
        k: Keys [B, Nk, H, D].
        v: Values [B, Nk, H, D].
        limits: int32 [B, Nq], between 0 and Nk, shared by all heads. Need not be monotone.
        scale: Factor on the scores, D ** -0.5 by default.
        impl: 'triton', 'sdpa', 'eager', or 'auto', which `choose_implementation` decides.

    Returns:
        [B, Nq, H, D]. A row with limit 0 is zero and sends no gradient.

    Raises:
        ShapeError: for tensors that do not fit together.
        ModelError: for an unknown implementation, or one that cannot take these tensors.
    """
    return _dispatch([q, k, v], limits, scale, impl)


def segment_attention_qkvpacked(
        qkv: torch.Tensor, limits: torch.Tensor, *, scale: float | None = None, impl: str = 'auto') -> torch.Tensor:
    """Self-attention on one projection's own layout: `qkv` [B, N, 3, H, D] → [B, N, H, D]; see `segment_attention`."""
    _check_packed('qkv', qkv, 3)
    return _dispatch([qkv], limits, scale, impl)


def segment_attention_kvpacked(
        q: torch.Tensor, kv: torch.Tensor, limits: torch.Tensor, *, scale: float | None = None,
        impl: str = 'auto') -> torch.Tensor:
    """Cross-attention with keys and values in one projection's own layout: `q` [B, Nq, H, D], `kv` [B, Nk, 2, H, D] →
    [B, Nq, H, D]; see `segment_attention`."""
    _check_packed('kv', kv, 2)
    return _dispatch([q, kv], limits, scale, impl)


def choose_implementation(q: torch.Tensor, k: torch.Tensor) -> str:
    """What `impl='auto'` takes for queries [B, Nq, H, D] and keys [B, Nk, H, D], in the dtype that attention runs in.

    Triton where its kernel can run. On a CPU in half precision, SDPA's kernel is several times slower than plain matrix
    products at a few hundred keys; in float32 it is level at 64 keys and ahead beyond (`benchmarks/train_step.py` times
    both in the precision that the machine trains in). float64 is for checking, where the oracle is wanted, and it
    alone has forward-mode derivatives.
    """
    return _forced if _forced != 'auto' else _choose(q.shape, k.shape, q.dtype, q.device)


def _choose(q: Sequence[int], k: Sequence[int], dtype: torch.dtype, device: torch.device) -> str:
    """`choose_implementation` for the shapes of queries and keys, where none is forced."""
    if dtype == torch.float64 or forward_ad._current_level >= 0:
        return 'eager'
    kind = device.type
    if kind == 'cuda' and TRITON_INSTALLED:
        from . import triton
        if triton.reason_unsupported(q, k, dtype, device) is None:
            return 'triton'
    if kind == 'cpu' and dtype in (torch.bfloat16, torch.float16) and k[1] <= 256:
        return 'eager'
    return 'sdpa'


def set_implementation(impl: str) -> None:
    """Make `impl` what 'auto' means from here on, in every model of the process; 'auto' restores the choice.

    Raises:
        ModelError: for an unknown implementation.
    """
    global _forced
    _check_implementation(impl)
    _forced = impl


@contextlib.contextmanager
def implementation(impl: str) -> Iterator[None]:
    """Inside, `impl` is what 'auto' means, as by `set_implementation`; 'auto' leaves what is set.

    Raises:
        ModelError: for an unknown implementation.
    """
    before = _forced
    set_implementation(before if impl == 'auto' else impl)
    try:
        yield
    finally:
        set_implementation(before)


def _dispatch(projections: list[torch.Tensor], limits: torch.Tensor, scale: float | None, impl: str) -> torch.Tensor:
    """Check what is to be attended to, once, and hand it to an implementation."""
    # A step may be bound by what a call costs the host: shapes are compared here, and no views made for it.
    device = projections[0].device
    kind = device.type
    # The meta device knows no autocast, and asking for it raises.
    if kind != 'meta' and torch.is_autocast_enabled(kind) and projections[0].dtype != torch.float64:
        # As torch's own attention does; norms of queries and keys leave float32 behind, beside values in half.
        projections = [x.to(torch.get_autocast_dtype(kind)) for x in projections]
    q, k, v = shapes(projections)
    _check(q, k, v, projections, limits)
    dtype = projections[0].dtype
    impl = _forced if impl == 'auto' else impl
    chosen = impl == 'auto'
    if chosen:
        impl = _choose(q, k, dtype, device)
    scale = q[-1] ** -0.5 if scale is None else float(scale)
    if impl == 'triton':
        if not TRITON_INSTALLED:
            raise ModelError("impl='triton' needs the package triton: pip install triton. impl='auto' does without.")
        from . import triton
        reason = None if chosen else triton.reason_unsupported(q, k, dtype, device)
        if reason is not None:
            raise ModelError(f"impl='triton' takes {reason}. impl='auto' chooses one that fits.")
        return triton.segment_attention(projections, limits, scale)
    _check_implementation(impl)
    run = eager.segment_attention if impl == 'eager' else sdpa.segment_attention
    return run(*split(projections), limits, scale)


def _check_implementation(impl: str) -> None:
    if impl != 'auto' and impl not in IMPLEMENTATIONS:
        raise ModelError(f'Unknown implementation {impl!r} of segment_attention. '
                         f'{suggest(str(impl), ["auto", *IMPLEMENTATIONS])}')


def _check_packed(name: str, packed: torch.Tensor, parts: int) -> None:
    if packed.ndim != 5 or packed.shape[2] != parts:
        raise ShapeError(f'{name} must have the shape [B, N, {parts}, H, D], got {tuple(packed.shape)}.')


def _check(
        q: Sequence[int], k: Sequence[int], v: Sequence[int], projections: list[torch.Tensor],
        limits: torch.Tensor) -> None:
    """Raise ShapeError unless shapes of q, k and v, and dtypes and devices, fit together."""
    # Item by item: a slice of a torch.Size costs as much as all the rest.
    if len(q) != 4 or len(k) != 4 or k != v or q[0] != k[0] or q[2] != k[2] or q[3] != k[3]:
        raise ShapeError(
            'segment_attention takes q [B, Nq, H, D] and k, v [B, Nk, H, D] of the same B, H and D; got q '
            f'{tuple(q)}, k {tuple(k)}, v {tuple(v)}.')
    if limits.shape != (q[0], q[1]) or limits.dtype != torch.int32:
        raise ShapeError(
            f'limits must be torch.int32 of shape {(q[0], q[1])}, one a query; got {limits.dtype} '
            f'{tuple(limits.shape)}. Take them from serialization.source_limits or memory_limits.')
    dtype, device = projections[0].dtype, limits.device
    for x in projections:
        if x.dtype != dtype:
            dtypes = ', '.join(str(x.dtype) for x in split(projections))
            raise ShapeError(f'q, k and v must have one dtype, got {dtypes}.')
        if x.device != device:
            devices = ', '.join(str(x.device) for x in (*split(projections), limits))
            raise ShapeError(f'q, k, v and limits must be on one device, got {devices}.')
