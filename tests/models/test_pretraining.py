"""Pretraining models as users meet them: sizes, gradients, options, timm's tools, learning, and errors of use."""

import copy
import itertools
import json
import math
import pickle
import runpy
from pathlib import Path

import pytest
import timm
import torch
from timm.optim import create_optimizer_v2
from torch import nn

from autoreg_vit.errors import CheckpointError, ModelError, SerializationError, ShapeError, UsageError
from autoreg_vit.hub.folders import export_encoder, export_pretraining
from autoreg_vit.models import AutoregressiveViT, PretrainOutput, create_pretraining_model, pretraining_models
from autoreg_vit.models import attention as attention_module
from autoreg_vit.models.decoders import MaskedDecoder
from autoreg_vit.models.targets import PixelTarget, patchify
from autoreg_vit.serialization import Layout, Serialization

ARCHITECTURES = ['base', 'large', 'small', 'small_patch4_32', 'tiny', 'tiny_patch4_32']
BLOBS = {'serialization': 'blobs', 'segments': (5, 2)}
DESIGNS = {
    'randsac': ('randsac_vit_tiny', BLOBS),
    'randsac last': ('randsac_vit_tiny', {**BLOBS, 'memory': 'last'}),
    'randsac narrow decoder': ('randsac_vit_tiny', {**BLOBS, 'decoder_dim': 16, 'decoder_heads': 4}),
    'randsac two-stream': ('randsac_vit_tiny', {**BLOBS, 'decoder': 'parallel', 'shared': True}),
    'randsac parallel': ('randsac_vit_tiny', {**BLOBS, 'decoder': 'parallel', 'decoder_depth': 2}),
    'randsac next token': ('randsac_vit_tiny', {'serialization': 'raster', 'decoder': 'none'}),
    'randsac registers': ('randsac_vit_tiny', {**BLOBS, 'reg_tokens': 2, 'qk_norm': True, 'init_values': 0.1}),
    'saim': ('saim_vit_tiny', {}),
    'saim shared': ('saim_vit_tiny', {'decoder': 'parallel', 'shared': True, 'memory': 'output'}),
    'saim one query block': ('saim_vit_tiny', {'decoder_depth': 1}),
    'saim masked': ('saim_vit_tiny', {'decoder': 'masked', 'head': 'mlp'}),
    'saim next token': ('saim_vit_tiny', {'serialization': 'raster', 'decoder': 'none'}),
}
every_design = pytest.mark.parametrize('design', DESIGNS)


def build(tiny: dict, design: str, **options) -> AutoregressiveViT:
    name, own = DESIGNS[design]
    return timm.create_model(name, **{**tiny, **own, **options})


def images(batch: int = 3, channels: int = 1, size: tuple[int, int] = (8, 8)) -> torch.Tensor:
    return torch.randn(batch, channels, *size)


def count(*modules: nn.Module) -> float:
    """Parameters in millions."""
    return sum(p.numel() for m in modules for p in m.parameters()) / 1e6


def on_meta(name: str, **options) -> AutoregressiveViT:
    with torch.device('meta'):
        return timm.create_model(name, **options)


def test_randsac_base_is_as_large_as_published():
    model = on_meta('randsac_vit_base')  # RandSAC Table 10: 86M and 16M
    assert 85.5 < count(model.encoder) < 86.5
    assert 16 < count(model.decoder, model.head) < 18.5
    assert len(model.decoder.blocks) == 4
    assert model.decoder.dim == 512
    assert model.decoder.blocks[0].cross_attn.num_heads == model.decoder.blocks[0].self_attn.num_heads == 16


def test_randsac_cifar_is_as_large_as_published():
    model = on_meta('randsac_vit_tiny_patch4_32')  # Table 8: 5M and 2M
    assert 5 < count(model.encoder) < 5.5
    assert 1.5 < count(model.decoder, model.head) < 2.5


def test_randsac_imagenet100_is_as_large_as_published():
    model = on_meta('randsac_vit_small')  # Table 8: 21M and 9M
    assert 21 < count(model.encoder) < 22
    assert 9 < count(model.decoder, model.head) < 10
    assert model.decoder.blocks[0].self_attn.num_heads == 2 * model.encoder.blocks[0].attn.num_heads


@pytest.mark.parametrize(('name', 'depth', 'low', 'high'), [
    ('randsac_vit_tiny_patch4_32', 16, 7, 7.5), ('randsac_vit_small', 17, 30, 31)])
