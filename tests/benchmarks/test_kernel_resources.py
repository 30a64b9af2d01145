"""What spares compiling the kernels' launches once more before a commit."""

import json
from pathlib import Path

import pytest

pytest.importorskip('triton')

import triton

from benchmarks import kernel_resources


@pytest.mark.parametrize('change, recorded', [
    ({}, True), ({'triton': '3.0.0'}, False), ({'sources': 'of another day'}, False), ({'sources': None}, False),
    ({'launches': [{'arch': 80, 'fault': False}, {'arch': 90, 'fault': False}]}, False),
    ({'launches': [{'arch': arch, 'fault': arch == 90} for arch in kernel_resources.SHARED]}, False),
])
def test_the_same_sources_are_compiled_once(change: dict, recorded: bool, tmp_path: Path, monkeypatch):
    content = {'triton': triton.__version__, 'sources': kernel_resources.digest_of_sources(),
               'launches': [{'arch': arch, 'fault': False} for arch in kernel_resources.SHARED], **change}
    (tmp_path / 'kernel_resources-triton.json').write_text(json.dumps(content))
    monkeypatch.setattr(kernel_resources, 'RESULTS', tmp_path)
    assert kernel_resources.is_recorded() == recorded


def test_every_byte_of_kernels_and_table_counts(tmp_path: Path, monkeypatch):
    for name in ('forward.py', 'backward/split.py', 'launches.json', 'notes.txt'):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text('1')
    monkeypatch.setattr(kernel_resources, 'TABLE', tmp_path / 'launches.json')
    digests = [kernel_resources.digest_of_sources()]
    for name in ('notes.txt', 'forward.py', 'backward/split.py', 'launches.json'):
        (tmp_path / name).write_text('2')
        digests.append(kernel_resources.digest_of_sources())
    assert digests[0] == digests[1] and len(set(digests)) == 4
