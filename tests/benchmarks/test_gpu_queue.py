"""The queue for a GPU: its plan, what it keeps, and all of its parts at toy size."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip('sklearn')
pytest.importorskip('matplotlib')

from PIL import Image

from autoreg_vit import __version__
from autoreg_vit.errors import ConfigError
from benchmarks import attention as attention_script
from benchmarks.gpu import cards, equality, jobs, outcomes, parts, plan, pretraining, sitting, state
from benchmarks.gpu import profile as profiling
from benchmarks.gpu.steps import Worker

ROOT = Path(__file__).parents[2]
FACTS = {'commit': '0123456789ab', 'device': 'NVIDIA H100 80GB HBM3', 'torch': '2.11.0+cu130', 'triton': '3.6.0',
         'timm': '1.0.31', 'autoreg_vit': __version__, 'toy': False, 'data': 'CIFAR-10'}


class TestPlan:
    def test_eight_minutes_have_room_for_all(self):
        shares = plan.shares(480)
        assert list(shares) == list(plan.NAMES)
        assert sum(shares.values()) + plan.START + plan.RESERVE == pytest.approx(480)

    def test_what_is_worth_most_comes_first_and_the_run_last(self):
        shares = plan.shares(200)
        assert list(shares) == ['equality', 'tests', 'launches'] and shares['launches'] == 80  # of 110
        assert list(plan.shares(200, done=['tests', 'launches'])) == ['equality', 'attention', 'steps']

    def test_command_needs_nothing_but_python(self, tmp_path: Path):
        """No PyTorch, no GPU, no data."""
        words = [sys.executable, '-S', '-E', '-m', 'benchmarks.gpu', '--plan']
        said = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout
        assert all(name in said for name in plan.NAMES) and '8:00 of 8:00' in ' '.join(said.split())

    def test_what_is_done_and_left_is_said(self):
        said = plan.describe(3, done=['equality'])
        assert 'done  equality' in said and 'want of time: attention, steps, run' in said


class TestState:
    def test_survives_and_is_gone_on_with(self, tmp_path: Path):
        first = state.State(tmp_path, FACTS)
        first.update('steps', rows=[1])
        first.update('tests', status='done')
        again = state.State(tmp_path, FACTS)
        assert again.done == ['tests'] and again.part('steps')['rows'] == [1]

    def test_results_of_another_sitting_are_refused(self, tmp_path: Path):
        state.State(tmp_path, FACTS).save()
        with pytest.raises(ConfigError, match=r'device was NVIDIA H100.*is NVIDIA H200.*--out'):
            state.State(tmp_path, {**FACTS, 'device': 'NVIDIA H200'})

    @pytest.mark.parametrize('damage, message', [
        (lambda text: text[:-20], 'damaged'), (lambda text: text.replace('H100', 'H200'), 'checksum')])
    def test_damage_is_found(self, tmp_path: Path, damage, message: str):
        state.State(tmp_path, FACTS).save()
        path = tmp_path / state.NAME
        path.write_text(damage(path.read_text()))
        with pytest.raises(ConfigError, match=message):
            state.read_state(tmp_path)

    def test_what_cannot_travel_is_named(self, tmp_path: Path):
        assert state.misfits(tmp_path) is None
        with (tmp_path / 'large').open('wb') as file:
            file.truncate((state.MOST_FILE_MIB << 20) + 1)
        assert 'large (15.0 MiB)' in state.misfits(tmp_path)
        (tmp_path / 'large').unlink()
        for number in range(9):
            (tmp_path / str(number)).touch()
        assert '9 files' in state.misfits(tmp_path)


def make_sitting(folder: Path, **shares: float) -> sitting.Sitting:
    work = folder / 'work'
    work.mkdir(exist_ok=True)
    kept = state.State(folder, {**FACTS, 'toy': True})
    return sitting.Sitting(folder, work, kept, sitting.TOY, shares, time.monotonic() + 60, None)


class TestTime:
    def test_parts_leave_what_later_ones_need_and_the_run_bears_delays(self, tmp_path: Path):
        usual = make_sitting(tmp_path, equality=5, run=25, steps=20)
        assert usual.limit('run') == pytest.approx(60 - plan.RESERVE - 20, abs=1)
        assert usual.limit('steps') == pytest.approx(60 - plan.RESERVE, abs=1)
        late = make_sitting(tmp_path, equality=5, run=25, steps=48)
        assert late.limit('equality') == pytest.approx(5, abs=1) and late.limit('run') == pytest.approx(2, abs=1)

    @pytest.mark.skipif(sys.platform != 'linux', reason='reads /proc')
    def test_a_command_that_takes_too_long_is_stopped_with_its_children(self, tmp_path: Path):
        (tmp_path / 'slow_command.py').write_text(
            'import subprocess, time\n'
            'print("child", subprocess.Popen(["sleep", "60"]).pid, flush=True)\n'
            'time.sleep(60)\n')
        job = jobs.Job(['slow_command'], tmp_path / 'log', {'PYTHONPATH': str(tmp_path)})
        while not (said := (tmp_path / 'log').read_text()).endswith('\n'):
            time.sleep(0.05)
        child = Path('/proc', said.split()[1], 'stat')
        assert child.exists() and ') Z ' not in child.read_text()
        assert job.wait(0.1) is None
        time.sleep(0.1)
        assert not child.exists() or ') Z ' in child.read_text()

    def test_how_a_command_ended(self, tmp_path: Path):
        job = jobs.Job(['no_such_module'], tmp_path / 'log')
        status = job.wait(60)
        assert status == 1 and 'No module named no_such_module' in parts.ending(job, status)


class TestRun:
    def test_epochs_fit_the_share(self):
        pace = {'images_per_second': 37_000, 'images_per_epoch': 50_000, 'overhead': 45.0}
        epochs = pretraining.epochs_for(145, pace)
        assert epochs == 70 and 45 + epochs * 50_000 / 37_000 < 145
        assert pretraining.epochs_for(40, pace) == 0

    def test_pace_leaves_out_the_first_epoch(self, tmp_path: Path):
        lines = [{'event': 'start', 'time': 10.0}, {'event': 'evaluation', 'time': 15.0, 'images': 0},
                 {'event': 'step', 'time': 115.0, 'epoch': 1.0, 'images': 50_000, 'images_per_second': 500.0},
                 {'event': 'step', 'time': 116.5, 'epoch': 2.0, 'images': 100_000, 'images_per_second': 37_000.0},
                 {'event': 'finish', 'time': 130.0}]
        (tmp_path / 'log.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines))
        pace = pretraining.pace_of(tmp_path, 140)
        assert (pace['images_per_second'], pace['images_per_epoch']) == (37_000, 50_000)
        assert pace['overhead'] == pytest.approx(140 - 101.5 + pretraining.CACHED_COMPILE)


class TestProfile:
    def test_kinds_and_words(self):
        own = {kind: name for name, kind in profiling.own_kernels().items()}
        kernels = {'nvjet_tst_128x256_64': 5.0, own['attention, backward']: 2.5, own['attention, forward']: 1.0,
                   'triton_poi_fused_gelu_backward_3': 1.0,
                   'triton_per_fused__to_copy_native_layer_norm_2': 0.4, 'void cudnn::nchwToNhwcKernel': 0.1}
        assert profiling.by_kind(kernels) == {
            'products': 5.0, 'attention, backward': 2.5, 'attention, forward': 1.0, 'GELU': 1.0, 'LayerNorm': 0.4,
            'convolution': 0.1}
        said = profiling.words(kernels, 20.0)
        assert said.startswith('Of 20.0 ms the GPU works 10.0, and waits 10.0 ms (50%) for the host.')
        assert 'products 50%, attention, backward 25%' in said
        assert 'waits' not in profiling.words(kernels, 10.1)

    def test_a_worker_times_what_this_device_can(self):
        options = {'embed_dim': 16, 'depth': 1, 'num_heads': 1, 'decoder_depth': 1, 'memory': 'last'}
        worker = Worker('randsac_vit_tiny_patch4_32', 2, torch.device('cpu'), **options)
        row = worker.time('plain')
        assert row['images_per_second'] > 0 and row['profile'].startswith('Of ') and 'products' in row['profile']
        assert worker.time('captured') == {'refused': 'a CUDA graph needs a GPU'}


class TestGoals:
    def content(self, **times: float) -> dict:
        keys = {'n64': ('randsac', 64, 'forward+backward', cards.OURS, 288.0),
                'n65': ('saim', 65, 'forward+backward', cards.OURS, 319.0),
                'n196': ('randsac', 196, 'forward+backward', cards.OURS, 311.0),
                'saim': ('saim', 197, 'forward', cards.OURS, 105.0),
                'cudnn': ('saim', 197, 'forward', 'SDPA cuDNN, causal', 105.0),
                'n1024': ('randsac', 1024, 'forward+backward', cards.OURS, 431.0),
                'flex': ('randsac', 1024, 'forward+backward', 'FlexAttention, compiled, blocks of 128', 431.0)}
        rows = []
        for name, time_us in times.items():
            case, tokens, kind, who, floor = keys[name]
            rows.append({'case': case, 'tokens': tokens, 'head_dim': 64, 'pass': kind, 'name': who, 'layout': 'packed',
                         'median_us': time_us, 'floor_us': floor})
        return {**FACTS, 'parts': {'attention': {'result': {'rows': rows, 'bandwidth_tb_s': 2.5}}}}

    def test_second_sitting(self):
        """The figures of the prototypes, best designs: at 64 the floor is reached, the others are not."""
        judged = {row['goal']: row for row in cards.judge(self.content(
            n64=292, n65=520, n196=586, saim=159, cudnn=146, n1024=1163, flex=1588))}
        met = {goal: row['met'] for goal, row in judged.items()}
        assert met['64 tokens, of the floor'] is True
        assert judged['64 tokens, of the floor']['reached'] == pytest.approx(1.01, abs=0.01)
        assert judged['65 tokens, of 64']['reached'] == pytest.approx(1.78, abs=0.01)
        assert judged['196 tokens, of the floor']['reached'] == pytest.approx(1.88, abs=0.01)
        assert [met[g] for g in met if g.startswith(('65', '196', 'SAIM', '1,024'))] == [False] * 5
        assert met['captured steps equal plain ones to the bit'] is None

    def test_missing_and_suspicious(self):
        assert all(row['met'] is None for row in cards.judge({**FACTS, 'parts': {}}))
        assert 'not measured' in cards.in_words(cards.judge({**FACTS, 'parts': {}}))
        assert '2.5 TB/s' in cards.suspicion(self.content())
        assert cards.suspicion({**FACTS, 'device': 'NVIDIA H200', 'parts': {}}) is None


class TestTests:
    def test_outcomes_come_as_tests_end_and_are_gone_on_with(self, tmp_path: Path):
        (tmp_path / 'test_some.py').write_text(
            'import pathlib, pytest\n'
            'def test_good(): pass\n'
            'def test_bad(): assert pathlib.Path("mended").exists(), "not yet"\n'
            'def test_skipped(): pytest.skip("no")\n')
        path = tmp_path / 'outcomes.jsonl'

        def go() -> str:
            return subprocess.run(
                [sys.executable, '-m', 'pytest', '-p', 'benchmarks.gpu.outcomes', '-p', 'no:cacheprovider', '-p',
                 'no:xdist', '-p', 'no:hypothesispytest', '-q', 'test_some.py'],
                cwd=tmp_path, capture_output=True, text=True,
                env={**os.environ, 'PYTHONPATH': str(ROOT), outcomes.VARIABLE: str(path)}).stdout

        assert '1 failed, 1 passed, 1 skipped' in go()
        found = outcomes.read(path)
        assert {test.partition('test_some.py::test_')[2]: outcome for test, (outcome, *_) in found.items()} == {
            'good': 'passed', 'bad': 'failed', 'skipped': 'skipped'}
        assert 'not yet' in found['test_some.py::test_bad'][2]
        (tmp_path / 'mended').touch()
        assert '1 passed, 2 deselected' in go()
        assert outcomes.read(path)['test_some.py::test_bad'][0] == 'passed'

    def test_what_is_not_installed_is_named(self, tmp_path: Path):
        one, other = tmp_path / 'test_one.py', tmp_path / 'test_other.py'
        one.write_text('import no_such_plugin.part\nfrom tests.support.launching import Launch\nimport torch\n')
        other.write_text('from no_such_plugin import x\nfrom benchmarks.gpu import plan\n')
        assert parts.missing_modules([one, other]) == {'no_such_plugin': ['test_one.py', 'test_other.py']}

    def test_files_that_need_a_gpu_are_marked(self):
        assert 'mark.gpu' in (ROOT / 'tests/behaviour/test_gpu.py').read_text()


def test_equality_on_a_cpu_is_of_plain_steps_alone():
    row = equality.compare('randsac_vit_tiny_patch4_32', 2, torch.device('cpu'), embed_dim=16, depth=1, num_heads=1)
    assert row['plain_again'] == {'losses': 0.0, 'weights': 0.0} and row['last_loss'] < row['first_loss']
    assert row['equal'] is None and 'needs a GPU' in row['refused']
    for rows, met in (([row], None), ([{'equal': True}, {'equal': False}], False), ([{'equal': True}] * 2, True)):
        assert cards.judge({**FACTS, 'parts': {'equality': {'rows': rows}}})[-1]['met'] is met


def test_attention_goes_on_where_it_was_stopped(tmp_path: Path, monkeypatch):
    timed = []
    monkeypatch.setattr(attention_script, 'measured_limits', lambda *args: (1e12, 1e12))
    monkeypatch.setattr(attention_script, 'plot', lambda *args: None)
    monkeypatch.setattr(attention_script, 'benchmark', lambda case, *args: timed.append(case.name) or [
        {'case': case.name, 'tokens': case.limits.shape[1], 'head_dim': 32, 'pass': 'forward', 'name': 'x',
         'layout': 'packed', 'refused': 'not timed'}])
    words = ['attention', '--device', 'cpu', '--dtype', 'float32', '--tokens', '4', '--head-dims', '32', '--batch', '1',
             '--output', str(tmp_path / 'a.json'), '--cases']
    for cases, more, expected in ((['saim'], [], ['saim']), (['saim', 'saim-query'], ['--resume'], ['saim-query']),
                                  (['saim-query', 'saim'], ['--resume'], []), (['saim'], [], ['saim'])):
        timed.clear()
        monkeypatch.setattr(sys, 'argv', [*words, *cases, *more])
        attention_script.main()
        assert timed == expected
    assert len(json.loads((tmp_path / 'a.json').read_text())['rows']) == 1


@pytest.mark.slow
def test_all_parts_at_toy_size(tmp_path: Path):
    """A first call that is killed, and a second that does what it left."""
    for split, count in (('train', 12), ('test', 6)):
        for name in ('cat', 'dog'):
            (tmp_path / 'images' / split / name).mkdir(parents=True)
            for number in range(count):
                Image.new('RGB', (32, 32), (number * 9, 40, 90)).save(tmp_path / f'images/{split}/{name}/{number}.png')
    words = [sys.executable, '-m', 'benchmarks.gpu', '--toy', '--minutes', '20', '--out', str(tmp_path / 'out'),
             '--work-dir', str(tmp_path / 'work'), '--data-dir', str(tmp_path / 'images')]
    first = subprocess.Popen(words, cwd=ROOT)
    while not (tmp_path / 'out' / state.NAME).exists():
        assert first.poll() is None
        time.sleep(0.2)
    first.terminate()
    assert first.wait(120) == 143
    subprocess.run(words, cwd=ROOT)
    content = state.read_state(tmp_path / 'out')
    assert {name for name, part in content['parts'].items() if part['status'] == 'done'} >= {
        'equality', 'tests', 'attention', 'steps', 'run'}
    assert state.misfits(tmp_path / 'out') is None
