"""The table of ablations: every row is a model, some are trained, and claims are judged as they should be."""

import importlib.util
import json
import os
from pathlib import Path

import numpy as np
import pytest
import timm
import torch

pytest.importorskip('sklearn')
pytest.importorskip('matplotlib')

from autoreg_vit.engine.signals import Stopped
from autoreg_vit.models import create_pretraining_model
from autoreg_vit.settings.pretraining import PretrainConfig
from benchmarks import ablations, ablations_report
from benchmarks.ablations_rows import BASES, CLAIMS, CURVES, ROWS, SCALES, Claim, Row
from tests.support.launching import free_port, log_of, server
from tests.support.supervising import stop_after

needs_transformers = pytest.mark.skipif(
    importlib.util.find_spec('transformers') is None, reason='the row mae needs transformers')


def model_of(row: Row, scale: str):
    config = PretrainConfig(**ablations.pretrain_settings(row, SCALES[scale]))
    return create_pretraining_model(config.model, **config.model_options())


@pytest.mark.parametrize('scale', SCALES)
def test_every_row_has_settings(scale):
    for row in ROWS:
        config = PretrainConfig(**ablations.pretrain_settings(row, SCALES[scale]))
        assert config.epochs >= 1
        assert config.embed_dim == SCALES[scale].model.get('embed_dim')


@pytest.mark.parametrize('row', [row for row in ROWS if {'depth', 'decoder_depth'} & set(row.settings)
                                 and row.length == 1], ids=lambda row: row.name)
@pytest.mark.parametrize('scale', ['cpu', 'gpu'])
def test_depths_of_a_scale_fit_together(scale, row):
    with torch.device('meta'):
        model_of(row, scale)


@pytest.mark.parametrize('row', [row for row in ROWS if row.length == 1 and row.settings.get('patch_size', 4) > 1],
                         ids=lambda row: row.name)
def test_every_row_takes_a_step(row):
    model = model_of(row, 'smoke')
    loss = model(torch.randn(2, 3, 32, 32)).loss
    loss.backward()
    assert torch.isfinite(loss)
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_rows_claims_and_curves_name_each_other():
    names = [row.name for row in ROWS]
    assert len(set(names)) == len(names)
    assert set(CURVES) <= set(names)
    assert {row.against for row in ROWS} - {None} <= set(names)
    for claim in CLAIMS:
        assert {name for pair in claim.pairs for name in pair} <= set(names)
        # What the paper claims is what its table shows, on average over the pairs.
        assert ablations_report.paper_difference(claim, claim.pairs) > 0, claim.text
    assert {row.base for row in ROWS} == set(BASES)
    designs = [(row.base, str(sorted(row.settings.items())), row.length) for row in ROWS]
    assert len(set(designs)) == len(designs)


def test_the_papers_tables_are_whole():
    """How many rows or columns each of the papers' tables has; SAIM's 'pixel' row is iGPT's own and left out."""
    labels = {}
    for row in ROWS:
        for cite in row.cites:
            labels.setdefault(cite.table, set()).add(cite.label)
    assert {table: len(found) for table, found in labels.items()} == {
        'RandSAC 1': 1 + 1, 'RandSAC 2': 2, 'RandSAC 3': 5, 'RandSAC 4': 3, 'RandSAC 5': 3, 'RandSAC 6': 10,
        'RandSAC 7': 9, 'RandSAC 8': 3, 'RandSAC 9': 2, 'SAIM 3': 9}


def test_two_stream_is_as_large_as_encoder_and_decoder():
    for scale in ('cpu', 'gpu'):
        sizes = {name: sum(p.numel() for p in model_of(ablations.find_row(name), scale).parameters())
                 for name in ('masked', 'two-stream')}
        assert 0.9 < sizes['two-stream'] / sizes['masked'] < 1.1


def test_main_claims_come_first_with_their_seeds():
    runs = ablations.plan(SCALES['cpu'], None, None)
    first = [(row.name, seed) for row, seed in runs[:12]]
    assert first == [(name, seed) for name in ('random', 'raster', 'blobs-7', 'squares-16') for seed in range(3)]
    assert len(runs) == len(ROWS) + 8
    assert [(r.name, s) for r, s in ablations.plan(SCALES['cpu'], ['saim', 'mae'], 2)] == [
        ('saim', 0), ('saim', 1), ('mae', 0), ('mae', 1)]


