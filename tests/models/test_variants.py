"""Designs of neither paper: segments in raster order (XTRA), a given prefix (AIM), the start of the mix, and encoding a
part of the tokens."""

import itertools

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from autoreg_vit import ops
from autoreg_vit.errors import ModelError, SerializationError
from autoreg_vit.hub.folders import export_pretraining
from autoreg_vit.models import pretraining
from autoreg_vit.serialization import Layout, Serialization, blobs, prefix_raster, squares
from autoreg_vit.settings.pretraining import PretrainConfig
from tests.behaviour.test_causality import DECODERS, SERIALIZATIONS, assert_flows, build, dependence, draw, earlier

AIM = {'serialization': 'prefix_raster', 'first_segment': 'given'}
XTRA = {'serialization': 'squares', 'segments': 6, 'segment_order': 'raster'}
decoders = pytest.mark.parametrize('decoder', DECODERS)
decoders_of_any_order = pytest.mark.parametrize('decoder', [d for d in DECODERS if d != 'none'])


def images(batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 1, 8, 12, dtype=torch.float64)


# Segments in raster order.

def test_squares_in_raster_order():
    """XTRA's block causal mask."""
    assert squares(2, (4, 6), 6, segment_order='raster').view(2, 4, 6).tolist() == 2 * [[
        [0, 0, 1, 1, 2, 2], [0, 0, 1, 1, 2, 2], [3, 3, 4, 4, 5, 5], [3, 3, 4, 4, 5, 5]]]


