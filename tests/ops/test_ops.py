"""Segment attention against a loop over queries in float64, which knows neither masks nor batched products.

Triton's kernels run in its interpreter where there is no GPU (see conftest).
"""

import functools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from autoreg_vit.errors import ModelError, ShapeError
from autoreg_vit.ops import (
    IMPLEMENTATIONS,
    choose_implementation,
    segment_attention,
    segment_attention_kvpacked,
    segment_attention_qkvpacked,
    set_implementation,
)
from autoreg_vit.serialization import blobs, memory_limits, sort_by_rank, source_limits

PROPERTY = settings(max_examples=20, deadline=None, derandomize=True)
SEEDS = st.integers(0, 2 ** 32 - 1)

# B, Nq, Nk, H, D
SHAPES = [
    (2, 17, 17, 3, 5),
    (1, 49, 49, 2, 32),
    (1, 64, 64, 1, 64),
    (2, 65, 65, 1, 32),
    (2, 1, 17, 2, 64),
    (2, 17, 49, 2, 5),
    (1, 49, 64, 1, 32),
    (1, 64, 17, 3, 5),
    (1, 17, 1, 1, 64),
]


DEVICES = ['cpu'] + ['cuda'] * torch.cuda.is_available()


@pytest.fixture(params=DEVICES)
def device(request):
    if request.node.callspec.params.get('impl') == 'triton' and request.param != DEVICES[-1]:
        pytest.skip('Triton runs on the GPU here')
    return request.param


@pytest.fixture
def half(request, device):
    """bfloat16, or float16 for Triton's interpreter, which multiplies bfloat16 wrongly (triton #11584)."""
    impl = request.node.callspec.params.get('impl')
    return torch.float16 if impl == 'triton' and device == 'cpu' else torch.bfloat16


either_precision = pytest.mark.parametrize('precision', ['single', 'half'])
every_implementation = pytest.mark.parametrize('impl', IMPLEMENTATIONS)
shapes = pytest.mark.parametrize('shape', SHAPES, ids=lambda shape: 'x'.join(map(str, shape)))


def with_shapes(*implementations):
    return pytest.mark.parametrize('impl, shape', [
        pytest.param(impl, shape, id=f'{impl}-{"x".join(map(str, shape))}')
        for impl in implementations for shape in SHAPES if impl != 'triton' or shape[-1] in (32, 64)])
scales = pytest.mark.parametrize('scale', [None, 0.3])


def oracle(q, k, v, limits, *, scale=None):
    """One query of one head at a time; without keys, the empty sum is zero."""
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    images = []
    for b, row in enumerate(limits.tolist()):
        queries = []
        for i, visible in enumerate(row):
            heads = []
            for h in range(q.shape[2]):
                scores = scale * (k[b, :visible, h] @ q[b, i, h])
                heads.append(torch.exp(scores - scores.logsumexp(0)) @ v[b, :visible, h])
            queries.append(torch.stack(heads))
        images.append(torch.stack(queries))
    return torch.stack(images)


def arguments(shape, *, seed=0, dtype=torch.float32, device='cpu'):
    """q, k, v, ragged limits that include 0 and all keys, and a gradient for the output."""
    batch, queries, keys, heads, width = shape
    generator = torch.Generator().manual_seed(seed)
    q, k, v, grad = (torch.randn(batch, n, heads, width, generator=generator).to(device, dtype)
                     for n in (queries, keys, keys, queries))
    limits = torch.randint(0, keys + 1, (batch, queries), generator=generator, dtype=torch.int32)
    limits[0, queries // 2] = 0
    limits[-1, queries // 3] = keys
    return q, k, v, limits.to(device), grad


def results(attention, q, k, v, limits, grad, **options):
    """Output and gradients of q, k and v, in that order."""
    q, k, v = (x.detach().clone().requires_grad_() for x in (q, k, v))
    out = attention(q, k, v, limits, **options)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), grad.to(out.dtype))]


def expected_results(q, k, v, limits, grad, **options):
    """What the loop gives in float64, whatever the arguments' dtype."""
    return results(oracle, q.double(), k.double(), v.double(), limits, grad, **options)


def assert_near(actual, expected, tolerance):
    for got, want in zip(actual, expected, strict=True):
        assert got.shape == want.shape
        torch.testing.assert_close(got.double(), want.double(), rtol=tolerance, atol=tolerance)


