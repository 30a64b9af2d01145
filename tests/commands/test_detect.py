"""`autoreg-vit detect`: runs of it, stopped and shared, and its errors."""

import contextlib
import functools
import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file

pytest.importorskip('faster_coco_eval')
pytest.importorskip('torchmetrics')

from autoreg_vit.commands import runs
from autoreg_vit.commands.cli import main
from autoreg_vit.commands.detecting import detect
from autoreg_vit.commands.recipes import load_recipe
from autoreg_vit.engine.optimizers import create_optimizer
from autoreg_vit.engine.processes import Processes
from autoreg_vit.engine.signals import Stopped
from autoreg_vit.errors import CheckpointError, ConfigError
from autoreg_vit.evaluation.box_scores import KINDS, SCORES, evaluate
from autoreg_vit.evaluation.metrics import METRICS
from autoreg_vit.hub.folders import export_encoder
from autoreg_vit.models.dense.detector import ViTMaskRCNN, load_detector
from autoreg_vit.models.dense.windowed import WindowedAttention
from autoreg_vit.settings.base import make_config
from autoreg_vit.settings.dense import DetectConfig
from tests.support.detecting import config_for, everything, images_of, pycocotools_scores, small_detector
from tests.support.launching import flags, launch_together
from tests.support.supervising import log_of, results_of, stop_after

CPU = Processes(torch.device('cpu'))
READING = dict(precision='float32', workers=0, group=CPU)


#: Mask R-CNN in small: a second for a few steps.
SHORT = {'img_size': (64,), 'width': 16, 'rois': 16, 'norm': 'layer', 'window': 3, 'anchor_sizes': (8, 12, 20, 32, 64),
         'batch_size': 2, 'log_every': 2, 'checkpoint_every_minutes': 0.0, 'warmup_steps': 1, 'drop_path_rate': 0.2,
         'precision': 'float32'}


@pytest.fixture(scope='module')
def encoder(tmp_path_factory) -> str:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp('weights') / 'encoder'
    options = {'patch_size': 8, 'embed_dim': 32, 'depth': 8, 'num_heads': 2}
    export_encoder(timm.create_model('vit_tiny_patch4_32_randsac', **options), folder, mean=[0.5] * 3, std=[0.25] * 3)
    return str(folder)


@pytest.fixture(scope='module')
def run(encoder: str, coco: Path, tmp_path_factory) -> Path:
    """By the command line, reporting on the images that it is trained on."""
    folder = tmp_path_factory.mktemp('run') / 'detect'
    settings = {**SHORT, 'command': 'detect', 'dataset': None, 'weights': encoder, 'data_dir': coco, 'steps': 50,
                'eval_split': 'train2017', 'batch_size': 4, 'lr': 1e-2, 'jitter': (0.9, 1.1), 'warmup_steps': 5,
                'eval_every': 40, 'drop_path_rate': 0.0, 'save_detections': True, 'output_dir': folder}
    assert main(flags(settings)) == 0
    return folder


def start_from(folder: Path) -> None:
    """Have every detector of this process begin with the weights in `folder`."""
    build = ViTMaskRCNN.__init__

    def build_and_load(self, *args, **options) -> None:
        build(self, *args, **options)
        self.load_state_dict(load_file(folder / 'model.safetensors'))

    ViTMaskRCNN.__init__ = build_and_load


