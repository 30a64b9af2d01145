"""Backward pass in one launch whose programs own a tile of queries (dq) or a tile of keys (dk, dv), in turn.

A design that the tuner may choose; not a default before it has been timed on a GPU.

The two programs of a pair run at the same time and read the same head, so q, k, v and the gradient come from memory
once and from the second-level cache after that: 8 tensors of traffic where a launch for dq and one for dk and dv move
12. Neither can wait for what the other has computed, so the programs of keys sum delta from the output themselves.
"""

import triton
import triton.language as tl

from ..launches import Launch
from ..tiles import NEVER, SCAN, load_rows, store_rows, strides


@triton.jit
def _query_gradient(
        q_ptr, k_ptr, v_ptr, limits_ptr, out_ptr, grad_ptr, lse_ptr, dq_ptr,
        q_stride, k_stride, v_stride, grad_stride, dq_stride, first, queries, keys, scale, scale_log2,
        HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr):
    """dq of queries [first, first + BLOCK) from the keys they see."""
    rows = first + tl.arange(0, BLOCK)
    query = load_rows(q_ptr, rows, queries, q_stride, HEAD_DIM)
    grad = load_rows(grad_ptr, rows, queries, grad_stride, HEAD_DIM)
    out = load_rows(out_ptr, rows, queries, grad_stride, HEAD_DIM)
    limits = tl.minimum(tl.load(limits_ptr + rows, mask=rows < queries, other=0), keys)
    lse = tl.load(lse_ptr + rows, mask=rows < queries, other=float('inf'))
    delta = tl.sum(out.to(tl.float32) * grad.to(tl.float32), 1)
    # Steps whose keys all rows see need no mask; rows beyond the last query do not count.
    everyone = tl.min(tl.where(rows < queries, limits, keys), 0)
    dq = tl.zeros([BLOCK, HEAD_DIM], tl.float32)
    for start in range(0, tl.max(limits, 0), STEP):
        columns = start + tl.arange(0, STEP)
        key = load_rows(k_ptr, columns, keys, k_stride, HEAD_DIM)
        value = load_rows(v_ptr, columns, keys, v_stride, HEAD_DIM)
        scores = tl.dot(query, tl.trans(key), input_precision='ieee') * scale_log2 - lse[:, None]  # [BLOCK, STEP]
        if start + STEP > everyone:
            scores = tl.where(columns[None, :] < limits[:, None], scores, -float('inf'))
        weights = tl.exp2(scores)
        d_weights = tl.dot(grad, tl.trans(value), input_precision='ieee')
        d_scores = weights * (d_weights - delta[:, None])
        dq += tl.dot(d_scores.to(key.dtype), key, input_precision='ieee')
    store_rows(dq_ptr, dq * scale, rows, queries, dq_stride, HEAD_DIM)


@triton.jit
def _key_gradients(
        q_ptr, k_ptr, v_ptr, limits_ptr, out_ptr, grad_ptr, lse_ptr, dk_ptr, dv_ptr,
        q_stride, k_stride, v_stride, grad_stride, dk_stride, dv_stride, first, queries, keys, scale, scale_log2,
        HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr):
    """dk and dv of keys [first, first + BLOCK) from the queries that see them."""
    # begin: the first query that sees the tile's first key; full: every query from there on sees the whole tile.
    begins = tl.full([SCAN], NEVER, tl.int32)
    fulls = tl.zeros([SCAN], tl.int32)
    beyond = tl.minimum(first + BLOCK, keys)
    for start in range(0, queries, SCAN):
        rows = start + tl.arange(0, SCAN)
        limits = tl.load(limits_ptr + rows, mask=rows < queries, other=0)
        begins = tl.minimum(begins, tl.where(limits > first, rows, NEVER))
        fulls = tl.maximum(fulls, tl.where((limits < beyond) & (rows < queries), rows + 1, 0))
    begin = tl.minimum(tl.min(begins, 0), queries) // STEP * STEP
    full = tl.max(fulls, 0)

    columns = first + tl.arange(0, BLOCK)
    key = load_rows(k_ptr, columns, keys, k_stride, HEAD_DIM)
    value = load_rows(v_ptr, columns, keys, v_stride, HEAD_DIM)
    dk = tl.zeros([BLOCK, HEAD_DIM], tl.float32)
    dv = tl.zeros([BLOCK, HEAD_DIM], tl.float32)
    # One stage, whatever the loop over keys has: a row's output is summed on its way, not kept in shared memory.
    for start in tl.range(begin, queries, STEP, num_stages=1):
        rows = start + tl.arange(0, STEP)
        query = load_rows(q_ptr, rows, queries, q_stride, HEAD_DIM)
        grad = load_rows(grad_ptr, rows, queries, grad_stride, HEAD_DIM)
        out = load_rows(out_ptr, rows, queries, grad_stride, HEAD_DIM)
        delta = tl.sum(out.to(tl.float32) * grad.to(tl.float32), 1)
        lse = tl.load(lse_ptr + rows, mask=rows < queries, other=float('inf'))
        # Transposed, [keys, queries], so that accumulators enter products as they are.
        scores = tl.dot(key, tl.trans(query), input_precision='ieee') * scale_log2 - lse[None, :]  # [BLOCK, STEP]
        if start < full:
            limits = tl.minimum(tl.load(limits_ptr + rows, mask=rows < queries, other=0), keys)
            scores = tl.where(columns[:, None] < limits[None, :], scores, -float('inf'))
        weights = tl.exp2(scores)
        # The product begins at -delta, which then holds no registers beside it.
        d_weights = tl.broadcast_to(-delta[None, :], [BLOCK, STEP])
        d_weights = tl.dot(value, tl.trans(grad), d_weights, input_precision='ieee')
        dv += tl.dot(weights.to(grad.dtype), grad, input_precision='ieee')
        dk += tl.dot((weights * d_weights).to(query.dtype), query, input_precision='ieee')
    store_rows(dk_ptr, dk * scale, columns, keys, dk_stride, HEAD_DIM)
    store_rows(dv_ptr, dv, columns, keys, dv_stride, HEAD_DIM)


