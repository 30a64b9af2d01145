"""Backward pass with one program a head, where a tile holds all its queries: scores are computed once.

- `fused_kernel` has all keys in the tile too, and does not read the output.
- `fused_from_out_kernel` is the same with delta from the output.
- `rows_kernel` takes the keys in steps.
"""

import triton
import triton.language as tl

from ..launches import Launch
from ..tiles import load_rows, store_rows, strides


@triton.jit(do_not_specialize=['queries', 'keys', 'heads'])
def fused_kernel(
        q_ptr, k_ptr, v_ptr, limits_ptr, out_ptr, grad_ptr, lse_ptr, dq_ptr, dk_ptr, dv_ptr,
        q_stride_b, q_stride_n, q_stride_h, k_stride_b, k_stride_n, k_stride_h, v_stride_b, v_stride_n, v_stride_h,
        dq_stride_b, dq_stride_n, dq_stride_h, dk_stride_b, dk_stride_n, dk_stride_h,
        dv_stride_b, dv_stride_n, dv_stride_h,
        queries, keys, heads, scale, scale_log2,
        HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr):
    """One program: one head of one image, queries <= BLOCK and keys <= BLOCK. The output is not read: all
    probabilities of a row are in the tile, and delta is their sum weighted by their gradients."""
    head = tl.program_id(0) % heads
    image = (tl.program_id(0) // heads).to(tl.int64)
    rows = tl.arange(0, BLOCK)
    offset = (image * queries * heads + head) * HEAD_DIM
    query = load_rows(q_ptr + image * q_stride_b + head * q_stride_h, rows, queries, q_stride_n, HEAD_DIM)
    key = load_rows(k_ptr + image * k_stride_b + head * k_stride_h, rows, keys, k_stride_n, HEAD_DIM)
    grad = load_rows(grad_ptr + offset, rows, queries, heads * HEAD_DIM, HEAD_DIM)
    value = load_rows(v_ptr + image * v_stride_b + head * v_stride_h, rows, keys, v_stride_n, HEAD_DIM)
    limits = tl.load(limits_ptr + image * queries + rows, mask=rows < queries, other=0)
    lse = tl.load(lse_ptr + (image * heads + head) * queries + rows, mask=rows < queries, other=float('inf'))

    # Transposed, [keys, queries], so that accumulators enter products as they are.
    visible = rows[:, None] < tl.minimum(limits, keys)[None, :]
    scores = tl.dot(key, tl.trans(query), input_precision='ieee') * scale_log2 - lse[None, :]
    weights = tl.exp2(tl.where(visible, scores, -float('inf')))
    d_weights = tl.dot(value, tl.trans(grad), input_precision='ieee')
    delta = tl.sum(weights * d_weights, 0)
    d_scores = (weights * (d_weights - delta[None, :])).to(query.dtype)
    dv = tl.dot(weights.to(grad.dtype), grad, input_precision='ieee')
    store_rows(dv_ptr + image * dv_stride_b + head * dv_stride_h, dv, rows, keys, dv_stride_n, HEAD_DIM)
    dk = tl.dot(d_scores, query, input_precision='ieee') * scale
    store_rows(dk_ptr + image * dk_stride_b + head * dk_stride_h, dk, rows, keys, dk_stride_n, HEAD_DIM)
    # dq transposed, [D, queries]: the transpose falls on the loaded keys, never on an accumulator.
    dq = tl.dot(tl.trans(key), d_scores, input_precision='ieee') * scale
    columns = tl.arange(0, HEAD_DIM)
    tl.store(dq_ptr + image * dq_stride_b + head * dq_stride_h + rows[None, :] * dq_stride_n + columns[:, None],
             dq.to(dq_ptr.dtype.element_ty), mask=rows[None, :] < queries)


@triton.jit(do_not_specialize=['queries', 'keys', 'heads'])
def fused_from_out_kernel(
        q_ptr, k_ptr, v_ptr, limits_ptr, out_ptr, grad_ptr, lse_ptr, dq_ptr, dk_ptr, dv_ptr,
        q_stride_b, q_stride_n, q_stride_h, k_stride_b, k_stride_n, k_stride_h, v_stride_b, v_stride_n, v_stride_h,
        dq_stride_b, dq_stride_n, dq_stride_h, dk_stride_b, dk_stride_n, dk_stride_h,
        dv_stride_b, dv_stride_n, dv_stride_h,
        queries, keys, heads, scale, scale_log2,
        HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr):
    """As `fused_kernel`, with delta from the output, and dv finished before the gradients of scores begin."""
    head = tl.program_id(0) % heads
    image = (tl.program_id(0) // heads).to(tl.int64)
    rows = tl.arange(0, BLOCK)
    offset = (image * queries * heads + head) * HEAD_DIM
    query = load_rows(q_ptr + image * q_stride_b + head * q_stride_h, rows, queries, q_stride_n, HEAD_DIM)
    key = load_rows(k_ptr + image * k_stride_b + head * k_stride_h, rows, keys, k_stride_n, HEAD_DIM)
    value = load_rows(v_ptr + image * v_stride_b + head * v_stride_h, rows, keys, v_stride_n, HEAD_DIM)
    grad = load_rows(grad_ptr + offset, rows, queries, heads * HEAD_DIM, HEAD_DIM)
    out = load_rows(out_ptr + offset, rows, queries, heads * HEAD_DIM, HEAD_DIM)
    limits = tl.load(limits_ptr + image * queries + rows, mask=rows < queries, other=0)
    lse = tl.load(lse_ptr + (image * heads + head) * queries + rows, mask=rows < queries, other=float('inf'))
    delta = tl.sum(out.to(tl.float32) * grad.to(tl.float32), 1)

    visible = rows[:, None] < tl.minimum(limits, keys)[None, :]
    scores = tl.dot(key, tl.trans(query), input_precision='ieee') * scale_log2
    weights = tl.exp2(tl.where(visible, scores - lse[None, :], -float('inf')))
    dv = tl.dot(weights.to(grad.dtype), grad, input_precision='ieee')
    store_rows(dv_ptr + image * dv_stride_b + head * dv_stride_h, dv, rows, keys, dv_stride_n, HEAD_DIM)
    d_weights = tl.dot(value, tl.trans(grad), input_precision='ieee')
    d_scores = (weights * (d_weights - delta[None, :])).to(query.dtype)
    dk = tl.dot(d_scores, query, input_precision='ieee') * scale
    store_rows(dk_ptr + image * dk_stride_b + head * dk_stride_h, dk, rows, keys, dk_stride_n, HEAD_DIM)
    dq = tl.dot(tl.trans(key), d_scores, input_precision='ieee') * scale
    columns = tl.arange(0, HEAD_DIM)
    tl.store(dq_ptr + image * dq_stride_b + head * dq_stride_h + rows[None, :] * dq_stride_n + columns[:, None],
             dq.to(dq_ptr.dtype.element_ty), mask=rows[None, :] < queries)


@triton.jit(do_not_specialize=['queries', 'keys', 'heads'])
def rows_kernel(
        q_ptr, k_ptr, v_ptr, limits_ptr, out_ptr, grad_ptr, lse_ptr, dq_ptr, dk_ptr, dv_ptr,
        q_stride_b, q_stride_n, q_stride_h, k_stride_b, k_stride_n, k_stride_h, v_stride_b, v_stride_n, v_stride_h,
        dq_stride_b, dq_stride_n, dq_stride_h, dk_stride_b, dk_stride_n, dk_stride_h,
        dv_stride_b, dv_stride_n, dv_stride_h,
        queries, keys, heads, scale, scale_log2,
        HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr):
    """One program: one head of one image, queries <= BLOCK. All of them meet STEP keys at a time, whose dk and dv are
    then whole."""
    head = tl.program_id(0) % heads
    image = (tl.program_id(0) // heads).to(tl.int64)
    rows = tl.arange(0, BLOCK)
    dims = tl.arange(0, HEAD_DIM)
    offset = (image * queries * heads + head) * HEAD_DIM
    k_ptr += image * k_stride_b + head * k_stride_h
    v_ptr += image * v_stride_b + head * v_stride_h
    dk_ptr += image * dk_stride_b + head * dk_stride_h
    dv_ptr += image * dv_stride_b + head * dv_stride_h
    query = load_rows(q_ptr + image * q_stride_b + head * q_stride_h, rows, queries, q_stride_n, HEAD_DIM)
    grad = load_rows(grad_ptr + offset, rows, queries, heads * HEAD_DIM, HEAD_DIM)
    out = load_rows(out_ptr + offset, rows, queries, heads * HEAD_DIM, HEAD_DIM)
    limits = tl.minimum(tl.load(limits_ptr + image * queries + rows, mask=rows < queries, other=0), keys)
    lse = tl.load(lse_ptr + (image * heads + head) * queries + rows, mask=rows < queries, other=float('inf'))
    delta = tl.sum(out.to(tl.float32) * grad.to(tl.float32), 1)
    dq = tl.zeros([BLOCK, HEAD_DIM], tl.float32)
    for start in range(0, keys, STEP):
        columns = start + tl.arange(0, STEP)
        key = load_rows(k_ptr, columns, keys, k_stride_n, HEAD_DIM)
        value = load_rows(v_ptr, columns, keys, v_stride_n, HEAD_DIM)
        scores = tl.dot(query, tl.trans(key), input_precision='ieee') * scale_log2 - lse[:, None]  # [BLOCK, STEP]
        weights = tl.exp2(tl.where(columns[None, :] < limits[:, None], scores, -float('inf')))
        d_weights = tl.dot(grad, tl.trans(value), input_precision='ieee')
        d_scores = (weights * (d_weights - delta[:, None])).to(query.dtype)
        dq += tl.dot(d_scores, key, input_precision='ieee')
        # dk and dv transposed, [D, STEP]: the transposes fall on loaded tiles, never on an accumulator.
        dv = tl.dot(tl.trans(grad), weights.to(grad.dtype), input_precision='ieee')
        tl.store(dv_ptr + columns[None, :] * dv_stride_n + dims[:, None], dv.to(dv_ptr.dtype.element_ty),
                 mask=columns[None, :] < keys)
        dk = tl.dot(tl.trans(query), d_scores, input_precision='ieee') * scale
        tl.store(dk_ptr + columns[None, :] * dk_stride_n + dims[:, None], dk.to(dk_ptr.dtype.element_ty),
                 mask=columns[None, :] < keys)
    store_rows(dq_ptr + image * dq_stride_b + head * dq_stride_h, dq * scale, rows, queries, dq_stride_n, HEAD_DIM)


def fill_whole(
        kernel, q, k, v, limits, out, grad, lse, dq, dk, dv, scale: float, scale_log2: float, launch: Launch) -> None:
    """Fill dq, dk and dv by a kernel of this module, where the block holds all queries, and all keys but for rows."""
    batch, queries, heads, head_dim = q.shape
    constants = {'STEP': launch.step} if kernel is rows_kernel else {}
    kernel[(batch * heads,)](
        q, k, v, limits, out, grad, lse, dq, dk, dv, *strides(q, k, v, dq, dk, dv), queries, k.shape[1], heads, scale,
        scale_log2, HEAD_DIM=head_dim, BLOCK=launch.block, **constants, **launch.options())
