"""Forward kernels of segment attention: online softmax over the keys that a tile of queries may see.

- `one_loop_kernel` takes all keys in one loop, with a branch around the mask alone, and scales in the exponent.
- `two_loops_kernel` takes the keys that no query of the tile may see unmasked apart, in a loop of their own.
"""

from functools import partial

import torch
import triton
import triton.language as tl

from .bordered import bordered_forward
from .launches import Design, Launch, Plan, plan_for
from .tiles import load_rows, store_rows, strides
from .two_heads import two_heads_forward

# The maximum of scores that were not seen yet. Finite, so that no difference of maxima is NaN; a first score that is
# seen decays what came before it, which is nothing, and hidden scores of -inf weigh exp2(-inf) = 0 against it.
LOWEST = tl.constexpr(-1e30)


@triton.jit(do_not_specialize=['queries', 'keys', 'heads'])
def one_loop_kernel(
        q_ptr, k_ptr, v_ptr, limits_ptr, out_ptr, lse_ptr,
        q_stride_b, q_stride_n, q_stride_h, k_stride_b, k_stride_n, k_stride_h, v_stride_b, v_stride_n, v_stride_h,
        queries, keys, heads, scale_log2,
        HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr):
    """One program: BLOCK queries of one head of one image. `scale_log2` is positive: maxima are taken before it."""
    program = tl.program_id(0)
    tiles = tl.cdiv(queries, BLOCK)
    head = program % heads
    tile = program // heads
    image = (tile // tiles).to(tl.int64)
    rows = (tile % tiles) * BLOCK + tl.arange(0, BLOCK)
    limits = tl.minimum(tl.load(limits_ptr + image * queries + rows, mask=rows < queries, other=0), keys)
    last = tl.max(limits, 0)
    # Steps whose keys all rows see need no mask; rows beyond the last query do not count.
    everyone = tl.min(tl.where(rows < queries, limits, keys), 0)
    unmasked = tl.maximum(everyone, 0) // STEP * STEP
    k_ptr += image * k_stride_b + head * k_stride_h
    v_ptr += image * v_stride_b + head * v_stride_h
    query = load_rows(q_ptr + image * q_stride_b + head * q_stride_h, rows, queries, q_stride_n, HEAD_DIM)

    accumulated = tl.zeros([BLOCK, HEAD_DIM], tl.float32)
    maximum = tl.full([BLOCK], LOWEST, tl.float32)  # of scores before scaling
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, last, STEP):
        columns = start + tl.arange(0, STEP)
        key = load_rows(k_ptr, columns, keys, k_stride_n, HEAD_DIM)
        scores = tl.dot(query, tl.trans(key), input_precision='ieee')  # [BLOCK, STEP]
        if start >= unmasked:
            scores = tl.where(columns[None, :] < limits[:, None], scores, -float('inf'))
        new_maximum = tl.maximum(maximum, tl.max(scores, 1))
        weights = tl.exp2(scores * scale_log2 - (new_maximum * scale_log2)[:, None])
        # The difference comes before the product: fused, the rounding of two equal products of LOWEST is no zero.
        decay = tl.exp2((maximum - new_maximum) * scale_log2)
        total = total * decay + tl.sum(weights, 1)
        value = load_rows(v_ptr, columns, keys, v_stride_n, HEAD_DIM)
        accumulated = accumulated * decay[:, None]
        accumulated = tl.dot(weights.to(value.dtype), value, accumulated, input_precision='ieee')
        maximum = new_maximum

    # An empty row is zero, and an infinite LSE makes its probabilities and gradients zero in the backward pass.
    empty = total == 0.0
    total = tl.where(empty, 1.0, total)
    lse = tl.where(empty, float('inf'), maximum * scale_log2 + tl.log2(total))
    out = accumulated * (1.0 / total)[:, None]
    store_rows(out_ptr + (image * queries * heads + head) * HEAD_DIM, out, rows, queries, heads * HEAD_DIM, HEAD_DIM)
    tl.store(lse_ptr + (image * heads + head) * queries + rows, lse, mask=rows < queries)


@triton.jit
def _attend(
        accumulated, maximum, total, query, limits, k_ptr, v_ptr, k_stride, v_stride, first, last, keys, scale_log2,
        HEAD_DIM: tl.constexpr, STEP: tl.constexpr, MASKED: tl.constexpr):
    """Take keys [first, last) into the online softmax; without MASKED every query sees all of them."""
    for start in range(first, last, STEP):
        columns = start + tl.arange(0, STEP)
        key = load_rows(k_ptr, columns, keys, k_stride, HEAD_DIM)
        scores = tl.dot(query, tl.trans(key), input_precision='ieee') * scale_log2  # [BLOCK, STEP]
        if MASKED:
            scores = tl.where(columns[None, :] < limits[:, None], scores, -float('inf'))
        new_maximum = tl.maximum(maximum, tl.max(scores, 1))
        # A row that has seen nothing yet has no maximum: any finite number keeps its weights at exp2(-inf) = 0.
        shift = tl.where(new_maximum == -float('inf'), 0.0, new_maximum)
        weights = tl.exp2(scores - shift[:, None])
        decay = tl.exp2(maximum - shift)
        total = total * decay + tl.sum(weights, 1)
        value = load_rows(v_ptr, columns, keys, v_stride, HEAD_DIM)
        accumulated = accumulated * decay[:, None] + tl.dot(weights.to(value.dtype), value, input_precision='ieee')
        maximum = new_maximum
    return accumulated, maximum, total