def test_two_stream_is_as_large_as_published(name, depth, low, high):
    model = on_meta(name, decoder='parallel', shared=True, depth=depth)  # Table 8: 7M and 30M, no decoder
    assert low < count(model.encoder) < high
    assert count(model.decoder) == 0
    assert not any(key.startswith('decoder') for key in model.state_dict())


def test_saim_decoder_is_as_large_as_its_encoder():
    model = on_meta('saim_vit_base')
    assert 85.5 < count(model.encoder) < 86.5
    assert count(model.decoder) == count(model.encoder.blocks)
    assert isinstance(model.head.act, nn.GELU)
    assert model.head.fc1.out_features == 4 * 768


@pytest.mark.parametrize(('name', 'segments', 'depth'), [
    ('randsac_vit_base', (11, 7, 3), 4), ('randsac_vit_large', (11, 7, 3), 4), ('randsac_vit_small', (11, 5), 4),
    ('randsac_vit_tiny', (11, 5), 3), ('randsac_vit_tiny_patch4_32', (11, 5), 3),
    ('randsac_vit_small_patch4_32', (11, 5), 6)])
def test_randsac_defaults(name, segments, depth):
    model = on_meta(name)
    assert model.serialization == Serialization('blobs', model.encoder.patch_embed.grid_size, segments)
    assert isinstance(model.decoder, MaskedDecoder)
    assert len(model.decoder.blocks) == depth
    assert (model.decoder.memory, model.first_segment) == ('mix', 'self')
    assert (model.target.norm_pix, model.target.blur) == (True, None)
    assert model.encoder.num_prefix_tokens == 0


@pytest.mark.parametrize('size', ARCHITECTURES)
def test_saim_defaults(size):
    model = on_meta(f'saim_vit_{size}')
    assert model.serialization.name == 'random'
    assert len(model.decoder.blocks) == len(model.encoder.blocks)
    assert (model.decoder.memory, model.first_segment) == ('output', 'none')
    assert (model.target.norm_pix, model.target.blur) == (True, (9, 1.0))
    assert model.encoder.cls_token is not None


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


def test_registry():
    assert timm.list_models('randsac_vit_*') == [f'randsac_vit_{size}' for size in ARCHITECTURES]
    assert timm.list_models('saim_vit_*') == [f'saim_vit_{size}' for size in ARCHITECTURES]
    assert sorted(pretraining_models()) == timm.list_models(['randsac_vit_*', 'saim_vit_*'])
    encoders = timm.list_models('vit_*')
    ours = [name for name in encoders if 'randsac' in name or 'saim' in name]
    assert sorted(ours) == sorted(f'vit_{size}_{method}' for size in ARCHITECTURES for method in ('randsac', 'saim'))
    assert not set(encoders) & set(pretraining_models())


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


def fit(model, draw, steps: int, lr: float, betas: tuple[float, float]) -> None:
    """AdamW with a short warm-up and cosine decay; `draw` gives a batch."""
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=lr, betas=betas, weight_decay=0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min(1, (s + 1) / 20) * (1 + math.cos(math.pi * s / steps)) / 2)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        model(draw()).loss.backward()
        optimizer.step()
        schedule.step()
    model.eval()


def digits() -> tuple[torch.Tensor, torch.Tensor]:
    """Training and held-out images of scikit-learn's digits [B, 1, 8, 8], of mean 0 and deviation 1."""
    datasets = pytest.importorskip('sklearn.datasets')
    x = torch.tensor(datasets.load_digits().images, dtype=torch.float32)[:, None]
    x = ((x - x.mean()) / x.std())[torch.randperm(len(x))]
    return x[:1500], x[1500:]


def held_out_error(model, train: torch.Tensor, test: torch.Tensor) -> float:
    """Error on held-out images, in units of the error of the training images' mean at each position."""
    with torch.no_grad():
        output = model(test)
    mean = patchify(train.mean(0, keepdim=True), (2, 2))
    return (output.loss / (mean - output.target).square().mean()).item()


def test_learns_digits(tiny):
    """Three seeds give 0.61 to 0.68 of the baseline's error: what is seen of a digit tells about the rest of it."""
    train, test = digits()
    model = timm.create_model(
        'randsac_vit_tiny', **{**tiny, 'embed_dim': 64, 'depth': 2}, decoder_depth=2, serialization='raster',
        norm_pix=False)
    fit(model, lambda: train[torch.randint(len(train), (64,))], steps=200, lr=5e-3, betas=(0.8, 0.9))
    assert held_out_error(model, train, test) < 0.75


