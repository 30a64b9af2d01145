"""`autoreg-vit probe`: LARS as in RandSAC's Table 16, the fast mode on cached features, and nearest neighbours."""

import re
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
from autoreg_vit.commands.probing import frozen_features, lars_groups, optimizer_options, probe
from autoreg_vit.data import labelled
from autoreg_vit.data.pretraining import labelled_sets
from autoreg_vit.engine.optimizers import create_optimizer, create_schedule
from autoreg_vit.engine.processes import Processes
from autoreg_vit.engine.signals import Stopped
from autoreg_vit.errors import CheckpointError, DataError, UsageError
from autoreg_vit.evaluation import cached as features
from autoreg_vit.evaluation.class_scores import evaluate
from autoreg_vit.evaluation.classifiers import LinearHead, fit_bank
from autoreg_vit.evaluation.features import Features
from autoreg_vit.settings.classification import ProbeConfig
from autoreg_vit.settings.pretraining import PretrainConfig
from tests.support.launching import launch_together
from tests.support.supervising import log_of, results_of, stop_after, write_encoder

CPU = Processes(torch.device('cpu'))

SHORT = {'dataset': 'digits', 'eval_split': 'test', 'epochs': 2, 'batch_size': 128, 'train_images': 512,
         'warmup_epochs': 0.5, 'hflip': 0.0, 'crop_scale': (0.8, 1.0), 'log_every': 2, 'precision': 'float32'}

FAST = {'dataset': 'digits', 'eval_split': 'test', 'fast': True, 'epochs': 20, 'batch_size': 128, 'train_images': 600,
        'precision': 'float32', 'knn_images': 300}


@pytest.fixture(scope='module')
def encoder(tmp_path_factory) -> str:
    torch.manual_seed(0)
    return str(write_encoder(tmp_path_factory.mktemp('weights') / 'encoder'))


