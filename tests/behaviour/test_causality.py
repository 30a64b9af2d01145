"""What a prediction may depend on: the image, through attention limits, and nothing of its own segment or a later one.

Every test reads the dependence off the Jacobian in float64, with all parameters redrawn, so that a zero is one of
structure and not of initialisation.
"""

import itertools

import pytest
import timm
import torch
from torch import nn

from autoreg_vit.models.decoders import ParallelDecoder

GRID = (4, 6)
SIZES = {'img_size': (8, 12), 'patch_size': 2, 'in_chans': 1, 'embed_dim': 32, 'depth': 3, 'num_heads': 2}

SERIALIZATIONS = {
    'raster': {'serialization': 'raster'},
    'random': {'serialization': 'random'},
    'squares': {'serialization': 'squares', 'segments': 6},
    'squares hierarchy': {'serialization': 'squares', 'segments': (24, 6)},
    'blobs': {'serialization': 'blobs', 'segments': 5},
    'blobs hierarchy': {'serialization': 'blobs', 'segments': (7, 4, 2)},
    'shuffled blobs': {'serialization': 'blobs', 'segments': (7, 3), 'shuffle': True},
}
#: Those that draw nothing.
FIXED = {'raster'}
DECODERS = {
    'masked mix': {'decoder': 'masked', 'decoder_depth': 2, 'memory': 'mix'},
    'masked last': {'decoder': 'masked', 'decoder_depth': 2, 'memory': 'last'},
    'parallel': {'decoder': 'parallel'},
    'parallel of half the depth': {'decoder': 'parallel', 'depth': 4, 'decoder_depth': 2},
    'shared input': {'decoder': 'parallel', 'shared': True, 'memory': 'input'},
    'shared output': {'decoder': 'parallel', 'shared': True, 'memory': 'output'},
    'none': {'decoder': 'none'},
}
DESIGNS = [(s, d) for s, d in itertools.product(SERIALIZATIONS, DECODERS) if d != 'none' or s == 'raster']
FAMILIES = {'randsac': 'randsac_vit_tiny', 'saim': 'saim_vit_tiny'}


def dependence(function, x: torch.Tensor, patches: bool = True) -> torch.Tensor:
    """How much each output token i depends on each input token j of its image, [B, i, j]: the Jacobian of `function`,
    from x to [B, i, outputs], of a weighted sum of outputs, summed in magnitude over inputs. `x` is images [B, 1, H, W]
    of 2 x 2 patches, or tokens [B, j, C] where `patches` is False."""
    def weighted(x: torch.Tensor) -> torch.Tensor:
        # Images do not mix (a test of its own), so one backward pass serves a token of all images. Weights are drawn,
        # so that no two outputs cancel.
        outputs = function(x)
        return outputs.sum(0) @ torch.rand(outputs.shape[-1:], generator=torch.Generator().manual_seed(0)).to(outputs)

    jacobian = torch.autograd.functional.jacobian(weighted, x, vectorize=True).abs()
    if patches:
        # [i, B, 1, H, W] to pixels of a patch side by side
        jacobian = jacobian.unflatten(4, (-1, 2)).unflatten(3, (-1, 2)).sum((2, 4, 6)).flatten(2)
    else:
        jacobian = jacobian.sum(-1)
    return jacobian.transpose(0, 1)


def assert_flows(matrix: torch.Tensor, allowed: torch.Tensor) -> None:
    """`matrix` [B, N, N] is exactly zero where `allowed` is not, and positive where it is."""
    leaks = (matrix != 0) & ~allowed
    blocked = ~(matrix > 0) & allowed
    assert not leaks.any(), f'information flows where none may: [image, to, from] {leaks.nonzero()[:5].tolist()}'
    assert not blocked.any(), f'information does not flow where it may: {blocked.nonzero()[:5].tolist()}'


def earlier(ranks: torch.Tensor) -> torch.Tensor:
    """Whether token j is of an earlier segment than token i, [B, i, j]."""
    return ranks[:, None, :] < ranks[:, :, None]


def same(ranks: torch.Tensor) -> torch.Tensor:
    """Whether tokens i and j are of one segment, [B, i, j]."""
    return ranks[:, None, :] == ranks[:, :, None]


def build(randomise, family: str, **options):
    return randomise(timm.create_model(FAMILIES[family], **{**SIZES, **options})).double().eval()


def draw(model, batch: int = 2) -> torch.Tensor:
    """Ranks of the model's serialization with at least two segments an image, or nothing would be shown."""
    ranks = model.draw_ranks(batch)
    assert (ranks.amax(1) >= 1).all()
    return ranks


