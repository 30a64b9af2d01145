"""Two neighbouring heads a program, where a tile holds all queries and all keys of both: for head dimension 32.

A design that the tuner may choose; not a default before it has been timed on a GPU.

Queries are stacked: two tiles of them, one above the other, with zeros in the columns of the other head, so that one
product with the keys of both heads side by side scores both. Products are twice what two heads need and memory traffic
is the same, which bounds so few tokens; lines of 128 bytes are read whole, and every product fills Hopper's 64 rows,
where the transposed gradient of queries of one head has 32.
"""

import triton
import triton.language as tl

from .launches import Launch
from .tiles import strides


@triton.jit
def _pointers(pointer, rows, row_stride, head_stride, HEAD_DIM: tl.constexpr):
    """Where the elements of two heads side by side are, [len(rows), 2 D]."""
    columns = tl.arange(0, 2 * HEAD_DIM)
    columns = columns // HEAD_DIM * head_stride + columns % HEAD_DIM
    return pointer + rows[:, None] * row_stride + columns[None, :]


@triton.jit
def _places(head, heads, HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr):
    """Token and head (0 or 1) of each stacked row, which columns hold a head, and which are a stacked row's own."""
    rows = tl.arange(0, 2 * BLOCK)
    side = tl.arange(0, 2 * HEAD_DIM) // HEAD_DIM
    there = (head + side < heads)[None, :]
    return rows % BLOCK, rows // BLOCK, there, there & (side[None, :] == (rows // BLOCK)[:, None])


