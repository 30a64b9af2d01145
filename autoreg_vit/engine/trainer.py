"""The one training step and the loop around it, of every run but `probe --fast`, which has its own arithmetic. What
differs by what is trained is an `objective.Objective`."""

import copy
import os
import signal
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Generic, Protocol, cast

import timm
import torch
from timm.utils import ModelEmaV3
from torch import nn
from tqdm import tqdm

from ..errors import ConfigError, UsageError
from ..settings.parts import Training
from .checkpoints import load_into
from .choices import Choices, Work, cannot_capture, choose, reason_of
from .graph import GraphedStep
from .loss_history import LossHistory
from .machine import autocast, keep_freed_memory, resolve_precision, to_device
from .objective import Evaluation, ForwardPass, M, Objective
from .optimizers import create_optimizer, create_schedule
from .parallel import GradientMean, gather_weights, get_state, replicate, set_state, shard, synchronised
from .processes import Flags, Processes
from .progress import progress_bar, say
from .run import CHECKPOINT, Run
from .signals import Stopped, StopSignals
from .threads import settle_threads


class Supply(Protocol):
    """Where training batches come from: `data.batches.Batches`, or what stands in for it."""
    #: Batches of an epoch, a multiple of those of a step.
    per_epoch: int
    #: Whether all images are kept on the device.
    on_device: bool

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
        if group.world_size == 1:
            settle_threads(config.output_dir, say)
    torch.backends.cudnn.deterministic = True
    timm.utils.random_seed(config.seed)
    if (shortened := config.shorten_warmup()) and group.is_main:
        say(shortened)


class State:
    """What a step changes, and a checkpoint keeps: a model, not wrapped, its optimizer, both sharded with `fsdp`, the
    losses of the steps so far, and the moving average of the model or None."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, losses: LossHistory,
                 average: ModelEmaV3 | None, fsdp: bool):
        self.model, self.optimizer, self.losses, self.average, self.fsdp = model, optimizer, losses, average, fsdp

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values; called on every process, complete on the main one."""
        losses = self.losses.read()
        state = {'step': self.losses.step, 'losses': losses, **get_state(self.model, self.optimizer, self.fsdp)}
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


