"""Several processes, accumulation and sharding change nothing but rounding."""

import contextlib
import os
import signal
import time
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from unittest import mock

import pytest
import torch

from autoreg_vit.data.order import EpochSampler

pytest.importorskip('sklearn')

from safetensors.torch import load_file

from autoreg_vit.commands.pretraining import pretrain
from autoreg_vit.engine import processes as distributed
from autoreg_vit.engine import trainer
from autoreg_vit.engine.choices import Choices
from autoreg_vit.engine.graph import GraphedStep
from autoreg_vit.engine.log import read_log
from autoreg_vit.errors import ConfigError
from autoreg_vit.settings.pretraining import PretrainConfig
from tests.support.launching import SETTINGS, Launch, launch_together, log_of, weights_of
from tests.support.supervising import write_encoder

# Plain SGD, since Adam would magnify rounding; no drop path, which each process draws for its own images.
PLAIN = {**SETTINGS, 'opt': 'sgd', 'lr': 0.1, 'warmup_epochs': 0, 'drop_path_rate': 0.0, 'eval_every': 0,
         'epochs': 1, 'checkpoint_every_steps': 0, 'batch_size': 48, 'train_images': 720}


def run(settings: dict, folder: Path, count: int = 1, sabotage: Callable[[], None] | None = None) -> Path:
    settings = {**settings, 'output_dir': str(folder)}
    launches = launch_together(settings, count, sabotage) if count > 1 else [Launch(settings)]
    for launch in launches:
        assert launch.wait() == 0, launch.text()
    return folder


def assert_same_but_for_rounding(one: Path, other: Path, start: Path) -> None:
    """Every weight within 1e-5, where training moved them by a thousand times that."""
    before, a, b = (load_file(folder / 'pretrain' / 'model.safetensors') for folder in (start, one, other))
    assert max((a[name] - before[name]).abs().max() for name in a) > 1e-2
    for name, weight in a.items():
        torch.testing.assert_close(b[name], weight, atol=1e-5, rtol=1e-4, msg=lambda m, name=name: f'{name}: {m}')


@pytest.fixture(scope='module')
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(PLAIN, tmp_path_factory.mktemp('alone') / 'run')


@pytest.fixture(scope='module')
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run({**PLAIN, 'lr': 0.0, 'train_images': 48}, tmp_path_factory.mktemp('start') / 'run')


