"""Ranks of every serialization, against plain definitions of the papers, one token and one Gaussian at a time."""

import inspect
import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from autoreg_vit.serialization import (
    _SERIALIZATIONS,
    Serialization,
    blobs,
    check_ranks,
    memory_limits,
    random,
    raster,
    sort_by_rank,
    source_limits,
    squares,
)
from tests.support.rankings import (
    GRIDS,
    PROPERTY,
    SEEDS,
    contiguous,
    groups_by_rank,
    same_partition,
    seeded,
    serializations,
)

# Every serialization


@PROPERTY
@given(serializations(), st.integers(1, 6), SEEDS)
def test_ranks_are_int64_dense_and_reproducible_and_leave_the_global_generator_alone(serialization, batch, seed):
    before = torch.get_rng_state()
    ranks = serialization(batch, generator=seeded(seed))
    assert torch.equal(torch.get_rng_state(), before)
    assert ranks.dtype == torch.int64
    assert ranks.shape == (batch, math.prod(serialization.grid))
    for row in ranks.tolist():
        assert set(row) == set(range(max(row) + 1))
    assert torch.equal(serialization(batch, generator=seeded(seed)), ranks)
    check_ranks(ranks, batch, math.prod(serialization.grid))

RANDOM = [
    Serialization('random', (7, 9)),
    Serialization('random', (1, 16)),
    Serialization('squares', (8, 8), (16, 4)),
    Serialization('squares', (6, 10), 15),
    Serialization('blobs', (9, 7), 11),
    Serialization('blobs', (8, 8), (11, 7, 3)),
    Serialization('blobs', (1, 30), 8, shuffle=True),
]


@pytest.mark.parametrize('serialization', RANDOM, ids=str)
def test_rows_and_seeds_are_drawn_independently(serialization):
    ranks = serialization(12, generator=seeded(0))
    assert len({tuple(row) for row in ranks.tolist()}) == 12
    assert not torch.equal(serialization(12, generator=seeded(1)), ranks)


@pytest.mark.parametrize('serialization', RANDOM, ids=str)
def test_without_a_generator_the_global_one_is_drawn_from(serialization):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        first, second = serialization(4), serialization(4)
        torch.manual_seed(3)
        assert torch.equal(serialization(4), first)
    assert not torch.equal(first, second)


@pytest.mark.parametrize('serialization', [Serialization('raster', (3, 4)), *RANDOM], ids=str)
def test_no_value_is_read_back_to_the_host(serialization):
    # Tensors on the meta device have no values, so that anything read from them raises.
    ranks = serialization(3, device='meta')
    order, sorted_ranks = sort_by_rank(ranks)
    assert ranks.shape == order.shape == memory_limits(sorted_ranks, 'self').shape
    assert source_limits(sorted_ranks, prefix=1).shape == (3, ranks.shape[1] + 1)
    assert ranks.device.type == 'meta'


def test_ranks_do_not_depend_on_autocast():
    serialization = Serialization('blobs', (14, 14), (11, 7, 3))
    for seed in range(50):
        with torch.autocast('cpu', torch.bfloat16):
            ranks = serialization(4, generator=seeded(seed))
        assert torch.equal(ranks, serialization(4, generator=seeded(seed)))


@PROPERTY
@given(serializations(), st.integers(1, 6), SEEDS)
def test_a_named_serialization_draws_what_its_function_draws(serialization, batch, seed):
    function = {'raster': raster, 'random': random, 'squares': squares, 'blobs': blobs}[serialization.name]
    options = {}
    if 'segments' in inspect.signature(function).parameters:
        options = {'segments': list(serialization.segments), 'shuffle': serialization.shuffle}
    ranks = function(batch, serialization.grid, generator=seeded(seed), device='cpu', **options)
    assert torch.equal(serialization(batch, generator=seeded(seed)), ranks)


def test_a_named_serialization_keeps_its_segments_as_a_tuple():
    assert Serialization('blobs', (8, 8), 11).segments == (11,)
    assert Serialization('squares', (8, 8), [16, 4]) == Serialization('squares', (8, 8), (16, 4))


COMPILED = [
    Serialization('raster', (4, 4)),
    Serialization('prefix_raster', (4, 4)),
    Serialization('random', (4, 4)),
    Serialization('squares', (4, 4), 4, shuffle=True),
    Serialization('blobs', (4, 4), 5, segment_order='raster'),
]


