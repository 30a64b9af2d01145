"""Designs and launches that may serve a GPU, to be timed by `benchmarks/tune_attention.py`, the most promising first.

`rows` with a block of 64 and four warps is left out on purpose: it is right in Triton's interpreter and ends in an
illegal memory access on an H100 (Triton 3.6).
"""

import itertools
import math
from typing import Any

import torch

from autoreg_vit.ops.triton import backward, forward
from autoreg_vit.ops.triton.launches import Launch, Plan, kind_of, plan_of

Launches = list[tuple[Launch, ...]]


def single(*launches: tuple[int, ...]) -> Launches:
    """Launches of designs that tune one kernel."""
    return [(Launch(*launch),) for launch in launches]


def pairs(first: list[tuple[int, ...]], second: list[tuple[int, ...]]) -> Launches:
    """Launches of designs that tune two kernels, those of the same rank first."""
    ranks = sorted(itertools.product(range(len(first)), range(len(second))), key=lambda ij: (abs(ij[0] - ij[1]), ij))
    return [(Launch(*first[i]), Launch(*second[j])) for i, j in ranks]


FORWARD = single((64, 32, 4, 3), (128, 64, 8, 3), (64, 64, 4, 2), (64, 32, 4, 2), (128, 64, 8, 2), (64, 64, 4, 3),
                 (64, 64, 4, 1), (64, 32, 4, 4), (128, 32, 8, 3))
FORWARD_FLOAT32 = single((32, 32, 4, 1), (64, 32, 4, 1), (64, 32, 8, 1), (32, 32, 4, 2), (16, 32, 4, 1))

# By pass and bits of the dtype: the launches of each design.
CANDIDATES: dict[tuple[str, int], dict[str, Launches]] = {
    ('forward', 16): {'one_loop': FORWARD, 'two_loops': FORWARD, 'bordered': single((64, 64, 4, 1), (64, 64, 4, 1, 96)),
                      'two_heads': single((64, 64, 8, 1), (64, 64, 4, 1))},
    ('backward', 16): {
        'fused': single((64, 64, 4, 1), (64, 64, 8, 1), (64, 64, 4, 1, 128)),
        'rows': single((128, 32, 8, 1), (128, 32, 8, 2), (128, 64, 8, 1)),
        'paired': single((64, 32, 4, 3, 128), (128, 32, 8, 3, 128), (64, 32, 4, 2, 128), (64, 32, 4, 3, 168),
                         (64, 32, 4, 3), (64, 32, 8, 2), (64, 16, 4, 2)),
        'bordered': single((64, 64, 4, 1, 168), (64, 64, 8, 1), (64, 64, 4, 1)),
        'split': pairs([(64, 32, 4, 3, 96), (64, 32, 4, 3), (64, 64, 4, 2), (64, 32, 4, 2)],
                       [(64, 32, 4, 1, 128), (64, 32, 4, 1), (64, 32, 4, 2), (128, 32, 8, 1, 128), (128, 32, 8, 2)]),
        'tiled': single((64, 32, 4, 1, 128), (128, 32, 8, 1), (64, 32, 4, 2), (64, 32, 4, 1), (128, 32, 8, 2)),
        'fused_from_out': single((64, 64, 4, 1), (128, 128, 8, 1), (64, 64, 8, 1)),
        'two_heads': single((64, 64, 8, 1), (64, 64, 8, 1, 80)),
    },
    ('forward', 32): {'one_loop': FORWARD_FLOAT32, 'two_loops': FORWARD_FLOAT32},
    ('backward', 32): {
        'split': pairs([(32, 32, 4, 1), (32, 32, 8, 1), (64, 32, 8, 1)], [(32, 32, 8, 1), (32, 32, 4, 1)]),
        'tiled': single((32, 32, 8, 1), (32, 32, 4, 1), (16, 32, 4, 1)),
        'fused': single((64, 64, 8, 1), (32, 32, 4, 1)),
        'fused_from_out': single((64, 64, 8, 1)),
    },
}


def longest(direction: str, plan: Plan) -> float:
    """How many queries and keys a plan can take; infinity where any."""
    designs = forward.DESIGNS if direction == 'forward' else backward.DESIGNS
    return plan.launches[0].block + designs[plan.design].spare


def candidate_plans(direction: str, dtype: torch.dtype, tokens: int) -> list[Plan]:
    """What may serve `tokens` queries and keys: the first launch of every design, then the second, and so on."""
    designs = CANDIDATES[direction, torch.finfo(dtype).bits]
    ranks = itertools.zip_longest(*([Plan(design, launches) for launches in options]
                                    for design, options in designs.items()))
    return [plan for plan in itertools.chain(*ranks) if plan is not None and tokens <= longest(direction, plan)]


def row_of(
        direction: str,
        plan: Plan,
        arch: int,
        dtype: torch.dtype,
        head_dim: int,
        tokens: int | None,
) -> dict[str, Any]:
    """A row of the table of launches."""
    launches = [{k: v for k, v in launch._asdict().items() if v is not None} for launch in plan.launches]
    return {'pass': direction, 'design': plan.design, 'arch': arch, 'dtype': str(dtype).removeprefix('torch.'),
            'head_dim': head_dim, 'tokens': tokens, 'launches': launches, 'triton_below': None, 'timed_on': None}


def first_candidates(table: list[dict[str, Any]], archs: list[int]) -> list[dict[str, Any]]:
    """For bfloat16, which stands for both halves: the first two launches of each design that the table has not."""
    rows = []
    for direction, arch, head_dim in itertools.product(('forward', 'backward'), archs, (32, 64)):
        known = [plan_of(row) for row in table if kind_of(row) == (direction, arch, 'bfloat16', head_dim)]
        for design, options in CANDIDATES[direction, 16].items():
            for plan in (Plan(design, launches) for launches in options[:2]):
                if plan not in known:
                    tokens = longest(direction, plan)
                    rows.append(row_of(direction, plan, arch, torch.bfloat16, head_dim,
                                       None if math.isinf(tokens) else int(tokens)))
    return rows
