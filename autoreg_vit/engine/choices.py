"""What makes steps fast, and is chosen for the run at hand where its settings say `auto`: compiling the network,
replaying each step as one CUDA graph, keeping all images on the device."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..errors import one_line
from ..settings.base import read_settings, with_added
from ..settings.parts import Training
from .log import read_log
from .processes import Processes

#: Seconds that compiling takes, one to two minutes, and those that it then saves for each value that a LayerNorm reads,
#: where memory moves so many bytes per second: an H100 saved 0.03 ns of ViT-B's and 0.07 of ViT-Tiny's ("a step on a
#: GPU" in benchmarks/README.md).
COMPILING, SAVED, BANDWIDTH = 100, 0.04e-9, 3e12
#: Steps before capturing pays, which takes some seconds.
MANY_STEPS = 100


class Choices(NamedTuple):
    """What a run does; each of them a setting of that name."""
    compile: bool = False
    cuda_graph: bool = False
    cache_on_device: bool = False

    def describe(self) -> str:
        """In words, for a person."""
        words = ('the network is compiled', 'each step is replayed as a CUDA graph', 'images are kept on the device')
        return ', '.join(said for said, chosen in zip(words, self) if chosen) or 'steps are taken as they are'


class Work(NamedTuple):
    """How much a process of a run has to do, by which it is chosen what pays: optimizer steps, and the values that the
    LayerNorms of all their forward passes read."""
    steps: int
    normed_values: float


def choose(config: Training, group: Processes, work: Work, say: Callable[[str], None]) -> Choices:
    """What to do of what the trainer itself does, compiling and capturing.

    What a setting says is done. Where it says `auto`, a run that goes on does what it began with, and another what pays
    on this device. `say` takes the message that what a run began with is not possible here.
    """
    begun = begun_with(config.output_dir, type(config))
    refused = {'compile': cannot_compile(group.device), 'cuda_graph': cannot_capture(config, group)}
    # Of several processes no captured step was timed, whose gradients wait for the end of the backward pass.
    pays = {'compile': group.device.type == 'cuda' and seconds_saved(work, group.device) >= COMPILING,
            'cuda_graph': work.steps >= MANY_STEPS and group.world_size == 1}
    chosen = {}
    for name, reason in refused.items():
        asked, before = getattr(config, name), begun.get(name)
        if asked != 'auto':
            chosen[name] = asked
        else:
            chosen[name] = not reason and (pays[name] if before is None else before)
            if before and reason:
                say(f'The run began with {name}, and goes on without it: {reason}. Steps may round otherwise '
                    'from here on.')
    return Choices(**chosen)


def seconds_saved(work: Work, device: torch.device) -> float:
    """About what a run on a GPU saves by being compiled, compiling aside: steps then read and write less."""
    properties = torch.cuda.get_device_properties(device)
    # Both edges of the clock, which is in kHz, move a word of so many bits; taken for an H100's where it is not told.
    bandwidth = 2e3 * properties.memory_clock_rate * properties.memory_bus_width / 8 or BANDWIDTH
    return work.normed_values * SAVED * BANDWIDTH / bandwidth


def begun_with(output_dir: str | Path | None, config_class: type) -> dict[str, Any]:
    """The settings of the run that a folder holds, those that said `auto` as it was chosen: by the last word of its
    log, which leaves out what has failed. Empty where there is no run; what is not chosen yet is left out."""
    if output_dir is None or not (Path(output_dir) / 'config.yaml').is_file():
        return {}
    chosen: dict[str, Any] = {}
    for line in read_log(Path(output_dir) / 'log.jsonl'):
        chosen.update(line.get('choices', {}))
    settings = with_added(read_settings(Path(output_dir) / 'config.yaml'), config_class)
    return {**chosen, **{name: value for name, value in settings.items() if value != 'auto'}}


def cannot_compile(device: torch.device) -> str:
    """Why a network cannot be compiled for a device; '' where it can."""
    if device.type == 'cuda' and torch.cuda.get_device_capability(device) < (7, 0):
        return 'compiling needs a GPU of compute capability 7.0 or later'
    return ''


def cannot_capture(config: Training, group: Processes) -> str:
    """Why steps cannot be replayed as a CUDA graph; '' where they can be."""
    if group.device.type != 'cuda':
        return f'a CUDA graph needs a CUDA device, and this run is on {group.device.type}'
    if config.fsdp:
        return 'a CUDA graph does not hold a model that is sharded'
    if config.opt.lower() != 'adamw':
        return f'a CUDA graph needs the optimizer adamw, and this is {config.opt!r}'
    return ''


def reason_of(error: BaseException) -> str:
    """An error of another package in one line."""
    return f'{type(error).__name__}: {one_line(error, 300)}'
