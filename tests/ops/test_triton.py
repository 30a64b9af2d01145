"""Triton's kernels of segment attention: on the GPU where there is one, else in Triton's interpreter.

`test_ops` holds what every implementation must do; here is what only these kernels have: launches and layouts.
`test_triton_operator` holds how calls reach them, `test_triton_models` models that run on them.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import autoreg_vit.ops.triton  # noqa: F401 (registers the operator)
from autoreg_vit import ops
from autoreg_vit.errors import ModelError
from autoreg_vit.ops import segment_attention, segment_attention_kvpacked, segment_attention_qkvpacked
from autoreg_vit.ops import triton as kernels
from autoreg_vit.serialization import Layout, Serialization
from tests.support.attention import arguments, assert_near, expected_results, results
from tests.support.launching import run_python

DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'
# The interpreter multiplies bfloat16 wrongly (triton #11584).
HALVES = [torch.float16, torch.bfloat16] if DEVICE == 'cuda' else [torch.float16]
ROOT = Path(__file__).parents[2]


def attention(q, k, v, limits, **options):
    return segment_attention(q, k, v, limits, impl='triton', **options)


def monotone(grid, prefix, kind, *, batch=2):
    """Limits of RandSAC's blobs for encoder, decoder or memory attention."""
    ranks = Serialization('blobs', grid, (11, 5))(batch, generator=torch.Generator().manual_seed(0))
    return getattr(Layout.of(ranks, 'self' if prefix == 0 else 'none', prefix), f'{kind}_limits')


@pytest.fixture
def poisoned(monkeypatch):
    """Memory that kernels are given to fill holds NaN, so that what they leave out shows."""
    for name in ('empty', 'empty_like'):
        allocate = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *args, allocate=allocate, **kwargs: (
            x.fill_(float('nan')) if (x := allocate(*args, **kwargs)).is_floating_point() else x))


# Values and gradients


