"""Pretraining models as users meet them: outputs, gradients, options and timm's tools."""

import copy
import itertools
import json
import pickle
import runpy
from pathlib import Path

import pytest
import timm
import torch
from timm.optim import create_optimizer_v2
from torch import nn

from autoreg_vit.errors import SerializationError, ShapeError
from autoreg_vit.hub.folders import export_pretraining
from autoreg_vit.models import AutoregressiveViT, PretrainOutput, create_pretraining_model
from autoreg_vit.models import attention as attention_module
from autoreg_vit.models.decoders import MaskedDecoder
from autoreg_vit.models.targets import PixelTarget, patchify
from autoreg_vit.serialization import Layout, Serialization
from tests.support.designs import DESIGNS, build, every_design, images


@every_design
def test_output(tiny, design):
    model = build(tiny, design)
    x = images()

    output = model(x)

    assert isinstance(output, PretrainOutput)
    assert output.loss.shape == ()
    assert output.pred.shape == output.target.shape == (3, 16, 4)
    assert (output.ranks.shape, output.ranks.dtype) == ((3, 16), torch.int64)
    torch.testing.assert_close(output.loss, (output.pred - output.target).square().mean())
    torch.testing.assert_close(output.target, model.target(x))


@every_design
def test_every_trainable_parameter_learns(tiny, design):
    model = build(tiny, design)
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {name for name, _ in model.named_parameters() if name.endswith('pos_embed')}

    model(images()).loss.backward()

    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert torch.isfinite(parameter.grad).all(), name
            assert parameter.grad.abs().sum() > 0, name
        else:
            assert parameter.grad is None, name


@every_design
def test_gradient_checkpointing_changes_nothing(tiny, design, monkeypatch):
    model = build(tiny, design).train()
    plain = copy.deepcopy(model)
    x, ranks = images(), model.draw_ranks(3)
    calls = []
    checkpoint = attention_module.checkpoint
    monkeypatch.setattr(
        attention_module, 'checkpoint', lambda *args, **kwargs: calls.append(1) or checkpoint(*args, **kwargs))

    plain_loss = plain(x, ranks).loss
    plain_loss.backward()
    assert not calls
    model.set_grad_checkpointing()
    loss = model(x, ranks).loss
    loss.backward()

    blocks = len(model.encoder.blocks)
    if model.decoder.__class__.__name__ != 'NextTokenDecoder':
        blocks += blocks if getattr(model.decoder, 'blocks', None) is None else len(model.decoder.blocks)
    assert len(calls) == blocks
    assert torch.equal(loss, plain_loss)
    for (name, ours), theirs in zip(model.named_parameters(), plain.parameters()):
        if ours.requires_grad:
            torch.testing.assert_close(ours.grad, theirs.grad, msg=name)
    model.set_grad_checkpointing(False)
    model(x, ranks)
    assert len(calls) == blocks


@every_design
def test_the_residual_stream_is_kept_in_float32_unless_said_otherwise(tiny, design):
    model = build(tiny, design)
    x, ranks = images(), model.draw_ranks(3)

    def streams(autocast: bool) -> tuple[float, set[torch.dtype]]:
        dtypes = set()
        blocks = [*model.encoder.blocks, *(getattr(model.decoder, 'blocks', None) or [])]
        hooks = [block.norm2.register_forward_pre_hook(lambda _, args: dtypes.add(args[0].dtype)) for block in blocks]
        with torch.no_grad(), torch.autocast('cpu', torch.bfloat16, enabled=autocast):
            loss = model(x, ranks).loss.item()
        for hook in hooks:
            hook.remove()
        return loss, dtypes

    loss, dtypes = streams(autocast=True)
    assert dtypes == {torch.float32}
    exact, _ = streams(autocast=False)
    model.residual_in_fp32 = False
    half_loss, dtypes = streams(autocast=True)
    assert dtypes == {torch.bfloat16}
    assert half_loss == pytest.approx(loss, rel=1e-2) and half_loss != loss
    assert streams(autocast=False) == (exact, {torch.float32})