class TestRun:
    def test_learns(self, run: Path):
        """Seven images, which it is then asked about; the eighth has nothing on it."""
        results, log = results_of(run), log_of(run)
        losses = [line['loss'] for line in log if line['event'] == 'step']
        assert losses[-1] < 0.6 * losses[0] and results['box_ap50'] > 10 and results['mask_ap50'] > 10
        assert (results['train_images'], results['test_images'], results['num_classes']) == (7, 8, 2)
        assert set(results['per_class']) == {'box', 'disc'} and results['eval_split'] == 'train2017'
        evaluations = [line for line in log if line['event'] == 'evaluation']
        assert [line['images'] for line in evaluations] == [160, 200]
        scores = {f'{kind}_{name}' for kind in KINDS for name in SCORES}
        measured = scores & results.keys()  # all its objects are small
        assert scores <= METRICS.keys() and {'box_ap', 'box_ap75', 'mask_ap_small'} <= measured
        assert all(evaluations[-1][name] == results[name] for name in measured) and log[-1]['event'] == 'finish'
        assert all((run / 'figures' / name).stat().st_size > 10_000 for name in ('detections.png', 'learning.png'))

    def test_detections_score_the_same_in_pycocotools(self, run: Path, coco: Path):
        """From the files that are left and those that the data came from."""
        file, results = coco / 'annotations' / 'instances_train2017.json', results_of(run)
        images = [image['id'] for image in json.loads(file.read_text())['images']]
        for name, value in pycocotools_scores(file, json.loads((run / 'detections.json').read_text()), images).items():
            assert results.get(name, -100) == pytest.approx(value, abs=1e-3), name

    def test_the_model_loads_again(self, run: Path, coco: Path, tmp_path: Path):
        model = load_detector(run / 'model')
        assert [c['name'] for c in model.config['categories']] == ['box', 'disc'] and not model.training
        assert isinstance(model.backbone.pyramid.encoder.blocks[0].attn, WindowedAttention)
        data = everything(images_of(coco, 'train2017'))
        again = evaluate(model, data, data.dataset.categories, **READING)
        assert again['box_ap'] == pytest.approx(results_of(run)['box_ap'], abs=1e-3)
        with torch.no_grad():
            assert model([torch.rand(3, 130, 70)])[0]['masks'].shape[1:] == (1, 130, 70)
        broken = tmp_path / 'model'
        shutil.copytree(run / 'model', broken)
        (broken / 'model.safetensors').write_bytes((run / 'model' / 'model.safetensors').read_bytes()[:-9])
        with pytest.raises(CheckpointError, match='does not match its checksum'):
            load_detector(broken)
        shutil.copytree(run / 'model', broken, dirs_exist_ok=True)
        (broken / 'config.json').write_text('{}')
        with pytest.raises(CheckpointError, match=r"no whole detector \(KeyError: 'options'\)"):
            load_detector(broken)
        with pytest.raises(CheckpointError, match=r'nowhere holds no whole detector .* autoreg-vit detect'):
            load_detector('nowhere')

    def test_a_finished_run_is_left_alone(self, run: Path, capsys):
        before = (run / 'last.pt').stat().st_mtime_ns
        assert main(['detect', '--config', str(run / 'config.yaml')]) == 0
        assert 'is finished' in capsys.readouterr().out and (run / 'last.pt').stat().st_mtime_ns == before
        assert main(['detect', '--config', str(run / 'config.yaml'), '--steps', '20', '--force-resume']) == 2
        assert 'has taken 50 steps, and with these settings it ends after 20' in capsys.readouterr().err

    def test_resumes_exactly(self, encoder: str, coco: Path, tmp_path: Path, monkeypatch):
        """With jitter, flips, drawn regions, stochastic depth, accumulation, and recomputed blocks."""
        settings = {**SHORT, 'weights': encoder, 'data_dir': str(coco), 'eval_split': 'val2017', 'steps': 4,
                    'accumulate': 2, 'in_chans': 1, 'lr': 1e-2, 'grad_checkpointing': True, 'norm': 'batch',
                    'attention': 'global'}
        whole = detect(DetectConfig(**settings, output_dir=str(tmp_path / 'whole')))
        config = DetectConfig(**settings, output_dir=str(tmp_path / 'parts'))
        with monkeypatch.context() as patch:
            stop_after(2, patch)
            with pytest.raises(Stopped, match='after step 2 of 4'):
                detect(config)
        parts = detect(config)
        weights = [(folder / 'model' / 'model.safetensors').read_bytes() for folder in (whole, parts)]
        assert weights[0] == weights[1] and results_of(whole) == results_of(parts)
        assert 'detections.json' not in {path.name for path in parts.iterdir()}
        assert len(load_detector(parts / 'model')([torch.rand(1, 50, 40)])) == 1

    def test_two_processes(self, run: Path, encoder: str, coco: Path, tmp_path: Path, monkeypatch):
        """They take a step of nothing with a trained model, share out five test images, and score as one process."""
        settings = {**SHORT, 'command': 'detect', 'dataset': None, 'weights': encoder, 'data_dir': coco, 'steps': 1,
                    'eval_split': 'val2017', 'lr': 0.0, 'output_dir': tmp_path / 'two'}
        launches = launch_together(settings, 2, functools.partial(start_from, run / 'model'))
        assert [launch.wait() for launch in launches] == [0, 0], launches[0].text() + launches[1].text()
        results, data = results_of(tmp_path / 'two'), everything(images_of(coco, 'val2017'))
        one = evaluate(load_detector(run / 'model'), data, data.dataset.categories, **READING)
        assert results['test_images'] == one['images'] == 5 and one['box_ap50'] > 5
        for name in ('box_ap', 'mask_ap', 'box_ap50', 'mask_ap50', 'box_ap_small'):
            assert results[name] == pytest.approx(one[name], abs=1e-3)
        pair = contextlib.nullcontext(Processes(torch.device('cpu'), rank=0, world_size=2))
        monkeypatch.setattr(runs, 'processes', lambda device: pair)
        with pytest.raises(ConfigError, match=r'norm=batch .* --norm layer'):
            detect(config_for(coco, weights=encoder))

    def test_layer_decay(self):
        """Blocks learn at a part of the rate of the block above, and all that is new at the full rate."""
        model = small_detector()
        optimizer = create_optimizer(config_for(Path(), layer_decay=0.7), model)
        names, groups = {id(p): name for name, p in model.named_parameters()}, {}
        for group in optimizer.param_groups:
            groups |= {names[id(p)]: group for p in group['params']}
        encoder = 'backbone.pyramid.encoder.'
        scale = {name: group['lr_scale'] for name, group in groups.items()}
        assert scale[f'{encoder}blocks.7.mlp.fc1.weight'] == pytest.approx(0.7)
        assert scale[f'{encoder}blocks.0.attn.attention.qkv.weight'] == pytest.approx(0.7 ** 8)
        assert scale[f'{encoder}pos_embed'] == scale[f'{encoder}patch_embed.proj.weight'] == pytest.approx(0.7 ** 9)
        assert scale['rpn.head.cls_logits.weight'] == scale['backbone.fpn.inner_blocks.0.0.weight'] == 1
        assert groups[f'{encoder}pos_embed']['weight_decay'] == 0 < groups['rpn.head.cls_logits.weight']['weight_decay']