# Lengths around tiles and launches; 260 queries take the launches for any number of tokens.
@pytest.mark.parametrize('dtype', [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize('shape', [
    (2, 1, 1, 1, 32), (1, 17, 64, 2, 64), (2, 49, 49, 1, 32), (1, 64, 64, 2, 64), (1, 64, 65, 1, 64),
    (1, 65, 65, 1, 32), (1, 129, 3, 1, 64), (1, 3, 129, 1, 32), (1, 196, 197, 1, 64), (1, 197, 197, 1, 32),
    (1, 260, 260, 1, 64),
    *[(2, 256, 256, 3, 32), (1, 1024, 1025, 2, 64), (1, 4096, 4096, 1, 32)] * (DEVICE == 'cuda'),
], ids=lambda shape: 'x'.join(map(str, shape)))
def test_ragged_limits(shape, dtype, poisoned):
    q, k, v, limits, grad = arguments(shape, seed=3, dtype=dtype, device=DEVICE)
    expected = expected_results(q, k, v, limits, grad)
    actual = results(attention, q, k, v, limits, grad)
    assert all(x.dtype == dtype and x.isfinite().all() for x in actual)
    if dtype == torch.float32:
        assert_near(actual, expected, 1e-5)
        return
    eager = results(segment_attention, q, k, v, limits, grad, impl='eager')
    for got, plain, want in zip(actual, eager, expected):
        error, eager_error = ((x.double() - want.double()).abs().max().item() for x in (got, plain))
        # The rounding of the result itself, which eager may have been lucky with, is allowed on top (see test_ops).
        assert error <= 2 * eager_error + torch.finfo(dtype).eps / 4 * want.abs().max().item() + 1e-5


@pytest.mark.parametrize('kind, prefix, grid', [
    ('encoder', 0, (14, 14)), ('encoder', 1, (14, 14)), ('query', 0, (14, 14)), ('memory', 0, (14, 14)),
    ('memory', 1, (14, 14)), ('memory', 1, (8, 8)), ('encoder', 1, (20, 15)),
])
def test_limits_of_a_serialization(kind, prefix, grid, poisoned):
    limits = monotone(grid, prefix, kind, batch=1).to(DEVICE)
    keys = grid[0] * grid[1] + (prefix if kind != 'query' else 0)
    q, k, v, _, grad = arguments((1, limits.shape[1], keys, 1, 32), seed=4, device=DEVICE)
    assert_near(results(attention, q, k, v, limits, grad), expected_results(q, k, v, limits, grad), 1e-5)


def test_limits_outside_their_range_mean_none_and_all():
    q, k, v, limits, grad = arguments((2, 70, 90, 1, 32), device=DEVICE)
    limits[0, ::2], limits[1, ::3] = -5, 1000
    actual = results(attention, q, k, v, limits, grad)
    assert_near(actual, expected_results(q, k, v, limits.clamp(0, 90), grad), 1e-5)


@pytest.mark.parametrize('queries, keys', [(17, 17), (70, 130)])
def test_results_repeat_bit_for_bit(queries, keys):
    args = arguments((1, queries, keys, 2, 32), dtype=HALVES[0], device=DEVICE)
    for first, second in zip(results(attention, *args), results(attention, *args)):
        assert torch.equal(first, second)


@pytest.mark.skipif(DEVICE != 'cuda', reason='needs a GPU')
@pytest.mark.parametrize('tokens', [64, 196])
def test_a_cuda_graph_replays_forward_and_backward(tokens):
    q, k, v, limits, grad = arguments((4, tokens, tokens, 2, 64), dtype=torch.bfloat16, device='cuda')
    qkv = torch.stack([q, k, v], dim=2).requires_grad_()

    def once():
        out = segment_attention_qkvpacked(qkv, limits, impl='triton')
        return [out, *torch.autograd.grad(out, qkv, grad)]

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        once()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        captured = once()
    with torch.no_grad():
        qkv.mul_(0.5)
    graph.replay()
    for got, want in zip(captured, once()):
        assert torch.equal(got, want)


# Layouts


@pytest.mark.parametrize('tokens', [17, 70])
def test_a_packed_projection_receives_one_gradient(tokens, poisoned):
    q, k, v, limits, grad = arguments((2, tokens, tokens, 2, 32), device=DEVICE)
    expected = expected_results(q, k, v, limits, grad)
    qkv = torch.stack([q, k, v], dim=2).requires_grad_()
    out = segment_attention_qkvpacked(qkv, limits, impl='triton')
    # The projection itself is the operator's input: nothing splits it, and nothing stacks its gradient.
    assert [type(f).__name__ for f, _ in out.grad_fn.next_functions if f] == ['AccumulateGrad']
    out.backward(grad)
    assert_near([out.detach(), *qkv.grad.unbind(2)], expected, 1e-5)

    q, kv = q.requires_grad_(), torch.stack([k, v], dim=2).requires_grad_()
    out = segment_attention_kvpacked(q, kv, limits, impl='triton')
    assert [type(f).__name__ for f, _ in out.grad_fn.next_functions if f] == ['AccumulateGrad', 'AccumulateGrad']
    out.backward(grad)
    assert_near([out.detach(), q.grad, *kv.grad.unbind(2)], expected, 1e-5)


def test_any_strides():
    q, k, v, limits, grad = arguments((2, 70, 70, 2, 32), device=DEVICE)
    expected = expected_results(q, k, v, limits, grad)
    layouts = [
        lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),  # [B, H, N, D] in memory
        lambda x: x.permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0),  # D outermost: no two neighbours
        lambda x: torch.cat([x, x], dim=1)[:, :70],  # a slice of tokens
    ]
    for queries, keys, values in ((0, 1, 2), (2, 0, 1), (1, 2, 0)):
        strided = [layouts[i](x) for i, x in zip((queries, keys, values), (q, k, v))]
        assert_near(results(attention, *strided, limits, layouts[keys](grad)), expected, 1e-5)
    # A gradient of stride 0 and limits shared by all images.
    shared, one = limits[:1].expand(2, -1), torch.ones((), device=DEVICE)
    actual = results(attention, q, k, v, shared, one.expand_as(grad))
    assert_near(actual, expected_results(q, k, v, shared, torch.ones_like(grad)), 1e-5)


# What auto chooses, and what is refused


def on_a_gpu(monkeypatch, capability=(9, 0), interpreted=False):
    """What is chosen for CUDA tensors is chosen as on a GPU, or there under the interpreter."""
    major, minor = capability
    monkeypatch.setattr(kernels, 'capability', lambda device: 10 * major + minor)
    monkeypatch.setattr(kernels, 'INTERPRETED', interpreted)


