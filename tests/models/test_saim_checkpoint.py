"""SAIM's published checkpoints, against a reference of their forward pass written from the paper.

The reference works on dense masks over the image's own order, from SAIM's noise vector r; nothing of the package is
used in it.
"""

import logging
import re

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from autoreg_vit.errors import CheckpointError

DIM, HEADS, GRID, PATCH = 32, 2, 8, 4
SIZES = {'embed_dim': DIM, 'num_heads': HEADS}
NAME = 'saim_vit_tiny_patch4_32'
ENCODER = 'vit_tiny_patch4_32_saim'


def published_checkpoint(depth: int = 3, queries: int | None = None, dim: int = DIM) -> dict[str, torch.Tensor]:
    """Random weights in the layout of SAIM's published files, without the outer {'model': ...}."""
    tokens, values = GRID * GRID, PATCH * PATCH * 3
    shapes = {'cls_token': (1, 1, dim), 'pos_embed': (1, tokens + 1, dim),
              'patch_embed.proj.weight': (dim, 3, PATCH, PATCH), 'patch_embed.proj.bias': (dim,)}
    for stream, blocks in (('blocks', depth), ('query_blocks', depth if queries is None else queries)):
        for i in range(blocks):
            block = f'{stream}.{i}'
            for part in ('norm1', 'norm2'):
                shapes |= {f'{block}.{part}.weight': (dim,), f'{block}.{part}.bias': (dim,)}
            for part in ('attn.q', 'attn.k', 'attn.v', 'attn.proj'):
                shapes |= {f'{block}.{part}.weight': (dim, dim), f'{block}.{part}.bias': (dim,)}
            shapes |= {f'{block}.mlp.fc1.weight': (4 * dim, dim), f'{block}.mlp.fc1.bias': (4 * dim,),
                       f'{block}.mlp.fc2.weight': (dim, 4 * dim), f'{block}.mlp.fc2.bias': (dim,)}
    shapes |= {'norm.weight': (dim,), 'norm.bias': (dim,),
               'prediction_head.fc1.weight': (4 * dim, dim), 'prediction_head.fc1.bias': (4 * dim,),
               'prediction_head.fc2.weight': (values, 4 * dim), 'prediction_head.fc2.bias': (values,),
               'gaussian_blur.weight': (3, 1, 9, 9)}
    weights = {name: torch.randn(shape) * 0.2 for name, shape in shapes.items()}
    for name in weights:
        if 'norm' in name and name.endswith('weight'):
            weights[name] += 1
    return weights


