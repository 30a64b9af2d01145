"""What only a GPU shows: captured steps and runs, processes that share one, batch norm over them."""

import functools
import os
import signal
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

pytest.importorskip('sklearn')
pytest.importorskip('matplotlib')

from safetensors.torch import load_file

from autoreg_vit.engine import processes, trainer
from benchmarks.gpu.equality import MODELS, compare, trained
from tests.support.launching import SETTINGS, Launch, free_port, launch_together, log_of, weights_of

pytestmark = pytest.mark.gpu
# Plain SGD, since Adam would magnify rounding; no drop path, which each process draws for its own images.
PLAIN = {**SETTINGS, 'opt': 'sgd', 'lr': 0.1, 'warmup_epochs': 0, 'drop_path_rate': 0.0, 'eval_every': 0,
         'epochs': 1, 'checkpoint_every_steps': 0, 'batch_size': 48, 'device': 'cuda', 'workers': 0}
GRAPH = {**SETTINGS, 'device': 'cuda', 'workers': 0, 'cuda_graph': True, 'cache_on_device': True}


def exactly() -> None:
    """Convolutions in float32 proper, whose rounding does not depend on the batch."""
    torch.backends.cudnn.allow_tf32 = False


def share_a_gpu_by_gloo() -> None:
    """Have a process of a launch take the first GPU and talk by gloo, since NCCL wants a GPU for each."""
    exactly()
    os.environ['LOCAL_RANK'] = '0'
    init = dist.init_process_group
    dist.init_process_group = lambda backend, device_id=None, **options: init('gloo', **options)


def run(folder: Path, launches: list[Launch]) -> Path:
    for launch in launches:
        assert launch.wait() == 0, launch.text()
    return folder


@pytest.fixture(scope='module')
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp('alone') / 'run'
    return run(folder, [Launch({**PLAIN, 'output_dir': str(folder)}, exactly)])


def assert_near(one: Path, other: Path) -> None:
    a, b = (load_file(folder / 'pretrain' / 'model.safetensors') for folder in (one, other))
    for name, weight in a.items():
        torch.testing.assert_close(b[name], weight, atol=2e-5, rtol=1e-4, msg=lambda m, name=name: f'{name}: {m}')


def test_two_processes_on_one_gpu_equal_one(alone: Path, tmp_path: Path):
    settings = {**PLAIN, 'output_dir': str(tmp_path / 'run')}
    both = run(tmp_path / 'run', launch_together(settings, 2, share_a_gpu_by_gloo))
    assert log_of(both)[0]['processes'] == 2 and log_of(both)[0]['device'].startswith('cuda')
    assert_near(alone, both)


def test_one_process_by_nccl_equals_one_without(alone: Path, tmp_path: Path):
    settings = {**PLAIN, 'output_dir': str(tmp_path / 'run')}
    single = run(tmp_path / 'run', launch_together(settings, 1, exactly))
    assert_near(alone, single)


@pytest.mark.parametrize('model_name', MODELS)
def test_captured_steps_equal_plain_ones_to_the_bit(model_name: str):
    row = compare(model_name, 16, torch.device('cuda'), depth=2)
    assert row['last_loss'] < row['first_loss']
    assert not any(row['plain_again'].values()) and row['equal'] is True


@pytest.mark.parametrize('model_name', MODELS)
def test_compiled_and_captured_steps_equal_plain_ones_but_for_rounding(model_name: str):
    plain, fast = (trained(model_name, 16, torch.device('cuda'), depth=2, **kind)
                   for kind in ({}, {'graphed': True, 'compiled': True}))
    torch.testing.assert_close(fast[0], plain[0], atol=2e-4, rtol=0)


def test_a_captured_step_of_several_batches_equals_a_plain_one_to_the_bit():
    captured, plain = (trained(MODELS[0], 16, torch.device('cuda'), depth=2, accumulate=3, **kind)
                       for kind in ({'graphed': True}, {'capturable': True}))
    assert all(map(torch.equal, captured, plain))


def test_a_captured_run_that_was_stopped_ends_in_the_same_weights(tmp_path: Path):
    straight = run(tmp_path / 'straight', [Launch({**GRAPH, 'output_dir': str(tmp_path / 'straight')})])
    stopped = Launch({**GRAPH, 'output_dir': str(tmp_path / 'stopped')}, stop_after_ten_steps)
    assert stopped.wait() == 143, stopped.text()
    resumed = run(tmp_path / 'stopped', [Launch({**GRAPH, 'output_dir': str(tmp_path / 'stopped')})])
    assert weights_of(resumed) == weights_of(straight)


