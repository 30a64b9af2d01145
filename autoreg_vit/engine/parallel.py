"""A model spread over the processes of a run, by PyTorch's DistributedDataParallel or fully_shard (FSDP2)."""

import copy
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Generic

import torch
import torch.distributed as dist
from timm.layers import Mlp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.nn.parallel import DistributedDataParallel

from .._compat import own_buffers
from ..errors import CheckpointError, ConfigError
from .checkpoints import load_into, load_optimizer, optimizer_state
from .objective import M
from .processes import Processes


def shard(model: nn.Module, group: Processes) -> None:
    """Shard parameters, gradients and optimizer state over the processes by FSDP2, in place; before the optimizer.

    Each MLP, two thirds of a block, is gathered by itself, and the rest at once: attention is given its limits by
    functions outside the blocks, so a block's own forward, where FSDP would gather it, never runs.

    Raises:
        ConfigError: without torchrun.
    """
    if group.control is None:
        raise ConfigError('fsdp shards a model over several processes: start them with torchrun --nproc-per-node N -m '
                          'autoreg_vit pretrain ..., or leave --fsdp out.')
    from torch.distributed.fsdp import fully_shard

    for module in model.modules():
        if isinstance(module, Mlp):
            fully_shard(module)
    fully_shard(model)


def replicate(model: nn.Module, group: Processes) -> nn.Module:
    """DistributedDataParallel around `model`, or `model` itself where there is one process."""
    if group.world_size == 1:
        return model
    ids = [group.device.index] if group.device.type == 'cuda' else None
    return DistributedDataParallel(model, ids, gradient_as_bucket_view=True, **own_buffers())


def share_buffers(model: nn.Module, group: Processes) -> None:
    """Give all processes the main one's buffers: a batch norm has statistics of its own on each."""
    if group.world_size > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)


def synchronised(model: nn.Module, last: bool) -> AbstractContextManager:
    """The context of a forward and backward pass: gradients are summed over processes in the `last` of a step."""
    if isinstance(model, DistributedDataParallel) and not last:
        return model.no_sync()
    synchronise = getattr(model, 'set_requires_gradient_sync', None)  # fully_shard's
    if synchronise is not None:
        synchronise(last)
    return nullcontext()


def get_state(model: nn.Module, optimizer: torch.optim.Optimizer, fsdp: bool) -> dict[str, Any]:
    """Whole model and optimizer state; called on every process, complete on the main one.

    Args:
        model: Not wrapped.
        optimizer: Of its parameters.
        fsdp: Whether it is sharded.
    """
    if not fsdp:
        return {'model': model.state_dict(), 'optimizer': optimizer_state(optimizer)}
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return {'model': get_model_state_dict(model, options=options),
            'optimizer': {'kind': type(optimizer).__name__,
                          'optimizer': get_optimizer_state_dict(model, optimizer, options=options)}}


def set_state(
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        state: dict[str, Any],
        fsdp: bool,
        source: str,
) -> None:
    """Load what `get_state` gave; called on every process with the whole state.

    Raises:
        CheckpointError: for the state of another model or optimizer.
    """
    if not fsdp:
        load_into(model, state['model'], source)
        load_optimizer(optimizer, state['optimizer'], source)
        return
    options = StateDictOptions(full_state_dict=True)
    try:
        if state['optimizer']['kind'] != type(optimizer).__name__:
            raise ValueError(f'its optimizer is {state["optimizer"]["kind"]}, not {type(optimizer).__name__}')
        set_model_state_dict(model, state['model'], options=options)
        set_optimizer_state_dict(model, optimizer, state['optimizer']['optimizer'], options=options)
    except (ValueError, KeyError, RuntimeError) as error:
        raise CheckpointError(f'{source} does not fit this sharded model ({" ".join(str(error).split())[:300]}). Use '
                              'the settings the run began with, or another --output-dir.') from error


class WholeModel(Generic[M]):
    """The model as one process can run and save it: itself, or under FSDP a copy with the gathered weights."""

    def __init__(self, model: M, fsdp: bool):
        self.model, self.fsdp = model, fsdp
        self.copy = copy.deepcopy(model) if fsdp else model  # made before sharding

    def gather(self, everywhere: bool = False) -> M:
        """The whole model with the present weights; called on every process, of use on the main one, or `everywhere`,
        where each device holds it whole."""
        if self.fsdp:
            state = get_model_state_dict(
                self.model, options=StateDictOptions(full_state_dict=True, cpu_offload=not everywhere))
            if state:
                self.copy.load_state_dict(state)
        return self.copy
