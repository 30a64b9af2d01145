"""The machine a run is on: device, precision and memory."""

import ctypes
import platform
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

from ..errors import ConfigError, suggest

#: Kinds of devices that train, and how many of each there are.
DEVICES: dict[str, Callable[[], int]] = {
    'cpu': lambda: 1,
    'cuda': lambda: torch.cuda.device_count() if torch.cuda.is_available() else 0,
    'mps': lambda: int(torch.backends.mps.is_available()),
    'xpu': lambda: torch.xpu.device_count() if torch.xpu.is_available() else 0,
}


def resolve_device(name: str) -> torch.device:
    """The device of a run; raises ConfigError for a name that PyTorch does not know or a device that is not there."""
    if name == 'auto':
        return torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f'Unknown device {name!r}: use auto, cpu, cuda or cuda:1. '
                          f'{suggest(name, ["auto", *DEVICES])}') from error
    if device.type not in DEVICES:
        raise ConfigError(f'Device {name!r} cannot train here: use auto, cpu or cuda.')
    if (device.index or 0) >= (count := DEVICES[device.type]()):
        raise ConfigError(f'Device {name!r} is not there: PyTorch sees {count} of the kind {device.type}. '
                          'Use --device cpu.')
    return device


def resolve_precision(name: str, device: torch.device) -> str:
    """'bfloat16' where the device multiplies it faster than float32, unless `name` says otherwise."""
    if name != 'auto':
        return name
    native = False
    if device.type == 'cuda':
        native = torch.cuda.get_device_capability(device)[0] >= 8
    elif device.type == 'cpu':
        # Without these instructions oneDNN emulates bfloat16, up to a hundred times slower.
        checks = ('_is_amx_tile_supported', '_is_avx512_bf16_supported')
        native = any(getattr(torch.cpu, check, bool)() for check in checks)
    return 'bfloat16' if native else 'float32'


def autocast(precision: str, device: torch.device) -> AbstractContextManager:
    """The context of a forward pass."""
    return torch.autocast(device.type, dtype=torch.bfloat16) if precision == 'bfloat16' else nullcontext()


def keep_freed_memory() -> None:
    """Let glibc keep freed blocks for the next tensor of their size instead of returning them to the kernel.

    A training step on a CPU allocates the same large tensors again and again; clearing their pages anew each time cost
    a RandSAC step of ViT-Tiny a fifth of its speed (benchmarks/train_step.py).
    """
    if platform.libc_ver()[0] != 'glibc':
        return
    trim_threshold, top_pad, mmap_threshold = -1, -2, -3  # names of mallopt(3)
    libc = ctypes.CDLL(None)
    libc.mallopt(mmap_threshold, 32 << 20)  # the largest value glibc accepts
    libc.mallopt(trim_threshold, 2 ** 31 - 1)
    libc.mallopt(top_pad, 64 << 20)


def to_device(batch: Any, device: torch.device) -> Any:
    """A batch of any structure, lists, tuples and dictionaries of tensors, with its tensors on the device."""
    return tree_map_only(torch.Tensor, lambda tensor: tensor.to(device, non_blocking=True), batch)
