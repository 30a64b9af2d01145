"""`autoreg-vit convert`, on random tensors in the published layouts of SAIM and MAE."""

import argparse
import json
import random
import re
from pathlib import Path

import pytest
import timm
import torch

pytest.importorskip('sklearn')

from safetensors.torch import load_file, save_file

from autoreg_vit.artifacts import sha256_of, verify_checksum
from autoreg_vit.commands.cli import main
from tests.models.test_saim_checkpoint import Reference, published_checkpoint

WIDTH, DEPTH, PATCH, GRID = 128, 2, 4, 3


def mae_checkpoint(decoder: bool = True, classes: int = 0, pooled: bool = False) -> dict[str, torch.Tensor]:
    """MAE's layout: timm's ViT, with a decoder of width 64 beside it, or fine-tuned with a classifier."""
    tokens = 1 + GRID * GRID

    def blocks(prefix: str, width: int, count: int) -> dict[str, tuple[int, ...]]:
        shapes = {}
        for i in range(count):
            block = f'{prefix}.{i}'
            for name, shape in (('norm1', (width,)), ('attn.qkv', (3 * width, width)), ('attn.proj', (width, width)),
                                ('norm2', (width,)), ('mlp.fc1', (4 * width, width)), ('mlp.fc2', (width, 4 * width))):
                shapes |= {f'{block}.{name}.weight': shape, f'{block}.{name}.bias': shape[:1]}
        return shapes

    norm = 'fc_norm' if pooled else 'norm'
    shapes = {'cls_token': (1, 1, WIDTH), 'pos_embed': (1, tokens, WIDTH),
              'patch_embed.proj.weight': (WIDTH, 3, PATCH, PATCH), 'patch_embed.proj.bias': (WIDTH,),
              **blocks('blocks', WIDTH, DEPTH), f'{norm}.weight': (WIDTH,), f'{norm}.bias': (WIDTH,)}
    if decoder:
        shapes |= {'mask_token': (1, 1, 64), 'decoder_pos_embed': (1, tokens, 64), 'decoder_embed.weight': (64, WIDTH),
                   'decoder_embed.bias': (64,), **blocks('decoder_blocks', 64, 1), 'decoder_norm.weight': (64,),
                   'decoder_norm.bias': (64,), 'decoder_pred.weight': (PATCH * PATCH * 3, 64),
                   'decoder_pred.bias': (PATCH * PATCH * 3,)}
    if classes:
        shapes |= {'head.weight': (classes, WIDTH), 'head.bias': (classes,)}
    return {name: torch.randn(shape) * 0.1 for name, shape in shapes.items()}


def save(path: Path, weights: dict[str, torch.Tensor], **more) -> Path:
    torch.save({'model': weights, **more}, path)
    return path


def convert(*arguments: object) -> int:
    return main(['convert', *map(str, arguments)])


def error_of(capsys: pytest.CaptureFixture) -> str:
    error = capsys.readouterr().err
    assert error.count('\n') == 1 and error.startswith('autoreg-vit: ')
    return error


