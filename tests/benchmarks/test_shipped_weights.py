"""The benchmark of trained encoders: what it measures is what the package's own commands measure, and it goes on from
where it was stopped."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip('sklearn')

from PIL import Image

from autoreg_vit.commands.cli import main as command
from benchmarks import shipped_weights
from tests.support.exporting import write_run


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Two classes, dark and bright noise."""
    draw = np.random.default_rng(0)
    for split, count in (('train', 20), ('test', 10)):
        for label, level in enumerate((90, 160)):
            folder = tmp_path / 'images' / split / f'class{label}'
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = draw.normal(level, 60, (32, 32, 3)).clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f'{number:02}.png')
    return tmp_path / 'images'


def test_measures_what_the_commands_measure(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_run(tmp_path / 'run', model='saim_vit_tiny_patch4_32', memory=None)
    monkeypatch.setattr(shipped_weights, 'SHARD', 16)
    monkeypatch.setattr(shipped_weights, 'BLOCK_IMAGES', 24)
    encoder, output = tmp_path / 'run' / 'encoder', tmp_path / 'out.json'

    def measure(*more: str) -> dict:
        monkeypatch.setattr(sys, 'argv', [
            'shipped_weights', '--data-dir', str(images), '--encoders', f'saim={encoder}', '--measures', 'blocks',
            'features', '--work-dir', str(tmp_path / 'work'), '--output', str(output), *more])
        assert shipped_weights.main() == 0
        return json.loads(output.read_text())

    assert measure('--minutes', '0')['not_run'] == ['fast of saim', 'blocks of saim', 'finetune of saim']
    content = measure()
    assert content['not_run'] == ['finetune of saim']
    row, = content['rows']
    assert [(b['pool'], b['block']) for b in row['blocks']] == [(p, n) for p in ('token', 'avg') for n in (1, 2)]
    for pool in ('token', 'avg'):
        folder = tmp_path / f'probe-{pool}'
        assert command(['probe', '--weights', str(encoder), '--data-dir', str(images), '--eval-split', 'test', '--fast',
                        '--epochs', '100', '--batch-size', '256', '--precision', 'float32', '--global-pool', pool,
                        '--output-dir', str(folder)]) == 0
        expected = json.loads((folder / 'results.json').read_text())
        assert expected['global_pool'] == pool
        assert {k: row['fast'][pool][k] for k in ('top1', 'knn', 'learning_rate', 'held_out_top1', 'train_images')} == {
            k: expected[k] for k in ('top1', 'knn', 'learning_rate', 'held_out_top1', 'train_images')}
        assert row['fast'][pool]['loss'] == pytest.approx(expected['loss'], rel=1e-3)
    before = (tmp_path / 'work' / 'fast-saim-avg' / 'results.json').stat().st_mtime_ns
    measure()
    assert (tmp_path / 'work' / 'fast-saim-avg' / 'results.json').stat().st_mtime_ns == before
