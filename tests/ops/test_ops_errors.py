"""Tensors and implementations that segment attention refuses, and what it says."""

import pytest
import torch

from autoreg_vit.errors import ModelError, ShapeError
from autoreg_vit.ops import (
    IMPLEMENTATIONS,
    segment_attention,
    segment_attention_kvpacked,
    segment_attention_qkvpacked,
)
from tests.support.attention import arguments

# Errors of use


def changed(**changes):
    """Valid arguments by name, some of them replaced."""
    q, k, v, limits, _ = arguments((2, 3, 4, 2, 5))
    return {'q': q, 'k': k, 'v': v, 'limits': limits, **changes}


@pytest.mark.parametrize('changes, words', [
    ({'q': torch.zeros(2, 3, 10)}, ['q (2, 3, 10)', '[B, Nq, H, D]']),
    ({'q': torch.zeros(1, 3, 2, 5)}, ['q (1, 3, 2, 5)', 'k (2, 4, 2, 5)', 'same B, H and D']),
    ({'q': torch.zeros(2, 3, 1, 5)}, ['q (2, 3, 1, 5)', 'same B, H and D']),
    ({'q': torch.zeros(2, 3, 2, 6)}, ['q (2, 3, 2, 6)', 'same B, H and D']),
    ({'k': torch.zeros(2, 4, 10)}, ['k (2, 4, 10)', '[B, Nk, H, D]']),
    ({'k': torch.zeros(2, 5, 2, 5)}, ['k (2, 5, 2, 5)', 'v (2, 4, 2, 5)']),
    ({'v': torch.zeros(2, 4, 2, 6)}, ['k (2, 4, 2, 5)', 'v (2, 4, 2, 6)']),
    ({'v': torch.zeros(2, 1, 2, 5)}, ['v (2, 1, 2, 5)']),
    ({'k': torch.zeros(2, 40), 'v': torch.zeros(2, 40)}, ['k (2, 40)', 'v (2, 40)']),
    ({'limits': torch.zeros(2, 3, dtype=torch.int64)}, ['torch.int32', '(2, 3)', 'got torch.int64', 'source_limits']),
    ({'limits': torch.zeros(2, 3)}, ['torch.int32', 'got torch.float32']),
    ({'limits': torch.zeros(2, 3, dtype=torch.bool)}, ['torch.int32', 'got torch.bool']),
    ({'limits': torch.zeros(2, 4, dtype=torch.int32)}, ['shape (2, 3)', 'got torch.int32 (2, 4)', 'memory_limits']),
    ({'limits': torch.zeros(1, 3, dtype=torch.int32)}, ['shape (2, 3)', '(1, 3)']),
    ({'limits': torch.zeros(3, dtype=torch.int32)}, ['shape (2, 3)', '(3,)']),
    ({'limits': torch.zeros(2, 2, 3, dtype=torch.int32)}, ['shape (2, 3)', '(2, 2, 3)']),
    ({'q': torch.zeros(2, 3, 2, 5, dtype=torch.bfloat16)}, ['one dtype', 'torch.bfloat16', 'torch.float32']),
    ({'k': torch.zeros(2, 4, 2, 5, dtype=torch.float64)}, ['one dtype', 'torch.float64', 'torch.float32']),
    ({'v': torch.zeros(2, 4, 2, 5, dtype=torch.float16)}, ['one dtype', 'torch.float16', 'torch.float32']),
    ({'q': torch.zeros(2, 3, 2, 5, device='meta')}, ['one device', 'meta', 'cpu']),
    ({'limits': torch.zeros(2, 3, dtype=torch.int32, device='meta')}, ['one device', 'meta', 'cpu']),
])
@pytest.mark.parametrize('impl', ['auto', *IMPLEMENTATIONS])
def test_tensors_that_do_not_fit_together(impl, changes, words):
    with pytest.raises(ShapeError) as caught:
        segment_attention(**changed(**changes), impl=impl)
    assert isinstance(caught.value, ValueError)
    for word in words:
        assert word in str(caught.value)


def test_packed_layouts_are_checked_too():
    limits = torch.zeros(2, 3, dtype=torch.int32)
    with pytest.raises(ShapeError, match='limits must be'):
        segment_attention_qkvpacked(torch.zeros(2, 4, 3, 2, 5), limits)
    with pytest.raises(ShapeError, match='limits must be'):
        segment_attention_kvpacked(torch.zeros(2, 3, 2, 5), torch.zeros(2, 4, 2, 2, 5), limits.long())
    with pytest.raises(ShapeError, match='same B, H and D'):
        segment_attention_kvpacked(torch.zeros(2, 3, 2, 5), torch.zeros(2, 4, 2, 2, 6), limits)


@pytest.mark.parametrize('shape', [(2, 3, 2, 2, 5), (2, 3, 4, 2, 5), (2, 3, 30)], ids=str)
def test_a_qkv_axis_of_the_wrong_size(shape):
    with pytest.raises(ShapeError):
        segment_attention_qkvpacked(torch.zeros(shape), torch.zeros(2, 3, dtype=torch.int32))


@pytest.mark.parametrize('shape', [(2, 4, 1, 2, 5), (2, 4, 3, 2, 5), (2, 4, 20)], ids=str)
def test_a_kv_axis_of_the_wrong_size(shape):
    with pytest.raises(ShapeError):
        segment_attention_kvpacked(torch.zeros(2, 3, 2, 5), torch.zeros(shape), torch.zeros(2, 3, dtype=torch.int32))


@pytest.mark.parametrize('name, words', [
    ('spda', "Did you mean 'sdpa'"),
    ('eagre', "Did you mean 'eager'"),
    ('Auto', "Did you mean 'auto'"),
    ('flash', 'Known: auto, eager'),
    ('api', 'Unknown implementation'),
])
def test_an_unknown_implementation(name, words):
    q, k, v, limits, _ = arguments((2, 3, 3, 2, 5))
    calls = [
        lambda: segment_attention(q, k, v, limits, impl=name),
        lambda: segment_attention_qkvpacked(torch.stack([q, k, v], dim=2), limits, impl=name),
        lambda: segment_attention_kvpacked(q, torch.stack([k, v], dim=2), limits, impl=name),
    ]
    for call in calls:
        with pytest.raises(ModelError) as caught:
            call()
        assert isinstance(caught.value, ValueError)
        assert repr(name) in str(caught.value)
        assert words in str(caught.value)
