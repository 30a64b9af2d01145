"""How each kernel is launched: a static table, so that results never depend on what a machine was doing.

`launches.json` is the table; `benchmarks/tune_attention.py` writes the rows of a GPU that it has timed, and
`benchmarks/kernel_resources.py` compiles every row ahead of time.
"""

import functools
import json
from pathlib import Path
from typing import NamedTuple

import torch

TABLE = Path(__file__).with_name('launches.json')
# Pinned because Triton 3.10 changes the default.
FP_FUSION = True


class Launch(NamedTuple):
    """Rows that a program owns, rows that it takes a step of its loop, warps, and stages of software pipelining."""
    block: int
    step: int
    num_warps: int
    num_stages: int


# A row sum of two tensors: bound by memory whatever the launch.
DELTA = Launch(block=32, step=32, num_warps=4, num_stages=1)


@functools.cache
def table() -> list[dict]:
    return json.loads(TABLE.read_text())['launches']


@functools.cache
def find_launch(kernel: str, tokens: int, head_dim: int, dtype: torch.dtype, capability: int) -> Launch | None:
    """The launch of `kernel` for `tokens` queries or keys, whichever are more, or None where no row holds as many.

    Args:
        kernel: 'forward', 'backward' or 'fused_backward'.
        capability: CUDA compute capability, major * 10 + minor.
    """
    bits = torch.finfo(dtype).bits
    rows = [row for row in table()
            if (row['kernel'], row['head_dim'], row['bits'], row['arch']) ==
            (kernel, head_dim, bits, tuned_arch(capability)) and (row['tokens'] is None or tokens <= row['tokens'])]
    if not rows:
        return None
    row = min(rows, key=lambda row: row['tokens'] or float('inf'))
    return Launch(*(row[field] for field in Launch._fields))


def capability(device: torch.device) -> int:
    """Compute capability as major * 10 + minor; Hopper's under the interpreter, to run the launches that it ships."""
    if device.type != 'cuda':
        return 90
    # torch.compile traces through a cache, and would warn of it.
    read = torch.cuda.get_device_capability if torch.compiler.is_compiling() else _remembered_capability
    major, minor = read(device)
    return major * 10 + minor


@functools.cache
def _remembered_capability(device: torch.device) -> tuple[int, int]:
    # Reading a device's properties costs microseconds, and every call asks for them.
    return torch.cuda.get_device_capability(device)


def tuned_arch(capability: int) -> int:
    """The architecture whose rows serve a GPU: GeForce Blackwell (12.x) has Ampere's products and shared memory."""
    if capability >= 120:
        return 80
    return max(arch for arch in (80, 90, 100) if arch <= capability)