def test_a_longer_run_warms_up_longer():
    short, long = (ablations.pretrain_settings(ablations.find_row(name), SCALES['cpu'])
                   for name in ('randsac', 'randsac-x4'))
    assert (long['epochs'], long['warmup_epochs']) == (4 * short['epochs'], 4 * short['warmup_epochs'])


def found(accuracies: dict[str, list[float]], images: int = 2000) -> dict[str, ablations_report.Found]:
    """Finished rows with these linear accuracies, a number a seed; the same images are easy for all of them."""
    rows = {}
    for name, runs in accuracies.items():
        right = np.arange(images) < np.array(runs)[:, None] * images / 100
        rows[name] = ablations_report.Found(ablations.find_row(name), [{'linear': value} for value in runs], right)
    return rows


@pytest.mark.parametrize(('better', 'worse', 'verdict'), [
    ([60, 61, 60.5], [50, 51, 50.2], 'holds'),
    ([50, 51, 50.2], [60, 61, 60.5], 'does not hold'),
    ([60, 64, 62], [61, 63, 61.5], 'within noise'),
    ([60.0], [50.0], 'holds'),
])
def test_a_claim_is_judged_against_the_noise(better, worse, verdict):
    claim = Claim('random over raster', 'RandSAC 2', (('random', 'raster'), ('blobs-7', 'random')))
    judged = ablations_report.judge(claim, found({'random': better, 'raster': worse}))
    assert judged['verdict'] == verdict
    assert judged['pairs'] == [['random', 'raster']]
    assert judged['of'] == 2
    assert judged['paper'] == 20.0  # of the pair that was run
    assert judged['points'] == pytest.approx(np.mean(better) - np.mean(worse), abs=0.01)


def test_a_claim_of_rows_that_were_not_run():
    assert ablations_report.judge(CLAIMS[0], found({'saim': [50]}))['verdict'] == 'not run'


def test_noise_of_seeds_and_of_images():
    """Rows that are right on the same images differ by their seeds alone; other images add to it."""
    same = found({'random': [50, 52], 'raster': [50, 52]})
    gap = ablations_report.difference(same, [('random', 'raster')])
    assert gap.value == 0
    assert gap.noise == pytest.approx(2 * 2 ** 0.5)  # variance 2 of a run, two runs a side, two standard errors
    single = found({'random': [50], 'raster': [50]})
    assert ablations_report.difference(single, [('random', 'raster')]).noise == 0
    single['raster'].right[:] = ~single['raster'].right
    assert ablations_report.difference(single, [('random', 'raster')]).noise == pytest.approx(2 * 100 / 2000 ** 0.5)


def test_rows_of_neither_paper_stand_beside_what_they_are_compared_with():
    rows = found({'random': [46.0], 'random-x4': [50.0], 'raster-x4': [48.0], 'randsac-x4': [51.0]})
    for each in rows.values():
        each.runs[0].update(knn=30.0, images=100, gflops_per_image=0.7, images_per_second=50.0, minutes=1.0)
    text = '\n'.join(ablations_report._own_rows(rows))
    assert '| `random-x4` | 50.00 | 30.00 | `random` | +4.00 |' in text
    assert '| `raster-x4` | 48.00 | 30.00 | `random-x4` | -2.00 |' in text
    assert '`randsac-x4`' not in text  # of the cost-quality figure alone


def test_noise_of_the_cost_figure_is_that_of_its_noisiest_pair():
    rows = found({'mae': [50.0], 'randsac': [52.0], 'saim': [70.0], 'random': [10.0]})
    pairs = [('mae', 'randsac'), ('mae', 'saim'), ('randsac', 'saim')]
    noises = [ablations_report.difference(rows, [pair]).noise for pair in pairs]
    assert ablations_report.curve_noise(rows) == max(noises) > min(noises)


def test_where_the_order_turns():
    def line(*values):
        return [{'pflops': cost, 'linear': value} for cost, value in zip((1, 10, 100), values)]

    crossed = {'mae': line(50, 52, 54), 'randsac': line(46, 52.5, 60)}
    turns = ablations_report.crossings(crossed, 'pflops', noise=1.0)
    assert len(turns) == 1
    assert turns[0]['ahead'] == ['mae', 'randsac']
    assert turns[0]['at'] == [pytest.approx(10 ** (4 / 4.5))]
    assert ablations_report.crossings(crossed, 'pflops', noise=5.0)[0]['ahead'] == ['neither', 'randsac']
    below = ablations_report.crossings({'mae': line(50, 52, 54), 'randsac': line(46, 48, 50)}, 'pflops', noise=1.0)
    assert (below[0]['ahead'], below[0]['at']) == (['mae', 'mae'], [])
    apart = [{'pflops': 1000, 'linear': 50}]
    assert ablations_report.crossings({'mae': line(50, 52, 54), 'randsac': apart}, 'pflops', noise=1.0) == []


