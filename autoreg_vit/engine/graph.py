"""A whole training step captured in a CUDA graph, for models so small that launching kernels takes longer than they."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map

from ..errors import ConfigError
from ..settings.parts import Training
from .machine import to_device
from .processes import Processes


def check_graph(config: Training, group: Processes) -> None:
    """Raise ConfigError for settings that a captured step cannot honour."""
    if group.device.type != 'cuda':
        raise ConfigError(f'cuda_graph needs a CUDA device, and this run is on {group.device.type}: leave --cuda-graph '
                          'out.')
    if group.world_size > 1 or config.accumulate > 1 or config.opt.lower() != 'adamw':
        raise ConfigError('cuda_graph captures a step of one process, one forward pass (accumulate=1) and adamw: got '
                          f'{group.world_size} processes, accumulate={config.accumulate}, opt={config.opt!r}. Leave '
                          '--cuda-graph out.')


class GraphedStep:
    """Calls `step` and, after some calls, replays the kernels it launched instead.

    The first calls are steps like every other and warm up what must not begin inside a capture. Draws inside the step
    follow the seeds that `generators` have at each call.

    Args:
        step: From a batch on the device, tensors of fixed shapes in any structure, to the loss: forward, backward and
            optimizer step.
        optimizer: Capturable; its learning rates are tensors on the device from here on, and `set_rates` fills them.
        generators: On the device, that the step draws from, besides the default one.
    """

    warm_up = 3

    def __init__(
            self,
            step: Callable[[Any], torch.Tensor],
            optimizer: torch.optim.Optimizer,
            generators: Sequence[torch.Generator],
    ):
        self.step, self.optimizer, self.generators = step, optimizer, generators
        self.calls, self.stream = 0, torch.cuda.Stream()
        self.graph: torch.cuda.CUDAGraph | None = None
        self.device = optimizer.param_groups[0]['params'][0].device
        self.rates = [torch.tensor(float(group['lr']), device=self.device) for group in optimizer.param_groups]

    def set_rates(self) -> None:
        """Move the rates that a schedule has set as numbers into the tensors that the graph reads."""
        for group, rate in zip(self.optimizer.param_groups, self.rates):
            if group['lr'] is not rate:
                rate.fill_(group['lr'])
                group['lr'] = rate

    def __call__(self, batch: Any) -> torch.Tensor:
        """The loss of a step over `batch`, which is moved to the device."""
        self.set_rates()
        batch = to_device(batch, self.device)
        self.calls += 1
        if self.calls <= self.warm_up:
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                loss = self.step(batch)
            torch.cuda.current_stream().wait_stream(self.stream)
            return loss
        if self.graph is None:
            self.batch = tree_map(lambda leaf: leaf.clone() if torch.is_tensor(leaf) else leaf, batch)
            self.graph = torch.cuda.CUDAGraph()
            for generator in self.generators:
                self.graph.register_generator_state(generator)
            with torch.cuda.graph(self.graph):
                self.loss = self.step(self.batch)
        for kept, given in zip(tree_leaves(self.batch), tree_leaves(batch)):
            if torch.is_tensor(kept):
                kept.copy_(given)
        self.graph.replay()
        return self.loss.clone()
