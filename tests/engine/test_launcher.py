"""What the environment says of other processes: joined, refused by name, or nobody there."""

import pytest

from autoreg_vit.engine.launcher import FIRST_PORT, Place, find_place, first_host, shown_rank
from autoreg_vit.errors import ConfigError

NAMES = ('RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'MASTER_ADDR', 'MASTER_PORT', 'SLURM_PROCID', 'SLURM_STEP_NUM_TASKS',
         'SLURM_LOCALID', 'SLURM_NODELIST', 'SLURM_STEP_NODELIST', 'SLURM_JOB_ID', 'SLURM_STEP_ID', 'SLURM_PTY_PORT',
         'OMPI_COMM_WORLD_SIZE', 'PMI_SIZE', 'MV2_COMM_WORLD_SIZE')
TORCHRUN = dict(RANK='1', WORLD_SIZE='4', LOCAL_RANK='1', MASTER_ADDR='host', MASTER_PORT='29500')
SLURM = dict(SLURM_PROCID='5', SLURM_STEP_NUM_TASKS='8', SLURM_LOCALID='1', SLURM_NODELIST='gpu[07-08]',
             SLURM_JOB_ID='123', SLURM_STEP_ID='0')


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch):
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)

    def be(**variables: str) -> None:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return be


def test_torchrun(environment):
    environment(**TORCHRUN)
    assert find_place() == Place(1, 4, 1) and shown_rank() == 1


@pytest.mark.parametrize('left_over', [
    {}, {'RANK': '0'}, {'WORLD_SIZE': '1'}, {'WORLD_SIZE': ''}, {'RANK': '0', 'WORLD_SIZE': '1'},
    {'MASTER_ADDR': 'host', 'MASTER_PORT': '1'}, {'RANK': ' ', 'LOCAL_RANK': '0'},
    {'SLURM_PROCID': '0', 'SLURM_NTASKS': '2'},  # a batch script, which srun did not start
    {'SLURM_PROCID': '0', 'SLURM_STEP_NUM_TASKS': '1'}, {**SLURM, 'SLURM_PTY_PORT': '4711'},
    {'OMPI_COMM_WORLD_SIZE': '1'},
])
def test_one_process_trains_alone(environment, left_over):
    environment(**left_over)
    assert find_place() is None and shown_rank() == 0


@pytest.mark.parametrize('wrong, says', [
    ({'RANK': '1'}, ['RANK=1', 'WORLD_SIZE, MASTER_ADDR, MASTER_PORT is not set', 'unset RANK']),
    ({'WORLD_SIZE': '4'}, ['WORLD_SIZE=4', 'RANK', 'torchrun']),
    ({**TORCHRUN, 'MASTER_ADDR': ''}, ['MASTER_ADDR is not set']),
    ({**TORCHRUN, 'RANK': 'x'}, ["RANK='x'", 'no whole number']),
    ({**TORCHRUN, 'WORLD_SIZE': '-2'}, ["WORLD_SIZE='-2'"]),
    ({**TORCHRUN, 'MASTER_PORT': 'http'}, ["MASTER_PORT='http'"]),
    ({**TORCHRUN, 'LOCAL_RANK': '1.5'}, ["LOCAL_RANK='1.5'"]),
    ({**TORCHRUN, 'RANK': '4'}, ['RANK=4', 'below 4']),
    ({**SLURM, 'SLURM_NODELIST': ''}, ['srun started 8 tasks', 'MASTER_ADDR']),
    ({**SLURM, 'SLURM_PROCID': 'first'}, ["SLURM_PROCID='first'"]),
    ({'OMPI_COMM_WORLD_SIZE': '2'}, ['mpirun started 2 processes', 'torchrun --nproc-per-node 2']),
    ({'PMI_SIZE': '3'}, ['PMI_SIZE=3']),
])
def test_what_cannot_be_joined_is_one_line(environment, wrong, says):
    environment(**wrong)
    with pytest.raises(ConfigError) as caught:
        find_place()
    assert all(part in str(caught.value) for part in says), caught.value
    assert shown_rank() >= 0


def test_slurm(environment):
    environment(**SLURM)
    assert find_place() == Place(5, 8, 1, f'gpu07:{FIRST_PORT + 123}') and shown_rank() == 5
    environment(SLURM_STEP_ID='1')  # another step of the same job meets elsewhere
    assert find_place().address != f'gpu07:{FIRST_PORT + 123}'
    environment(MASTER_ADDR='10.0.0.1', MASTER_PORT='4000')
    assert find_place().address == '10.0.0.1:4000'


@pytest.mark.parametrize('nodes, first', [
    ('gpu07', 'gpu07'), ('gpu07,gpu09', 'gpu07'), ('gpu[07-09,12],login1', 'gpu07'), ('gpu[3,5]-ib', 'gpu3-ib'),
    ('node-a1,node-a[2-3]', 'node-a1'), ('', ''),
])
def test_the_first_host_of_a_list(nodes, first):
    assert first_host(nodes) == first
