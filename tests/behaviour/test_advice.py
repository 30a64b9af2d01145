"""Advice in errors about models and weights, followed to the letter: what a message says to do works."""

import ast
import json
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch

pytest.importorskip('sklearn')

from autoreg_vit.commands.cli import main
from autoreg_vit.engine.checkpoints import load_checkpoint, save_checkpoint
from autoreg_vit.errors import UsageError
from autoreg_vit.hub.lookup import load_encoder
from autoreg_vit.models import create_pretraining_model
from autoreg_vit.models.dense.neck import FeaturePyramid, SmpEncoder
from tests.support.exporting import ENCODER, MODEL, write_run

TINY = dict(img_size=16, embed_dim=32, depth=1, num_heads=1)
NECK = dict(dynamic_img_size=True, num_classes=0)


def refused(action: Callable[[], object]) -> str:
    with pytest.raises(UsageError) as error:
        action()
    assert '\n' not in str(error.value)
    return str(error.value)


def make(name: str = ENCODER, **options) -> torch.nn.Module:
    sizes = {**TINY, **(dict(segments=4, decoder_depth=1) if name == MODEL else {})}
    return timm.create_model(name, **{**sizes, **options})


@pytest.mark.parametrize(('name', 'options', 'pattern', 'follow'), [
    (ENCODER, {'global_pool': 'token'}, r'use class_token=(True),', lambda it: {'class_token': it}),
    (ENCODER, {'global_pool': 'token'}, r"another global_pool, such as ('avg')", lambda it: {'global_pool': it}),
    (ENCODER, {'img_size': 18}, r'use an image of (\d+) x \d+', lambda it: {'img_size': it}),
    (ENCODER, {'num_heads': 5, 'embed_dim': 192}, r'use (\d+) or \d+ heads', lambda it: {'num_heads': it}),
    (ENCODER, {'num_heads': 5, 'embed_dim': 192}, r'use \d+ or (\d+) heads', lambda it: {'num_heads': it}),
    (ENCODER, {'depht': 2}, r"Did you mean ('depth')", lambda it: {'depht': None, it: 2}),
    (ENCODER, {'features_only': True, 'out_indices': (4,)}, r'from (0) to 0', lambda it: {'out_indices': (it,)}),
    (ENCODER, {'features_only': True, 'out_indices': 4}, r'from 1 to (1);', lambda it: {'out_indices': it}),
    (MODEL, {'serialization': 'squares', 'segments': 5}, r'Possible here: (\d+),', lambda it: {'segments': it}),
    (MODEL, {'serialization': 'squares', 'segments': 5}, '(Blobs) take any', lambda it: {'serialization': 'blobs'}),
    (MODEL, {'decoder': 'none'}, '(decoder_depth)=1 has no effect.*leave it out', lambda it: {
        it: None, 'serialization': 'raster', 'segments': None}),
    (MODEL, {'decoder': 'none', 'decoder_depth': None}, "Use serialization=('raster')", lambda it: {
        'serialization': it, 'segments': None}),
    (MODEL, {'memory': 'last', 'mix_init': 'uniform'}, "or use memory=('mix')", lambda it: {'memory': it}),
    (MODEL, {'patch_size': 1, 'in_chans': 1, 'img_size': 4}, 'set norm_pix=(False)', lambda it: {'norm_pix': it}),
    (MODEL, {'blur': (4, 1.0)}, r'such as (\(9, 1\.0\))', lambda it: {'blur': it}),
    (MODEL, {'reg_tokens': 1, 'no_embed_class': True}, 'leave (no_embed_class) at the default', lambda it: {it: False}),
])
def test_of_options(name: str, options: dict, pattern: str, follow: Callable[[object], dict]):
    message = refused(lambda: make(name, **options))
    found = re.search(pattern, message)
    assert found, message
    value = found[1] if found[1].isidentifier() and found[1] not in ('True', 'False') else ast.literal_eval(found[1])
    make(name, **{**options, **follow(value)})


