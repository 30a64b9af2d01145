"""One query and one key more than a tile holds: the first ones border it. SAIM's 64 patches and a class token.

A design that the tuner may choose; not a default before it has been timed on a GPU.

The first query, the first key and where they meet are taken apart from the tile of all others, under the same limits:
nothing is assumed of the first token, nor of the order of limits. A tile padded to hold 65 tokens would multiply four
times as much, and half of its lanes would load and exponentiate nothing. Scores of the border are vector products, and
it adds to the tile by outer products; sums over the tile's rows are a product's first row (16 are the least it has).
"""

import triton
import triton.language as tl

from .launches import Launch
from .tiles import load_rows, store_rows, strides


@triton.jit
def _first_row(pointer, count, HEAD_DIM: tl.constexpr):
    """The first row of one head [D] as float32; zero where `count` is."""
    columns = tl.arange(0, HEAD_DIM)
    return tl.load(pointer + columns, mask=columns < count * HEAD_DIM, other=0.0).to(tl.float32)


@triton.jit
def _times_row(rows, row):
    """Products of rows [N, D] with one row [D] -> [N]."""
    return tl.sum(rows.to(tl.float32) * row[None, :], 1)


@triton.jit
def _weighted_sum(weights, rows):
    """Sum of rows [N, D] with weights [N], as the first of 16 rows [16, D]; the others are zero."""
    weights = tl.where(tl.arange(0, 16)[:, None] == 0, weights[None, :], 0.0)
    return tl.dot(weights.to(rows.dtype), rows, input_precision='ieee')


@triton.jit
def _store_first(pointer, values, count, HEAD_DIM: tl.constexpr):
    """Write the first of values [16, D] as the first row of one head, unless `count` is zero."""
    store_rows(pointer, values, tl.arange(0, 16), tl.minimum(count, 1), 0, HEAD_DIM)