class Reference:
    """SAIM's model on a published checkpoint."""

    def __init__(self, weights: dict[str, torch.Tensor]):
        self.w = weights
        self.depth = 1 + max(int(k.split('.')[1]) for k in weights if k.startswith('blocks.'))
        self.queries = 1 + max(int(k.split('.')[1]) for k in weights if k.startswith('query_blocks.'))

    def norm(self, name, x):
        return F.layer_norm(x, x.shape[-1:], self.w[f'{name}.weight'], self.w[f'{name}.bias'], eps=1e-6)

    def linear(self, name, x):
        return x @ self.w[f'{name}.weight'].T + self.w[f'{name}.bias']

    def mlp(self, name, x):
        return self.linear(f'{name}.fc2', F.gelu(self.linear(f'{name}.fc1', x)))

    def attention(self, name, x, memory, blocked):
        heads = []
        for h in range(HEADS):
            part = slice(h * DIM // HEADS, (h + 1) * DIM // HEADS)
            q = self.linear(f'{name}.q', x)[..., part]
            k = self.linear(f'{name}.k', memory)[..., part]
            v = self.linear(f'{name}.v', memory)[..., part]
            scores = q @ k.transpose(1, 2) / (DIM // HEADS) ** 0.5
            heads.append(scores.masked_fill(blocked, -torch.inf).softmax(-1) @ v)
        return self.linear(f'{name}.proj', torch.cat(heads, dim=-1))

    def block(self, name, x, memory, blocked):
        attended = self.attention(
            f'{name}.attn', self.norm(f'{name}.norm1', x), self.norm(f'{name}.norm1', memory), blocked)
        x = x + attended
        return x + self.mlp(f'{name}.mlp', self.norm(f'{name}.norm2', x))

    def embed(self, images):
        """Class token and patches with their positions, [B, 1 + N, D]."""
        patches = F.conv2d(images, self.w['patch_embed.proj.weight'], self.w['patch_embed.proj.bias'], stride=PATCH)
        patches = patches.flatten(2).transpose(1, 2)
        return torch.cat([self.w['cls_token'].expand(len(images), -1, -1), patches], dim=1) + self.w['pos_embed']

    def predict(self, images, noise, memory='output'):
        batch, tokens = noise.shape
        content = torch.zeros(batch, tokens + 1, tokens + 1, dtype=torch.bool)
        content[:, 1:, 1:] = noise[:, :, None] < noise[:, None, :]  # Eq. 3
        content[:, 0, 1:] = True  # the class token sees itself alone
        query = torch.zeros(batch, tokens, tokens + 1, dtype=torch.bool)
        query[:, :, 1:] = noise[:, :, None] <= noise[:, None, :]
        h = self.embed(images)
        g = self.w['pos_embed'][:, 1:].expand(batch, -1, -1)
        stride = self.depth // self.queries
        for i in range(self.depth):
            before, h = h, self.block(f'blocks.{i}', h, h, content)
            if (i + 1) % stride == 0:
                g = self.block(f'query_blocks.{i // stride}', g, h if memory == 'output' else before, query)
        return self.mlp('prediction_head', self.norm('norm', g))

    def target(self, images):
        offsets = torch.arange(-4.0, 5.0)
        kernel = torch.exp(-(offsets[:, None] ** 2 + offsets[None] ** 2) / 2)
        kernel = (kernel / kernel.sum()).expand(3, 1, 9, 9)
        blurred = F.conv2d(images, kernel, padding=4, groups=3)
        patches = blurred.reshape(-1, 3, GRID, PATCH, GRID, PATCH)
        patches = torch.einsum('bchpwq->bhwpqc', patches).reshape(len(images), GRID * GRID, -1)
        mean = patches.mean(-1, keepdim=True)
        variance = ((patches - mean) ** 2).sum(-1, keepdim=True) / (patches.shape[-1] - 1)
        return (patches - mean) / (variance + 1e-6) ** 0.5

    def features(self, images):
        """All tokens after the final norm, without masks."""
        x = self.embed(images)
        for i in range(self.depth):
            x = self.block(f'blocks.{i}', x, x, torch.zeros((), dtype=torch.bool))
        return self.norm('norm', x)


def write(folder, weights: dict[str, torch.Tensor], suffix: str = '.pth') -> dict:
    """The overlay that points timm's door to the weights."""
    path = folder / f'checkpoint{suffix}'
    if suffix == '.safetensors':
        save_file(weights, path)
    else:
        torch.save({'model': weights}, path)
    return {'file': str(path)}


@pytest.mark.parametrize(('depth', 'queries'), [(3, 3), (4, 2), (4, 1), (1, 1)])
@pytest.mark.parametrize('suffix', ['.pth', '.safetensors'])
def test_published_weights_predict_as_published(tmp_path, depth, queries, suffix):
    weights = published_checkpoint(depth, queries)
    reference = Reference(weights)
    images, noise = torch.randn(2, 3, 32, 32), torch.rand(2, 64)

    model = timm.create_model(NAME, **SIZES, depth=depth, decoder_depth=queries, pretrained=True,
                              pretrained_cfg_overlay=write(tmp_path, weights, suffix)).eval()
    with torch.no_grad():
        output = model(images, noise.argsort(1).argsort(1))

    pred, target = reference.predict(images, noise), reference.target(images)
    assert pred.abs().mean() > 0.1
    torch.testing.assert_close(output.pred, pred, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(output.target, target, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(output.loss, ((pred - target) ** 2).mean(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('memory', ['output', 'input'])
def test_two_streams_with_shared_weights(tmp_path, memory):
    """SAIM Table 3 and RandSAC 4.2: the query blocks are the encoder's. Equation 5 reads the input of the block beside,
    the published code its output."""
    weights = published_checkpoint()
    weights |= {f'query_{k}': v for k, v in weights.items() if k.startswith('blocks.')}
    images, noise = torch.randn(2, 3, 32, 32), torch.rand(2, 64)
    own = timm.create_model(NAME, **SIZES, depth=3, pretrained=True, pretrained_cfg_overlay=write(tmp_path, weights))

    shared = timm.create_model(NAME, **SIZES, depth=3, shared=True, memory=memory).eval()
    shared.load_state_dict({k: v for k, v in own.state_dict().items() if not k.startswith('decoder.')})
    with torch.no_grad():
        pred = shared(images, noise.argsort(1).argsort(1)).pred

    torch.testing.assert_close(pred, Reference(weights).predict(images, noise, memory), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('classes', [0, 10])
@pytest.mark.parametrize('suffix', ['.pth', '.safetensors'])
def test_encoder_door_gives_published_features(tmp_path, classes, suffix):
    weights = published_checkpoint()
    images = torch.randn(2, 3, 32, 32)

    encoder = timm.create_model(ENCODER, **SIZES, depth=3, num_classes=classes, pretrained=True,
                                pretrained_cfg_overlay=write(tmp_path, weights, suffix)).eval()
    with torch.no_grad():
        features = encoder.forward_features(images)
        output = encoder(images)

    expected = Reference(weights).features(images)
    torch.testing.assert_close(features, expected, rtol=1e-5, atol=1e-5)
    if classes:
        assert output.shape == (2, 10)
        torch.testing.assert_close(output, encoder.head(expected[:, 0]), rtol=1e-5, atol=1e-5)
    else:
        torch.testing.assert_close(output, expected[:, 0], rtol=1e-5, atol=1e-5)  # SAIM's feature is the class token


def test_fine_tuned_weights_keep_their_classifier(tmp_path, caplog):
    weights = {k: v for k, v in published_checkpoint().items() if not k.startswith(('query', 'prediction', 'gaussian'))}
    weights |= {'head.weight': torch.randn(10, DIM), 'head.bias': torch.randn(10)}
    overlay = {**write(tmp_path, weights), 'num_classes': 10}

    encoder = timm.create_model(ENCODER, **SIZES, depth=3, num_classes=10, pretrained=True,
                                pretrained_cfg_overlay=overlay)
    assert torch.equal(encoder.head.weight, weights['head.weight'])

    other = timm.create_model(ENCODER, **SIZES, depth=3, num_classes=7, pretrained=True,
                              pretrained_cfg_overlay=overlay)
    assert other.head.weight.shape == (7, DIM)
    assert torch.equal(other.norm.weight, weights['norm.weight'])

    headless = timm.create_model(ENCODER, **SIZES, depth=3, pretrained=True,
                                 pretrained_cfg_overlay=write(tmp_path, weights))
    assert torch.equal(headless.norm.weight, weights['norm.weight'])
    assert {'head.weight', 'head.bias'} <= names_in(warnings_of(caplog))


def warnings_of(caplog) -> str:
    records = [r for r in caplog.records if r.name.startswith('autoreg_vit') and r.levelno >= logging.WARNING]
    return '\n'.join(r.getMessage() for r in records)


def names_in(text: str) -> set[str]:
    return set(re.findall(r'[\w.]+\.\w+', text))


def test_what_a_pretraining_model_leaves_out_is_named(tmp_path, caplog):
    timm.create_model(NAME, **SIZES, depth=3, pretrained=True,
                      pretrained_cfg_overlay=write(tmp_path, published_checkpoint()))
    assert names_in(warnings_of(caplog)) == {'gaussian_blur.weight'}


def test_what_an_encoder_leaves_out_is_named(tmp_path, caplog):
    weights = published_checkpoint()
    timm.create_model(ENCODER, **SIZES, depth=3, pretrained=True, pretrained_cfg_overlay=write(tmp_path, weights))
    left_out = {k for k in weights if k.startswith(('query_blocks.', 'prediction_head.', 'gaussian_blur.'))}
    named = names_in(warnings_of(caplog))
    # q, k and v may be named as the one tensor that they become
    assert {k for k in left_out if '.attn.' not in k} <= named
    assert all(k.startswith(('query_blocks.', 'prediction_head.', 'gaussian_blur.')) for k in named)
    assert {re.sub(r'\.attn\.[qkv]\.', '.attn.qkv.', k) for k in left_out} == {
        re.sub(r'\.attn\.[qkv]\.', '.attn.qkv.', k) for k in named}


def test_untrained_classifier_is_named(tmp_path, caplog):
    timm.create_model(ENCODER, **SIZES, depth=3, num_classes=10, pretrained=True,
                      pretrained_cfg_overlay=write(tmp_path, published_checkpoint()))
    assert {'head.weight', 'head.bias'} <= names_in(warnings_of(caplog))


@pytest.mark.parametrize('name', [NAME, ENCODER])
def test_tensors_of_something_else_are_refused_by_name(tmp_path, name):
    weights = published_checkpoint() | {'something_else.weight': torch.zeros(1)}
    with pytest.raises(CheckpointError, match=r'something_else\.weight'):
        timm.create_model(name, **SIZES, depth=3, pretrained=True, pretrained_cfg_overlay=write(tmp_path, weights))


@pytest.mark.parametrize('missing', ['query_blocks.1.mlp.fc1.bias', 'prediction_head.fc2.weight', 'norm.bias'])
def test_pretraining_model_without_a_needed_tensor_is_refused(tmp_path, missing):
    weights = published_checkpoint()
    del weights[missing]
    own_name = missing.replace('query_', 'decoder.').replace('prediction_', '').replace('norm.', 'encoder.norm.')
    with pytest.raises(CheckpointError, match=re.escape(own_name)):
        timm.create_model(NAME, **SIZES, depth=3, pretrained=True, pretrained_cfg_overlay=write(tmp_path, weights))


@pytest.mark.parametrize('classes', [0, 10])
def test_encoder_without_a_needed_tensor_is_refused(tmp_path, classes):
    weights = published_checkpoint()
    del weights['blocks.1.mlp.fc1.bias']
    with pytest.raises(CheckpointError, match=r'blocks\.1\.mlp\.fc1\.bias'):
        timm.create_model(ENCODER, **SIZES, depth=3, num_classes=classes, pretrained=True,
                          pretrained_cfg_overlay=write(tmp_path, weights))


@pytest.mark.parametrize('name', [NAME, ENCODER])
@pytest.mark.parametrize('lacks', ['q', 'k', 'v', 'qk', 'kv'])
def test_incomplete_attention_is_refused(tmp_path, name, lacks):
    weights = published_checkpoint()
    for letter in lacks:
        del weights[f'blocks.2.attn.{letter}.weight']
    with pytest.raises(CheckpointError, match=rf'blocks\.2\.attn\.{lacks[0]}\.weight'):
        timm.create_model(name, **SIZES, depth=3, pretrained=True, pretrained_cfg_overlay=write(tmp_path, weights))


@pytest.mark.parametrize('classes', [0, 10])
@pytest.mark.parametrize(('sizes', 'named'), [
    ({'depth': 4}, r'blocks\.3\.'), ({'depth': 2}, r'blocks\.2\.'),
    ({'depth': 3, 'embed_dim': 64}, r'cls_token is \[1, 1, 32\].* with embed_dim=32,')])
def test_encoder_of_another_size_is_refused(tmp_path, sizes, named, classes):
    with pytest.raises(CheckpointError, match=named):
        timm.create_model(ENCODER, **{**SIZES, **sizes}, num_classes=classes, pretrained=True,
                          pretrained_cfg_overlay=write(tmp_path, published_checkpoint()))


@pytest.mark.parametrize(('sizes', 'named'), [
    ({'depth': 4}, r'encoder\.blocks\.3\.'), ({'depth': 2}, r'blocks\.2\.'),
    ({'depth': 3, 'decoder_depth': 1}, r'blocks\.2\.'),
    ({'depth': 3, 'embed_dim': 64}, r'(encoder|decoder|head)\.\S+ is \[')])
def test_pretraining_model_of_another_size_is_refused(tmp_path, sizes, named):
    with pytest.raises(CheckpointError, match=named):
        timm.create_model(NAME, **{**SIZES, **sizes}, pretrained=True,
                          pretrained_cfg_overlay=write(tmp_path, published_checkpoint()))


@pytest.mark.parametrize('size', [(64, 64), (32, 48)])
def test_another_image_size_resamples_positions(tmp_path, size):
    weights = published_checkpoint()
    overlay = write(tmp_path, weights)
    options = {**SIZES, 'depth': 3, 'img_size': size, 'pretrained': True, 'pretrained_cfg_overlay': overlay}
    tokens = size[0] // PATCH * (size[1] // PATCH)

    model, encoder = timm.create_model(NAME, **options), timm.create_model(ENCODER, **options)

    assert model(torch.randn(1, 3, *size)).pred.shape == (1, tokens, 48)
    for vit in (model.encoder, encoder):
        assert vit.pos_embed.shape == (1, 1 + tokens, DIM)
        assert torch.equal(vit.pos_embed[:, 0], weights['pos_embed'][:, 0])
        assert torch.equal(vit.blocks[0].attn.proj.weight, weights['blocks.0.attn.proj.weight'])
        # resampled, not computed anew: about the same mean, and far from the sines' length
        torch.testing.assert_close(
            vit.pos_embed[:, 1:].mean(1), weights['pos_embed'][:, 1:].mean(1), rtol=0, atol=0.05)


def test_full_size_name_takes_the_published_layout():
    """The published files are ViT-B/16 at 224: every tensor of the model has its place in them, and no other."""
    with torch.device('meta'):
        model = timm.create_model('saim_vit_base')
    shapes = {name: tuple(p.shape) for name, p in model.state_dict().items()}
    assert shapes['encoder.pos_embed'] == (1, 197, 768)
    assert shapes['decoder.blocks.11.attn.qkv.weight'] == (3 * 768, 768)
    assert shapes['head.fc1.weight'] == (4 * 768, 768)
    assert shapes['head.fc2.weight'] == (16 * 16 * 3, 4 * 768)
    assert len(shapes) == 4 + 2 * 12 * 12 + 2 + 4
