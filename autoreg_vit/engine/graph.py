"""A training step captured in CUDA graphs, for models so small that launching kernels takes longer than they."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map_only

from .machine import to_device


class GraphedStep:
    """Calls `step` and, after some calls, replays the kernels it launched instead, as one graph, or more where the step
    does work `outside`. The first calls warm up what must not begin inside a capture. Draws inside the step follow the
    seeds that `generators` have at each call.

    Args:
        step: From the batches of a step on the device, tensors of fixed shapes in any structure, to the loss: forward,
            backward and optimizer step.
        optimizer: Capturable; its learning rates are tensors on the device from here on, and `set_rates` fills them.
        generators: On the device, that the step draws from, besides the default one.
        refused: Takes the error where the step cannot be captured; unless it raises, steps are taken without a graph.
    """

    warm_up = 3

    def __init__(
            self, step: Callable[[Any], torch.Tensor], optimizer: torch.optim.Optimizer,
            generators: Sequence[torch.Generator], refused: Callable[[Exception], None],
    ):
        self.step, self.optimizer, self.generators, self.refused = step, optimizer, generators, refused
        self.calls, self.stream = 0, torch.cuda.Stream()
        #: What is done instead of the step, in its order: replays, and the work between; empty before it is captured.
        self.parts: list[Callable[[], Any]] = []
        self._capture: ExitStack | None = None
        self.device = optimizer.param_groups[0]['params'][0].device
        self.rates = [torch.tensor(float(group['lr']), device=self.device) for group in optimizer.param_groups]

    def set_rates(self) -> None:
        """Move the rates that a schedule has set as numbers into the tensors that the graph reads."""
        for group, rate in zip(self.optimizer.param_groups, self.rates):
            if group['lr'] is not rate:
                rate.fill_(group['lr'])
                group['lr'] = rate

    def __call__(self, batch: Any) -> torch.Tensor:
        """The loss of a step over `batch`, its batches, which are moved to the device."""
        self.set_rates()
        batch = to_device(batch, self.device)
        self.calls += 1
        if self.calls <= self.warm_up:
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                loss = self.step(batch)
            torch.cuda.current_stream().wait_stream(self.stream)
            return loss
        if self.calls == self.warm_up + 1:
            try:
                self.parts = self._captured(batch)
            except Exception as error:  # by what cannot be captured: RuntimeError, AcceleratorError, of Inductor, ...
                self.refused(error)
        if not self.parts:
            return self.step(batch)
        for kept, given in zip(tree_leaves(self.batch), tree_leaves(batch)):
            if torch.is_tensor(kept):
                kept.copy_(given)
        for part in self.parts:
            part()
        return self.loss.clone()

    def outside(self, work: Callable[[], Any]) -> None:
        """Within the step: do `work` that is not to be captured, such as a sum over processes. What the step does
        before and after it is replayed as graphs of their own."""
        if self._capture is None:
            work()
        else:
            self._capture.close()
            self._parts.append(work)
            self._begin_graph(self._capture)

    def _captured(self, batch: Any) -> list[Callable[[], Any]]:
        self.batch = tree_map_only(torch.Tensor, torch.Tensor.clone, batch)
        self._parts: list[Callable[[], Any]] = []
        try:
            with ExitStack() as self._capture:
                self._begin_graph(self._capture)
                self.loss = self.step(self.batch)
        finally:
            self._capture = None
        return self._parts

    def _begin_graph(self, capture: ExitStack) -> None:
        graph = torch.cuda.CUDAGraph()
        for generator in self.generators:
            graph.register_generator_state(generator)
        # Not 'global': a thread in which a loader pins memory, or NCCL's, would spoil the capture and itself fail.
        capture.enter_context(torch.cuda.graph(graph, capture_error_mode='thread_local'))
        self._parts.append(graph.replay)