@triton.jit(do_not_specialize=['queries', 'keys', 'heads'])
def paired_backward_kernel(
        q_ptr, k_ptr, v_ptr, limits_ptr, out_ptr, grad_ptr, lse_ptr, dq_ptr, dk_ptr, dv_ptr,
        q_stride_b, q_stride_n, q_stride_h, k_stride_b, k_stride_n, k_stride_h, v_stride_b, v_stride_n, v_stride_h,
        dq_stride_b, dq_stride_n, dq_stride_h, dk_stride_b, dk_stride_n, dk_stride_h,
        dv_stride_b, dv_stride_n, dv_stride_h,
        queries, keys, heads, scale, scale_log2,
        HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr):
    """One program: BLOCK queries or BLOCK keys of one head of one image. Tiles of queries and of keys take turns, so
    that work is even under monotone limits; where one kind has more tiles, its last ones follow."""
    head = tl.program_id(0) % heads
    program = tl.program_id(0) // heads
    query_tiles = tl.cdiv(queries, BLOCK)
    key_tiles = tl.cdiv(keys, BLOCK)
    image = (program // (query_tiles + key_tiles)).to(tl.int64)
    tile = program % (query_tiles + key_tiles)
    pairs = tl.minimum(query_tiles, key_tiles)
    paired = tile < 2 * pairs
    first = tl.where(paired, tile // 2, tile - pairs) * BLOCK

    q_ptr += image * q_stride_b + head * q_stride_h
    k_ptr += image * k_stride_b + head * k_stride_h
    v_ptr += image * v_stride_b + head * v_stride_h
    limits_ptr += image * queries
    out_ptr += (image * queries * heads + head) * HEAD_DIM
    grad_ptr += (image * queries * heads + head) * HEAD_DIM
    grad_stride = heads * HEAD_DIM
    lse_ptr += (image * heads + head) * queries
    if tl.where(paired, tile % 2 == 0, query_tiles > key_tiles):
        _query_gradient(
            q_ptr, k_ptr, v_ptr, limits_ptr, out_ptr, grad_ptr, lse_ptr,
            dq_ptr + image * dq_stride_b + head * dq_stride_h,
            q_stride_n, k_stride_n, v_stride_n, grad_stride, dq_stride_n, first, queries, keys, scale, scale_log2,
            HEAD_DIM, BLOCK, STEP)
    else:
        _key_gradients(
            q_ptr, k_ptr, v_ptr, limits_ptr, out_ptr, grad_ptr, lse_ptr,
            dk_ptr + image * dk_stride_b + head * dk_stride_h, dv_ptr + image * dv_stride_b + head * dv_stride_h,
            q_stride_n, k_stride_n, v_stride_n, grad_stride, dk_stride_n, dv_stride_n, first, queries, keys, scale,
            scale_log2, HEAD_DIM, BLOCK, STEP)


def paired_backward(
        q, k, v, limits, out, grad, lse, dq, dk, dv, scale: float, scale_log2: float, launch: Launch) -> None:
    """Fill dq, dk and dv for any numbers of queries and keys; `out` and `grad` are contiguous. The stages of the launch
    are those of the loop over keys."""
    batch, queries, heads, head_dim = q.shape
    keys = k.shape[1]
    tiles = triton.cdiv(queries, launch.block) + triton.cdiv(keys, launch.block)
    paired_backward_kernel[(batch * tiles * heads,)](
        q, k, v, limits, out, grad, lse, dq, dk, dv, *strides(q, k, v, dq, dk, dv), queries, keys, heads, scale,
        scale_log2, HEAD_DIM=head_dim, BLOCK=launch.block, STEP=launch.step, **launch.options())