@pytest.mark.parametrize('count', [2, 3])
def test_processes_equal_one(count: int, alone: Path, start: Path, tmp_path: Path):
    both = run(PLAIN, tmp_path / 'run', count)
    assert_same_but_for_rounding(alone, both, start)
    losses = [[line['loss'] for line in log_of(folder) if line['event'] == 'step'] for folder in (alone, both)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert log_of(both)[0]['processes'] == count
    assert 'Warning' not in (tmp_path / 'run.out0').read_text()
    # Not yet finished, it can be resumed by as many processes alone.
    lines = (both / 'log.jsonl').read_text().splitlines(keepends=True)
    (both / 'log.jsonl').write_text(''.join(lines[:-1]))
    with pytest.raises(ConfigError, match=f'processes: was {count}, is 1'):
        pretrain(PretrainConfig(**{**PLAIN, 'output_dir': str(both)}))


def test_processes_that_average_gradients_between_graphs_equal_one(start: Path, tmp_path: Path):
    """On a CPU, where nothing is captured: the steps around the graphs are the real ones. Gradients are averaged before
    they are clipped."""
    clipped = {**PLAIN, 'clip_grad': 0.5}
    alone = run(clipped, tmp_path / 'alone')
    both = run({**clipped, 'batch_size': 24, 'accumulate': 2}, tmp_path / 'both', 2, as_if_captured)
    assert log_of(both)[0]['choices']['cuda_graph']
    assert_same_but_for_rounding(alone, both, start)


def as_if_captured() -> None:
    """Have this process choose a graph on a CPU, which never captures it, for any optimizer."""
    create = trainer.create_optimizer
    trainer.create_optimizer = lambda config, optimized, capturable, **options: create(config, optimized, **options)
    trainer.choose = lambda *arguments: Choices(cuda_graph=True)
    trainer.cannot_capture = lambda *arguments: ''
    GraphedStep.warm_up = 10 ** 9
    torch.cuda.Stream = torch.cuda.current_stream = mock.Mock()
    torch.cuda.stream = lambda stream: contextlib.nullcontext()


def test_accumulation_equals_a_larger_batch(alone: Path, start: Path, tmp_path: Path):
    parts = run({**PLAIN, 'batch_size': 12, 'accumulate': 4}, tmp_path / 'parts')
    assert_same_but_for_rounding(alone, parts, start)


def test_two_processes_accumulate(alone: Path, start: Path, tmp_path: Path):
    parts = run({**PLAIN, 'batch_size': 24, 'accumulate': 2}, tmp_path / 'parts', count=2)
    assert_same_but_for_rounding(alone, parts, start)


def test_sharded_processes_equal_one(alone: Path, start: Path, tmp_path: Path):
    sharded = run({**PLAIN, 'fsdp': True}, tmp_path / 'run', count=2)
    assert_same_but_for_rounding(alone, sharded, start)
    assert 'Warning' not in (tmp_path / 'run.out0').read_text()


@pytest.mark.parametrize('fsdp', [False, True])
def test_sigterm_to_one_process_stops_all_and_resumes(fsdp: bool, tmp_path: Path):
    settings = {**SETTINGS, 'epochs': 1, 'eval_every': 0, 'checkpoint_every_steps': 0, 'log_every': 2, 'fsdp': fsdp,
                'train_images': 360}
    straight = run(settings, tmp_path / 'straight', count=2)
    settings['output_dir'] = str(tmp_path / 'stopped')
    launches = launch_together(settings, 2)
    while not any(line['event'] == 'step' for line in read_log(tmp_path / 'stopped' / 'log.jsonl')):
        time.sleep(0.01)
        assert launches[0].process.exitcode is None, launches[0].text()
    os.kill(launches[1].process.pid, signal.SIGTERM)
    assert [launch.wait() for launch in launches] == [128 + signal.SIGTERM] * 2, launches[0].text()
    stopped = run(settings, tmp_path / 'stopped', count=2)
    assert weights_of(stopped) == weights_of(straight)


@pytest.fixture(scope='module')
def finetuning(tmp_path_factory: pytest.TempPathFactory) -> dict:
    torch.manual_seed(0)
    encoder = write_encoder(tmp_path_factory.mktemp('weights') / 'encoder')
    return {'command': 'finetune', 'weights': str(encoder), 'eval_split': 'test', 'epochs': 1, 'batch_size': 48,
            'train_images': 384, 'test_images': 60, 'opt': 'sgd', 'lr': 1.0, 'warmup_epochs': 0, 'layer_decay': 1.0,
            'drop_path_rate': 0.0, 'mixup': 0.0, 'cutmix': 0.0, 'auto_augment': 'none', 'precision': 'float32'}


@pytest.fixture(scope='module')
def finetuned_alone(finetuning: dict, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    return classifier_of(run(finetuning, tmp_path_factory.mktemp('alone') / 'run'))


@pytest.mark.parametrize('count, more', [
    (2, {}), (2, {'fsdp': True}), pytest.param(1, {'compile': True}, marks=pytest.mark.slow)],
    ids=['two processes', 'sharded', 'compiled'])
def test_finetuning_is_the_same_but_for_rounding(
        count: int, more: dict, finetuning: dict, finetuned_alone: dict, tmp_path: Path):
    weights = classifier_of(run({**finetuning, **more}, tmp_path / 'run', count))
    before = load_file(Path(finetuning['weights']) / 'model.safetensors')
    assert max((finetuned_alone[name] - before[name]).abs().max() for name in before) > 1e-2
    assert weights.keys() == finetuned_alone.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(
            weight, finetuned_alone[name], atol=1e-5, rtol=1e-4, msg=lambda m, name=name: f'{name}: {m}')


def classifier_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / 'model' / 'model.safetensors')


@pytest.mark.slow
def test_compiled_steps_equal_eager_ones(alone: Path, start: Path, tmp_path: Path):
    assert_same_but_for_rounding(alone, run({**PLAIN, 'compile': True}, tmp_path / 'run'), start)


class TestErrors:
    def test_batch_that_cannot_be_shared(self, tmp_path: Path):
        launches = launch_together({**PLAIN, 'batch_size': 63, 'output_dir': str(tmp_path / 'run')}, 2)
        assert [launch.wait() for launch in launches] == [2, 2]
        assert 'A batch of 63 images cannot be shared out evenly to 2 processes' in launches[0].text()
        assert not (tmp_path / 'run').exists()

    def test_main_process_speaks_for_all(self, tmp_path: Path):
        (tmp_path / 'run').touch()
        launches = launch_together({**PLAIN, 'output_dir': str(tmp_path / 'run')}, 2)
        assert [launch.wait() for launch in launches] == [2, 2]
        assert 'is a file' in launches[0].text() and 'is a file' not in launches[1].text()

    def test_fsdp_without_torchrun(self, tmp_path: Path):
        with pytest.raises(ConfigError, match='torchrun'):
            pretrain(PretrainConfig(**{**PLAIN, 'fsdp': True, 'output_dir': str(tmp_path / 'run')}))


class TestSampler:
    def sampler(self, rank: int = 0, world_size: int = 1, **options) -> EpochSampler:
        group = distributed.Processes(torch.device('cpu'), rank, world_size)
        return EpochSampler(100, 12, seed=3, group=group, **options)

    def test_processes_share_out_what_one_would_see(self):
        one = list(self.sampler())
        parts = [list(self.sampler(rank, 3)) for rank in range(3)]
        assert [[*chain(*batches)] for batches in zip(*parts)] == one and len(one) == 8

    def test_every_image_once_in_another_order_each_epoch(self):
        sampler = self.sampler(batches=8)
        first = list(chain(*sampler))
        sampler.start_at(1)
        second = list(chain(*sampler))
        assert len({index for _, index in first}) == 96
        assert {epoch for epoch, _ in second} == {1} and [i for _, i in first] != [i for _, i in second]

    def test_offset(self):
        whole, sampler = list(self.sampler()), self.sampler()
        sampler.start_at(0, 5)
        assert list(sampler) == whole[5:] and len(sampler) == 3