@pytest.mark.parametrize('first_segment', ['self', 'none'])
@pytest.mark.parametrize('family', FAMILIES)
@pytest.mark.parametrize(('serialization', 'decoder'), DESIGNS)
def test_prediction_sees_exactly_the_earlier_segments(randomise, serialization, decoder, family, first_segment):
    model = build(randomise, family, **SERIALIZATIONS[serialization], **DECODERS[decoder], first_segment=first_segment)
    ranks = draw(model)
    images = torch.randn(2, 1, 8, 12, dtype=torch.float64)

    matrix = dependence(lambda x: model(x, ranks).pred, images)

    allowed = earlier(ranks)
    # 'none' predicts the first token from no patch at all.
    if first_segment == 'self' and decoder != 'none':
        allowed = allowed | (same(ranks) & (ranks == 0)[:, :, None])
    assert_flows(matrix, allowed)


@pytest.mark.parametrize('family', FAMILIES)
@pytest.mark.parametrize('decoder', DECODERS)
def test_images_do_not_mix(randomise, decoder, family):
    model = build(randomise, family, serialization='raster', **DECODERS[decoder])
    images = torch.randn(3, 1, 8, 12, dtype=torch.float64, requires_grad=True)

    model(images).pred[1].sum().backward()

    assert (images.grad[1] != 0).any()
    assert (images.grad[0] == 0).all()
    assert (images.grad[2] == 0).all()


@pytest.mark.parametrize('family', FAMILIES)
def test_papers_first_segments(randomise, family):
    """RandSAC's first segment attends to its own encoding (4.1); SAIM's sees no patch. Both are the default."""
    model = build(randomise, family)
    ranks = draw(model)
    images = torch.randn(2, 1, 8, 12, dtype=torch.float64)

    matrix = dependence(lambda x: model(x, ranks).pred, images)

    first = (ranks == 0)[:, :, None] & (ranks == 0)[:, None, :]
    if family == 'randsac':
        assert (matrix[first] > 0).all()
    else:
        assert (matrix[first] == 0).all()


@pytest.mark.parametrize('decoder', [d for d in DECODERS if d != 'none'])
@pytest.mark.parametrize('prefix', [{'class_token': True, 'reg_tokens': 3}, {'class_token': False, 'reg_tokens': 2}])
def test_registers_carry_nothing_back(randomise, decoder, prefix):
    model = build(randomise, 'randsac', **prefix, serialization='blobs', segments=5, **DECODERS[decoder])
    ranks = draw(model)
    images = torch.randn(2, 1, 8, 12, dtype=torch.float64)

    matrix = dependence(lambda x: model(x, ranks).pred, images)

    assert_flows(matrix, earlier(ranks) | (same(ranks) & (ranks == 0)[:, :, None]))


@pytest.mark.parametrize('registers', [0, 2])
def test_next_token_decoder_starts_from_the_last_prefix_token(randomise, registers):
    model = build(randomise, 'saim', serialization='raster', decoder='none', reg_tokens=registers)
    ranks = draw(model)
    images = torch.randn(2, 1, 8, 12, dtype=torch.float64)

    assert_flows(dependence(lambda x: model(x).pred, images), earlier(ranks))
    model(images).pred[:, 0].sum().backward()
    assert model.encoder.cls_token.grad.abs().sum() > 0


class EncoderOutput(nn.Module):
    """A decoder that hands on the encoder's last hidden states, so that a prediction shows what the encoder sees."""

    def __init__(self, dim: int, block: int = -1):
        super().__init__()
        self.dim = dim
        self.block = block

    def forward(self, hidden, layout, encoder):
        return hidden[self.block][:, encoder.num_prefix_tokens:]


@pytest.mark.parametrize('family', FAMILIES)
@pytest.mark.parametrize('serialization', SERIALIZATIONS)
@pytest.mark.parametrize('block', [1, -1])
def test_encoder_sees_its_own_segment_and_earlier_ones(randomise, serialization, family, block):
    model = build(randomise, family, **SERIALIZATIONS[serialization])
    model.decoder = EncoderOutput(32, block)
    ranks = draw(model)
    images = torch.randn(2, 1, 8, 12, dtype=torch.float64)

    matrix = dependence(lambda x: model(x, ranks).pred, images)

    assert_flows(matrix, earlier(ranks) | same(ranks))


@pytest.mark.parametrize('first_segment', ['self', 'none'])
@pytest.mark.parametrize('serialization', SERIALIZATIONS)
def test_masked_decoder_queries_see_their_own_segment_and_earlier_ones(randomise, serialization, first_segment):
    """The decoder's self-attention has the encoder's source mask (RandSAC 4.1), seen here through its positions."""
    model = build(randomise, 'randsac', **SERIALIZATIONS[serialization], **DECODERS['masked mix'],
                  first_segment=first_segment)
    ranks = draw(model)
    images = torch.randn(2, 1, 8, 12, dtype=torch.float64)
    positions = model.decoder.pos_embed.detach().expand(2, -1, -1)

    def predict(positions):
        return torch.func.functional_call(model, {'decoder.pos_embed': positions}, (images, ranks)).pred

    # Layout.sort would expand a single row; with one row an image, positions are told apart by image too.
    matrix = dependence(predict, positions, patches=False)

    assert_flows(matrix, earlier(ranks) | same(ranks))


