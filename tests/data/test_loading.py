"""Loader processes: they end with what they load for, and with too little shared memory fewer of them go on, and no
batch is lost or doubled."""

import multiprocessing
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.data import TensorDataset

pytest.importorskip('sklearn')

from autoreg_vit.commands import PretrainConfig, pretrain
from autoreg_vit.data.batches import Batches
from autoreg_vit.data.loaders import InOrder, all_or_none, fitting, lacks_shared_memory
from autoreg_vit.engine.processes import Processes
from autoreg_vit.errors import DataError
from tests.support.launching import SETTINGS

FULL = RuntimeError('unable to allocate shared memory(shm) for file </torch_1_2_3>: No space left on device (28)')
DATA = TensorDataset(torch.arange(40), torch.zeros(40))
ONE = Processes(torch.device('cpu'))


@pytest.mark.parametrize('fits', [0, 1, 2, 4])
def test_half_as_many_go_on_where_the_others_stopped(fits: int, capsys):
    tried = []

    def load(first: int, workers: int):
        tried.append(workers)
        for number in range(first, 10):
            if workers > fits and number == 3 + len(tried):
                raise FULL
            yield number

    assert list(fitting(load, 4)) == list(range(10))
    assert tried == [n for n in (4, 2, 1, 0) if n >= fits]
    assert capsys.readouterr().out.count('--shm-size') == len(tried) - 1


def test_other_errors_are_not_taken_for_it():
    def load(first: int, workers: int):
        raise OSError(28, 'No space left on device', 'images/a.png')

    with pytest.raises(OSError, match=r'images/a\.png'):
        list(fitting(load, 2))
    assert lacks_shared_memory(RuntimeError('DataLoader worker (pid 7) is killed by signal: Bus error. It is possible '
                                            "that dataloader's workers are out of shared memory."))
    assert not lacks_shared_memory(RuntimeError('CUDA out of memory'))


def test_streams_say_it():
    class Loader:
        num_workers = 2

        def __iter__(self):
            raise FULL
            yield

    with pytest.raises(DataError, match=r'too small for 2 loader processes.*--shm-size.*--workers'):
        list(all_or_none(Loader()))


def test_in_order():
    batches = InOrder(DATA, 16, 0)
    assert len(batches) == 3 and torch.cat([images for images, _ in batches]).tolist() == list(range(40))


def test_loader_processes_end_with_the_batches():
    before = set(multiprocessing.active_children())
    batches = Batches(DATA, 16, 0, ONE, workers=1)
    for _ in range(2):
        given = batches.start_at(3)
        first = next(given)[0].tolist()
        assert len(set(multiprocessing.active_children()) - before) == 1
        given.close()
        assert not set(multiprocessing.active_children()) - before
    assert first == next(Batches(DATA, 16, 0, ONE).start_at(3))[0].tolist()


@pytest.mark.usefixtures('no_figures')
def test_loader_processes_end_with_training(tmp_path: Path):
    before = set(multiprocessing.active_children())
    pretrain(PretrainConfig(**{**SETTINGS, 'dataset': 'digits', 'train_images': 32, 'epochs': 1, 'workers': 1,
                               'output_dir': str(tmp_path / 'run')}))
    assert not set(multiprocessing.active_children()) - before


SCRIPT = '''
import torch
from torch.utils.data import TensorDataset
from autoreg_vit.data.batches import Batches
from autoreg_vit.engine.processes import Processes
from autoreg_vit.data.loaders import InOrder
from torch.utils.data import _utils, dataloader
_utils.MP_STATUS_CHECK_INTERVAL = 0.2  # seconds, instead of five, until it looks for processes that died
dataloader._MultiProcessingDataLoaderIter._try_get_data.__defaults__ = (0.2,)
data = TensorDataset(torch.arange(64.0)[:, None].expand(64, 4096).clone(), torch.zeros(64))
stream = Batches(data, 16, 0, Processes(torch.device("cpu")), workers=2).start_at(0)
print("training", [int(x) for _ in range(5) for x in next(stream)[0][:, 0]])
print("evaluation", [int(x) for images, _ in InOrder(data, 16, 2) for x in images[:, 0]])
'''


@pytest.mark.skipif(not shutil.which('unshare') or subprocess.run(
    ['unshare', '-rm', 'sh', '-c', 'mount -t tmpfs -o size=200k tmpfs /dev/shm'], capture_output=True).returncode != 0,
    reason='needs a mount of its own, which is not allowed here')
def test_a_small_shared_memory():
    done = subprocess.run(
        ['unshare', '-rm', 'sh', '-c',
         f"mount -t tmpfs -o size=200k tmpfs /dev/shm && exec {sys.executable} -c '{SCRIPT}'"],
        capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    lines = dict(line.split(' ', 1) for line in done.stdout.splitlines() if line[0] in 'te')
    straight = Batches(TensorDataset(torch.arange(64), torch.zeros(64)), 16, 0, ONE).start_at(0)
    assert lines['training'] == str([int(x) for _ in range(5) for x in next(straight)[0]])
    assert lines['evaluation'] == str(list(range(64)))
    assert 'too small for 2 loader processes' in done.stdout
