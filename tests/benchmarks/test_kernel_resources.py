"""What the attention kernels' launches compile to, what is at fault, and what spares compiling them once more."""

import json
from pathlib import Path

import pytest

pytest.importorskip('triton')
pytest.importorskip('sklearn')

import triton

from benchmarks import kernel_resources
from tests.support.launching import run_python


@pytest.mark.parametrize('change, recorded', [
    ({}, True), ({'triton': '3.0.0'}, False), ({'sources': 'of another day'}, False), ({'sources': None}, False),
    ({'launches': [{'arch': 80, 'fault': False}, {'arch': 90, 'fault': False}]}, False),
    ({'launches': [{'arch': arch, 'fault': arch == 90} for arch in kernel_resources.SHARED]}, False),
])
def test_the_same_sources_are_compiled_once(change: dict, recorded: bool, tmp_path: Path, monkeypatch):
    content = {'triton': triton.__version__, 'sources': kernel_resources.digest_of_sources(),
               'launches': [{'arch': arch, 'fault': False} for arch in kernel_resources.SHARED], **change}
    (tmp_path / 'kernel_resources-triton.json').write_text(json.dumps(content))
    monkeypatch.setattr(kernel_resources, 'RESULTS', tmp_path)
    assert kernel_resources.is_recorded() == recorded


def test_every_byte_of_kernels_and_table_counts(tmp_path: Path, monkeypatch):
    for name in ('forward.py', 'backward/split.py', 'launches.json', 'notes.txt'):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text('1')
    monkeypatch.setattr(kernel_resources, 'TABLE', tmp_path / 'launches.json')
    digests = [kernel_resources.digest_of_sources()]
    for name in ('notes.txt', 'forward.py', 'backward/split.py', 'launches.json'):
        (tmp_path / name).write_text('2')
        digests.append(kernel_resources.digest_of_sources())
    assert digests[0] == digests[1] and len(set(digests)) == 4


def row(direction, design, arch, dtype, head_dim, launch, below=None):
    return {'pass': direction, 'design': design, 'arch': arch, 'dtype': dtype, 'head_dim': head_dim, 'tokens': 64,
            'launches': [dict(zip(('block', 'step', 'num_warps', 'num_stages'), launch))], 'triton_below': below,
            'timed_on': None}


@pytest.mark.parametrize('row, status', [
    (row('backward', 'fused', 90, 'bfloat16', 32, (64, 64, 4, 1)), 0),
    (row('forward', 'two_loops', 80, 'float32', 64, (64, 64, 8, 1)), 1),
    (row('forward', 'two_loops', 80, 'float32', 64, (64, 64, 8, 1), below='3.0'), 0),
], ids=['clean', 'spills', 'for another version'])
def test_kernel_resources_finds_spills(row, status, tmp_path):
    table, output = tmp_path / 'launches.json', tmp_path / 'resources.json'
    table.write_text(json.dumps({'launches': [row]}))
    done = run_python('-m', 'benchmarks.kernel_resources', '--jobs', '1', '--table', str(table), '--output',
                      str(output))
    assert done.returncode == status, done.stderr
    assert ('FAULT' in done.stdout) == bool(status)
    assert triton.__version__ in done.stdout
    compiled = json.loads(output.read_text())['launches']
    assert [(r['kernel'], r['fault']) for r in compiled] == (
        [] if row['triton_below'] else [(f'{row["design"]}_kernel', bool(status))])


def test_kernel_resources_finds_transposed_accumulators(tmp_path):
    script = tmp_path / 'script.py'  # Triton wants its kernels in a file
    script.write_text('''
import triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from benchmarks.compiling import transposed_accumulators

@triton.jit
def loaded(x_ptr, steps):
    at = tl.arange(0, 64)[:, None] * 64 + tl.arange(0, 64)[None, :]
    total = tl.zeros([64, 64], tl.float32)
    for _ in range(steps):
        x = tl.load(x_ptr + at)
        total += tl.dot(x, tl.trans(x))
    tl.store(x_ptr + at, total.to(tl.float16))

@triton.jit
def accumulated(x_ptr, steps):
    at = tl.arange(0, 64)[:, None] * 64 + tl.arange(0, 64)[None, :]
    x = tl.load(x_ptr + at)
    total = tl.zeros([64, 64], tl.float32)
    for _ in range(steps):
        total += tl.dot(x, x)
    tl.store(x_ptr + at, tl.dot(tl.trans((total * 2).to(tl.float16)), x).to(tl.float16))

for kernel in (loaded, accumulated):
    source = ASTSource(kernel, {'x_ptr': '*fp16', 'steps': 'i32'})
    ttir = triton.compile(source, target=GPUTarget('cuda', 90, 32)).asm['ttir']
    print(ttir.count('tt.trans'), len(transposed_accumulators(ttir)))
''')
    done = run_python(str(script))
    assert done.stdout.split() == ['1', '0', '1', '1'], done.stderr
