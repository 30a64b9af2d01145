"""The patch embedding by a product, against timm's convolution; and steps of every design, against the formulas that
they are."""

import pytest
import timm
import torch
from torch import nn
from torch.nn.utils import parametrize

from autoreg_vit.models import decoders, embedding, pretraining
from autoreg_vit.models.embedding import embed_patches
from autoreg_vit.models.interface import positions_of
from tests.support.designs import DESIGNS, build, images

STEPS = {
    **{name: (name, {}) for name in DESIGNS},
    'mix from the mean': ('randsac', {'mix_init': 'uniform'}),
    'squares': ('randsac', {'serialization': 'squares', 'segments': 4}),
    'aim': ('randsac next token', {'serialization': 'prefix_raster', 'first_segment': 'given', 'head': 'mlp'}),
    'part encoded': ('randsac', {'encode_ratio': 0.5}),
    'all but the last encoded': ('saim', {'encode_last': False}),
}


def by_convolution(encoder, pictures, layout):
    """What a patch embedding with positions is, in timm's own words."""
    positions = positions_of(encoder)[:, encoder.num_prefix_tokens:]
    return layout.sort(encoder.patch_embed(pictures) + positions, layout.encoded)


def by_stack(weights, layers):
    """RandSAC 4.2 in one line."""
    return torch.einsum('lk,kbnc->lbnc', weights, torch.stack(layers)).unbind()


def losses(model: nn.Module, autocast: bool) -> list[float]:
    """Of ten steps of SGD, three in bfloat16, which is slow on a CPU, on images and ranks of their own."""
    torch.manual_seed(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    found = []
    for _ in range(3 if autocast else 10):
        with torch.autocast('cpu', torch.bfloat16, enabled=autocast):
            loss = model(images(8)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


@pytest.mark.parametrize('autocast', [False, True], ids=['float32', 'bfloat16'])
@pytest.mark.parametrize('step', STEPS)
def test_ten_steps(tiny, step, autocast, monkeypatch):
    """Rounding alone tells them from steps with a convolution and a stack: 1e-5 of the loss in float32, and 1 % in
    bfloat16, where each number is rounded to 0.4 %."""
    design, options = STEPS[step]
    torch.manual_seed(0)
    model = build(tiny, design, **options)
    start = {name: value.clone() for name, value in model.state_dict().items()}
    got = losses(model, autocast)
    model.load_state_dict(start)
    monkeypatch.setattr(pretraining, 'embed_patches', by_convolution)
    monkeypatch.setattr(decoders, 'mix_layers', by_stack)
    expected = losses(model, autocast)
    assert got == pytest.approx(expected, rel=1e-2 if autocast else 1e-5)
    assert abs(expected[0] - expected[-1]) > 1e-4


def embedded(options: dict, change=lambda encoder: None, image_size=(8, 12), channels=2):
    """Sorted embeddings of a model, and its encoder."""
    torch.manual_seed(0)
    model = timm.create_model('randsac_vit_tiny', **{
        'img_size': image_size, 'patch_size': (2, 3), 'in_chans': channels, 'embed_dim': 32, 'depth': 1, 'num_heads': 2,
        'segments': 3, **options})
    nn.init.normal_(model.encoder.patch_embed.proj.bias)
    change(model.encoder)
    layout = model._layout(model.draw_ranks(3))
    return model.encoder, torch.randn(3, channels, *image_size), layout


@pytest.mark.parametrize('options', [
    {}, {'class_token': True, 'reg_tokens': 2}, {'encode_ratio': 0.25},
    {'embed_norm_layer': 'layernorm'},
])
@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last])
def test_is_the_convolution(options, memory_format):
    """Oblong patches of an oblong image, its values and gradients."""
    encoder, pictures, layout = embedded(options)
    pictures = pictures.to(memory_format=memory_format)
    parameters = list(encoder.patch_embed.parameters())
    got, expected = (f(encoder, pictures, layout) for f in (embed_patches, by_convolution))
    assert got.shape == (3, layout.encoded, 32)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    above = torch.randn_like(got)
    for a, b in zip(*(torch.autograd.grad(x, parameters, above) for x in (got, expected))):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_convolves_nothing_and_embeds_what_is_encoded(monkeypatch):
    encoder, pictures, layout = embedded({'encode_ratio': 0.25})
    taken, linear = [], torch.nn.functional.linear
    monkeypatch.setattr(nn.Conv2d, 'forward', lambda *args: pytest.fail('a convolution'))
    monkeypatch.setattr(embedding.F, 'linear', lambda x, *rest: taken.append(x.shape) or linear(x, *rest))
    embed_patches(encoder, pictures, layout)
    assert taken == [(3, 4, 12)]


class Wrapped(nn.Module):
    """An adapter around a convolution, with the attributes of what it wraps."""

    def __init__(self, base: nn.Conv2d):
        super().__init__()
        self.base = base
        self.in_channels, self.kernel_size, self.stride = base.in_channels, base.kernel_size, base.stride

    weight = property(lambda self: self.base.weight)
    bias = property(lambda self: self.base.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * self.base(x)


class Doubled(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * x


def double_output(module, args, out):
    return 2 * out


def own_forward(module: nn.Module) -> None:
    forward = module.forward
    module.forward = lambda x: 2 * forward(x)


CHANGES = {
    'wrapped projection': lambda e: setattr(e.patch_embed, 'proj', Wrapped(e.patch_embed.proj)),
    'hooked projection': lambda e: e.patch_embed.proj.register_forward_hook(double_output),
    'pre-hooked projection': lambda e: e.patch_embed.proj.register_forward_pre_hook(lambda m, args: (2 * args[0],)),
    'parametrized projection': lambda e: parametrize.register_parametrization(e.patch_embed.proj, 'weight', Doubled()),
    'forward of the projection': lambda e: own_forward(e.patch_embed.proj),
    'hooked embedding': lambda e: e.patch_embed.register_forward_hook(double_output),
    'forward of the embedding': lambda e: own_forward(e.patch_embed),
}


@pytest.mark.parametrize('change', CHANGES)
def test_takes_a_projection_as_it_is(change):
    encoder, pictures, layout = embedded({})
    before = embed_patches(encoder, pictures, layout)
    CHANGES[change](encoder)
    after = embed_patches(encoder, pictures, layout)
    assert torch.equal(after, by_convolution(encoder, pictures, layout))
    assert not torch.allclose(after, before)


def test_state_and_other_sizes_are_timms():
    encoder, pictures, layout = embedded({})
    assert encoder.patch_embed.proj.weight.shape == (32, 2, 2, 3)
    with pytest.raises(AssertionError):
        embed_patches(encoder, pictures[:, :, :, :9], layout)
    with pytest.raises(RuntimeError):
        embed_patches(encoder, pictures.double(), layout)
