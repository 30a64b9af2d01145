"""Serializations that cannot be, and ranks that are none: what is said of them."""

import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from autoreg_vit.errors import SerializationError, ShapeError
from autoreg_vit.serialization import (
    Serialization,
    blobs,
    check_ranks,
    memory_limits,
    random,
    raster,
    squares,
)
from tests.support.rankings import GRIDS, PROPERTY, tiling_counts


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
