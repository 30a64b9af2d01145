"""Whether training cares in which precision the residual stream is kept: pairs of runs of one seed.

    python -m benchmarks.residual_stream --data-dir FOLDER [--epochs 12] [--seeds 0 1] [--jobs 2]
        [--settings '{"depth": 2}'] [--output FILE]

Runs `autoreg-vit pretrain` with the recipe randsac-tiny-cifar10, with and without `residual_in_fp32`, for the same
images, orders and crops: in bfloat16 autocast on a device that is made for it. Elsewhere all is float32, but the stream
of every other run is rounded to bfloat16 after each sum, forward and backward, which alone is in question. Compared are
the mean loss of each epoch and the accuracies of frozen features on a held-out fifth of the training images. Runs are
made side by side, so that their speed says nothing. One that is finished is not repeated, and one that was stopped goes
on.
"""

import argparse
import contextlib
import itertools
import json
import multiprocessing
import statistics
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.nn import functional

from autoreg_vit.commands.pretraining import pretrain
from autoreg_vit.commands.recipes import load_recipe
from autoreg_vit.engine.log import read_log
from autoreg_vit.engine.machine import resolve_device, resolve_precision
from autoreg_vit.models import pretraining
from autoreg_vit.settings.pretraining import PretrainConfig

from .report import RESULTS, device_name, provenance, write_rows

RECIPE = 'randsac-tiny-cifar10'


@contextlib.contextmanager
def rounded_stream():
    """Inside, pretraining models begin a stream in bfloat16, and norms read it in float32, without autocast."""
    norm = functional.layer_norm
    with (mock.patch.object(pretraining, 'autocast_dtype', lambda device: torch.bfloat16),
          mock.patch.object(functional, 'layer_norm', lambda x, *arguments: norm(x.float(), *arguments))):
        yield


def train(folder: Path, settings: dict[str, Any], emulated: bool) -> dict[str, Any]:
    """What a run with these settings comes to."""
    with rounded_stream() if emulated else contextlib.nullcontext():
        pretrain(PretrainConfig(**{**load_recipe(RECIPE), **settings, 'output_dir': str(folder)}))
    lines = read_log(folder / 'log.jsonl')
    steps = [line for line in lines if line['event'] == 'step']
    accuracies = [line for line in lines if line['event'] == 'evaluation'][-1]
    losses = [statistics.fmean(line['loss'] for line in epoch)
              for _, epoch in itertools.groupby(steps, lambda line: -int(-line['epoch'] // 1))]
    return {'seed': settings['seed'], 'residual_in_fp32': settings['residual_in_fp32'], 'images': steps[-1]['images'],
            'linear': accuracies['linear'], 'knn': accuracies['knn'],
            'loss_by_epoch': [round(loss, 6) for loss in losses]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data-dir', type=Path, required=True, help='images with class folders under train/')
    parser.add_argument('--epochs', type=int, default=12)
    parser.add_argument('--seeds', type=int, nargs='+', default=[0, 1])
    parser.add_argument('--jobs', type=int, default=4, help='runs at once')
    parser.add_argument('--settings', type=json.loads, default={}, help='more settings of all runs, as JSON')
    parser.add_argument('--work-dir', type=Path, default=Path('runs/residual_stream'))
    parser.add_argument('--output', type=Path)
    args = parser.parse_args()
    args.work_dir.mkdir(parents=True, exist_ok=True)
    device = resolve_device('auto')
    precision = resolve_precision('auto', device)
    common = {'dataset': 'folder', 'data_dir': str(args.data_dir), 'epochs': args.epochs, 'precision': precision,
              'warmup_epochs': 2, 'workers': 0, 'check_images': 0, 'eval_images': 5000, **args.settings}
    tasks = []
    for seed, in_fp32 in itertools.product(args.seeds, (True, False)):
        settings = {**common, 'seed': seed, 'residual_in_fp32': in_fp32}
        folder = args.work_dir / f'{"float32" if in_fp32 else "bfloat16"}-{seed}'
        tasks.append((folder, settings, precision == 'float32' and not in_fp32))
    with multiprocessing.get_context('spawn').Pool(args.jobs, maxtasksperchild=1) as pool:
        rows = pool.starmap(train, tasks, chunksize=1)
    facts = {**provenance(), 'recipe': RECIPE, 'settings': {k: v for k, v in common.items() if k != 'data_dir'},
             'stream': 'rounded in float32 training' if precision == 'float32' else 'autocast'}
    write_rows(args.output or RESULTS / f'residual_stream-{device_name(device)}.json', facts, rows=rows)
    for row in rows:
        print('seed {seed}, {0}: last loss {1:.4f}, linear {linear:.2f} %, kNN {knn:.2f} %'.format(
            'float32' if row['residual_in_fp32'] else 'bfloat16', row['loss_by_epoch'][-1], **row))


if __name__ == '__main__':
    main()