@pytest.mark.parametrize('decoder', [d for d in DECODERS if d.startswith(('parallel', 'shared'))])
@pytest.mark.parametrize('family', FAMILIES)
def test_parallel_queries_do_not_see_each_other(randomise, decoder, family):
    """A query knows its own position and, through the encoder, those of earlier segments alone (SAIM Eq. 5)."""
    model = build(randomise, family, **SERIALIZATIONS['blobs'], **DECODERS[decoder], first_segment='none')
    assert isinstance(model.decoder, ParallelDecoder)
    ranks = draw(model, 1)
    images = torch.randn(1, 1, 8, 12, dtype=torch.float64)
    prefix = model.encoder.num_prefix_tokens

    def predict(positions):
        return torch.func.functional_call(model, {'encoder.pos_embed': positions}, (images, ranks)).pred

    matrix = dependence(predict, model.encoder.pos_embed.detach(), patches=False)

    own = torch.eye(ranks.shape[1], dtype=torch.bool)[None]
    assert_flows(matrix[:, :, prefix:], earlier(ranks) | own)
    assert (matrix[:, :, :prefix] > 0).all()  # everything sees the class token


@pytest.mark.parametrize('decoder', DECODERS)
def test_every_prediction_sees_the_class_token(randomise, decoder):
    model = build(randomise, 'saim', serialization='raster', **DECODERS[decoder])
    ranks = draw(model, 1)
    images = torch.randn(1, 1, 8, 12, dtype=torch.float64)

    def predict(token):
        return torch.func.functional_call(model, {'encoder.cls_token': token}, (images, ranks)).pred

    assert (dependence(predict, model.encoder.cls_token.detach(), patches=False) > 0).all()


@pytest.mark.parametrize('family', FAMILIES)
@pytest.mark.parametrize('decoder', [d for d in DECODERS if d != 'none'])
def test_prediction_depends_on_position(randomise, decoder, family):
    """Tokens of one segment see the same patches: only their positions tell their predictions apart."""
    model = build(randomise, family, **DECODERS[decoder], serialization='squares', segments=6)
    ranks = draw(model)
    pred = model(torch.randn(2, 1, 8, 12, dtype=torch.float64), ranks).pred

    distance = (pred[:, :, None] - pred[:, None]).abs().amax(-1)
    other = same(ranks) & ~torch.eye(24, dtype=torch.bool)
    assert other.any()
    assert (distance[other] > 1e-3).all()


@pytest.mark.parametrize('decoder', [d for d in DECODERS if d != 'none'])
@pytest.mark.parametrize('family', FAMILIES)
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_no_leak_in_training_precision(randomise, decoder, family, dtype):
    """A change to one segment leaves every prediction that may not see it the same, bit for bit."""
    model = build(randomise, family, serialization='blobs', segments=(7, 3), **DECODERS[decoder]).float()
    ranks = draw(model, 4)
    images = torch.randn(4, 1, 8, 12)
    changed = torch.where(_segment_pixels(ranks == 1), torch.randn_like(images) * 5, images)

    with torch.no_grad(), torch.autocast('cpu', dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        before, after = model(images, ranks).pred, model(changed, ranks).pred

    moved = (before != after).any(-1)
    assert not moved[ranks <= 1].any()
    assert moved[ranks > 1].all()


def _segment_pixels(tokens: torch.Tensor) -> torch.Tensor:
    """Tokens [B, N] as a mask of their pixels [B, 1, H, W]."""
    return tokens.unflatten(1, GRID).repeat_interleave(2, 1).repeat_interleave(2, 2)[:, None]


@pytest.mark.parametrize('family', FAMILIES)
@pytest.mark.parametrize('serialization', SERIALIZATIONS)
def test_given_ranks_are_followed_and_returned(randomise, serialization, family):
    model = build(randomise, family, **SERIALIZATIONS[serialization]).float()
    images = torch.randn(3, 1, 8, 12)
    ranks = draw(model, 3)

    first, second = model(images, ranks), model(images, ranks)

    assert torch.equal(first.loss, second.loss)
    assert torch.equal(first.pred, second.pred)
    assert torch.equal(first.ranks, ranks)
    drawn = model(images)
    assert drawn.ranks.dtype == torch.int64
    assert torch.equal(model(images, drawn.ranks).loss, drawn.loss)


@pytest.mark.parametrize('family', FAMILIES)
@pytest.mark.parametrize('serialization', [s for s in SERIALIZATIONS if s not in FIXED])
def test_two_draws_differ(randomise, serialization, family):
    model = build(randomise, family, **SERIALIZATIONS[serialization]).float()
    images = torch.randn(1, 1, 8, 12).expand(3, -1, -1, -1)

    first, second = model(images), model(images)

    assert not torch.equal(first.ranks, second.ranks)
    assert not torch.equal(first.loss, second.loss)
    assert not torch.equal(first.ranks[0], first.ranks[1])  # and so do the images of one batch
