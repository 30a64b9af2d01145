"""Designs of the Triton kernels that wait to be timed on a GPU: right in the interpreter, sound when compiled.

Projections are packed, so that their strides are not those of tensors of their own.
"""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from autoreg_vit.ops import segment_attention
from autoreg_vit.ops.triton.backward.paired import paired_backward
from autoreg_vit.ops.triton.bordered import bordered_backward, bordered_forward
from autoreg_vit.ops.triton.launches import Launch
from autoreg_vit.ops.triton.two_heads import two_heads_backward, two_heads_forward
from tests.ops.test_kernels import assert_as_good, limits_of, name_of
from tests.ops.test_ops import arguments, results

DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'
# The interpreter multiplies bfloat16 wrongly (triton #11584).
DTYPES = (torch.float32, torch.float16, torch.bfloat16)[:3 if DEVICE == 'cuda' else 2]
BORDERED, TWO_HEADS = Launch(64, 64, 4, 1), Launch(64, 64, 8, 1)
KINDS = ('ragged', 'monotone', 'outside', 'empty', 'full')


def quick_and_slow(quick, slow):
    return [*quick, *(pytest.param(*case, marks=pytest.mark.slow) for case in slow)]


class Case:
    """Arguments, results in float64, and eager's results in the arguments' dtype; outputs of kernels begin as NaN."""

    def __init__(self, queries, keys, kind, dtype=torch.float32, heads=2, head_dim=32):
        q, k, v, ragged, self.grad = arguments(
            (2, queries, keys, heads, head_dim), seed=queries, dtype=dtype, device=DEVICE)
        self.q, self.k, self.v = packed(q, k, v)
        self.limits = torch.full_like(ragged, keys) if kind == 'full' else limits_of(kind, queries, keys, ragged)
        self.scale = head_dim ** -0.5
        self.scale_log2 = self.scale * math.log2(math.e)
        self.expect()

    def expect(self):
        """Work out what the arguments must give."""
        self.expected, self.plain = (
            results(segment_attention, *(x.to(t) for x in (self.q, self.k, self.v)), self.limits, self.grad,
                    scale=self.scale, impl='eager') for t in (torch.float64, self.grad.dtype))
        scores = torch.einsum('bqhd,bkhd->bhqk', self.q.double(), self.k.double()) * self.scale
        hidden = torch.arange(self.k.shape[1], device=DEVICE) >= self.limits[:, None, :, None]
        lse = scores.masked_fill(hidden, -math.inf).logsumexp(-1) * math.log2(math.e)
        self.lse = lse.masked_fill(self.limits[:, None] <= 0, math.inf).contiguous()

    def forward(self, design, launch):
        out, lse = (torch.full_like(x, math.nan, dtype=t) for x, t in (
            (self.grad, self.grad.dtype), (self.lse, torch.float32)))
        design(self.q, self.k, self.v, self.limits, out, lse, self.scale_log2, launch)
        return out, lse

    def backward(self, design, launch):
        gradients = packed(*(torch.full_like(x, math.nan) for x in (self.q, self.k, self.v)))
        out = self.expected[0].to(self.grad.dtype).contiguous()
        design(self.q, self.k, self.v, self.limits, out, self.grad, self.lse.float(), *gradients, self.scale,
               self.scale_log2, launch)
        return gradients

    def check_forward(self, design, launch):
        out, lse = self.forward(design, launch)
        assert_as_good([out], self.plain[:1], self.expected[:1])
        torch.testing.assert_close(lse.double(), self.lse, rtol=1e-4, atol=1e-4)

    def check_backward(self, design, launch):
        assert_as_good(self.backward(design, launch), self.plain[1:], self.expected[1:])


def packed(q, k, v):
    """The same q, k and v as views of one projection, or of two where lengths differ."""
    if q.shape == k.shape:
        return torch.stack([q, k, v], 2).unbind(2)
    return q, *torch.stack([k, v], 2).unbind(2)


# Queries, keys, and what the limits are like: as many tiles of either, more of one, and more queries than the programs
# of keys scan at once.
@pytest.mark.parametrize('queries, keys, kind', quick_and_slow(
    [(17, 17, 'ragged'), (97, 97, 'monotone'), (60, 130, 'outside'), (65, 30, 'empty'), (260, 20, 'ragged')],
    [*((196, 197, kind) for kind in KINDS), (290, 33, 'monotone'), (1, 150, 'ragged'), (64, 64, 'full')]))
def test_paired(queries, keys, kind):
    Case(queries, keys, kind).check_backward(paired_backward, Launch(64, 32, 4, 3))


@pytest.mark.parametrize('queries, keys, kind', quick_and_slow(
    [*((65, 65, kind) for kind in KINDS[:4]), (1, 1, 'full'), (64, 65, 'monotone')],
    [(65, 65, 'full'), (65, 1, 'ragged'), (1, 65, 'outside'), (30, 50, 'ragged'), (65, 64, 'monotone')]))