def test_a_hierarchy_in_raster_order_goes_through_a_partition_before_the_next():
    assert squares(1, (4, 4), (16, 4), segment_order='raster').view(4, 4).tolist() == [
        [0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]


@given(st.integers(1, 9), st.integers(2, 9), st.integers(0, 10 ** 6))
@settings(deadline=None, max_examples=60)
def test_blobs_in_raster_order_go_by_their_first_tokens(height, width, seed):
    count = min(5, height * width)
    options = {'generator': torch.Generator().manual_seed(seed)}
    ranks = blobs(3, (height, width), count, segment_order='raster', **options)
    for row in ranks.tolist():
        firsts = [row.index(rank) for rank in range(max(row) + 1)]
        assert firsts == sorted(firsts)
    # The same blobs as in random order, whose Gaussians are drawn first.
    visited = blobs(3, (height, width), count, generator=torch.Generator().manual_seed(seed))
    for row, other in zip(ranks.tolist(), visited.tolist()):
        assert len(set(zip(row, other))) == max(row) + 1 == max(other) + 1


@pytest.mark.parametrize('family', ['randsac', 'saim'])
@decoders_of_any_order
def test_segments_in_raster_order_see_those_before(randomise, decoder, family):
    model = build(randomise, family, **XTRA, **DECODERS[decoder], first_segment='none')
    ranks = draw(model)
    assert_flows(dependence(lambda x: model(x, ranks).pred, images()), earlier(ranks))


def test_a_new_size_keeps_the_order_of_segments(randomise):
    model = build(randomise, 'randsac', **XTRA)
    model.set_input_size((8, 12))
    assert model.serialization == Serialization('squares', (4, 6), (6,), segment_order='raster')


# A given prefix.

def test_prefix_lengths_are_uniform():
    ranks = prefix_raster(4000, (2, 3))
    lengths = (ranks == 0).sum(1)
    assert torch.equal(ranks, (torch.arange(6) - lengths[:, None] + 1).clamp(min=0))
    counts = lengths.bincount(minlength=6)
    assert counts[0] == 0
    assert counts.sum() == 4000
    assert ((counts[1:] - 800).abs() < 130).all()  # five standard deviations


@given(st.integers(1, 6), st.integers(1, 6))
@settings(deadline=None, max_examples=30)
def test_something_follows_the_prefix(height, width):
    ranks = prefix_raster(8, (height, width))
    assert (ranks[:, 0] == 0).all()
    assert (ranks.amax(1) >= min(1, height * width - 1)).all()


@pytest.mark.parametrize('family', ['randsac', 'saim'])
@decoders
def test_tokens_after_the_prefix_see_all_before_them(randomise, decoder, family):
    model = build(randomise, family, **AIM, **DECODERS[decoder])
    ranks = draw(model)
    matrix = dependence(lambda x: model(x, ranks).pred, images())
    after = (ranks > 0)[:, :, None]
    assert_flows(torch.where(after, matrix, 0), earlier(ranks) & after)


@pytest.mark.parametrize('serialization', [AIM, {**SERIALIZATIONS['blobs'], 'first_segment': 'given'}])
def test_the_given_segment_is_left_out_of_the_loss(randomise, serialization):
    model = build(randomise, 'randsac', **serialization, **DECODERS['masked mix'])
    x, ranks = images(3), draw(model, 3)
    out = model(x, ranks)

    errors = (out.pred - out.target).square().mean(-1)
    means = [errors[i][ranks[i] > 0].mean() for i in range(3)]
    torch.testing.assert_close(out.loss, torch.stack(means).mean())
    assert torch.equal(out.pred[ranks == 0], out.target[ranks == 0])
    # However a step's images are split over processes or passes, its loss is the mean of theirs.
    parts = [model(x[i:i + 1], ranks[i:i + 1]).loss for i in range(3)]
    torch.testing.assert_close(torch.stack(parts).mean(), out.loss)


def test_an_image_of_the_given_segment_alone_has_no_loss(randomise):
    model = build(randomise, 'randsac', **AIM, **DECODERS['masked mix'])
    assert model(images(1), torch.zeros(1, 24, dtype=torch.int64)).loss == 0


def test_the_next_token_decoder_takes_any_prefix_and_no_other_order(randomise):
    model = build(randomise, 'randsac', **AIM, decoder='none')
    assert model.decoder.start is None  # the first token is never predicted
    for length in (1, 7, 24):
        assert torch.isfinite(model(images(1), (torch.arange(24)[None] - length + 1).clamp(min=0)).loss)
    for wrong in (torch.randperm(24)[None], torch.arange(24)[None].flip(1), torch.arange(24)[None] // 2):
        with pytest.raises(SerializationError, match='raster order alone'):
            model(images(1), wrong)
    raster = build(randomise, 'randsac', serialization='raster', decoder='none')
    with pytest.raises(SerializationError, match='raster order alone'):
        raster(images(1), (torch.arange(24)[None] - 3).clamp(min=0))


# The start of the mix.

def test_the_mix_may_start_as_the_mean_of_all_layers(randomise):
    uniform = build(lambda m: m, 'randsac', mix_init='uniform').decoder
    assert torch.equal(uniform.mix.float(), torch.full((3, 3), 1 / 3))
    last = build(lambda m: m, 'randsac', mix_init='last').decoder
    assert last.mix.tolist() == 3 * [[0, 0, 1]]
    assert torch.equal(last.mix, build(lambda m: m, 'randsac').decoder.mix)


# Encoding a part of the tokens.

def encoded_tokens(model, *arguments) -> int:
    """Tokens that the encoder's first block takes."""
    taken = []
    handle = model.encoder.blocks[0].norm1.register_forward_hook(lambda m, x, y: taken.append(y.shape[1]))
    model(*arguments)
    handle.remove()
    return taken[0] - model.encoder.num_prefix_tokens


ORDERS = {**SERIALIZATIONS, 'prefix': {'serialization': 'prefix_raster'}}
EVERY = [(s, d, f) for s, d, f in itertools.product(ORDERS, DECODERS, ('self', 'none', 'given'))
         if (d != 'none' or s in ('raster', 'prefix')) and (s != 'prefix' or f == 'given')]


@pytest.mark.parametrize(('serialization', 'decoder', 'first_segment'), EVERY)
def test_no_prediction_reads_the_last_segment(randomise, monkeypatch, serialization, decoder, first_segment):
    """The same loss, predictions and gradients without its encoding, whether the host may read how many tokens are
    needed or, as in a compiled step, the serialization says so."""
    family = 'randsac' if first_segment == 'self' else 'saim'  # without a class token, and with one
    model = build(randomise, family, **ORDERS[serialization], **DECODERS[decoder], first_segment=first_segment)
    x, ranks = images(3), draw(model, 3)

    def run():
        model.zero_grad()
        out = model(x, ranks)
        out.loss.backward()
        return out, [p.grad for p in model.parameters() if p.grad is not None]

    whole, gradients = run()
    model.encode_last = False
    longest = min((row == row.max()).sum().item() for row in ranks)
    for host_reads, counted in ((True, longest), (False, model.serialization.last_segment)):
        monkeypatch.setattr(pretraining, '_host_reads', lambda ranks, reads=host_reads: reads)
        part, others = run()
        torch.testing.assert_close(part.loss, whole.loss, rtol=1e-12, atol=0)
        torch.testing.assert_close(part.pred, whole.pred, rtol=0, atol=1e-10)
        torch.testing.assert_close(others, gradients, rtol=1e-8, atol=1e-10)
        assert encoded_tokens(model, x, ranks) == 24 - (counted or 0)


@given(st.lists(st.integers(1, 5), min_size=1, max_size=8), st.integers(0, 2), st.sampled_from(['self', 'none']))
@settings(deadline=None, max_examples=100)
def test_a_layout_reads_up_to_its_last_segment(sizes, prefix, first_segment):
    ranks = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))[None]
    layout = Layout.of(ranks, first_segment, prefix)
    everything = len(sizes) == 1 and first_segment == 'self'  # a single segment is predicted from itself
    assert layout.read == (sum(sizes) if everything else sum(sizes[:-1]))
    part = layout.with_encoded(max(int(layout.read), 1))
    assert torch.equal(part.memory_limits, layout.memory_limits)
    assert part.encoder_limits.max() <= prefix + part.encoded


