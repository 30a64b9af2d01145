"""Forward kernel of segment attention: online softmax over the keys that a tile of queries may see."""

import torch
import triton
import triton.language as tl

from .launches import FP_FUSION, capability, find_launch


@triton.jit
def scores_base2(left, right, scale_log2):
    """Scores in units of log2 e, so that exp2 gives probabilities: left [M, D], right [N, D] -> [M, N]."""
    return tl.dot(left, tl.trans(right), input_precision='ieee') * scale_log2


@triton.jit
def load_rows(pointer, rows, count, row_stride, HEAD_DIM: tl.constexpr):
    """Rows of one head [len(rows), D]; those at or beyond `count` are zero."""
    columns = tl.arange(0, HEAD_DIM)
    return tl.load(pointer + rows[:, None] * row_stride + columns[None, :], mask=rows[:, None] < count, other=0.0)


@triton.jit
def store_rows(pointer, values, rows, count, row_stride, HEAD_DIM: tl.constexpr):
    """Write rows of one head, values [len(rows), D] in the memory's own type; none at or beyond `count`."""
    columns = tl.arange(0, HEAD_DIM)
    tl.store(pointer + rows[:, None] * row_stride + columns[None, :], values.to(pointer.dtype.element_ty),
             mask=rows[:, None] < count)


@triton.jit
def _attend(
        accumulated, maximum, total, query, limits, k_ptr, v_ptr, k_stride, v_stride, first, last, keys, scale_log2,
        HEAD_DIM: tl.constexpr, STEP: tl.constexpr, MASKED: tl.constexpr):
    """Take keys [first, last) into the online softmax; without MASKED every query sees all of them."""
    for start in range(first, last, STEP):
        columns = start + tl.arange(0, STEP)
        key = load_rows(k_ptr, columns, keys, k_stride, HEAD_DIM)
        scores = scores_base2(query, key, scale_log2)  # [BLOCK, STEP]
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
def forward_kernel(
        q_ptr, k_ptr, v_ptr, limits_ptr, out_ptr, lse_ptr,
        q_stride_b, q_stride_n, q_stride_h,
        k_stride_b, k_stride_n, k_stride_h,
        v_stride_b, v_stride_n, v_stride_h,
        queries, keys, heads, scale_log2,
        HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr):
    """One program: BLOCK queries of one head of one image. Heads vary fastest, so that limits stay in cache."""
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

    # An empty row is zero, and an infinite LSE makes its probabilities and gradients zero in the backward pass.
    empty = total == 0.0
    total = tl.where(empty, 1.0, total)
    out = accumulated / total[:, None]
    lse = tl.where(empty, float('inf'), maximum + tl.log2(total))
    store_rows(out_ptr + (image * queries * heads + head) * HEAD_DIM, out, rows, queries, heads * HEAD_DIM, HEAD_DIM)
    tl.store(lse_ptr + (image * heads + head) * queries + rows, lse, mask=rows < queries)


def forward(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        limits: torch.Tensor,
        scale_log2: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output [B, Nq, H, D] and base-2 log-sum-exp of the scaled scores, float32 [B, H, Nq], +inf for empty rows."""
    batch, queries, heads, head_dim = q.shape
    launch = find_launch('forward', max(queries, k.shape[1]), head_dim, q.dtype, capability(q.device))
    out = torch.empty((batch, queries, heads, head_dim), dtype=q.dtype, device=q.device)
    lse = torch.empty((batch, heads, queries), dtype=torch.float32, device=q.device)
    grid = (batch * triton.cdiv(queries, launch.block) * heads,)
    forward_kernel[grid](
        q, k, v, limits, out, lse, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
        queries, k.shape[1], heads, scale_log2, HEAD_DIM=head_dim, BLOCK=launch.block, STEP=launch.step,
        num_warps=launch.num_warps, num_stages=launch.num_stages, enable_fp_fusion=FP_FUSION)
    return out, lse