@pytest.mark.parametrize('arguments, words', [
    (['--data-dir', 'COCO'], ['--weights']),
    (['--weights', 'ENCODER'], ['--data-dir']),
    (['--weights', 'ENCODER', '--data-dir', 'missing'], ['No folder missing/train2017']),
    (['--weights', 'ENCODER', '--data-dir', 'COCO', '--train-split', 'train2014'], ['train2014', '--train-split']),
    (['--weights', 'ENCODER', '--data-dir', 'COCO', '--train-annotations', 'no.json'], ['No annotations no.json']),
    (['--weights', 'resnet18', '--no-pretrained', '--data-dir', 'COCO'], ['resnet18']),
    (['--weights', 'ENCODER', '--data-dir', 'COCO', '--attention', 'local'], ["got 'local'"]),
    (['--weights', 'ENCODER', '--data-dir', 'COCO', '--norm', 'group'], ["got 'group'"]),
    (['--weights', 'ENCODER', '--data-dir', 'COCO', '--img-size', '100'], ['100 x 100', '32']),
    (['--weights', 'ENCODER', '--data-dir', 'COCO', '--img-size', '1', '2', '3'], ['img_size', '(1, 2, 3)']),
    (['--weights', 'ENCODER', '--data-dir', 'COCO', '--jitter', '2', '1'], ['jitter', '(2.0, 1.0)']),
    (['--weights', 'ENCODER', '--data-dir', 'COCO', '--anchor-sizes', '8'], ['anchor_sizes', '(8,)']),
    (['--weights', 'ENCODER', '--data-dir', 'COCO', '--window', '0'], ['window', '0']),
    (['--weights', 'ENCODER', '--data-dir', 'COCO', '--batch-size', '64'], ['5 training images', '--batch-size 5']),
    (['--weights', 'ENCODER', '--data-dir', 'COCO', '--schedule', 'step'], ['schedule', 'step']),
])
def test_errors_are_one_line_before_any_work(arguments, words, encoder: str, coco: Path, tmp_path: Path, monkeypatch,
                                             capsys):
    monkeypatch.chdir(tmp_path)
    arguments = [{'ENCODER': encoder, 'COCO': str(coco)}.get(a, a) for a in arguments]
    defaults = [] if '--batch-size' in arguments else ['--batch-size', '2']
    assert main(['detect', *arguments, *defaults]) == 2
    error = capsys.readouterr().err
    assert error.count('\n') == 1 and 'Traceback' not in error
    for word in words:
        assert word in error, error
    assert not list(tmp_path.iterdir())


def test_without_its_packages(coco: Path, monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr('importlib.util.find_spec', lambda name, *rest: None if name == 'torchmetrics' else find(name))
    assert main(['detect', '--weights', 'vit_tiny_randsac', '--data-dir', str(coco)]) == 2
    assert 'detect needs torchmetrics: pip install "autoreg-vit[dense]"' in capsys.readouterr().err


def test_the_papers_setting():
    recipe = make_config(DetectConfig, load_recipe('maskrcnn_coco', 'detect'), {'weights': 'x', 'data_dir': 'y'})
    assert recipe == DetectConfig(weights='x', data_dir='y', eval_split='val2017'), 'the defaults are the setting'
    assert recipe.scaled(recipe.lr) == pytest.approx(8e-5) and recipe.batch_size == 64
    assert recipe.steps == 100 * (117266 // 64) and recipe.canvas == (1024, 1024)
    mini = make_config(DetectConfig, load_recipe('maskrcnn_coco_mini', 'detect'), {'weights': 'x', 'data_dir': 'y'})
    encoder = timm.create_model('vit_tiny_patch16_224', num_classes=0, dynamic_img_size=True)
    ViTMaskRCNN(encoder, 80, mean=(0.5,) * 3, std=(0.5,) * 3, **mini.detector_options())
