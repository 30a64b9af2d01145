"""What makes steps fast, and is chosen for the run at hand where its settings say `auto`: compiling the network,
replaying each step as one CUDA graph, keeping all images on the device."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..settings.base import read_settings
from ..settings.parts import Training
from .log import read_log
from .processes import Processes

#: Seconds that a run takes at least, at a rate that no plain step on one GPU passes, before compiling pays: that takes
#: one to two minutes, and saves a third of the time and more.
LONG, FLOPS_PER_SECOND = 300, 1e14
#: Steps before capturing pays, which takes some seconds.
MANY_STEPS = 100
NAMES = ('compile', 'cuda_graph', 'cache_on_device')


class Choices(NamedTuple):
    """What a run does; each of them a setting of that name."""
    compile: bool = False
    cuda_graph: bool = False
    cache_on_device: bool = False

    def describe(self) -> str:
        """In words, for a person."""
        words = {'compile': 'the network is compiled', 'cuda_graph': 'each step is replayed as one CUDA graph',
                 'cache_on_device': 'images are kept on the device'}
        return ', '.join(words[name] for name in NAMES if getattr(self, name)) or 'steps are taken as they are'


class Work(NamedTuple):
    """How much a run has to do, by which it is chosen what pays.

    Args:
        steps: Optimizer steps.
        flops: Of the whole run's forward and backward passes.
    """
    steps: int
    flops: float


def choose(config: Training, group: Processes, work: Work, say: Callable[[str], None]) -> Choices:
    """What to do of what the trainer itself does, compiling and capturing.

    What a setting says is done. Where it says `auto`, a run that goes on does what it began with, and another what pays
    on this device.

    Args:
        config: Settings of the run.
        group: Its processes.
        work: What it has to do.
        say: Takes the message that what a run began with is not possible here.
    """
    begun, refused = choices_of(config.output_dir), {
        'compile': cannot_compile(group.device), 'cuda_graph': cannot_capture(config, group)}
    pays = {'compile': work.flops >= LONG * FLOPS_PER_SECOND, 'cuda_graph': work.steps >= MANY_STEPS}
    chosen = {}
    for name, reason in refused.items():
        asked = getattr(config, name)
        if asked != 'auto':
            chosen[name] = asked
        elif name in begun:
            chosen[name] = begun[name] and not reason
            if begun[name] and reason:
                say(f'The run began with {name}, and goes on without it: {reason}. Steps may round otherwise '
                    'from here on.')
        else:
            chosen[name] = not reason and pays[name]
    return Choices(**chosen)


def choices_of(output_dir: str | None) -> dict[str, bool]:
    """What a run did, by the name of the setting: as its settings said, or as was chosen then and its log says; an
    empty one where there is no run."""
    if output_dir is None or not (Path(output_dir) / 'config.yaml').is_file():
        return {}
    settings, found = read_settings(Path(output_dir) / 'config.yaml'), {}
    for line in read_log(Path(output_dir) / 'log.jsonl'):
        found.update(line.get('choices', {}))
    found.update({name: settings[name] for name in NAMES if isinstance(settings.get(name), bool)})
    return found


def cannot_compile(device: torch.device) -> str:
    """Why compiling is not chosen on a device; '' where it is possible."""
    if device.type != 'cuda':
        return f'compiling is for GPUs, and this run is on {device.type}'
    if torch.cuda.get_device_capability(device) < (7, 0):
        return 'compiling needs a GPU of compute capability 7.0 or later'
    return ''


def cannot_capture(config: Training, group: Processes) -> str:
    """Why steps cannot be replayed as a CUDA graph; '' where they can be."""
    if group.device.type != 'cuda':
        return f'a CUDA graph needs a CUDA device, and this run is on {group.device.type}'
    if config.fsdp:
        return 'a CUDA graph does not hold a model that is sharded'
    if group.world_size > 1:
        return f'a CUDA graph is of one process, and these are {group.world_size}'
    if config.opt.lower() != 'adamw':
        return f'a CUDA graph needs the optimizer adamw, and this is {config.opt!r}'
    return ''


def reason_of(error: BaseException) -> str:
    """An error of another package in one line."""
    return f'{type(error).__name__}: {" ".join(str(error).split())[:300]}'


def chosen_before(before: dict[str, Any], now: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The settings of a run with what was chosen in place of `auto`, as far as `now` says otherwise than `auto`; where
    it says `auto`, it asks for whatever the run began with."""
    chosen = choices_of(str(folder))
    return {**before, **{name: now[name] if now[name] == 'auto' else chosen.get(name, before.get(name))
                         for name in NAMES if name in now}}
