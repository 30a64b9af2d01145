"""A sweep of settings at toy size: its file, its rows, its time, and what becomes of what it finds."""

import contextlib
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip('sklearn')
pytest.importorskip('matplotlib')

from PIL import Image

from autoreg_vit.commands import pretraining
from autoreg_vit.data import sources
from autoreg_vit.errors import ConfigError
from autoreg_vit.evaluation.cached import fingerprint
from autoreg_vit.models.pretrained import load_folder
from autoreg_vit.settings.base import make_config, read_settings
from autoreg_vit.settings.pretraining import PretrainConfig
from benchmarks.gpu import __main__ as command
from benchmarks.gpu import plan, queue, sitting, state, take
from benchmarks.gpu import sweep as sweeping
from benchmarks.gpu.jobs import Job
from benchmarks.gpu.sitting import FULL, TOY
from benchmarks.gpu.sweep import Sweeper, read_sweep
from tests.benchmarks.test_gpu_travel import FACTS

TINY = {'img_size': 16, 'segments': [4], 'warmup_epochs': 1}
ROWS = {'plain': {}, 'rate': {'lr': 0.01, 'betas': [0.9, 0.9]}, 'raw': {'norm_pix': False},
        'crops': {'crop_scale': [0.08, 1.0]}}


@pytest.fixture(scope='module')
def images(tmp_path_factory) -> Path:
    """Two classes of 16 images each, and a split that is not to be opened."""
    folder = tmp_path_factory.mktemp('images')
    draw = np.random.default_rng(0)
    for split in ('train', 'test'):
        for name, shade in (('cat', 40), ('dog', 120)):
            (folder / split / name).mkdir(parents=True)
            for number in range(16):
                pixels = draw.integers(0, 100, (16, 16, 3), dtype=np.uint8) + np.uint8(shade)
                Image.fromarray(pixels).save(folder / split / name / f'{number}.png')
    return folder


def write(path: Path, rows: dict = ROWS, **more) -> str:
    """A sweep's file; YAML reads JSON."""
    path.write_text(json.dumps({'recipe': 'randsac-tiny-cifar10', 'settings': TINY, 'rows': rows, **more}))
    return str(path)


def sweeper(folder: Path, images: Path, seconds: float = 600, rows: dict = ROWS, most_epochs: float = 2) -> Sweeper:
    swept = read_sweep(write(folder / 'some.yaml', rows), TOY)
    return Sweeper(swept, images, folder / 'rows.jsonl', time.monotonic() + seconds, most_epochs)


def rows_of(folder: Path) -> dict[str, dict]:
    return {row['name']: row for row in map(json.loads, (folder / 'rows.jsonl').read_text().splitlines())}


class TestFile:
    def test_the_bundled_one_has_what_is_to_be_tried(self):
        found = read_sweep('randsac-tiny-cifar10', FULL)
        changed = {key for row in found.rows.values() for key in row}
        assert changed == {'crop_scale', 'lr', 'betas', 'weight_decay', 'batch_size', 'norm_pix', 'segments',
                           'decoder_dim', 'decoder_depth'}
        assert found.settings['compile'] is True and found.settings['memory'] == 'mix' and len(found.rows) >= 9
        assert 'sweep' in plan.describe(8)

    @pytest.mark.parametrize('rows, message', [
        ({'a': {'crop_scal': 1}}, r"some.yaml, a: Unknown recipe key 'crop_scal'. Did you mean 'crop_scale'"),
        ({'a': {'lr': 'high'}}, r"some.yaml, a: lr must be of type float, got 'high'"),
        ({'a': {'eval_split': 'test'}}, 'some.yaml, a: eval_split is the same for all rows'),
        ({'a/b': {}}, "cannot be called 'a/b'"), ({'untrained': {}}, "cannot be called 'untrained'"),
        ({'a': 3}, 'expected settings as'), ({}, 'rows are names')])
    def test_what_cannot_be_is_named(self, tmp_path: Path, rows: dict, message: str):
        with pytest.raises(ConfigError, match=message):
            read_sweep(write(tmp_path / 'some.yaml', rows), TOY)

    def test_files_that_are_none(self, tmp_path: Path):
        with pytest.raises(ConfigError, match=r"No sweep 'randsac-tiny-cifar'.*Did you mean 'randsac-tiny-cifar10'"):
            read_sweep('randsac-tiny-cifar', TOY)
        with pytest.raises(ConfigError, match='must hold recipe, rows'):
            read_sweep(write(tmp_path / 'some.yaml', more=1), TOY)

    def test_an_error_of_use_is_one_line(self, tmp_path: Path, monkeypatch, capsys):
        monkeypatch.setattr(sys, 'argv', ['gpu', '--toy', '--out', str(tmp_path / 'out'), '--sweep',
                                          write(tmp_path / 'some.yaml', {'a': {'crop_scal': 1}})])
        assert command.main() == 2
        said = capsys.readouterr().err
        assert len(said.splitlines()) == 1 and "'crop_scal'" in said
        assert not (tmp_path / 'out').exists()


