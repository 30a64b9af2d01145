"""Order and limits of ranks, against definitions and the masks that the papers print."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from autoreg_vit.serialization import (
    memory_limits,
    sort_by_rank,
    source_limits,
)
from tests.support.rankings import PROPERTY, SEEDS


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
