"""The machine a run is on: device, precision, memory, and the folder it writes to."""

import ctypes
import platform
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch

from ..errors import ConfigError


def resolve_device(name: str) -> torch.device:
    """The device of a run.

    Raises:
        ConfigError: for a name that PyTorch does not know or a device that is not there.
    """
    if name == 'auto':
        return torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f'Unknown device {name!r}: use auto, cpu, cuda or cuda:1.') from error
    if device.type == 'cuda':
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise ConfigError(f'Device {name!r} is not there: PyTorch sees {count} CUDA devices. Use --device cpu.')
    elif device.type not in ('cpu', 'mps', 'xpu'):
        raise ConfigError(f'Device {name!r} cannot train here: use auto, cpu or cuda.')
    return device


def resolve_precision(name: str, device: torch.device) -> str:
    """'bfloat16' where the device multiplies it faster than float32, unless `name` says otherwise."""
    if name != 'auto':
        return name
    if device.type == 'cuda':
        return 'bfloat16' if torch.cuda.get_device_capability(device)[0] >= 8 else 'float32'
    if device.type == 'cpu':
        # Without these instructions oneDNN emulates bfloat16, up to a hundred times slower.
        checks = ('_is_amx_tile_supported', '_is_avx512_bf16_supported')
        native = any(getattr(torch.cpu, check, bool)() for check in checks)
        return 'bfloat16' if native else 'float32'
    return 'float32'


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


def new_run_folder(output_dir: str | None, name: str) -> Path:
    """Create the folder of a run: `output_dir`, or the first free runs/NAME-1, -2, ...

    Raises:
        ConfigError: for a path that is a file, cannot be written to, or already holds a run.
    """
    if output_dir is None:
        number = 1
        while Path('runs', f'{name}-{number}').exists():
            number += 1
        folder = Path('runs', f'{name}-{number}')
    else:
        folder = Path(output_dir)
    if (folder / 'log.jsonl').exists():
        raise ConfigError(f'{folder} already holds a run: name another --output-dir or remove it.')
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / '.writable'
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ConfigError(f'Cannot write to the output folder {folder}: {error.strerror}. Name another --output-dir.'
                          ) from error
    return folder