def test_captured_steps_of_two_processes_equal_plain_ones(tmp_path: Path):
    """A sum over processes stands between two graphs."""
    plain, captured = (run(tmp_path / str(graph), launch_together(
        {**PLAIN, 'opt': 'adamw', 'lr': 0.01, 'compile': False, 'cuda_graph': graph, 'train_images': 720,
         'output_dir': str(tmp_path / str(graph))}, 2, share_a_gpu_calmly)) for graph in (False, True))
    assert [log_of(folder)[0]['choices']['cuda_graph'] for folder in (plain, captured)] == [False, True]
    assert_near(plain, captured)


def share_a_gpu_calmly() -> None:
    """By an AdamW whose epsilon outweighs the gradients, so that it does not magnify rounding."""
    share_a_gpu_by_gloo()
    create = trainer.create_optimizer
    trainer.create_optimizer = lambda config, optimized, capturable, **options: create(
        config, optimized, capturable=True, eps=0.1, **options)


def test_steps_are_captured_while_a_loader_pins_memory(tmp_path: Path):
    """In a thread of its own, whose calls a capture must neither suffer from nor spoil."""
    files = {**GRAPH, 'cache_on_device': False, 'epochs': 1, 'compile': False}
    without, beside = (run(tmp_path / str(workers), [Launch(
        {**files, 'workers': workers, 'output_dir': str(tmp_path / str(workers))})]) for workers in (0, 2))
    assert weights_of(beside) == weights_of(without)
    assert not [line for line in log_of(beside) if line['event'] == 'choices']


def stop_after_ten_steps() -> None:
    """Send SIGTERM to this process at its tenth step."""
    exchange, calls = processes.Flags.exchange, iter(range(10 ** 9))

    def count(self, *flags):
        if next(calls) == 10:
            os.kill(os.getpid(), signal.SIGTERM)
        return exchange(self, *flags)

    processes.Flags.exchange = count


def normalise(rank: int, port: int, folder: str, device: str) -> None:
    """A step of synchronised batch norm over two processes; each leaves its part."""
    dist.init_process_group('gloo', init_method=f'tcp://127.0.0.1:{port}', rank=rank, world_size=2)
    norm = nn.SyncBatchNorm.convert_sync_batchnorm(batch_norm()).to(device)
    part = images().to(device).chunk(2)[rank].requires_grad_()
    out = norm(part)
    (out * weights().to(device).chunk(2)[rank]).sum().backward()
    for parameter in norm.parameters():
        dist.all_reduce(parameter.grad)
    torch.save([x.detach().cpu() for x in (out, part.grad, norm.running_mean, norm.running_var, norm.weight.grad,
                                           norm.bias.grad)], Path(folder) / f'{rank}.pt')
    dist.destroy_process_group()


@functools.cache
def images() -> torch.Tensor:
    return 3 + 2 * torch.randn(6, 4, 5, 5, generator=torch.Generator().manual_seed(0))


@functools.cache
def weights() -> torch.Tensor:
    return torch.randn(6, 4, 5, 5, generator=torch.Generator().manual_seed(1))


def batch_norm() -> nn.Module:
    norm = nn.BatchNorm2d(4)
    nn.init.uniform_(norm.weight, 0.5, 1.5, generator=torch.Generator().manual_seed(2))
    return norm


def test_batch_norm_over_two_processes_equals_one_batch(tmp_path: Path):
    torch.multiprocessing.spawn(normalise, (free_port(), str(tmp_path), 'cuda'), nprocs=2)
    norm, whole = batch_norm(), images().clone().requires_grad_()
    out = norm(whole)
    (out * weights()).sum().backward()
    parts = [torch.load(tmp_path / f'{rank}.pt') for rank in range(2)]
    for index, want in enumerate((out, whole.grad)):
        torch.testing.assert_close(torch.cat([part[index] for part in parts]), want, atol=1e-5, rtol=1e-5)
    expected = norm.running_mean, norm.running_var, norm.weight.grad, norm.bias.grad
    for part in parts:
        for got, want in zip(part[2:], expected):
            torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-5)
