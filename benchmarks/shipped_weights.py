"""What trained weights are worth: probes, accuracy by block and fine-tuning of encoders that are there already.

    python -m benchmarks.shipped_weights --data-dir FOLDER --encoders randsac=RUN/encoder ... [--minutes 30]

FOLDER holds CIFAR-10 as class folders under train/ and test/. The features of each encoder are computed once, in
shards that are kept, and serve every measure of them: `autoreg-vit probe --fast` on the encoder's own feature and,
where that is a class token, on the mean of the tokens too; and the linear and kNN accuracy of the pooled output of each
block. Blocks are compared on training images alone, half of which the classifiers do not see. Fine-tuning is that of
`cifar10_weights.py` in little. What is finished is not repeated, and what a time limit or a kill cut short goes on
where it was; figures go to --output as they come in. Nothing is chosen by the test images.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch.utils.data import DataLoader, Subset

from autoreg_vit.commands.finetuning import finetune
from autoreg_vit.commands.probing import probe
from autoreg_vit.data.labelled import labelled_images
from autoreg_vit.data.transforms import ImageSpec
from autoreg_vit.engine.processes import Processes
from autoreg_vit.evaluation.cached import CACHE, fingerprint, keep_features
from autoreg_vit.evaluation.classifiers import knn_accuracy, linear_accuracy
from autoreg_vit.evaluation.features import Features, images_at_once
from autoreg_vit.hub.lookup import load_encoder
from autoreg_vit.settings.classification import FinetuneConfig, ProbeConfig

from .cifar10_weights import MEASURES, in_process
from .report import RESULTS, provenance

DEVICE = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
SHARD = 1000  # images whose features are written at a time
FAST, FINETUNE = MEASURES['cpu']['fast'][2], MEASURES['cpu']['finetune'][2]
# What of a results.json is kept.
KEPT = ('top1', 'top5', 'knn', 'loss', 'held_out_top1', 'train_images', 'test_images', 'epochs', 'learning_rate')
# Training images, drawn at random, by which blocks are compared; half fits the classifiers.
BLOCK_IMAGES = 8000


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data-dir', required=True)
    parser.add_argument('--data-name', default='CIFAR-10', help='as results should call the images')
    parser.add_argument('--encoders', nargs='+', required=True, metavar='NAME=WEIGHTS',
                        help='weights as --weights of autoreg-vit takes them, in the order of their worth')
    parser.add_argument('--measures', nargs='+', choices=STEPS, default=list(STEPS))
    parser.add_argument('--seeds', nargs='+', type=int, default=[0], help='of fine-tuning')
    parser.add_argument('--minutes', type=float, default=float('inf'), help='stop cleanly after so many')
    parser.add_argument('--work-dir', default='runs/shipped_weights')
    parser.add_argument('--output', default=str(RESULTS / 'shipped_weights.json'))
    args = parser.parse_args()
    encoders = dict(item.split('=', 1) for item in args.encoders)
    deadline = time.monotonic() + args.minutes * 60
    for measure in args.measures:
        for name, weights in encoders.items():
            print(f'{measure} of {name}', flush=True)
            finished = STEPS[measure](args, name, weights, deadline)
            write_results(args, encoders)
            if not finished:
                print('The time is over; the same command goes on from here.')
                return 0
    return 0


def measure_blocks(args: argparse.Namespace, name: str, weights: str, deadline: float) -> bool:
    """Linear and kNN accuracy of each block's pooled output on held-out training images; False where the time did not
    suffice."""
    if not compute_shards(args, name, weights, 'train', BLOCK_IMAGES, deadline):
        return False
    encoder = load_encoder(weights, num_classes=0)
    path = Path(args.work_dir, f'blocks-{name}.json')
    rows = json.loads(path.read_text()) if path.is_file() else []
    for pool in pools(encoder):
        for block in range(1, len(encoder.blocks) + 1):
            if any((row['pool'], row['block']) == (pool, block) for row in rows):
                continue
            if time.monotonic() > deadline:
                return False
            data = read(args, name, 'train', f'{pool}.{block}', BLOCK_IMAGES)
            fitted, held = zip(*(map(torch.Tensor.numpy, t.chunk(2)) for t in data))
            rows.append({'pool': pool, 'block': block, 'linear': round(linear_accuracy(fitted, held), 2),
                         'knn': round(knn_accuracy(fitted, held), 2)})
            path.write_text(json.dumps(rows))
    return True


def measure_features(args: argparse.Namespace, name: str, weights: str, deadline: float) -> bool:
    """Probe the encoder's features with each pooling."""
    if not all(compute_shards(args, name, weights, part, None, deadline) for part in ('train', 'test')):
        return False
    encoder = load_encoder(weights, num_classes=0)
    for pool in pools(encoder):
        folder = Path(args.work_dir, f'fast-{name}-{pool}')
        if not (folder / 'results.json').is_file():
            folder.mkdir(parents=True, exist_ok=True)
            sets = []
            for part in ('train', 'test'):
                drawn = read(args, name, part, pool)
                back = shuffled(len(drawn.labels)).argsort()
                sets.append(Features(drawn.features[back], drawn.labels[back]))
            keep_features(folder / CACHE, fingerprint(encoder), *sets)
            probe(ProbeConfig(**settings(args, weights), **FAST, global_pool=pool, output_dir=str(folder)))
            (folder / CACHE).unlink()
    return True


