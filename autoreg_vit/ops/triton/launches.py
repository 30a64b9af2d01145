"""How attention is computed on each GPU: a static table, so that results never depend on what a machine was doing.

`launches.json` is the table. A row is for one pass, architecture, dtype and head dimension, up to a number of tokens
and below a version of Triton (null: any): it names a design of `forward` or `backward` and how each of its kernels is
launched. Rows of a kind stand by tokens and in order of preference, and the first that fits serves.
`benchmarks/tune_attention.py` writes the rows of a GPU that it has timed, `benchmarks/kernel_resources.py` compiles
every row ahead of time, and `benchmarks/ptx_equality.py` shows which rows were timed as prototypes.
"""

import functools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton

TABLE = Path(__file__).with_name('launches.json')
TRITON = tuple(map(int, triton.__version__.split('.')[:2]))


class Launch(NamedTuple):
    """Rows that a program owns, rows that it takes a step of its loop, warps, stages of software pipelining, and
    registers of a thread at most (None: as the compiler likes)."""
    block: int
    step: int
    num_warps: int
    num_stages: int
    maxnreg: int | None = None

    def options(self) -> dict[str, Any]:
        """What Triton takes beside a kernel's own arguments."""
        # Fusion is pinned because Triton 3.10 changes the default.
        options = {'num_warps': self.num_warps, 'num_stages': self.num_stages, 'enable_fp_fusion': True}
        return options if self.maxnreg is None else {**options, 'maxnreg': self.maxnreg}


class Design(NamedTuple):
    """How a pass is computed. `fill` takes tensors, scales and a launch for each kernel that is tuned, and fills its
    outputs for `spare` queries or keys at most beyond the block of its first launch (infinity: for any number)."""
    fill: Callable[..., None]
    spare: float = math.inf


class Plan(NamedTuple):
    """A design, and a launch for each kernel that it tunes."""
    design: str
    launches: tuple[Launch, ...]


@functools.cache
def table() -> list[dict[str, Any]]:
    """The rows of launches.json."""
    return json.loads(TABLE.read_text())['launches']


def plan_of(row: dict[str, Any]) -> Plan:
    """The plan that a row of the table holds."""
    return Plan(row['design'], tuple(Launch(**launch) for launch in row['launches']))


def kind_of(row: dict[str, Any]) -> tuple[str, int, str, int]:
    """Pass, architecture, dtype and head dimension of a row."""
    return row['pass'], row['arch'], row['dtype'], row['head_dim']


def serves_triton(row: dict[str, Any], version: tuple[int, ...] = TRITON) -> bool:
    """Whether a row serves a version of Triton: one below the first in which its kernels spill registers."""
    bound = row['triton_below']
    return bound is None or version < tuple(map(int, bound.split('.')))


def find_row(
        direction: str, tokens: int, head_dim: int, dtype: torch.dtype, capability: int,
        version: tuple[int, ...] = TRITON) -> dict[str, Any]:
    """The row of the table that serves a pass ('forward' or 'backward') over `tokens` queries or keys, whichever are
    more, on a GPU of a compute capability (major * 10 + minor) and by a version of Triton."""
    kind = direction, tuned_arch(capability), str(dtype).removeprefix('torch.'), head_dim
    return next(row for row in table() if kind_of(row) == kind and serves_triton(row, version)
                and (row['tokens'] is None or tokens <= row['tokens']))


def plan_for(direction: str, q: torch.Tensor, k: torch.Tensor) -> Plan:
    """The plan of a pass over queries [B, Nq, H, D] and keys [B, Nk, H, D]."""
    return _plan_on(direction, max(q.shape[1], k.shape[1]), q.shape[3], q.dtype, q.device)


@functools.cache
def _plan_on(direction: str, tokens: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> Plan:
    return plan_of(find_row(direction, tokens, head_dim, dtype, capability(device)))


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
