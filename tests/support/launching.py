"""Training runs in processes of their own, cheap enough to kill: forked from a server that imported PyTorch once."""

import json
import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing import forkserver
from pathlib import Path
from unittest import mock

import torch

# The parts of a run that it would otherwise import in every process.
from autoreg_vit.commands import pretraining as pretraining
from autoreg_vit.commands.cli import main
from autoreg_vit.commands.recipes import load_recipe

ROOT = Path(__file__).parents[2]

# Some digits with a model that takes a millisecond a step: 30 steps, three evaluations.
SETTINGS = {**load_recipe('digits'), 'embed_dim': 16, 'depth': 2, 'num_heads': 1, 'decoder_depth': 1, 'epochs': 2,
            'batch_size': 16, 'train_images': 240, 'eval_images': 60, 'eval_every': 1, 'log_every': 4,
            'checkpoint_every_steps': 5, 'drop_path_rate': 0.1, 'precision': 'float32'}


def server() -> multiprocessing.context.BaseContext:
    """Starts processes that have imported PyTorch and the commands."""
    os.environ['PYTHONPATH'] = os.pathsep.join([str(ROOT), os.environ.get('PYTHONPATH', '')])
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload(['tests.support.server'])
    with mock.patch.dict(os.environ):
        os.environ.pop('TRITON_INTERPRET', None)  # Triton decides when it is imported; commands run without it
        forkserver.ensure_running()
    return context


def _child(arguments: list[str], environment: dict[str, str], output: str, sabotage: Callable[[], None] | None) -> None:
    os.environ.update(environment)
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    multiprocessing.set_start_method('fork', force=True)  # of loader processes, as in a run of its own
    torch.set_num_threads(1)
    pretraining.draw_figures = lambda *args: None  # half of a short run's time, and tested with whole runs
    if sabotage is not None:
        sabotage()
    sys.exit(main(arguments))


def run_python(*words: str) -> subprocess.CompletedProcess:
    """What `python *words` would print and end with."""
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / name for name in ('out', 'err')]
        process = server().Process(target=python, args=(words, files))
        process.start()
        process.join(300)
        return subprocess.CompletedProcess(words, process.exitcode, *(file.read_text() for file in files))


def python(words: tuple[str, ...], files: list[Path]) -> None:
    """What `python *words` does, writing to two files; called in a process of the server."""
    for file, descriptor in zip(files, (1, 2)):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), descriptor)
    if words[0] == '-c':
        sys.argv = ['-c', *words[2:]]
        exec(words[1], {'__name__': '__main__'})
    elif words[0] == '-m':
        sys.argv = [*words[1:]]
        runpy.run_module(words[1], run_name='__main__', alter_sys=True)
    else:
        sys.argv = [*words]
        runpy.run_path(words[0], run_name='__main__')


class Launch:
    """`autoreg-vit pretrain` with settings as flags, running.

    Args:
        settings: Of the run; `output_dir` names its folder.
        sabotage: Called in the process before the run.
        environment: Variables to set there.
    """

    def __init__(self, settings: dict, sabotage: Callable[[], None] | None = None, **environment: str):
        folder = Path(settings['output_dir'])
        self.output = folder.with_name(f'{folder.name}.out{environment.get("RANK", "")}')
        self.process = server().Process(
            target=_child, args=(flags(settings), environment, str(self.output), sabotage))
        self.process.start()

    def wait(self, timeout: float = 120) -> int:
        """The exit status; minus the signal that killed it."""
        self.process.join(timeout)
        assert self.process.exitcode is not None, f'still running: {self.text()}'
        return self.process.exitcode

    def kill(self) -> None:
        """SIGKILL, and wait until it is gone; its loader processes may still be there."""
        assert self.process.exitcode is None, f'finished before it could be killed: {self.text()}'
        self.process.kill()
        while True:
            try:
                os.kill(self.process.pid, 0)
            except ProcessLookupError:
                return
            time.sleep(0.01)

    def text(self) -> str:
        """What it and the launches into this folder before it have printed."""
        return self.output.read_text() if self.output.exists() else ''


def free_port() -> int:
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        return free.getsockname()[1]


def launch_together(settings: dict, count: int, sabotage: Callable[[], None] | None = None) -> list[Launch]:
    """As torchrun would start `count` processes on this machine; `sabotage` is called in each before the run."""
    port = free_port()
    return [Launch(settings, sabotage, MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port), WORLD_SIZE=str(count),
                   RANK=str(rank), LOCAL_RANK=str(rank)) for rank in range(count)]


def flags(settings: dict) -> list[str]:
    """The command line with these settings, of `pretrain` unless they name another `command`, and on the digits unless
    they say None or name another `dataset`."""
    arguments = [settings.get('command', 'pretrain')]
    for name, value in {'dataset': 'digits', **settings}.items():
        flag = '--' + name.replace('_', '-')
        if isinstance(value, bool):
            arguments.append(flag if value else flag.replace('--', '--no-', 1))
        elif name != 'command' and value is not None:
            arguments += [flag, *map(str, value if isinstance(value, (list, tuple)) else [value])]
    return arguments


def weights_of(folder: Path) -> bytes:
    return (Path(folder) / 'pretrain' / 'model.safetensors').read_bytes()


def log_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (Path(folder) / 'log.jsonl').read_text().splitlines()]