class TestNeck:
    def test_dynamic_size(self):
        message = refused(lambda: FeaturePyramid(make(num_classes=0)))
        advised = eval('dict(' + re.search(r'create the encoder with (\w+=\w+)', message)[1] + ')')
        FeaturePyramid(make(num_classes=0, **advised))

    def test_channels(self):
        encoder = SmpEncoder(FeaturePyramid(make(**NECK)))
        message = refused(lambda: encoder.set_in_channels(1))
        advised = eval('dict(' + re.search(r'create it with (\w+=\d)', message)[1] + ')')
        SmpEncoder(FeaturePyramid(make(**NECK, **advised))).set_in_channels(1)

    def test_depth(self):
        pyramid = FeaturePyramid(make(**NECK))
        least, most = map(int, re.search(r'is (\d) to (\d)', refused(lambda: SmpEncoder(pyramid, 6))).groups())
        assert [len(SmpEncoder(pyramid, depth).out_channels) for depth in (least, most)] == [3, 6]


class TestNames:
    def test_of_an_encoder_and_a_pretraining_model(self):
        message = refused(lambda: load_encoder(MODEL))
        load_encoder(re.search(r'its encoder is (\w+)', message)[1], False, **TINY)
        message = refused(lambda: create_pretraining_model('randsac_vit_tinny'))
        create_pretraining_model(re.search(r"Did you mean '(\w+)'", message)[1])
        message = refused(lambda: load_encoder('vit_tiny_randsak', False))
        load_encoder(re.search(r"Did you mean '(\w+)'", message)[1], False, **TINY)

    def test_of_tags(self):
        message = refused(lambda: make(f'{ENCODER}.untraned'))
        make(f'{ENCODER}.' + re.search(r"Did you mean '(\w+)'", message)[1])

    def test_of_a_classifiers_option(self):
        message = refused(lambda: make(MODEL, global_pool='avg'))
        make(re.search(r'give it to (\w+),', message)[1], global_pool='avg')

    def test_of_a_pretraining_models_features(self):
        message = refused(lambda: make(MODEL, features_only=True))
        maps = eval(re.search(r'or from (timm\.create_model\(.*?\))', message)[1], {'timm': timm})
        assert maps.feature_info.channels() == [192] * 3

    def test_without_weights(self):
        message = refused(lambda: load_encoder('vit_tiny_saim'))
        assert '--no-pretrained' in message
        load_encoder('vit_tiny_saim', False, **TINY)

    def test_of_a_tag_to_pretrain(self, capsys: pytest.CaptureFixture):
        assert main(['pretrain', '--model', f'{MODEL}.cifar10_10ep']) == 2
        create_pretraining_model(re.search(r'Use --model (\w+),', capsys.readouterr().err)[1])


@pytest.fixture(scope='module')
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp('runs') / 'run'
    write_run(folder)
    return folder