@pytest.fixture(scope='module')
def swept(tmp_path_factory, images: Path) -> Path:
    """The folder of a sweep with all its rows, made while other splits than the training images cannot be opened."""
    folder, opened = tmp_path_factory.mktemp('swept'), []

    def refuse(name, data_dir, split, *args, **more):
        opened.append(split)
        assert split == 'train', f'{split} was opened'
        return original(name, data_dir, split, *args, **more)

    original = sources.open_dataset
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, 'open_dataset', refuse)
        assert sweeper(folder, images).run() == []
    # Once to train on, and once to judge by.
    assert opened == ['train', 'train']
    return folder


class TestRows:
    def test_each_has_what_it_saw_and_reached(self, swept: Path):
        rows = rows_of(swept)
        assert set(rows) == {'untrained', *ROWS}
        shares = {row['share'] for name, row in rows.items() if name != 'untrained'}
        assert len(shares) == 1
        for name, row in rows.items():
            assert 0 <= row['knn'] <= 100 and 0 <= row['linear'] <= 100 and row['judged_on'] == 6
            if name != 'untrained':
                assert row['images'] == row['epochs'] * 32 == row['steps'] * 8 and row['epochs'] == 2
                assert row['images_per_second'] == pytest.approx(row['images'] / row['seconds'], rel=0.1)
                assert row['changed'] == ROWS[name]
        assert len({row['fingerprint'] for row in rows.values() if 'fingerprint' in row}) == len(ROWS)

    @pytest.mark.parametrize('name', ['plain', 'rate', 'raw', 'crops'])
    def test_equals_the_same_run_by_pretrain_to_the_bit(self, swept: Path, tmp_path: Path, monkeypatch, name: str):
        monkeypatch.setattr(pretraining, 'draw_figures', lambda *args: None)
        config = read_settings(swept / 'rows' / f'{name}.yaml')
        run = pretraining.pretrain(make_config(PretrainConfig, config, {'output_dir': str(tmp_path / 'run')}))
        row, log = rows_of(swept)[name], [json.loads(line) for line in (run / 'log.jsonl').read_text().splitlines()]
        assert fingerprint(load_folder(run / 'pretrain')) == row['fingerprint']
        last = [line for line in log if line['event'] == 'evaluation'][-1]
        assert (round(last['knn'], 3), round(last['linear'], 3)) == (row['knn'], row['linear'])
        assert last['images'] == row['images']

    def test_a_rerun_goes_on_with_what_is_missing(self, swept: Path, tmp_path: Path, images: Path, monkeypatch):
        lines = (swept / 'rows.jsonl').read_text().splitlines(keepends=True)
        (tmp_path / 'rows.jsonl').write_text(''.join(lines[:3]) + lines[3][:20])  # killed as it wrote
        trained, train = [], Sweeper.train
        monkeypatch.setattr(Sweeper, 'train', lambda self, name, *args: trained.append(name) or train(
            self, name, *args))
        assert sweeper(tmp_path, images).run() == []
        there = [json.loads(line)['name'] for line in lines[:3]]
        assert set(trained) == set(ROWS) - set(there)
        before, after = rows_of(swept), rows_of(tmp_path)
        assert {n: r['fingerprint'] for n, r in after.items() if n != 'untrained'} == {
            n: r['fingerprint'] for n, r in before.items() if n != 'untrained'}
        assert len({row['share'] for row in after.values() if 'share' in row}) == 1
        trained.clear()
        assert sweeper(tmp_path, images).run() == [] and not trained

    def test_what_does_not_work_is_a_row_that_says_so(self, tmp_path: Path, images: Path):
        rows = {'many': {'batch_size': 64}, 'wild': {'lr': 1e30, 'warmup_epochs': 0}, 'plain': {}}
        assert sweeper(tmp_path, images, rows=rows).run() == []
        found = rows_of(tmp_path)
        assert 'fewer than a batch of 64' in found['many']['failed'] and 'linear' in found['plain']
        assert 'loss became' in found['wild']['failed']
        said = sweeping.table(list(found.values())).splitlines()
        assert [line.split(' | ')[0].strip('| ') for line in said[2:]][-2:] in (['many', 'wild'], ['wild', 'many'])

    def test_rows_whose_steps_are_alike_share_what_is_compiled(self, tmp_path: Path, images: Path, monkeypatch):
        compiled, plainly = [], torch.compile

        def backend(graph, inputs):
            compiled.append(len(inputs))
            return graph.forward

        monkeypatch.setattr(torch, 'compile', lambda network: plainly(network, backend=backend))
        monkeypatch.setattr(Sweeper, 'compile_all', lambda *args: [])
        rows = {'plain': {}, 'batch': {'batch_size': 16}, 'rate': {'lr': 0.01}, 'blobs': {'segments': [3]}}
        compiling = {name: {**row, 'compile': True} for name, row in rows.items()}
        swept = sweeper(tmp_path, images, rows=compiling, most_epochs=1)
        assert swept.order(compiling) == ['plain', 'rate', 'blobs', 'batch']
        per_row = []
        keep = swept.keep
        monkeypatch.setattr(swept, 'keep', lambda name, row: (keep(name, row), per_row.append(len(compiled))))
        assert swept.run() == []
        one = per_row[1]
        assert one > 0 and per_row == [0, one, one, one, 2 * one]
        assert [row.get('graphs') for row in rows_of(tmp_path).values()] == [None, one, 0, 0, one]