@pytest.mark.parametrize('ratio', [0.25, 0.6])
@pytest.mark.parametrize('family', ['randsac', 'saim'])
@decoders_of_any_order
def test_predictions_read_the_first_part_of_the_order(randomise, decoder, family, ratio):
    model = build(randomise, family, **SERIALIZATIONS['blobs'], **DECODERS[decoder], first_segment='none',
                  encode_ratio=ratio)
    ranks = draw(model)
    matrix = dependence(lambda x: model(x, ranks).pred, images())
    place = Layout.of(ranks).order.argsort(1)  # of each token in sorted order
    encoded = round(24 * ratio)
    assert_flows(matrix, earlier(ranks) & (place < encoded)[:, None, :])
    assert encoded_tokens(model, images(), ranks) == encoded


def test_the_encoder_of_a_part_sees_what_it_did(randomise):
    """Encodings of the first tokens are those of all: they never saw the others."""
    model = build(randomise, 'saim')
    x, ranks = images(), draw(model)
    layout = Layout.of(ranks, 'none', 1)
    for whole, part in zip(model.encode(x, layout), model.encode(x, layout.with_encoded(6))):
        torch.testing.assert_close(part, whole[:, :7])


def test_a_part_of_one_is_everything_bit_for_bit(randomise):
    model = build(randomise, 'randsac')
    x, ranks = images(), draw(model)
    before = model(x, ranks)
    model.encode_ratio, model.encode_last = 1.0, True
    assert torch.equal(model(x, ranks).pred, before.pred)
    model.encode_ratio = 1e-9  # never less than one token
    assert encoded_tokens(model, x, ranks) == 1


