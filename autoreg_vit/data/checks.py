"""Unreadable images: found before training, named, and refused where they are too many."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import IterableDataset

from ..engine import progress
from ..errors import DataError, one_line
from .images import DAMAGE, open_image, prepared
from .samples import Samples


def image_name(dataset: Any, index: int) -> str:
    """File of an image where its data set knows it, else its number."""
    while hasattr(dataset, 'indices'):  # a part of another
        index, dataset = int(dataset.indices[index]), dataset.dataset
    samples = getattr(dataset, 'samples', None)
    if samples is not None:
        return str(samples[index][0] if isinstance(samples[index], tuple) else samples[index])
    try:
        return str(dataset.filename(index))
    except (AttributeError, AssertionError, KeyError, NotImplementedError, TypeError):
        return f'image {index}'


def check_images(
        dataset: Samples | IterableDataset, most: int, max_corrupt: float, say: Callable[[str], None] = print,
        try_sample: Callable[[int], Any] | None = None,
) -> list[str]:
    """Decode up to `most` images of a folder, spread evenly, and look at the sizes of all its files; the names of the
    unreadable ones. More than the part `max_corrupt` of unreadable images are a DataError that names them.

    Args:
        dataset: Of the folder kind; others are left unchecked.
        say: Takes messages that name what of the folder is left out, and the unreadable images where they are few.
        try_sample: Decodes the sample of an index, raising one of DAMAGE where it cannot be used; by default its image.
    """
    left_out, root = getattr(dataset, 'left_out', None), getattr(dataset, 'root', None)
    text = left_out.describe(Path(root)) if left_out and root else None
    if text:
        say(text)
    samples = getattr(dataset, 'samples', None)
    if not samples or most < 1:
        return []
    paths = [Path(image_name(dataset, i)) for i in range(len(samples))]
    chosen = sorted(set(np.linspace(0, len(paths) - 1, min(most, len(paths))).astype(int).tolist()))
    damages: dict[Path, str] = {}
    for path in paths:
        try:
            if path.stat().st_size == 0:
                damages[path] = 'it is empty'
        except OSError as error:
            damages[path] = 'a link to nowhere' if path.is_symlink() else str(error.strerror)

    def decode(index: int) -> None:
        try:
            prepared(open_image(paths[index])) if try_sample is None else try_sample(index)
        except DAMAGE as error:
            damages.setdefault(paths[index], one_line(error))

    with ThreadPoolExecutor(min(os.cpu_count() or 1, 16)) as pool:  # decoding does not hold the interpreter
        list(pool.map(decode, chosen))
    if damages:
        named = [f'{path} ({reason})' for path, reason in sorted(damages.items())]
        refuse_corrupt(named, len(chosen), max_corrupt)
        say(f'{len(named)} of {len(chosen)} images cannot be read, and others stand in for them: {some_names(named)}')
    return [str(path) for path in sorted(damages)]


def refuse_corrupt(names: list[str], images: int, max_corrupt: float) -> None:
    """Raise DataError where the unreadable images are more than the part `max_corrupt` of `images`."""
    if len(names) > max_corrupt * images:
        raise DataError(f'{len(names)} of {images} images cannot be read, more than --max-corrupt {max_corrupt:g} '
                        f'allows: {some_names(names)}. Mend or remove them, or allow more.')


def tolerate(names: list[str], images: int, max_corrupt: float) -> None:
    """Say which images turned out to be unreadable, or raise DataError as `refuse_corrupt`."""
    refuse_corrupt(names, images, max_corrupt)
    progress.say(f'{len(names)} images cannot be read, and others stand in for them: {some_names(names)}')


def some_names(names: list[str], most: int = 5) -> str:
    """The first names of a list, and how many more there are."""
    return '; '.join(names[:most]) + (f'; and {len(names) - most} more' if len(names) > most else '')
