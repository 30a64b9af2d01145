"""Models that were changed after they were made, made with numbers of NumPy, or written by transformers: taken as they
are, or refused for what they are."""

import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from autoreg_vit.errors import CheckpointError, ModelError
from autoreg_vit.hub.folders import export_encoder, export_pretraining
from autoreg_vit.hub.lookup import load_encoder

SMALL = dict(img_size=16, patch_size=4, embed_dim=32, depth=4, num_heads=2)
IMAGES = torch.randn(2, 3, 16, 16)


def again(folder: Path) -> nn.Module:
    return timm.create_model(f'local-dir:{folder}', pretrained=True).eval()


@pytest.mark.parametrize('method', ['randsac', 'saim'])
@pytest.mark.parametrize('blocks', [[1], [0, 2], 3])
def test_an_encoder_of_fewer_blocks(method: str, blocks, tmp_path: Path):
    encoder = timm.create_model(f'vit_tiny_patch4_32_{method}', **SMALL).eval()
    encoder.prune_intermediate_layers(blocks)
    export_encoder(encoder, tmp_path / 'encoder')
    assert len(again(tmp_path / 'encoder').blocks) == len(encoder.blocks) < 4 or blocks == 3
    with torch.no_grad():
        assert torch.equal(again(tmp_path / 'encoder')(IMAGES), encoder(IMAGES))


def test_what_its_arguments_do_not_describe_leaves_the_old_folder(tmp_path: Path):
    encoder = timm.create_model('vit_tiny_patch4_32_randsac', **SMALL).eval()
    export_encoder(encoder, tmp_path / 'encoder')
    before = (tmp_path / 'encoder' / 'model.safetensors').read_bytes()
    encoder.blocks[1].mlp = nn.Identity()
    with pytest.raises(ModelError, match=r'was changed after it was made.*blocks\.1\.mlp'):
        export_encoder(encoder, tmp_path / 'encoder')
    assert (tmp_path / 'encoder' / 'model.safetensors').read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ['encoder']
    model = timm.create_model('randsac_vit_tiny_patch4_32', segments=3, decoder_depth=1, **SMALL)
    model.encoder.prune_intermediate_layers([1])  # its decoder still mixes four blocks
    with pytest.raises(ModelError, match='was changed after it was made'):
        export_pretraining(model, tmp_path / 'pretrain')
    assert not (tmp_path / 'pretrain').exists()


def test_exporting_draws_nothing(tmp_path: Path):
    encoder = timm.create_model('vit_tiny_patch4_32_randsac', **SMALL)
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    export_encoder(encoder, tmp_path / 'encoder')
    assert torch.equal(torch.rand(4), expected)


@pytest.mark.parametrize('wrap', [nn.DataParallel, torch.compile, lambda model: nn.DataParallel(torch.compile(model))])
def test_a_model_inside_a_wrapper(wrap, tmp_path: Path):
    model = timm.create_model('saim_vit_tiny_patch4_32', **SMALL).eval()
    export_pretraining(wrap(model), tmp_path / 'pretrain')
    export_encoder(wrap(model.encoder), tmp_path / 'encoder')
    ranks = model.draw_ranks(2)
    with torch.no_grad():
        assert torch.equal(again(tmp_path / 'pretrain')(IMAGES, ranks).pred, model(IMAGES, ranks).pred)
        assert torch.equal(again(tmp_path / 'encoder')(IMAGES), model.encoder(IMAGES))


def test_numbers_of_numpy(tmp_path: Path):
    options = dict(img_size=np.int64(16), patch_size=np.int32(4), embed_dim=np.int64(32), depth=np.int16(2),
                   num_heads=np.int64(2), drop_path_rate=np.float32(0.125))
    encoder = timm.create_model('vit_tiny_patch4_32_saim', **options).eval()
    model = timm.create_model('randsac_vit_tiny_patch4_32', **options, segments=(np.int64(5), np.int64(3)),
                              decoder_depth=np.int64(1), norm_pix=np.bool_(False)).eval()
    export_encoder(encoder, tmp_path / 'encoder', mean=(0.5,) * 3)
    export_pretraining(model, tmp_path / 'pretrain')
    assert json.loads((tmp_path / 'pretrain' / 'config.json').read_text())['model_args']['segments'] == [5, 3]
    with torch.no_grad():
        assert torch.equal(again(tmp_path / 'encoder')(IMAGES), encoder(IMAGES))
    assert again(tmp_path / 'pretrain').serialization == model.serialization


class TestFoldersOfTransformers:
    def test_a_model_that_timm_does_not_have(self, tmp_path: Path):
        (tmp_path / 'config.json').write_text(json.dumps({'model_type': 'vit', 'architectures': ['ViTModel']}))
        save_file({'embeddings.cls_token': torch.zeros(1, 1, 32)}, tmp_path / 'model.safetensors')
        with pytest.raises(ModelError, match=r'a model of transformers \(vit\)'):
            load_encoder(str(tmp_path))
        (tmp_path / 'config.json').write_text('[]')
        with pytest.raises(CheckpointError, match=r'config\.json is damaged'):
            load_encoder(str(tmp_path))

    def test_weights_in_shards(self, tmp_path: Path):
        export_encoder(timm.create_model('vit_tiny_patch4_32_randsac', **SMALL), tmp_path / 'encoder')
        folder = tmp_path / 'encoder'
        tensors = load_file(folder / 'model.safetensors')
        (folder / 'model.safetensors').unlink()
        for number in (1, 2):
            save_file({k: v for n, (k, v) in enumerate(sorted(tensors.items())) if n % 2 == number - 1},
                      folder / f'model-0000{number}-of-00002.safetensors')
        (folder / 'model.safetensors.index.json').write_text('{}')
        with pytest.raises(CheckpointError, match=r'in shards.*max_shard_size'):
            load_encoder(str(folder))
