"""Where the time of a step goes, by kind of kernel, and in words."""

import functools
import importlib
import pkgutil
import re
from collections.abc import Callable, Mapping

import torch
from torch.profiler import ProfilerActivity, profile

#: Kinds by the names of their kernels, in this order: the first that fits counts. Compiled kernels carry the operations
#: that they fuse in their names. On a CPU, names are those of operators.
KINDS = (
    ('attention, backward', r'dot_product\w*backward|fmha\w*_bwd'),
    ('attention, forward', r'dot_product|fmha\w*_fwd'),
    ('convolution', r'conv|nchwToNhwc|nhwcToNchw|fprop|wgrad|dgrad'),
    ('products', r'gemm|gemv|cutlass|nvjet|xmma|cublas|splitK|::(add)?mm$|::bmm$|::linear$'),
    ('AdamW', r'adam|multi_tensor'),
    ('GELU', r'gelu'),
    ('LayerNorm', r'layer_?norm|GammaBeta'),
    ('sums', r'reduce|_sum|::sum$|^triton_(per|red)_'),
    ('sorting and draws', r'sort|radix|distribution|rand|scan'),
    ('casts, copies and pointwise work', r'copy|memcpy|memset|cast|fill|zero|cat|elementwise|triton_poi|::\w+_?$'),
)


def kernels_of(step: Callable[[], object], count: int, device: torch.device) -> dict[str, float]:
    """Milliseconds of a step by name of kernel, of `count` steps; on a CPU by operator."""
    on_gpu = device.type == 'cuda'
    activities = [ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]
    step()
    with profile(activities=activities) as profiler:
        for _ in range(count):
            step()
        if on_gpu:
            torch.cuda.synchronize()
    times = {}
    for event in profiler.key_averages():
        microseconds = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        if microseconds > 0:
            times[event.key[:120]] = times.get(event.key[:120], 0) + microseconds / 1e3 / count
    return {name: round(ms, 4) for name, ms in times.items()}


@functools.cache
def own_kernels() -> dict[str, str]:
    """The kinds of this package's kernels by name: all are attention's, and their modules say of which pass."""
    from autoreg_vit.ops import triton as kernels

    found = {}
    for direction in ('backward', 'forward'):
        module = importlib.import_module(f'{kernels.__name__}.{direction}')
        inner = [importlib.import_module(f'{module.__name__}.{m.name}')
                 for m in pkgutil.iter_modules(getattr(module, '__path__', []))]
        for part in (module, *inner):
            found |= {name: f'attention, {direction}' for name in vars(part) if name.endswith('_kernel')}
    return found


def kind_of(kernel: str) -> str:
    """The kind of a kernel by its name."""
    own = own_kernels().get(kernel)
    return own or next((kind for kind, pattern in KINDS if re.search(pattern, kernel, re.IGNORECASE)), 'other')


def by_kind(kernels: Mapping[str, float]) -> dict[str, float]:
    """Milliseconds by kind, the longest first."""
    totals: dict[str, float] = {}
    for name, ms in kernels.items():
        totals[kind_of(name)] = totals.get(kind_of(name), 0) + ms
    return dict(sorted(totals.items(), key=lambda item: -item[1]))


def words(kernels: Mapping[str, float], step_ms: float, device_type: str = 'cuda') -> str:
    """A sentence: how busy the device is in a step of `step_ms`, and what with."""
    busy = sum(kernels.values())
    if not busy:
        return 'The profiler saw no kernels.'
    where = 'GPU' if device_type == 'cuda' else 'processor'
    parts = ', '.join(f'{kind} {ms / busy:.0%}' for kind, ms in by_kind(kernels).items() if ms / busy >= 0.01)
    idle = step_ms - busy
    waits = f', and waits {idle:.1f} ms ({idle / step_ms:.0%}) for the host' if idle > 0.05 * step_ms else ''
    return f'Of {step_ms:.1f} ms the {where} works {min(busy, step_ms):.1f}{waits}. Of its work: {parts}.'
