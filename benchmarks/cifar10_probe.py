"""What pretraining is worth: probing and fine-tuning a pretrained encoder and an untrained one by the same protocol.

Runs `autoreg-vit probe` and `autoreg-vit finetune` on part of the training images, sized for a CPU, and writes the
accuracies on test images. Nothing is chosen by them: the fast probe's learning rate comes from held-out training
images, the rest is fixed below and the same for both encoders. Runs that are finished are not repeated.

    python -m benchmarks.cifar10_probe --data-dir FOLDER --weights RUN/encoder [--untrained vit_tiny_patch4_32_randsac]

FOLDER holds CIFAR-10 as class folders under train/ and test/; RUN is a pretraining run, such as
benchmarks/cifar10_order.py leaves under runs/cifar10_order/blobs.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

from .report import RESULTS, provenance

PROTOCOLS = {
    # Linear classifiers of cached features, a sweep of learning rates, and 20 nearest neighbours.
    'fast': ['probe', '--fast', '--train-images', '4000', '--epochs', '100', '--batch-size', '256'],
    # Table 16 cut short: a step's rate is its 6.4 (25.6 for 256 images), which its batch of 16,384 gives.
    'lars': ['probe', '--train-images', '2000', '--epochs', '4', '--batch-size', '64', '--lr', '25.6',
             '--warmup-epochs', '0.5', '--batch-norm', '--knn', '0', '--crop-scale', '0.2', '1.0'],
    # Table 15 cut short, without mixup, cutmix and RandAugment, which pay off in long schedules alone.
    'finetune': ['finetune', '--train-images', '4000', '--epochs', '3', '--batch-size', '32', '--lr', '8e-3',
                 '--warmup-epochs', '0.5', '--mixup', '0', '--cutmix', '0', '--auto-augment', 'none', '--crop-scale',
                 '0.2', '1'],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data-dir', required=True)
    parser.add_argument('--data-name', default='CIFAR-10', help='as the results should call the images')
    parser.add_argument('--weights', required=True)
    parser.add_argument('--weights-name', default='RandSAC, one epoch of CIFAR-10', help='as the results should say')
    parser.add_argument('--untrained', default='vit_tiny_patch4_32_randsac')
    parser.add_argument('--protocols', nargs='+', choices=PROTOCOLS, default=list(PROTOCOLS))
    parser.add_argument('--test-images', type=int, default=2000, help='drawn by the seed, the same for all rows')
    parser.add_argument('--work-dir', default='runs/cifar10_probe')
    parser.add_argument('--output', default=str(RESULTS / 'cifar10_probe.json'))
    args = parser.parse_args()

    encoders = {'untrained': ['--weights', args.untrained, '--no-pretrained'],
                'pretrained': ['--weights', args.weights]}
    rows = []
    for protocol in args.protocols:
        for name, weights in encoders.items():
            folder = Path(args.work_dir, f'{protocol}-{name}')
            command = [sys.executable, '-m', 'autoreg_vit', *PROTOCOLS[protocol], *weights, '--data-dir', args.data_dir,
                       '--eval-split', 'test', '--test-images', str(args.test_images), '--seed', '0',
                       '--output-dir', str(folder)]
            print(' '.join(command), flush=True)
            if subprocess.run(command).returncode != 0:
                sys.exit(f'The protocol {protocol!r} failed with the {name} encoder; see above.')
            found = json.loads((folder / 'results.json').read_text())
            lines = [json.loads(line) for line in (folder / 'log.jsonl').read_text().splitlines()]
            rows.append({
                'protocol': protocol, 'encoder': name, 'minutes': round((lines[-1]['time'] - lines[0]['time']) / 60, 1),
                **{k: found[k] for k in ('top1', 'top5', 'knn', 'loss', 'train_images', 'test_images', 'epochs',
                                         'learning_rate', 'held_out_top1', 'sweep') if k in found},
            })
            print(rows[-1], flush=True)
    result = {
        **provenance(), 'data': args.data_name, 'weights': args.weights_name,
        'threads': os.environ.get('OMP_NUM_THREADS'), 'runs': 1,
        'commands': {name: ' '.join(PROTOCOLS[name]) for name in args.protocols},
        'accuracy': 'percent of the test images; learning rates of the fast probe chosen on held-out training images',
        'rows': rows,
    }
    Path(args.output).write_text(json.dumps(result, indent=2) + '\n')


if __name__ == '__main__':
    main()
