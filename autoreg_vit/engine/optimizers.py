"""The optimizer and the learning rate of a run: timm's, by the run's settings."""

from typing import Any, cast

import torch
from timm.optim import create_optimizer_v2, list_optimizers
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler

from ..errors import ConfigError, one_line, suggest
from ..settings.parts import Training


def create_optimizer(
        config: Training, model_or_groups: Any, capturable: bool = False, **options: Any,
) -> torch.optim.Optimizer:
    """timm's optimizer of that name at the scaled learning rate.

    Args:
        model_or_groups: A module, or groups of parameters.
        capturable: For steps that a CUDA graph replays.
        **options: Arguments of `create_optimizer_v2`.

    Raises:
        ConfigError: for an unknown name, or options that it does not take.
    """
    known = cast('list[str]', list_optimizers())  # with descriptions it would give pairs
    if config.opt.lower() not in known:
        raise ConfigError(f'Unknown optimizer {config.opt!r}. {suggest(config.opt, known)}')
    if config.betas is not None and 'adam' in config.opt.lower():
        options['betas'] = config.betas
        if config.opt.lower() == 'adamw':
            options['fused'] = True
    if config.layer_decay is not None:
        options['layer_decay'] = config.layer_decay
    if capturable:
        options['capturable'] = True
    try:
        return create_optimizer_v2(
            model_or_groups, opt=config.opt, lr=config.scaled(config.lr), weight_decay=config.weight_decay, **options)
    except (TypeError, ValueError) as error:  # an option that it does not have, or a value that it refuses
        raise ConfigError(f'The optimizer {config.opt!r} does not work with these settings: '
                          f'{one_line(error)}') from error


def create_schedule(config: Training, optimizer: torch.optim.Optimizer, steps_per_epoch: int) -> Scheduler:
    """Linear warm-up from 0, then a cosine or a line that begins where the warm-up ends and falls to `min_lr` at the
    last step (RandSAC Tables 12 to 16)."""
    return create_scheduler_v2(
        optimizer, decay_rate=1.0, warmup_prefix=True, warmup_lr=0.0, min_lr=config.scaled(config.min_lr),
        step_on_epochs=False, **config.schedule_options(steps_per_epoch))[0]
