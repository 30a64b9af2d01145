"""Does the order of prediction matter on real images? RandSAC's Tables 2 and 5 in little.

Pretrains the same model with the same budget of images in several orders, each by `autoreg-vit pretrain`, and writes
the accuracies of frozen features before and after. Nothing is chosen by looking at the test split: it is read once,
at the end of a fixed schedule.

    python -m benchmarks.cifar10_order --data-dir FOLDER [--orders blobs raster] [--epochs 1] [--processes 2]

FOLDER holds CIFAR-10 as class folders under train/ and test/.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

from .report import RESULTS, provenance

ORDERS = {
    'raster': ['--serialization', 'raster'],
    'random': ['--serialization', 'random'],
    'squares': ['--serialization', 'squares', '--segments', '16'],
    'blobs': ['--serialization', 'blobs', '--segments', '11', '5'],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data-dir', required=True)
    parser.add_argument('--data-name', default='CIFAR-10', help='as the results should call the images')
    parser.add_argument('--orders', nargs='+', choices=ORDERS, default=['blobs', 'raster'])
    parser.add_argument('--epochs', type=int, default=1)
    parser.add_argument('--processes', type=int, default=1, help='orders trained at a time, sharing the cores')
    parser.add_argument('--work-dir', default='runs/cifar10_order')
    parser.add_argument('--output', default=str(RESULTS / 'cifar10_order.json'))
    args = parser.parse_args()

    settings = ['--model', 'randsac_vit_tiny_patch4_32', '--data-dir', args.data_dir, '--eval-split', 'test',
                '--epochs', str(args.epochs), '--batch-size', '32', '--lr', '8e-3', '--betas', '0.9', '0.95',
                '--warmup-epochs', '0.1', '--seed', '0']
    threads = max((os.cpu_count() or 1) // args.processes, 1)
    waiting, running = list(args.orders), {}
    while waiting or running:
        while waiting and len(running) < args.processes:
            order = waiting.pop(0)
            command = [sys.executable, '-m', 'autoreg_vit', 'pretrain', *settings, *ORDERS[order],
                       '--output-dir', str(Path(args.work_dir, order))]
            print(' '.join(command), flush=True)
            running[order] = subprocess.Popen(command, env={**os.environ, 'OMP_NUM_THREADS': str(threads)})
        order = next(iter(running))
        if running.pop(order).wait() != 0:
            sys.exit(f'Pretraining in the order {order!r} failed; see above.')

    rows = []
    for order in args.orders:
        lines = [json.loads(line) for line in Path(args.work_dir, order, 'log.jsonl').read_text().splitlines()]
        evaluations = [line for line in lines if line['event'] == 'evaluation']
        steps = [line for line in lines if 'loss' in line]
        rows.append({
            'order': order, 'images_seen': steps[-1]['images'], 'last_loss': round(steps[-1]['loss'], 4),
            'minutes_of_training': round((evaluations[-1]['time'] - evaluations[0]['time']) / 60, 1),
            **{f'{metric}_{when}': round(line[metric], 2) for metric in ('linear', 'knn')
               for when, line in (('untrained', evaluations[0]), ('pretrained', evaluations[-1]))},
        })
        print(rows[-1])
    result = {
        **provenance(), 'data': args.data_name, 'command': ' '.join(settings[2:]).replace(args.data_dir, 'FOLDER'),
        'threads': threads, 'runs': 1,
        'accuracy': 'percent of 10,000 test images; classifiers fitted on 10,000 training images; kNN with 20 '
                    'neighbours; linear: logistic regression on standardised features',
        'rows': rows,
    }
    Path(args.output).write_text(json.dumps(result, indent=2) + '\n')


if __name__ == '__main__':
    main()
