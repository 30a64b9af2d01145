"""Every design of the Triton kernels, whether the table of launches chooses it or not, and the table itself.

`test_triton` runs what the table chooses, through the public operator.
"""

import itertools
import math

import pytest
import torch

from autoreg_vit.ops import segment_attention
from autoreg_vit.ops import triton as kernels
from autoreg_vit.ops.triton import backward, forward, launches
from autoreg_vit.ops.triton.launches import Launch, Plan
from benchmarks.candidates import CANDIDATES, longest
from benchmarks.ptx_equality import normal_ptx
from tests.support.attention import arguments, results

DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'
ARCHS = (80, 90, 100)
# These tiles are for half precision, which the interpreter takes more time for; it multiplies bfloat16 wrongly.
QUICK_DTYPE, DTYPES = (torch.bfloat16, [torch.float16, torch.bfloat16]) if DEVICE == 'cuda' else (
    torch.float32, [torch.float32, torch.float16])
# The tiles of what the tuner tries first, and others of a split, whose two kernels share padded rows.
FORWARDS = [Plan(design, options[i]) for design, options in CANDIDATES['forward', 16].items() for i in (0, 1)]
BACKWARDS = [Plan(design, options[0]) for design, options in CANDIDATES['backward', 16].items()] + [
    Plan('split', (Launch(64, 64, 4, 2), Launch(128, 32, 8, 2))),
    Plan('split', (Launch(128, 32, 8, 2), Launch(64, 64, 4, 2)))]
# Around tiles: queries, keys, and what the limits are like.
QUICK = [(17, 17, 'ragged'), (65, 65, 'monotone'), (63, 49, 'outside'), (121, 128, 'ragged'), (130, 111, 'empty')]
LENGTHS = (1, 17, 49, 63, 64, 65, 111, 121, 128, 129, 196, 197, 256)
THOROUGH = [*((n, n, kind) for n in LENGTHS for kind in ('ragged', 'monotone', 'outside')), (197, 197, 'empty'),
            (64, 65, 'ragged'), (1, 129, 'ragged'), (129, 1, 'ragged'), (196, 197, 'monotone'), (256, 64, 'outside')]


def limits_of(kind, queries, keys, ragged):
    """int32 [2, Nq]; `ragged` has some that are 0 and some that are all keys."""
    if kind == 'monotone':
        return ragged.sort(1).values
    if kind == 'outside':
        return ragged * 3 - keys
    return torch.zeros_like(ragged) if kind == 'empty' else ragged


def case_of(queries, keys, kind, dtype, scale=None, head_dim=32):
    """Arguments, and float64 results: output, base-2 LSE, gradients; and the same of eager in the arguments' dtype."""
    q, k, v, ragged, grad = arguments((2, queries, keys, 1, head_dim), seed=queries, dtype=dtype, device=DEVICE)
    limits = limits_of(kind, queries, keys, ragged)
    scale = head_dim ** -0.5 if scale is None else scale
    expected, plain = (
        results(segment_attention, *(x.to(t) for x in (q, k, v)), limits, grad, scale=scale, impl='eager')
        for t in (torch.float64, dtype))
    scores = torch.einsum('bqhd,bkhd->bhqk', q.double(), k.double()) * scale
    hidden = torch.arange(keys, device=DEVICE) >= limits[:, None, :, None]
    lse = scores.masked_fill(hidden, -math.inf).logsumexp(-1) * math.log2(math.e)
    return (q, k, v, limits, grad, scale), expected, plain, lse.masked_fill(limits[:, None] <= 0, math.inf)


def assert_as_good(actual, plain, expected):
    """At most twice eager's error in the same dtype, beside the rounding of the result."""
    for got, eager_result, want in zip(actual, plain, expected, strict=True):
        assert got.isfinite().all()
        error, eager_error = ((x.double() - want).abs().max().item() for x in (got, eager_result))
        assert error <= 2 * eager_error + torch.finfo(got.dtype).eps / 4 * want.abs().max().item() + 1e-5