class TestTime:
    def test_it_is_shared_out_and_kept(self, tmp_path: Path, images: Path, monkeypatch):
        """By a clock that steps and judgements alone move: ten images a second, twelve with crops."""
        now = [1000.0]
        take_step, evaluate = sweeping.Trainer.take_step, sweeping.Pretraining.evaluate

        def step(self):
            now[0] += 8 / (12 if self.config.crop_scale[0] < 0.1 else 10)
            return take_step(self)

        def judge(self, model):
            now[0] += 5
            return evaluate(self, model)

        def timed(function, device):
            before = now[0]
            function()
            return now[0] - before

        monkeypatch.setattr(sweeping, 'time', SimpleNamespace(
            monotonic=lambda: now[0], time=lambda: now[0], sleep=time.sleep))
        monkeypatch.setattr(sweeping.Trainer, 'take_step', step)
        monkeypatch.setattr(sweeping.Pretraining, 'evaluate', judge)
        monkeypatch.setattr(sweeping, 'timed', timed)
        tried = Sweeper(read_sweep(write(tmp_path / 'some.yaml'), TOY), images, tmp_path / 'rows.jsonl', 1120)
        assert tried.run() == [] and 1090 < now[0] < 1120
        rows = rows_of(tmp_path)
        share = rows['plain']['share']
        # Of 120 s five judgements, and ten times three steps of 0.8 s: two times a row, and once more for two of them.
        assert share == pytest.approx(0.95 * (120 - 5 * 5 - 10 * 3 * 0.8) / 4, rel=0.02)
        assert {name: row['epochs'] for name, row in rows.items()} == {
            'untrained': 0, 'plain': 5, 'rate': 5, 'raw': 5, 'crops': 6}
        for name in ROWS:
            assert rows[name]['share'] == share and share - 3.3 < rows[name]['seconds'] <= share
            assert rows[name]['images_per_second'] == pytest.approx(12 if name == 'crops' else 10)

    def test_a_row_that_would_not_fit_is_not_begun(self, swept: Path, tmp_path: Path, images: Path, monkeypatch):
        first = (swept / 'rows.jsonl').read_text().splitlines(keepends=True)[:2]
        (tmp_path / 'rows.jsonl').write_text(''.join(first))
        share = json.loads(first[1])['share']
        monkeypatch.setattr(Sweeper, 'train', lambda *args: pytest.fail('was begun'))
        name = json.loads(first[1])['name']
        assert set(sweeper(tmp_path, images, share * 0.9).run()) == set(ROWS) - {name}
        assert (tmp_path / 'rows.jsonl').read_text() == ''.join(first)

    def test_a_row_that_takes_too_long_is_given_up(self, tmp_path: Path, images: Path, monkeypatch):
        tried = sweeper(tmp_path, images, 60)
        take_step = sweeping.Trainer.take_step

        def late(self):
            if self.config.epochs != sweeping.PACED_EPOCHS:  # the row's own steps, not those that are timed
                tried.deadline = time.monotonic()
            return take_step(self)

        monkeypatch.setattr(sweeping.Trainer, 'take_step', late)
        assert tried.run() == ['plain', 'rate', 'crops', 'raw'] and set(rows_of(tmp_path)) == {'untrained'}

    def test_too_little_for_an_epoch_is_said(self, tmp_path: Path, images: Path, capsys):
        tried = sweeper(tmp_path, images, 60)
        tried.share_of = lambda left: 0.0
        assert len(tried.run()) == 4 and 'not enough for an epoch of 32 images' in capsys.readouterr().out


