"""Ranks, order and limits against plain definitions of the papers, evaluated one token and one Gaussian at a time."""

import inspect
import itertools
import math
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from autoreg_vit.errors import SerializationError, ShapeError
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


# Order and limits


def any_ranks(tokens=20):
    """Ranks with ties, one list a row; not always dense."""
    return st.tuples(st.integers(1, 6), st.integers(1, tokens)).flatmap(
        lambda size: st.lists(st.lists(st.integers(0, 6), min_size=size[1], max_size=size[1]),
                              min_size=size[0], max_size=size[0])).map(torch.tensor)


def mask_of(limits, keys):
    """The dense mask that limits stand for, 1 where a query sees a key."""
    return (torch.arange(keys) < limits[..., None]).int()


@PROPERTY
@given(any_ranks())
def test_order_sorts_the_ranks_and_keeps_raster_order_inside_a_segment(ranks):
    order, sorted_ranks = sort_by_rank(ranks)
    assert torch.equal(sorted_ranks, ranks.gather(1, order))
    for row, got in zip(ranks.tolist(), order.tolist()):
        assert got == sorted(range(len(row)), key=lambda token: row[token])


@PROPERTY
@given(any_ranks(), st.sampled_from([0, 1, 3]))
def test_source_limits_count_ranks_up_to_mine(ranks, prefix):
    order, sorted_ranks = sort_by_rank(ranks)
    limits = source_limits(sorted_ranks, prefix)
    assert limits.dtype == torch.int32
    for b, row in enumerate(ranks.tolist()):
        counts = [prefix + sum(other <= row[token] for other in row) for token in order[b].tolist()]
        assert limits[b].tolist() == [prefix] * prefix + counts
    visible = sorted_ranks[:, None] <= sorted_ranks[:, :, None]
    assert torch.equal(mask_of(limits, prefix + ranks.shape[1])[:, prefix:, prefix:], visible.int())


@PROPERTY
@given(any_ranks(), st.sampled_from([0, 1, 3]), st.sampled_from(['self', 'none']))
def test_memory_limits_count_ranks_before_mine(ranks, prefix, first_segment):
    order, sorted_ranks = sort_by_rank(ranks)
    limits = memory_limits(sorted_ranks, first_segment, prefix)
    assert limits.dtype == torch.int32
    for b, row in enumerate(ranks.tolist()):
        counts = [sum(other < row[token] for other in row) for token in order[b].tolist()]
        if first_segment == 'self':
            counts = [count or row.count(min(row)) for count in counts]
        assert limits[b].tolist() == [prefix + count for count in counts]


def test_by_default_the_first_segment_has_no_memory_and_nothing_stands_in_front():
    assert memory_limits(torch.tensor([[0, 0, 1]])).tolist() == [[0, 0, 2]]
    assert source_limits(torch.tensor([[0, 0, 1]])).tolist() == [[2, 2, 3]]


def test_masks_of_randsac_figure_4():
    """Four tokens in three segments, of one, two and one token."""
    order, sorted_ranks = sort_by_rank(torch.tensor([[1, 2, 0, 1]]))
    assert order.tolist() == [[2, 0, 3, 1]]
    assert mask_of(source_limits(sorted_ranks), 4).tolist() == [[
        [1, 0, 0, 0],
        [1, 1, 1, 0],
        [1, 1, 1, 0],
        [1, 1, 1, 1],
    ]]
    assert mask_of(memory_limits(sorted_ranks, 'self'), 4).tolist() == [[
        [1, 0, 0, 0],
        [1, 0, 0, 0],
        [1, 0, 0, 0],
        [1, 1, 1, 0],
    ]]
    assert mask_of(memory_limits(sorted_ranks, 'none'), 4).tolist() == [[
        [0, 0, 0, 0],
        [1, 0, 0, 0],
        [1, 0, 0, 0],
        [1, 1, 1, 0],
    ]]


def test_masks_of_a_small_saim_image():
    """Three tokens visited 2, 0, 1 behind a class token that sees itself alone."""
    _, sorted_ranks = sort_by_rank(torch.tensor([[1, 2, 0]]))
    assert mask_of(source_limits(sorted_ranks, prefix=1), 4).tolist() == [[
        [1, 0, 0, 0],
        [1, 1, 0, 0],
        [1, 1, 1, 0],
        [1, 1, 1, 1],
    ]]
    assert mask_of(memory_limits(sorted_ranks, 'none', prefix=1), 4).tolist() == [[
        [1, 0, 0, 0],
        [1, 1, 0, 0],
        [1, 1, 1, 0],
    ]]