def check_forward(plan, case):
    (q, k, v, limits, _, scale), (expected, *_), (plain, *_), want = case
    out, lse = forward.forward(q, k, v, limits, scale * math.log2(math.e), plan)
    assert_as_good([out], [plain], [expected])
    torch.testing.assert_close(lse.double(), want, rtol=1e-4, atol=1e-4)


def check_backward(plan, case):
    (q, k, v, limits, grad, scale), (out, *expected), (_, *plain), lse = case
    gradients = [torch.full_like(x, math.nan) for x in (q, k, v)]
    backward.DESIGNS[plan.design].fill(q, k, v, limits, out.to(q.dtype), grad, lse.float(), *gradients, scale,
                                       scale * math.log2(math.e), *plan.launches)
    assert_as_good(gradients, plain, expected)


def name_of(value):
    if callable(value):
        return value.__name__.removeprefix('check_')
    if isinstance(value, Plan):
        return '-'.join([value.design, *('x'.join(map(str, launch[:2])) for launch in value.launches)])
    return str(value).removeprefix('torch.')


# Values, in the interpreter where there is no GPU


@pytest.fixture
def poisoned(monkeypatch):
    """Memory that kernels are given to fill holds what would show if it was left: NaN, or limits beyond all keys."""
    allocate = torch.empty

    def empty(*args, **kwargs):
        x = allocate(*args, **kwargs)
        return x.fill_(math.nan if x.is_floating_point() else 2 ** 30)

    monkeypatch.setattr(torch, 'empty', empty)


@pytest.mark.parametrize('case', QUICK, ids=name_of)
@pytest.mark.parametrize('plan', [FORWARDS[0], FORWARDS[3]], ids=name_of)
def test_forward(plan, case, poisoned):
    check_forward(plan, case_of(*case, QUICK_DTYPE))


@pytest.mark.parametrize('case', QUICK, ids=name_of)
@pytest.mark.parametrize('plan', BACKWARDS, ids=name_of)
def test_backward(plan, case, poisoned):
    if max(case[:2]) <= longest('backward', plan):
        check_backward(plan, case_of(*case, QUICK_DTYPE))


@pytest.mark.slow
@pytest.mark.parametrize('dtype', DTYPES, ids=name_of)
@pytest.mark.parametrize('case', THOROUGH, ids=name_of)
def test_every_design(case, dtype, poisoned):
    arguments_and_results = case_of(*case, dtype, head_dim=64)
    for plan in FORWARDS:
        if max(case[:2]) <= longest('forward', plan):
            check_forward(plan, arguments_and_results)
    for plan in BACKWARDS:
        if max(case[:2]) <= longest('backward', plan):
            check_backward(plan, arguments_and_results)


@pytest.mark.parametrize('scale', [-0.4, 0.0, 1e-6])
@pytest.mark.parametrize('check, plan', [*((check_forward, plan) for plan in FORWARDS[::2]),
                                         *((check_backward, plan) for plan in BACKWARDS[:-2])], ids=name_of)
def test_scales_that_are_not_positive(check, plan, scale, poisoned):
    # The first queries see nothing of the first step, so that a maximum over nothing meets the scale.
    check(plan, case_of(40, 40, 'ragged', QUICK_DTYPE, scale))


