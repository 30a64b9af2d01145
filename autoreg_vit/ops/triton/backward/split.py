"""Backward pass in two launches: dq by tiles of queries, then dk and dv by tiles of keys.

The first writes what the second asks of queries (limits, log-sum-exp, delta), padded to whole tiles with what hides a
query (0, +inf, 0), so that the second reads them without masks.
"""

import torch
import triton
import triton.language as tl

from ..launches import Launch
from ..tiles import NEVER, SCAN, load_rows, store_rows, strides


@triton.jit(do_not_specialize=['queries', 'keys', 'heads'])
def query_gradient_kernel(
        q_ptr, k_ptr, v_ptr, limits_ptr, out_ptr, grad_ptr, lse_ptr, dq_ptr, statistics_ptr, padded_limits_ptr,
        q_stride_b, q_stride_n, q_stride_h, k_stride_b, k_stride_n, k_stride_h, v_stride_b, v_stride_n, v_stride_h,
        dq_stride_b, dq_stride_n, dq_stride_h,
        queries, keys, heads, padded, scale, scale_log2,
        HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr):
    """One program: dq of BLOCK queries of one head of one image, from the keys they see. Statistics [B, H, 2, padded]
    are log-sum-exp and delta."""
    program = tl.program_id(0)
    tiles = tl.cdiv(queries, BLOCK)
    grad_stride = heads * HEAD_DIM
    head = program % heads
    tile = program // heads
    image = (tile // tiles).to(tl.int64)
    rows = (tile % tiles) * BLOCK + tl.arange(0, BLOCK)
    offset = (image * queries * heads + head) * HEAD_DIM
    query = load_rows(q_ptr + image * q_stride_b + head * q_stride_h, rows, queries, q_stride_n, HEAD_DIM)
    grad = load_rows(grad_ptr + offset, rows, queries, grad_stride, HEAD_DIM)
    out = load_rows(out_ptr + offset, rows, queries, grad_stride, HEAD_DIM)
    limits = tl.minimum(tl.load(limits_ptr + image * queries + rows, mask=rows < queries, other=0), keys)
    lse = tl.load(lse_ptr + (image * heads + head) * queries + rows, mask=rows < queries, other=float('inf'))
    delta = tl.sum(out.to(tl.float32) * grad.to(tl.float32), 1)
    statistics_ptr += (image * heads + head) * 2 * padded
    tl.store(statistics_ptr + rows, lse)
    tl.store(statistics_ptr + padded + rows, delta)
    if head == 0:
        tl.store(padded_limits_ptr + image * padded + rows, limits)

    last = tl.max(limits, 0)
    # Steps whose keys all rows see need no mask; rows beyond the last query do not count.
    everyone = tl.maximum(tl.min(tl.where(rows < queries, limits, keys), 0), 0)
    unmasked = everyone // STEP * STEP
    k_ptr += image * k_stride_b + head * k_stride_h
    v_ptr += image * v_stride_b + head * v_stride_h
    dq = tl.zeros([BLOCK, HEAD_DIM], tl.float32)
    for start in range(0, last, STEP):
        columns = start + tl.arange(0, STEP)
        key = load_rows(k_ptr, columns, keys, k_stride_n, HEAD_DIM)
        value = load_rows(v_ptr, columns, keys, v_stride_n, HEAD_DIM)
        scores = tl.dot(query, tl.trans(key), input_precision='ieee') * scale_log2 - lse[:, None]  # [BLOCK, STEP]
        if start >= unmasked:
            scores = tl.where(columns[None, :] < limits[:, None], scores, -float('inf'))
        weights = tl.exp2(scores)
        d_weights = tl.dot(grad, tl.trans(value), input_precision='ieee')
        d_scores = weights * (d_weights - delta[:, None])
        dq += tl.dot(d_scores.to(key.dtype), key, input_precision='ieee')
    store_rows(dq_ptr + image * dq_stride_b + head * dq_stride_h, dq * scale, rows, queries, dq_stride_n, HEAD_DIM)


@triton.jit(do_not_specialize=['queries', 'keys', 'heads'])
def key_gradients_kernel(
        q_ptr, k_ptr, v_ptr, padded_limits_ptr, grad_ptr, padded_lse_ptr, padded_delta_ptr, dk_ptr, dv_ptr,
        q_stride_b, q_stride_n, q_stride_h, k_stride_b, k_stride_n, k_stride_h, v_stride_b, v_stride_n, v_stride_h,
        dk_stride_b, dk_stride_n, dk_stride_h, dv_stride_b, dv_stride_n, dv_stride_h,
        queries, keys, heads, padded, scale, scale_log2,
        HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr):
    """One program: dk and dv of BLOCK keys of one head of one image, from the queries that see them."""
    head = tl.program_id(0) % heads
    tile = tl.program_id(0) // heads
    tiles = tl.cdiv(keys, BLOCK)
    image = (tile // tiles).to(tl.int64)
    first = (tile % tiles) * BLOCK
    padded_limits_ptr += image * padded
    columns = first + tl.arange(0, BLOCK)
    key = load_rows(k_ptr + image * k_stride_b + head * k_stride_h, columns, keys, k_stride_n, HEAD_DIM)
    value = load_rows(v_ptr + image * v_stride_b + head * v_stride_h, columns, keys, v_stride_n, HEAD_DIM)
    # begin: the first query that sees the tile's first key; full: every query from there on sees the whole tile.
    begins = tl.full([SCAN], NEVER, tl.int32)
    fulls = tl.zeros([SCAN], tl.int32)
    beyond = tl.minimum(first + BLOCK, keys)
    for start in range(0, queries, SCAN):
        rows = start + tl.arange(0, SCAN)
        limits = tl.load(padded_limits_ptr + rows, mask=rows < queries, other=0)
        begins = tl.minimum(begins, tl.where(limits > first, rows, NEVER))
        fulls = tl.maximum(fulls, tl.where((limits < beyond) & (rows < queries), rows + 1, 0))
    begin = tl.minimum(tl.min(begins, 0), queries) // STEP * STEP
    full = tl.maximum(tl.cdiv(tl.max(fulls, 0), STEP) * STEP, begin)

    q_ptr += image * q_stride_b + head * q_stride_h
    grad_ptr += (image * queries * heads + head) * HEAD_DIM
    padded_lse_ptr += (image * heads + head) * 2 * padded
    padded_delta_ptr += (image * heads + head) * 2 * padded
    dk = tl.zeros([BLOCK, HEAD_DIM], tl.float32)
    dv = tl.zeros([BLOCK, HEAD_DIM], tl.float32)
    for start in range(begin, queries, STEP):
        start = tl.multiple_of(start, STEP)
        rows = start + tl.arange(0, STEP)
        query = load_rows(q_ptr, rows, queries, q_stride_n, HEAD_DIM)
        grad = load_rows(grad_ptr, rows, queries, heads * HEAD_DIM, HEAD_DIM)
        lse = tl.load(padded_lse_ptr + rows)
        delta = tl.load(padded_delta_ptr + rows)
        # Transposed, [keys, queries], so that accumulators enter products as they are.
        scores = tl.dot(key, tl.trans(query), input_precision='ieee') * scale_log2 - lse[None, :]  # [BLOCK, STEP]
        if start < full:
            limits = tl.load(padded_limits_ptr + rows)
            scores = tl.where(columns[:, None] < limits[None, :], scores, -float('inf'))
        weights = tl.exp2(scores)
        d_weights = tl.dot(value, tl.trans(grad), input_precision='ieee')
        d_scores = weights * (d_weights - delta[None, :])
        dv += tl.dot(weights.to(grad.dtype), grad, input_precision='ieee')
        dk += tl.dot(d_scores.to(query.dtype), query, input_precision='ieee')
    store_rows(dk_ptr + image * dk_stride_b + head * dk_stride_h, dk * scale, columns, keys, dk_stride_n, HEAD_DIM)
    store_rows(dv_ptr + image * dv_stride_b + head * dv_stride_h, dv, columns, keys, dv_stride_n, HEAD_DIM)


def split(
        q, k, v, limits, out, grad, lse, dq, dk, dv, scale: float, scale_log2: float, query_launch: Launch,
        key_launch: Launch) -> None:
    """Fill dq, dk and dv; `query_launch.block` must be a multiple of `key_launch.step`, the rows read unmasked."""
    batch, queries, heads, head_dim = q.shape
    keys = k.shape[1]
    tiles = triton.cdiv(queries, query_launch.block)
    padded = tiles * query_launch.block
    statistics = torch.empty((batch, heads, 2, padded), dtype=torch.float32, device=q.device)
    padded_limits = torch.empty((batch, padded), dtype=torch.int32, device=q.device)
    query_gradient_kernel[(batch * tiles * heads,)](
        q, k, v, limits, out, grad, lse, dq, statistics, padded_limits, *strides(q, k, v, dq), queries, keys, heads,
        padded, scale, scale_log2, HEAD_DIM=head_dim, BLOCK=query_launch.block, STEP=query_launch.step,
        **query_launch.options())
    key_gradients_kernel[(batch * triton.cdiv(keys, key_launch.block) * heads,)](
        q, k, v, padded_limits, grad, *statistics.unbind(2), dk, dv, *strides(q, k, v, dk, dv), queries, keys, heads,
        padded, scale, scale_log2, HEAD_DIM=head_dim, BLOCK=key_launch.block, STEP=key_launch.step,
        **key_launch.options())
