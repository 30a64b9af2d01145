"""How calls reach Triton's kernels: copies of what they cannot address, the autograd function of eager calls, the
custom operator of all others, and the transformations that are refused."""

import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from autoreg_vit import ops
from autoreg_vit.errors import ModelError
from autoreg_vit.ops import segment_attention, segment_attention_kvpacked, segment_attention_qkvpacked
from autoreg_vit.ops import triton as kernels
from autoreg_vit.ops.packing import split
from autoreg_vit.ops.triton import addressing
from benchmarks import host_cost
from tests.ops.test_ops import arguments, assert_near, expected_results
from tests.ops.test_triton import DEVICE, attention, on_a_gpu


def packed(packing, q, k, v):
    return {'separate': [q, k, v], 'kv': [q, torch.stack([k, v], 2)], 'qkv': [torch.stack([q, k, v], 2)]}[packing]


def attend_packed(projections, limits):
    attend = {1: segment_attention_qkvpacked, 2: segment_attention_kvpacked, 3: segment_attention}[len(projections)]
    return attend(*projections, limits, impl='triton')


every_packing = pytest.mark.parametrize('packing', ['separate', 'kv', 'qkv'])


# Offsets that int32 cannot hold


@pytest.fixture
def launched(monkeypatch):
    """All tensors [B, N, H, D] that launchers were given."""
    given = []
    for module, name in ((kernels._forward, 'forward'), (kernels._backward, 'gradients')):
        launch = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args, launch=launch: (
            given.extend(x for x in args if isinstance(x, torch.Tensor) and x.ndim == 4), launch(*args))[1])
    return given


@every_packing
@pytest.mark.parametrize('largest', [30 * 2 * 32, 5000])
def test_strides_beyond_reach_are_copied(packing, largest, launched, monkeypatch):
    """As if int32 ended where a contiguous tensor of one image does, or where no packed one fits."""
    q, k, v, limits, grad = arguments((2, 30, 30, 2, 32), device=DEVICE)
    expected = expected_results(q, k, v, limits, grad)
    monkeypatch.setattr(addressing, 'LARGEST_OFFSET', largest)
    monkeypatch.setattr(kernels, 'LARGEST_OFFSET', largest)
    # Tokens outermost: a row's stride holds the batch.
    q, k, v = (x.transpose(0, 1).contiguous().transpose(0, 1) for x in (q, k, v))
    projections = [x.requires_grad_() for x in packed(packing, q, k, v)]
    out = attend_packed(projections, limits)
    gradients = split(torch.autograd.grad(out, projections, grad))
    assert_near([out.detach(), *gradients], expected, 1e-5)
    assert len(launched) == 3 + 8
    assert all((x.shape[1] - 1) * x.stride(1) + 32 <= largest for x in launched)


@pytest.mark.parametrize('largest, copied', [(2 * 96_000 - 1, True), (2 * 96_000, False)])
def test_heads_beyond_reach_are_copied(largest, copied, launched, monkeypatch):
    q, k, v, limits, _ = arguments((1, 5, 5, 3, 32), device=DEVICE)
    monkeypatch.setattr(addressing, 'LARGEST_OFFSET', largest)
    far = torch.zeros(3, 3000, 32, device=DEVICE)[:, :5].transpose(0, 1)[None].copy_(k)  # heads 96,000 elements apart
    assert_near([attention(q, far, v, limits)], [segment_attention(q, k, v, limits, impl='eager')], 1e-5)
    assert launched[1].is_contiguous() == copied


def test_an_image_beyond_reach_is_refused(monkeypatch):
    q, k, v, limits, _ = arguments((1, 6, 5, 2, 32), device=DEVICE)
    monkeypatch.setattr(kernels, 'LARGEST_OFFSET', 6 * 2 * 32 - 1)
    with pytest.raises(ModelError, match=r'at most 383 elements of q and of k, got q \(1, 6, 2, 32\), k \(1, 5,'):
        attention(q, k, v, limits)
    with pytest.raises(ModelError, match='at most 383 elements'):
        attention(k, q, q, limits[:, :5])
    assert_near([attention(k, k, v, limits[:, :5])], [segment_attention(k, k, v, limits[:, :5], impl='eager')], 1e-5)


def test_keys_more_than_2_to_the_31_elements_apart():
    tokens, apart = 24, 100_000_000
    try:
        store = torch.empty(tokens * apart, dtype=torch.float16, device=DEVICE)  # 5 GB, next to none of it touched
    except RuntimeError as error:
        pytest.skip(f'needs 5 GB of address space: {error}')
    q, k, v, limits, _ = arguments((1, tokens, tokens, 1, 32), dtype=torch.float16, device=DEVICE)
    far = store.as_strided(k.shape, (apart, apart, 32, 1)).copy_(k)
    assert torch.equal(attention(q, far, v, limits), attention(q, k, v, limits))