@PROPERTY
@given(st.integers(1, 6), st.integers(1, 40), SEEDS)
def test_masks_of_saim_equation_3_with_a_class_token_in_front(batch, tokens, seed):
    noise = np.random.default_rng(seed).random((batch, tokens))
    ranks = torch.from_numpy(noise.argsort(axis=1).argsort(axis=1))
    order, sorted_ranks = sort_by_rank(ranks)
    content_limits = source_limits(sorted_ranks, prefix=1)
    query_limits = memory_limits(sorted_ranks, 'none', prefix=1)
    for b, r in enumerate(noise):
        content = np.ones((tokens + 1, tokens + 1), dtype=np.int32)
        content[0, 1:] = 0
        content[1:, 1:] = r[:, None] >= r[None, :]
        query = content.copy()
        query[range(1, tokens + 1), range(1, tokens + 1)] = 0
        # The dense masks are in raster order, the limits in the order of prediction.
        behind = [0, *(order[b] + 1).tolist()]
        assert (mask_of(content_limits[b], tokens + 1).numpy() == content[behind][:, behind]).all()
        assert (mask_of(query_limits[b], tokens + 1).numpy() == query[behind[1:]][:, behind]).all()


# Errors of use


def assert_says(caught, *words):
    assert isinstance(caught.value, ValueError)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize('name, grid, segments, words', [
    ('blobs', (3, 4), 13, ['13 segments', '3 x 4', 'at most 12']),
    ('blobs', (3, 4), (13, 2), ['13 segments', 'at most 12']),
    ('squares', (2, 2), 16, ['16 segments', 'at most 4']),
    ('blobs', (8, 8), (5, 11), ['(5, 11)', 'fine to coarse', 'Write (11, 5)']),
    ('blobs', (8, 8), (11, 5, 7), ['(11, 5, 7)', 'fine to coarse']),
    ('blobs', (8, 8), (11, 5, 5), ['(11, 5, 5)', 'fewer segments']),
    ('squares', (8, 8), (4, 16), ['(4, 16)', 'fine to coarse']),
    ('squares', (8, 8), (4, 4), ['(4, 4)', 'fewer segments']),
    ('blobs', (8, 8), (), ['segments=()', 'such as 11 or (11, 5)']),
    ('squares', (8, 8), [], ['segments=[]', 'such as 11 or (11, 5)']),
    ('blobs', (8, 8), None, ['segments=None', 'such as 11 or (11, 5)']),
    ('blobs', (8, 8), '11', ["segments='11'", 'such as 11 or (11, 5)']),
    ('blobs', (8, 8), True, ['segments=True', 'such as 11 or (11, 5)']),
    ('blobs', (8, 8), 11.0, ['segments=11.0', 'such as 11 or (11, 5)']),
    ('blobs', (8, 8), 0, ['got 0', 'whole number of at least 2']),
    ('blobs', (8, 8), -3, ['got -3', 'whole number of at least 2']),
    ('blobs', (8, 8), 1, ['got 1 ', 'whole number of at least 2']),
    ('squares', (8, 8), (16, 1), ['got 1 ', '(16, 1)', 'whole number of at least 2']),
    ('squares', (8, 8), 0, ['got 0', 'whole number of at least 2']),
    ('blobs', (8, 8), (11, 5.0), ['got 5.0', '(11, 5.0)', 'whole number of at least 2']),
    ('blobs', (8, 8), (11, True), ['got True', 'whole number of at least 2']),
    ('blobs', (8, 8), ('11', '5'), ["got '11'", 'whole number of at least 2']),
    ('squares', (8, 8), 11, ['11 squares', '8 x 8', 'Possible here: 64, 16, 4.', 'Blobs take any number']),
    ('squares', (8, 8), (16, 8), ['8 squares', 'Possible here: 64, 16, 4.']),
    ('squares', (4, 6), 4, ['4 squares', '4 x 6', 'Possible here: 24, 6.']),
    ('squares', (13, 13), 4, ['4 squares', '13 x 13', 'Possible here: 169.']),
    ('squares', (3, 12), 9, ['9 squares', '3 x 12', 'Possible here: 36, 4.']),
])
def test_segments_that_cannot_be_drawn(name, grid, segments, words):
    with pytest.raises(SerializationError) as caught:
        Serialization(name, grid, segments)
    assert_says(caught, *words)
    with pytest.raises(SerializationError) as caught:
        {'squares': squares, 'blobs': blobs}[name](2, grid, segments)
    assert_says(caught, *words)