@pytest.mark.parametrize('interpreted, dtype, chosen', [
    (False, torch.bfloat16, 'triton'), (True, torch.bfloat16, 'sdpa'), (True, torch.float16, 'triton'),
])
def test_auto_leaves_the_interpreter_what_it_multiplies_rightly(interpreted, dtype, chosen, monkeypatch):
    on_a_gpu(monkeypatch, interpreted=interpreted)
    with FakeTensorMode(allow_non_fake_inputs=True):
        q = torch.empty(2, 17, 3, 64, dtype=dtype, device='cuda')
        assert ops.choose_implementation(q, q) == chosen


def test_the_interpreter_is_not_given_bfloat16(monkeypatch):
    monkeypatch.setattr(kernels, 'INTERPRETED', True)
    q, k, v, limits, _ = arguments((1, 4, 4, 1, 32), dtype=torch.bfloat16, device=DEVICE)
    with pytest.raises(ModelError, match=r"float32 and float16 in Triton's interpreter.*got torch\.bfloat16"):
        attention(q, k, v, limits)
    with torch.autocast(DEVICE, torch.bfloat16), pytest.raises(ModelError, match='interpreter'):
        attention(q.float(), k.float(), v.float(), limits)
    expected = expected_results(q, k, v, limits, torch.zeros_like(q))[0]
    torch.testing.assert_close(segment_attention(q, k, v, limits).double(), expected, rtol=0.02, atol=0.02)


@pytest.mark.parametrize('head_dim, dtype, capability, chosen', [
    (64, torch.bfloat16, (9, 0), 'triton'),
    (32, torch.float32, (8, 0), 'triton'),
    (64, torch.float16, (12, 0), 'triton'),
    (48, torch.bfloat16, (9, 0), 'sdpa'),
    (64, torch.float16, (7, 5), 'sdpa'),
    (64, torch.float64, (9, 0), 'eager'),
])
def test_auto_on_a_gpu(head_dim, dtype, capability, chosen, monkeypatch):
    on_a_gpu(monkeypatch, capability)
    with FakeTensorMode(allow_non_fake_inputs=True):
        q = torch.empty(2, 17, 3, head_dim, dtype=dtype, device='cuda')
        assert ops.choose_implementation(q, q) == chosen


@pytest.mark.parametrize('head_dim, dtype, words', [
    (48, torch.float32, ['(32, 64)', '48', "impl='auto'"]),
    (128, torch.float16, ['(32, 64)', '128']),
    (64, torch.float64, ['float32, float16 and bfloat16', 'float64']),
])
def test_what_the_kernels_cannot_take(head_dim, dtype, words):
    q, k, v, limits, _ = arguments((1, 4, 4, 1, head_dim), dtype=dtype, device=DEVICE)
    with pytest.raises(ModelError) as caught:
        attention(q, k, v, limits)
    for word in words:
        assert word in str(caught.value)


def test_without_a_gpu_or_the_interpreter_the_error_says_so():
    done = run_python('-c', '''
import sys, torch
import autoreg_vit
from autoreg_vit.ops import segment_attention
assert 'autoreg_vit.ops.triton' not in sys.modules, 'importing the package imports the kernels'
q = torch.zeros(1, 4, 1, 32)
limits = torch.zeros(1, 4, dtype=torch.int32)
segment_attention(q, q, q, limits)
try:
    segment_attention(q, q, q, limits, impl='triton')
except autoreg_vit.errors.ModelError as error:
    print(error)
''')
    for word in ('CUDA tensors', 'TRITON_INTERPRET=1', 'got cpu'):
        assert word in done.stdout, done.stderr


@pytest.mark.slow
def test_the_attention_benchmark_runs(tmp_path):
    output = tmp_path / 'attention.json'
    environment = {**os.environ, 'PYTHONPATH': str(ROOT)}
    subprocess.run([sys.executable, '-m', 'benchmarks.attention', '--device', DEVICE, '--dtype', 'float16', '--tokens',
                    '16', '--batch', '3', '--heads', '2', '--head-dims', '32', '--seconds', '0.01', '--output', output],
                   check=True, env=environment, cwd=ROOT)
    rows = json.loads(output.read_text())['rows']
    own = [r for r in rows if r['name'] == 'segment_attention, triton']
    cases = ('randsac', 'randsac-memory', 'saim', 'saim-query')
    assert {(r['case'], r['pass']) for r in own} == {(c, p) for c in cases for p in ('forward', 'forward+backward')}
    assert all(r['p20_us'] <= r['median_us'] <= r['p80_us'] for r in own)
    assert output.with_suffix('.png').stat().st_size > 10_000
