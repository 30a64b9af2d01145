"""A model spread over the processes of a run, by PyTorch's DistributedDataParallel or fully_shard (FSDP2)."""

import warnings
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from timm.layers import Mlp
from torch import nn
from torch.distributed.checkpoint import state_dict as whole_states
from torch.nn.parallel import DistributedDataParallel

from .._compat import own_buffers
from ..errors import CheckpointError, ConfigError, one_line
from .checkpoints import load_into, load_optimizer
from .objective import M
from .processes import Processes


def shard(model: nn.Module, group: Processes) -> None:
    """Shard parameters, gradients and optimizer state over the processes by FSDP2, in place; before the optimizer.

    Each MLP, two thirds of a block, is gathered by itself, and the rest at once: attention is given its limits by
    functions outside the blocks, so a block's own forward, where FSDP would gather it, never runs.

    Raises ConfigError without torchrun.
    """
    if group.control is None:
        raise ConfigError('fsdp shards a model over several processes: start them with torchrun --nproc-per-node N -m '
                          'autoreg_vit pretrain ..., or leave --fsdp out.')
    from torch.distributed.fsdp import fully_shard

    # It warns of sums in place, which would go around it; blocks add to their stream out of place.
    warnings.filterwarnings('ignore', r'FSDP2-wrapped module .* returned a view tensor')
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


class GradientMean:
    """Gradients of a model in one tensor, which one sum averages over the processes after the backward pass: instead of
    DistributedDataParallel, whose sums within it would have to be captured where a CUDA graph replays steps.

    Args:
        model: Whose gradients lie in that tensor from here on; takes the main process's weights and buffers.
    """

    def __init__(self, model: nn.Module, group: Processes):
        self.world_size = group.world_size
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        sizes = [-(-parameter.numel() // 64) * 64 for parameter in self.parameters]  # so that kernels can read vectors
        self.flat = torch.zeros(sum(sizes), dtype=self.parameters[0].dtype, device=group.device)
        self.parts = [part[:parameter.numel()].view_as(parameter)
                      for parameter, part in zip(self.parameters, self.flat.split(sizes))]
        for parameter, part in zip(self.parameters, self.parts):
            parameter.grad = part
        for tensor in [*model.parameters(), *model.buffers()]:
            dist.broadcast(tensor.detach(), src=0)

    def average(self) -> None:
        """Over the processes, in place; called on each. Raises RuntimeError where a gradient was replaced."""
        if any(parameter.grad is not part for parameter, part in zip(self.parameters, self.parts)):
            raise RuntimeError('A gradient no longer lies in the tensor that is averaged over the processes.')
        dist.all_reduce(self.flat)
        self.flat /= self.world_size

    def clear(self) -> None:
        """Zeros, before the next step."""
        self.flat.zero_()


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
    """Whole state of a model, not wrapped but sharded where `fsdp` says so, and of its optimizer; called on every
    process, complete on the main one."""
    kind = type(optimizer).__name__
    if not fsdp:
        return {'model': model.state_dict(), 'optimizer': {'kind': kind, 'optimizer': optimizer.state_dict()}}
    options = whole_states.StateDictOptions(full_state_dict=True, cpu_offload=True)
    kept = whole_states.get_optimizer_state_dict(model, optimizer, options=options)
    return {'model': whole_states.get_model_state_dict(model, options=options),
            'optimizer': {'kind': kind, 'optimizer': kept}}


def set_state(
        model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any], fsdp: bool, source: str,
) -> None:
    """Load what `get_state` gave; called on every process with the whole state. Raises CheckpointError for that of
    another model or optimizer."""
    if not fsdp:
        load_into(model, state['model'], source)
        load_optimizer(optimizer, state['optimizer'], source)
        return
    options = whole_states.StateDictOptions(full_state_dict=True)
    try:
        if state['optimizer']['kind'] != type(optimizer).__name__:
            raise ValueError(f'its optimizer is {state["optimizer"]["kind"]}, not {type(optimizer).__name__}')
        whole_states.set_model_state_dict(model, state['model'], options=options)
        whole_states.set_optimizer_state_dict(model, optimizer, state['optimizer']['optimizer'], options=options)
    except (ValueError, KeyError, RuntimeError) as error:
        raise CheckpointError(f'{source} does not fit this sharded model ({one_line(error, 300)}). Use '
                              'the settings the run began with, or another --output-dir.') from error


def gather_weights(model: M, whole: M, everywhere: bool = False) -> None:
    """Give `whole`, a copy of a model made before it was sharded, the present weights; nothing is to be done where it
    is the model itself. Called on every process, of use on the main one, or `everywhere`, on each device."""
    if whole is not model:
        options = whole_states.StateDictOptions(full_state_dict=True, cpu_offload=not everywhere)
        if state := whole_states.get_model_state_dict(model, options=options):
            whole.load_state_dict(state)
