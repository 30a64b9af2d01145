"""Whether training cares in which precision the residual stream is kept: pairs of runs of one seed.

    python -m benchmarks.residual_stream --data-dir FOLDER [--epochs 15] [--seeds 0 1] [--output FILE]
        [--settings '{"depth": 2}']

Runs `autoreg-vit pretrain` with the recipe randsac-tiny-cifar10 in bfloat16 autocast, with and without
`--residual-in-fp32`, for the same images, orders and crops. All runs share the device side by side, so that their speed
says nothing. Compared are the mean loss of each epoch and the accuracies of frozen features on a held-out fifth of the
training images. A run that is finished is not repeated, and one that was stopped goes on.
"""

import argparse
import itertools
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
import yaml

from autoreg_vit.commands.recipes import load_recipe
from autoreg_vit.engine.log import read_log

from .gpu.jobs import Job
from .report import RESULTS, device_name, provenance, write_rows

RECIPE = 'randsac-tiny-cifar10'


def start(folder: Path, settings: dict[str, Any]) -> Job:
    """`autoreg-vit pretrain` with the recipe's settings and these, in `folder`."""
    path = folder.with_suffix('.yaml')
    path.write_text(yaml.safe_dump({**load_recipe(RECIPE), **settings}), encoding='utf-8')
    return Job(['autoreg_vit', 'pretrain', '--config', str(path), '--output-dir', str(folder)],
               folder.with_suffix('.log'))


def row_of(folder: Path, seed: int, in_fp32: bool) -> dict[str, Any]:
    """What a finished run has come to."""
    lines = read_log(folder / 'log.jsonl')
    steps = [line for line in lines if line['event'] == 'step']
    accuracies = [line for line in lines if line['event'] == 'evaluation'][-1]
    losses = [statistics.fmean(line['loss'] for line in epoch)
              for _, epoch in itertools.groupby(steps, lambda line: -int(-line['epoch'] // 1))]
    return {'seed': seed, 'residual_in_fp32': in_fp32, 'images': steps[-1]['images'], 'linear': accuracies['linear'],
            'knn': accuracies['knn'], 'loss_by_epoch': [round(loss, 6) for loss in losses]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data-dir', type=Path, required=True, help='images with class folders under train/')
    parser.add_argument('--epochs', type=int, default=15)
    parser.add_argument('--seeds', type=int, nargs='+', default=[0, 1])
    parser.add_argument('--settings', type=json.loads, default={}, help='more settings of all runs, as JSON')
    parser.add_argument('--work-dir', type=Path, default=Path('runs/residual_stream'))
    parser.add_argument('--output', type=Path)
    args = parser.parse_args()
    args.work_dir.mkdir(parents=True, exist_ok=True)
    common = {'dataset': 'folder', 'data_dir': str(args.data_dir), 'epochs': args.epochs, 'precision': 'bfloat16',
              'warmup_epochs': 2, 'workers': 0, 'check_images': 0, 'eval_images': 5000, **args.settings}
    jobs = {(seed, in_fp32): start(args.work_dir / f'{"float32" if in_fp32 else "bfloat16"}-{seed}',
                                   {**common, 'seed': seed, 'residual_in_fp32': in_fp32})
            for seed in args.seeds for in_fp32 in (True, False)}
    while any(job.process.poll() is None for job in jobs.values()):
        time.sleep(0.5)
    if failed := [job for job in jobs.values() if job.process.returncode]:
        sys.exit(f'{failed[0].log}: {failed[0].last_words()}')
    device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    rows = [row_of(job.log.with_suffix(''), *key) for key, job in jobs.items()]
    write_rows(args.output or RESULTS / f'residual_stream-{device_name(device)}.json',
               {**provenance(), 'recipe': RECIPE, 'settings': args.settings, 'epochs': args.epochs}, rows=rows)
    for row in rows:
        print('seed {seed}, {0}: last loss {1:.4f}, linear {linear:.2f} %, kNN {knn:.2f} %'.format(
            'float32' if row['residual_in_fp32'] else 'bfloat16', row['loss_by_epoch'][-1], **row))


if __name__ == '__main__':
    main()