# Two doors: an autograd function for eager calls, a custom operator for what traces and watches


@every_packing
def test_opcheck(packing):
    q, k, v, limits, _ = arguments((1, 5, 5, 1, 32), device=DEVICE)
    projections = [x.requires_grad_() for x in packed(packing, q, k, v)]
    torch.library.opcheck(torch.ops.autoreg_vit.segment_attention.default, (projections, limits, 0.2))
    out, lse = torch.ops.autoreg_vit.segment_attention(projections, limits, 0.2)
    torch.library.opcheck(torch.ops.autoreg_vit.segment_attention_backward.default, (
        torch.ones_like(out), [x.detach() for x in projections], limits, out.detach(), lse.detach(), 0.2))


@every_packing
def test_both_doors_lead_to_the_same_numbers(packing, monkeypatch):
    q, k, v, limits, grad = arguments((2, 17, 17, 2, 32), device=DEVICE)
    projections = [x.requires_grad_() for x in packed(packing, q, k, v)]

    def once():
        out = attend_packed(projections, limits)
        return [out, *torch.autograd.grad(out, projections, grad)]

    with OperatorNames() as names:
        through_operator = once()
    assert names.own == ['segment_attention', 'segment_attention_backward']
    with monkeypatch.context() as patch:
        for operator in ('_run_forward_operator', '_run_backward_operator'):
            patch.setattr(kernels, operator, None)
        light = once()
    for a, b in zip(light, through_operator, strict=True):
        assert torch.equal(a, b)


class OperatorNames(TorchDispatchMode):
    """Names of this package's operators in the order in which they ran."""

    def __init__(self):
        super().__init__()
        self.own = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == 'autoreg_vit':
            self.own.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@every_packing
def test_an_eager_call_costs_the_host_little(packing):
    """In calls of functions, which are the same on any machine, however busy: 2.4 times those of a plain autograd
    function forward and 1.4 with backward, where the operator makes 7 and 3.4 times as many."""
    layout = {'separate': 'q,k,v', 'kv': 'q+kv', 'qkv': 'qkv'}[packing]
    counts = {}
    with host_cost.without_kernels():
        for way, (call, inputs) in host_cost.ways(layout, torch.device(DEVICE)).items():
            grad = torch.zeros_like(call()[0])
            with host_cost.through(way):
                counts[way] = (
                    calls(call), calls(lambda c=call, i=inputs, g=grad: torch.autograd.grad(c(), i, g)))
    forward, both = (counts['segment_attention'][i] / counts['plain'][i] for i in (0, 1))
    assert forward < 3.5 and both < 2
    # What is counted tells the two apart.
    assert counts['operator'][0] > 2 * counts['segment_attention'][0]


def calls(function):
    """Calls of functions, of Python's and of C's, that `function` makes when it is not the first time."""
    function()
    made = []
    sys.setprofile(lambda frame, event, _: made.append(event) if event in ('call', 'c_call') else None)
    try:
        function()
    finally:
        sys.setprofile(None)
    return len(made)


def on(impl):
    """`impl` on one projection, and that projection and a direction to differentiate in."""
    q, k, v, limits, _ = arguments((2, 5, 5, 1, 32), device=DEVICE)
    qkv = torch.stack([q, k, v], 2)
    return lambda x: segment_attention_qkvpacked(x, limits, impl=impl), qkv, qkv.flip(1)


def dual(attend, qkv, direction):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(attend(forward_ad.make_dual(qkv, direction))).tangent


def compiled_dual(attend, qkv, direction):
    compiled = torch.compile(attend, backend='aot_eager')
    compiled(qkv)  # what was compiled without duals is not what they get
    return dual(compiled, qkv, direction)


def dual_gradient(attend, qkv, direction):
    qkv.requires_grad_()
    out = attend(qkv)
    with forward_ad.dual_level():
        grad = forward_ad.make_dual(torch.ones_like(out), out.detach())
        return forward_ad.unpack_dual(torch.autograd.grad(out, qkv, grad)[0]).tangent


def second_derivative(attend, qkv, direction):
    qkv.requires_grad_()
    first, = torch.autograd.grad(attend(qkv).square().sum(), qkv, create_graph=True)
    return torch.autograd.grad(first, qkv, direction)[0]


def compiled_jvp(attend, qkv, direction):
    return torch.compile(lambda x, d: torch.func.jvp(attend, (x,), (d,))[1], backend='aot_eager')(qkv, direction)