# Against the loop


@shapes
@scales
def test_eager_is_exact_in_float64(shape, scale, device):
    q, k, v, limits, grad = arguments(shape, dtype=torch.float64, device=device)
    actual = results(segment_attention, q, k, v, limits, grad, scale=scale, impl='eager')
    assert all(x.dtype == torch.float64 for x in actual)
    assert_near(actual, expected_results(q, k, v, limits, grad, scale=scale), 1e-12)


@with_shapes(*IMPLEMENTATIONS)
@scales
def test_float32(impl, shape, scale, device):
    q, k, v, limits, grad = arguments(shape, seed=1, device=device)
    actual = results(segment_attention, q, k, v, limits, grad, scale=scale, impl=impl)
    assert all(x.dtype == torch.float32 for x in actual)
    assert_near(actual, expected_results(q, k, v, limits, grad, scale=scale), 1e-5)


@with_shapes('sdpa', 'triton')
def test_half_precision_is_as_good_as_eager(impl, shape, device, half):
    q, k, v, limits, grad = arguments(shape, seed=2, dtype=half, device=device)
    expected = expected_results(q, k, v, limits, grad)
    eager = results(segment_attention, q, k, v, limits, grad, impl='eager')
    actual = results(segment_attention, q, k, v, limits, grad, impl=impl)
    assert all(x.dtype == half for x in actual)
    for got, plain, want in zip(actual, eager, expected):
        error, eager_error = ((x.double() - want.double()).abs().max().item() for x in (got, plain))
        # Whatever the arithmetic inside, the result is rounded, to 8 significant bits in bfloat16, which alone moves
        # the largest value by up to 2 ** -9 of itself: eager may have been lucky where it has a smaller error.
        # Gradients of q and k that are zero, with a single key, are the difference of two equal sums of order ten.
        assert error <= 2 * eager_error + torch.finfo(half).eps / 4 * want.abs().max().item() + 1e-5


@every_implementation
@PROPERTY
@given(shape=st.tuples(st.integers(1, 3), st.integers(1, 7), st.integers(1, 7), st.integers(1, 2), st.just(32)),
       seed=SEEDS, data=st.data())
def test_any_limits(impl, shape, seed, data):
    batch, queries, keys, _, _ = shape
    q, k, v, _, grad = arguments(shape, seed=seed, device=DEVICES[-1])
    drawn = data.draw(st.lists(st.integers(0, keys), min_size=batch * queries, max_size=batch * queries))
    limits = torch.tensor(drawn, dtype=torch.int32, device=DEVICES[-1]).view(batch, queries)
    actual = results(segment_attention, q, k, v, limits, grad, impl=impl)
    assert_near(actual, expected_results(q, k, v, limits, grad), 1e-5)


def test_gradcheck():
    q, k, v, _, _ = arguments((2, 5, 4, 2, 3), dtype=torch.float64)
    limits = torch.tensor([[0, 4, 1, 3, 4], [2, 2, 0, 4, 1]], dtype=torch.int32)
    assert torch.autograd.gradcheck(
        lambda *qkv: segment_attention(*qkv, limits, scale=0.8, impl='eager'),
        [x.requires_grad_() for x in (q, k, v)])


@every_implementation
def test_a_scale_of_zero_averages_the_visible_values(impl, device):
    q, k, v, limits, _ = arguments((2, 9, 7, 2, 32), device=device)
    out = segment_attention(q, k, v, limits, scale=0.0, impl=impl)
    counts = limits.clamp(min=1)[..., None, None]
    totals = torch.cat([torch.zeros_like(v[:, :1]), v.cumsum(1)], dim=1)
    expected = torch.stack([total[limit.long()] for total, limit in zip(totals, limits)]) / counts
    torch.testing.assert_close(out, expected)


@every_implementation
def test_large_scores_do_not_overflow(impl, device):
    q, k, v, limits, grad = arguments((1, 17, 17, 2, 32), device=device)
    # Scores of some thousands, whose exponentials float32 cannot hold; their own rounding costs digits.
    actual = results(segment_attention, 100 * q, 10 * k, v, limits, grad, impl=impl)
    assert all(x.isfinite().all() for x in actual)
    assert_near(actual[:1], expected_results(100 * q, 10 * k, v, limits, grad)[:1], 5e-3)


