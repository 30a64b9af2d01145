"""Every command where people run it: streams that are closed or cannot show a path, a full disk, folders that cannot be
written to. Each ends well, or in one line that names the culprit."""

import contextlib
import importlib.util
import io
import json
import multiprocessing
import os
import resource
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

pytest.importorskip('sklearn')

from autoreg_vit.commands.cli import main
from autoreg_vit.data.labelled import open_splits
from autoreg_vit.figures import plots
from autoreg_vit.hub.folders import export_encoder
from autoreg_vit.settings.classification import ProbeConfig
from tests.models.test_saim_checkpoint import published_checkpoint
from tests.support.exporting import write_run
from tests.support.launching import SETTINGS, _child, flags, server
from tests.support.supervising import write_encoder

SHORT = ['--steps', '1', '--warmup-steps', '0', '--precision', 'float32', '--no-pretrained']
needs_dense = pytest.mark.skipif(importlib.util.find_spec('faster_coco_eval') is None, reason='needs the extra dense')
COMMANDS = ['pretrain', 'probe', 'show', 'export', 'convert',
            *(pytest.param(name, marks=[pytest.mark.slow, needs_dense]) for name in ('finetune', 'segment', 'detect'))]


@pytest.fixture(scope='module')
def arguments(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """The command line of each command at its smallest, but for where it writes."""
    root = tmp_path_factory.mktemp('surroundings')
    encoder = write_encoder(root / 'encoder')
    run = root / 'run'
    write_run(run, dataset='digits', data_dir=None)
    torch.save({'model': published_checkpoint()}, root / 'saim.pth')
    wide = timm.create_model('vit_tiny_patch4_32_randsac', img_size=16, embed_dim=32, depth=4, num_heads=2)
    export_encoder(wide, root / 'wide')
    return {
        'pretrain': flags({**SETTINGS, 'epochs': 1, 'eval_every': 0}),
        'probe': ['probe', '--weights', str(encoder), '--dataset', 'digits', '--fast', '--train-images', '60',
                  '--test-images', '30', '--precision', 'float32'],
        'finetune': ['finetune', '--weights', str(encoder), '--dataset', 'digits', '--train-images', '32',
                     '--test-images', '32', '--epochs', '1', '--batch-size', '32', '--precision', 'float32'],
        'segment': ['segment', '--weights', str(root / 'wide'), '--data-dir', str(masks(root / 'masks')),
                    '--eval-split', 'train', '--num-classes', '2', '--crop-size', '32', '--batch-size', '2',
                    '--decoder-channels', '16', *SHORT],
        'detect': ['detect', '--weights', str(root / 'wide'), '--data-dir', str(boxes(root / 'coco')), '--eval-split',
                   'train2017', '--img-size', '64', '--width', '16', '--rois', '16', '--norm', 'layer', '--window', '3',
                   '--batch-size', '2', '--anchor-sizes', '8', '12', '20', '32', '64', *SHORT],
        'show': ['show', '--weights', str(run), '--figures', 'order', '--output-dir', 'OUT'],
        'export': ['export', str(run), 'OUT', '--tag', 'tag'],
        'convert': ['convert', str(root / 'saim.pth'), 'OUT'],
    }


#: What a command leaves where it ends well.
LEAVES = {'pretrain': 'encoder/model.safetensors', 'probe': 'results.json', 'finetune': 'results.json',
          'segment': 'results.json', 'detect': 'results.json', 'show': 'order.png',
          'export': 'vit_tiny_patch4_32_randsac.tag/model.safetensors', 'convert': 'pretrain/model.safetensors'}


def masks(root: Path) -> Path:
    for kind, values in (('images', 256), ('annotations', 2)):
        (root / kind / 'train').mkdir(parents=True)
        for number in range(4):
            pixels = np.random.default_rng(number).integers(0, values, (40, 40), np.uint8)
            Image.fromarray(pixels).convert('RGB' if kind == 'images' else 'L').save(
                root / kind / 'train' / f'{number}.png')
    (root / 'info.json').write_text(json.dumps({'classes': ['a', 'b']}))
    return root


def boxes(root: Path) -> Path:
    from tests.support.coco import write_coco

    write_coco(root, 'train2017', 4)
    return root


def complete(arguments: list[str], out: Path) -> list[str]:
    """The command line with its output folder."""
    if 'OUT' in arguments:
        return [str(out) if word == 'OUT' else word for word in arguments]
    return [*arguments, '--output-dir', str(out)]


def start(arguments: list[str], out: Path, log: Path, before: Callable[[], None] | None) -> tuple[int, str]:
    """Exit status and output of a command that writes to `out`, in a process of its own in which `before` is called."""
    process = server().Process(target=_child, args=(complete(arguments, out), {}, str(log), before))
    process.start()
    process.join(240)
    assert process.exitcode is not None, log.read_text(errors='replace')
    return process.exitcode, log.read_text(errors='replace')


def without_stdout() -> None:
    os.close(1)
    sys.stdout = None


def without_stderr() -> None:
    os.close(2)
    sys.stderr = None


def in_ascii() -> None:
    """What Python makes of stdout and stderr under LC_ALL=C and without UTF-8 mode."""
    sys.stdout, sys.stderr = (io.TextIOWrapper(os.fdopen(n, 'wb', 0), 'ascii', write_through=True) for n in (1, 2))


@pytest.mark.parametrize('command', COMMANDS)
@pytest.mark.parametrize('before, folder', [
    (without_stdout, 'out'), (without_stderr, 'out'), (in_ascii, 'a place, место 場所')], ids=lambda v: getattr(
        v, '__name__', None))
def test_ends_well(command: str, before: Callable, folder: str, arguments: dict, tmp_path: Path):
    status, text = start(arguments[command], tmp_path / folder, tmp_path / 'log', before)
    assert status == 0 and 'Traceback' not in text, text
    assert (tmp_path / folder / LEAVES[command]).stat().st_size > 100


def on_a_full_disk(arguments: list[str], bytes_left: int, answer: Connection) -> None:
    """Run a command where no file can grow beyond `bytes_left`, and send its exit status and what it says."""
    said = io.StringIO()  # what it prints to a file would not fit either
    resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_left, resource.RLIM_INFINITY))
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        status = main(arguments)
    answer.send((status, said.getvalue()))