def test_encoding_less_costs_less():
    def flops(**options) -> int:
        model = timm.create_model('randsac_vit_tiny_patch4_32', serialization='squares', segments=4, **options)
        ops.set_implementation('eager')
        with FlopCounterMode(display=False) as counter:
            model(torch.zeros(1, 3, 32, 32)).loss.backward()
        ops.set_implementation('auto')
        return counter.get_total_flops()

    whole = flops()
    assert flops(encode_last=False) < 0.85 * whole
    assert flops(encode_ratio=0.25) < 0.5 * whole


# What all of them must do.

VARIANTS = {
    'XTRA': XTRA,
    'AIM': {**AIM, 'decoder': 'none', 'head': 'mlp'},
    'AIM with a decoder': AIM,
    'blobs in raster order, given': {'serialization': 'blobs', 'segments': (7, 3), 'segment_order': 'raster',
                                     'first_segment': 'given'},
    'uniform mix': {'mix_init': 'uniform'},
    'first quarter': {'encode_ratio': 0.25},
    'without the last segment': {'serialization': 'squares', 'segments': 6, 'encode_last': False},
    'SAIM from a quarter': {'serialization': 'random', 'decoder': 'parallel', 'encode_ratio': 0.25},
}
variants = pytest.mark.parametrize('variant', VARIANTS)


@variants
def test_every_parameter_of_a_variant_learns(variant):
    model = build(lambda m: m, 'randsac', **VARIANTS[variant])
    model(images(4), draw(model, 4)).loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.abs().sum() > 0, name


@variants
def test_an_exported_variant_is_what_it_was(tmp_path, variant):
    model = build(lambda m: m, 'randsac', **VARIANTS[variant]).float()
    export_pretraining(model, tmp_path / 'pretrain')
    loaded = timm.create_model(f'local-dir:{tmp_path / "pretrain"}', pretrained=True)
    x, ranks = images().float(), draw(model)
    assert torch.equal(loaded(x, ranks).pred, model(x, ranks).pred)
    assert loaded.serialization == model.serialization
    assert (loaded.encode_ratio, loaded.encode_last, loaded.first_segment) == (
        model.encode_ratio, model.encode_last, model.first_segment)


def test_every_option_is_a_setting_of_a_run():
    options = {'serialization': 'squares', 'segments': (6,), 'segment_order': 'raster', 'mix_init': 'uniform',
               'first_segment': 'given', 'encode_ratio': 0.5, 'encode_last': False}
    assert PretrainConfig(**options).model_options() == options
    assert PretrainConfig().model_options() == {}


@pytest.mark.parametrize(('options', 'error', 'says'), [
    ({'segment_order': 'spiral'}, SerializationError, "'random' or 'raster', got 'spiral'"),
    ({'segment_order': 'raster', 'shuffle': True}, SerializationError, 'leave one of them out'),
    ({'segment_order': 'raster', 'serialization': 'random'}, SerializationError, "segment_order (got 'raster')"),
    ({'first_segment': 'known'}, SerializationError, "'self', 'none' or 'given', got 'known'"),
    ({'serialization': 'prefix_raster', 'decoder': 'none'}, SerializationError, "needs first_segment='given'"),
    ({'serialization': 'random', 'decoder': 'none'}, SerializationError, "got serialization='random'"),
    ({'serialization': 'raster', 'decoder': 'none', 'encode_ratio': 0.5}, ModelError, 'leave encode_ratio out'),
    ({'encode_ratio': 0}, ModelError, 'above 0 and at most 1, got 0'),
    ({'encode_ratio': 1.5}, ModelError, 'got 1.5'),
    ({'encode_ratio': True}, ModelError, 'got True'),
    ({'mix_init': 'first'}, ModelError, "'last' or 'uniform', got 'first'"),
    ({'mix_init': 'uniform', 'memory': 'last'}, ModelError, "memory='last'"),
    ({'mix_init': 'uniform', 'decoder': 'parallel'}, ModelError, 'no effect with decoder'),
])
def test_errors(options, error, says):
    with pytest.raises(error) as caught:
        build(lambda m: m, 'randsac', **options)
    assert says in str(caught.value)