@pytest.mark.slow
def test_learns_digits_from_blobs(tiny):
    """Random orders take longer: every pair of positions has its own relation to learn."""
    train, test = digits()
    model = timm.create_model(
        'randsac_vit_tiny', **{**tiny, 'embed_dim': 64, 'depth': 3}, decoder_depth=3, segments=(5, 3), norm_pix=False)
    fit(model, lambda: train[torch.randint(len(train), (64,))], steps=800, lr=4e-3, betas=(0.9, 0.95))
    assert held_out_error(model, train, test) < 0.7


def test_learns_from_random_orders(tiny):
    """Images are one picture at random contrast: any patch seen tells all others, none seen tells nothing."""
    model = timm.create_model('saim_vit_tiny', **{**tiny, 'depth': 2}, norm_pix=False, blur=False)
    picture = torch.randn(1, 8, 8)

    def draw(batch: int = 64) -> torch.Tensor:
        return torch.randn(batch, 1, 1, 1) * picture

    fit(model, draw, steps=150, lr=5e-3, betas=(0.8, 0.9))
    with torch.no_grad():
        output = model(draw(200))
    error = (output.pred - output.target).square().mean(-1)
    power = output.target.square().mean(-1)
    assert error[output.ranks > 0].mean() < 0.3 * power[output.ranks > 0].mean()
    assert error[output.ranks == 0].mean() > 0.5 * power[output.ranks == 0].mean()


@pytest.mark.parametrize('name', ['randsac_vit_tiny', 'vit_tiny_randsac', 'saim_vit_tiny', 'vit_tiny_saim'])
@pytest.mark.parametrize(('options', 'message'), [
    ({'img_size': 9}, r'9 x 9 pixels.*patches of 2 x 2.*use an image of'),
    ({'img_size': (8, 9)}, '8 x 9 pixels'),
    ({'img_size': 1}, r'1 x 1 pixels.*patches of 2 x 2'),
    ({'patch_size': 16}, '8 x 8 pixels.*patches of 16 x 16'),
    ({'patch_size': 0}, 'patches of 0 x 0'),
    ({'num_heads': 3}, '3 heads do not divide a width of 32'),
    ({'num_heads': 0}, '0 heads'),
    ({'embed_dim': 30}, 'width that 4 divides, got 30'),
])
def test_sizes_that_do_not_fit(tiny, name, options, message):
    with pytest.raises(ShapeError, match=message):
        timm.create_model(name, **{**tiny, **options})


@pytest.mark.parametrize(('x', 'message'), [
    (torch.zeros(2, 1, 8, 10), r'\[B, 1, 8, 8\], got \[2, 1, 8, 10\].*set_input_size'),
    (torch.zeros(2, 1, 1, 1), r'got \[2, 1, 1, 1\]'),
    (torch.zeros(2, 3, 8, 8), r'got \[2, 3, 8, 8\].*in_chans'),
    (torch.zeros(1, 8, 8), r'got \[1, 8, 8\]'),
    (torch.zeros(2, 1, 8, 8, dtype=torch.uint8), 'floating point.*torch.uint8'),
])
def test_images_that_do_not_fit(tiny, x, message):
    with pytest.raises(ShapeError, match=message):
        build(tiny, 'saim')(x)


@pytest.mark.parametrize(('ranks', 'got'), [
    (torch.zeros(3, 15, dtype=torch.int64), r'int64 \(3, 15\)'),
    (torch.zeros(2, 16, dtype=torch.int64), r'int64 \(2, 16\)'),
    (torch.zeros(16, dtype=torch.int64), r'int64 \(16,\)'),
    (torch.zeros(3, 16, dtype=torch.int32), r'int32 \(3, 16\)'),
    (torch.zeros(3, 16), r'float32 \(3, 16\)'),
    ([[0] * 16] * 3, 'list'),
])
def test_ranks_that_do_not_fit(tiny, ranks, got):
    with pytest.raises(ShapeError, match=rf'torch.int64 of shape \(3, 16\).*got.*{got}'):
        build(tiny, 'saim')(images(), ranks)


