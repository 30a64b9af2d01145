"""Weights for CIFAR-10: trained, measured once on the test images, and exported, beside MAE at equal epochs.

    python -m benchmarks.cifar10_weights --scale gpu --data-dir FOLDER --minutes 9.5     # again, until nothing is left
    python -m benchmarks.cifar10_weights --scale gpu --data-dir FOLDER --export weights  # when everything is finished

FOLDER holds CIFAR-10 as class folders under train/ and test/. Everything is done by the package's own commands, in an
order that gives the weights first; what is finished is not repeated, and what a time limit or a kill cut short goes on
where it was, so the GPU may be had in pieces of ten minutes. Accuracies go to --output as they come in. Nothing is
chosen by the test images: the fast probe's learning rate comes from held-out training images, the rest are the recipes.

Scale gpu: the bundled recipes (RandSAC Table 12, and SAIM, ViT-S and MAE optimised alike) for --epochs, with the step
captured in a CUDA graph; linear probing as in Table 16, 90 epochs, and fine-tuning as in Table 15, 100 epochs. Scale
cpu: ten epochs in smaller batches, a fast linear probe, and fine-tuning in little. MAE is transformers'
(`ablations_mae.py`), with the batches, augmentation, optimizer, schedule and decoder size of RandSAC. 'untrained' is
the encoder as it is initialised: fine-tuned, it is a supervised run of the same length.
"""

import argparse
import functools
import json
import multiprocessing
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from autoreg_vit.commands.finetuning import finetune
from autoreg_vit.commands.pretraining import pretrain
from autoreg_vit.commands.probing import probe
from autoreg_vit.commands.recipes import load_recipe
from autoreg_vit.engine.log import logged, read_log
from autoreg_vit.engine.loss_history import NonFiniteLoss
from autoreg_vit.engine.signals import Stopped
from autoreg_vit.errors import UsageError, one_line
from autoreg_vit.hub.card import training_hours
from autoreg_vit.hub.publishing import export
from autoreg_vit.settings.classification import FinetuneConfig, ProbeConfig
from autoreg_vit.settings.pretraining import PretrainConfig
from autoreg_vit.settings.weights import ExportConfig

from .ablations_mae import MaeConfig, pretrain_mae
from .flops import training_gflops
from .report import RESULTS, provenance

