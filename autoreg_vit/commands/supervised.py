"""What training on annotated images shares: the loop, the accuracies of a classifier, and what a run leaves."""

from collections.abc import Callable
from typing import Any

import torch
from timm.utils import ModelEmaV3
from torch import nn

from ..data.batches import Batches
from ..engine.checkpoints import load_into
from ..engine.loop import create_schedule, length_of, run_steps
from ..engine.losses import Losses
from ..engine.machine import autocast, to_device
from ..engine.parallel import get_state, set_state, synchronised
from ..engine.run import Run
from ..evaluation.metrics import describe, scores
from ..settings.classification import RunConfig


class Learner:
    """Something in training: what `train` needs beside data and settings.

    Args:
        model: Its state is saved: the whole network when fine-tuning, the linear layer when probing.
        trained: The same over all processes, from `parallel.replicate`.
        optimizer: Over its parameters.
        loss: From a batch of this process, as its loader collates it, on its device, and the number of the forward
            pass, to a scalar.
        evaluate: Gives how many test `images` there were, and the scores that `METRICS` names.
        average: Moving average of the model that every step updates and that is saved too, or None.
    """

    def __init__(
            self,
            model: nn.Module,
            trained: nn.Module,
            optimizer: torch.optim.Optimizer,
            loss: Callable[[Any, int], torch.Tensor],
            evaluate: Callable[[], dict[str, Any]],
            average: ModelEmaV3 | None = None,
    ):
        self.model, self.trained, self.optimizer = model, trained, optimizer
        self.loss, self.evaluate, self.average = loss, evaluate, average

    def state(self) -> dict[str, Any]:
        state = get_state(self.model, self.optimizer, fsdp=False)
        return state if self.average is None else {**state, 'average': self.average.state_dict()}

    def load_state(self, state: dict[str, Any], source: str) -> None:
        set_state(self.model, self.optimizer, state, fsdp=False, source=source)
        if self.average is not None:
            load_into(self.average, state['average'], source)


def train(config: RunConfig, run: Run, batches: Batches, learner: Learner) -> dict[str, Any]:
    """Train from where the run stands to its end, and evaluate it there.

    Args:
        config: Settings.
        run: The run's folder; gives the checkpoint to go on from.
        batches: Training batches of this process.
        learner: What is trained.

    Returns:
        What `learner.evaluate` gives at the end.

    Raises:
        NonFiniteLoss: when training diverges.
        Stopped: when SIGTERM or SIGINT asked for it, after a checkpoint.
    """
    group, optimizer = run.group, learner.optimizer
    steps_per_epoch = batches.per_epoch // config.accumulate
    steps, images_per_step = length_of(config, steps_per_epoch).steps, config.batch_size * config.accumulate
    schedule = create_schedule(config, optimizer, steps_per_epoch, config.min_lr)
    losses = Losses(group, lambda step: (
        f'(epoch {step // steps_per_epoch}): lower --lr ({config.lr:g}) or lengthen the warm-up in a new run. What '
        f'{run.folder} holds is from before.'))
    first_step = 0
    if run.state:
        first_step = losses.step = run.state['step']
        losses.values = run.state['losses']
        learner.load_state(run.state, str(run.folder / 'last.pt'))
        run.say(f'Going on from step {first_step} of {steps} in {run.folder}.')
        run.state = None

    def report(step: int) -> dict[str, Any]:
        losses.read()
        result, images = learner.evaluate(), step * images_per_step
        learner.trained.train()
        if not any(line['event'] == 'evaluation' and line['images'] == images for line in run.log.lines):
            run.log.write(event='evaluation', images=images, test_images=result['images'], **scores(result))
        run.say(f'{images:>11,} images seen: {describe(result)}')
        return result

    def save(step: int) -> None:
        losses.read()  # never save what follows a loss that is not finite
        run.save({'step': step, 'losses': losses.values, **learner.state()})

    def take_step(step: int) -> torch.Tensor:
        loss = torch.zeros((), device=group.device)
        for part in range(config.accumulate):
            batch = to_device(next(supply), group.device)
            number = step * config.accumulate + part
            with synchronised(learner.trained, last=part == config.accumulate - 1):
                with autocast(config.precision, group.device):
                    part_loss = learner.loss(batch, number) / config.accumulate
                part_loss.backward()
            loss += part_loss.detach()
        losses.check(loss)
        schedule.step_update(step)
        if config.clip_grad:
            nn.utils.clip_grad_norm_(learner.model.parameters(), config.clip_grad)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if learner.average is not None:
            learner.average.update(learner.model)
        return loss

    learner.trained.train()
    supply = batches.start_at(first_step * config.accumulate)
    run_steps(config, run, losses, optimizer, steps_per_epoch, first_step, take_step=take_step, evaluate=report,
              save=save)
    return report(steps)
