"""`autoreg-vit finetune`: RandSAC's Table 15 from any encoder that timm can load."""

import json
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file

pytest.importorskip('sklearn')


from autoreg_vit.commands.cli import main
from autoreg_vit.commands.finetuning import Finetuning, add_classifier, check_pairs, export_classifier, finetune
from autoreg_vit.data import labelled
from autoreg_vit.data.transforms import ImageSpec, evaluation_transform
from autoreg_vit.engine.loss_history import NonFiniteLoss
from autoreg_vit.engine.objective import ForwardPass
from autoreg_vit.engine.optimizers import create_optimizer, create_schedule
from autoreg_vit.engine.processes import Processes
from autoreg_vit.engine.signals import Stopped
from autoreg_vit.errors import ConfigError
from autoreg_vit.evaluation.class_scores import evaluate
from autoreg_vit.hub.lookup import load_encoder
from autoreg_vit.settings.base import read_settings
from autoreg_vit.settings.classification import FinetuneConfig
from tests.support.bare import run_bare
from tests.support.launching import launch_together
from tests.support.supervising import log_of, results_of, stop_after, write_encoder

CPU = Processes(torch.device('cpu'))
SHORT = {'dataset': 'digits', 'eval_split': 'test', 'epochs': 2, 'batch_size': 64, 'train_images': 256,
         'warmup_epochs': 0.5, 'lr': 4e-3, 'log_every': 2, 'precision': 'float32'}


@pytest.fixture(scope='module')
def encoder(tmp_path_factory) -> str:
    torch.manual_seed(0)
    return str(write_encoder(tmp_path_factory.mktemp('weights') / 'encoder'))


@pytest.fixture(scope='module')
def run(encoder: str, tmp_path_factory) -> Path:
    """By the command line: Table 15, but for what makes learning slower at first."""
    folder = tmp_path_factory.mktemp('run') / 'finetune'
    arguments = ['finetune', '--config', 'randsac', '--weights', encoder, '--dataset', 'digits', '--eval-split', 'test',
                 '--epochs', '4', '--batch-size', '32', '--lr', '4e-2', '--crop-scale', '0.8', '1', '--hflip', '0',
                 '--mixup', '0', '--cutmix', '0', '--auto-augment', 'none', '--warmup-epochs', '0.5',
                 '--clip-grad', '1', '--ema-decay', '0.9', '--eval-every', '2', '--precision', 'float32',
                 '--output-dir', str(folder)]
    assert main(arguments) == 0
    return folder