TRANSFORMS = {
    'grad': lambda f, x, d: torch.func.grad(lambda y: f(y).square().sum())(x),
    'vjp': lambda f, x, d: torch.func.vjp(f, x)[1](torch.ones_like(f(x)))[0],
    'jvp': lambda f, x, d: torch.func.jvp(f, (x,), (d,))[1],
    'vmap': lambda f, x, d: torch.func.vmap(f)(torch.stack([x, d])),
    'jacfwd': lambda f, x, d: torch.func.jacfwd(lambda y: f(y).sum((0, 1)))(x),
    'compiled jvp': compiled_jvp,
    'dual': dual, 'compiled dual': compiled_dual, 'dual gradient': dual_gradient,
    'second derivative': second_derivative,
}


@pytest.mark.parametrize('transform', TRANSFORMS.values(), ids=TRANSFORMS)
def test_derivatives_that_the_kernels_lack_are_refused(transform):
    torch._dynamo.reset()
    assert transform(*on('eager')).abs().sum() > 0
    with pytest.raises(ModelError, match=r"impl='triton' (has|takes) no .*impl='(eager|auto)'"):
        transform(*on('triton'))


def test_auto_has_forward_mode_derivatives():
    transform = TRANSFORMS['jvp']
    torch.testing.assert_close(transform(*on('auto')), transform(*on('eager')))


def test_batched_gradients_are_refused():
    attend, qkv, _ = on('triton')
    out = attend(qkv.requires_grad_())
    with pytest.raises((RuntimeError, ModelError)):
        torch.autograd.grad(out, qkv, torch.stack([out.detach(), out.detach()]), is_grads_batched=True)


def test_auto_on_a_gpu_takes_what_a_transform_can_go_through(monkeypatch):
    on_a_gpu(monkeypatch)
    chosen = []

    def choose(x):
        q = torch.empty(2, 17, 3, 64, device='cuda')
        chosen.append(ops.choose_implementation(q, q))
        return x

    with FakeTensorMode(allow_non_fake_inputs=True):
        choose(None)
        x = torch.zeros(3)
        torch.func.grad(lambda x: choose(x).sum())(x)
        torch.func.jvp(choose, (x,), (x,))
        with forward_ad.dual_level():
            choose(None)
    assert chosen == ['triton', 'sdpa', 'eager', 'eager']


def test_first_derivatives_are_right_where_a_graph_of_them_is_kept():
    results = []
    for impl in ('triton', 'eager'):
        attend, qkv, _ = on(impl)
        qkv.requires_grad_()
        results.append(torch.autograd.grad(attend(qkv).square().sum(), qkv, create_graph=True)[0].detach())
    torch.testing.assert_close(*results)


class Attend(torch.nn.Module):
    def forward(self, qkv, limits):
        return segment_attention_qkvpacked(qkv, limits, impl='triton')


def with_fake_tensors(qkv, limits):
    with FakeTensorMode() as mode:
        fake = mode.from_tensor(qkv).requires_grad_()
        out = Attend()(fake, mode.from_tensor(limits))
        gradient, = torch.autograd.grad(out.sum(), fake)
    assert gradient.shape == qkv.shape
    return torch.zeros(out.shape, device=DEVICE)


def with_a_subclass(qkv, limits):
    class Watched(torch.Tensor):
        pass

    out = Attend()(qkv.as_subclass(Watched), limits)
    assert type(out) is Watched
    return out.as_subclass(torch.Tensor)


TRACERS = {
    'export': lambda qkv, limits: torch.export.export(Attend(), (qkv, limits)).module()(qkv + 1, limits),
    'make_fx': lambda qkv, limits: make_fx(Attend())(qkv, limits)(qkv + 1, limits),
    'pre-dispatch': lambda qkv, limits: make_fx(Attend(), pre_dispatch=True)(qkv, limits)(qkv + 1, limits),
    'jit': lambda qkv, limits: torch.jit.trace(Attend(), (qkv, limits))(qkv + 1, limits),
    'compile': lambda qkv, limits: torch.compile(Attend(), backend='aot_eager', fullgraph=True)(qkv + 1, limits),
    'subclass': lambda qkv, limits: with_a_subclass(qkv + 1, limits),
}


@pytest.mark.parametrize('tracer', TRACERS.values(), ids=TRACERS)
@pytest.mark.filterwarnings('ignore::torch.jit.TracerWarning', 'ignore:.*torch.jit:FutureWarning')
def test_what_was_traced_computes(tracer):
    """On other values than it was traced with: nothing was baked in."""
    torch._dynamo.reset()
    q, k, v, limits, _ = arguments((2, 5, 5, 1, 32), device=DEVICE)
    qkv = torch.stack([q, k, v], 2)
    expected = segment_attention_qkvpacked(qkv + 1, limits, impl='eager')
    torch.testing.assert_close(tracer(qkv, limits), expected, rtol=1e-5, atol=1e-5)


def test_fake_tensors_have_shapes():
    q, k, v, limits, _ = arguments((2, 5, 5, 1, 32), device=DEVICE)
    assert with_fake_tensors(torch.stack([q, k, v], 2), limits).shape == (2, 5, 1, 32)
