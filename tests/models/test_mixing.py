"""The learned mix of memories against its plain definition: values, gradients, precision, memory, tools."""

import pytest
import torch
from torch.autograd import gradcheck
from torch.overrides import TorchFunctionMode

from autoreg_vit.models import mixing
from autoreg_vit.models.mixing import mix_layers

MIXES, LAYERS, SHAPE = 3, 5, (2, 7, 12)


def make(dtype: torch.dtype = torch.float32, weights_dtype: torch.dtype | None = None):
    weights = torch.randn(MIXES, LAYERS, dtype=weights_dtype or dtype, requires_grad=True)
    return weights, [torch.randn(SHAPE, dtype=dtype, requires_grad=True) for _ in range(LAYERS)]


def definition(weights: torch.Tensor, layers: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """In float64, of what is given."""
    return torch.einsum('lk,kbnc->lbnc', weights.double(), torch.stack(layers).double()).unbind(0)


def gradients(mixes, weights, layers):
    torch.manual_seed(1)
    above = [torch.randn(SHAPE).to(torch.bfloat16).to(z.dtype) for z in mixes]  # the same numbers in every dtype
    return torch.autograd.grad(mixes, [weights, *layers], above)


def compiled(weights: torch.Tensor, layers: list[torch.Tensor]) -> list[torch.Tensor]:
    torch.compiler.reset()
    return torch.compile(mix_layers, backend='aot_eager', fullgraph=True)(weights, layers)


@pytest.fixture(params=['whole', 'in parts', 'compiled'])
def way(request, monkeypatch):
    """Eager in one part, and in several of which the last is shorter; and compiled."""
    if request.param == 'in parts':
        monkeypatch.setattr(mixing, '_ON_CPU', 10)
    return compiled if request.param == 'compiled' else mix_layers


@pytest.mark.parametrize(('dtype', 'weights_dtype', 'result'), [
    (torch.float32, torch.float32, torch.float32),
    (torch.float64, torch.float64, torch.float64),
    (torch.float32, torch.float64, torch.float64),
    (torch.bfloat16, torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32, torch.float32),
])
def test_is_its_definition(way, dtype, weights_dtype, result):
    weights, layers = make(dtype, weights_dtype)
    got, expected = way(weights, layers), definition(weights, layers)
    assert {z.dtype for z in got} == {result} and all(z.shape == SHAPE for z in got)
    for a, b in zip(got, expected):
        torch.testing.assert_close(a, b.to(result))
    for a, b in zip(gradients(got, weights, layers), gradients(expected, weights, layers)):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_autocast_rounds_the_result_alone(way, dtype):
    """And neither the layers, nor the sums, nor the gradient of W."""
    weights, layers = make(dtype, torch.float32)
    with torch.autocast('cpu', torch.bfloat16):
        got = way(weights, layers)
        found = gradients(got, weights, layers)
    expected = definition(weights, layers)
    for a, b in zip(got, expected):
        assert a.dtype == torch.bfloat16
        torch.testing.assert_close(a.double(), b, rtol=2 ** -8, atol=1e-6)
    exact = [z.to(torch.bfloat16) for z in expected]
    for a, b in zip(found, gradients(exact, weights, layers)):
        torch.testing.assert_close(a, b)


def test_autocast_leaves_float64_alone(way):
    weights, layers = make(torch.float64)
    with torch.autocast('cpu', torch.bfloat16):
        assert {z.dtype for z in way(weights, layers)} == {torch.float64}


def test_gradients_are_those_of_finite_differences():
    assert gradcheck(lambda w, *layers: tuple(mix_layers(w, layers)), (make(torch.float64)[0], *make(torch.float64)[1]))


def test_a_second_derivative_is_refused():
    weights, layers = make()
    first = torch.autograd.grad(mix_layers(weights, layers)[0].square().sum(), weights, create_graph=True)[0]
    with pytest.raises(RuntimeError, match='once_differentiable'):
        first.sum().backward()


@pytest.mark.parametrize('trained', ['weights', 'layers', 'one layer'])
def test_what_is_frozen_has_no_gradient(way, trained):
    weights, layers = make()
    weights.requires_grad_(trained == 'weights')
    for number, layer in enumerate(layers):
        layer.requires_grad_(trained == 'layers' or (trained == 'one layer' and number == 2))
    sum(z.sum() for z in way(weights, layers)).backward()
    for tensor in (weights, *layers):
        assert (tensor.grad is not None) == tensor.requires_grad


def test_one_mix_alone_is_read(way):
    weights, layers = make()
    way(weights, layers)[1].sum().backward()
    assert weights.grad[1].abs().min() > 0 and not weights.grad[[0, 2]].any()


def test_layers_of_any_strides():
    weights, layers = make()
    turned = [x.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_() for x in layers]
    got, expected = mix_layers(weights, turned), mix_layers(weights, layers)
    assert not turned[0].is_contiguous() and all(map(torch.equal, got, expected))
    for a, b in zip(gradients(got, weights, turned), gradients(expected, weights, layers)):
        assert torch.equal(a, b)


def test_nothing_of_all_layers_is_kept():
    """The backward pass holds the layers themselves and W: no copy, no stack."""
    weights, layers = make()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.data_ptr()) or x, lambda x: x):
        mix_layers(weights, layers)
    assert set(kept) <= {x.data_ptr() for x in (weights, *layers)}


def test_no_stack_of_whole_layers(monkeypatch):
    monkeypatch.setattr(mixing, '_ON_CPU', 10)
    sizes = []

    class Watch(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            if function is torch.stack:
                sizes.append(max(x.numel() for x in args[0]))
            return function(*args, **(kwargs or {}))

    weights, layers = make()
    with Watch():
        sum(z.sum() for z in mix_layers(weights, layers)).backward()
    assert sizes and max(sizes) <= 10


def test_meta_tensors_and_no_gradient():
    weights, layers = make()
    shapes = mix_layers(weights.to('meta'), [x.to('meta') for x in layers])
    assert [z.shape for z in shapes] == [SHAPE] * MIXES
    with torch.no_grad():
        assert not any(z.requires_grad for z in mix_layers(weights, layers))


def test_gradients_in_batches(way):
    """As `torch.autograd.functional.jacobian(vectorize=True)` asks for them."""
    weights, layers = make()
    mixes = way(weights, layers)
    above = torch.randn(2, *SHAPE)
    for mix in (mixes[1], torch.stack(mixes).sum(0)):
        got = torch.autograd.grad(mix, [weights, *layers], above, is_grads_batched=True, retain_graph=True)
        for number, one in enumerate(above):
            for a, b in zip(got, torch.autograd.grad(mix, [weights, *layers], one, retain_graph=True)):
                torch.testing.assert_close(a[number], b)