@triton.jit(do_not_specialize=['queries', 'keys', 'heads'])
def bordered_forward_kernel(
        q_ptr, k_ptr, v_ptr, limits_ptr, out_ptr, lse_ptr,
        q_stride_b, q_stride_n, q_stride_h, k_stride_b, k_stride_n, k_stride_h, v_stride_b, v_stride_n, v_stride_h,
        queries, keys, heads, scale_log2,
        HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr):
    """One program: one head of one image, queries <= BLOCK + 1 and keys <= BLOCK + 1."""
    head = tl.program_id(0) % heads
    image = (tl.program_id(0) // heads).to(tl.int64)
    q_ptr += image * q_stride_b + head * q_stride_h
    k_ptr += image * k_stride_b + head * k_stride_h
    v_ptr += image * v_stride_b + head * v_stride_h
    limits_ptr += image * queries
    out_ptr += (image * queries * heads + head) * HEAD_DIM
    lse_ptr += (image * heads + head) * queries
    rows = 1 + tl.arange(0, BLOCK)
    query = load_rows(q_ptr, rows, queries, q_stride_n, HEAD_DIM)
    key = load_rows(k_ptr, rows, keys, k_stride_n, HEAD_DIM)
    value = load_rows(v_ptr, rows, keys, v_stride_n, HEAD_DIM)
    first_query = _first_row(q_ptr, queries, HEAD_DIM)
    first_key = _first_row(k_ptr, keys, HEAD_DIM)
    first_value = _first_row(v_ptr, keys, HEAD_DIM)
    limits = tl.minimum(tl.load(limits_ptr + rows, mask=rows < queries, other=0), keys)
    first_limit = tl.minimum(tl.load(limits_ptr, mask=queries > 0, other=0), keys)

    # The first query. An empty row is zero, and an infinite LSE makes its probabilities and gradients zero in the
    # backward pass.
    seen = first_limit > 0
    scores = tl.where(rows < first_limit, _times_row(key, first_query) * scale_log2, -float('inf'))
    corner = tl.where(seen, tl.sum(first_query * first_key, 0) * scale_log2, -float('inf'))
    maximum = tl.maximum(tl.max(scores, 0), corner)
    shift = tl.where(seen, maximum, 0.0)
    weights, corner = tl.exp2(scores - shift), tl.exp2(corner - shift)
    total = tl.where(seen, tl.sum(weights, 0) + corner, 1.0)
    out = (_weighted_sum(weights, value) + corner * first_value[None, :]) / total
    _store_first(out_ptr, out, queries, HEAD_DIM)
    tl.store(lse_ptr, tl.where(seen, maximum + tl.log2(total), float('inf')), mask=queries > 0)

    # The tile's queries, on its keys and on the first key.
    seen = limits > 0
    scores = tl.dot(query, tl.trans(key), input_precision='ieee') * scale_log2  # [queries, keys]
    scores = tl.where(rows[None, :] < limits[:, None], scores, -float('inf'))
    border = tl.where(seen, _times_row(query, first_key) * scale_log2, -float('inf'))
    maximum = tl.maximum(tl.max(scores, 1), border)
    shift = tl.where(seen, maximum, 0.0)
    weights, border = tl.exp2(scores - shift[:, None]), tl.exp2(border - shift)
    total = tl.where(seen, tl.sum(weights, 1) + border, 1.0)
    out = tl.dot(weights.to(value.dtype), value, input_precision='ieee') + border[:, None] * first_value[None, :]
    store_rows(out_ptr, out / total[:, None], rows, queries, heads * HEAD_DIM, HEAD_DIM)
    lse = tl.where(seen, maximum + tl.log2(total), float('inf'))
    tl.store(lse_ptr + rows, lse, mask=rows < queries)


@triton.jit(do_not_specialize=['queries', 'keys', 'heads'])
def bordered_backward_kernel(
        q_ptr, k_ptr, v_ptr, limits_ptr, grad_ptr, lse_ptr, dq_ptr, dk_ptr, dv_ptr,
        q_stride_b, q_stride_n, q_stride_h, k_stride_b, k_stride_n, k_stride_h, v_stride_b, v_stride_n, v_stride_h,
        dq_stride_b, dq_stride_n, dq_stride_h, dk_stride_b, dk_stride_n, dk_stride_h,
        dv_stride_b, dv_stride_n, dv_stride_h,
        queries, keys, heads, scale, scale_log2,
        HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr):
    """One program: one head of one image, queries <= BLOCK + 1 and keys <= BLOCK + 1. The output is not read: all
    probabilities of a row are here, and delta is their sum weighted by their gradients."""
    head = tl.program_id(0) % heads
    image = (tl.program_id(0) // heads).to(tl.int64)
    q_ptr += image * q_stride_b + head * q_stride_h
    k_ptr += image * k_stride_b + head * k_stride_h
    v_ptr += image * v_stride_b + head * v_stride_h
    limits_ptr += image * queries
    grad_ptr += (image * queries * heads + head) * HEAD_DIM
    lse_ptr += (image * heads + head) * queries
    dq_ptr += image * dq_stride_b + head * dq_stride_h
    dk_ptr += image * dk_stride_b + head * dk_stride_h
    dv_ptr += image * dv_stride_b + head * dv_stride_h
    rows = 1 + tl.arange(0, BLOCK)
    query = load_rows(q_ptr, rows, queries, q_stride_n, HEAD_DIM)
    key = load_rows(k_ptr, rows, keys, k_stride_n, HEAD_DIM)
    grad = load_rows(grad_ptr, rows, queries, heads * HEAD_DIM, HEAD_DIM)
    value = load_rows(v_ptr, rows, keys, v_stride_n, HEAD_DIM)
    first_query = _first_row(q_ptr, queries, HEAD_DIM)
    first_key = _first_row(k_ptr, keys, HEAD_DIM)
    first_grad = _first_row(grad_ptr, queries, HEAD_DIM)
    first_value = _first_row(v_ptr, keys, HEAD_DIM)
    limits = tl.minimum(tl.load(limits_ptr + rows, mask=rows < queries, other=0), keys)
    lse = tl.load(lse_ptr + rows, mask=rows < queries, other=float('inf'))
    first_limit = tl.minimum(tl.load(limits_ptr, mask=queries > 0, other=0), keys)
    first_lse = tl.load(lse_ptr, mask=queries > 0, other=float('inf'))

    # The first query: where it meets the first key, and its row of weights on the tile's keys.
    corner = tl.sum(first_query * first_key, 0) * scale_log2 - first_lse
    corner = tl.exp2(tl.where(first_limit > 0, corner, -float('inf')))
    row = tl.exp2(tl.where(rows < first_limit, _times_row(key, first_query) * scale_log2 - first_lse, -float('inf')))
    d_corner = tl.sum(first_value * first_grad, 0)
    d_row = _times_row(value, first_grad)
    delta = tl.sum(row * d_row, 0) + corner * d_corner
    d_corner = corner * (d_corner - delta)
    d_row = row * (d_row - delta)
    _store_first(dq_ptr, (_weighted_sum(d_row, key) + d_corner * first_key[None, :]) * scale, queries, HEAD_DIM)

    # The first key: the column of weights that the tile's queries give it.
    column = tl.exp2(tl.where(limits > 0, _times_row(query, first_key) * scale_log2 - lse, -float('inf')))
    d_column = _times_row(grad, first_value)
    _store_first(dv_ptr, _weighted_sum(column, grad) + corner * first_grad[None, :], keys, HEAD_DIM)

    # The tile, transposed, [keys, queries], so that accumulators enter products as they are.
    scores = tl.dot(key, tl.trans(query), input_precision='ieee') * scale_log2 - lse[None, :]
    weights = tl.exp2(tl.where(rows[:, None] < limits[None, :], scores, -float('inf')))
    d_weights = tl.dot(value, tl.trans(grad), input_precision='ieee')
    delta = tl.sum(weights * d_weights, 0) + column * d_column
    d_scores = (weights * (d_weights - delta[None, :])).to(query.dtype)
    d_column = column * (d_column - delta)
    _store_first(dk_ptr, (_weighted_sum(d_column, query) + d_corner * first_query[None, :]) * scale, keys, HEAD_DIM)

    # First rows are read again (from the first-level cache) rather than kept in registers until here.
    dv = tl.dot(weights.to(grad.dtype), grad, input_precision='ieee')
    dv += row[:, None] * _first_row(grad_ptr, queries, HEAD_DIM)[None, :]
    store_rows(dv_ptr, dv, rows, keys, dv_stride_n, HEAD_DIM)
    dk = tl.dot(d_scores, query, input_precision='ieee')
    dk += d_row[:, None] * _first_row(q_ptr, queries, HEAD_DIM)[None, :]
    store_rows(dk_ptr, dk * scale, rows, keys, dk_stride_n, HEAD_DIM)
    # dq transposed, [D, queries]: the transpose falls on the loaded keys, never on an accumulator.
    dq = tl.dot(tl.trans(key), d_scores, input_precision='ieee')
    dq += _first_row(k_ptr, keys, HEAD_DIM)[:, None] * d_column[None, :]
    dims = tl.arange(0, HEAD_DIM)
    tl.store(dq_ptr + rows[None, :] * dq_stride_n + dims[:, None], (dq * scale).to(dq_ptr.dtype.element_ty),
             mask=rows[None, :] < queries)


def bordered_forward(q, k, v, limits, out, lse, scale_log2: float, launch: Launch) -> None:
    """Fill out and lse where the block and one row more hold all queries and all keys; `out` is contiguous."""
    batch, queries, heads, head_dim = q.shape
    bordered_forward_kernel[(batch * heads,)](
        q, k, v, limits, out, lse, *strides(q, k, v), queries, k.shape[1], heads, scale_log2, HEAD_DIM=head_dim,
        BLOCK=launch.block, **launch.options())


def bordered_backward(
        q, k, v, limits, out, grad, lse, dq, dk, dv, scale: float, scale_log2: float, launch: Launch) -> None:
    """Fill dq, dk and dv where the block and one row more hold all queries and all keys; `grad` is contiguous."""
    batch, queries, heads, head_dim = q.shape
    bordered_backward_kernel[(batch * heads,)](
        q, k, v, limits, grad, lse, dq, dk, dv, *strides(q, k, v, dq, dk, dv), queries, k.shape[1], heads, scale,
        scale_log2, HEAD_DIM=head_dim, BLOCK=launch.block, **launch.options())