#: Recipe, and how it is trained, of each model in the order of their worth.
MODELS: dict[str, tuple[str, Callable, type]] = {
    'randsac': ('randsac-tiny-cifar10', pretrain, PretrainConfig),
    'mae': ('randsac-tiny-cifar10', pretrain_mae, MaeConfig),
    'saim': ('saim-tiny-cifar10', pretrain, PretrainConfig),
    'randsac-small': ('randsac-small-cifar10', pretrain, PretrainConfig),
}
PRETRAIN = {
    'gpu': {'cuda_graph': True, 'cache_on_device': True, 'compile': True, 'checkpoint_every_minutes': 2},
    'cpu': {'epochs': 10, 'batch_size': 64, 'lr': 4e-3, 'warmup_epochs': 0.5, 'precision': 'float32', 'device': 'cpu',
            'log_every': 50},
}
FAST = (probe, ProbeConfig, {'fast': True, 'epochs': 100, 'batch_size': 256})
#: Commands with the settings of each measure. In little, mixing and RandAugment are left out, which pay off in long
#: schedules alone, and a step's rate is 1e-3 for batches of 32.
MEASURES: dict[str, dict[str, tuple[Callable, type, dict[str, Any]]]] = {
    'gpu': {
        'fast': FAST,
        'linear': (probe, ProbeConfig, {**load_recipe('randsac', 'probe'), 'knn': 0}),
        'finetune': (finetune, FinetuneConfig, load_recipe('randsac', 'finetune')),
    },
    'cpu': {
        'fast': FAST,
        'finetune': (finetune, FinetuneConfig, {
            'train_images': 5000, 'epochs': 4, 'batch_size': 32, 'lr': 8e-3, 'warmup_epochs': 0.5, 'mixup': 0.0,
            'cutmix': 0.0, 'auto_augment': 'none', 'crop_scale': (0.2, 1.0)}),
    },
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--scale', required=True, choices=PRETRAIN)
    parser.add_argument('--data-dir', required=True)
    parser.add_argument('--data-name', default='CIFAR-10', help='as cards and results should call the images')
    parser.add_argument('--models', nargs='+', choices=MODELS, default=['randsac', 'mae', 'saim'])
    parser.add_argument('--measures', nargs='+', default=None, help='of those of the scale; all by default')
    parser.add_argument('--epochs', type=int, default=None, help="of pretraining; by default the scale's, 800 on a GPU")
    parser.add_argument('--minutes', type=float, default=float('inf'), help='stop cleanly after so many')
    parser.add_argument('--work-dir', default=None, help='runs/cifar10_weights-SCALE by default')
    parser.add_argument('--output', default=None, help='benchmarks/results/cifar10_weights-SCALE.json by default')
    parser.add_argument('--export', metavar='FOLDER', help='write the finished models, all but MAE, to FOLDER')
    args = parser.parse_args()
    work = Path(args.work_dir or f'runs/cifar10_weights-{args.scale}')
    epochs = args.epochs or PRETRAIN[args.scale].get('epochs', 800)
    deadline = time.monotonic() + args.minutes * 60
    runs = [(name, work / name) for name in args.models]
    measures = {name: MEASURES[args.scale][name] for name in args.measures or MEASURES[args.scale]}

    if args.export:
        for name, folder in runs:
            if name != 'mae':
                results = [work / f'{m}-{who}' / 'results.json' for m in measures for who in (name, 'untrained')]
                export(ExportConfig(
                    run=str(folder), folder=args.export, tag=f'cifar10_{epochs}ep', data=args.data_name,
                    data_id=('uoft-cs/cifar10',), results=tuple(str(r) for r in results if r.is_file())))
        return 0

    steps = []
    for name, folder in runs:
        _, function, config = MODELS[name]
        steps.append((function, config, {**pretrain_settings(name, args.scale, epochs), 'output_dir': str(folder)}))
    for measure, (function, config, settings) in measures.items():
        for name in ('untrained', *args.models):
            # One initialisation stands for all of a size; SAIM's differs by its class token alone.
            weights = {'weights': 'vit_tiny_patch4_32_randsac', 'pretrained': False} if name == 'untrained' else {
                'weights': str(work / name / 'encoder')}
            steps.append((function, config, {**settings, **weights, 'eval_split': 'test',
                                             'output_dir': str(work / f'{measure}-{name}')}))
    for number, (function, config, settings) in enumerate(steps):
        print(f'[{number + 1}/{len(steps)}] {settings["output_dir"]}', flush=True)
        settings = {**settings, 'dataset': 'folder', 'data_dir': args.data_dir, 'check_images': 0}
        status = in_process(function, config, settings, deadline)
        write_results(args, work, epochs, measures)
        if status == 128 + 15:
            print('The time is over; the same command goes on from here.')
            return 0
        if status:
            return status
    return 0


def pretrain_settings(name: str, scale: str, epochs: int) -> dict[str, Any]:
    """Of a model's pretraining, but for data and folder."""
    return {**load_recipe(MODELS[name][0]), **PRETRAIN[scale], 'epochs': epochs}


@functools.cache  # results are written after each step of the work, on a GPU that may be had for minutes
def gflops_per_image(name: str, scale: str, epochs: int) -> float:
    return training_gflops(MODELS[name][2](**pretrain_settings(name, scale, epochs)))


def in_process(function: Callable, config: type, settings: dict[str, Any], deadline: float) -> int:
    """Exit status of a command in a process of its own, which is told to stop at the deadline."""
    process = multiprocessing.get_context('spawn').Process(target=_run, args=(function, config, settings))
    process.start()
    process.join(None if deadline == float('inf') else max(deadline - time.monotonic(), 0))
    if process.is_alive():
        process.terminate()
        process.join()
    return abs(process.exitcode) if process.exitcode != -15 else 128 + 15  # told before it could listen


def _run(function: Callable, config: type, settings: dict[str, Any]) -> None:
    try:
        function(config(**settings))
    except (UsageError, NonFiniteLoss) as error:
        sys.exit(f'{settings["output_dir"]}: {one_line(error)}')
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        sys.exit(128 + stopped.signal_number)


def write_results(args: argparse.Namespace, work: Path, epochs: int, measures: dict[str, Any]) -> None:
    """What is there so far."""
    rows = []
    for name in ('untrained', *args.models):
        row: dict[str, Any] = {'encoder': name}
        log = work / name / 'log.jsonl'
        if name != 'untrained' and log.is_file():
            lines = read_log(log)
            last = next((line for line in reversed(lines) if line['event'] == 'step'), {})
            row |= {'epochs': epochs, 'finished': lines[-1]['event'] == 'finish',
                    'minutes': round(60 * training_hours(lines), 1), 'hardware': logged(lines, 'hardware'),
                    'commit': logged(lines, 'commit'), 'processes': lines[0].get('processes'),
                    'loss': last.get('loss'), 'images': last.get('images', 0),
                    'gflops_per_image': round(gflops_per_image(name, args.scale, epochs), 3)}
        for measure in measures:
            results = work / f'{measure}-{name}' / 'results.json'
            if results.is_file():
                found = json.loads(results.read_text())
                row[measure] = {k: found[k] for k in ('top1', 'top5', 'knn', 'loss', 'train_images', 'test_images',
                                                      'epochs', 'learning_rate') if k in found}
        rows.append(row)
    settings = {name: {k: v for k, v in setting.items() if k != 'output_dir'} for name, (_, _, setting) in
                measures.items()}
    content = {
        **provenance(), 'data': args.data_name, 'runs': 1, 'scale': args.scale,
        'pretraining': {name: MODELS[name][0] for name in args.models},
        'pretraining_changes': {**PRETRAIN[args.scale], 'epochs': epochs}, 'measures': settings, 'rows': rows,
    }
    path = Path(args.output or RESULTS / f'cifar10_weights-{args.scale}.json')
    path.write_text(json.dumps(content, indent=2) + '\n')


if __name__ == '__main__':
    sys.exit(main())
