"""What started the processes of a run, as the environment tells it: torchrun, SLURM's srun, or nobody."""

import os
import re
from typing import NamedTuple

from ..errors import ConfigError

#: What torchrun sets for each process, besides LOCAL_RANK and others that a run does without.
TORCHRUN = ('RANK', 'WORLD_SIZE', 'MASTER_ADDR', 'MASTER_PORT')
#: Ports from here on are tried first by nobody else; a job's number chooses among them.
FIRST_PORT, PORTS = 20_000, 12_000


class Place(NamedTuple):
    """A process among those that were started together."""
    rank: int
    world_size: int
    local_rank: int
    #: HOST:PORT where all of them meet, or None where PyTorch finds it in torchrun's variables.
    address: str | None = None


def find_place() -> Place | None:
    """The place of this process, or None where it trains alone.

    Raises:
        ConfigError: for variables that are incomplete or no numbers, and for launchers that say too little to meet.
    """
    given = {name: os.environ.get(name, '').strip() for name in TORCHRUN}
    if all(given.values()):
        rank, world_size = _number('RANK'), _number('WORLD_SIZE')
        if rank >= world_size:
            raise ConfigError(f'RANK={rank} with WORLD_SIZE={world_size}: expected a rank below {world_size}. '
                              f'{_REMEDY}')
        _number('MASTER_PORT')
        return Place(rank, world_size, _number('LOCAL_RANK', '0'))
    if given['RANK'] not in ('', '0') or given['WORLD_SIZE'] not in ('', '1'):
        said = ', '.join(f'{name}={given[name]}' for name in ('RANK', 'WORLD_SIZE') if given[name])
        missing = ', '.join(name for name in TORCHRUN if not given[name])
        raise ConfigError(f'{said} in the environment asks for several processes, but {missing} is not set, as '
                          f'torchrun would. {_REMEDY}')
    if _slurm_tasks() > 1:
        return _of_slurm()
    for name in ('OMPI_COMM_WORLD_SIZE', 'PMI_SIZE', 'MV2_COMM_WORLD_SIZE'):
        count = os.environ.get(name, '')
        if count.isdecimal() and int(count) > 1:
            raise ConfigError(f'mpirun started {count} processes ({name}={count}), each of which would train the whole '
                              f'run: use torchrun --nproc-per-node {count} -m autoreg_vit in place of mpirun.')
    return None


def shown_rank() -> int:
    """The rank by which to name this process before its place is known to be right; never raises."""
    names = ('RANK',) if os.environ.get('RANK', '').strip() else ('SLURM_PROCID',) if _slurm_tasks() > 1 else ()
    return next((int(os.environ[name]) for name in names if os.environ.get(name, '').strip().isdecimal()), 0)


_REMEDY = ('Start with torchrun (torchrun --nproc-per-node N -m autoreg_vit ...), or train in one process: '
           'unset RANK WORLD_SIZE.')


def _number(name: str, default: str = '') -> int:
    text = os.environ.get(name, '').strip() or default
    if not text.isdecimal():
        raise ConfigError(f'{name}={text!r} in the environment is no whole number. {_REMEDY}')
    return int(text)


def _slurm_tasks() -> int:
    """Tasks that srun started together; 1 in a batch script itself, and in a shell that `srun --pty` opened."""
    text = os.environ.get('SLURM_STEP_NUM_TASKS', '')
    return int(text) if text.isdecimal() and 'SLURM_PTY_PORT' not in os.environ else 1


def _of_slurm() -> Place:
    nodes = os.environ.get('SLURM_STEP_NODELIST') or os.environ.get('SLURM_NODELIST', '')
    host = os.environ.get('MASTER_ADDR') or first_host(nodes)
    if not host:
        raise ConfigError(f'srun started {_slurm_tasks()} tasks, but SLURM_NODELIST={nodes!r} names no host to meet '
                          'on: set MASTER_ADDR to that of the first task, or start with torchrun.')
    job = int(re.sub(r'\D', '', os.environ.get('SLURM_JOB_ID', '')) or 0)
    step = int(re.sub(r'\D', '', os.environ.get('SLURM_STEP_ID', '')) or 0)
    port = os.environ.get('MASTER_PORT') or FIRST_PORT + (job + 7 * step) % PORTS
    return Place(_number('SLURM_PROCID'), _slurm_tasks(), _number('SLURM_LOCALID', '0'), f'{host}:{port}')


def first_host(nodes: str) -> str:
    """The first host of a list as SLURM writes it: gpu07 of 'gpu[07-09,12],login1'."""
    found = re.match(r'([^,\[\]]+)(?:\[(\w+)[^]]*\]([^,\[]*))?', nodes)
    return ''.join(part or '' for part in found.groups()) if found else ''