def test_the_table_of_turns_says_what_both_ends_share_once():
    point = {'images': 1e4, 'pflops': 0.01, 'minutes': 1, 'linear': 50, 'knn': 40}
    turn = {'designs': ['mae', 'randsac'], 'axis': 'images'}
    turns = [{**turn, 'range': [1e4, 2e4], 'ahead': ['mae', 'neither'], 'points': [2.0, -0.5], 'at': [15000.4]},
             {**turn, 'range': [1e4, 1e4], 'ahead': ['mae', 'mae'], 'points': [2.0, 2.0], 'at': []}]
    text = ablations_report._cost_table({'mae': [point], 'randsac': [point]}, turns, 1.0)
    assert text[-2] == '| MAE | RandSAC | images seen | 10,000 → 20,000 | +2.00 → -0.50 | MAE → within noise | 15,000 |'
    assert text[-1] == '| MAE | RandSAC | images seen | 10,000 | +2.00 | MAE |  |'


@needs_transformers
def test_mae_is_the_same_encoder_in_timm():
    from benchmarks.ablations_mae import build_mae, to_timm

    sizes = model_of(ablations.find_row('mae'), 'smoke')
    mae = build_mae(sizes, mask_ratio=0.0).eval()
    with torch.no_grad():
        for parameter in mae.vit.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    encoder = to_timm(mae, sizes).eval()
    images = torch.randn(2, 3, 32, 32)
    noise = torch.arange(64.0).expand(2, -1)  # keeps raster order
    torch.testing.assert_close(
        encoder.forward_features(images), mae.vit(images, noise=noise).last_hidden_state, rtol=1e-4, atol=1e-4)
    assert (mae.decoder.decoder_pos_embed[0, 1:].std(0) > 0).all()  # the decoder knows where it is


@needs_transformers
def test_a_run_of_the_table(tmp_path, monkeypatch, capsys):
    arguments = ['--scale', 'smoke', '--work-dir', str(tmp_path / 'work'), '--output-dir', str(tmp_path / 'out')]

    assert ablations.main([*arguments, '--rows', 'mae', 'randsac', 'untrained']) == 0

    result = json.loads((tmp_path / 'out' / 'ablations-smoke.json').read_text())
    assert [row['row'] for row in result['rows']] == ['untrained', 'randsac', 'mae']
    runs = {row['row']: row['runs'][0] for row in result['rows']}
    assert runs['mae']['images'] == runs['randsac']['images'] == 160
    assert 0 < runs['mae']['gflops_per_image'] < runs['randsac']['gflops_per_image'] / 2
    assert all(0 <= run['linear'] <= 100 and 0 <= run['knn'] <= 100 for run in runs.values())
    assert runs['mae']['commit'] == runs['randsac']['commit'] == result['commit']
    text = (tmp_path / 'out' / 'ablations-smoke.md').read_text()
    assert '| RandSAC over MAE | RandSAC 9: +6.60 |' in text
    assert f'{runs["mae"]["hardware"]}, {runs["mae"]["precision"]}, torch {torch.__version__}' in text
    assert (tmp_path / 'out' / 'ablations-smoke-randsac-9.png').stat().st_size > 1000
    encoder = timm.create_model(f'local-dir:{tmp_path / "work/smoke/mae/0/pretrain/encoder"}', pretrained=True)
    assert encoder(torch.randn(1, 3, 32, 32)).shape == (1, 32)
    # Training, validation and test images are three sets.
    images = tmp_path / 'work' / 'smoke' / 'images'
    names = [{path.name for path in (images / split).rglob('*.png')} for split in ('train', 'val')]
    assert [len(n) for n in names] == [160, 80]
    assert not names[0] & names[1]
    # The test split is another report, and was read by nothing before.
    assert not list((tmp_path / 'work').rglob('probe-test'))

    # Finished rows are left alone.
    monkeypatch.setattr(ablations, 'pretrain_mae', lambda config: pytest.fail('trained again')
                        if not Path(config.output_dir, 'encoder').exists() else None)
    written = (tmp_path / 'work/smoke/mae/0/probe-val/results.json').stat().st_mtime_ns
    assert ablations.main([*arguments, '--rows', 'mae', '--final']) == 0
    assert (tmp_path / 'work/smoke/mae/0/probe-val/results.json').stat().st_mtime_ns == written
    tested = json.loads((tmp_path / 'out' / 'ablations-smoke-test.json').read_text())
    assert (tested['split'], [row['row'] for row in tested['rows']]) == ('test', ['mae'])

    # Nothing is begun that would end too late, and the plan knows how fast rows are.
    capsys.readouterr()
    assert ablations.main([*arguments, '--rows', 'saim', '--minutes', '0']) == 0
    assert 'needs about' in capsys.readouterr().out
    assert not (tmp_path / 'work/smoke/saim').exists()
    assert ablations.main([*arguments, '--rows', 'mae', 'saim', '--list']) == 0
    assert 'finished' in capsys.readouterr().out