def measure_finetuning(args: argparse.Namespace, name: str, weights: str, deadline: float) -> bool:
    """Fine-tune with each seed."""
    for seed in args.seeds:
        folder = Path(args.work_dir, f'finetune-{name}-{seed}')
        status = in_process(finetune, FinetuneConfig, {
            **settings(args, weights), **FINETUNE, 'seed': seed, 'output_dir': str(folder)}, deadline)
        if status == 128 + 15:
            return False
        if status:
            sys.exit(status)
    return True


STEPS = {'blocks': measure_blocks, 'features': measure_features, 'finetune': measure_finetuning}


def settings(args: argparse.Namespace, weights: str) -> dict[str, Any]:
    return {'weights': weights, 'dataset': 'folder', 'data_dir': args.data_dir, 'eval_split': 'test', 'check_images': 0,
            'precision': 'float32', 'workers': 0 if DEVICE.type == 'cpu' else 2}


def compute_shards(
        args: argparse.Namespace, name: str, weights: str, part: str, count: int | None, deadline: float) -> bool:
    """Have the features of the first `count` images of a part, or all, in a drawn order, on disk; False where the time
    did not suffice."""
    encoder = load_encoder(weights, num_classes=0).eval().to(DEVICE)
    config = ProbeConfig(**settings(args, weights))
    images = labelled_images(config, ImageSpec.of(encoder, config.in_chans), Processes(torch.device('cpu')))
    dataset = {'train': images.plain, 'test': images.test}[part]
    order = shuffled(len(dataset)).tolist()
    for start in range(0, count or len(order), SHARD):
        path = shard(args, name, part, start)
        if path.is_file():
            continue
        if time.monotonic() > deadline:
            return False
        found = pooled_outputs(encoder, Subset(dataset, order[start:start + SHARD]))
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = path.with_name(path.name + '.new')
        save_file(found, scratch)
        scratch.replace(path)
    return True


def shuffled(count: int) -> torch.Tensor:
    """The order in which images are taken, so that the first ones are of all classes."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(0))


def pools(encoder: torch.nn.Module) -> list[str]:
    """The encoder's own feature, and the mean of the tokens where that is another one."""
    return list(dict.fromkeys([encoder.global_pool, 'avg']))


@torch.no_grad()
def pooled_outputs(encoder: torch.nn.Module, dataset: Subset) -> dict[str, torch.Tensor]:
    """Features [images, width] by name of the pooling, for block number i as 'POOL.i' (from 1, without the last norm),
    and 'labels'."""
    found: dict[str, list[torch.Tensor]] = {}
    for images, labels in DataLoader(dataset, images_at_once(DEVICE)):
        last, outputs = encoder.forward_intermediates(images.to(DEVICE), return_prefix_tokens=True, output_fmt='NLC')
        # timm gives the class token, where there is one, behind the others.
        outputs = [torch.cat(o[::-1], 1) if isinstance(o, tuple) else o for o in outputs]
        for pool in pools(encoder):
            for key, tokens in {pool: last, **{f'{pool}.{i}': t for i, t in enumerate(outputs, 1)}}.items():
                found.setdefault(key, []).append(encoder.pool(tokens, pool).cpu())
        found.setdefault('labels', []).append(labels)
    return {key: torch.cat(parts) for key, parts in found.items()}


def shard(args: argparse.Namespace, name: str, part: str, start: int) -> Path:
    return Path(args.work_dir, f'features-{name}', f'{part}-{start:05}.safetensors')


def read(args: argparse.Namespace, name: str, part: str, key: str, count: int | None = None) -> Features:
    """One feature of the first `count` images of a part, or all, in the order of `shuffled`."""
    found: dict[str, list[torch.Tensor]] = {key: [], 'labels': []}
    for path in sorted(shard(args, name, part, 0).parent.glob(f'{part}-*.safetensors')):
        with safe_open(path, 'pt') as file:
            for entry, parts in found.items():
                parts.append(file.get_tensor(entry))
    return Features(torch.cat(found[key])[:count], torch.cat(found['labels'])[:count])


def write_results(args: argparse.Namespace, encoders: dict[str, str]) -> None:
    """What is there so far, and by name what is not."""
    work, rows, missing = Path(args.work_dir), [], []
    for name in encoders:
        row: dict[str, Any] = {'encoder': name}
        for measure in ('fast', 'finetune'):  # by pooling, by seed
            found = {p.parent.name.rpartition('-')[2]: json.loads(p.read_text())
                     for p in sorted(work.glob(f'{measure}-{name}-*/results.json'))}
            row[measure] = {key: {k: v for k, v in result.items() if k in KEPT} for key, result in found.items()}
        path = work / f'blocks-{name}.json'
        row['blocks'] = json.loads(path.read_text()) if path.is_file() else []
        missing += [f'{measure} of {name}' for measure in ('fast', 'blocks', 'finetune') if not row[measure]]
        rows.append(row)
    content = {
        **provenance(), 'data': args.data_name, 'accuracy': 'percent of the test images; of blocks, of '
        f'{BLOCK_IMAGES // 2:,} training images that the classifiers, fitted to as many others, did not see',
        'measures': {'fast': FAST, 'finetune': FINETUNE}, 'not_run': missing, 'rows': rows,
    }
    Path(args.output).write_text(json.dumps(content, indent=2) + '\n')


if __name__ == '__main__':
    sys.exit(main())
