"""Fixtures of all tests: no network, a fixed seed, and models that run in milliseconds."""

import gc
import os
from pathlib import Path

os.environ['HF_HUB_OFFLINE'] = '1'

import pytest

pytest.register_assert_rewrite('tests.support')


def pytest_configure() -> None:
    """Nothing of what is imported goes again, so that to look for what can is time lost."""
    gc.disable()


def pytest_collectstart() -> None:
    """What every test needs, imported where tests run alone: the process that starts the others waits for nothing."""
    import torch

    # Where there is no GPU, Triton's kernels run in its interpreter; it decides when they are first imported.
    if not torch.cuda.is_available():
        os.environ['TRITON_INTERPRET'] = '1'
    import autoreg_vit  # noqa: F401  registers the models with timm

    # Tensors are tiny here: a second thread costs more than it gives.
    torch.set_num_threads(1)


def pytest_collection_finish() -> None:
    """Tests collect garbage, of their own alone: to walk through what was imported takes half a second each time."""
    gc.freeze()
    gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `gpu` are skipped where there is none."""
    import torch

    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker('gpu'):
                item.add_marker(pytest.mark.skip(reason='needs a CUDA GPU'))


@pytest.fixture(autouse=True)
def fixed_seed():
    """Every test draws the same numbers, whichever tests ran before it."""
    import torch

    torch.manual_seed(0)


@pytest.fixture
def tiny() -> dict:
    """Options of a ViT on a grid of 4 x 4 tokens of 2 x 2 grey pixels."""
    return {'img_size': 8, 'patch_size': 2, 'in_chans': 1, 'embed_dim': 32, 'depth': 4, 'num_heads': 2}


@pytest.fixture
def randomise():
    """A function that redraws every parameter, so that no property holds by initialisation alone."""
    import torch

    def redraw(module, std: float = 0.3):
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.normal_(std=std)
        return module

    return redraw


@pytest.fixture
def no_figures(monkeypatch):
    """Pretraining leaves no figures, which take half of a short run's time."""
    from autoreg_vit.commands import pretraining

    monkeypatch.setattr(pretraining, 'draw_figures', lambda *arguments: None)


@pytest.fixture(scope='session')
def coco(tmp_path_factory) -> Path:
    """A folder with 8 images to train on and 5 to test."""
    from tests.support.coco import write_coco

    root = tmp_path_factory.mktemp('coco')
    write_coco(root, 'train2017', 8)
    write_coco(root, 'val2017', 5, seed=1)
    return root
