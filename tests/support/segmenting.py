"""What the tests of segmentation share."""

import torch

from autoreg_vit.commands.segmenting import windows_of
from autoreg_vit.engine.processes import Processes
from autoreg_vit.settings.dense import SegmentConfig


def reading(config: SegmentConfig) -> dict:
    """What `mask_scores.evaluate` takes of the settings of a run."""
    return dict(windows=windows_of(config), precision='float32', workers=0, group=Processes(torch.device('cpu')))