class Trainer(Generic[M]):
    """Trains an objective: accumulation, autocast, clipping, processes and shards, compilation, CUDA graph, moving
    average; log, checkpoints, resume and clean stops.

    Args:
        config: Settings of the run, prepared.
        objective: What is trained; its model is sharded in place where the settings say so.

    Attributes:
        steps: Optimizer steps of the whole run.
        average: Moving average of the model, or None.

    Raises:
        ConfigError: for settings of the optimizer, of shards or of a graph that cannot work here.
    """

    def __init__(self, config: Training, objective: Objective[M], batches: Supply, group: Processes):
        self.config, self.objective, self.batches, self.group = config, objective, batches, group
        self._whole = objective.model
        if config.fsdp:
            self._whole = copy.deepcopy(objective.model)  # before it is sharded
            shard(objective.model, group)
        self.steps_per_epoch = batches.per_epoch // config.accumulate
        self.steps, self.eval_every, self.epochs = config.length(self.steps_per_epoch)
        images = self.steps * config.images_per_step // group.world_size
        work = Work(self.steps, images * objective.normed_values_per_image)
        self.choices = choose(config, group, work, say if group.is_main else lambda text: None)
        if self.choices.cuda_graph and (reason := cannot_capture(config, group)):
            raise ConfigError(f'{reason[0].upper()}{reason[1:]}: leave --cuda-graph out.')
        optimized, options = objective.optimized()
        self.optimizer = create_optimizer(config, optimized, self.choices.cuda_graph, **options)
        self.schedule = create_schedule(config, self.optimizer, self.steps_per_epoch)
        self.average = ModelEmaV3(objective.model, config.ema_decay) if config.ema_decay else None
        self.losses = LossHistory(group, self._explain)
        self._state = State(objective.model, self.optimizer, self.losses, self.average, config.fsdp)
        self._replay: GraphedStep | None = None
        self._gradients: GradientMean | None = None
        self._has_stepped = False
        self._run: Run | None = None

    @property
    def step(self) -> int:
        """Steps taken."""
        return self.losses.step

    # The step.

    def begin(self) -> None:
        """Compile the network, spread it over the processes and take up the batches, before the first step."""
        if not (self.choices.compile and self._compile()):
            self._spread(self.objective.network)
        self.network.train()
        self._supply = self.batches.start_at(self.step * self.config.accumulate)
        if self.choices.cuda_graph:
            self._replay = GraphedStep(
                lambda batches: self._optimize(self._passes(iter(batches), 0)), self.optimizer,
                self.objective.generators, partial(self._give_up, 'cuda_graph'))

    def _compile(self) -> bool:
        """Spread the compiled network; whether that worked, if compiling was not asked for."""
        try:
            self._spread(cast(nn.Module, torch.compile(self.objective.network)))
        except Exception as error:  # by what is missing or not supported: a C compiler, an operation, memory, ...
            self._give_up('compile', error)
            return False
        return True

    def _spread(self, network: nn.Module) -> None:
        """Take a network, as it is or compiled, over the processes of the run."""
        if self.choices.cuda_graph and self.group.world_size > 1:
            self.network, self._gradients = network, GradientMean(self.objective.model, self.group)
        else:
            self.network = network if self.config.fsdp else replicate(network, self.group)
        if self.network is not self.objective.network:
            # A pass for nothing. Compiling happens in it, and may fail; and DistributedDataParallel sums gradients in
            # another order from its second pass on, and the first step after a resume must round like every other.
            self._optimize([partial(self.objective.settle, self.network)], update=False)

    def _give_up(self, name: str, error: Exception) -> None:
        """Choose against what has failed, and say so; where it was asked for, raise ConfigError."""
        flag = name.replace('_', '-')
        if getattr(self.config, name) is True:
            raise ConfigError(f'--{flag} failed ({reason_of(error)}): leave it out.') from error
        self.choices = self.choices._replace(**{name: False})
        if self.group.is_main:
            say(f'Going on without --{flag}, which failed ({reason_of(error)}).')
        if self._run is not None:  # else the line with which the run begins or goes on will say so
            self._run.log.write(event='choices', choices=self.choices._asdict())

    def take_step(self) -> torch.Tensor:
        """The next step: forward, backward and optimizer; its loss, a scalar on the device."""
        self.objective.seed(self.step)
        self.schedule.step_update(self.step)
        try:
            if self._replay is not None:
                loss = self._replay([next(self._supply) for _ in range(self.config.accumulate)])
            else:
                loss = self._optimize(self._passes(self._supply, self.step))
        except Exception as error:
            # What Inductor lacks or gets wrong for training alone shows in the first step.
            if isinstance(error, UsageError) or self._has_stepped or not self.choices.compile:
                raise
            raise ConfigError(f'Compiling failed ({reason_of(error)}): use --no-compile.') from error
        self._has_stepped = True
        self.losses.add(loss)
        return loss

    def _passes(self, batches: Iterator, step: int) -> list[Callable[[], torch.Tensor]]:
        """The forward passes of a step over the batches that come next, each yet to be done; they give losses."""
        count = self.config.accumulate
        return [partial(self._loss, batches, ForwardPass(step, place, step * count + place)) for place in range(count)]

    def _loss(self, batches: Iterator, part: ForwardPass) -> torch.Tensor:
        return self.objective.loss(self.network, to_device(next(batches), self.group.device), part)

    def _optimize(self, passes: list[Callable[[], torch.Tensor]], update: bool = True) -> torch.Tensor:
        """Forward passes and their backward passes, then the optimizer's step; the mean loss."""
        loss = torch.zeros((), device=self.group.device)
        for index, forward in enumerate(passes):
            with synchronised(self.network, last=index == len(passes) - 1):
                with autocast(self.config.precision, self.group.device):
                    part_loss = forward() / len(passes)
                part_loss.backward()
            loss += part_loss.detach()
        if update:
            self.losses.check(loss)
            if self._gradients is not None and self._replay is not None:
                self._replay.outside(self._gradients.average)
            if self.config.clip_grad:
                nn.utils.clip_grad_norm_(self.objective.model.parameters(), self.config.clip_grad)
            self.optimizer.step()
        if self._gradients is not None:
            self._gradients.clear()
        else:
            self.optimizer.zero_grad(set_to_none=True)
        if update and self.average is not None:
            self.average.update(self.objective.model)
        return loss

    # The loop.

    def run(self, run: Run) -> Evaluation:
        """Train from where a run, opened with this trainer's `steps`, stands to its end; gives the evaluation there.

        Raises:
            CheckpointError: for the checkpoint of another model or optimizer.
            NonFiniteLoss: when training diverges.
            Stopped: when SIGTERM or SIGINT asked any process for it, after a checkpoint.
        """
        self._start(run)
        try:
            self._take_steps(run)
        finally:
            self._supply = iter(())  # loader processes end here, and not when the trainer is collected
        return self._evaluate(run, again=True)

    def _take_steps(self, run: Run) -> None:
        flags, self._last_save = Flags(self.group), time.monotonic()
        # Of the speed that is logged: the step it is counted from, and the time, without that of evaluations.
        self._counted_from, self._since = self.step, time.perf_counter()
        progress = progress_bar(shown=self.group.is_main, total=self.steps, initial=self.step, unit='step')
        with StopSignals() as signals, progress:
            while self.step < self.steps:
                if self._evaluation_is_due():
                    before = time.perf_counter()
                    self._evaluate(run)
                    self._since += time.perf_counter() - before
                self.take_step()
                progress.update()
                if self.step % self.config.log_every == 0 or self.step == self.steps:
                    self._log(run, progress)
                if self._save_if_due(run, flags, signals):
                    flags.settle()
                    self.group.barrier()
                    raise Stopped(f'Stopped after step {self.step} of {self.steps}. The same command goes on from '
                                  'there.', signals.received or signal.SIGTERM)
            flags.settle()

    def export(self, folder: Path) -> M:
        """Have the objective write its weights to a run's folder as others load them; called on every process. Gives
        the whole model with the present weights, of use on the main process."""
        gather_weights(self.objective.model, self._whole)
        if self.group.is_main:
            self.objective.export(self._whole, folder)
        return self._whole

    def _start(self, run: Run) -> None:
        """Load the checkpoint that a run goes on from, if there is one, and say where it begins."""
        before, place = None, f'writing to {run.folder}'
        if run.state:
            self._state.load_state_dict(run.state, str(run.folder / CHECKPOINT))
            before, place = run.state.get('choices'), f'going on from step {self.step} of {self.steps} in {run.folder}'
        if self.choices.compile:
            run.say('Compiling the network, which takes a minute or two.')
        self.begin()
        self.choices = self.choices._replace(cache_on_device=self.batches.on_device)
        run.start(self.config.precision, choices=self.choices._asdict(), **self.objective.about)
        run.state = None  # as large as the model and its optimizer
        self._run = run
        run.say(f'{self.objective.title}; {self.group.world_size} x {self.group.device}, {self.config.precision}; '
                f'{place}')
        if before is not None and before != self.choices._asdict():
            run.say(f'Up to the checkpoint {Choices(**before).describe()}; from here on {self.choices.describe()}, so '
                    'that steps may round otherwise.')
        elif any(getattr(self.config, name, None) == 'auto' for name in Choices._fields) and any(self.choices):
            run.say(f'Chosen for this run: {self.choices.describe()}.')

    def _evaluation_is_due(self) -> bool:
        if self.step == 0:
            return self.objective.evaluated_untrained
        return self.eval_every > 0 and self.step % self.eval_every == 0

    def _evaluate(self, run: Run, again: bool = False) -> Evaluation:
        """Evaluate the model and log the scores, once for each number of images; `again` for the result alone."""
        self.losses.read()
        images = self.step * self.config.images_per_step
        known = self.group.on_main(lambda: any(
            line['event'] == 'evaluation' and line['images'] == images for line in run.log.lines))
        if known and not again:
            return Evaluation({})
        gather_weights(self.objective.model, self._whole, everywhere=True)
        evaluation = self.objective.evaluate(self._whole)
        self.network.train()
        if evaluation.scores:
            if not known:
                run.log.write(event='evaluation', images=images, **evaluation.scores)
            run.say(f'{images:>11,} images seen: {evaluation.text}')
        return evaluation

    def _log(self, run: Run, progress: tqdm) -> None:
        step, losses = self.step, self.losses.take()
        steps_per_second = (step - self._counted_from) / (time.perf_counter() - self._since)
        loss, rate = sum(losses) / len(losses), steps_per_second * self.config.images_per_step
        run.log.write(event='step', step=step, epoch=round(step / self.steps_per_epoch, 3),
                      images=step * self.config.images_per_step, loss=loss,
                      lr=max(float(group['lr']) for group in self.optimizer.param_groups),  # of groups, the highest
                      images_per_second=round(rate, 1))
        progress.set_postfix_str(f'epoch {(step - 1) // self.steps_per_epoch + 1}/{self.epochs}, loss {loss:.4f}, '
                                 f'{rate:.0f} images/s', refresh=False)
        self._counted_from, self._since = step, time.perf_counter()

    def _save_if_due(self, run: Run, flags: Flags, signals: StopSignals) -> bool:
        """Save a checkpoint when it is time, at the end, and when a signal asks for a stop; whether to stop."""
        step, minutes, every = self.step, self.config.checkpoint_every_minutes, self.config.checkpoint_every_steps
        stop, time_to_save = flags.exchange(
            signals.received is not None, 0 < minutes <= (time.monotonic() - self._last_save) / 60)
        if stop or time_to_save or (every and step % every == 0) or step == self.steps:
            # Reads the losses: nothing that follows a bad one is saved.
            run.save({**self._state.state_dict(), 'choices': self.choices._asdict()})
            if step < self.steps:
                self.export(run.folder)
            self._last_save = time.monotonic()
        return stop and step < self.steps

    def _explain(self, step: int) -> str:
        """Where a loss that is not finite came from, and what to do about it."""
        images = self.batches.describe(step * self.config.accumulate, self.config.accumulate)
        kept = 'No checkpoint was written yet.'
        if self._run is not None and (checkpoint := self._run.folder / CHECKPOINT).exists():
            kept = f'The last checkpoint before it is {checkpoint}, and what lies beside it is from then.'
        warmup = self.config.warmup_setting.replace('_', '-')
        return (f'(epoch {step // self.steps_per_epoch}, {images} of {self.config.data_name}): lower --lr '
                f'({self.config.lr:g}) or lengthen --{warmup} in a new run. {kept}')
