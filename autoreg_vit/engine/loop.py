"""What every training command does alike: settle its settings, optimizer and schedule, and go through its steps with a
log, progress, checkpoints, and a clean stop on a signal."""

import os
import signal
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import timm
import torch
from timm.optim import create_optimizer_v2, list_optimizers
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler

from .. import __version__
from ..errors import ConfigError, suggest
from ..settings.classification import DenseConfig, RunConfig
from ..settings.pretraining import PretrainConfig
from .losses import Losses
from .machine import keep_freed_memory, resolve_precision
from .processes import Flags, Processes
from .progress import progress_bar
from .provenance import hardware, source_commit
from .run import Run
from .signals import Stopped, StopSignals

TrainConfig = PretrainConfig | RunConfig


def prepare(config: TrainConfig, group: Processes) -> None:
    """Resolve the settings that depend on the machine, in place, and seed what is drawn before training."""
    config.device, config.precision = group.device.type, resolve_precision(config.precision, group.device)
    if config.workers is None:
        share = max((os.cpu_count() or 1) // group.world_size, 1)
        config.workers = 0 if group.device.type == 'cpu' else min(share, 8)
    if group.device.type == 'cpu':
        keep_freed_memory()
    torch.backends.cudnn.deterministic = True
    timm.utils.random_seed(config.seed)
    if isinstance(config, DenseConfig):
        config.warmup_steps = min(config.warmup_steps, config.steps // 2)
    else:
        config.warmup_epochs = min(config.warmup_epochs, config.epochs / 2)


class Length(NamedTuple):
    """How long a run is, in optimizer steps.

    Args:
        steps: In all.
        eval_every: Between evaluations; 0, only at the end.
        epochs: Passes over the training images, begun ones counted as whole.
    """
    steps: int
    eval_every: int
    epochs: int


def length_of(config: TrainConfig, steps_per_epoch: int) -> Length:
    """The length of a run whose settings count in epochs, or in steps where they are those of dense prediction."""
    if isinstance(config, DenseConfig):
        return Length(config.steps, config.eval_every, -(-config.steps // steps_per_epoch))
    return Length(config.epochs * steps_per_epoch, config.eval_every * steps_per_epoch, config.epochs)


def scaled_lr(config: TrainConfig, lr: float) -> float:
    """The rate of a step from a rate for 256 images (RandSAC 5), or for 16 in dense prediction."""
    return lr * config.batch_size * config.accumulate / (16 if isinstance(config, DenseConfig) else 256)


def create_optimizer(config: TrainConfig, model_or_groups: Any, **options: Any) -> torch.optim.Optimizer:
    """timm's optimizer of that name at the scaled learning rate.

    Raises:
        ConfigError: for an unknown name, or options that it does not take.
    """
    if config.opt.lower() not in list_optimizers():
        raise ConfigError(f'Unknown optimizer {config.opt!r}. {suggest(config.opt, list_optimizers())}')
    try:
        return create_optimizer_v2(
            model_or_groups, opt=config.opt, lr=scaled_lr(config, config.lr), weight_decay=config.weight_decay,
            **options)
    except (TypeError, ValueError) as error:  # an option that it does not have, or a value that it refuses
        raise ConfigError(f'The optimizer {config.opt!r} does not work with these settings: '
                          f'{" ".join(str(error).split())}') from error


def adam_options(config: TrainConfig) -> dict[str, Any]:
    """What optimizers of Adam's kind take besides, and adamw alone."""
    options = {'betas': config.betas} if 'adam' in config.opt.lower() else {}
    return {**options, 'fused': True} if config.opt.lower() == 'adamw' else options


def create_schedule(
        config: TrainConfig,
        optimizer: torch.optim.Optimizer,
        steps_per_epoch: int,
        min_lr: float = 0.0,
) -> Scheduler:
    """Linear warm-up from 0, then a cosine that begins where the warm-up ends and falls to `min_lr`, which is scaled as
    the rate is, at the last step (RandSAC Tables 12 to 16); in dense prediction a line where the settings say so."""
    if isinstance(config, DenseConfig):
        sched = {'linear': 'poly', 'cosine': 'cosine'}[config.schedule]
        epochs, warmup, steps_per_epoch = config.steps, config.warmup_steps, 1
    else:
        sched, epochs, warmup = 'cosine', config.epochs, config.warmup_epochs
    return create_scheduler_v2(
        optimizer, sched=sched, num_epochs=epochs - warmup, decay_rate=1.0, warmup_prefix=True, warmup_epochs=warmup,
        warmup_lr=0.0, min_lr=scaled_lr(config, min_lr), step_on_epochs=False, updates_per_epoch=steps_per_epoch)[0]


def start(run: Run, config: TrainConfig, **more: Any) -> None:
    """Log where a run begins or goes on: versions, hardware and sizes, which a resume may change."""
    run.log.write(event='start' if run.state is None else 'resume', version=__version__, commit=source_commit(),
                  torch=torch.__version__, timm=timm.__version__, hardware=hardware(run.group.device),
                  device=str(run.group.device), processes=run.group.world_size, threads=torch.get_num_threads(),
                  precision=config.precision, **more)


def run_steps(
        config: TrainConfig,
        run: Run,
        losses: Losses,
        optimizer: torch.optim.Optimizer,
        steps_per_epoch: int,
        first_step: int,
        *,
        take_step: Callable[[int], torch.Tensor],
        evaluate: Callable[[int], Any],
        save: Callable[[int], None],
        evaluate_first: bool = False,
) -> None:
    """Take the steps of a run from `first_step` to its end.

    Args:
        config: Gives length, batch, and how often to log, evaluate and save.
        run: The run's folder.
        losses: Collects the losses; stands at `first_step`.
        optimizer: Gives the learning rate that is logged, the highest of its groups.
        steps_per_epoch: Optimizer steps.
        first_step: 0, or that of the checkpoint the run goes on from.
        take_step: From the number of a step to its loss, a scalar on the device: forward, backward, optimizer step.
        evaluate: Called with the number of steps taken, as often as `eval_every` says, but for the end.
        save: Called with the number of steps taken, when a checkpoint is due and at the end.
        evaluate_first: Evaluate before the first step too.

    Raises:
        NonFiniteLoss: when training diverges.
        Stopped: when SIGTERM or SIGINT asked any process for it, after a checkpoint.
    """
    group, (steps, eval_every, epochs) = run.group, length_of(config, steps_per_epoch)
    images_per_step = config.batch_size * config.accumulate
    flags, last_save, since = Flags(group, 2), time.monotonic(), (time.perf_counter(), first_step)
    progress = progress_bar(shown=group.is_main, total=steps, initial=first_step, unit='step')
    with StopSignals() as signals, progress:
        for step in range(first_step, steps):
            due = eval_every and step % eval_every == 0
            if due if step else evaluate_first:
                paused = time.perf_counter()
                evaluate(step)
                since = since[0] + time.perf_counter() - paused, since[1]

            losses.add(take_step(step))
            progress.update()

            done = step + 1
            if done % config.log_every == 0 or done == steps:
                values = losses.read()
                losses.values = []
                loss = sum(values) / len(values)
                rate = (done - since[1]) * images_per_step / (time.perf_counter() - since[0])
                run.log.write(event='step', step=done, epoch=round(done / steps_per_epoch, 3),
                              images=done * images_per_step, loss=loss,
                              lr=max(float(g['lr']) for g in optimizer.param_groups), images_per_second=round(rate, 1))
                progress.set_postfix_str(f'epoch {step // steps_per_epoch + 1}/{epochs}, loss {loss:.4f}, '
                                         f'{rate:.0f} images/s', refresh=False)
                since = time.perf_counter(), done

            minutes = (time.monotonic() - last_save) / 60
            stop, time_to_save = flags.exchange(
                signals.received is not None, 0 < config.checkpoint_every_minutes <= minutes)
            on_step = config.checkpoint_every_steps and done % config.checkpoint_every_steps == 0
            if stop or time_to_save or on_step or done == steps:
                save(done)
                last_save = time.monotonic()
            if stop and done < steps:
                flags.settle()
                group.barrier()
                raise Stopped(f'Stopped after step {done} of {steps}. The same command goes on from there.',
                              signals.received or signal.SIGTERM)
        flags.settle()
