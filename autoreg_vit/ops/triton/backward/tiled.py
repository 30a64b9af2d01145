"""Backward pass in one launch beside that of delta: a program owns a tile of queries and one of keys.

Under monotone limits dq has the more work the later the tile, dk and dv the less, so programs are balanced.
"""

import torch
import triton
import triton.language as tl

from ..launches import Launch
from ..tiles import load_rows, store_rows, strides

# Of delta_kernel, a row sum of two tensors: bound by memory whatever the launch.
DELTA = Launch(block=32, step=32, num_warps=4, num_stages=1)


@triton.jit(do_not_specialize=['queries', 'heads'])
def delta_kernel(out_ptr, grad_ptr, delta_ptr, queries, heads, HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr):
    """delta = sum over D of out * grad, [B, H, Nq]: what the softmax takes off every score's gradient of a row."""
    head = tl.program_id(0) % heads
    tile = tl.program_id(0) // heads
    tiles = tl.cdiv(queries, BLOCK)
    image = (tile // tiles).to(tl.int64)
    rows = (tile % tiles) * BLOCK + tl.arange(0, BLOCK)
    offset = (image * queries * heads + head) * HEAD_DIM
    out = load_rows(out_ptr + offset, rows, queries, heads * HEAD_DIM, HEAD_DIM)
    grad = load_rows(grad_ptr + offset, rows, queries, heads * HEAD_DIM, HEAD_DIM)
    delta = tl.sum(out.to(tl.float32) * grad.to(tl.float32), 1)
    tl.store(delta_ptr + (image * heads + head) * queries + rows, delta, mask=rows < queries)


@triton.jit
def _query_gradient(
        q_ptr, k_ptr, v_ptr, limits_ptr, grad_ptr, lse_ptr, delta_ptr, dq_ptr,
        q_stride, k_stride, v_stride, grad_stride, dq_stride, first, queries, keys, scale, scale_log2,
        HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr):
    """dq of queries [first, first + BLOCK) from the keys they see."""
    rows = first + tl.arange(0, BLOCK)
    query = load_rows(q_ptr, rows, queries, q_stride, HEAD_DIM)
    grad = load_rows(grad_ptr, rows, queries, grad_stride, HEAD_DIM)
    limits = tl.minimum(tl.load(limits_ptr + rows, mask=rows < queries, other=0), keys)
    lse = tl.load(lse_ptr + rows, mask=rows < queries, other=float('inf'))
    delta = tl.load(delta_ptr + rows, mask=rows < queries, other=0.0)
    dq = tl.zeros([BLOCK, HEAD_DIM], tl.float32)
    for start in range(0, tl.max(limits, 0), STEP):
        columns = start + tl.arange(0, STEP)
        key = load_rows(k_ptr, columns, keys, k_stride, HEAD_DIM)
        value = load_rows(v_ptr, columns, keys, v_stride, HEAD_DIM)
        scores = tl.dot(query, tl.trans(key), input_precision='ieee') * scale_log2  # [BLOCK, STEP]
        weights = tl.exp2(tl.where(columns[None, :] < limits[:, None], scores - lse[:, None], -float('inf')))
        d_weights = tl.dot(grad, tl.trans(value), input_precision='ieee')
        d_scores = weights * (d_weights - delta[:, None])
        dq += tl.dot(d_scores.to(key.dtype), key, input_precision='ieee')
    store_rows(dq_ptr, dq * scale, rows, queries, dq_stride, HEAD_DIM)


@triton.jit
def _key_gradients(
        q_ptr, k_ptr, v_ptr, limits_ptr, grad_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr,
        q_stride, k_stride, v_stride, grad_stride, dk_stride, dv_stride, first, queries, keys, scale, scale_log2,
        HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr):
    """dk and dv of keys [first, first + BLOCK) from the queries that see them."""
    # The queries between the first and the last that see the first key of the tile: under monotone limits a suffix.
    begin, end = queries, 0
    for start in range(0, queries, BLOCK):
        rows = start + tl.arange(0, BLOCK)
        sees = tl.load(limits_ptr + rows, mask=rows < queries, other=0) > first
        begin = tl.minimum(begin, tl.min(tl.where(sees, rows, queries), 0))
        end = tl.maximum(end, tl.max(tl.where(sees, rows + 1, 0), 0))

    columns = first + tl.arange(0, BLOCK)
    key = load_rows(k_ptr, columns, keys, k_stride, HEAD_DIM)
    value = load_rows(v_ptr, columns, keys, v_stride, HEAD_DIM)
    dk = tl.zeros([BLOCK, HEAD_DIM], tl.float32)
    dv = tl.zeros([BLOCK, HEAD_DIM], tl.float32)
    for start in range(begin // STEP * STEP, end, STEP):
        rows = start + tl.arange(0, STEP)
        query = load_rows(q_ptr, rows, queries, q_stride, HEAD_DIM)
        grad = load_rows(grad_ptr, rows, queries, grad_stride, HEAD_DIM)
        limits = tl.minimum(tl.load(limits_ptr + rows, mask=rows < queries, other=0), keys)
        lse = tl.load(lse_ptr + rows, mask=rows < queries, other=float('inf'))
        delta = tl.load(delta_ptr + rows, mask=rows < queries, other=0.0)
        # Transposed, [keys, queries], so that accumulators enter products as they are.
        scores = tl.dot(key, tl.trans(query), input_precision='ieee') * scale_log2  # [BLOCK, STEP]
        weights = tl.exp2(tl.where(columns[:, None] < limits[None, :], scores - lse[None, :], -float('inf')))
        dv += tl.dot(weights.to(grad.dtype), grad, input_precision='ieee')
        d_weights = tl.dot(value, tl.trans(grad), input_precision='ieee')
        d_scores = weights * (d_weights - delta[None, :])
        dk += tl.dot(d_scores.to(query.dtype), query, input_precision='ieee')
    store_rows(dk_ptr, dk * scale, columns, keys, dk_stride, HEAD_DIM)
    store_rows(dv_ptr, dv, columns, keys, dv_stride, HEAD_DIM)


@triton.jit(do_not_specialize=['queries', 'keys', 'heads'])
def tiled_kernel(
        q_ptr, k_ptr, v_ptr, limits_ptr, grad_ptr, lse_ptr, delta_ptr, dq_ptr, dk_ptr, dv_ptr,
        q_stride_b, q_stride_n, q_stride_h, k_stride_b, k_stride_n, k_stride_h, v_stride_b, v_stride_n, v_stride_h,
        dq_stride_b, dq_stride_n, dq_stride_h, dk_stride_b, dk_stride_n, dk_stride_h,
        dv_stride_b, dv_stride_n, dv_stride_h,
        queries, keys, heads, scale, scale_log2,
        HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr):
    """One program: BLOCK queries and BLOCK keys of one head of one image."""
    head = tl.program_id(0) % heads
    tile = tl.program_id(0) // heads
    tiles = tl.cdiv(tl.maximum(queries, keys), BLOCK)
    image = (tile // tiles).to(tl.int64)
    first = (tile % tiles) * BLOCK
    q_ptr += image * q_stride_b + head * q_stride_h
    k_ptr += image * k_stride_b + head * k_stride_h
    v_ptr += image * v_stride_b + head * v_stride_h
    limits_ptr += image * queries
    grad_ptr += (image * queries * heads + head) * HEAD_DIM
    grad_stride = heads * HEAD_DIM
    lse_ptr += (image * heads + head) * queries
    delta_ptr += (image * heads + head) * queries
    if first < queries:
        _query_gradient(
            q_ptr, k_ptr, v_ptr, limits_ptr, grad_ptr, lse_ptr, delta_ptr,
            dq_ptr + image * dq_stride_b + head * dq_stride_h,
            q_stride_n, k_stride_n, v_stride_n, grad_stride, dq_stride_n, first, queries, keys, scale, scale_log2,
            HEAD_DIM, BLOCK, STEP)
    if first < keys:
        _key_gradients(
            q_ptr, k_ptr, v_ptr, limits_ptr, grad_ptr, lse_ptr, delta_ptr,
            dk_ptr + image * dk_stride_b + head * dk_stride_h, dv_ptr + image * dv_stride_b + head * dv_stride_h,
            q_stride_n, k_stride_n, v_stride_n, grad_stride, dk_stride_n, dv_stride_n, first, queries, keys, scale,
            scale_log2, HEAD_DIM, BLOCK, STEP)


def tiled(q, k, v, limits, out, grad, lse, dq, dk, dv, scale: float, scale_log2: float, launch: Launch) -> None:
    """Fill dq, dk and dv."""
    batch, queries, heads, head_dim = q.shape
    keys = k.shape[1]
    delta = torch.empty_like(lse)
    delta_kernel[(batch * triton.cdiv(queries, DELTA.block) * heads,)](
        out, grad, delta, queries, heads, HEAD_DIM=head_dim, BLOCK=DELTA.block, **DELTA.options())
    tiled_kernel[(batch * triton.cdiv(max(queries, keys), launch.block) * heads,)](
        q, k, v, limits, grad, lse, delta, dq, dk, dv, *strides(q, k, v, dq, dk, dv), queries, keys, heads, scale,
        scale_log2, HEAD_DIM=head_dim, BLOCK=launch.block, STEP=launch.step, **launch.options())
