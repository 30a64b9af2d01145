"""Work that takes long shows how far it is; quick work shows nothing."""

import pytest
import timm
import torch
from torch.utils.data import Dataset

pytest.importorskip('sklearn')

from autoreg_vit.data.loaders import own_part
from autoreg_vit.engine.processes import Processes
from autoreg_vit.engine.progress import with_progress
from autoreg_vit.evaluation.features import extract_features


class Clock:
    """What tqdm goes by."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr('tqdm.std.time', clock)
    return clock


class SlowImages(Dataset):
    """Four images, each of which takes so long by a clock."""

    def __init__(self, seconds: float, clock: Clock):
        self.seconds, self.clock = seconds, clock

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        self.clock.now += self.seconds
        return torch.zeros(3, 32, 32), index


def features(images: Dataset) -> None:
    encoder = timm.create_model('vit_tiny_patch4_32_randsac', depth=1)
    _, labels = extract_features(encoder, images, torch.device('cpu'), batch_size=1)
    assert labels.tolist() == [0, 1, 2, 3]


def evaluation(images: Dataset) -> None:
    batches = own_part(images, 1, workers=0, group=Processes(torch.device('cpu')))
    assert [int(label) for _, label in batches] == [0, 1, 2, 3]


@pytest.mark.parametrize('seconds', [0.4, 0.8])
@pytest.mark.parametrize('work', [features, evaluation])
def test_a_bar_appears_when_work_takes_long(work, seconds: float, clock: Clock, monkeypatch, capsys):
    monkeypatch.setattr('sys.stderr.isatty', lambda: True)
    work(SlowImages(seconds, clock))
    found = capsys.readouterr().err
    assert ('/4' in found) if seconds > 0.5 else found == ''


@pytest.mark.parametrize('shown', [True, False])
def test_other_processes_show_none(shown: bool, clock: Clock, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setattr('sys.stderr.isatty', lambda: True)
    for _ in with_progress(range(4), 'evaluating', shown=shown):
        clock.now += 0.8
    assert ('/4' in capsys.readouterr().err) is shown
