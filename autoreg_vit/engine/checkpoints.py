"""Checkpoints that survive a kill at any moment: beside `last.pt` stand `last.pt.sha256`, as `sha256sum` writes and
checks it, and the one before it, `last.previous.pt`. Whenever a save is killed, one of them is whole."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..artifacts import check_regular, checksum_path, read_checksum, sha256_of, sync, write_checksum, write_file
from ..errors import CheckpointError, one_line


def save_checkpoint(state: dict[str, Any], path: Path) -> None:
    """Save `state`, which `weights_only` loading must be able to read, as the newest checkpoint at `path`; the one that
    stood there becomes the previous one.

    Raises:
        CheckpointError: for a target that is no regular file, or a write that failed, on a full disk for one; what
            was there before is left whole.
    """
    for target in (path, previous_of(path)):
        check_regular(target)
    new = _beside(path, '.new')
    write_file(new, lambda file: torch.save(state, file))
    # After every single step below some whole file has its checksum in the folder, and loading looks at them all.
    if path.exists():
        digest = read_checksum(path)
        os.replace(path, previous_of(path))
        if digest is not None:
            write_checksum(previous_of(path), digest)
    os.replace(new, path)
    os.replace(checksum_path(new), checksum_path(path))
    sync(path.parent)


def load_checkpoint(path: Path, say: Callable[[str], None] = print) -> dict[str, Any] | None:
    """The newest whole checkpoint at `path`, on the CPU, or None where there never was one.

    `say` takes the message that the newest one is damaged and the previous one is used.

    Raises:
        CheckpointError: where there are only damaged ones, naming each and its damage.
    """
    candidates = (path, _beside(path, '.new'), previous_of(path))
    # A kill between two renames leaves a file beside the checksum of another.
    known = {read_checksum(candidate) for candidate in candidates} - {None}
    damages = []
    for candidate in (each for each in candidates if each.exists()):
        check_regular(candidate)
        try:
            if not known:
                raise CheckpointError(
                    f'{candidate} has no checksum beside it. If you trust the file, make one: '
                    f'sha256sum {candidate.name} > {checksum_path(candidate).name}')
            if sha256_of(candidate) not in known:
                raise CheckpointError(f'{candidate} does not match its checksum in {checksum_path(candidate).name}: '
                                      'it is damaged or was changed.')
            state = load_file(candidate)
        except CheckpointError as error:
            if candidate != _beside(path, '.new'):  # an unfinished save is no damage
                damages.append(str(error))
            continue
        for damage in damages:
            say(f'{damage} Going on from {candidate.name}.')
        return state
    if damages:
        raise CheckpointError(' '.join(damages) + ' No whole checkpoint is left: restore one from a copy, or remove '
                              f'{path.parent} to start anew.')
    return None


def load_file(path: Path) -> Any:
    """`torch.load` of tensors and plain values alone, on the CPU; raises CheckpointError for every way in which that
    fails, naming the file."""
    try:
        return torch.load(path, map_location='cpu', weights_only=True)
    except Exception as error:  # UnpicklingError, EOFError, RuntimeError, IndexError, ... by the kind of damage
        reason = one_line(error, 200) or 'it ends too early'
        raise CheckpointError(
            f'Cannot read the checkpoint {path} ({type(error).__name__}: {reason}). It is truncated, or not a file of '
            'tensors and plain values; nothing else is loaded, since a pickle can run code.') from error


def previous_of(path: Path) -> Path:
    """Where the checkpoint before the one at `path` is kept: last.previous.pt for last.pt."""
    return path.with_name(f'{path.stem}.previous{path.suffix}')


def load_into(
        model: torch.nn.Module, state_dict: dict[str, torch.Tensor], source: str,
        remedy: str = 'Give the model its settings, or another --output-dir.',
) -> None:
    """Load all of `state_dict` into `model`; raises CheckpointError for parameters that are missing, foreign or of
    another shape, naming them."""
    own = model.state_dict()
    found = {'missing': sorted(own.keys() - state_dict.keys()), 'unexpected': sorted(state_dict.keys() - own.keys()),
             'of another shape': [f'{k} {tuple(state_dict[k].shape)} for {tuple(v.shape)}' for k, v in own.items()
                                  if k in state_dict and state_dict[k].shape != v.shape]}
    if problems := [f'{what}: {_few(names)}' for what, names in found.items() if names]:
        raise CheckpointError(f'{source} belongs to another model; {"; ".join(problems)}. {remedy}')
    model.load_state_dict(state_dict)


def load_optimizer(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any], source: str) -> None:
    """Load `state_dict`, or raise CheckpointError where it is of another kind of optimizer, or of other parameters."""
    try:
        kept = state_dict['optimizer']
        if state_dict['kind'] != type(optimizer).__name__:
            raise ValueError(f'it is of {state_dict["kind"]}, not {type(optimizer).__name__}')
        optimizer.load_state_dict(kept)
        for parameter, values in optimizer.state.items():
            for name, value in values.items():
                if torch.is_tensor(value) and value.ndim and value.shape != parameter.shape:
                    raise ValueError(f'its {name} has the shape {tuple(value.shape)} for a parameter of '
                                     f'{tuple(parameter.shape)}')
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f'The optimizer state of {source} does not fit ({one_line(error)}). Use the '
                              'settings the run began with, or another --output-dir.') from error


def _beside(path: Path, suffix: str) -> Path:
    return path.with_name(path.name + suffix)


def _few(names: list[str], most: int = 5) -> str:
    return ', '.join(names[:most]) + (f' and {len(names) - most} more' if len(names) > most else '')
