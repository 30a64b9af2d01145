"""The one training step and the loop around it. What differs by what is trained is an `objective.Objective`."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import timm
import torch
from timm.utils import ModelEmaV3
from torch import nn
from tqdm import tqdm

from ..settings.parts import Training
from .checkpoints import load_into
from .graph import GraphedStep, check_graph
from .losses import Losses
from .machine import autocast, keep_freed_memory, resolve_precision, to_device
from .objective import Evaluation, Objective, Part
from .optimizers import create_optimizer, create_schedule, present_rate
from .parallel import WholeModel, get_state, replicate, set_state, shard, synchronised
from .processes import Flags, Processes
from .progress import progress_bar, say
from .run import CHECKPOINT, Run
from .signals import Stopped, StopSignals


class Supply(Protocol):
    """Where training batches come from: `data.batches.Batches`, or what stands in for it.

    Attributes:
        per_epoch: Batches of an epoch, a multiple of those of a step.
    """
    per_epoch: int

    def start_at(self, batch: int) -> Iterator:
        """Batches of this process without end, from number `batch` of the whole run on."""

    def describe(self, batch: int, count: int) -> str:
        """What a person can find `count` batches by, from number `batch` of the whole run on."""


def prepare(config: Training, group: Processes) -> None:
    """Resolve the settings that depend on the machine, in place, and seed what is drawn before training."""
    config.device, config.precision = group.device.type, resolve_precision(config.precision, group.device)
    if config.workers is None:
        share = max((os.cpu_count() or 1) // group.world_size, 1)
        config.workers = 0 if group.device.type == 'cpu' else min(share, 8)
    if group.device.type == 'cpu':
        keep_freed_memory()
    torch.backends.cudnn.deterministic = True
    timm.utils.random_seed(config.seed)
    if (shortened := config.shorten_warmup()) and group.is_main:
        say(shortened)


class State:
    """Everything that a step changes, and that a checkpoint keeps.

    Args:
        model: What is learned, not wrapped.
        optimizer: Over its parameters.
        losses: Of the steps so far.
        average: Moving average of the model, or None.
        fsdp: Whether model and optimizer are sharded.
    """

    def __init__(
            self,
            model: nn.Module,
            optimizer: torch.optim.Optimizer,
            losses: Losses,
            average: ModelEmaV3 | None,
            fsdp: bool,
    ):
        self.model, self.optimizer, self.losses, self.average, self.fsdp = model, optimizer, losses, average, fsdp

    @property
    def step(self) -> int:
        """Steps taken."""
        return self.losses.step

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values; called on every process, complete on the main one."""
        state = {'step': self.step, 'losses': self.losses.read(), **get_state(self.model, self.optimizer, self.fsdp)}
        return state if self.average is None else {**state, 'average': self.average.state_dict()}

    def load_state_dict(self, state: dict[str, Any], source: str) -> None:
        """Go on from what `state_dict` gave; called on every process with the whole state.

        Raises:
            CheckpointError: for the state of another model or optimizer; `source` names it.
        """
        set_state(self.model, self.optimizer, state, self.fsdp, source)
        if self.average is not None:
            load_into(self.average, state['average'], source)
        self.losses.load(state['step'], state['losses'])