def test_a_step_is_compiled_by_a_process_of_its_own(tmp_path: Path, images: Path, monkeypatch):
    write(tmp_path / 'some.yaml', {'plain': {}, 'rate': {'lr': 0.1}, 'raw': {'norm_pix': False, 'compile': True}})
    arguments = [str(tmp_path / 'some.yaml'), '--data-dir', str(images), '--output', str(tmp_path / 'rows.jsonl'),
                 '--until', str(time.time() + 60), '--toy']
    monkeypatch.setattr(sys, 'argv', ['sweep', *arguments, '--compile', 'plain'])
    assert sweeping.main() == 0 and not (tmp_path / 'rows.jsonl').exists()
    begun = []
    monkeypatch.setattr(sweeping, 'Job', lambda words, log: begun.append(words))
    swept = Sweeper(read_sweep(arguments[0], TOY), images, tmp_path / 'rows.jsonl', time.monotonic() + 60)
    swept.compile_all(['plain', 'rate', 'raw'], arguments)
    assert begun == [['benchmarks.gpu.sweep', *arguments, '--compile', 'raw']]


class Here(Job):
    """A job that this process does instead."""

    def __init__(self, arguments: Sequence[str], log: Path, environment: dict[str, str] | None = None):
        assert arguments[0] == 'benchmarks.gpu.sweep'
        with pytest.MonkeyPatch.context() as patch, log.open('a') as output, contextlib.redirect_stdout(output):
            patch.setattr(sys, 'argv', list(arguments))
            status = sweeping.main()
        self.log, self.began = log, time.monotonic()
        self.process = SimpleNamespace(poll=lambda: status, returncode=status)

    def stop(self) -> bool:
        return False


@pytest.mark.parametrize('job', [Here, pytest.param(Job, marks=pytest.mark.slow)])
def test_by_the_command_and_taken(job: type[Job], tmp_path: Path, images: Path, monkeypatch, capsys):
    """A call, one of another file by that name, and what is taken home."""
    monkeypatch.setattr(sitting, 'Job', job)
    file = write(tmp_path / 'some.yaml', {'plain': {}, 'rate': {'lr': 0.01}})
    monkeypatch.setattr(sys, 'argv', [
        'gpu', '--toy', '--minutes', '4', '--out', str(tmp_path / 'out'), '--work-dir', str(tmp_path / 'work'),
        '--data-dir', str(images), '--sweep', file])
    monkeypatch.setattr(queue, 'listen', lambda: None)
    assert command.main() == 0
    said = capsys.readouterr().out
    assert 'sweep-some: done' in said and '| rate |' in said
    content = state.read_state(tmp_path / 'out')
    assert [row['name'] for row in content['parts']['sweep-some']['rows']] == ['untrained', 'plain', 'rate']
    write(tmp_path / 'some.yaml', {'plain': {}, 'rate': {'lr': 0.02}})
    assert command.main() == 2 and 'another sweep that is called some (rate)' in capsys.readouterr().err

    # At home, of a card.
    (tmp_path / 'home/benchmarks/results').mkdir(parents=True)
    (tmp_path / 'back').mkdir()
    found = state.State(tmp_path / 'back', FACTS)
    found.update('sweep-some', **content['parts']['sweep-some'])
    for check in ('check_commit', 'check_versions', 'check_newer'):
        monkeypatch.setattr(take, check, lambda *args: None)
    said = '\n'.join(take.take(tmp_path / 'back', tmp_path / 'home'))
    files = list((tmp_path / 'home').rglob('*.json'))
    assert [p.name for p in files] == ['sweep-some-nvidia-h100-80gb-hbm3.json']
    assert [row['name'] for row in json.loads(files[0].read_text())['rows']] == ['untrained', 'plain', 'rate']
    assert '| plain |' in said and 'images/s' in said and 'Goals' not in said


def test_rows_stand_by_linear_accuracy():
    rows = [{'name': name, 'linear': linear, 'knn': 1.0, 'epochs': 3, 'images': 4000, 'loss': 0.5,
             'images_per_second': 1234.5} for name, linear in (('low', 10.0), ('high', 20.0))]
    lines = sweeping.table([*rows, {'name': 'none', 'failed': 'why'}]).splitlines()
    assert lines[2] == '| high | 20.0 | 1.0 | 0.5000 | 3 | 4,000 | 1,234 |'
    assert lines[3].startswith('| low') and lines[4] == '| none | failed: why | | | | | |'