@every_design
def test_positions_stay_as_they_are(tiny, design):
    model = build(tiny, design)
    before = copy.deepcopy(model)
    optimizer = create_optimizer_v2(model, 'adamw', lr=1e-2, weight_decay=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(images()).loss.backward()
        optimizer.step()

    for (name, now), then in zip(model.named_parameters(), before.parameters()):
        assert torch.equal(now, then) == name.endswith('pos_embed'), name


def test_mix_starts_as_the_last_layer_alone(tiny, randomise):
    mix, last = build(tiny, 'randsac'), build(tiny, 'randsac last')
    weights = mix.decoder.mix.detach().clone()
    randomise(mix)
    mix.decoder.mix.data = weights
    missing, unexpected = last.load_state_dict(mix.state_dict(), strict=False)
    assert (missing, unexpected) == ([], ['decoder.mix'])
    x, ranks = images().double(), mix.draw_ranks(3)

    torch.testing.assert_close(mix.double()(x, ranks).pred, last.double()(x, ranks).pred, rtol=0, atol=1e-12)


def test_mix_reads_every_layer(tiny, randomise):
    """Z^l = sum over k of W[l, k] H^k, a row of W a decoder layer (RandSAC 4.2)."""
    model = randomise(build(tiny, 'randsac', decoder_depth=2)).double()
    assert model.decoder.mix.shape == (2, 4)
    x, ranks = images().double(), model.draw_ranks(3)
    single = []
    for layer, block in itertools.product(range(2), range(4)):
        model.decoder.mix.data.zero_()
        model.decoder.mix.data[layer, block] = 1
        single.append(model(x, ranks).pred)
    for a, b in itertools.combinations(single, 2):
        assert (a - b).abs().max() > 1e-3


@pytest.mark.parametrize('design', ['randsac', 'randsac two-stream', 'saim', 'saim next token'])
def test_set_input_size(tiny, design):
    model = build(tiny, design)
    optimised = [p for p in model.parameters() if p.requires_grad]

    model.set_input_size((12, 8))

    output = model(images(size=(12, 8)))
    output.loss.backward()
    assert output.pred.shape == (3, 24, 4)
    assert model.draw_ranks(2).shape == (2, 24)
    assert all(p.grad is not None for p in optimised)
    assert not model.encoder.pos_embed.requires_grad
    assert model.encoder(images(size=(12, 8))).shape == (3, 32)
    if design == 'randsac':
        assert torch.equal(model.decoder.pos_embed, build(tiny, design, img_size=(12, 8)).decoder.pos_embed)
    with pytest.raises(ShapeError, match='12, 8'):
        model(images(size=(8, 8)))
    model.set_input_size(8)
    assert model(images()).pred.shape == (3, 16, 4)


def test_set_input_size_of_a_stock_encoder():
    encoder = timm.create_model('vit_tiny_patch16_224', img_size=(16, 64), num_classes=0, depth=1)
    model = AutoregressiveViT(
        encoder, Serialization('random', (1, 4)), MaskedDecoder(encoder, 32, 1, 2), PixelTarget((16, 16), 3))
    before = encoder.pos_embed.detach().clone()
    for size in ((32, 32), (32, 48)):  # as many tokens, and more
        model.set_input_size(size)
        assert not torch.equal(encoder.pos_embed[:, :5], before)
        assert torch.equal(encoder.pos_embed[:, 0], before[:, 0])
        assert not encoder.pos_embed.requires_grad
        assert torch.isfinite(model(images(2, 3, size)).loss)


def test_refused_input_size_leaves_the_model_usable(tiny):
    model = timm.create_model('randsac_vit_tiny', **tiny, serialization='squares', segments=4)
    for size, error in [((8, 12), SerializationError), ((9, 8), ShapeError), (1, ShapeError)]:
        with pytest.raises(error):
            model.set_input_size(size)
        assert model(images()).pred.shape == (3, 16, 4)


@pytest.mark.parametrize('family', ['randsac', 'saim'])
@pytest.mark.parametrize(('channels', 'patch', 'size', 'options'), [
    (1, 2, (8, 8), {}),
    (5, 2, (8, 6), {}),
    (3, 1, (4, 3), {'norm_pix': False}),
    (1, 1, (3, 5), {'norm_pix': False}),
    (3, 16, (48, 80), {}),
    (2, (2, 3), (6, 15), {}),
])
def test_shapes(tiny, family, channels, patch, size, options):
    model = build(tiny, family, in_chans=channels, patch_size=patch, img_size=size, depth=2,
                  **{**options, **({'decoder_depth': 1} if family == 'randsac' else {})})
    height, width = (patch, patch) if isinstance(patch, int) else patch

    output = model(images(2, channels, size))
    output.loss.backward()

    tokens = size[0] // height * (size[1] // width)
    assert output.pred.shape == output.target.shape == (2, tokens, height * width * channels)
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_false_turns_saims_blur_off(tiny):
    x = images()
    sharp, blurred = build(tiny, 'saim', blur=False, norm_pix=False), build(tiny, 'saim', norm_pix=False)
    assert sharp.target.blur is None
    torch.testing.assert_close(sharp(x).target, patchify(x, (2, 2)))
    assert blurred.target.blur == (9, 1.0)
    assert (blurred(x).target - patchify(x, (2, 2))).abs().max() > 0.1


def test_none_is_no_blur_where_timm_does_not_drop_it(tiny, tmp_path):
    from autoreg_vit.models.designs import saim_vit_tiny

    hub = runpy.run_path(str(Path(__file__).parents[2] / 'hubconf.py'))
    doors = {'own': lambda **o: create_pretraining_model('saim_vit_tiny', **o), 'entrypoint': saim_vit_tiny,
             'hub': hub['saim_vit_tiny']}
    for name, door in doors.items():
        assert door(**tiny).target.blur == (9, 1.0), name
        assert door(**tiny, blur=None).target.blur is None and door(**tiny, blur=False).target.blur is None, name
        # Of every other option None is the default.
        others = dict.fromkeys(['segments', 'memory', 'decoder_depth', 'head', 'norm_pix', 'class_token', 'norm_layer'])
        assert door(**tiny, **others).init_args == door(**tiny).init_args, name
    # In a folder of weights no blur is said, so that its absence still means the default.
    export_pretraining(doors['own'](**tiny, blur=None), tmp_path / 'a')
    assert json.loads((tmp_path / 'a' / 'config.json').read_text())['model_args']['blur'] is False
    assert timm.create_model(f'local-dir:{tmp_path / "a"}').target.blur is None


@pytest.mark.parametrize(('options', 'read'), [
    ({'decoder': 'masked', 'memory': 'last'}, [4]),
    ({'decoder': 'masked', 'memory': 'mix'}, [1, 2, 3, 4]),
    ({'decoder': 'parallel'}, [1, 2, 3, 4]),
    ({'decoder': 'parallel', 'decoder_depth': 2}, [2, 4]),
    ({'decoder': 'parallel', 'decoder_depth': 1}, [4]),
    ({'decoder': 'parallel', 'shared': True}, [0, 1, 2, 3]),
    ({'decoder': 'parallel', 'shared': True, 'memory': 'output'}, [1, 2, 3, 4]),
    ({'decoder': 'none', 'serialization': 'raster'}, [4]),
])
@pytest.mark.parametrize('name', ['randsac_vit_tiny', 'saim_vit_tiny'])
def test_hidden_states_a_decoder_reads(tiny, randomise, name, options, read):
    """0 is the input of the encoder's first block, and 1 to 4 are the outputs of its blocks."""
    model = randomise(timm.create_model(name, **tiny, **{'serialization': 'random', **options}))
    layout = Layout.of(model.draw_ranks(2), model.first_segment, model.encoder.num_prefix_tokens)
    hidden = [torch.randn(2, 16 + model.encoder.num_prefix_tokens, 32, requires_grad=True) for _ in range(5)]

    model.decoder(hidden, layout, model.encoder).square().sum().backward()

    assert [i for i, h in enumerate(hidden) if h.grad is not None and h.grad.abs().sum() > 0] == read


def test_two_stream_reads_the_input_of_each_block(tiny):
    """The default of shared weights is XLNet's and SAIM Eq. 5's; SAIM's published code reads the output."""
    memories = {shared: timm.create_model('saim_vit_tiny', **tiny, shared=shared).decoder.memory
                for shared in (True, False)}
    assert memories == {True: 'input', False: 'output'}


def test_query_blocks_start_with_weights_of_their_own(tiny):
    model = build(tiny, 'saim')
    for query, block in zip(model.decoder.blocks, model.encoder.blocks):
        assert not torch.equal(query.attn.qkv.weight, block.attn.qkv.weight)
        assert not torch.equal(query.mlp.fc2.weight, block.mlp.fc2.weight)


def test_options_reach_the_four_parts(tiny):
    model = timm.create_model(
        'saim_vit_tiny', **tiny, serialization='squares', segments=(16, 4), shuffle=True, decoder='masked',
        decoder_depth=2, decoder_dim=16, decoder_heads=4, memory='last', first_segment='self', head='linear',
        norm_pix=False, blur=(3, 0.5), mlp_ratio=2.0, drop_path_rate=0.1)
    assert model.serialization == Serialization('squares', (4, 4), (16, 4), True)
    assert (len(model.decoder.blocks), model.decoder.dim, model.decoder.memory) == (2, 16, 'last')
    assert model.decoder.blocks[1].self_attn.num_heads == 4
    assert (model.first_segment, model.target.norm_pix, model.target.blur) == ('self', False, (3, 0.5))
    assert isinstance(model.head, nn.Linear)
    assert model.encoder.blocks[0].mlp.fc1.out_features == 64
    assert model.encoder.blocks[-1].drop_path1.drop_prob == pytest.approx(0.1)
    model(images()).loss.backward()


@every_design
def test_pickle_copy_and_state_dict(tiny, design):
    model = build(tiny, design).eval()
    x, ranks = images(), model.draw_ranks(3)
    expected = model(x, ranks)
    fresh = build(tiny, design).eval()
    assert not torch.equal(fresh(x, ranks).pred, expected.pred)
    fresh.load_state_dict(model.state_dict())

    for twin in (fresh, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        output = twin(x, ranks)
        assert torch.equal(output.pred, expected.pred)
        assert torch.equal(output.loss, expected.loss)
    for ours, theirs in zip(copy.deepcopy(model).parameters(), model.parameters()):
        assert ours.data_ptr() != theirs.data_ptr()


@every_design
def test_bfloat16_autocast(tiny, design):
    model = build(tiny, design)
    x, ranks = images(), model.draw_ranks(3)

    with torch.autocast('cpu', dtype=torch.bfloat16):
        output = model(x, ranks)
    output.loss.backward()

    assert output.loss.dtype == output.target.dtype == torch.float32
    # bfloat16 keeps eight bits: errors of some percent after a few layers
    torch.testing.assert_close(output.loss, model(x, ranks).loss, rtol=0.1, atol=0)
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.requires_grad)


@every_design
def test_eval_is_deterministic_and_train_drops_paths(tiny, design):
    model = build(tiny, design, drop_path_rate=0.5, proj_drop_rate=0.1)
    x, ranks = images(), model.draw_ranks(3)
    assert torch.equal(model.eval()(x, ranks).loss, model(x, ranks).loss)
    assert not torch.equal(model.train()(x, ranks).loss, model(x, ranks).loss)


@every_design
def test_optimizer_groups(tiny, design):
    model = build(tiny, design)
    optimizer = create_optimizer_v2(model, 'adamw', lr=1e-3, weight_decay=0.05)

    decay = _by_name(model, optimizer, 'weight_decay')

    assert set(decay) == {name for name, p in model.named_parameters() if p.requires_grad}
    for name, value in decay.items():
        is_matrix = name.endswith('weight') and model.get_parameter(name).ndim > 1
        assert value == (0.05 if is_matrix else 0), name


@every_design
def test_layer_decay(tiny, design):
    """Learning rates fall from the head over decoder and encoder blocks to the stem."""
    model = build(tiny, design)
    optimizer = create_optimizer_v2(model, 'adamw', lr=1e-3, weight_decay=0.05, layer_decay=0.65)

    scale = _by_name(model, optimizer, 'lr_scale')

    assert set(scale) == {name for name, p in model.named_parameters() if p.requires_grad}
    parts = [{scale[n] for n in scale if n.startswith(part)} for part in (
        ('encoder.patch_embed', 'encoder.cls_token', 'encoder.reg_token'),
        *(f'encoder.blocks.{i}.' for i in range(4)), 'decoder.', 'head.')]
    parts = [part for part in parts if part]
    assert all(len(part) == 1 for part in parts[:5])  # stem and encoder blocks, one rate each
    for lower, upper in itertools.pairwise(parts):
        assert max(lower) < min(upper)
    assert parts[-1] == {1.0}
    assert max(parts[4]) <= scale['encoder.norm.weight'] <= 1


def _by_name(model: nn.Module, optimizer: torch.optim.Optimizer, field: str) -> dict[str, float]:
    names = {id(p): name for name, p in model.named_parameters()}
    return {names[id(p)]: group[field] for group in optimizer.param_groups for p in group['params']}


@pytest.mark.parametrize('design', ['randsac', 'saim', 'randsac registers'])
def test_encoder_is_the_stand_alone_encoder(tiny, design, randomise):
    model = randomise(build(tiny, design)).eval()
    extra = {k: v for k, v in DESIGNS[design][1].items() if k in ('reg_tokens', 'qk_norm', 'init_values')}
    encoder = timm.create_model(f'vit_tiny_{design.split()[0]}', **tiny, **extra).eval()
    encoder.load_state_dict(model.encoder.state_dict())
    x = images()

    assert torch.equal(encoder(x), model.encoder(x))
    assert torch.equal(encoder.forward_features(x), model.encoder.forward_features(x))


class _EncoderOutput(nn.Module):
    """A decoder that hands on what the encoder's final norm makes of its last hidden states."""

    def forward(self, hidden, layout, encoder):
        return encoder.norm(hidden[-1])


@pytest.mark.parametrize('options', [
    {}, {'qk_norm': True}, {'init_values': 0.5}, {'pre_norm': True}, {'qkv_bias': False}])
def test_blocks_under_limits_are_timms_blocks(tiny, randomise, options):
    """With one segment every token sees every other, as in the plain encoder."""
    model = randomise(build(tiny, 'randsac', **options)).eval()
    model.decoder = _EncoderOutput()
    x = images()

    output = model(x, torch.zeros(3, 16, dtype=torch.int64))

    torch.testing.assert_close(output.pred, model.head(model.encoder.forward_features(x)), rtol=1e-4, atol=1e-4)
