"""Models that run on Triton's kernels: on the GPU where there is one, else in Triton's interpreter."""

import pytest
import timm
import torch

from autoreg_vit import ops

DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'


@pytest.fixture
def forced():
    """Models run on these kernels."""
    ops.set_implementation('triton')
    yield
    ops.set_implementation('auto')


FAMILIES = [
    dict(model_name='randsac_vit_tiny', serialization='blobs', segments=(5, 3)),
    dict(model_name='saim_vit_tiny'),
    dict(model_name='randsac_vit_tiny', decoder='none', serialization='raster'),
]


def small(model_name, depth=2, **options):
    model = timm.create_model(model_name, img_size=16, patch_size=4, embed_dim=64, depth=depth, num_heads=2, **options)
    return model.to(DEVICE)


@pytest.mark.parametrize('options', FAMILIES, ids=lambda o: f'{o["model_name"]}-{o.get("decoder", "own")}')
def test_models_equal_their_eager_selves(options, randomise, forced):
    model = randomise(small(**options), std=0.1)
    images = torch.randn(2, 3, 16, 16, device=DEVICE)
    ranks = model.draw_ranks(2, device=DEVICE)

    def loss_and_gradients():
        model.zero_grad()
        loss = model(images, ranks).loss
        loss.backward()
        return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]

    with_kernels = loss_and_gradients()
    model.set_grad_checkpointing(True)
    for plain, recomputed in zip(with_kernels, loss_and_gradients()):
        torch.testing.assert_close(plain, recomputed)
    model.set_grad_checkpointing(False)
    ops.set_implementation('eager')
    for got, want in zip(with_kernels, loss_and_gradients(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-5 * max(1.0, want.abs().max().item()))


@pytest.mark.parametrize('options', FAMILIES, ids=lambda o: f'{o["model_name"]}-{o.get("decoder", "own")}')
def test_a_whole_model_compiles_to_one_graph(options, forced):
    model = small(depth=1, **options)
    images = torch.randn(2, 3, 16, 16, device=DEVICE)
    ranks = model.draw_ranks(2, device=DEVICE)
    expected = model(images).loss if options.get('decoder') == 'none' else model(images, ranks).loss
    compiled = torch.compile(model, backend='aot_eager', fullgraph=True)
    loss = compiled(images).loss if options.get('decoder') == 'none' else compiled(images, ranks).loss
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.encoder.blocks.parameters())