# Rows and keys that take no part


@every_implementation
@either_precision
def test_a_row_without_keys_is_zero_and_sends_no_gradient(impl, precision, device, half):
    dtype = half if precision == 'half' else torch.float32
    q, k, v, limits, grad = arguments((2, 17, 19, 2, 32), dtype=dtype, device=device)
    limits[:, ::3] = 0
    limits[1, 1::3] = 19
    empty = limits == 0
    out, grad_q, grad_k, grad_v = results(segment_attention, q, k, v, limits, grad, impl=impl)
    assert not out[empty].any()
    assert not grad_q[empty].any()
    assert out[~empty].abs().amin(-1).all()
    assert all(x.isfinite().all() for x in (out, grad_q, grad_k, grad_v))
    # A gradient that arrives at empty rows alone goes nowhere.
    only_empty = torch.where(empty[..., None, None], 1000 * grad, torch.zeros_like(grad))
    for gradient in results(segment_attention, q, k, v, limits, only_empty, impl=impl)[1:]:
        assert not gradient.any()


@every_implementation
@either_precision
@pytest.mark.parametrize('shape', [(2, 17, 17, 2, 32), (1, 1, 65, 1, 32), (1, 64, 1, 1, 64)], ids=str)
@pytest.mark.filterwarnings('ignore:Anomaly Detection')
def test_rows_may_all_be_empty(impl, precision, shape, device, half):
    dtype = half if precision == 'half' else torch.float32
    q, k, v, limits, grad = arguments(shape, dtype=dtype, device=device)
    # Anomaly mode also raises for a NaN on the way back that a later step would have hidden.
    with torch.autograd.detect_anomaly():
        for x in results(segment_attention, q, k, v, torch.zeros_like(limits), grad, impl=impl):
            assert torch.equal(x, torch.zeros_like(x))


@every_implementation
@either_precision
def test_keys_beyond_every_limit_change_nothing_and_receive_no_gradient(impl, precision, device, half):
    dtype = half if precision == 'half' else torch.float32
    q, k, v, limits, grad = arguments((3, 17, 65, 2, 32), dtype=dtype, device=device)
    last = [11, 64, 1]
    limits = torch.stack([row.clamp(max=end) for row, end in zip(limits, last)])
    limits[:, 5] = torch.tensor(last, dtype=torch.int32)
    first = results(segment_attention, q, k, v, limits, grad, impl=impl)
    for b, end in enumerate(last):
        assert not first[2][b, end:].any()
        assert not first[3][b, end:].any()
        assert first[2][b, :end].any() or end == 1
        assert first[3][b, :end].flatten(1).any(1).all()
        k[b, end:] = 1000
        v[b, end:] = -1000
    for before, after in zip(first, results(segment_attention, q, k, v, limits, grad, impl=impl)):
        assert torch.equal(before, after)


@every_implementation
def test_a_query_depends_on_its_visible_keys_alone(impl, device):
    q, k, v, limits, _ = arguments((2, 17, 9, 2, 32), device=device)
    before = segment_attention(q, k, v, limits, impl=impl)
    for key in range(9):
        changed_k, changed_v = k.clone(), v.clone()
        changed_k[:, key] += 1
        changed_v[:, key] -= 1
        after = segment_attention(q, changed_k, changed_v, limits, impl=impl)
        assert torch.equal((after != before).flatten(2).any(2), limits > key)


# Limits of serializations, heads, images