class TestSaim:
    @pytest.mark.parametrize('queries', [4, 2])
    def test_whole_model_predicts_as_published(self, tmp_path: Path, queries: int, capsys: pytest.CaptureFixture):
        weights = published_checkpoint(4, queries)
        # What a training script leaves beside them.
        save(tmp_path / 'saim.pth', weights, epoch=3, args=argparse.Namespace(lr=1e-3, model='saim_base'))
        assert convert(tmp_path / 'saim.pth', tmp_path / 'out', '--num-heads', 2) == 0
        reference, images, noise = Reference(weights), torch.randn(2, 3, 32, 32), torch.rand(2, 64)

        model = timm.create_model(f'local-dir:{tmp_path / "out" / "pretrain"}', pretrained=True).eval()
        encoder = timm.create_model(f'local-dir:{tmp_path / "out" / "encoder"}', pretrained=True).eval()
        with torch.no_grad():
            output, features = model(images, noise.argsort(1).argsort(1)), encoder.forward_features(images)
        torch.testing.assert_close(output.pred, reference.predict(images, noise), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(output.target, reference.target(images), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(features, reference.features(images), rtol=1e-5, atol=1e-5)
        assert type(encoder).__module__ == 'timm.models.vision_transformer'
        said = capsys.readouterr().out
        assert 'SAIM, a ViT of width 32, 4 blocks, 2 heads, patches of 4 x 4 in images of 32 x 32' in said
        assert f'dropped: gaussian_blur, prediction_head (4), query_blocks ({16 * queries})' in said

    def test_every_key_is_reported(self, tmp_path: Path):
        weights = published_checkpoint(2)
        save(tmp_path / 'saim.pth', weights)
        assert convert(tmp_path / 'saim.pth', tmp_path / 'out', '--num-heads', 2) == 0
        for kind in ('encoder', 'pretrain'):
            folder = tmp_path / 'out' / kind
            report = json.loads((folder / 'conversion.json').read_text())
            assert sorted([*report['kept'], *report['renamed'], *report['dropped']]) == sorted(weights)
            assert {*report['kept'], *report['renamed'].values()} == load_file(folder / 'model.safetensors').keys()
            assert report['missing'] == [] and report['sha256'] == sha256_of(tmp_path / 'saim.pth')
            for file in ('config.json', 'model.safetensors', 'README.md', 'conversion.json'):
                verify_checksum(folder / file)
        assert report['renamed']['query_blocks.1.attn.k.weight'] == 'decoder.blocks.1.attn.qkv.weight'
        assert report['dropped'] == ['gaussian_blur.weight']

    def test_fine_tuned(self, tmp_path: Path, capsys: pytest.CaptureFixture):
        weights = {k: v for k, v in published_checkpoint(2).items()
                   if not k.startswith(('query', 'prediction', 'gaussian'))}
        weights |= {'head.weight': torch.randn(7, 32), 'head.bias': torch.randn(7)}
        save(tmp_path / 'saim.pth', weights)
        assert convert(tmp_path / 'saim.pth', tmp_path / 'out', '--num-heads', 2) == 0
        assert [p.name for p in (tmp_path / 'out').iterdir()] == ['encoder']
        assert 'SAIM, fine-tuned,' in capsys.readouterr().out
        model = timm.create_model(f'local-dir:{tmp_path / "out" / "encoder"}', pretrained=True)
        assert torch.equal(model.head.weight, weights['head.weight'])

    def test_blur_is_that_of_the_checkpoint(self, tmp_path: Path):
        weights = published_checkpoint(2)
        for name, blur in (('five', torch.rand(3, 1, 5, 5)), ('none', None)):
            del weights['gaussian_blur.weight']
            if blur is not None:
                weights['gaussian_blur.weight'] = blur
            save(tmp_path / f'{name}.pth', weights)
            assert convert(tmp_path / f'{name}.pth', tmp_path / name, '--num-heads', 2) == 0
            model = timm.create_model(f'local-dir:{tmp_path / name / "pretrain"}', pretrained=True)
            assert model.target.blur == (None if blur is None else (5, 1.0))
            weights.setdefault('gaussian_blur.weight', torch.zeros(1))


class TestMae:
    @pytest.mark.parametrize('suffix', ['.pth', '.safetensors'])
    @pytest.mark.parametrize('decoder', [True, False])
    def test_encoder_is_timms(self, tmp_path: Path, decoder: bool, suffix: str, capsys: pytest.CaptureFixture):
        weights, path = mae_checkpoint(decoder), tmp_path / f'mae{suffix}'
        save_file(weights, path) if suffix == '.safetensors' else save(path, weights)
        assert convert(path, tmp_path / 'out') == 0
        assert 'MAE, a ViT of width 128, 2 blocks, 2 heads' in capsys.readouterr().out
        assert [p.name for p in (tmp_path / 'out').iterdir()] == ['encoder']

        encoder = timm.create_model(f'local-dir:{tmp_path / "out" / "encoder"}', pretrained=True).eval()
        own = timm.create_model('vit_tiny_patch16_224', img_size=12, patch_size=4, embed_dim=128, depth=2, num_heads=2,
                                num_classes=0).eval()
        own.load_state_dict({k: v for k, v in weights.items() if not k.startswith(('decoder_', 'mask_token'))})
        images = torch.randn(2, 3, 12, 12)
        with torch.no_grad():
            torch.testing.assert_close(encoder(images), own(images))
        report = json.loads((tmp_path / 'out' / 'encoder' / 'conversion.json').read_text())
        assert report['renamed'] == {} and sorted([*report['kept'], *report['dropped']]) == sorted(weights)
        assert all(key.startswith(('decoder_', 'mask_token')) for key in report['dropped'])

    def test_fine_tuned_by_average_pooling(self, tmp_path: Path):
        weights = mae_checkpoint(decoder=False, classes=5, pooled=True)
        assert convert(save(tmp_path / 'mae.pth', weights), tmp_path / 'out') == 0
        model = timm.create_model(f'local-dir:{tmp_path / "out" / "encoder"}', pretrained=True).eval()
        images = torch.randn(2, 3, 12, 12)
        with torch.no_grad():
            pooled = model.forward_features(images)[:, 1:].mean(1)
            normed = torch.nn.functional.layer_norm(pooled, (128,), weights['fc_norm.weight'], weights['fc_norm.bias'],
                                                    eps=1e-6)
            torch.testing.assert_close(model(images), normed @ weights['head.weight'].T + weights['head.bias'])

    def test_continues_in_probing(self, tmp_path: Path):
        """The folder is one that --weights takes, as a run's is."""
        from autoreg_vit.hub.lookup import load_encoder

        weights = mae_checkpoint()
        assert convert(save(tmp_path / 'mae.pth', weights), tmp_path / 'out') == 0
        assert torch.equal(load_encoder(str(tmp_path / 'out')).pos_embed, weights['pos_embed'])

    @pytest.mark.parametrize(('width', 'heads'), [(192, 3), (384, 6), (768, 12), (1024, 16), (1280, 16)])
    def test_heads_of_the_usual_widths(self, width: int, heads: int):
        from autoreg_vit.hub.conversion import encoder_sizes

        weights = {'cls_token': torch.empty(1, 1, width), 'pos_embed': torch.empty(1, 257, width),
                   'patch_embed.proj.weight': torch.empty(width, 3, 14, 14),
                   'blocks.0.mlp.fc1.weight': torch.empty(4 * width, 1)}
        sizes = encoder_sizes(weights, Path('mae.pth'), None)
        assert sizes['num_heads'] == heads and sizes['img_size'] == [224, 224] and sizes['mlp_ratio'] == 4


class TestWrapped:
    @pytest.mark.parametrize('wrap', [
        lambda w: {'state_dict': {f'module.{k}': v for k, v in w.items()}},
        lambda w: {f'_orig_mod.module.{k}': v for k, v in w.items()},
        lambda w: {'model': {k: v + 1 for k, v in w.items()}, 'model_ema': w},
        lambda w: {'state_dict': {}, 'state_dict_ema': w, 'epoch': 3}])
    def test_as_timm_takes_it(self, tmp_path: Path, wrap):
        weights = mae_checkpoint(decoder=False)
        torch.save(wrap(weights), tmp_path / 'mae.pth')
        assert convert(tmp_path / 'mae.pth', tmp_path / 'out') == 0
        converted = load_file(tmp_path / 'out' / 'encoder' / 'model.safetensors')
        assert all(torch.equal(weights[name], value) for name, value in converted.items())

    @pytest.mark.parametrize('layout', ['mae', 'saim'])
    @pytest.mark.parametrize(('wrap', 'prefix'), [
        (lambda w: {f'backbone.{k}': v for k, v in w.items()} | {'projector.weight': torch.zeros(2)}, 'backbone.'),
        (lambda w: {'teacher': {f'encoder.{k}': v for k, v in w.items()}, 'epoch': 3}, 'teacher.encoder.'),
        (lambda w: {'student': {f'module.{k}': v for k, v in w.items()}, 'centre': torch.zeros(1)}, 'student.module.')])
    def test_a_prefix_is_named_and_its_flag_works(
            self, tmp_path: Path, capsys: pytest.CaptureFixture, wrap, prefix: str, layout: str):
        weights = mae_checkpoint(decoder=False) if layout == 'mae' else published_checkpoint(2)
        torch.save(wrap(weights), tmp_path / 'weights.pth')
        arguments = [tmp_path / 'weights.pth', tmp_path / 'out', '--num-heads', 2]
        assert convert(*arguments) == 2
        advice = re.search(r'give (--prefix \S+),', error_of(capsys))[1]
        assert advice == f'--prefix {prefix}' and not (tmp_path / 'out').exists()
        assert convert(*arguments, *advice.split()) == 0
        report = json.loads((tmp_path / 'out' / 'encoder' / 'conversion.json').read_text())
        assert sorted([*report['kept'], *report['renamed'], *report['dropped']]) == sorted(weights)
        assert report.get('outside', []) == [k for k in ('centre', 'projector.weight') if k in wrap({})]
        assert convert(*arguments, '--prefix', 'nothing.') == 2
        assert f'give {advice},' in error_of(capsys)

    def test_a_prefix_that_is_none(self, tmp_path: Path, capsys: pytest.CaptureFixture):
        save(tmp_path / 'mae.pth', mae_checkpoint())
        assert convert(tmp_path / 'mae.pth', tmp_path / 'out', '--prefix', 'backbone.') == 2
        assert 'leave --prefix out' in error_of(capsys)


class TestErrors:
    """One line that names the file, whatever is wrong with it, and nothing written."""

    def damaged(self, path: Path, kind: str) -> None:
        weights = mae_checkpoint()
        if kind == 'text':
            path.write_text('not a checkpoint')
        elif kind == 'empty':
            path.write_bytes(b'')
        elif kind == 'cut':
            save(path, weights)
            path.write_bytes(path.read_bytes()[:3000])
        elif kind == 'pickle':
            torch.save({'model': weights, 'run': random.Random(0)}, path)
        elif kind == 'list':
            torch.save([1, 2], path)
        elif kind == 'no tensors':
            torch.save({'model': {'a': 1}}, path)
        elif kind == 'another model':
            save(path, {'conv1.weight': torch.zeros(3, 3)})
        elif kind == 'no class token':
            save(path, {k: v for k, v in weights.items() if k != 'cls_token'})
        elif kind == 'a block gone':
            save(path, {k: v for k, v in weights.items() if not k.startswith('blocks.0')})
        elif kind == 'not square':
            save(path, {**weights, 'pos_embed': torch.zeros(1, 9, WIDTH)})

    @pytest.mark.parametrize('suffix', ['.pth', '.safetensors'])
    @pytest.mark.parametrize('kind', ['none', 'text', 'empty', 'cut', 'pickle', 'list', 'no tensors', 'another model',
                                      'no class token', 'a block gone', 'not square'])
    def test_damaged_files(self, tmp_path: Path, capsys: pytest.CaptureFixture, kind: str, suffix: str):
        path = tmp_path / f'checkpoint{suffix}'
        self.damaged(path, kind)
        assert convert(path, tmp_path / 'out') == 2
        assert str(path) in error_of(capsys)
        assert not (tmp_path / 'out').exists()

    def test_no_code_runs(self, tmp_path: Path, capsys: pytest.CaptureFixture):
        class Harmful:
            def __reduce__(self):
                return Path.touch, (tmp_path / 'harm',)

        torch.save({'model': mae_checkpoint(), 'args': Harmful()}, tmp_path / 'mae.pth')
        assert convert(tmp_path / 'mae.pth', tmp_path / 'out') == 2
        assert 'a pickle can run code' in error_of(capsys) and not (tmp_path / 'harm').exists()

    @pytest.mark.parametrize(('change', 'message'), [
        ({'blocks.1.norm2.bias': None}, r'missing: blocks\.1\.norm2\.bias'),
        ({'norm.weight': torch.zeros(5)}, r'of another shape: norm\.weight \(5,\) for \(128,\)'),
        ({'blocks.0.attn.relative_position': torch.zeros(1)}, r'unexpected: blocks\.0\.attn\.relative_position')])
    def test_tensors_that_do_not_fit(
            self, tmp_path: Path, capsys: pytest.CaptureFixture, change: dict, message: str):
        weights = {k: v for k, v in {**mae_checkpoint(), **change}.items() if v is not None}
        assert convert(save(tmp_path / 'mae.pth', weights), tmp_path / 'out') == 2
        error = error_of(capsys)
        assert re.search(message, error) and 'It was read as a ViT of width 128 and 2 blocks' in error

    def test_incomplete_attention(self, tmp_path: Path, capsys: pytest.CaptureFixture):
        weights = published_checkpoint(2)
        del weights['blocks.0.attn.v.bias']
        assert convert(save(tmp_path / 'saim.pth', weights), tmp_path / 'out', '--num-heads', 2) == 2
        assert re.search(r'saim\.pth.*lacks blocks\.0\.attn\.v\.bias', error_of(capsys))

    def test_heads(self, tmp_path: Path, capsys: pytest.CaptureFixture):
        assert convert(save(tmp_path / 'mae.pth', mae_checkpoint()), tmp_path / 'out', '--num-heads', 3) == 2
        assert '3 heads do not divide the width 128' in error_of(capsys)

    def test_replaces_what_it_wrote_and_nothing_else(self, tmp_path: Path, capsys: pytest.CaptureFixture):
        path = save(tmp_path / 'mae.pth', mae_checkpoint())
        assert convert(path, tmp_path / 'out') == 0 == convert(path, tmp_path / 'out')
        (tmp_path / 'mine' / 'encoder').mkdir(parents=True)
        capsys.readouterr()
        assert convert(path, tmp_path / 'mine') == 2
        assert 'exists and is no converted checkpoint' in error_of(capsys)
