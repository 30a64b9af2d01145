"""Every ablation of RandSAC and SAIM, and rows that neither has, as one table.

    python -m benchmarks.ablations --scale cpu --data-dir FOLDER [--rows random raster] [--seeds 3] [--minutes 120]
    python -m benchmarks.ablations --scale cpu --data-dir FOLDER --list      # what would run, in order, and its cost
    python -m benchmarks.ablations --scale cpu --data-dir FOLDER --final     # the same rows on the test split, once

FOLDER holds CIFAR-10 as class folders under train/ and test/; the scale smoke takes scikit-learn's digits instead. A
row is trained by `autoreg_vit.commands.pretraining`, and its frozen encoder is probed by
`autoreg_vit.commands.probing` on images held out of the training split, from pretraining too. The test split is read
with --final alone.

Rows are independent and resumable: each has a folder of its own under --work-dir, with every log. Finished ones are
left alone, and a row that another process is training is passed over, so that the same command may run several times at
once. `ablations_rows.py` has the rows; `ablations_report.py` writes the tables, claims and figures from what is
finished: benchmarks/results/ablations-SCALE.json, .md and -*.png.
"""

import argparse
import json
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from autoreg_vit.commands.pretraining import pretrain
from autoreg_vit.commands.probing import probe
from autoreg_vit.data.labelled import hold_out
from autoreg_vit.data.sources import Digits, open_dataset
from autoreg_vit.data.transforms import ImageSpec
from autoreg_vit.engine.locks import FolderLock
from autoreg_vit.engine.log import read_log
from autoreg_vit.engine.loss_history import NonFiniteLoss
from autoreg_vit.engine.signals import Stopped
from autoreg_vit.errors import ConfigError, UsageError, one_line, suggest
from autoreg_vit.evaluation.cached import CACHE
from autoreg_vit.hub.folders import export_encoder
from autoreg_vit.models import create_pretraining_model
from autoreg_vit.settings.classification import ProbeConfig
from autoreg_vit.settings.pretraining import PretrainConfig

from .ablations_mae import MaeConfig, pretrain_mae
from .ablations_report import write_report
from .ablations_rows import BASES, CLAIMS, ROWS, SCALES, Row, Scale
from .flops import training_gflops
from .report import RESULTS

MODELS = {'randsac': 'randsac_vit_tiny_patch4_32', 'saim': 'saim_vit_tiny_patch4_32'}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--scale', required=True, choices=SCALES)
    parser.add_argument('--data-dir', help='CIFAR-10 as class folders under train/ and test/')
    parser.add_argument('--data-name', default='CIFAR-10', help='as the results should call the images')
    parser.add_argument('--rows', nargs='+', metavar='ROW', help='of these alone, in this order; all by default')
    parser.add_argument('--seeds', type=int, help="seeds a row; by default the scale's for the main claims, else one")
    parser.add_argument('--minutes', type=float, default=float('inf'), help='begin no row that would end later')
    parser.add_argument('--final', action='store_true', help='evaluate finished rows on the test split')
    parser.add_argument('--list', action='store_true', help='show what would run, and run nothing')
    parser.add_argument('--work-dir', default='runs/ablations')
    parser.add_argument('--output-dir', default=str(RESULTS))
    args = parser.parse_args(argv)
    try:
        return _main(args)
    except UsageError as error:
        print(f'ablations: {one_line(error)}', file=sys.stderr)
        return 2
    except Stopped as stopped:
        print(f'ablations: {stopped}', file=sys.stderr)
        return 128 + stopped.signal_number


def _main(args: argparse.Namespace) -> int:
    scale, work = SCALES[args.scale], Path(args.work_dir, args.scale)
    runs = plan(scale, args.rows, args.seeds)
    flops = {row.name: step_flops(row, scale) for row in {row.name: row for row, _ in runs}.values()}
    if args.rows is None:
        reference = step_flops(find_row('randsac'), scale)
        runs = [(row, seed) for row, seed in runs if flops[row.name] <= scale.costly * reference]
    if args.list:
        return show_plan(runs, scale, flops, work)
    images = image_folder(args.scale, args.data_dir, work)
    begun = time.monotonic()
    for number, (row, seed) in enumerate(runs):
        left = args.minutes - (time.monotonic() - begun) / 60
        expected = expected_minutes(row, scale, flops, work)
        if expected is not None and expected > left and not finished(work / row.name / str(seed), args.final):
            print(f'{row.name}, seed {seed}: needs about {expected:.0f} minutes, and {left:.0f} are left.', flush=True)
            continue
        print(f'[{number + 1}/{len(runs)}] {row.name}, seed {seed}', flush=True)
        if run_row(row, seed, scale, work, images, flops[row.name], args.final):
            write_report(work, args.scale, Path(args.output_dir), data_name(args), 'test' if args.final else 'val')
    return 0