def test_next_token_decoder_follows_raster_order_alone(tiny):
    model = build(tiny, 'randsac next token')
    raster = torch.arange(16).expand(3, -1)
    assert torch.equal(model(images(), raster).ranks, raster)
    with pytest.raises(SerializationError, match='raster'):
        model(images(), raster.flip(1))
    one_image = raster.clone()
    one_image[1] = torch.arange(15, -1, -1)
    with pytest.raises(SerializationError, match='raster'):
        model(images(), one_image)
    for serialization in ({'serialization': 'random'}, BLOBS):
        with pytest.raises(SerializationError, match="serialization='raster'"):
            timm.create_model('randsac_vit_tiny', **tiny, **serialization, decoder='none')


@pytest.mark.parametrize(('options', 'message'), [
    ({'segments': 100}, r'100 segments do not fit.*4 x 4 = 16 tokens'),
    ({'segments': (2, 5)}, r'\(11, 5\), not \(5, 11\)'),
    ({'segments': ()}, r'got segments=\(\)'),
    ({'segments': 0}, 'got 0'),
    ({'segments': (5, -1)}, 'got -1'),
    ({'segments': 2.5}, '2.5'),
    ({'serialization': 'squares', 'segments': 5}, '5 squares do not tile.*Possible here: 16, 4'),
    ({'serialization': 'squares', 'segments': None}, 'squares needs the number of segments'),
    ({'serialization': 'random', 'segments': 5}, 'neither segments'),
    ({'serialization': 'raster', 'shuffle': True}, 'nor shuffle'),
    ({'serialization': 'blob', 'segments': None}, "'blob'.*'blobs'"),
    ({'first_segment': 'all'}, "'self'.*'none'.*'all'"),
])
def test_serializations_that_cannot_be(tiny, options, message):
    with pytest.raises(SerializationError, match=message):
        timm.create_model('randsac_vit_tiny', **{**tiny, **options})


@pytest.mark.parametrize(('options', 'message'), [
    ({'decoder': 'cross'}, "'masked', 'parallel' or 'none'.*'cross'"),
    ({'memory': 'first'}, "'mix' or 'last'.*'first'"),
    ({'memory': 'output'}, "'mix' or 'last'.*'output'"),
    ({'decoder': 'parallel', 'memory': 'mix'}, "'output' or 'input'.*'mix'"),
    ({'decoder': 'parallel', 'memory': 'input'}, 'shared=True'),
    ({'head': 'conv'}, "'linear' or 'mlp'.*'conv'"),
    ({'shared': True}, "shared=True has no effect with decoder='masked'"),
    ({'decoder': 'parallel', 'decoder_dim': 16}, "decoder_dim=16 has no effect with decoder='parallel'"),
    ({'decoder': 'parallel', 'decoder_heads': 2}, "decoder_heads=2 has no effect with decoder='parallel'"),
    ({'decoder': 'none', 'serialization': 'raster', 'segments': None, 'memory': 'mix'},
     "memory='mix' has no effect with decoder='none'"),
    ({'decoder': 'none', 'serialization': 'raster', 'segments': None, 'decoder_depth': 2},
     "decoder_depth=2 has no effect with decoder='none'"),
    ({'decoder': 'parallel', 'decoder_depth': 3}, r'divide the 4 encoder blocks: one of \[1, 2, 4\], got 3'),
    ({'decoder': 'parallel', 'decoder_depth': 0}, 'got 0'),
    ({'decoder': 'parallel', 'decoder_depth': 2, 'shared': True}, 'leave decoder_depth out'),
    ({'decoder_depth': 0}, 'of at least 1, got 0'),
    ({'decoder_depth': 2.5}, '2.5'),
    ({'attn_drop_rate': 0.1}, 'attn_drop_rate'),
    ({'patch_drop_rate': 0.5}, 'patch_drop_rate'),
    ({'pos_embed': 'none'}, 'pos_embed'),
    ({'dynamic_img_size': True}, 'dynamic_img_size'),
    ({'depth': 0}, 'depth'),
    ({'blur': (4, 1.0)}, r'odd kernel size.*\(4, 1.0\)'),
    ({'blur': (9, 0.0)}, 'positive sigma'),
    ({'blur': (9, float('nan'))}, 'positive sigma'),
    ({'blur': (9,)}, r'\(9,\)'),
    ({'blur': 9}, r'such as \(9, 1.0\); got 9'),
    ({'blur': True}, r'such as \(9, 1.0\); got True'),
    ({'blur': ('wide', 1.0)}, 'wide'),
    ({'patch_size': 1}, 'norm_pix=False'),
])
def test_models_that_cannot_be(tiny, options, message):
    with pytest.raises(ModelError, match=message):
        timm.create_model('randsac_vit_tiny', **{**tiny, 'segments': (5, 2), **options})


