"""Does detection learn, and is its average precision COCO's?

Trains `autoreg-vit detect` on a few images of COCO and reports on the same images: an overfit, which shows that data,
model, loss and evaluation fit together, and says nothing about other images. The detections are then scored again by
pycocotools, from the files alone. Writes results/coco_mini-{cpu,gpu}.json and the learning curve; pictures of
detections stay in the run's folder, since the photographs are not ours to share. A run that was stopped goes on; a
finished one is not repeated.

    python -m benchmarks.coco_mini --data-dir FOLDER                    # 8 images, small: minutes on a CPU
    python -m benchmarks.coco_mini --data-dir FOLDER --gpu              # all images at 512 pixels, on a GPU
    python -m benchmarks.coco_mini --data-dir FOLDER --weights RUN/encoder

FOLDER holds train2017/ and annotations/instances_train2017.json, of the whole of COCO or a part of it.
"""

import argparse
import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from .report import RESULTS, provenance

SETTINGS = {
    # Eight images, small, always the same way round; a plain ViT-Tiny from initialisation, unless --weights says else.
    'cpu': {'images': 8, 'flags': ['--img-size', '160', '--batch-size', '2', '--rois', '32', '--steps', '800',
                                   '--jitter', '0.9', '1.1', '--hflip', '0', '--lr', '4e-3', '--device', 'cpu']},
    # Every image, with the heads of the published setting.
    'gpu': {'images': None, 'flags': ['--img-size', '512', '--batch-size', '16', '--rois', '256', '--width', '256',
                                      '--anchor-sizes', '16', '32', '64', '128', '256', '--window', '14', '--steps',
                                      '1500', '--jitter', '0.8', '1.25', '--lr', '2e-4', '--device', 'cuda']},
}
UNTRAINED = 'vit_tiny_patch16_224'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data-dir', required=True, type=Path)
    parser.add_argument('--weights', help=f'encoder to begin with; by default {UNTRAINED}, untrained')
    parser.add_argument('--gpu', action='store_true')
    parser.add_argument('--steps', type=int, help='other than the settings\'')
    args = parser.parse_args()
    size = 'gpu' if args.gpu else 'cpu'
    settings = SETTINGS[size]
    name = f'coco_mini-{size}' + (f'-{Path(args.weights).parent.name or args.weights}' if args.weights else '')
    folder = Path('runs', name)
    folder.mkdir(parents=True, exist_ok=True)
    annotations = write_part(args.data_dir / 'annotations' / 'instances_train2017.json', settings['images'], folder)
    command = [sys.executable, '-m', 'autoreg_vit', 'detect', '--config', 'maskrcnn_coco_mini', '--data-dir',
               str(args.data_dir), '--eval-split', 'train2017', '--train-annotations', str(annotations),
               '--eval-annotations', str(annotations), '--weights', args.weights or UNTRAINED, '--save-detections',
               '--output-dir', str(folder / 'run'), *settings['flags'], *([] if args.weights else ['--no-pretrained']),
               *(['--steps', str(args.steps)] if args.steps else [])]
    subprocess.run(command, check=True, env={**os.environ, 'OMP_NUM_THREADS': '1'} if size == 'cpu' else None)

    results = json.loads((folder / 'run' / 'results.json').read_text())
    log = [json.loads(line) for line in (folder / 'run' / 'log.jsonl').read_text().splitlines()]
    steps = [line for line in log if line['event'] == 'step']
    ours = {key: results[key] for key in results if key.startswith(('box_ap', 'mask_ap'))}
    theirs = pycocotools_scores(annotations, folder / 'run' / 'detections.json')
    difference = max(abs(ours[key] - theirs[key]) for key in ours)
    content = {
        **provenance(), 'what': 'trained and reported on the same images: an overfit',
        'command': ' '.join(command[1:]).replace(str(args.data_dir), 'FOLDER').replace(str(annotations), 'PART.json'),
        'images': results['train_images'], 'steps': results['steps'],
        'seconds': round(steps[-1]['time'] - log[0]['time']),
        'loss_first': steps[0]['loss'], 'loss_last': steps[-1]['loss'],
        'scores': ours, 'pycocotools': {key: round(theirs[key], 4) for key in ours},
        'largest_difference': round(difference, 6),
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f'{name}.json').write_text(json.dumps(content, indent=2) + '\n')
    shutil.copy(folder / 'run' / 'figures' / 'learning.png', RESULTS / f'{name}.png')
    print(json.dumps(content, indent=2))
    if difference > 1e-3:
        sys.exit('pycocotools scores the same detections otherwise')


def write_part(file: Path, images: int | None, folder: Path) -> Path:
    """The annotations of the first images with objects, all where None, as a file of their own."""
    content = json.loads(file.read_text())
    seen = {a['image_id'] for a in content['annotations'] if not a.get('iscrowd')}
    content['images'] = [image for image in content['images'] if image['id'] in seen][:images]
    kept = {image['id'] for image in content['images']}
    content['annotations'] = [a for a in content['annotations'] if a['image_id'] in kept]
    path = (folder / 'annotations.json').resolve()
    path.write_text(json.dumps(content))
    return path


def pycocotools_scores(annotations: Path, detections: Path) -> dict[str, float]:
    """Average precision in percent of a file of results, by COCO's own code."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    names = ('ap', 'ap50', 'ap75', 'ap_small', 'ap_medium', 'ap_large')
    scores, results = {}, json.loads(detections.read_text())
    if not results:
        sys.exit('Nothing was detected, and pycocotools scores no empty file: take more --steps')
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(annotations))
        for kind, iou_type in (('box', 'bbox'), ('mask', 'segm')):
            # With boxes, it would take the size of masks from them.
            found = truth.loadRes([{k: v for k, v in r.items() if kind == 'box' or k != 'bbox'} for r in results])
            evaluation = COCOeval(truth, found, iou_type)
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
            scores |= {f'{kind}_{name}': 100 * value for name, value in zip(names, evaluation.stats[:6].tolist())}
    return scores


if __name__ == '__main__':
    main()