@triton.jit(do_not_specialize=['queries', 'keys', 'heads'])
def two_loops_kernel(
        q_ptr, k_ptr, v_ptr, limits_ptr, out_ptr, lse_ptr,
        q_stride_b, q_stride_n, q_stride_h, k_stride_b, k_stride_n, k_stride_h, v_stride_b, v_stride_n, v_stride_h,
        queries, keys, heads, scale_log2,
        HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr):
    """One program: BLOCK queries of one head of one image."""
    head = tl.program_id(0) % heads
    tile = tl.program_id(0) // heads
    tiles = tl.cdiv(queries, BLOCK)
    image = (tile // tiles).to(tl.int64)
    rows = (tile % tiles) * BLOCK + tl.arange(0, BLOCK)
    limits = tl.load(limits_ptr + image * queries + rows, mask=rows < queries, other=0)
    limits = tl.minimum(limits, keys)
    last = tl.max(limits, 0)
    # Keys that all rows see need no mask; rows beyond the last query do not count.
    everyone = tl.min(tl.where(rows < queries, limits, keys), 0)
    unmasked = tl.maximum(everyone, 0) // STEP * STEP

    k_ptr += image * k_stride_b + head * k_stride_h
    v_ptr += image * v_stride_b + head * v_stride_h
    query = load_rows(q_ptr + image * q_stride_b + head * q_stride_h, rows, queries, q_stride_n, HEAD_DIM)

    accumulated = tl.zeros([BLOCK, HEAD_DIM], tl.float32)
    maximum = tl.full([BLOCK], -float('inf'), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    accumulated, maximum, total = _attend(
        accumulated, maximum, total, query, limits, k_ptr, v_ptr, k_stride_n, v_stride_n, 0, unmasked, keys,
        scale_log2, HEAD_DIM, STEP, False)
    accumulated, maximum, total = _attend(
        accumulated, maximum, total, query, limits, k_ptr, v_ptr, k_stride_n, v_stride_n, unmasked, last, keys,
        scale_log2, HEAD_DIM, STEP, True)

    # As in one_loop_kernel.
    empty = total == 0.0
    total = tl.where(empty, 1.0, total)
    out = accumulated / total[:, None]
    lse = tl.where(empty, float('inf'), maximum + tl.log2(total))
    store_rows(out_ptr + (image * queries * heads + head) * HEAD_DIM, out, rows, queries, heads * HEAD_DIM, HEAD_DIM)
    tl.store(lse_ptr + (image * heads + head) * queries + rows, lse, mask=rows < queries)


def _fill(kernel, q, k, v, limits, out, lse, scale_log2: float, launch: Launch) -> None:
    batch, queries, heads, head_dim = q.shape
    kernel[(batch * triton.cdiv(queries, launch.block) * heads,)](
        q, k, v, limits, out, lse, *strides(q, k, v), queries, k.shape[1], heads, scale_log2, HEAD_DIM=head_dim,
        BLOCK=launch.block, STEP=launch.step, **launch.options())


# fill(q, k, v, limits, out, lse, scale_log2, launch); those below `two_loops` wait to be timed.
DESIGNS = {
    'one_loop': Design(partial(_fill, one_loop_kernel)),
    'two_loops': Design(partial(_fill, two_loops_kernel)),
    'bordered': Design(bordered_forward, spare=1),
    'two_heads': Design(two_heads_forward, spare=0),
}


def forward(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, limits: torch.Tensor, scale_log2: float,
        plan: Plan | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Output [B, Nq, H, D] and base-2 log-sum-exp of the scaled scores, float32 [B, H, Nq], +inf for empty rows; by the
    plan of the table where none is given."""
    plan = plan or plan_for('forward', q, k)
    if scale_log2 <= 0:
        # Kernels take positive scales: the same scores come of other queries.
        q, scale_log2 = (-q, -scale_log2) if scale_log2 else (torch.zeros_like(q), 1.0)
    batch, queries, heads, head_dim = q.shape
    out = torch.empty((batch, queries, heads, head_dim), dtype=q.dtype, device=q.device)
    lse = torch.empty((batch, heads, queries), dtype=torch.float32, device=q.device)
    DESIGNS[plan.design].fill(q, k, v, limits, out, lse, scale_log2, *plan.launches)
    return out, lse