@pytest.mark.parametrize('options', [
    {'decoder_dim': 30}, {'decoder_heads': 3}, {'decoder_dim': 0}, {'decoder_heads': 0}, {'decoder_dim': -32}])
def test_decoder_sizes_that_do_not_fit(tiny, options):
    with pytest.raises(UsageError, match=str(next(iter(options.values())))):
        timm.create_model('randsac_vit_tiny', **tiny, segments=(5, 2), **options)


@pytest.mark.parametrize(('name', 'option', 'near'), [
    ('randsac_vit_tiny', 'decoder_dept', 'decoder_depth'),
    ('saim_vit_tiny', 'serialisation', 'serialization'),
    ('vit_tiny_saim', 'img_sise', 'img_size'),
    ('vit_tiny_randsac', 'global_poool', 'global_pool'),
])
def test_unknown_option_names_the_near_one(tiny, name, option, near):
    with pytest.raises(ModelError, match=rf"{name} has no option '{option}'.*'{near}'"):
        timm.create_model(name, **tiny, **{option: 2})


def test_options_of_a_classifier_are_refused(tiny):
    for option in ({'num_classes': 10}, {'global_pool': 'avg'}, {'features_only': True}):
        with pytest.raises(ModelError):
            timm.create_model('saim_vit_tiny', **tiny, **option)


@pytest.mark.parametrize(('name', 'message'), [
    ('saim_vit_tny', "Unknown.*'saim_vit_tny'.*'saim_vit_tiny'"),
    ('randsac', "Did you mean 'randsac_vit"),
    ('vit_tiny_saim', "encoder.*'saim_vit_tiny'"),
    ('resnet18', 'encoder.*Known:.*saim_vit_tiny'),
    ('', 'Known:.*saim_vit_tiny'),
    ('saim_vit_tiny.cifar10', "'saim_vit_tiny' has no tag 'cifar10'.*untrained"),
    ('saim_vit_tiny.untraind', "Did you mean 'untrained'"),
])
def test_unknown_model_or_tag(name, message):
    with pytest.raises(ModelError, match=message):
        create_pretraining_model(name)


def test_create_pretraining_model(tiny):
    for name in ('saim_vit_tiny', 'saim_vit_tiny.untrained'):
        assert isinstance(create_pretraining_model(name, **tiny), AutoregressiveViT)


def test_no_published_weights_yet_is_said_so(tiny):
    with pytest.raises(RuntimeError, match='No pretrained weights exist for saim_vit_tiny'):
        timm.create_model('saim_vit_tiny', pretrained=True, **tiny)


@pytest.mark.parametrize(('name', 'options', 'message'), [
    ('resnet18', {}, 'VisionTransformer.*got ResNet'),
    ('vit_small_patch16_18x2_224', {'img_size': 32, 'depth': 2}, 'plain Blocks.*got ParallelThingsBlock'),
    ('vit_tiny_patch16_224', {'img_size': 32, 'attn_drop_rate': 0.1}, 'attn_drop_rate'),
    ('vit_tiny_patch16_224', {'img_size': 32, 'scale_attn_norm': True}, 'scale_attn_norm'),
    ('vit_tiny_patch16_224', {'img_size': 32, 'no_embed_class': True}, 'no_embed_class'),
])
def test_only_plain_vision_transformers_are_pretrained(name, options, message):
    decoder = MaskedDecoder(timm.create_model('vit_tiny_patch16_224', img_size=32, num_classes=0), 32, 1, 2)
    with pytest.raises(ModelError, match=message):
        AutoregressiveViT(timm.create_model(name, num_classes=0, **options), Serialization('random', (2, 2)), decoder,
                          PixelTarget((16, 16), 3))


def test_stock_vision_transformer_is_pretrained():
    encoder = timm.create_model('vit_tiny_patch16_224', img_size=32, num_classes=0, init_values=0.1, depth=2)
    model = AutoregressiveViT(
        encoder, Serialization('random', (2, 2)), MaskedDecoder(encoder, 32, 1, 2), PixelTarget((16, 16), 3))
    model(images(2, 3, (32, 32))).loss.backward()
    assert encoder.blocks[1].attn.qkv.weight.grad.abs().sum() > 0
    assert encoder.cls_token.grad.abs().sum() > 0