class TestRun:
    def test_leaves_results(self, run: Path):
        results, log = results_of(run), log_of(run)
        assert results['top1'] > 20 and results['average']['top1'] > 20 and results['test_images'] == 360
        assert [line['images'] for line in log if line['event'] == 'evaluation'] == [2 * 1408, 4 * 1408]
        assert log[-1]['event'] == 'finish' and log[0]['classes'] == 10
        assert np.asarray(Image.open(run / 'figures' / 'confusion.png').convert('RGB')).std() > 10
        saved = read_settings(run / 'config.yaml')
        assert saved['layer_decay'] == 0.65 and saved['mixup'] == 0 and saved['drop_path_rate'] == 0.1

    @pytest.mark.parametrize('name', ['model', 'average'])
    def test_the_classifier_loads_in_timm_alone(self, name: str, run: Path, encoder: str):
        images = labelled.labelled_images(FinetuneConfig(weights=encoder, dataset='digits', eval_split='test'),
                                          ImageSpec((8, 8), 1, (0.5,), (0.25,)), CPU)
        model = timm.create_model(f'local-dir:{run / name}', pretrained=True).eval()
        assert model.num_classes == 10
        config = FinetuneConfig(weights=encoder, precision='float32', workers=0)
        found = evaluate(model, images.test, 10, precision=config.precision, workers=0, group=CPU)
        expected = results_of(run) if name == 'model' else results_of(run)['average']
        assert found['top1'] == pytest.approx(expected['top1'], abs=1e-3)
        code = (f'import sys, timm; timm.create_model("local-dir:{run / name}", pretrained=True); '
                'assert "autoreg_vit" not in sys.modules')
        if name == 'model':
            assert run_bare(code).returncode == 0

    def test_it_can_be_fine_tuned_again(self, run: Path, tmp_path: Path):
        folder = finetune(FinetuneConfig(**SHORT, weights=str(run / 'model'), output_dir=str(tmp_path / 'again')))
        assert (folder / 'results.json').exists()

    def test_stopped_and_resumed_gives_the_same_bytes(self, encoder: str, tmp_path: Path, monkeypatch):
        """With all that draws, augmentation, erasing, mixup, cutmix and drop path, and with a moving average."""
        settings = {**SHORT, 'weights': encoder, 'ema_decay': 0.9, 'accumulate': 2, 'batch_size': 32, 'erase': 0.5,
                    'drop_path_rate': 0.3, 'clip_grad': 1.0}
        whole = finetune(FinetuneConfig(**settings, output_dir=str(tmp_path / 'whole')))
        config = FinetuneConfig(**settings, output_dir=str(tmp_path / 'parts'))
        with monkeypatch.context() as patch:
            stop_after(3, patch)
            with pytest.raises(Stopped, match='after step 3 of 8'):
                finetune(config)
        # Killed in the evaluation at the end, the second time.
        with monkeypatch.context() as patch:
            patch.setattr('autoreg_vit.commands.finetuning.evaluate', mock.Mock(side_effect=KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                finetune(config)
        parts = finetune(config)
        for name in ('model', 'average'):
            weights = [(folder / name / 'model.safetensors').read_bytes() for folder in (whole, parts)]
            assert weights[0] == weights[1]

    def test_other_settings_do_not_resume(self, run: Path, encoder: str, capsys):
        assert main(['finetune', '--config', str(run / 'config.yaml'), '--lr', '1e-3']) == 2
        assert 'lr: was 0.04, is 0.001' in capsys.readouterr().err
        assert main(['finetune', '--config', str(run / 'config.yaml'), '--epochs', '2', '--force-resume']) == 2
        assert 'has taken 176 steps, and with these settings it ends after 88' in capsys.readouterr().err

    def test_two_processes_equal_one(self, encoder: str, tmp_path: Path):
        """Without what each process draws for itself."""
        settings = {**SHORT, 'weights': encoder, 'drop_path_rate': 0.0, 'mixup': 0.0, 'cutmix': 0.0, 'opt': 'sgd',
                    'lr': 0.5, 'epochs': 1}
        one = finetune(FinetuneConfig(**settings, output_dir=str(tmp_path / 'one')))
        launches = launch_together({**settings, 'command': 'finetune', 'output_dir': str(tmp_path / 'two')}, 2)
        assert [launch.wait() for launch in launches] == [0, 0], launches[0].text() + launches[1].text()
        models = [load_file(folder / 'model' / 'model.safetensors') for folder in (one, tmp_path / 'two')]
        begin = load_file(Path(encoder) / 'model.safetensors')
        assert not torch.allclose(models[0]['blocks.1.mlp.fc2.weight'], begin['blocks.1.mlp.fc2.weight'], atol=1e-4)
        for name in models[0]:
            torch.testing.assert_close(models[0][name], models[1][name], rtol=1e-3, atol=1e-5)
        assert results_of(tmp_path / 'two')['test_images'] == 360

    def test_a_diverging_run_says_so(self, encoder: str, tmp_path: Path):
        settings = {**SHORT, 'lr': 1e30, 'opt': 'sgd', 'weights': encoder}
        config = FinetuneConfig(**settings, output_dir=str(tmp_path / 'run'))
        with pytest.raises(NonFiniteLoss, match='lower --lr'):
            finetune(config)


class TestParts:
    def test_layer_decay(self):
        """Blocks learn at 0.65 of the rate of the block above, the patch embedding slowest, the classifier fastest."""
        model = timm.create_model('vit_tiny_patch4_32_randsac', depth=3, num_classes=10)
        config = FinetuneConfig(weights='x')
        optimizer = create_optimizer(config, model)
        names = {id(p): name for name, p in model.named_parameters()}
        scale, decay = {}, {}
        for group in optimizer.param_groups:
            for p in group['params']:
                scale[names[id(p)]], decay[names[id(p)]] = group['lr_scale'], group['weight_decay']
        assert scale['head.weight'] == 1
        for above, below in (('blocks.2', 'blocks.1'), ('blocks.1', 'blocks.0')):
            assert scale[f'{below}.mlp.fc1.weight'] / scale[f'{above}.mlp.fc1.weight'] == pytest.approx(0.65)
        assert scale['patch_embed.proj.weight'] == scale['pos_embed'] == min(scale.values())
        assert decay['blocks.0.mlp.fc1.weight'] == 0.05 and decay['blocks.0.mlp.fc1.bias'] == decay['pos_embed'] == 0
        schedule = create_schedule(config, optimizer, 10)
        schedule.step_update(50)
        rates = [group['lr'] for group in optimizer.param_groups]
        assert max(rates) == pytest.approx(5e-4 * 1024 / 256) and min(rates) == pytest.approx(max(rates) * min(
            scale.values()))

    def test_classifier_starts_near_zero(self):
        model = load_encoder('vit_tiny_patch4_32_randsac', False, num_classes=0, depth=1)
        add_classifier(model, 7, seed=0)
        assert model.head.weight.shape == (7, 192) and 0 < model.head.weight.abs().max() < 1e-4
        assert not model.head.bias.any()

    def test_mixup_is_a_function_of_step_and_process(self):
        seen = []
        model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 4))
        model.register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
        some = labelled.LabelledImages([None] * 6, [], [], ['a', 'b', 'c', 'd'])
        spec = ImageSpec((2, 2), 3, (0.5,) * 3, (0.25,) * 3)
        objective = Finetuning(FinetuneConfig(weights='x'), model, spec, some, CPU)
        images, labels = torch.randn(6, 3, 2, 2), torch.arange(6) % 4
        values = [objective.loss(model, [images.clone(), labels], ForwardPass(number, 0, number)).item()
                  for number in (0, 1, 0)]
        assert values[0] == values[2] != values[1]
        assert torch.equal(seen[0], seen[2]) and not torch.equal(seen[0], images)

    @pytest.mark.parametrize('channels', [1, 3])
    def test_augmentation_at_every_magnitude(self, channels: int):
        """Grey and colour images; timm's largest magnitude asks newer Pillows for no bits, which they refuse."""
        spec = ImageSpec((8, 8), channels, (0.5,) * channels, (0.25,) * channels)
        image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (9, 9, 3), dtype=np.uint8))
        for policy in ('rand-m10-inc1', 'original'):
            transform = labelled.augmenting_transform(spec, (0.5, 1), 0.5, policy, erase=0.5)
            for _ in range(60):
                out = transform(image)
            assert out.shape == (channels, 8, 8) and torch.isfinite(out).all()

    @pytest.mark.parametrize('name, options', [('test_resnet', {}), ('test_vit', {'img_size': (96,)})])
    def test_any_timm_model(self, name: str, options: dict, tmp_path: Path):
        for number in range(8):
            folder = tmp_path / 'images' / f'class{number % 2}'
            folder.mkdir(parents=True, exist_ok=True)
            Image.new('RGB', (40, 30), (30 * number, 0, 90)).save(folder / f'{number}.png')
        settings = {**SHORT, **options, 'dataset': None, 'eval_split': None, 'batch_size': 2, 'train_images': 4}
        folder = finetune(FinetuneConfig(
            **{**settings, 'epochs': 1}, data_dir=str(tmp_path / 'images'), weights=name, pretrained=False,
            output_dir=str(tmp_path / 'run')))
        results = results_of(folder)
        assert results['classes'] == ['class0', 'class1'] and 'top5' not in results and results['test_images'] == 2
        model = timm.create_model(f'local-dir:{folder / "model"}', pretrained=True)
        assert model.num_classes == 2
        assert {p.name for p in (folder / 'model').iterdir()} == {
            'config.json', 'model.safetensors', 'model.safetensors.sha256'}

    @pytest.mark.parametrize(('weights', 'size', 'crop', 'channels'), [
        ('vit_tiny_randsac', 80, None, 3), ('vit_tiny_randsac', 64, 0.5, 1), ('vit_small_patch16_224', 80, None, 3),
        ('vit_small_patch16_224', 48, None, 1), ('vit_small_patch16_224.augreg_in1k', 80, 0.5, 3)])
    def test_a_folder_says_how_its_images_were_prepared(
            self, weights: str, size: int, crop: float | None, channels: int, tmp_path: Path):
        """And no tag, licence or other provenance of the weights that it did not begin with, or that it changed."""
        config = FinetuneConfig(weights=weights, img_size=(size,), crop_pct=crop, in_chans=channels)
        model = load_encoder(weights, False, num_classes=0, depth=1, **config.model_options())
        add_classifier(model, 3, 0)
        spec = ImageSpec.of(model, channels)
        export_classifier(model, tmp_path / 'model', config, spec, ['a', 'b', 'c'])
        content = json.loads((tmp_path / 'model' / 'config.json').read_text())
        used = evaluation_transform(spec, config.evaluated_part(spec.size)).transforms[1].transforms
        resize, normalize = used[0], used[-1]
        assert content['pretrained_cfg'] == {
            'input_size': [channels, size, size], 'fixed_input_size': True, 'num_classes': 3, 'crop_mode': 'center',
            'crop_pct': crop or (0.875 if size > 64 else 1.0), 'interpolation': resize.interpolation.value,
            'mean': list(spec.mean), 'std': list(spec.std), 'first_conv': 'patch_embed.proj',
            'classifier': 'head', **({'pool_size': None} if 'pool_size' in content['pretrained_cfg'] else {})}
        assert (normalize.mean.tolist(), normalize.std.tolist()) == (pytest.approx(spec.mean), pytest.approx(spec.std))
        assert resize.size == int(size / content['pretrained_cfg']['crop_pct'])
        assert content['label_names'] == ['a', 'b', 'c']


