"""Losses of a run's steps, which must stay finite."""

import math
from collections.abc import Callable

import torch

from ..errors import UsageError
from .processes import Processes


class NonFiniteLoss(UsageError):
    """The loss became NaN or infinite; the last checkpoint before it is kept."""


class LossHistory:
    """Losses of the steps since the last line of the log, and the guard against those that are not finite.

    On a CPU each is checked before the optimizer's step. On a GPU they stay there, since reading one would make the
    host wait: they are checked whenever the log, a checkpoint or an evaluation reads them, and the error names the
    first bad step all the same. Nothing is saved unchecked, so the last checkpoint is good.

    Args:
        group: The processes, whose mean counts, so that all of them see the same.
        explain: From a step to what to say about it.
    """

    def __init__(self, group: Processes, explain: Callable[[int], str]):
        self.group, self.explain = group, explain
        self.step = 0
        self._read: list[float] = []
        self._unread: list[torch.Tensor] = []

    def load(self, step: int, losses: list[float]) -> None:
        """Go on from a checkpoint: after `step` steps, with the losses since the last line."""
        self.step, self._read = step, losses

    def check(self, loss: torch.Tensor) -> None:
        """Before the optimizer's step, on a CPU: raise NonFiniteLoss, on all processes, for one that is not finite."""
        if self.group.device.type == 'cpu':
            self._refuse(self.step, self.group.mean(loss).item())

    def add(self, loss: torch.Tensor) -> None:
        """Note the loss of the step, a scalar on the device, and count the step."""
        self._unread.append(loss)
        self.step += 1

    def read(self) -> list[float]:
        """All losses since the last line; raises NonFiniteLoss, on all processes, for the first that is not finite."""
        if self._unread:
            losses = self.group.mean(torch.stack(self._unread)).tolist()
            for step, loss in enumerate(losses, start=self.step - len(losses)):
                self._refuse(step, loss)
            self._read, self._unread = [*self._read, *losses], []
        return self._read

    def take(self) -> list[float]:
        """What `read` gives, for the next line: from here on the losses are those after it."""
        losses, self._read = self.read(), []
        return losses

    def _refuse(self, step: int, loss: float) -> None:
        if not math.isfinite(loss):
            raise NonFiniteLoss(f'The loss became {loss} at step {step} {self.explain(step)}')