@pytest.mark.skipif(DEVICE != 'cuda', reason='needs a GPU')
@pytest.mark.parametrize('dtype', kernels.DTYPES, ids=name_of)
@pytest.mark.parametrize('head_dim', kernels.HEAD_DIMS)
def test_every_row_at_every_length_it_serves(head_dim, dtype):
    for tokens in (*range(1, 273), 300, 484, 512, 576, 785, 1024, 2048):
        # As many queries as keys, and in turn fewer of either.
        for queries, keys in ((tokens, tokens), ((tokens + 1) // 2, tokens)[::1 if tokens % 2 else -1]):
            q, k, v, limits, grad = arguments((2, queries, keys, 3, head_dim), dtype=dtype, device=DEVICE)
            limits = limits if tokens % 3 else limits.sort(1).values
            actual = results(segment_attention, q, k, v, limits, grad, impl='triton')
            plain = results(segment_attention, q, k, v, limits, grad, impl='eager')
            exact = results(segment_attention, q.double(), k.double(), v.double(), limits, grad, impl='eager')
            assert_as_good(actual, plain, exact)


# The table of launches


KINDS = list(itertools.product(ARCHS, kernels.DTYPES, kernels.HEAD_DIMS))


@pytest.mark.parametrize('version', [(3, 6), (3, 7), (3, 99)], ids=name_of)
@pytest.mark.parametrize('direction', ['forward', 'backward'])
def test_every_size_has_a_plan_that_holds_it(direction, version):
    for arch, dtype, head_dim in KINDS:
        for tokens in (1, 64, 65, 128, 129, 256, 257, 4096, 100_000):
            row = launches.find_row(direction, tokens, head_dim, dtype, arch, version)
            plan = launches.plan_of(row)
            assert tokens <= longest(direction, plan)
            assert plan.design in (forward.DESIGNS if direction == 'forward' else backward.DESIGNS)
            if plan.design == 'split':
                assert plan.launches[0].block % plan.launches[1].step == 0


@pytest.mark.parametrize('capability, arch', [
    (80, 80), (86, 80), (89, 80), (90, 90), (100, 100), (103, 100), (120, 80)])
def test_the_rows_of_every_gpu(capability, arch):
    assert launches.tuned_arch(capability) == arch


def test_every_row_serves():
    # What a row does not serve any more falls to the next, so that behaviour changes at its bound.
    versions = {(3, 6), *(tuple(map(int, row['triton_below'].split('.'))) for row in launches.table()
                          if row['triton_below'])}
    served = [launches.find_row(direction, tokens, head_dim, dtype, arch, version)
              for direction in ('forward', 'backward') for arch, dtype, head_dim in KINDS
              for tokens in (64, 65, 128, 256, 512, 100_000) for version in versions]
    for row in launches.table():
        assert any(row is other for other in served), row


def test_a_row_serves_versions_below_its_bound():
    row = {'triton_below': '3.10'}
    assert launches.serves_triton(row, (3, 9))
    assert not launches.serves_triton(row, (3, 10))
    assert launches.serves_triton({'triton_below': None}, (9, 0))


def test_what_broke_on_a_gpu_is_neither_chosen_nor_tried():
    plans = [launches.plan_of(row) for row in launches.table()]
    plans += [Plan(design, option) for designs in CANDIDATES.values() for design, options in designs.items()
              for option in options]
    for plan in plans:
        assert plan.design != 'rows' or (plan.launches[0].block >= 128 and plan.launches[0].num_warps >= 8)


def test_what_was_not_timed_keeps_the_kernels_that_passed_on_a_gpu():
    for row in launches.table():
        if row['timed_on'] is None:
            assert row['design'] in ('two_loops', 'tiled', 'fused_from_out'), row


# PTX


PTX = '''
.visible .entry {name}(
	.param .u64 {name}_param_0,
	.param .u64 {name}_param_1,
	.param .u32 {name}_param_{last}
)
{{
	.loc 1 {line} 0 // source.py:{line}
	ld.param.u64 %rd{r}, [{name}_param_1];
	ld.param.u32 %r{r}, [{name}_param_{last}];
$L__tmp{line}:
	{operation}.s32 %r{s}, %r{r}, 1;
	ret;
}}
	.section .debug_info {{ {line} }}
'''


def ptx(name, last, line, r, s, operation='add'):
    return normal_ptx(PTX.format(name=name, last=last, line=line, r=r, s=s, operation=operation))


def test_ptx_is_equal_but_for_names():
    assert ptx('one', 2, 10, 1, 2) == ptx('other', 7, 33, 4, 9)
    assert ptx('one', 2, 10, 1, 2) != ptx('one', 2, 10, 1, 2, 'sub')
    assert ptx('one', 2, 10, 1, 2) != ptx('one', 2, 10, 1, 1)
    assert ptx('one', 2, 10, 1, 2) != ptx('one', 1, 10, 1, 2)
