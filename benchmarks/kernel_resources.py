"""Registers, shared memory and spills of every shipped launch of the attention kernels, compiled without a GPU.

    python -m benchmarks.kernel_resources [--arch 80 90 100] [--jobs N]

Each row of the launch table is launched on meta tensors, and what its launcher passes is compiled ahead of time. Exits
with 1 on a spill, on more shared memory than the architecture's smallest member has, or on a transpose of an
accumulator, which Hopper's compilers have turned into wrong gradients.
"""

import argparse
import concurrent.futures
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest import mock

import torch
import triton
from tqdm import tqdm
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from autoreg_vit.ops.packing import split
from autoreg_vit.ops.triton import backward, forward
from autoreg_vit.ops.triton.launches import TABLE, Launch

TYPES = {torch.float32: 'fp32', torch.float16: 'fp16', torch.bfloat16: 'bf16', torch.int32: 'i32'}
KERNELS = {'forward_kernel': forward, 'delta_kernel': backward, 'fused_backward_kernel': backward,
           'backward_kernel': backward}
# KiB that one program may use. Ampere's rows also serve compute capabilities 8.6, 8.9 and 12.0, which have 99.
SHARED = {80: 99, 90: 227, 100: 227}


class Recorder:
    """Stands in for a kernel and records its launches."""

    def __init__(self, launches: list):
        self.launches = launches

    def __getitem__(self, grid):
        return lambda *args, **options: self.launches.append((args, options))


def launches_of(row: dict, dtype: torch.dtype) -> list[tuple[str, tuple, dict]]:
    """Kernel, arguments and options of every launch that a row of the table leads to."""
    tokens = row['tokens'] or 1024
    qkv, gradient = torch.empty(2, 8, tokens, 3, 12, row['head_dim'], dtype=dtype, device='meta')
    limits = torch.empty(8, tokens, dtype=torch.int32, device='meta')
    launch = Launch(*(row[field] for field in Launch._fields))
    recorded = {name: [] for name in KERNELS}
    with mock.patch.multiple(forward, forward_kernel=Recorder(recorded['forward_kernel']),
                             find_launch=lambda *args: launch), mock.patch.multiple(
            backward, **{name: Recorder(recorded[name]) for name, module in KERNELS.items() if module is backward}):
        out, lse = forward.forward(*split([qkv]), limits, 0.1)
        if row['kernel'] != 'forward':
            recorded['forward_kernel'].clear()
            function = getattr(backward, row['kernel'])
            function(*split([qkv]), limits, out, out, lse, *split([gradient]), 0.1, 0.2, launch)
    return [(name, *call) for name, calls in recorded.items() for call in calls]


def source_of(name: str, args: tuple, options: dict) -> tuple[ASTSource, dict]:
    """What Triton compiles for a launch: it specialises on integers that are 1 or multiples of 16, as at run time."""
    kernel = getattr(KERNELS[name], name)
    signature, constants, attributes = {}, {}, {}
    unspecialised = set(kernel.do_not_specialize)
    for index, parameter in enumerate(kernel.arg_names):
        if index >= len(args):
            signature[parameter], constants[parameter] = 'constexpr', options.pop(parameter)
            continue
        value = args[index]
        if isinstance(value, torch.Tensor):
            signature[parameter] = f'*{TYPES[value.dtype]}'
            attributes[(index,)] = [['tt.divisibility', 16]]
        elif isinstance(value, float):
            signature[parameter] = 'fp32'
        else:
            signature[parameter] = 'i32'
            if value % 16 == 0 and parameter not in unspecialised:
                attributes[(index,)] = [['tt.divisibility', 16]]
    return ASTSource(kernel, signature, constants, attributes), options


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


def resources(row: dict, dtype: torch.dtype) -> list[dict]:
    """Compile the launches of a row for its architecture and read what they use."""
    results = []
    for name, args, options in launches_of(row, dtype):
        source, options = source_of(name, args, dict(options))
        compiled = triton.compile(source, target=GPUTarget('cuda', row['arch'], 32), options=options)
        with tempfile.NamedTemporaryFile(suffix='.cubin') as file:
            Path(file.name).write_bytes(compiled.asm['cubin'])
            usage = subprocess.run(
                [Path(triton.__file__).parent / 'backends' / 'nvidia' / 'bin' / 'cuobjdump', '--dump-resource-usage',
                 file.name], capture_output=True, text=True, check=True).stdout
        usage = {key: int(value) for key, value in re.findall(r'(\w+):(\d+)', usage.rpartition('Function')[2])}
        results.append({
            **row, 'kernel': name, 'dtype': TYPES[dtype], 'registers': usage['REG'],
            'shared_kib': round(compiled.metadata.shared / 1024, 1), 'spill_bytes': usage['STACK'] + usage['LOCAL'],
            'transposed': len(transposed_accumulators(compiled.asm['ttir']))})
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--arch', type=int, nargs='+', default=[80, 90, 100], choices=[80, 90, 100])
    parser.add_argument('--jobs', type=int, default=os.cpu_count())
    parser.add_argument('--table', type=Path, default=TABLE, help='launch table (the shipped one)')
    args = parser.parse_args()
    jobs = [(row, dtype) for row in json.loads(args.table.read_text())['launches'] if row['arch'] in args.arch
            for dtype in TYPES if dtype.is_floating_point and torch.finfo(dtype).bits == row['bits']]
    context = multiprocessing.get_context('spawn')
    with concurrent.futures.ProcessPoolExecutor(args.jobs, mp_context=context) as pool:
        results = [r for batch in tqdm(pool.map(resources, *zip(*jobs)), total=len(jobs), desc='compiling')
                   for r in batch]
    faults = 0
    columns = ('kernel', 'arch', 'dtype', 'head_dim', 'tokens', 'block', 'step', 'num_warps', 'num_stages', 'registers',
               'shared_kib', 'spill_bytes', 'transposed')
    print(*columns, sep='\t')
    for r in results:
        fault = r['spill_bytes'] or r['transposed'] or r['shared_kib'] > SHARED[r['arch']]
        faults += bool(fault)
        print(*('any' if r[c] is None else r[c] for c in columns), 'FAULT' if fault else '', sep='\t')
    print(f'{len(results)} launches compiled, {faults} at fault')
    return int(faults > 0)


if __name__ == '__main__':
    sys.exit(main())