def data_name(args: argparse.Namespace) -> str:
    return "scikit-learn's digits" if args.scale == 'smoke' else args.data_name


def find_row(name: str) -> Row:
    names = [row.name for row in ROWS]
    if name not in names:
        raise ConfigError(f'Unknown row {name!r}. {suggest(name, names)}')
    return ROWS[names.index(name)]


def plan(scale: Scale, names: list[str] | None, seeds: int | None) -> list[tuple[Row, int]]:
    """Rows and seeds to run, most informative first: all seeds of the main claims' rows, then the other rows."""
    main = {name for claim in CLAIMS if claim.main for pair in claim.pairs for name in pair}
    rows = ROWS if names is None else [find_row(name) for name in names]
    wanted = [(row, seed) for row in rows
              for seed in range(seeds or (scale.seeds if row.name in main else 1))]
    return sorted(wanted, key=lambda run: run[0].name not in main) if names is None else wanted


def pretrain_settings(row: Row, scale: Scale) -> dict[str, Any]:
    """What PretrainConfig is made of, but for data, seed and folder."""
    settings = {**scale.model, **BASES[row.base], **row.settings}
    settings = {name: _sized(value, scale) for name, value in settings.items()}
    decoder = settings.get('decoder', 'masked' if settings['model'] == 'randsac' else 'parallel')
    if decoder == 'masked':
        settings.setdefault('decoder_depth', scale.sizes['DECODER'])
    settings['model'] = MODELS[settings['model']]
    epochs = scale.epochs if isinstance(scale.epochs, int) else scale.epochs[row.base]
    # A run for longer or shorter warms up for as large a part of itself.
    warmup = scale.pretrain.get('warmup_epochs', 0.1) * row.length
    return {**scale.pretrain, 'epochs': max(round(epochs * row.length), 1), 'warmup_epochs': warmup, **settings}


def _sized(value: Any, scale: Scale) -> Any:
    return scale.sizes[value] if isinstance(value, str) and value.isupper() else value


def step_flops(row: Row, scale: Scale) -> float:
    """GFLOPs of an image's training step."""
    if row.base == 'untrained':
        return 0.0
    return training_gflops((MaeConfig if row.base == 'mae' else PretrainConfig)(**pretrain_settings(row, scale)))


def image_folder(scale_name: str, data_dir: str | None, work: Path) -> Path:
    """A folder of train/, val/ (held out of the training split, the same images for every row) and test/, of links to
    the images, or of digits at the scale smoke."""
    folder, scale = work / 'images', SCALES[scale_name]
    if folder.exists():
        return folder
    work.mkdir(parents=True, exist_ok=True)
    scratch = work / f'images-{os.getpid()}'
    if scale_name == 'smoke':
        parts = {'train': (Digits('train', lambda image: image), 0), 'test': (Digits('test', lambda image: image), 0)}
        kept, held = hold_out(len(parts['train'][0]), scale.held_out / len(parts['train'][0]), 0)
        for split, part, indices in (('train', 'train', kept[:scale.train_images]), ('val', 'train', held),
                                     ('test', 'test', range(80))):
            for index in indices:
                image, label = parts[part][0][int(index)]
                _into(scratch / split / str(label), lambda path, image=image: image.save(path), f'{index}.png')
    else:
        if data_dir is None:
            raise ConfigError(f'The scale {scale_name} needs --data-dir, CIFAR-10 as class folders under train/ and '
                              'test/.')
        train = open_dataset('folder', data_dir, 'train', lambda image: image)
        open_dataset('folder', data_dir, 'test', lambda image: image)
        kept, held = hold_out(len(train), scale.held_out / len(train), 0)
        if scale.train_images:
            kept = np.random.default_rng(0).permutation(kept)[:scale.train_images]
        for split, indices in (('train', kept), ('val', held)):
            for index in indices:
                source = Path(train.samples[index][0]).resolve()
                _into(scratch / split / source.parent.name, lambda path, source=source: path.symlink_to(source),
                      source.name)
        (scratch / 'test').symlink_to(Path(data_dir, 'test').resolve())
    try:
        scratch.rename(folder)
    except OSError:  # another process was quicker
        shutil.rmtree(scratch)
    return folder