@pytest.mark.parametrize('bytes_left', [0, 2500])
@pytest.mark.parametrize('command', COMMANDS)
def test_a_full_disk_is_one_line(command: str, bytes_left: int, arguments: dict, tmp_path: Path):
    here, there = multiprocessing.Pipe()
    process = server().Process(
        target=on_a_full_disk, args=(complete(arguments[command], tmp_path / 'out'), bytes_left, there))
    process.start()
    there.close()  # so that a crash ends the waiting
    status, said = here.recv()
    process.join()
    last = said.strip().splitlines()[-1]
    assert status == 2 and 'The disk is full' in last and str(tmp_path / 'out') in last, said
    assert 'Traceback' not in said


@pytest.mark.parametrize('command', COMMANDS)
@pytest.mark.parametrize('obstacle', ['file', 'below a file'])
def test_a_folder_that_cannot_be_written_is_one_line(command: str, obstacle: str, arguments: dict, tmp_path: Path):
    (tmp_path / 'file').write_text('mine')
    out = tmp_path / 'file' / 'below' if obstacle == 'below a file' else tmp_path / 'file'
    status, text = start(arguments[command], out, tmp_path / 'log', None)
    lines = [line for line in text.splitlines() if line.startswith('autoreg-vit: ')]
    assert status == 2 and len(lines) == 1 and 'Traceback' not in text, text
    assert str(tmp_path / 'file') in lines[0]
    assert (tmp_path / 'file').read_text() == 'mine'


@pytest.mark.skipif(sys.platform != 'linux', reason='file names are bytes on Linux alone')
def test_a_class_folder_whose_name_is_no_text(tmp_path: Path):
    """Unpacked from an old archive: the name is escaped in results and figures."""
    for name in (b'a', b'caf\xe9'):
        folder = os.fsencode(tmp_path) + b'/' + name
        os.mkdir(folder)
        for number in range(5):
            Image.new('RGB', (4, 4)).save(os.fsdecode(folder) + f'/{number}.png')
    splits = open_splits(ProbeConfig(weights='x', dataset='folder', data_dir=str(tmp_path)), None, None)
    assert splits.classes == ['a', r'caf\udce9']
    plots.confusion_figure(np.eye(2, dtype=np.int64), splits.classes, tmp_path / 'confusion.png')
    assert (tmp_path / 'confusion.png').stat().st_size > 1000