@pytest.mark.parametrize('serialization', COMPILED, ids=str)
def test_a_compiled_draw_takes_any_batch_size(serialization):
    torch._dynamo.reset()

    @torch.compile(backend='aot_eager', fullgraph=True)
    def compiled(images):
        return serialization(images.shape[0], device=images.device)

    # At the second size the batch becomes symbolic, and the third runs what was compiled for it.
    for batch in (4, 3, 5):
        torch.manual_seed(batch)
        expected = serialization(batch)
        torch.manual_seed(batch)
        assert torch.equal(compiled(torch.zeros(batch)), expected)


def test_every_serialization_is_compiled_here():
    assert {s.name for s in COMPILED} == set(_SERIALIZATIONS)


# Raster and random


@PROPERTY
@given(GRIDS, st.integers(1, 6))
def test_raster_counts_the_tokens(grid, batch):
    assert raster(batch, grid).tolist() == [list(range(grid[0] * grid[1]))] * batch


@PROPERTY
@given(GRIDS, st.integers(1, 6), SEEDS)
def test_random_is_a_permutation(grid, batch, seed):
    for row in random(batch, grid, generator=seeded(seed)).tolist():
        assert sorted(row) == list(range(grid[0] * grid[1]))


def assert_uniform(outcomes, possible):
    """Chi-square test with a fixed seed: the bound lies more than five standard deviations above the mean."""
    counts = dict.fromkeys(possible, 0)
    for outcome in outcomes:
        counts[outcome] += 1
    expected = sum(counts.values()) / len(counts)
    freedom = len(counts) - 1
    assert sum((count - expected) ** 2 / expected for count in counts.values()) < freedom + 5 * math.sqrt(2 * freedom)


def orders(ranks):
    """Each row's items from the first visited to the last."""
    return [tuple(row) for row in ranks.argsort(dim=1).tolist()]


@pytest.mark.parametrize('serialization', [Serialization('random', (2, 2)), Serialization('squares', (4, 4), 4)],
                         ids=str)
def test_every_order_is_equally_likely(serialization):
    ranks = serialization(3000, generator=seeded(5)).view(3000, *serialization.grid)
    step = serialization.grid[0] // 2
    corners = ranks[:, ::step, ::step].reshape(3000, 4)
    assert_uniform(orders(corners), itertools.permutations(range(4)))


def test_partitions_and_the_segments_inside_each_are_visited_in_every_order():
    ranks = squares(3000, (4, 4), (16, 4), generator=seeded(6)).view(3000, 2, 2, 2, 2)
    ranks = ranks.transpose(2, 3).reshape(3000, 4, 4)  # partition, token inside it
    every = list(itertools.permutations(range(4)))
    assert_uniform(orders(ranks.amin(2)), every)
    for partition in range(4):
        assert_uniform(orders(ranks[:, partition]), every)
    inside = ranks[..., 0] < ranks[..., 1]
    assert_uniform(map(tuple, inside.tolist()), itertools.product([False, True], repeat=4))


def test_the_larger_of_two_blobs_comes_first_half_of_the_time():
    ranks = blobs(4000, (8, 8), 2, generator=seeded(7))
    second = ranks.sum(1)
    second = second[(second > 0) & (second != 32)]
    larger_is_second = (second > 32).double().mean().item()
    assert len(second) > 3000
    assert larger_is_second == pytest.approx(0.5, abs=0.04)


# Squares


@PROPERTY
@given(st.integers(1, 3), st.integers(1, 4), st.integers(2, 4), st.booleans(), st.integers(1, 6), SEEDS)
def test_squares_are_aligned_and_of_one_size(side, rows, columns, upright, batch, seed):
    if upright:
        rows, columns = columns, rows
    ranks = squares(batch, (rows * side, columns * side), rows * columns, generator=seeded(seed))
    blocks = ranks.view(batch, rows, side, columns, side).transpose(2, 3).reshape(batch, rows * columns, side ** 2)
    assert torch.equal(blocks.amin(2), blocks.amax(2))
    for row in blocks[..., 0].tolist():
        assert sorted(row) == list(range(rows * columns))