@triton.jit(do_not_specialize=['queries', 'keys', 'heads'])
def two_heads_forward_kernel(
        q_ptr, k_ptr, v_ptr, limits_ptr, out_ptr, lse_ptr,
        q_stride_b, q_stride_n, q_stride_h, k_stride_b, k_stride_n, k_stride_h, v_stride_b, v_stride_n, v_stride_h,
        queries, keys, heads, scale_log2,
        HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr):
    """One program: two heads of one image (or the last alone), queries <= BLOCK and keys <= BLOCK."""
    pairs = tl.cdiv(heads, 2)
    head = tl.program_id(0) % pairs * 2
    image = (tl.program_id(0) // pairs).to(tl.int64)
    q_ptr += image * q_stride_b + head * q_stride_h
    k_ptr += image * k_stride_b + head * k_stride_h
    v_ptr += image * v_stride_b + head * v_stride_h
    out_ptr += (image * queries * heads + head) * HEAD_DIM
    tokens = tl.arange(0, BLOCK)
    rows, side, there, own = _places(head, heads, HEAD_DIM, BLOCK)
    own &= rows[:, None] < queries
    there &= tokens[:, None] < keys
    query = tl.load(_pointers(q_ptr, rows, q_stride_n, q_stride_h, HEAD_DIM), mask=own, other=0.0)
    key = tl.load(_pointers(k_ptr, tokens, k_stride_n, k_stride_h, HEAD_DIM), mask=there, other=0.0)
    value = tl.load(_pointers(v_ptr, tokens, v_stride_n, v_stride_h, HEAD_DIM), mask=there, other=0.0)
    limits = tl.minimum(tl.load(limits_ptr + image * queries + rows, mask=rows < queries, other=0), keys)

    scores = tl.dot(query, tl.trans(key), input_precision='ieee') * scale_log2  # [2 BLOCK, BLOCK]
    scores = tl.where(tokens[None, :] < limits[:, None], scores, -float('inf'))
    # An empty row is zero, and an infinite LSE makes its probabilities and gradients zero in the backward pass.
    seen = limits > 0
    maximum = tl.max(scores, 1)
    weights = tl.exp2(scores - tl.where(seen, maximum, 0.0)[:, None])
    total = tl.where(seen, tl.sum(weights, 1), 1.0)
    out = tl.dot(weights.to(value.dtype), value, input_precision='ieee') / total[:, None]
    tl.store(_pointers(out_ptr, rows, heads * HEAD_DIM, HEAD_DIM, HEAD_DIM), out.to(out_ptr.dtype.element_ty), mask=own)
    lse = tl.where(seen, maximum + tl.log2(total), float('inf'))
    tl.store(lse_ptr + (image * heads + head + side) * queries + rows, lse,
             mask=(rows < queries) & (head + side < heads))


@triton.jit(do_not_specialize=['queries', 'keys', 'heads'])
def two_heads_backward_kernel(
        q_ptr, k_ptr, v_ptr, limits_ptr, grad_ptr, lse_ptr, dq_ptr, dk_ptr, dv_ptr,
        q_stride_b, q_stride_n, q_stride_h, k_stride_b, k_stride_n, k_stride_h, v_stride_b, v_stride_n, v_stride_h,
        dq_stride_b, dq_stride_n, dq_stride_h, dk_stride_b, dk_stride_n, dk_stride_h,
        dv_stride_b, dv_stride_n, dv_stride_h,
        queries, keys, heads, scale, scale_log2,
        HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr):
    """One program: two heads of one image (or the last alone), queries <= BLOCK and keys <= BLOCK. The output is not
    read: all probabilities of a row are in the tile, and delta is their sum weighted by their gradients."""
    pairs = tl.cdiv(heads, 2)
    head = tl.program_id(0) % pairs * 2
    image = (tl.program_id(0) // pairs).to(tl.int64)
    q_ptr += image * q_stride_b + head * q_stride_h
    k_ptr += image * k_stride_b + head * k_stride_h
    v_ptr += image * v_stride_b + head * v_stride_h
    grad_ptr += (image * queries * heads + head) * HEAD_DIM
    dq_ptr += image * dq_stride_b + head * dq_stride_h
    dk_ptr += image * dk_stride_b + head * dk_stride_h
    dv_ptr += image * dv_stride_b + head * dv_stride_h
    tokens = tl.arange(0, BLOCK)
    rows, side, there, own = _places(head, heads, HEAD_DIM, BLOCK)
    own &= rows[:, None] < queries
    there &= tokens[:, None] < keys
    query = tl.load(_pointers(q_ptr, rows, q_stride_n, q_stride_h, HEAD_DIM), mask=own, other=0.0)
    key = tl.load(_pointers(k_ptr, tokens, k_stride_n, k_stride_h, HEAD_DIM), mask=there, other=0.0)
    grad = tl.load(_pointers(grad_ptr, rows, heads * HEAD_DIM, HEAD_DIM, HEAD_DIM), mask=own, other=0.0)
    value = tl.load(_pointers(v_ptr, tokens, v_stride_n, v_stride_h, HEAD_DIM), mask=there, other=0.0)
    limits = tl.minimum(tl.load(limits_ptr + image * queries + rows, mask=rows < queries, other=0), keys)
    lse = tl.load(lse_ptr + (image * heads + head + side) * queries + rows,
                  mask=(rows < queries) & (head + side < heads), other=float('inf'))

    scores = tl.dot(query, tl.trans(key), input_precision='ieee') * scale_log2 - lse[:, None]  # [2 BLOCK, BLOCK]
    weights = tl.exp2(tl.where(tokens[None, :] < limits[:, None], scores, -float('inf')))
    d_weights = tl.dot(grad, tl.trans(value), input_precision='ieee')
    delta = tl.sum(weights * d_weights, 1)
    d_scores = (weights * (d_weights - delta[:, None])).to(query.dtype)
    # dk and dv transposed, [2 D, keys]: the transposes fall on loaded tiles, never on an accumulator.
    dv = tl.dot(tl.trans(grad), weights.to(grad.dtype), input_precision='ieee')
    tl.store(tl.trans(_pointers(dv_ptr, tokens, dv_stride_n, dv_stride_h, HEAD_DIM)),
             dv.to(dv_ptr.dtype.element_ty), mask=tl.trans(there))
    dk = tl.dot(tl.trans(query), d_scores, input_precision='ieee') * scale
    tl.store(tl.trans(_pointers(dk_ptr, tokens, dk_stride_n, dk_stride_h, HEAD_DIM)),
             dk.to(dk_ptr.dtype.element_ty), mask=tl.trans(there))
    dq = tl.dot(d_scores, key, input_precision='ieee') * scale
    tl.store(_pointers(dq_ptr, rows, dq_stride_n, dq_stride_h, HEAD_DIM), dq.to(dq_ptr.dtype.element_ty), mask=own)


def two_heads_forward(q, k, v, limits, out, lse, scale_log2: float, launch: Launch) -> None:
    """Fill out and lse where the block holds all queries and all keys; `out` is contiguous."""
    batch, queries, heads, head_dim = q.shape
    two_heads_forward_kernel[(batch * triton.cdiv(heads, 2),)](
        q, k, v, limits, out, lse, *strides(q, k, v), queries, k.shape[1], heads, scale_log2, HEAD_DIM=head_dim,
        BLOCK=launch.block, **launch.options())


def two_heads_backward(
        q, k, v, limits, out, grad, lse, dq, dk, dv, scale: float, scale_log2: float, launch: Launch) -> None:
    """Fill dq, dk and dv where the block holds all queries and all keys; `grad` is contiguous."""
    batch, queries, heads, head_dim = q.shape
    two_heads_backward_kernel[(batch * triton.cdiv(heads, 2),)](
        q, k, v, limits, grad, lse, dq, dk, dv, *strides(q, k, v, dq, dk, dv), queries, k.shape[1], heads, scale,
        scale_log2, HEAD_DIM=head_dim, BLOCK=launch.block, **launch.options())