@needs_transformers
def test_mae_resumes_exactly(tmp_path, monkeypatch):
    from safetensors.torch import load_file

    from benchmarks import ablations_mae

    images = ablations.image_folder('smoke', None, tmp_path)
    settings = {**ablations.pretrain_settings(ablations.find_row('mae'), SCALES['smoke']), 'dataset': 'folder',
                'data_dir': str(images), 'check_images': 0}
    whole, stopped = (ablations_mae.MaeConfig(**settings, output_dir=str(tmp_path / name)) for name in 'ab')
    ablations_mae.pretrain_mae(whole)
    with monkeypatch.context() as patch, pytest.raises(Stopped, match='after step 5'):
        stop_after(5, patch)
        ablations_mae.pretrain_mae(stopped)
    ablations_mae.pretrain_mae(stopped)

    first, second = (load_file(tmp_path / name / 'encoder' / 'model.safetensors') for name in 'ab')
    assert all(torch.equal(first[name], second[name]) for name in first)


def _mae_process(rank, port, settings):
    from benchmarks import ablations_mae

    os.environ |= {'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': str(port), 'WORLD_SIZE': '2', 'RANK': str(rank),
                   'LOCAL_RANK': str(rank), 'OMP_NUM_THREADS': '1'}
    ablations_mae.pretrain_mae(ablations_mae.MaeConfig(**settings))


@needs_transformers
@pytest.mark.slow
def test_mae_in_two_processes_equals_one(tmp_path):
    from safetensors.torch import load_file

    from benchmarks import ablations_mae

    images = ablations.image_folder('smoke', None, tmp_path)
    settings = {**ablations.pretrain_settings(ablations.find_row('mae'), SCALES['smoke']), 'dataset': 'folder',
                'data_dir': str(images), 'check_images': 0, 'log_every': 1, 'precision': 'float32'}
    ablations_mae.pretrain_mae(ablations_mae.MaeConfig(**settings, output_dir=str(tmp_path / 'one')))
    port, settings = free_port(), {**settings, 'output_dir': str(tmp_path / 'two')}
    both = [server().Process(target=_mae_process, args=(rank, port, settings)) for rank in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join(240)
        assert process.exitcode == 0

    one, two = (load_file(tmp_path / name / 'encoder' / 'model.safetensors') for name in ('one', 'two'))
    for weights in (one, two):  # softmax ignores the keys' bias: its gradient is rounding, which Adam makes large
        for name in [name for name in weights if name.endswith('qkv.bias')]:
            weights[name] = weights[name].reshape(3, -1)[::2]
    torch.testing.assert_close(two, one, rtol=1e-3, atol=1e-5)
    losses = [[line['loss'] for line in log_of(tmp_path / name) if line['event'] == 'step'] for name in ('one', 'two')]
    assert len(losses[0]) == 10
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


@pytest.mark.parametrize(('arguments', 'says'), [
    (['--scale', 'cpu', '--rows', 'random'], 'needs --data-dir'),
    (['--scale', 'smoke', '--rows', 'blob-7'], "'blobs-7'"),
])
def test_errors_are_one_line(tmp_path, capsys, arguments, says):
    assert ablations.main([*arguments, '--work-dir', str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count('\n') == 1
