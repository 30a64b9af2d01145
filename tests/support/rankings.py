"""Ranks drawn at random, and what is read off them."""

import itertools

import torch
from hypothesis import settings
from hypothesis import strategies as st

from autoreg_vit.serialization import (
    Serialization,
)

PROPERTY = settings(max_examples=40, deadline=None, derandomize=True)

SEEDS = st.integers(0, 2 ** 32 - 1)

GRIDS = st.tuples(st.integers(1, 9), st.integers(1, 7))


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def tiling_counts(grid):
    """Numbers of equal squares that tile the grid, from the finest, a single square left out."""
    height, width = grid
    sides = [side for side in range(1, min(grid) + 1) if height % side == 0 and width % side == 0]
    return [height * width // side ** 2 for side in sides if height * width > side ** 2]


@st.composite
def serializations(draw, names=('raster', 'random', 'squares', 'blobs')):
    """Any serialization that its grid admits, hierarchies included."""
    name = draw(st.sampled_from(names))
    if name in ('raster', 'random'):
        return Serialization(name, draw(GRIDS))
    grid = draw(GRIDS.filter(lambda g: g[0] * g[1] > 1))
    possible = tiling_counts(grid) if name == 'squares' else range(2, min(grid[0] * grid[1], 12) + 1)
    counts = draw(st.sets(st.sampled_from(possible), min_size=1, max_size=3))
    return Serialization(name, grid, tuple(sorted(counts, reverse=True)), draw(st.booleans()))


def groups_by_rank(row):
    """Tokens of each rank, in the order of prediction."""
    groups = [[] for _ in range(max(row) + 1)]
    for token, rank in enumerate(row):
        groups[rank].append(token)
    return groups


def same_partition(left, right):
    """Whether two labellings put the same items together, whatever the labels are called."""
    return len(set(zip(left, right))) == len(set(left)) == len(set(right))


def contiguous(labels):
    """Whether no label is left and then entered again."""
    runs = [label for label, _ in itertools.groupby(labels)]
    return len(runs) == len(set(runs))
