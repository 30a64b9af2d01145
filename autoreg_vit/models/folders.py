"""Folders of networks that are no timm models, segmenters and detectors: config.json says how to build one, and
model.safetensors holds its weights."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from ..checksums import verify_checksum, write_checksum
from ..errors import CheckpointError, UsageError

N = TypeVar('N', bound=nn.Module)
CONFIG, WEIGHTS = 'config.json', 'model.safetensors'


def save_network(model: nn.Module, folder: str | Path, config: dict[str, Any]) -> None:
    """Write a network as a folder that `load_network` reads.

    Args:
        model: Trained.
        folder: Made if it is not there.
        config: What builds the network again, as JSON.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file({k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}, folder / WEIGHTS)
    (folder / WEIGHTS).chmod(0o644)  # safetensors leaves 0600
    write_checksum(folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + '\n', encoding='utf-8')


def load_network(folder: str | Path, build: Callable[[dict[str, Any]], N], kind: str, command: str) -> N:
    """A network in evaluation mode, with the content of config.json as its `config`.

    Args:
        folder: As `save_network` wrote it.
        build: From that content to the network, with whatever weights.
        kind: What errors call the network.
        command: Of autoreg-vit, which writes such folders.

    Raises:
        CheckpointError: for a folder that is missing, of another network, or damaged.
    """
    folder = Path(folder)
    try:
        config = json.loads((folder / CONFIG).read_text(encoding='utf-8'))
        verify_checksum(folder / WEIGHTS)
        model = build(config)
        model.load_state_dict(load_file(folder / WEIGHTS))
    except UsageError:
        raise
    except (OSError, KeyError, ValueError, TypeError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(
            f'{folder} holds no whole {kind} ({type(error).__name__}: {" ".join(str(error).split())[:300]}): name the '
            f'folder model/ of a run of autoreg-vit {command}.') from error
    model.config = config
    return model.eval()
