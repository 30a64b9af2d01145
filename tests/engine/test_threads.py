"""How many threads a run on a CPU takes: the free cores, as it began, or what the user says."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from autoreg_vit.engine import threads
from autoreg_vit.engine.threads import free_cores, settle_threads, threads_of


@pytest.fixture
def machine(monkeypatch):
    """Of four cores and as many threads, whose cores are busy for these parts of the time."""
    taken = []

    def of(*busy: float) -> list[int]:
        monkeypatch.delenv('OMP_NUM_THREADS', raising=False)
        monkeypatch.setattr(torch, 'get_num_threads', lambda: 4)
        monkeypatch.setattr(torch, 'set_num_threads', taken.append)
        monkeypatch.setattr(threads.time, 'sleep', lambda seconds: None)
        looks = iter([dict.fromkeys(range(4), (100, 200)),
                      {core: (100 + round(100 * (1 - part)), 300) for core, part in enumerate(busy)}] * 9)
        monkeypatch.setattr(threads, '_ticks', lambda: next(looks))
        return taken

    return of


@pytest.mark.parametrize('busy, count', [((0, 0, 0, 0), []), ((0.1, 0.1, 0, 0.2), []), ((1, 0, 0, 0), [3]),
                                         ((1, 0.9, 0.1, 0), [2]), ((1, 1, 1, 1), [1])])
def test_free_cores_are_taken(busy, count, machine):
    taken, said = machine(*busy), []
    settle_threads(None, said.append)
    assert taken == count and bool(said) == bool(count)
    assert not count or f'Computing with {count[0]} of 4 threads' in said[0]


def test_a_run_keeps_what_it_began_with(machine, tmp_path: Path):
    taken = machine(0, 0, 0, 0)
    lines = [{'event': 'start', 'threads': 3}, {'event': 'step'}, {'event': 'resume', 'threads': 2}]
    (tmp_path / 'log.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines))
    assert threads_of(str(tmp_path)) == 2 and threads_of(str(tmp_path / 'none')) is None
    settle_threads(str(tmp_path), lambda text: None)
    assert taken == [2]


def test_the_user_decides(machine, monkeypatch):
    taken = machine(1, 1, 1, 1)
    monkeypatch.setenv('OMP_NUM_THREADS', '4')
    settle_threads(None, lambda text: None)
    assert not taken


def test_systems_that_do_not_say(machine, monkeypatch, tmp_path: Path):
    taken = machine(1, 1, 1, 1)
    monkeypatch.setattr(threads, '_ticks', lambda: None)
    settle_threads(None, lambda text: None)
    assert not taken and free_cores() is None


@pytest.mark.skipif(not threads.STATISTICS.exists(), reason='needs /proc/stat')
def test_a_busy_core_is_seen():
    """Nobody knows what else this machine does: one more process than cores leaves the least."""
    others = [subprocess.Popen([sys.executable, '-c', 'while True: pass']) for _ in range(len(threads._ticks()) + 1)]
    try:
        assert free_cores() == 1
    finally:
        for other in others:
            other.kill()