class Trainer:
    """Trains an objective: accumulation, autocast, clipping, processes and shards, compilation, CUDA graph, moving
    average; log, checkpoints, resume and clean stops.

    Args:
        config: Settings of the run, prepared.
        objective: What is trained; sharded in place where the settings say so.
        batches: Where training batches come from.
        group: The processes of the run.

    Attributes:
        steps: Optimizer steps of the whole run.
        average: Moving average of the model, or None.

    Raises:
        ConfigError: for settings of the optimizer, of shards or of a graph that cannot work here.
    """

    def __init__(self, config: Training, objective: Objective, batches: Supply, group: Processes):
        self.config, self.objective, self.batches, self.group = config, objective, batches, group
        self._whole = WholeModel(objective.model, config.fsdp)
        if config.fsdp:
            shard(objective.model, group)
        if config.cuda_graph:
            check_graph(config, group)
        optimized, options = objective.optimized()
        self.optimizer = create_optimizer(config, optimized, **options)
        self.steps_per_epoch = batches.per_epoch // config.accumulate
        self.steps, self.eval_every, self.epochs = config.length(self.steps_per_epoch)
        self.schedule = create_schedule(config, self.optimizer, self.steps_per_epoch)
        self.average = ModelEmaV3(objective.model, config.ema_decay) if config.ema_decay else None
        self.losses = Losses(group, self._explain)
        self.state = State(objective.model, self.optimizer, self.losses, self.average, config.fsdp)
        self._checkpoint: Path | None = None
        self._last_save = time.monotonic()

    # The step.

    def begin(self) -> None:
        """Compile the network, spread it over the processes and take up the batches, before the first step."""
        network = torch.compile(self.objective.network) if self.config.compile else self.objective.network
        self.network = network if self.config.fsdp else replicate(network, self.group)
        if self.network is not network:
            # DistributedDataParallel sums gradients in another order from its second pass on: the first step after a
            # resume must round like every other.
            self._step([partial(self.objective.settle, self.network)], update=False)
        self.network.train()
        self._supply = self.batches.start_at(self.state.step * self.config.accumulate)
        if self.config.cuda_graph:
            self._replay = GraphedStep(lambda batch: self._step([partial(self._loss, lambda: batch, Part(0, 0, 0))]),
                                       self.optimizer, self.objective.generators)

    def take_step(self) -> torch.Tensor:
        """The next step: forward, backward and optimizer; its loss, a scalar on the device."""
        step, count = self.state.step, self.config.accumulate
        self.objective.seed(step)
        self.schedule.step_update(step)
        if self.config.cuda_graph:
            loss = self._replay(next(self._supply))
        else:
            loss = self._step([partial(self._loss, self._next_batch, Part(step, index, step * count + index))
                               for index in range(count)])
        self.losses.add(loss)
        return loss

    def _step(self, parts: list[Callable[[], torch.Tensor]], update: bool = True) -> torch.Tensor:
        """Forward and backward of all parts of a step, then the optimizer's step; the mean loss."""
        loss = torch.zeros((), device=self.group.device)
        for index, loss_of_part in enumerate(parts):
            with synchronised(self.network, last=index == len(parts) - 1):
                with autocast(self.config.precision, self.group.device):
                    part_loss = loss_of_part() / len(parts)
                part_loss.backward()
            loss += part_loss.detach()
        if update:
            self.losses.check(loss)
            if self.config.clip_grad:
                nn.utils.clip_grad_norm_(self.objective.model.parameters(), self.config.clip_grad)
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if update and self.average is not None:
            self.average.update(self.objective.model)
        return loss

    def _loss(self, batch: Callable[[], Any], part: Part) -> torch.Tensor:
        return self.objective.loss(self.network, batch(), part)

    def _next_batch(self) -> Any:
        return to_device(next(self._supply), self.group.device)

    # The loop.

    def run(self, run: Run) -> Evaluation:
        """Train from where a run stands to its end.

        Args:
            run: The run's folder, opened with this trainer's `steps`.

        Returns:
            The evaluation at the end.

        Raises:
            CheckpointError: for the checkpoint of another model or optimizer.
            NonFiniteLoss: when training diverges.
            Stopped: when SIGTERM or SIGINT asked any process for it, after a checkpoint.
        """
        self._take_up(run)
        self.begin()
        speed, flags, self._last_save = Speed(self.state.step), Flags(self.group, 2), time.monotonic()
        progress = progress_bar(shown=self.group.is_main, total=self.steps, initial=self.state.step, unit='step')
        with StopSignals() as signals, progress:
            while self.state.step < self.steps:
                if self._evaluation_is_due():
                    with speed.paused():
                        self._evaluate(run)
                self.take_step()
                progress.update()
                if self.state.step % self.config.log_every == 0 or self.state.step == self.steps:
                    self._log(run, progress, speed)
                if self._save_if_due(run, flags, signals):
                    flags.settle()
                    self.group.barrier()
                    raise Stopped(f'Stopped after step {self.state.step} of {self.steps}. The same command goes on '
                                  'from there.', signals.received or signal.SIGTERM)
            flags.settle()
        return self._evaluate(run, again=True)

    def export(self, folder: Path) -> nn.Module:
        """Have the objective write its weights to a run's folder as others load them; called on every process.

        Returns:
            The whole model with the present weights, of use on the main process.
        """
        model = self._whole.gather()
        if self.group.is_main:
            self.objective.export(model, folder)
        return model

    def _take_up(self, run: Run) -> None:
        """Load the checkpoint that the run goes on from, and say where it begins."""
        self._checkpoint, begun = run.folder / CHECKPOINT, run.state is not None
        if run.state:
            self.state.load_state_dict(run.state, str(self._checkpoint))
        run.start(self.config.precision, **self.objective.about)
        run.state = None  # as large as the model and its optimizer
        place = f'going on from step {self.state.step} of {self.steps} in' if begun else 'writing to'
        run.say(f'{self.objective.title}; {self.group.world_size} x {self.group.device}, {self.config.precision}; '
                f'{place} {run.folder}')

    def _evaluation_is_due(self) -> bool:
        if self.state.step == 0:
            return self.objective.evaluated_untrained
        return self.eval_every > 0 and self.state.step % self.eval_every == 0

    def _evaluate(self, run: Run, again: bool = False) -> Evaluation:
        """Evaluate the model and log the scores, once for each number of images; `again` for the result alone."""
        self.losses.read()
        images = self.state.step * self.config.images_per_step
        known = self.group.on_main(lambda: any(
            line['event'] == 'evaluation' and line['images'] == images for line in run.log.lines))
        if known and not again:
            return Evaluation({})
        evaluation = self.objective.evaluate(self._whole.gather(everywhere=True))
        self.network.train()
        if evaluation.scores:
            if not known:
                run.log.write(event='evaluation', images=images, **evaluation.scores)
            run.say(f'{images:>11,} images seen: {evaluation.text}')
        return evaluation

    def _log(self, run: Run, progress: tqdm, speed: 'Speed') -> None:
        step, values = self.state.step, self.losses.take()
        loss, rate = sum(values) / len(values), speed.steps_per_second(step) * self.config.images_per_step
        run.log.write(event='step', step=step, epoch=round(step / self.steps_per_epoch, 3),
                      images=step * self.config.images_per_step, loss=loss, lr=present_rate(self.optimizer),
                      images_per_second=round(rate, 1))
        progress.set_postfix_str(f'epoch {(step - 1) // self.steps_per_epoch + 1}/{self.epochs}, loss {loss:.4f}, '
                                 f'{rate:.0f} images/s', refresh=False)
        speed.restart(step)

    def _save_if_due(self, run: Run, flags: Flags, signals: StopSignals) -> bool:
        """Save a checkpoint when it is time, at the end, and when a signal asks for a stop; whether to stop."""
        config, step = self.config, self.state.step
        minutes = (time.monotonic() - self._last_save) / 60
        stop, time_to_save = flags.exchange(
            signals.received is not None, 0 < config.checkpoint_every_minutes <= minutes)
        on_step = config.checkpoint_every_steps and step % config.checkpoint_every_steps == 0
        if stop or time_to_save or on_step or step == self.steps:
            run.save(self.state.state_dict())  # which reads the losses: nothing that follows a bad one is saved
            if step < self.steps:
                self.export(run.folder)
            self._last_save = time.monotonic()
        return stop and step < self.steps

    def _explain(self, step: int) -> str:
        """Where a loss that is not finite came from, and what to do about it."""
        images = self.batches.describe(step * self.config.accumulate, self.config.accumulate)
        kept = 'No checkpoint was written yet.'
        if self._checkpoint is not None and self._checkpoint.exists():
            kept = f'The last checkpoint before it is {self._checkpoint}, and what lies beside it is from then.'
        warmup = self.config.warmup_setting.replace('_', '-')
        return (f'(epoch {step // self.steps_per_epoch}, {images} of {self.config.data_name}): lower --lr '
                f'({self.config.lr:g}) or lengthen --{warmup} in a new run. {kept}')


class Speed:
    """Steps per second since the last line of the log, evaluations left out.

    Args:
        step: Steps taken so far.
    """

    def __init__(self, step: int):
        self.restart(step)

    def restart(self, step: int) -> None:
        """Count from here on."""
        self._since, self._step = time.perf_counter(), step

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out the time inside."""
        paused = time.perf_counter()
        yield
        self._since += time.perf_counter() - paused

    def steps_per_second(self, step: int) -> float:
        """Since the last `restart`, at step `step`."""
        return (step - self._step) / (time.perf_counter() - self._since)