@pytest.fixture(scope='module')
def run(encoder: str, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp('run') / 'probe'
    arguments = ['probe', '--weights', encoder, '--dataset', 'digits', '--eval-split', 'test', '--epochs', '4',
                 '--batch-size', '128', '--opt', 'momentum', '--lr', '1', '--warmup-epochs', '1', '--batch-norm',
                 '--hflip', '0', '--crop-scale', '0.8', '1', '--eval-every', '2', '--precision', 'float32',
                 '--output-dir', str(folder)]
    assert main(arguments) == 0
    return folder


class TestLars:
    def test_leaves_results(self, run: Path):
        results, log = results_of(run), log_of(run)
        assert results['top1'] > 25 and results['knn'] > 30 and results['test_images'] == 360
        assert results['top5'] > results['top1'] and np.sum(results['confusion']) == 360
        assert [line['images'] for line in log if line['event'] == 'evaluation'] == [2 * 1408, 4 * 1408]
        assert log[-1]['event'] == 'finish' and log[0]['width'] == 32
        assert np.asarray(Image.open(run / 'figures' / 'confusion.png').convert('RGB')).std() > 10

    def test_the_classifier_gives_the_accuracy_that_was_reported(self, run: Path, encoder: str):
        images = labelled.labelled_images(ProbeConfig(weights=encoder, dataset='digits', eval_split='test'),
                                          labelled.ImageSpec((8, 8), 1, (0.5,), (0.25,)), CPU)
        model = timm.create_model(f'local-dir:{encoder}', pretrained=True, num_classes=0).eval()
        head = LinearHead(32, 10, True, 0, CPU).eval()
        head.load_state_dict(load_file(run / 'classifier.safetensors'))
        found = evaluate(lambda x: head(frozen_features(model, x)), images.test, 10, precision='float32', workers=0,
                         group=CPU)
        assert found['top1'] == pytest.approx(results_of(run)['top1'], abs=1e-3)
        assert found['confusion'].tolist() == results_of(run)['confusion']

    def test_a_finished_run_is_left_alone(self, run: Path, encoder: str, capsys):
        before = (run / 'results.json').stat().st_mtime_ns
        test_arguments = ['probe', '--weights', encoder, '--config', str(run / 'config.yaml')]
        assert main(test_arguments) == 0
        assert 'is finished' in capsys.readouterr().out and (run / 'results.json').stat().st_mtime_ns == before

    def test_its_data_may_move(self, run: Path, encoder: str, tmp_path: Path, capsys):
        """The digits need no folder, so that any will do."""
        assert main(['probe', '--weights', encoder, '--config', str(run / 'config.yaml'), '--data-dir', str(tmp_path),
                     '--download']) == 0
        assert 'is finished' in capsys.readouterr().out

    def test_fewer_epochs_than_were_trained_are_no_success(self, run: Path, encoder: str, capsys):
        log = (run / 'log.jsonl').read_bytes()
        assert main(['probe', '--weights', encoder, '--config', str(run / 'config.yaml'), '--epochs', '2',
                     '--force-resume']) == 2
        assert 'has taken 44 steps, and with these settings it ends after 22' in capsys.readouterr().err
        assert (run / 'log.jsonl').read_bytes() == log

    def test_the_encoder_stays_as_it_is(self, encoder: str, tmp_path: Path):
        before = (Path(encoder) / 'model.safetensors').read_bytes()
        probe(ProbeConfig(**SHORT, weights=encoder, knn=0, output_dir=str(tmp_path / 'run')))
        assert (Path(encoder) / 'model.safetensors').read_bytes() == before
        assert set(load_file(tmp_path / 'run' / 'classifier.safetensors')) == {'linear.weight', 'linear.bias'}

    def test_adapts_without_weight_decay(self):
        """A step of the weight has the length rate x 0.001 x its own; the bias takes the plain rate, as MAE's does."""
        head = LinearHead(16, 4, False, 0, CPU)
        config = ProbeConfig(weights='x', batch_size=256, lr=2.0)
        optimizer = create_optimizer(config, lars_groups(head), **optimizer_options(config))
        head(torch.randn(8, 16)).logsumexp(1).sum().backward()
        weight, gradient = head.linear.weight.detach().clone(), head.linear.bias.grad.clone()
        optimizer.step()
        step = torch.dist(head.linear.weight.detach(), weight).item()
        assert step == pytest.approx(2 * 0.001 * weight.norm().item(), rel=1e-4)
        torch.testing.assert_close(head.linear.bias.detach(), -2 * gradient)

    def test_rate_is_scaled_and_warmed_up(self):
        config = ProbeConfig(weights='x', batch_size=4096, accumulate=4)
        head = LinearHead(8, 2, False, 0, CPU)
        optimizer = create_optimizer(config, lars_groups(head), **optimizer_options(config))
        schedule = create_schedule(config, optimizer, 10)
        rates = []
        for step in (0, 50, 100, 500, 899):
            schedule.step_update(step)
            rates.append(optimizer.param_groups[0]['lr'])
        assert rates[0] == 0 and rates[1] == pytest.approx(3.2) and rates[2] == pytest.approx(6.4)
        assert rates[2] > rates[3] > rates[4] < 0.01

    @pytest.mark.parametrize('norm', [False, True])
    def test_stopped_and_resumed_gives_the_same_bytes(self, norm: bool, encoder: str, tmp_path: Path, monkeypatch):
        settings = {**SHORT, 'weights': encoder, 'knn': 0, 'batch_norm': norm, 'accumulate': 2, 'batch_size': 64}
        whole = probe(ProbeConfig(**settings, output_dir=str(tmp_path / 'whole')))
        config = ProbeConfig(**settings, output_dir=str(tmp_path / 'parts'))
        with monkeypatch.context() as patch:
            stop_after(3, patch)
            with pytest.raises(Stopped, match='after step 3 of 8'):
                probe(config)
        parts = probe(config)
        assert (whole / 'classifier.safetensors').read_bytes() == (parts / 'classifier.safetensors').read_bytes()
        losses = [[(line['step'], line['loss']) for line in log_of(folder) if line['event'] == 'step']
                  for folder in (whole, parts)]
        assert losses[0] == losses[1] and len(losses[0]) == 4

    def test_two_processes_equal_one(self, encoder: str, tmp_path: Path):
        """Batch norm's statistics are over both, so the classifier differs by rounding alone."""
        settings = {**SHORT, 'weights': encoder, 'batch_norm': True, 'lr': 4.0, 'output_dir': str(tmp_path / 'one')}
        one = probe(ProbeConfig(**settings))
        launches = launch_together({**settings, 'command': 'probe', 'output_dir': str(tmp_path / 'two')}, 2)
        assert [launch.wait() for launch in launches] == [0, 0], launches[0].text() + launches[1].text()
        heads = [load_file(folder / 'classifier.safetensors') for folder in (one, tmp_path / 'two')]
        for name in heads[0]:
            torch.testing.assert_close(heads[0][name], heads[1][name], rtol=1e-3, atol=1e-5)
        for key in ('top1', 'knn', 'test_images'):
            assert results_of(one)[key] == pytest.approx(results_of(tmp_path / 'two')[key], abs=0.6)


class TestFast:
    def test_learns_and_says_how(self, encoder: str, tmp_path: Path):
        folder = probe(ProbeConfig(**FAST, weights=encoder, output_dir=str(tmp_path / 'run')))
        results = results_of(folder)
        assert results['top1'] > 50 and results['knn'] > 25 and len(results['sweep']) == 9
        assert results['sweep'][f'{results["learning_rate"]:g}'] == results['held_out_top1'] == max(
            results['sweep'].values())
        assert sum(line['event'] == 'sweep' for line in log_of(folder)) == 9

    def test_test_labels_choose_nothing(self, encoder: str, tmp_path: Path, monkeypatch):
        honest = probe(ProbeConfig(**FAST, weights=encoder, output_dir=str(tmp_path / 'honest')))
        cached = features.cached_features

        def with_false_labels(*arguments, **options):
            train, test = cached(*arguments, **options)
            return train, Features(test.features, test.labels.roll(1))

        monkeypatch.setattr('autoreg_vit.commands.probing.cached_features', with_false_labels)
        false = probe(ProbeConfig(**FAST, weights=encoder, output_dir=str(tmp_path / 'false')))
        assert results_of(honest)['sweep'] == results_of(false)['sweep']
        assert (honest / 'classifier.safetensors').read_bytes() == (false / 'classifier.safetensors').read_bytes()
        assert results_of(false)['top1'] < 30

    def test_features_are_kept_for_the_same_weights_alone(self, encoder: str, tmp_path: Path, monkeypatch, capsys):
        config = ProbeConfig(**FAST, weights=encoder, output_dir=str(tmp_path / 'run'))
        with monkeypatch.context() as patch:
            patch.setattr('autoreg_vit.commands.probing.fit_features', mock.Mock(side_effect=KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                probe(config)
        capsys.readouterr()
        probe(config)
        assert 'The features were read from' in capsys.readouterr().out
        path = tmp_path / 'run' / 'features.safetensors'
        assert features._read(path, 'of another encoder') is None
        damaged = bytearray(path.read_bytes())
        damaged[-1] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match='does not match its checksum'):
            features._read(path, 'any')

    def test_a_bank_is_its_members(self):
        """Rates that are trained at once give what each gives alone, and standardisation folds into either head."""
        data = Features(torch.randn(90, 5) * 3 + 2, torch.arange(90) % 3)
        config = ProbeConfig(weights='x', epochs=3, batch_size=32)
        together = fit_bank(data, [0.1, 1.0], 3, config)
        alone = fit_bank(data, [1.0], 3, config)
        torch.testing.assert_close(together.weight[1], alone.weight[0])
        for norm in (False, True):
            head = LinearHead(5, 3, norm, 0, CPU).eval()
            alone.copy_to(head)
            assert 100 * (head(data.features).argmax(1) == data.labels).float().mean() == pytest.approx(
                alone.accuracies(data)[0])

    def test_a_diverged_rate_is_not_chosen(self):
        data = Features(torch.randn(64, 4), torch.zeros(64, dtype=torch.int64))
        right = fit_bank(data, [0.1, 1e38], 2, ProbeConfig(weights='x', epochs=5, batch_size=32)).accuracies(data)
        assert right == [100, 0]


@pytest.mark.parametrize('arguments, words', [
    ([], ['--weights']),
    (['--weights', 'nowhere/encoder'], ['No folder', 'nowhere/encoder', 'runs/NAME/encoder']),
    (['--weights', 'vit_tinny_randsac'], ['vit_tinny_randsac', 'vit_tiny_randsac']),
    (['--weights', 'vit_tiny_randsac'], ['no trained weights', '--no-pretrained']),
    (['--weights', 'randsac_vit_tiny'], ['pretraining model', 'vit_tiny_randsac']),
    (['--weights', 'vit_tiny_randsac.cifar11', '--no-pretrained'], ['no tag', 'cifar11']),
    (['--weights', 'ENCODER', '--img-size', '9'], ['9 x 9', '2 x 2']),
    (['--weights', 'ENCODER', '--opt', 'larss'], ['larss', 'lars']),
    (['--weights', 'ENCODER', '--num-classes', '9'], ['num_classes=9', '10 classes']),
    (['--weights', 'ENCODER', '--batch-size', '2000'], ['2000', '1150']),
    (['--weights', 'ENCODER', '--eval-split', 'val'], ['val', 'test']),
    (['--weights', 'ENCODER', '--holdout', '1'], ['holdout', '1.0']),
    (['--weights', 'ENCODER', '--fastt'], ['--fastt', '--fast']),
    (['--weights', 'ENCODER', '--config', 'saimm'], ['saimm', 'saim']),
    (['--weights', 'ENCODER', '--dataset', 'folder', '--data-dir', 'FLAT'], ['no labels']),
    (['--weights', 'ENCODER', '--tracker', 'mlflow'], ['mlflow', 'wandb']),
])
def test_errors_are_one_line_before_any_work(arguments, words, encoder: str, tmp_path: Path, monkeypatch, capsys):
    flat = tmp_path / 'flat'
    flat.mkdir()
    for number in range(3):
        Image.new('L', (8, 8), 80 * number).save(flat / f'{number}.png')
    (tmp_path / 'work').mkdir()
    monkeypatch.chdir(tmp_path / 'work')
    arguments = [{'ENCODER': encoder, 'FLAT': str(flat)}.get(a, a) for a in arguments]
    defaults = [] if '--batch-size' in arguments else ['--batch-size', '64']
    assert main(['probe', *arguments, *defaults]) == 2
    error = capsys.readouterr().err
    assert error.count('\n') == 1 and 'Traceback' not in error
    for word in words:
        assert word in error, error
    assert not list((tmp_path / 'work').iterdir())


class TestWeights:
    def test_a_runs_folder_stands_for_its_encoder(self, encoder: str, tmp_path: Path):
        run = Path(encoder).parent
        from autoreg_vit.hub.lookup import load_encoder

        assert load_encoder(str(run)).embed_dim == 32
        with pytest.raises(CheckpointError, match='holds no encoder'):
            load_encoder(str(tmp_path))
        with pytest.raises(CheckpointError, match='is a file'):
            load_encoder(str(Path(encoder) / 'config.json'))

    @pytest.mark.parametrize('damage', ['cut', 'flip', 'json', 'gone'])
    def test_damaged_folders(self, damage: str, tmp_path: Path):
        from autoreg_vit.artifacts import write_checksum
        from autoreg_vit.hub.lookup import load_encoder

        folder = write_encoder(tmp_path / 'encoder')
        for file in list(folder.glob('*model*')):
            data = bytearray(file.read_bytes())
            if damage == 'cut':
                file.write_bytes(data[:1000])
            elif damage == 'flip':
                write_checksum(file)
                data[-1] ^= 1
                file.write_bytes(data)
            elif damage == 'gone':
                file.unlink()
        if damage == 'json':
            (folder / 'config.json').write_text('{')
        with pytest.raises(CheckpointError, match=str(folder)):
            load_encoder(str(folder))


class TestLabels:
    def test_out_of_range(self, encoder: str, tmp_path: Path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        labels_of = labelled.labels_of
        # Of the 360 test images alone.
        monkeypatch.setattr(labelled, 'labels_of', lambda dataset: labels_of(dataset) + 3 * (len(dataset) == 360))
        with pytest.raises(UsageError, match=r'Image \d+ has the label 1[0-2], .* are not between 0 and 9'):
            probe(ProbeConfig(**SHORT, weights=encoder))
        assert not list(tmp_path.iterdir())

    def test_splits_of_other_classes(self, encoder: str, tmp_path: Path):
        for split, names in (('train', 'abc'), ('test', 'abd')):
            for name in names:
                (tmp_path / split / name).mkdir(parents=True)
                Image.new('L', (8, 8)).save(tmp_path / split / name / '0.png')
        with pytest.raises(UsageError, match='other class folders: c, d are in one alone'):
            probe(ProbeConfig(weights=encoder, data_dir=str(tmp_path), eval_split='test', batch_size=2))

    def test_damaged_images(self, encoder: str, tmp_path: Path, monkeypatch, capsys):
        """Found before training; where some are allowed, others stand in for them in training, never in a test."""
        for split in ('train', 'test'):
            for name in 'ab':
                (tmp_path / 'data' / split / name).mkdir(parents=True)
                for number in range(6):
                    Image.new('L', (8, 8), 40 * number).save(tmp_path / 'data' / split / name / f'{number}.png')
        monkeypatch.chdir(tmp_path)
        settings = {**SHORT, 'weights': encoder, 'dataset': None, 'data_dir': 'data', 'batch_size': 4, 'knn': 0}

        def damage(split: str) -> None:
            path = tmp_path / 'data' / split / 'b' / '3.png'
            path.write_bytes(path.read_bytes()[:40])

        damage('train')
        with pytest.raises(UsageError, match=r'1 of 12 images cannot be read.*b/3\.png'):
            probe(ProbeConfig(**settings))
        assert not Path('runs').exists()
        folder = probe(ProbeConfig(**settings, max_corrupt=0.1))
        assert results_of(folder)['test_images'] == 12 and 'others stand in' in capsys.readouterr().out
        with pytest.raises(UsageError, match=r'Cannot read .*b/3\.png: it is damaged'):
            probe(ProbeConfig(**settings, max_corrupt=0.1, fast=True))
        damage('test')
        with pytest.raises(UsageError, match=r'1 of 12 images cannot be read.*test/b/3\.png'):
            probe(ProbeConfig(**settings, max_corrupt=0.1))

    def test_every_command_holds_out_the_same_images(self, encoder: str, tmp_path: Path):
        """Those of one seed: pretraining, probing, and what segments and detects by `hold_out`."""
        for n, name in enumerate('ab' * 15):
            (tmp_path / name).mkdir(exist_ok=True)
            Image.new('L', (8, 8), 8 * n).save(tmp_path / name / f'{n}.png')
        spec = labelled.ImageSpec((8, 8), 1, (0.0,), (1.0,))
        shared = {'data_dir': str(tmp_path), 'dataset': 'folder', 'seed': 5}
        train, test = labelled_sets(PretrainConfig(**shared), spec, CPU)
        images = labelled.labelled_images(ProbeConfig(weights=encoder, **shared), spec, CPU)
        held = labelled.hold_out(30, 0.2, 5)[1]
        assert test.indices.tolist() == images.test.indices.tolist() == held.tolist()
        assert train.indices.tolist() == images.plain.indices.tolist()
        assert all(torch.equal(a, b) for (a, _), (b, _) in zip(test, images.test))

    @pytest.mark.parametrize('val, words', [
        (['a', 'c'], 'other class folders: b is in one alone'), (['a', 'b', 'c', 'd'], 'd is in one alone'),
        (['a', 'b', 'd'], 'c, d are in one alone'), (['a'], "The split 'val' .*no labels, or a single class")])
    @pytest.mark.parametrize('command', ['pretrain', 'probe', 'finetune'])
    def test_every_command_checks_splits_alike(self, command: str, val: list[str], words: str, encoder: str,
                                               tmp_path: Path, capsys):
        """A class that is missing in one split would shift the labels of those after it."""
        for split, names in (('train', 'abc'), ('val', val)):
            for name in names:
                (tmp_path / 'data' / split / name).mkdir(parents=True)
                for number in range(2):
                    Image.new('L', (8, 8)).save(tmp_path / 'data' / split / name / f'{number}.png')
        model = ['--img-size=8', '--patch-size=4', '--in-chans=1', '--segments=2', '--embed-dim=16', '--depth=1',
                 '--num-heads=1', '--decoder-depth=1'] if command == 'pretrain' else ['--weights', encoder]
        assert main([command, *model, '--data-dir', str(tmp_path / 'data'), '--eval-split=val', '--batch-size=2',
                     f'--output-dir={tmp_path / "run"}']) == 2
        error = capsys.readouterr().err
        assert re.search(words, error) and error.count('\n') == 1 and not (tmp_path / 'run').exists()

    def test_classes_in_another_order(self):
        """As data sets that name their classes in the order of the labels may have them."""
        config = ProbeConfig(weights='x', dataset='torch/x', eval_split='test')
        labelled.check_same_classes(config, ['a', 'b'], ['a', 'b'])
        labelled.check_same_classes(config, None, ['a', 'b'])
        with pytest.raises(DataError, match='the same classes in another order'):
            labelled.check_same_classes(config, ['a', 'b'], ['b', 'a'])

    def test_classes_without_an_image_to_train_on_are_named(self, encoder: str, tmp_path: Path, capsys):
        for name, count in (('many', 9), ('one', 1)):
            (tmp_path / name).mkdir()
            for n in range(count):
                Image.new('L', (8, 8)).save(tmp_path / name / f'{n}.png')
        config = ProbeConfig(weights=encoder, data_dir=str(tmp_path))
        config.seed = next(seed for seed in range(99) if 9 in labelled.hold_out(10, 0.2, seed)[1])
        labelled.labelled_images(config, labelled.ImageSpec((8, 8), 1, (0.5,), (0.5,)), CPU)
        text = capsys.readouterr().out
        assert 'without an image to train on: one. 1 of the 2 images to report on are of them' in text

    def test_names_given_twice_are_told_apart(self):
        assert labelled.distinct(['a', 'b', 'a', 'a']) == ['a', 'b', 'a (2)', 'a (3)']
        assert labelled.distinct(['a', 'a', 'a (2)']) == ['a', 'a (3)', 'a (2)']

    def test_a_single_image_cannot_be_held_out(self):
        assert [i.tolist() for i in labelled.hold_out(2, 0.2, 0)] in ([[0], [1]], [[1], [0]])
        with pytest.raises(DataError, match=r'Of 1 training image none can be held out.*--eval-split'):
            labelled.hold_out(1, 0.2, 0)

    def test_held_out_images_are_apart_and_the_same(self):
        kept, held = labelled.hold_out(50, 0.2, seed=3)
        assert sorted([*kept, *held]) == list(range(50)) and len(held) == 10
        assert np.array_equal(held, labelled.hold_out(50, 0.2, seed=3)[1])
        assert not np.array_equal(held, labelled.hold_out(50, 0.2, seed=4)[1])