def _into(folder: Path, put: Any, name: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    put(folder / name)


def run_row(row: Row, seed: int, scale: Scale, work: Path, images: Path, gflops: float, final: bool) -> bool:
    """Train and probe a row, or finish what was begun; False where another process is at it."""
    folder = work / row.name / str(seed)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        lock = FolderLock(folder)
    except ConfigError:
        print('  another process is training it.', flush=True)
        return False
    try:
        config = dict(dataset='folder', data_dir=str(images), seed=seed, output_dir=str(folder / 'pretrain'),
                      check_images=0, log_every=10, **pretrain_settings(row, scale))
        note(folder, row=row.name, seed=seed, gflops_per_image=gflops, settings=pretrain_settings(row, scale))
        cpu = time.process_time()
        try:
            if row.base == 'untrained':
                export_untrained(PretrainConfig(**config))
            elif row.base == 'mae':
                pretrain_mae(MaeConfig(**config))
            else:
                pretrain(PretrainConfig(**config, eval_images=500))
        except NonFiniteLoss as error:
            note(folder, failed=str(error))
            return True
        finally:
            spent = json.loads((folder / 'row.json').read_text()).get('cpu_minutes', 0)
            note(folder, cpu_minutes=spent + (time.process_time() - cpu) / 60)
        for split in ('val', 'test') if final else ('val',):
            probe_split(folder, split, images, scale)
    finally:
        lock.release()
    return True


def export_untrained(config: PretrainConfig) -> None:
    """The encoder of a run as it is before its first step."""
    torch.manual_seed(config.seed)
    model = create_pretraining_model(config.model, **config.model_options())
    spec = ImageSpec.of(model)
    export_encoder(model.encoder, Path(config.output_dir) / 'encoder', mean=spec.mean, std=spec.std)


def probe_split(folder: Path, split: str, images: Path, scale: Scale) -> None:
    """Linear and kNN accuracy on a split, and which of its images the linear classifier gets right, which pairs rows
    image by image. The feature is the average of the tokens in every row, RandSAC's (B.2)."""
    if (folder / f'right-{split}.npy').exists():
        return
    result = probe(ProbeConfig(
        weights=str(folder / 'pretrain' / 'encoder'), dataset='folder', data_dir=str(images), train_split='train',
        eval_split=split, global_pool='avg', fast=True, check_images=0, seed=0,
        output_dir=str(folder / f'probe-{split}'), **scale.probe))
    classifier, features = load_file(result / 'classifier.safetensors'), load_file(result / CACHE)
    logits = features['test.features'] @ classifier['linear.weight'].T + classifier['linear.bias']
    np.save(folder / f'right-{split}.npy', (logits.argmax(1) == features['test.labels']).numpy())
    (result / CACHE).unlink()  # tens of megabytes a row, and quickly computed again


def note(folder: Path, **facts: Any) -> None:
    """Add facts to a row's row.json."""
    path = folder / 'row.json'
    before = json.loads(path.read_text()) if path.exists() else {}
    scratch = path.with_suffix('.new')
    scratch.write_text(json.dumps({**before, **facts}, indent=2) + '\n')
    scratch.replace(path)


def finished(folder: Path, final: bool) -> bool:
    return (folder / f'right-{"test" if final else "val"}.npy').exists()


def seen_images(row: Row, scale: Scale, work: Path) -> int:
    """Images that a row trains on, each as often as it is seen."""
    train = work / 'images' / 'train'
    count = scale.train_images or (sum(1 for _ in train.rglob('*.*')) if train.exists() else 45000)
    batch = scale.pretrain['batch_size']
    return 0 if row.base == 'untrained' else pretrain_settings(row, scale)['epochs'] * (count // batch) * batch


def expected_minutes(row: Row, scale: Scale, flops: dict[str, float], work: Path) -> float | None:
    """Of training a row, by the speed at which finished ones did their FLOPs; None while there is none."""
    speeds = []
    for path in work.glob('*/*/pretrain/log.jsonl'):
        steps = [line for line in read_log(path) if line['event'] == 'step']
        gflops = json.loads((path.parent.parent / 'row.json').read_text())['gflops_per_image']
        speeds += [gflops * line['images_per_second'] for line in steps[len(steps) // 2:]]
    if not speeds:
        return None
    return flops[row.name] * seen_images(row, scale, work) / float(np.median(speeds)) / 60


def show_plan(runs: list[tuple[Row, int]], scale: Scale, flops: dict[str, float], work: Path) -> int:
    total = 0.0
    print(f'{"row":<22}{"seed":>4}{"GFLOPs/image":>14}{"images":>10}  minutes of training')
    for row, seed in runs:
        minutes = expected_minutes(row, scale, flops, work)
        done = finished(work / row.name / str(seed), False)
        total += 0 if done else minutes or 0
        print(f'{row.name:<22}{seed:>4}{flops[row.name]:>14.3f}{seen_images(row, scale, work):>10,}  '
              + ('finished' if done else '?' if minutes is None else f'{minutes:.1f}'))
    print(f'{len(runs)} runs; ' + (f'{total:.0f} minutes of training to go' if total else 'no row has been timed yet'))
    return 0


if __name__ == '__main__':
    sys.exit(main())
