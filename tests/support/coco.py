"""Small sets of images in COCO's format: coloured rectangles and discs on grey, with boxes and masks."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

#: Ids that are not contiguous, in another order than that of the file.
CATEGORIES = [{'id': 7, 'name': 'disc'}, {'id': 3, 'name': 'box'}]
COLOURS = {3: (230, 40, 40), 7: (40, 60, 230)}


def runs_of(mask: np.ndarray) -> dict[str, Any]:
    """Uncompressed run lengths of a mask [H, W], down its columns."""
    flat = np.concatenate([[0], mask.T.reshape(-1), [0]]).astype(np.int8)
    edges = np.flatnonzero(np.diff(flat))
    return {'size': list(mask.shape), 'counts': np.diff([0, *edges, mask.size]).tolist()}


def write_coco(root: Path, split: str, count: int, seed: int = 0, size: tuple[int, int] = (48, 64),
               crowds: bool = True) -> dict[str, Any]:
    """Write images and annotations under `root` as COCO lays them out; returns the annotations.

    Every third image has a crowd, the last image has nothing on it. Masks are polygons, and run lengths of crowds.
    """
    random = np.random.default_rng(seed)
    folder = root / split
    folder.mkdir(parents=True)
    images, annotations = [], []
    for number in range(count):
        height, width = size if number % 2 else size[::-1]
        pixels = np.full((height, width, 3), 128, np.uint8) + random.integers(0, 20, (height, width, 1), np.uint8)
        identity = 100 + 3 * number
        images.append({'id': identity, 'file_name': f'{identity}.png', 'height': height, 'width': width})
        objects = 0 if number == count - 1 else int(random.integers(1, 4))
        for position in range(objects + (crowds and objects > 0 and number % 3 == 0)):
            crowd = position == objects
            category = int(random.choice([3, 7]))
            side = random.integers(12, 26, 2) // (2 if crowd else 1)
            left, top = random.integers(0, width - side[0]), random.integers(0, height - side[1])
            y, x = np.mgrid[:height, :width]
            if category == 3 or crowd:
                mask = (x >= left) & (x < left + side[0]) & (y >= top) & (y < top + side[1])
            else:
                mask = ((x + 0.5 - left - side[0] / 2) / side[0] * 2) ** 2 + (
                    (y + 0.5 - top - side[1] / 2) / side[1] * 2) ** 2 <= 1
            pixels[mask] = COLOURS[category]
            box = [int(v) for v in (left, top, side[0], side[1])]
            corners = [left, top, left + side[0], top, left + side[0], top + side[1], left, top + side[1]]
            annotations.append({
                'id': len(annotations) + 1, 'image_id': identity, 'category_id': category, 'bbox': box,
                'area': float(mask.sum()), 'iscrowd': int(crowd),
                'segmentation': [[float(c) for c in corners]] if category == 3 and not crowd else runs_of(mask)})
        Image.fromarray(pixels).save(folder / f'{identity}.png')
    content = {'images': images, 'annotations': annotations, 'categories': [dict(category) for category in CATEGORIES]}
    write_annotations(root, split, content)
    return content


def write_annotations(root: Path, split: str, content: dict[str, Any]) -> Path:
    path = root / 'annotations' / f'instances_{split}.json'
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content))
    return path