@pytest.mark.parametrize('arguments, words', [
    ([], ['--weights']),
    (['--weights', 'nowhere/x'], ['No folder', 'nowhere/x']),
    (['--weights', 'resnet1'], ['Unknown encoder', 'resnet1', 'resnet']),
    (['--weights', 'ENCODER', '--batch-size', '63'], ['63', 'odd', '62 or 64', '--mixup 0']),
    (['--weights', 'ENCODER', '--auto-augment', 'rond-m9'], ['rond-m9', 'rand-m9-mstd0.5-inc1']),
    (['--weights', 'ENCODER', '--layer-decay', '1.5'], ['layer_decay', '1.5']),
    (['--weights', 'ENCODER', '--mixup', '-1'], ['mixup', '-1']),
    (['--weights', 'ENCODER', '--opt', 'adamww'], ['adamww', 'adamw']),
    (['--weights', 'ENCODER', '--accumulate', '99'], ['99']),
    (['--weights', 'ENCODER', '--num-classes', '3'], ['num_classes=3', '10 classes']),
    (['--weights', 'ENCODER', '--data-dir', 'missing'], ['missing']),
    (['--weights', 'ENCODER', '--global-pool', 'sum'], ['sum']),
    (['--weights', 'ENCODER', '--in-chans', '5'], ['5', 'grey']),
    (['--weights', 'ENCODER', '--label-smoothing', '2'], ['label_smoothing', '2']),
    (['--weights', 'ENCODER', '--betas', '0.9'], ['betas', '0.9']),
])
def test_errors_are_one_line_before_any_work(arguments, words, encoder: str, tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    arguments = [encoder if a == 'ENCODER' else a for a in arguments]
    defaults = [] if '--batch-size' in arguments else ['--batch-size', '64']
    assert main(['finetune', *arguments, *defaults]) == 2
    error = capsys.readouterr().err
    assert error.count('\n') == 1 and 'Traceback' not in error
    for word in words:
        assert word in error, error
    assert not list(tmp_path.iterdir())


def test_odd_shares_of_processes():
    two = Processes(torch.device('cpu'), rank=0, world_size=2)
    check_pairs(FinetuneConfig(weights='x', batch_size=8), two)
    check_pairs(FinetuneConfig(weights='x', batch_size=6, mixup=0, cutmix=0), two)
    with pytest.raises(ConfigError, match=r'each of 2 processes 3.*--batch-size 4 or 8'):
        check_pairs(FinetuneConfig(weights='x', batch_size=6), two)