def test_sixteen_squares_nest_in_four():
    ranks = squares(6, (8, 8), (16, 4), generator=seeded(0)).view(6, 8, 8)
    quadrants = (ranks // 4).view(6, 2, 4, 2, 4).transpose(2, 3).reshape(6, 4, 16)
    assert torch.equal(quadrants.amin(2), quadrants.amax(2))
    for image in ranks.tolist():
        for rank in range(16):
            cells = [(r, c) for r in range(8) for c in range(8) if image[r][c] == rank]
            top, left = cells[0]
            assert top % 2 == left % 2 == 0
            assert cells == [(top, left), (top, left + 1), (top + 1, left), (top + 1, left + 1)]


def labels_on_coarser_levels(row, points, assigners):
    """The label of each rank on every coarser level, where a group of tokens goes where the mean of their points goes;
    None where an assigner cannot tell."""
    tokens, labels = dict(enumerate(groups_by_rank(row))), list(range(max(row) + 1))
    levels = []
    for assign in assigners:
        target = {label: assign(np.mean([points[t] for t in group], axis=0)) for label, group in tokens.items()}
        if None in target.values():
            return None
        labels = [target[label] for label in labels]
        tokens = {new: [t for old, group in tokens.items() if target[old] == new for t in group] for new in set(labels)}
        levels.append(labels)
    return levels


@pytest.mark.parametrize('grid, segments, partitions', [
    ((8, 8), (16, 4), [4, 4, 4, 4]),
    ((4, 8), (8, 2), [4, 4]),
    ((6, 6), (9, 4), [1, 2, 2, 4]),
    ((6, 6), (36, 9, 4), [4, 8, 8, 16]),
    ((12, 12), (36, 9, 4), [4, 8, 8, 16]),
    ((8, 8), (64, 16, 4), [16, 16, 16, 16]),
])
def test_square_partitions_are_finished_before_the_next(grid, segments, partitions):
    height, width = grid
    points = [(r + 0.5, c + 0.5) for r in range(height) for c in range(width)]
    sides = [math.isqrt(height * width // count) for count in segments]

    def cell_of(side):
        return lambda point: (point[0] // side, point[1] // side)

    for row in squares(6, grid, segments, generator=seeded(2)).tolist():
        assert same_partition(row, [cell_of(sides[0])(point) for point in points])
        levels = labels_on_coarser_levels(row, points, [cell_of(side) for side in sides[1:]])
        assert len(levels) == len(segments) - 1
        for labels in levels:
            assert contiguous(labels)
        assert sorted(levels[-1].count(label) for label in set(levels[-1])) == partitions


# Blobs


def normalized_points(grid):
    """Token positions (row, column) in raster order, from -2 at the first to 2 at the last, 0 for a single one."""
    axes = [[-2 + 4 * i / (size - 1) for i in range(size)] if size > 1 else [0.0] for size in grid]
    return list(itertools.product(*axes))


def drawn_gaussians(batch, segments, seed):
    """Means and standard deviations (row, column) of each level and image, from the draws that blobs makes first."""
    generator = seeded(seed)
    levels = []
    for count in segments:
        draws = torch.rand(batch, 1, count, 4, generator=generator)[:, 0].double()
        levels.append((((2 * draws[..., :2] - 1) * 1.75).tolist(), ((1 + draws[..., 2:]) / 2).tolist()))
    return levels


def log_density(point, mean, std):
    """Log of a normal density with diagonal covariance, RandSAC Eq. 1."""
    return sum(-((x - m) / s) ** 2 / 2 - math.log(s * math.sqrt(2 * math.pi)) for x, m, s in zip(point, mean, std))


def most_likely(point, means, stds):
    """The Gaussian of highest density, or None where float32 cannot tell the two best apart."""
    densities = [log_density(point, mean, std) for mean, std in zip(means, stds)]
    second, best = sorted(densities)[-2:]
    return densities.index(best) if best - second > 1e-5 * (1 + abs(best)) else None


@PROPERTY
@given(GRIDS.filter(lambda g: g[0] * g[1] > 1), st.integers(2, 12), st.integers(1, 6), SEEDS)
def test_blobs_are_the_partition_of_equation_1(grid, count, batch, seed):
    count = min(count, grid[0] * grid[1])
    ranks = blobs(batch, grid, count, generator=seeded(seed))
    (means, stds), = drawn_gaussians(batch, (count,), seed)
    points = normalized_points(grid)
    for row, image_means, image_stds in zip(ranks.tolist(), means, stds):
        expected = [most_likely(point, image_means, image_stds) for point in points]
        clear = [token for token, label in enumerate(expected) if label is not None]
        assert len(clear) >= len(points) - 2
        assert same_partition([row[t] for t in clear], [expected[t] for t in clear])


def test_blobs_are_distributed_as_an_independent_sampler_of_equation_1():
    images, count, size = 4000, 11, 8
    rng = np.random.default_rng(0)
    mean = rng.uniform(-1.75, 1.75, (images, 1, count, 2))
    std = rng.uniform(0.5, 1, (images, 1, count, 2))
    points = np.array(normalized_points((size, size)))[None, :, None]
    density = np.exp(-((points - mean) / std) ** 2 / 2) / std
    labels = density.prod(-1).argmax(-1)
    ranks = blobs(images, (size, size), count, generator=seeded(0)).numpy()

    def statistics(labels):
        sizes = np.stack([(labels == label).sum(1) for label in range(count)], axis=1)
        corner = (labels == labels[:, :1]).sum(1)
        middle, left, below = labels[:, 27], labels[:, 24], labels[:, 59]
        return np.stack([(sizes > 0).sum(1), (sizes ** 2).sum(1), sizes.max(1), corner, middle == left,
                         middle == below], axis=1)

    ours, theirs = statistics(ranks), statistics(labels)
    difference = abs(ours.mean(0) - theirs.mean(0))
    assert (difference < 4 * np.sqrt((ours.var(0) + theirs.var(0)) / images)).all()


def test_gaussians_that_win_no_token_leave_no_gap():
    ranks = blobs(50, (4, 4), 16, generator=seeded(0))
    found = [len(set(row)) for row in ranks.tolist()]
    assert min(found) < 16
    assert (ranks.amax(1) + 1).tolist() == found


@pytest.mark.parametrize('grid', [(8, 8), (7, 9), (1, 40)])
@pytest.mark.parametrize('segments', [(7, 3), (11, 5), (16, 4), (11, 7, 3)])
def test_blob_partitions_are_finished_before_the_next(segments, grid):
    batch, seed = 16, 3
    ranks = blobs(batch, grid, segments, generator=seeded(seed))
    gaussians = drawn_gaussians(batch, segments, seed)
    points = normalized_points(grid)
    checked = returns = 0
    for b, row in enumerate(ranks.tolist()):
        finest, *assigners = [lambda point, m=m[b], s=s[b]: most_likely(point, m, s) for m, s in gaussians]
        expected = [finest(point) for point in points]
        levels = labels_on_coarser_levels(row, points, assigners)
        if None in expected or levels is None:
            continue
        assert same_partition(row, expected)
        assert len(levels) == len(segments) - 1
        for labels in levels:
            assert contiguous(labels)
        checked += 1
        returns += any(len(labels) > len(set(labels)) > 1 for labels in levels)
    # Images with a near tie are left out above, and images with one partition or single segments say nothing.
    assert checked >= batch - 2
    assert returns >= batch // 2


# Shuffle


@PROPERTY
@given(serializations(names=('squares', 'blobs')), st.integers(1, 6), SEEDS)
def test_shuffle_keeps_the_sizes_of_the_segments(serialization, batch, seed):
    draws = [Serialization(serialization.name, serialization.grid, serialization.segments, shuffle=shuffle)(
        batch, generator=seeded(seed)) for shuffle in (False, True)]
    for plain, shuffled in zip(*(ranks.tolist() for ranks in draws)):
        assert sorted(map(len, groups_by_rank(plain))) == sorted(map(len, groups_by_rank(shuffled)))


@pytest.mark.parametrize('name, segments', [('squares', 4), ('squares', (16, 4)), ('blobs', 5), ('blobs', (11, 5))])
def test_shuffle_breaks_coherence(name, segments):
    def share_of_equal_neighbours(ranks):
        image = ranks.view(-1, 8, 8)
        across, down = image[:, :, 1:] == image[:, :, :-1], image[:, 1:] == image[:, :-1]
        return torch.cat([across.flatten(1), down.flatten(1)], dim=1).double().mean().item()

    def share_of_equal_pairs(ranks):
        pairs = (ranks[:, :, None] == ranks[:, None]).double().sum((1, 2)) - 64
        return (pairs / (64 * 63)).mean().item()

    plain, shuffled = (Serialization(name, (8, 8), segments, shuffle)(300, generator=seeded(1))
                       for shuffle in (False, True))
    assert share_of_equal_neighbours(shuffled) == pytest.approx(share_of_equal_pairs(shuffled), abs=0.01)
    assert share_of_equal_neighbours(plain) > 2 * share_of_equal_neighbours(shuffled)
