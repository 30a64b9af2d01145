"""Images that a core reads for pretraining in a second of its time, by torchvision and by Pillow.

    python -m benchmarks.reading [--images 200] [--rounds 15] [--output FILE]

JPEG files of 640 x 480 are made of scikit-learn's two photographs: parts of them, enlarged, with noise of four levels
and qualities from 85 to 95. Each is read from a folder and becomes a crop of 224 (area from 0.2), in one process and
one thread, whose processor time is counted:

- pil: to a normalised tensor, as --reader pil gives it;
- torchvision: to bytes, as --reader torchvision gives them;
- torchvision, normalised: those of a batch of 64 normalised too, on the same core: all that a run on a CPU without
  loader processes has to do.

The ways take turns within a round, in another order each round; ratios to pil are taken within a round. The first
round warms up. Crops of the same image are the same in all ways.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import PIL
import torch
import torchvision
from PIL import Image
from sklearn.datasets import load_sample_images

from autoreg_vit.data.batches import Batches, SeededSamples
from autoreg_vit.data.folders import FlatFolder
from autoreg_vit.data.torchvision_reader import NormalisedBatches, read_by_torchvision
from autoreg_vit.data.transforms import ImageSpec, training_transform
from autoreg_vit.engine.machine import keep_freed_memory
from autoreg_vit.engine.processes import Processes

from .report import RESULTS, provenance, write_rows

SIZE = (640, 480)
SPEC = ImageSpec((224, 224), 3, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CROP_SCALE, HFLIP, BATCH = (0.2, 1.0), 0.5, 64
GOAL = 1.5


def make_files(folder: Path, images: int) -> int:
    """Write the JPEG files; their mean size in bytes."""
    chance, photographs = np.random.default_rng(0), list(map(Image.fromarray, load_sample_images().images))
    for number in range(images):
        photograph = photographs[number % len(photographs)]
        width = chance.uniform(0.5, 1) * min(photograph.width, photograph.height * SIZE[0] / SIZE[1])
        height = width * SIZE[1] / SIZE[0]
        left, top = chance.uniform(0, photograph.width - width), chance.uniform(0, photograph.height - height)
        part = photograph.resize(SIZE, Image.Resampling.BICUBIC, (left, top, left + width, top + height))
        noisy = np.asarray(part) + chance.normal(0, 4, (SIZE[1], SIZE[0], 3))
        Image.fromarray(noisy.round().clip(0, 255).astype(np.uint8)).save(
            folder / f'{number:05}.jpg', quality=85 + number % 11)
    return round(statistics.mean(path.stat().st_size for path in folder.iterdir()))


def ways(folder: Path) -> dict[str, Callable[[int], object]]:
    """By name, what reads all images of the folder, with the draws of an epoch."""
    by_pil = FlatFolder(folder, training_transform(SPEC, CROP_SCALE, HFLIP))
    fast = FlatFolder(folder, training_transform(SPEC, CROP_SCALE, HFLIP))
    read_by_torchvision(fast, SPEC, CROP_SCALE, HFLIP)
    one = Processes(torch.device('cpu'))

    def samples(dataset: FlatFolder) -> Callable[[int], object]:
        seeded = SeededSamples(dataset, seed=0)
        return lambda epoch: [seeded[epoch, index] for index in range(len(dataset))]

    def batches(epoch: int) -> Iterator:
        supply = NormalisedBatches(Batches(fast, min(BATCH, len(fast)), 0, one), SPEC, one.device)
        given = supply.start_at(epoch * supply.per_epoch)
        return [next(given)[0].shape for _ in range(supply.per_epoch)]

    return {'pil': samples(by_pil), 'torchvision': samples(fast), 'torchvision, normalised': batches}


def measure(folder: Path, images: int, rounds: int) -> list[dict]:
    """A row for each way: images a second, and their ratio to Pillow's in the same round; least and most beside."""
    every = ways(folder)
    read = dict.fromkeys(every, images)
    read['torchvision, normalised'] = images // min(BATCH, images) * min(BATCH, images)
    rates: dict[str, list[float]] = {way: [] for way in every}
    for epoch in range(rounds + 1):
        order = list(every)[epoch % len(every):] + list(every)[:epoch % len(every)]
        for way in order:
            start = time.process_time()
            every[way](epoch)
            rates[way].append(read[way] / (time.process_time() - start))
    rows = []
    for way, found in rates.items():
        ratios = [a / b for a, b in zip(found, rates['pil'])][1:]
        rows.append({'way': way, **_spread('images_per_second', found[1:], 1), **_spread('ratio', ratios, 3)})
    return rows


def _spread(name: str, values: list[float], digits: int) -> dict[str, float]:
    return {f'median_{name}': round(statistics.median(values), digits), f'least_{name}': round(min(values), digits),
            f'most_{name}': round(max(values), digits)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--images', type=int, default=200)
    parser.add_argument('--rounds', type=int, default=15)
    parser.add_argument('--output', type=Path, default=RESULTS / 'reading-cpu.json')
    args = parser.parse_args()
    if args.images < 1 or args.rounds < 1:
        parser.error('at least one image and one round.')
    torch.set_num_threads(1)
    keep_freed_memory()  # as runs on a CPU do
    with tempfile.TemporaryDirectory() as name:
        size = make_files(Path(name), args.images)
        rows = measure(Path(name), args.images, args.rounds)
    for row in rows:
        print(f"{row['way']:24}{row['median_images_per_second']:7.1f} images/s ({row['least_images_per_second']:.1f} "
              f"to {row['most_images_per_second']:.1f}), {row['median_ratio']:.2f} x pil ({row['least_ratio']:.2f} to "
              f"{row['most_ratio']:.2f})")
    reached = next(row['median_ratio'] for row in rows if row['way'] == 'torchvision')
    print(f'The goal of {GOAL} x is {"met" if reached >= GOAL else "missed"}.')
    settings = {'images': args.images, 'size': SIZE, 'mean_bytes': size, 'crop': SPEC.size, 'crop_scale': CROP_SCALE,
                'threads': 1, 'rounds': args.rounds}
    write_rows(args.output, {**provenance(), 'torchvision': torchvision.__version__, 'pillow': PIL.__version__,
                             'cpu_capability': torch.backends.cpu.get_cpu_capability(), 'settings': settings,
                             'goal': GOAL}, rows=rows)


if __name__ == '__main__':
    main()