@pytest.mark.parametrize('classes', [0, 10])
@pytest.mark.parametrize(('source', 'options', 'named'), [
    ('resnet18', {}, r'bn1\.running_mean'),
    ('vit_tiny_randsac', {'depth': 5}, r'blocks\.4\.'),
    ('vit_tiny_randsac', {'depth': 3}, r'blocks\.3\.'),
    ('vit_tiny_randsac', {'embed_dim': 64}, r'with embed_dim=64,'),
    ('vit_tiny_saim', {}, 'Unexpected: cls_token.* with class_token=True,'),
])
def test_weights_of_another_architecture(tiny, tmp_path, source, options, named, classes):
    """Whether or not a new classifier is asked for, weights that do not fit are never left out in silence."""
    sizes = {} if source == 'resnet18' else {**tiny, 'in_chans': 3}
    torch.save(timm.create_model(source, num_classes=0, **{**sizes, **options}).state_dict(), tmp_path / 'other.pth')
    with pytest.raises(CheckpointError, match=named):
        timm.create_model('vit_tiny_randsac', pretrained=True, num_classes=classes, **{**tiny, 'in_chans': 3},
                          pretrained_cfg_overlay={'file': str(tmp_path / 'other.pth')})


@pytest.mark.parametrize(('source', 'options', 'named'), [
    ('vit_tiny_randsac', {}, r'encoder\.blocks\.0'),
    ('randsac_vit_tiny', {'depth': 5}, r'encoder\.blocks\.4\.'),
    ('randsac_vit_tiny', {'decoder_depth': 2}, r'decoder\.blocks\.2\.'),
    ('randsac_vit_tiny', {'decoder': 'parallel'}, r'decoder\.blocks\.0'),
])
def test_pretraining_weights_of_another_architecture(tiny, tmp_path, source, options, named):
    segments = {'segments': (5, 2)} if source == 'randsac_vit_tiny' else {}
    torch.save(timm.create_model(source, **{**tiny, **segments, **options}).state_dict(), tmp_path / 'other.pth')
    with pytest.raises(CheckpointError, match=named):
        timm.create_model('randsac_vit_tiny', pretrained=True, **tiny, segments=(5, 2),
                          pretrained_cfg_overlay={'file': str(tmp_path / 'other.pth')})


@pytest.mark.parametrize('design', ['randsac', 'saim', 'saim shared', 'randsac next token'])
def test_own_weights_load_through_timms_door(tiny, tmp_path, design):
    model = build(tiny, design).eval()
    torch.save(model.state_dict(), tmp_path / 'weights.pth')

    loaded = build(tiny, design, pretrained=True,
                   pretrained_cfg_overlay={'file': str(tmp_path / 'weights.pth')}).eval()

    x, ranks = images(), model.draw_ranks(3)
    assert torch.equal(loaded(x, ranks).pred, model(x, ranks).pred)


def test_own_weights_fit_another_image_size(tiny, tmp_path):
    model = build(tiny, 'randsac')
    torch.save(model.state_dict(), tmp_path / 'weights.pth')

    wide = build(tiny, 'randsac', img_size=(8, 16), pretrained=True,
                 pretrained_cfg_overlay={'file': str(tmp_path / 'weights.pth')})

    assert torch.equal(wide.decoder.pos_embed, build(tiny, 'randsac', img_size=(8, 16)).decoder.pos_embed)
    assert torch.equal(wide.encoder.blocks[0].attn.qkv.weight, model.encoder.blocks[0].attn.qkv.weight)
    assert wide(images(size=(8, 16))).pred.shape == (3, 32, 4)


@pytest.mark.parametrize('design', ['randsac registers', 'saim'])
@pytest.mark.parametrize('channels', [1, 2, 3, 5])
def test_exported_folders_load(tiny, tmp_path, design, channels):
    model = build(tiny, design, in_chans=channels).eval()
    export_encoder(model.encoder, tmp_path / 'encoder')
    export_pretraining(model, tmp_path / 'pretrain')

    encoder = timm.create_model(f'local-dir:{tmp_path / "encoder"}', pretrained=True).eval()
    loaded = timm.create_model(f'local-dir:{tmp_path / "pretrain"}', pretrained=True).eval()

    x, ranks = images(3, channels), model.draw_ranks(3)
    assert torch.equal(encoder(x), model.encoder(x))
    assert torch.equal(loaded(x, ranks).pred, model(x, ranks).pred)
