"""What pretraining is worth to segmentation: `autoreg-vit segment` on CamVid from a pretrained encoder and without.

Sized for one core: images at a quarter of their size, crops of 64 x 64, two thousand of them a run. All runs share
seed, schedule and rate, fixed beforehand; layer decay, which holds the encoder's lower layers back, suits weights that
are good already, so that the encoder from scratch is trained without it too. Reported are the validation images; the
test images are not read. Writes results/camvid.json, the learning curves of these runs in one figure, and predictions
of the first encoder. A run that was stopped goes on; finished ones are not repeated, nor are rows that
results/camvid.json has of the same settings.

    OMP_NUM_THREADS=1 python -m benchmarks.camvid --data-dir FOLDER --encoders NAME=RUN/encoder ...

FOLDER holds images/{train,val}, annotations/{train,val} and info.json.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from autoreg_vit.engine.log import logged
from autoreg_vit.figures.plots import learning_figure

from .report import RESULTS, provenance

SETTINGS = ['--config', 'upernet_camvid', '--short-side', '90', '--crop-size', '64', '--stride', '56', '--batch-size',
            '8', '--lr', '1.4e-3', '--warmup-steps', '25', '--drop-path-rate', '0', '--decoder-channels', '64',
            '--seed', '0', '--log-every', '10', '--device', 'cpu']


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data-dir', required=True)
    parser.add_argument('--encoders', nargs='+', required=True, metavar='NAME=WEIGHTS',
                        help='names as the results should call them')
    parser.add_argument('--untrained', default='vit_tiny_patch4_32_randsac', help='timm name of the same encoder')
    parser.add_argument('--steps', type=int, default=250)
    parser.add_argument('--work-dir', default='runs/camvid')
    parser.add_argument('--output', default=str(RESULTS / 'camvid.json'))
    args = parser.parse_args()

    scratch = ['--weights', args.untrained, '--no-pretrained']
    encoders = dict(item.split('=', 1) for item in args.encoders)
    runs = {
        **{name: ['--weights', weights] for name, weights in encoders.items()},
        'from scratch': scratch,
        'from scratch, without layer decay': [*scratch, '--layer-decay', '1'],
    }
    shared = [*SETTINGS, '--steps', str(args.steps), '--eval-every', str(max(args.steps // 2, 1))]
    output, logs = Path(args.output), {}
    before = json.loads(output.read_text()) if output.is_file() else {}
    rows = before['rows'] if before.get('command') == ' '.join(shared) else []
    for name, flags in runs.items():
        if any(row['encoder'] == name for row in rows):
            continue
        folder = folder_of(args, name)
        command = [sys.executable, '-m', 'autoreg_vit', 'segment', *shared, *flags, '--data-dir', args.data_dir,
                   '--output-dir', str(folder)]
        print(' '.join(command), flush=True)
        if subprocess.run(command).returncode != 0:
            sys.exit(f'The run {name!r} failed; see above.')
        found = json.loads((folder / 'results.json').read_text())
        logs[name] = [json.loads(line) for line in (folder / 'log.jsonl').read_text().splitlines()]
        steps = [line for line in logs[name] if line['event'] == 'step']
        rows.append({
            'encoder': name, **{key: logged(logs[name], key) for key in ('commit', 'torch', 'hardware')},
            **{key: found[key] for key in ('miou', 'pixel_accuracy', 'iou', 'test_images')},
            'images_seen': steps[-1]['images'], 'last_loss': round(steps[-1]['loss'], 4),
            'minutes': round((logs[name][-1]['time'] - logs[name][0]['time']) / 60, 1),
        })
        print(rows[-1], flush=True)
    learning_figure(logs, output.with_name(f'{output.stem}-learning.png'))
    shutil.copy(folder_of(args, next(iter(encoders))) / 'figures' / 'predictions.png',
                output.with_name(f'{output.stem}-predictions.png'))
    result = {
        **provenance(), 'data': 'CamVid', 'threads': os.environ.get('OMP_NUM_THREADS'),
        'command': ' '.join(shared), 'runs': 'one each',
        'scores': 'percent, at the size of the masks; validation images', 'rows': rows,
    }
    output.write_text(json.dumps(result, indent=2) + '\n')


def folder_of(args: argparse.Namespace, name: str) -> Path:
    return Path(args.work_dir, name.replace(', ', '-').replace(' ', '_'))


if __name__ == '__main__':
    main()