def test_bordered(queries, keys, kind):
    case = Case(queries, keys, kind)
    case.check_forward(bordered_forward, BORDERED)
    case.check_backward(bordered_backward, BORDERED)


@pytest.mark.parametrize('first, others', quick_and_slow([(0, 65), (65, 0)], [(1, 1), (-3, 70), (0, 1)]))
def test_the_border_has_limits_of_its_own(first, others):
    """The first token may see nothing where all others see everything, and the other way round."""
    case = Case(65, 65, 'full')
    case.limits[:] = others
    case.limits[:, 0] = first
    case.expect()
    case.check_forward(bordered_forward, BORDERED)
    case.check_backward(bordered_backward, BORDERED)


@pytest.mark.parametrize('queries, keys, kind', quick_and_slow(
    [*((64, 64, kind) for kind in KINDS[:3]), (17, 17, 'empty'), (49, 30, 'ragged')],
    [(64, 64, 'full'), (64, 1, 'outside'), (1, 64, 'ragged'), (63, 64, 'empty')]))
@pytest.mark.parametrize('heads', [3, pytest.param(2, marks=pytest.mark.slow)])
def test_two_heads(queries, keys, kind, heads):
    case = Case(queries, keys, kind, heads=heads)
    case.check_forward(two_heads_forward, TWO_HEADS)
    case.check_backward(two_heads_backward, TWO_HEADS)


@pytest.mark.slow
@pytest.mark.parametrize('head_dim', [32, 64])
@pytest.mark.parametrize('dtype', DTYPES[1:], ids=name_of)
def test_half_precision(dtype, head_dim):
    options = dict(dtype=dtype, head_dim=head_dim)
    for launch in (Launch(64, 32, 4, 3), Launch(128, 32, 8, 3), Launch(64, 16, 4, 2)):
        Case(130, 100, 'ragged', **options).check_backward(paired_backward, launch)
    case = Case(65, 65, 'monotone', **options)
    case.check_forward(bordered_forward, BORDERED)
    case.check_backward(bordered_backward, BORDERED)
    case = Case(64, 60, 'ragged', heads=3, **options)
    case.check_forward(two_heads_forward, TWO_HEADS)
    case.check_backward(two_heads_backward, TWO_HEADS)


@pytest.mark.parametrize('design, launch, tokens', [
    (paired_backward, Launch(64, 32, 4, 3), 40), (bordered_backward, BORDERED, 65), (two_heads_backward, TWO_HEADS, 17),
], ids=lambda value: getattr(value, '__name__', ''))
def test_gradients_repeat_bit_for_bit(design, launch, tokens):
    case = Case(tokens, tokens, 'ragged')
    for first, second in zip(case.backward(design, launch), case.backward(design, launch)):
        assert torch.equal(first, second)


COMPILE = '''
import torch
from autoreg_vit.ops.triton.backward.paired import paired_backward
from autoreg_vit.ops.triton.bordered import bordered_backward, bordered_forward
from autoreg_vit.ops.triton.launches import Launch
from autoreg_vit.ops.triton.two_heads import two_heads_backward, two_heads_forward
from benchmarks.compiling import compile_call, meta_tensors, record_calls, resources

for design, launch, tokens, head_dim in (
        (paired_backward, Launch(64, 32, 4, 3), 196, 64),
        (bordered_backward, Launch(64, 64, 4, 1, 168), 65, 64), (bordered_forward, Launch(64, 64, 4, 1), 65, 64),
        (two_heads_backward, Launch(64, 64, 8, 1), 64, 32), (two_heads_forward, Launch(64, 64, 8, 1), 64, 32)):
    tensors = meta_tensors(tokens, head_dim, torch.bfloat16)
    if design in (bordered_forward, two_heads_forward):
        arguments = [tensors[name] for name in ('q', 'k', 'v', 'limits', 'out', 'lse')] + [0.1]
    else:
        arguments = [*tensors.values(), 0.1, 0.1]
    for call in record_calls(lambda: design(*arguments, launch)):
        used = resources(compile_call(call, 90))
        print(call.name, used['spill_bytes'], used['transposed'])
'''


@pytest.mark.slow
def test_designs_compile_for_hopper_without_spills_or_transposed_accumulators():
    environment = {k: v for k, v in os.environ.items() if k != 'TRITON_INTERPRET'}
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, '-c', COMPILE], capture_output=True, text=True, cwd=root,
                          env={**environment, 'PYTHONPATH': str(root)})
    rows = [line.split() for line in done.stdout.splitlines()]
    assert len(rows) == 5, done.stderr
    assert all(row[1:] == ['0', '0'] for row in rows), rows