class TestFolders:
    def test_of_a_pretraining_model(self, run: Path):
        message = refused(lambda: load_encoder(str(run / 'pretrain')))
        load_encoder(re.search(r'name the folder (\S+) beside', message)[1])

    def test_of_a_file(self, run: Path):
        file = run / 'encoder' / 'model.safetensors'
        assert 'names the folder of an encoder, with config.json' in refused(lambda: load_encoder(str(file)))
        load_encoder(str(file.parent))

    def test_of_a_tag(self, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
        arguments = ['export', str(run), str(tmp_path / 'out'), '--no-pretrain']
        assert main([*arguments, '--tag', 'a.b']) == 2
        tag = re.search(r'as in (\w+);', capsys.readouterr().err)[1]
        assert main([*arguments, '--tag', tag]) == 0

        other = tmp_path / 'out' / f'{ENCODER}.mine'
        other.mkdir()
        (other / 'file').touch()
        assert main([*arguments, '--tag', 'mine']) == 2
        assert 'name another --tag or folder' in capsys.readouterr().err
        assert main([*arguments, '--tag', 'another']) == 0

    def test_of_weights_too_large_for_half(self, tmp_path: Path, capsys: pytest.CaptureFixture):
        model = write_run(tmp_path / 'run')
        with torch.no_grad():
            model.encoder.norm.bias.fill_(1e5)
        from autoreg_vit.hub.folders import export_pretraining
        export_pretraining(model, tmp_path / 'run' / 'pretrain')
        arguments = ['export', str(tmp_path / 'run'), str(tmp_path / 'out'), '--no-pretrain']
        assert main([*arguments, '--half']) == 2
        assert 'leave --half out' in capsys.readouterr().err
        assert main(arguments) == 0

    @pytest.mark.skipif(shutil.which('git') is None, reason='needs git')
    def test_of_shipped_weights_that_are_damaged(
            self, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        from autoreg_vit.models import pretrained

        clone = tmp_path / 'clone'
        assert main(['export', str(run), str(clone / 'weights'), '--tag', 'a', '--no-pretrain']) == 0
        monkeypatch.setattr(pretrained, 'ROOTS', (clone / 'weights',))
        git = ['git', '-C', str(clone), '-c', 'user.name=a', '-c', 'user.email=a@b', '-c', 'core.autocrlf=false']
        for arguments in (['init', '-q'], ['add', '-A'], ['commit', '-qm', 'weights']):
            subprocess.run([*git, *arguments], check=True)
        file = clone / 'weights' / f'{ENCODER}.a' / 'model.safetensors'
        file.write_bytes(file.read_bytes()[:100])
        message = refused(lambda: pretrained.check_files(file))
        subprocess.run(shlex.split(re.search(r'Restore it: (git .*)$', message)[1]), check=True, cwd=clone)
        pretrained.check_files(file)

    def test_of_several_tags(self, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        from autoreg_vit.models import pretrained

        monkeypatch.setattr(pretrained, 'ROOTS', (tmp_path,))
        for tag in 'ab':
            assert main(['export', str(run), str(tmp_path), '--tag', tag, '--no-pretrain', '--default-tag']) == 0
        cfgs = pretrained.register_weights({ENCODER: {'num_classes': 0}})[ENCODER]
        with monkeypatch.context() as patch:
            patch.setattr(pretrained, 'resolve_pretrained_cfg', lambda _, tag, overlay: cfgs.cfgs[tag or 'untrained'])
            message = refused(lambda: pretrained.weights_options(ENCODER, cfgs, True, {}))
            name = re.search(r"name one, as in '\w+\.(\w+)'", message)[1]
            pretrained.weights_options(ENCODER, cfgs, True, {'pretrained_cfg': name})
        entry = re.search(r'say (".*": true)', message)[1]
        config = tmp_path / f'{ENCODER}.a' / 'config.json'
        assert json.loads('{' + entry + '}').items() <= json.loads(config.read_text()).items()
        assert main(['export', str(run), str(tmp_path), '--tag', 'a', '--no-pretrain']) == 0
        assert pretrained.default_tags(ENCODER) == ['b']


def test_of_a_checkpoint_without_checksum(tmp_path: Path):
    save_checkpoint({'step': 3}, tmp_path / 'last.pt')
    (tmp_path / 'last.pt.sha256').unlink()
    message = refused(lambda: load_checkpoint(tmp_path / 'last.pt'))
    if shutil.which('sha256sum'):
        advice = re.search(r'make one: (sha256sum \S+ > \S+sha256)', message)[1]
        subprocess.run(advice, shell=True, check=True, cwd=tmp_path)
        assert load_checkpoint(tmp_path / 'last.pt') == {'step': 3}


def test_of_heads_to_convert(tmp_path: Path, capsys: pytest.CaptureFixture):
    encoder = make(class_token=True, embed_dim=48, num_heads=3, patch_size=4)
    torch.save({'model': encoder.state_dict()}, tmp_path / 'mae.pth')
    arguments = ['convert', str(tmp_path / 'mae.pth'), str(tmp_path / 'out')]
    assert main([*arguments, '--num-heads', '5']) == 2
    assert 'give another --num-heads' in capsys.readouterr().err
    assert main([*arguments, '--num-heads', '3']) == 0
