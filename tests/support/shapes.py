"""Squares and discs with masks, to segment."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

TINY = {'img_size': 16, 'patch_size': 4, 'embed_dim': 32, 'depth': 4, 'num_heads': 2}
CLASSES = ('ground', 'square', 'disc')


def draw(seed: int, size: tuple[int, int] = (48, 40)) -> tuple[np.ndarray, np.ndarray]:
    """A bright square and a dark disc on grey noise, and their mask, whose frame is ignored."""
    draws, (height, width) = np.random.default_rng(seed), size
    image, mask = draws.integers(100, 150, (height, width, 3)), np.zeros((height, width), np.uint8)
    y, x = np.mgrid[:height, :width]
    (a, b), (c, d) = draws.integers(10, 30, (2, 2))
    for inside, label, colour in (((abs(y - a) < 9) & (abs(x - b) < 9), 1, (230, 60, 60)),
                                  ((y - c) ** 2 + (x - d) ** 2 < 81, 2, (20, 40, 200))):
        image[inside], mask[inside] = colour, label
    mask[0] = 255
    return image.astype(np.uint8), mask


def write_data(folder: Path, train: int = 24, val: int = 6, **info) -> Path:
    for split, first, count in (('train', 0, train), ('val', 1000, val)):
        for kind in ('images', 'annotations'):
            (folder / kind / split).mkdir(parents=True)
        for number in range(count):
            image, mask = draw(first + number)
            Image.fromarray(image).save(folder / 'images' / split / f'{number:03}.png')
            Image.fromarray(mask).save(folder / 'annotations' / split / f'{number:03}.png')
    (folder / 'info.json').write_text(json.dumps({'classes': CLASSES, **info}))
    return folder
