"""What a launch of a Triton kernel compiles to, ahead of time and without a GPU."""

import re
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime import JITFunction, driver

from autoreg_vit.ops.packing import split
from autoreg_vit.ops.triton import backward, forward
from autoreg_vit.ops.triton.launches import Plan

HEADS = 12
SCALE = 0.125


class KernelCall(NamedTuple):
    """A kernel, its positional arguments, and its constants and options by name."""
    kernel: JITFunction
    arguments: tuple
    options: dict[str, Any]

    @property
    def name(self) -> str:
        return self.kernel.fn.__name__


def record_calls(function: Callable[[], object]) -> list[KernelCall]:
    """The kernels that a function launches, in order; none runs, so that tensors may be on the meta device."""
    calls = []

    def record(kernel, *arguments, grid, warmup, **options):
        calls.append(KernelCall(kernel, arguments, options))

    with mock.patch.object(JITFunction, 'run', record):
        function()
    return calls


def meta_tensors(tokens: int, head_dim: int, dtype: torch.dtype) -> dict[str, Any]:
    """Arguments of a backward pass but the scales: a packed projection and its gradient."""
    qkv, gradient = torch.empty(2, 8, tokens, 3, HEADS, head_dim, dtype=dtype, device='meta')
    out = torch.empty(8, tokens, HEADS, head_dim, dtype=dtype, device='meta')
    tensors = dict(zip('qkv', split([qkv])), limits=torch.empty(8, tokens, dtype=torch.int32, device='meta'), out=out,
                   grad=out, lse=torch.empty(8, HEADS, tokens, device='meta'))
    return tensors | dict(zip(('dq', 'dk', 'dv'), split([gradient])))


def calls_of(direction: str, plan: Plan, tokens: int, head_dim: int, dtype: torch.dtype) -> list[KernelCall]:
    """The launches of a pass under a plan, for as many queries as keys."""
    tensors = meta_tensors(tokens, head_dim, dtype)
    if direction == 'forward':
        return record_calls(lambda: forward.forward(
            *(tensors[name] for name in ('q', 'k', 'v', 'limits')), SCALE, plan))
    return record_calls(lambda: backward.DESIGNS[plan.design].fill(*tensors.values(), SCALE, SCALE, *plan.launches))


class NoDriver:
    """Stands in for CUDA's driver, so that Triton compiles for an architecture just as it would on its GPU."""

    def __init__(self, arch: int):
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget('cuda', self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch  # a kernel keeps its specialisations by device

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_call(call: KernelCall, arch: int) -> CompiledKernel:
    """Compile a launch, or take it from Triton's cache, where a launch on a GPU of this architecture will find it."""
    with mock.patch.object(driver, '_active', NoDriver(arch)):
        return call.kernel.run(*call.arguments, grid=(1,), warmup=True, **call.options)


def resources(compiled: CompiledKernel) -> dict[str, float]:
    """Registers of a thread, shared memory in KiB, bytes that a thread spills, and transposes of accumulators."""
    with tempfile.NamedTemporaryFile(suffix='.cubin') as file:
        Path(file.name).write_bytes(compiled.asm['cubin'])
        usage = subprocess.run(
            [Path(triton.__file__).parent / 'backends' / 'nvidia' / 'bin' / 'cuobjdump', '--dump-resource-usage',
             file.name], capture_output=True, text=True, check=True).stdout
    usage = {key: int(value) for key, value in re.findall(r'(\w+):(\d+)', usage.rpartition('Function')[2])}
    return {'registers': usage['REG'], 'shared_kib': round(compiled.metadata.shared / 1024, 1),
            'spill_bytes': usage['STACK'] + usage['LOCAL'],
            'transposed': len(transposed_accumulators(compiled.asm['ttir']))}


def transposed_accumulators(ttir: str) -> list[str]:
    """Lines of Triton IR that transpose what a product made, however many elementwise steps or loops later."""
    sources: dict[str, set[str]] = {}  # a value: the values that it is made of
    transposes, owners = [], []
    for line in ttir.splitlines():
        text = re.sub(r' loc\((?:[^()]|\([^()]*\))*\)', '', line).strip()
        if text.startswith('}'):
            owner = owners.pop()
            if text.endswith('{'):  # } else {
                owners.append(owner)
            continue
        result, operation = re.match(r'(?:(%\w+)(?::\d+)? = )?(.*)', text).groups()
        used = set(re.findall(r'%\w+', operation))
        if operation.startswith('scf.yield') and owners[-1]:
            sources[owners[-1]] |= used
        if result:
            # Loading ends the trail; a product is marked as its own source.
            sources[result] = set() if operation.startswith('tt.load') else used
            if operation.startswith('tt.dot'):
                sources[result] = {result}
            if operation.startswith('tt.trans'):
                transposes.append((result, text))
        for argument in re.findall(r'(%\w+) = %\w+', operation.partition('iter_args(')[2]):
            sources[argument] = {result}
        if text.endswith('{'):
            owners.append(result)

    def from_product(value: str, seen: set[str]) -> bool:
        seen.add(value)
        return any(v == value or (v not in seen and from_product(v, seen)) for v in sources.get(value, ()))

    return [text for value, text in transposes if from_product(value, set())]
