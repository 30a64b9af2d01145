"""What `trainer.Trainer` trains: a class for each kind of training says what is learned, by which loss, how well."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import nn

#: The class of what is learned.
M = TypeVar('M', bound=nn.Module)


class ForwardPass(NamedTuple):
    """One forward pass: number `place` of the optimizer step `step`, and number `number` of the run, all from 0."""
    step: int
    place: int
    number: int


class Evaluation(NamedTuple):
    """How good a model is."""
    #: What the log line holds, by the names of `evaluation.metrics`; empty where there are none, or where the main
    #: process alone knows them.
    scores: dict[str, float]
    #: The same for a person.
    text: str = ''
    #: What else the command makes something of, such as a confusion matrix.
    result: Any = None


class Objective(Generic[M]):
    """What is learned, and how; the trainer does the rest.

    Args:
        model: What is learned; checkpoints hold its state.
        title: What is trained on what, for the first line that a person reads.
        about: What the log's first line says of model and data besides.

    Attributes:
        network: What is called in a forward pass, by DistributedDataParallel too; by default the model.
        generators: On the device, that `loss` draws from; a CUDA graph must know them.
    """

    #: Whether the model is evaluated before the first step too.
    evaluated_untrained = False
    #: That LayerNorms read in the forward pass of an image, where it is known: whether compiling pays depends on it.
    normed_values_per_image = 0

    def __init__(self, model: M, title: str, about: dict[str, Any]):
        self.model, self.title, self.about = model, title, about
        self.network: nn.Module = model
        self.generators: Sequence[torch.Generator] = ()

    def optimized(self) -> tuple[Any, dict[str, Any]]:
        """What `optimizers.create_optimizer` takes: a module or groups of parameters, and further arguments."""
        return self.model, {}

    def seed(self, step: int) -> None:
        """Seed what the forward passes of a step draw from; called before each step, outside of what a CUDA graph
        replays."""

    def loss(self, network: nn.Module, batch: Any, part: ForwardPass) -> torch.Tensor:
        """The loss of a batch, a scalar on the device.

        Args:
            network: `self.network`, as the trainer compiles it and spreads it over processes.
            batch: Of this process, as its loader collates it, on the device.
        """
        raise NotImplementedError

    def settle(self, network: nn.Module) -> torch.Tensor:
        """A scalar of one forward pass over empty images, in which every parameter takes part and no statistics
        change; done once before the first step of a network that is compiled or spread over processes."""
        raise NotImplementedError

    def evaluate(self, model: M) -> Evaluation:
        """How good the whole model is, with the present weights, in training mode or not; called on every process."""
        raise NotImplementedError

    def export(self, model: M, folder: Path) -> None:
        """Write the weights to a run's folder as others load them, beside each checkpoint; called on the main
        process."""
