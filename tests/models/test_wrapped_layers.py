"""Layers that something else has wrapped, hooked or parametrized are used as they are, in every registered design."""

import pytest
import timm
import torch
from torch import nn
from torch.nn.utils import parametrize

import autoreg_vit  # noqa: F401
from autoreg_vit.models.designs import pretraining_models

SMALL = dict(img_size=16, patch_size=4, depth=2, embed_dim=32, num_heads=1)
DESIGNS = {
    'randsac': ('randsac_vit_tiny_patch4_32', dict(segments=3, decoder_depth=1)),
    'two-stream': ('randsac_vit_tiny_patch4_32', dict(segments=3, decoder='parallel', shared=True)),
    'saim': ('saim_vit_tiny_patch4_32', {}),
    'saim, shared': ('saim_vit_tiny_patch4_32', dict(shared=True, memory='output')),
    'igpt': ('randsac_vit_tiny_patch4_32', dict(serialization='raster', decoder='none')),
}


class Adapted(nn.Module):
    """A Linear with a low-rank addition; `weight` and `bias` are the base's, as adapters show them."""

    def __init__(self, base: nn.Linear):
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, 2, bias=False)
        self.up = nn.Linear(2, base.out_features, bias=False)

    weight = property(lambda self: self.base.weight)
    bias = property(lambda self: self.base.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.up(self.down(x))


def linears(model: nn.Module) -> list[tuple[nn.Module, str, nn.Linear]]:
    return [(parent, name, child) for parent in model.modules() for name, child in parent.named_children()
            if type(child) is nn.Linear]


def make(design: str) -> nn.Module:
    name, options = DESIGNS[design]
    torch.manual_seed(0)
    return timm.create_model(name, **{**SMALL, **options})


def test_every_method_is_here():
    assert {name.split('_')[0] for name in pretraining_models()} == {'randsac', 'saim'}


@pytest.mark.parametrize('design', DESIGNS)
def test_every_adapter_has_effect_and_gradient(design: str):
    model, images = make(design), torch.randn(2, 3, 16, 16)
    for parent, name, layer in linears(model):
        setattr(parent, name, Adapted(layer))
    model(images).loss.backward()
    adapters = {n: p for n, p in model.named_parameters() if n.endswith(('.down.weight', '.up.weight'))}
    assert len(adapters) >= 2 * 4 * SMALL['depth']
    dead = [n for n, p in adapters.items() if p.grad is None or not p.grad.abs().max() > 0]
    assert not dead


@pytest.mark.parametrize('design', ['saim', 'two-stream'])
@pytest.mark.parametrize('how', ['hook', 'pre-hook', 'parametrization', 'forward'])
def test_cross_attention_takes_a_layer_as_it_is(design: str, how: str):
    """Zeroing the packed projection's output by any means gives what zero weights give."""
    images = torch.randn(2, 3, 16, 16)
    plain, changed = make(design), make(design)
    ranks = plain.draw_ranks(2)
    for model in (plain, changed):
        for part in [p for p in model.modules() if isinstance(getattr(p, 'qkv', None), nn.Linear)]:
            layer = part.qkv
            if model is plain:
                nn.init.zeros_(layer.weight)
                nn.init.zeros_(layer.bias)
            elif how == 'hook':
                layer.register_forward_hook(lambda module, args, out: torch.zeros_like(out))
            elif how == 'pre-hook':
                nn.init.zeros_(layer.bias)
                layer.register_forward_pre_hook(lambda module, args: (torch.zeros_like(args[0]),))
            elif how == 'parametrization':
                for name in ('weight', 'bias'):
                    parametrize.register_parametrization(layer, name, Zero())
            else:
                layer.forward = lambda x, width=layer.out_features: x.new_zeros(*x.shape[:-1], width)
    with torch.no_grad():
        torch.testing.assert_close(changed(images, ranks).pred, plain(images, ranks).pred)


class Zero(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(x)


@pytest.mark.parametrize('design', DESIGNS)
def test_dynamic_quantization(design: str):
    model, images = make(design).eval(), torch.randn(2, 3, 16, 16)
    ranks = model.draw_ranks(2)
    small = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    with torch.no_grad():
        expected, got = model(images, ranks).pred, small(images, ranks).pred
    assert 0 < (got - expected).norm() < 0.1 * expected.norm()


@pytest.mark.parametrize('design', DESIGNS)
def test_export_takes_every_batch(design: str):
    model, batch = make(design).eval(), torch.export.Dim('batch', min=2, max=64)
    program = torch.export.export(model, (torch.randn(3, 3, 16, 16), model.draw_ranks(3)),
                                  dynamic_shapes=({0: batch}, {0: batch})).module()
    images, ranks = torch.randn(5, 3, 16, 16), model.draw_ranks(5)
    with torch.no_grad():
        torch.testing.assert_close(program(images, ranks).pred, model(images, ranks).pred, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize('design', DESIGNS)
def test_hooks_fire_as_documented(design: str):
    model, fired = make(design), set()
    for name, module in model.encoder.blocks[0].named_modules(prefix='block'):
        module.register_forward_hook(lambda module, args, out, name=name: fired.add(name))
    model(torch.randn(2, 3, 16, 16))
    assert {'block.norm1', 'block.attn.qkv', 'block.attn.proj', 'block.norm2', 'block.mlp', 'block.mlp.fc1'} <= fired
    assert not fired & {'block', 'block.attn'}
    model.encoder(torch.randn(2, 3, 16, 16))
    assert {'block', 'block.attn'} <= fired
