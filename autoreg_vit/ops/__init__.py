"""Segment attention: the one attention operation behind every encoder and decoder of this package."""

from .api import (
    IMPLEMENTATIONS,
    choose_implementation,
    implementation,
    segment_attention,
    segment_attention_kvpacked,
    segment_attention_qkvpacked,
    set_implementation,
)

__all__ = [
    'IMPLEMENTATIONS', 'choose_implementation', 'implementation', 'segment_attention', 'segment_attention_kvpacked',
    'segment_attention_qkvpacked', 'set_implementation',
]
