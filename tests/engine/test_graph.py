"""Where a graph's parts begin and end, and in which order they are replayed; with CUDA stood in for by a recorder."""

import contextlib
from unittest import mock

import pytest
import torch
from torch import nn

from autoreg_vit.engine.graph import GraphedStep


class Recorder:
    """Stands in for `torch.cuda`: graphs that keep what was done while they captured, and do it again."""

    def __init__(self, monkeypatch):
        self.current: list | None = None
        self.graphs = 0
        monkeypatch.setattr(torch.cuda, 'Stream', mock.Mock())
        monkeypatch.setattr(torch.cuda, 'current_stream', mock.Mock())
        monkeypatch.setattr(torch.cuda, 'stream', lambda stream: contextlib.nullcontext())
        monkeypatch.setattr(torch.cuda, 'CUDAGraph', self.graph)
        monkeypatch.setattr(torch.cuda, 'graph', self.capture)

    def graph(self) -> mock.Mock:
        self.graphs += 1
        kept: list = []
        return mock.Mock(kept=kept, replay=lambda: [kernel() for kernel in kept])

    @contextlib.contextmanager
    def capture(self, graph: mock.Mock, capture_error_mode: str):
        assert self.current is None
        # Loaders pin memory in a thread of their own meanwhile.
        assert capture_error_mode == 'thread_local'
        self.current = graph.kept
        try:
            yield
        finally:
            self.current = None

    def launch(self, kernel) -> None:
        """As a kernel is launched: kept alone while a graph captures, and done otherwise."""
        if self.current is None:
            kernel()
        else:
            self.current.append(kernel)


def make(monkeypatch, breaks: int, refused=None) -> tuple[GraphedStep, list[str], Recorder]:
    """A step of `breaks` + 1 kernels with work outside between them."""
    recorder, done = Recorder(monkeypatch), []
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(1))], lr=0.1)

    def step(batch: torch.Tensor) -> torch.Tensor:
        for number in range(breaks + 1):
            recorder.launch(lambda number=number: done.append(f'kernel {number} of {batch.item():g}'))
            if number < breaks:
                graphed.outside(lambda number=number: done.append(
                    f'work {number}' if recorder.current is None else 'captured'))
        return batch * 2

    graphed = GraphedStep(step, optimizer, [], refused or (lambda error: pytest.fail(str(error))))
    return graphed, done, recorder


@pytest.mark.parametrize('breaks', [0, 1, 2])
def test_work_outside_is_done_between_graphs(breaks: int, monkeypatch):
    graphed, done, recorder = make(monkeypatch, breaks)
    for number in range(GraphedStep.warm_up + 3):
        done.clear()
        graphed(torch.tensor(float(number)))
        wanted = [f'kernel {place} of {number}' for place in range(breaks + 1)]
        for place in range(breaks):
            wanted.insert(2 * place + 1, f'work {place}')
        assert done == wanted
    assert recorder.graphs == breaks + 1


def test_a_capture_that_fails_after_a_break_leaves_the_step_as_it_is(monkeypatch):
    refused: list[Exception] = []
    graphed, done, recorder = make(monkeypatch, 1, refused.append)
    for number in range(GraphedStep.warm_up):
        graphed(torch.tensor(float(number)))
    failing = mock.Mock(side_effect=[recorder.graph(), RuntimeError('no second graph')])
    monkeypatch.setattr(torch.cuda, 'CUDAGraph', failing)
    for _ in range(2):
        done.clear()
        graphed(torch.tensor(7.0))
        assert done == ['kernel 0 of 7', 'work 0', 'kernel 1 of 7']
    assert [str(error) for error in refused] == ['no second graph']
