"""The queue's pretraining run: its pace from timed steps, its epochs from its share of the minutes, its archive."""

import io
import shutil
import statistics
import tarfile
import time
from pathlib import Path
from typing import Any

import yaml

from autoreg_vit.artifacts import sha256_of
from autoreg_vit.commands.recipes import load_recipe
from autoreg_vit.engine.log import read_log

from .jobs import Job
from .sitting import Sitting
from .state import MOST_FILE_MIB, MOST_FILES

RECIPE = 'randsac-tiny-cifar10'
#: Steps are timed over so many epochs.
PACE_EPOCHS = 3
#: Seconds from a run's first evaluation to its first steps where all that it compiles is in the cache: measured once.
CACHED_COMPILE = 8
#: Left out of the archive: made again from the whole model where it comes back, or of no use there.
LEFT_OUT = ('last.pt', 'last.previous.pt', 'tensorboard')
ARCHIVE = 'run.tar'


def start(sitting: Sitting, name: str, epochs: int) -> Job:
    """Begin or resume a run of so many epochs in `work/NAME`."""
    settings = {**load_recipe(RECIPE), **sitting.size.run, 'dataset': 'folder', 'data_dir': str(sitting.data),
                'epochs': epochs}
    path = sitting.work / f'{name}.yaml'
    path.write_text(yaml.safe_dump(settings), encoding='utf-8')
    return sitting.start(name, 'autoreg_vit', 'pretrain', '--config', str(path), '--output-dir',
                         str(sitting.work / name))


def pace_of(folder: Path, seconds: float) -> dict[str, float]:
    """Images a second of a short run's steps, images of an epoch, and the seconds that a run takes beside its steps
    once everything it compiles is cached.

    Args:
        folder: Of the finished run.
        seconds: From the start of its process to its end.
    """
    lines = read_log(folder / 'log.jsonl')
    steps = [line for line in lines if line['event'] == 'step']
    evaluation = next((line for line in lines if line['event'] == 'evaluation'), lines[0])
    # Lines of the first epoch hold what is compiled and captured; the run has the device to itself, so the best counts.
    later = [line['images_per_second'] for line in steps if line['epoch'] > 1]
    return {'images_per_second': max(later), 'median_images_per_second': statistics.median(later),
            'images_per_epoch': round(steps[-1]['images'] / steps[-1]['epoch']),
            'overhead': round(seconds - (steps[-1]['time'] - evaluation['time']) + CACHED_COMPILE, 1)}


def epochs_for(share: float, pace: dict[str, float]) -> int:
    """Epochs that fit into `share` seconds, a twentieth of the steps' time left over."""
    return int(max(share - pace['overhead'], 0) * 0.95 * pace['images_per_second'] // pace['images_per_epoch'])


def progress(folder: Path) -> dict[str, Any]:
    """How far a run has come."""
    lines = read_log(folder / 'log.jsonl')
    steps = [line for line in lines if line['event'] == 'step']
    last = {key: steps[-1][key] for key in ('epoch', 'images', 'loss')} if steps else {}
    accuracies = [{k: line[k] for k in ('images', 'knn', 'linear')} for line in lines if line['event'] == 'evaluation']
    rates = [line['images_per_second'] for line in steps if line['epoch'] > 1]
    return {**last, 'accuracies': accuracies, 'finished': bool(lines) and lines[-1]['event'] == 'finish',
            'images_per_second': statistics.median(rates) if rates else None}


def run(sitting: Sitting, share: float) -> None:
    """Take the run through as many epochs as its share allows, or go on with one that was stopped."""
    state, began, folder = sitting.state, time.monotonic(), sitting.work / 'run'
    before = state.part('run')
    if 'epochs' not in before or not (folder / 'last.pt').exists():
        if (folder / 'config.yaml').exists():  # stopped before its first checkpoint: nothing to go on from
            shutil.rmtree(folder)
        epochs = min(epochs_for(share, before['pace']), sitting.size.most_epochs)
        if epochs < sitting.size.least_epochs:
            sitting.finish('run', began, f'{share:.0f} s are enough for {epochs} epochs, fewer than '
                           f'{sitting.size.least_epochs}: give another call more minutes', complete=False)
            return
        state.update('run', epochs=epochs)
    job = start(sitting, 'run', state.part('run')['epochs'])
    status = sitting.wait(job, share + 20, lambda: state.update('run', **progress(folder)))
    if status == 0:
        name = f'{"toy-" if state.content["toy"] else ""}{RECIPE}-{state.part("run")["epochs"]}ep'
        state.update('run', archive=archive(folder, sitting.out, name))
        sitting.finish('run', began, None)
    elif status is None or status == 143:
        sitting.finish('run', began, f'stopped at epoch {state.part("run").get("epoch", 0):.0f} of '
                       f'{state.part("run")["epochs"]}; it goes on in another call with this work folder', False)
    else:
        sitting.finish('run', began, job.last_words())


def archive(folder: Path, out: Path, name: str) -> dict[str, Any]:
    """Write a finished run to `out` in pieces that travel, and say what they are.

    The whole model travels in float32; the encoder, a part of it, is made again where it comes back, and checked.
    """
    buffer = io.BytesIO()

    def keep(info: tarfile.TarInfo) -> tarfile.TarInfo | None:
        parts = Path(info.name).parts[1:]
        weights = parts and parts[-1] in ('model.safetensors', 'pytorch_model.bin')
        if parts and (parts[0].startswith('.') or parts[0].removesuffix('.sha256') in LEFT_OUT):
            return None
        return None if weights and (parts[0] == 'encoder' or parts[-1] == 'pytorch_model.bin') else info

    with tarfile.open(fileobj=buffer, mode='w') as tar:
        tar.add(folder, name, filter=keep)
    content, size = buffer.getvalue(), MOST_FILE_MIB << 20
    pieces = [content[i:i + size] for i in range(0, len(content), size)]
    if len(pieces) > MOST_FILES - 1:
        return {'name': name, 'left_at': str(folder), 'mib': round(len(content) / 2 ** 20, 1), 'pieces': {}}
    checksums = {}
    for old in out.glob(f'{ARCHIVE}.*'):
        old.unlink()
    for number, piece in enumerate(pieces):
        path = out / f'{ARCHIVE}.{number}'
        path.write_bytes(piece)
        checksums[path.name] = sha256_of(path)
    return {'name': name, 'pieces': checksums, 'mib': round(len(content) / 2 ** 20, 1),
            'encoder_sha256': sha256_of(folder / 'encoder' / 'model.safetensors')}