@PROPERTY
@given(GRIDS.filter(lambda g: g[0] * g[1] > 1), st.data())
def test_squares_draw_every_count_that_tiles_and_list_them_for_the_others(grid, data):
    count = data.draw(st.integers(2, grid[0] * grid[1]))
    possible = tiling_counts(grid)
    if count in possible:
        assert squares(1, grid, count).amax().item() == count - 1
        return
    with pytest.raises(SerializationError) as caught:
        squares(1, grid, count)
    listed = re.search(r'Possible here: ([\d, ]+)\.', str(caught.value))[1]
    assert [int(number) for number in listed.split(', ')] == possible


@pytest.mark.parametrize('name', ['raster', 'random'])
@pytest.mark.parametrize('options, word', [({'segments': 11}, '11'), ({'segments': (11, 5)}, '(11, 5)'),
                                           ({'segments': ()}, '()'), ({'shuffle': True}, 'shuffle (got True)')])
def test_single_tokens_take_no_segments(name, options, word):
    with pytest.raises(SerializationError) as caught:
        Serialization(name, (8, 8), **options)
    assert_says(caught, repr(name), word, 'Use squares or blobs')


@pytest.mark.parametrize('name, near', [('blob', 'blobs'), ('square', 'squares'), ('Raster', 'raster'),
                                        ('rand', 'random')])
def test_an_unknown_name_suggests_a_near_one(name, near):
    with pytest.raises(SerializationError) as caught:
        Serialization(name, (8, 8), 4)
    assert_says(caught, repr(name), f'Did you mean {near!r}')


def test_an_unknown_name_far_from_all_lists_them():
    with pytest.raises(SerializationError) as caught:
        Serialization('zigzag', (8, 8))
    assert_says(caught, "'zigzag'", 'blobs, prefix_raster, random, raster, squares')


@pytest.mark.parametrize('grid', [(0, 3), (3, 0), (-1, 3)])
@pytest.mark.parametrize('draw', [
    lambda grid: raster(2, grid),
    lambda grid: random(2, grid),
    lambda grid: squares(2, grid, 4),
    lambda grid: blobs(2, grid, 4),
], ids=['raster', 'random', 'squares', 'blobs'])
def test_an_empty_grid(draw, grid):
    with pytest.raises(ShapeError) as caught:
        draw(grid)
    assert_says(caught, str(grid), 'at least one row and one column')


@pytest.mark.parametrize('first_segment', ['both', 'Self', '', None, True])
def test_an_unknown_rule_for_the_first_segment(first_segment):
    with pytest.raises(SerializationError) as caught:
        memory_limits(torch.tensor([[0, 1]]), first_segment)
    assert_says(caught, f'got {first_segment!r}', "'self', 'none' or 'given'")


@pytest.mark.parametrize('ranks, got', [
    (torch.zeros(2, 5, dtype=torch.int64), 'torch.int64 (2, 5)'),
    (torch.zeros(3, 4, dtype=torch.int64), 'torch.int64 (3, 4)'),
    (torch.zeros(4, dtype=torch.int64), 'torch.int64 (4,)'),
    (torch.zeros(2, 4, 1, dtype=torch.int64), 'torch.int64 (2, 4, 1)'),
    (torch.zeros(2, 4, dtype=torch.int32), 'torch.int32 (2, 4)'),
    (torch.zeros(2, 4), 'torch.float32 (2, 4)'),
    (np.zeros((2, 4), dtype=np.int64), 'ndarray'),
    ([[0, 1, 2, 3]] * 2, 'list'),
    (None, 'NoneType'),
])
def test_ranks_of_the_wrong_kind(ranks, got):
    with pytest.raises(ShapeError) as caught:
        check_ranks(ranks, 2, 4)
    assert_says(caught, 'torch.int64', '(2, 4)', f'got {got}', 'draw_ranks')
