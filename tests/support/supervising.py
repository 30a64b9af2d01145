"""Small encoders and interruptions for the tests of probing and fine-tuning."""

import json
import signal
from pathlib import Path

import timm

from autoreg_vit.engine import trainer
from autoreg_vit.engine.signals import StopSignals
from autoreg_vit.hub.folders import export_encoder

#: An encoder of scikit-learn's digits, 16 tokens of 2 x 2 pixels.
TINY = {'img_size': 8, 'patch_size': 2, 'in_chans': 1, 'embed_dim': 32, 'depth': 2, 'num_heads': 2}


def write_encoder(folder: Path) -> Path:
    """An untrained encoder as pretraining would leave it."""
    export_encoder(timm.create_model('vit_tiny_patch4_32_randsac', **TINY), folder, mean=[0.5], std=[0.25])
    return folder


def stop_after(steps: int, monkeypatch) -> None:
    """Have the next run receive SIGTERM after so many steps."""

    class Signals(StopSignals):
        def __init__(self):
            super().__init__()
            self.asked = 0

        @property
        def received(self):
            self.asked += 1
            return signal.SIGTERM if self.asked >= steps else None

        @received.setter
        def received(self, value):
            pass

    monkeypatch.setattr(trainer, 'StopSignals', Signals)


def results_of(folder: Path) -> dict:
    return json.loads((folder / 'results.json').read_text())


def log_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / 'log.jsonl').read_text().splitlines()]
