"""What every kernel does: read and write rows of one head."""

import torch
import triton
import triton.language as tl

# Queries whose limits a program that owns keys reads at once, to find those that see its keys.
SCAN = tl.constexpr(256)
NEVER = tl.constexpr(2 ** 31 - 1)


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


def strides(*tensors: torch.Tensor) -> list[int]:
    """Strides of image, row and head, tensor by tensor, as kernels take them."""
    return [stride for x in tensors for stride in x.stride()[:3]]