@every_implementation
@pytest.mark.parametrize('kind, prefix', [('source', 0), ('source', 1), ('self', 0), ('none', 0), ('none', 1)])
def test_sorting_and_limits_equal_a_dense_mask_in_raster_order(impl, kind, prefix, device):
    ranks = blobs(3, (5, 7), (7, 3), generator=torch.Generator().manual_seed(0)).to(device)
    # What stands in front has rank -1; the first segment may be let to see itself.
    keys = torch.cat([torch.full((3, prefix), -1, device=device), ranks], dim=1)
    queries = keys if kind == 'source' else ranks
    own, other = queries[:, :, None], keys[:, None]
    visible = other <= own if kind == 'source' else other < own
    if kind == 'self':
        visible = visible | ((own == 0) & (other == 0))

    q, k, v, _, _ = arguments((3, queries.shape[1], keys.shape[1], 2, 32), device=device)
    scores = torch.einsum('bihd,bjhd->bhij', q, k) / math.sqrt(32)
    weights = scores.masked_fill(~visible[:, None], -math.inf).softmax(-1).nan_to_num(0)
    expected = torch.einsum('bhij,bjhd->bihd', weights, v)

    order, sorted_ranks = sort_by_rank(ranks)
    limits = source_limits(sorted_ranks, prefix) if kind == 'source' else memory_limits(sorted_ranks, kind, prefix)
    front = torch.arange(prefix, device=device).expand(3, -1)
    key_order = torch.cat([front, order + prefix], dim=1)
    query_order = key_order if kind == 'source' else order

    def take(x, order):
        return x.gather(1, order[..., None, None].expand(-1, -1, *x.shape[2:]))

    out = segment_attention(take(q, query_order), take(k, key_order), take(v, key_order), limits, impl=impl)
    torch.testing.assert_close(out, take(expected, query_order), atol=1e-5, rtol=1e-5)


@every_implementation
def test_heads_and_images_do_not_mix(impl, device):
    q, k, v, limits, _ = arguments((3, 17, 19, 4, 32), device=device)
    out = segment_attention(q, k, v, limits, impl=impl)
    heads, images = torch.tensor([2, 0, 3, 1], device=device), torch.tensor([1, 2, 0], device=device)
    permuted = segment_attention(q[:, :, heads], k[:, :, heads], v[:, :, heads], limits, impl=impl)
    torch.testing.assert_close(permuted, out[:, :, heads])
    permuted = segment_attention(q[images], k[images], v[images], limits[images], impl=impl)
    torch.testing.assert_close(permuted, out[images])


# Packed layouts


packed_cases = pytest.mark.parametrize('shape, scale', [((2, 17, 17, 3, 32), None), ((1, 65, 65, 2, 32), 0.7)], ids=str)


@every_implementation
@packed_cases
def test_qkvpacked(impl, shape, scale, device):
    q, k, v, limits, grad = arguments(shape, device=device)
    out, *gradients = results(segment_attention, q, k, v, limits, grad, scale=scale, impl=impl)
    qkv = torch.stack([q, k, v], dim=2).requires_grad_()
    packed_out = segment_attention_qkvpacked(qkv, limits, scale=scale, impl=impl)
    packed_out.backward(grad)
    assert_near([packed_out.detach(), qkv.grad], [out, torch.stack(gradients, dim=2)], 1e-5)


@every_implementation
@packed_cases
def test_kvpacked(impl, shape, scale, device):
    q, k, v, limits, grad = arguments((*shape[:2], 23, *shape[3:]), device=device)
    out, *gradients = results(segment_attention, q, k, v, limits, grad, scale=scale, impl=impl)
    q, kv = q.requires_grad_(), torch.stack([k, v], dim=2).requires_grad_()
    packed_out = segment_attention_kvpacked(q, kv, limits, scale=scale, impl=impl)
    packed_out.backward(grad)
    assert_near([packed_out.detach(), q.grad, kv.grad], [out, gradients[0], torch.stack(gradients[1:], dim=2)], 1e-5)


# The choice of an implementation


@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize('queries, keys', [(1, 1), (17, 49), (65, 65), (4, 300)])
def test_auto_is_what_it_chose(dtype, queries, keys, device):
    q, k, v, limits, grad = arguments((1, queries, keys, 2, 16), dtype=dtype, device=device)
    chosen = choose_implementation(q, k)
    assert chosen in IMPLEMENTATIONS
    # On a GPU PyTorch's own backward pass adds in no fixed order.
    same = torch.equal if chosen != 'sdpa' or device == 'cpu' else functools.partial(
        torch.allclose, rtol=1e-5, atol=1e-6)
    expected = results(segment_attention, q, k, v, limits, grad, impl=chosen)
    for options in ({}, {'impl': 'auto'}):
        for got, want in zip(results(segment_attention, q, k, v, limits, grad, **options), expected):
            assert same(got, want)
    packed = segment_attention_kvpacked(q, torch.stack([k, v], dim=2), limits)
    torch.testing.assert_close(packed, expected[0])


