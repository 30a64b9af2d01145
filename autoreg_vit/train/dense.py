"""What dense prediction shares besides `supervised`: its optional packages, its encoder, and the curves of a run."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from timm.models.vision_transformer import VisionTransformer

from ..errors import ConfigError
from .metrics import METRICS
from .supervised_config import DenseConfig
from .weights import load_encoder, source_config


def require(command: str, *packages: str) -> None:
    """Raise ConfigError where a command's packages are not installed.

    Args:
        command: As typed.
        *packages: Import names.
    """
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f'autoreg-vit {command} needs {" and ".join(missing)}: pip install "autoreg-vit[dense]".')


def dense_encoder(config: DenseConfig, **options: Any) -> tuple[VisionTransformer, dict[str, Any]]:
    """The encoder of a run as the neck takes it, and what makes it again: timm's `architecture` and its `model_args`.

    Args:
        config: Names the weights.
        **options: Arguments of `timm.create_model` that make it again too; those that are None are left out.

    Raises:
        UsageError: as `load_encoder`.
    """
    options = {'num_classes': 0, 'dynamic_img_size': True, **{k: v for k, v in options.items() if v is not None}}
    encoder = load_encoder(config.weights, config.pretrained, **options, drop_path_rate=config.drop_path_rate)
    if config.grad_checkpointing:
        encoder.set_grad_checkpointing()
    return encoder, {'architecture': encoder.pretrained_cfg['architecture'],
                     'model_args': {**source_config(config.weights).get('model_args', {}), **options}}


def learning_figure(runs: dict[str, Sequence[dict]], path: Path) -> None:
    """Loss and scores against images seen.

    Args:
        runs: Lines of log.jsonl by the name of the run; one or several to compare.
        path: File to write.
    """
    several = len(runs) > 1
    scores = [key for key, metric in METRICS.items()
              if metric.headline and any(key in line for lines in runs.values() for line in lines)]
    figure = Figure(figsize=(10, 3.8), layout='constrained')
    losses, right = figure.subplots(1, 2)
    for number, (name, lines) in enumerate(runs.items()):
        steps = [line for line in lines if line['event'] == 'step']
        losses.plot([line['images'] for line in steps], [line['loss'] for line in steps], color=f'C{number}',
                    label=name if several else None)
        evaluations = [line for line in lines if line['event'] == 'evaluation']
        for style, (key, marker) in enumerate(zip(scores, 'os^v')):
            points = [(line['images'], line[key]) for line in evaluations if key in line]
            if not points:
                continue
            label = f'{name}, {METRICS[key].label}' if several else METRICS[key].label
            right.plot(*zip(*points), marker=marker, linestyle=('-', '--', ':', '-.')[style],
                       color=f'C{number if several else style}', label=f'{label}: {points[-1][1]:.1f}')
    losses.set(xlabel='images seen', ylabel='loss', title='Training loss', ylim=(0, None))
    right.set(xlabel='images seen', ylabel='%', title='Evaluation, with the last score')
    for axis in (losses, right):
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=8)
    figure.savefig(path, dpi=130)
