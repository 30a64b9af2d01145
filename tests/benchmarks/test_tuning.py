"""The tuner: what it tries, in what order, what it keeps of it, and what it makes of the table of launches; the floor
that times are measured by."""

import argparse
import json
import math

import pytest
import torch

from autoreg_vit.ops.triton import launches
from benchmarks import tune_attention
from benchmarks.attention import floors, make_case
from benchmarks.candidates import longest
from tests.support.launching import run_python

TIMED = 'NVIDIA H100, Triton 3.6'


def test_what_the_table_has_leads_the_candidates_of_every_size():
    jobs = tune_attention.list_jobs(['bfloat16', 'float32'], [32, 64], 90)
    assert (jobs[0].dtype, jobs[0].head_dim, jobs[0].tokens) == (torch.bfloat16, 64, 256)
    assert len(set(jobs)) == len(jobs)
    sizes = {}
    for job in jobs:
        sizes.setdefault((job.direction, job.dtype, job.head_dim, job.tokens), []).append(job)
        assert longest(job.direction, job.plan) >= (job.tokens or math.inf)
    assert len(sizes) == 2 * 2 * 2 * len(tune_attention.CASES)
    for found in sizes.values():
        assert found[0].today and not any(job.today for job in found[1:])
    # Some of every size come before the rest of any.
    first = {(job.direction, job.dtype, job.head_dim, job.tokens) for job in jobs[:len(sizes) * tune_attention.FIRST]}
    assert first == set(sizes)


@pytest.fixture
def toy(monkeypatch, tmp_path):
    """Tuning on this machine, at a size that Triton's interpreter takes; nothing is compiled."""
    monkeypatch.setattr(tune_attention, 'CASES', {64: ('randsac', 16)})
    monkeypatch.setattr(tune_attention, 'HEADS', 1)
    monkeypatch.setattr(tune_attention, 'compiled', lambda jobs, *_: (
        (job, 'spills' if job.plan.design == 'fused_from_out' and not job.today else None) for job in jobs))
    return argparse.Namespace(dtypes=['float32'], head_dims=[32], limit=4, images=2, seconds=0.001, jobs=1,
                              out=tmp_path / 'tuned.json')


@pytest.mark.skipif(torch.cuda.is_available(), reason='tuning is slow on a GPU that compiles')
def test_tuning_goes_on_where_it_stopped(toy):
    tune_attention.tune(toy, torch.device('cpu'), math.inf)
    first = json.loads(toy.out.read_text())
    assert len(first['timings']) == 4
    assert all(t['refused'] == 'spills' or t['median_us'] > 0 for t in first['timings'])
    (row,) = (r for r in first['launches'] if r['pass'] == 'backward')
    assert row['timed_on'].startswith('cpu, Triton')

    # A candidate that ended the process is not run again.
    first['timings'][1] = {'row': first['timings'][1]['row'], 'today': False, 'refused': 'ended the process'}
    toy.out.write_text(json.dumps(first))
    toy.limit = 1
    tune_attention.tune(toy, torch.device('cpu'), math.inf)
    timings = json.loads(toy.out.read_text())['timings']
    assert timings[:4] == first['timings'] and len(timings) == 5


def test_the_tuner_compiles_without_a_gpu():
    done = run_python('-m', 'benchmarks.tune_attention', '--dry-run', '--limit', '1', '--jobs', '1', '--minutes',
                      '20')
    assert done.returncode == 0, done.stderr
    assert '1 candidates' in done.stdout


def test_nothing_is_compiled_beyond_the_deadline():
    jobs = tune_attention.list_jobs(['bfloat16'], [64], 90)[:1]
    assert list(tune_attention.compiled(jobs, 90, 1, -math.inf)) == []


def test_a_candidate_with_wrong_results_is_refused(toy, monkeypatch):
    job = next(j for j in tune_attention.list_jobs(['float32'], [32], 90) if j.plan.design == 'tiled')
    monkeypatch.setattr(tune_attention.backward, 'DESIGNS', {'tiled': tune_attention.backward.Design(
        lambda *arguments: arguments[7].zero_())})
    assert tune_attention.time_job(job, 'cpu', 2, 0.001)['refused'].startswith('wrong')


def row(tokens, block, *, below=None, direction='backward', timed_on=None):
    return {'pass': direction, 'design': 'tiled', 'arch': 90, 'dtype': 'bfloat16', 'head_dim': 64, 'tokens': tokens,
            'launches': [{'block': block, 'step': 32, 'num_warps': 4, 'num_stages': 1}], 'triton_below': below,
            'timed_on': timed_on}


def timing(tokens, block, median=None, *, today=False):
    return {'row': row(tokens, block), 'today': today, **({'median_us': median} if median else {'refused': 'spills'})}


def test_the_fastest_becomes_a_row_where_the_table_was_timed_too():
    timings = [timing(64, 16, 9.0, today=True), timing(64, 32, 7.0), timing(64, 64), timing(128, 16, 5.0)]
    assert tune_attention.best_rows(timings, TIMED) == [row(64, 32, timed_on=TIMED)]
    assert tune_attention.best_rows([timing(64, 16, today=True)], TIMED) == []


def test_new_rows_stand_before_what_they_replace():
    old = [row(64, 16), row(256, 16, below='3.7'), row(256, 32), row(None, 16)]
    bounded, new = row(256, 64, below='3.8', timed_on=TIMED), row(64, 64, timed_on=TIMED)
    table = tune_attention.updated_table(old, [bounded, new])
    # The row for 64 tokens is replaced, that below 3.7 covered, and the one for all versions kept for 3.8 and beyond.
    assert table == [new, bounded, old[2], old[3]]
    other = row(None, 8, direction='forward')
    assert tune_attention.updated_table([*old, other], [row(None, 64)]) == [*old[:3], row(None, 64), other]


def test_taking_rows_bounds_those_that_spill_here(tmp_path, monkeypatch):
    table = tmp_path / 'launches.json'
    monkeypatch.setattr(tune_attention, 'TABLE', table)
    monkeypatch.setattr(tune_attention, 'table', lambda: [row(None, 16)])
    monkeypatch.setattr(tune_attention, 'refusal', lambda row: 'spills' if row['tokens'] == 64 else None)
    results = tmp_path / 'tuned.json'
    results.write_text(json.dumps({'launches': [row(64, 32, timed_on=TIMED), row(None, 64, timed_on=TIMED)]}))
    tune_attention.take(results)
    version = '.'.join(map(str, launches.TRITON))
    assert json.loads(table.read_text())['launches'] == [
        row(64, 32, below=version, timed_on=TIMED), row(None, 64, timed_on=TIMED)]


@pytest.mark.parametrize('name, tokens, read_and_written', [('randsac', 64, 4 + 7), ('saim', 64, 4 + 8)])
def test_the_floor_is_of_what_must_move(name, tokens, read_and_written):
    case = make_case(name, tokens, 32, 1, 1, torch.float16, 'cpu')
    tensor, rows = case.grad.numel() * 2, case.grad.shape[1] * 4 * 2
    floor = floors(case, bandwidth=1e6, rate=math.inf)
    assert floor[False] == pytest.approx(4 * tensor + rows)
    assert floor[True] == pytest.approx(read_and_written * tensor + 2 * rows)