def test_an_implementation_can_be_forced(device):
    q, k, v, limits, _ = arguments((2, 17, 19, 2, 32), device=device)
    for impl in IMPLEMENTATIONS:
        if impl == 'triton' and device != DEVICES[-1]:
            continue
        try:
            set_implementation(impl)
            assert choose_implementation(q, k) == impl
            forced = segment_attention(q, k, v, limits)
        finally:
            set_implementation('auto')
        assert torch.equal(forced, segment_attention(q, k, v, limits, impl=impl))
    with pytest.raises(ModelError, match="'flash'"):
        set_implementation('flash')


def test_auto_takes_the_oracle_in_float64():
    q, k, _, _, _ = arguments((1, 300, 300, 1, 8), dtype=torch.float64)
    assert choose_implementation(q, k) == 'eager'


@pytest.mark.parametrize('impl', ['auto', *IMPLEMENTATIONS])
@either_precision
def test_autocast(impl, precision, device, half):
    dtype = half if precision == 'half' else torch.float32
    q, k, v, limits, grad = arguments((2, 17, 19, 2, 32), dtype=dtype, device=device)

    def under_autocast(*args):
        with torch.autocast(device, half):
            return segment_attention(*args, impl=impl)

    actual = results(under_autocast, q, k, v, limits, grad)
    assert [x.dtype for x in actual] == [half] + [dtype] * 3
    assert not actual[0][limits == 0].any()
    assert not actual[1][limits == 0].any()
    # Three roundings to 8 bits on the way to values of order one.
    assert_near(actual, expected_results(q, k, v, limits, grad), 0.05)


@every_implementation
def test_autocast_takes_norms_in_float32_beside_values_in_half_precision(impl, device, half):
    q, k, v, limits, grad = arguments((2, 17, 19, 2, 32), device=device)
    with torch.autocast(device, half):
        out = segment_attention(q, k, v.to(half), limits, impl=impl)
    assert out.dtype == half
    assert_near([out], expected_results(q, k, v, limits, grad)[:1], 0.05)


@pytest.mark.parametrize('impl', ['eager', 'sdpa'])
def test_autocast_leaves_float64_alone(impl, device):
    q, k, v, limits, _ = arguments((2, 17, 19, 2, 32), dtype=torch.float64, device=device)
    with torch.autocast(device, torch.bfloat16):
        assert segment_attention(q, k, v, limits, impl=impl).dtype == torch.float64


@every_implementation
def test_arguments_are_left_as_they_were(impl, device):
    args = arguments((2, 17, 19, 2, 32), device=device)
    copies = [x.clone() for x in args]
    results(segment_attention, *args, impl=impl)
    for x, copy in zip(args, copies):
        assert torch.equal(x, copy)


# Errors of use


def changed(**changes):
    """Valid arguments by name, some of them replaced."""
    q, k, v, limits, _ = arguments((2, 3, 4, 2, 5))
    return {'q': q, 'k': k, 'v': v, 'limits': limits, **changes}


@pytest.mark.parametrize('changes, words', [
    ({'q': torch.zeros(2, 3, 10)}, ['q (2, 3, 10)', '[B, Nq, H, D]']),
    ({'q': torch.zeros(1, 3, 2, 5)}, ['q (1, 3, 2, 5)', 'k (2, 4, 2, 5)', 'same B, H and D']),
    ({'q': torch.zeros(2, 3, 1, 5)}, ['q (2, 3, 1, 5)', 'same B, H and D']),
    ({'q': torch.zeros(2, 3, 2, 6)}, ['q (2, 3, 2, 6)', 'same B, H and D']),
    ({'k': torch.zeros(2, 4, 10)}, ['k (2, 4, 10)', '[B, Nk, H, D]']),
    ({'k': torch.zeros(2, 5, 2, 5)}, ['k (2, 5, 2, 5)', 'v (2, 4, 2, 5)']),
    ({'v': torch.zeros(2, 4, 2, 6)}, ['k (2, 4, 2, 5)', 'v (2, 4, 2, 6)']),
    ({'v': torch.zeros(2, 1, 2, 5)}, ['v (2, 1, 2, 5)']),
    ({'k': torch.zeros(2, 40), 'v': torch.zeros(2, 40)}, ['k (2, 40)', 'v (2, 40)']),
    ({'limits': torch.zeros(2, 3, dtype=torch.int64)}, ['torch.int32', '(2, 3)', 'got torch.int64', 'source_limits']),
    ({'limits': torch.zeros(2, 3)}, ['torch.int32', 'got torch.float32']),
    ({'limits': torch.zeros(2, 3, dtype=torch.bool)}, ['torch.int32', 'got torch.bool']),
    ({'limits': torch.zeros(2, 4, dtype=torch.int32)}, ['shape (2, 3)', 'got torch.int32 (2, 4)', 'memory_limits']),
    ({'limits': torch.zeros(1, 3, dtype=torch.int32)}, ['shape (2, 3)', '(1, 3)']),
    ({'limits': torch.zeros(3, dtype=torch.int32)}, ['shape (2, 3)', '(3,)']),
    ({'limits': torch.zeros(2, 2, 3, dtype=torch.int32)}, ['shape (2, 3)', '(2, 2, 3)']),
    ({'q': torch.zeros(2, 3, 2, 5, dtype=torch.bfloat16)}, ['one dtype', 'torch.bfloat16', 'torch.float32']),
    ({'k': torch.zeros(2, 4, 2, 5, dtype=torch.float64)}, ['one dtype', 'torch.float64', 'torch.float32']),
    ({'v': torch.zeros(2, 4, 2, 5, dtype=torch.float16)}, ['one dtype', 'torch.float16', 'torch.float32']),
    ({'q': torch.zeros(2, 3, 2, 5, device='meta')}, ['one device', 'meta', 'cpu']),
    ({'limits': torch.zeros(2, 3, dtype=torch.int32, device='meta')}, ['one device', 'meta', 'cpu']),
])
@pytest.mark.parametrize('impl', ['auto', *IMPLEMENTATIONS])
def test_tensors_that_do_not_fit_together(impl, changes, words):
    with pytest.raises(ShapeError) as caught:
        segment_attention(**changed(**changes), impl=impl)
    assert isinstance(caught.value, ValueError)
    for word in words:
        assert word in str(caught.value)


def test_packed_layouts_are_checked_too():
    limits = torch.zeros(2, 3, dtype=torch.int32)
    with pytest.raises(ShapeError, match='limits must be'):
        segment_attention_qkvpacked(torch.zeros(2, 4, 3, 2, 5), limits)
    with pytest.raises(ShapeError, match='limits must be'):
        segment_attention_kvpacked(torch.zeros(2, 3, 2, 5), torch.zeros(2, 4, 2, 2, 5), limits.long())
    with pytest.raises(ShapeError, match='same B, H and D'):
        segment_attention_kvpacked(torch.zeros(2, 3, 2, 5), torch.zeros(2, 4, 2, 2, 6), limits)


@pytest.mark.parametrize('shape', [(2, 3, 2, 2, 5), (2, 3, 4, 2, 5), (2, 3, 30)], ids=str)
def test_a_qkv_axis_of_the_wrong_size(shape):
    with pytest.raises(ShapeError):
        segment_attention_qkvpacked(torch.zeros(shape), torch.zeros(2, 3, dtype=torch.int32))


@pytest.mark.parametrize('shape', [(2, 4, 1, 2, 5), (2, 4, 3, 2, 5), (2, 4, 20)], ids=str)
def test_a_kv_axis_of_the_wrong_size(shape):
    with pytest.raises(ShapeError):
        segment_attention_kvpacked(torch.zeros(2, 3, 2, 5), torch.zeros(shape), torch.zeros(2, 3, dtype=torch.int32))


@pytest.mark.parametrize('name, words', [
    ('spda', "Did you mean 'sdpa'"),
    ('eagre', "Did you mean 'eager'"),
    ('Auto', "Did you mean 'auto'"),
    ('flash', 'Known: auto, eager'),
    ('api', 'Unknown implementation'),
])
def test_an_unknown_implementation(name, words):
    q, k, v, limits, _ = arguments((2, 3, 3, 2, 5))
    calls = [
        lambda: segment_attention(q, k, v, limits, impl=name),
        lambda: segment_attention_qkvpacked(torch.stack([q, k, v], dim=2), limits, impl=name),
        lambda: segment_attention_kvpacked(q, torch.stack([k, v], dim=2), limits, impl=name),
    ]
    for call in calls:
        with pytest.raises(ModelError) as caught:
            call()
        assert isinstance(caught.value, ValueError)
        assert repr(name) in str(caught.value)
        assert words in str(caught.value)
