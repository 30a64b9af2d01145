"""Backward pass of segment attention. Each gradient is written once by one program: no atomics, no N x N tensor.

A design is a function that fills dq, dk and dv, and a launch for each kernel that it tunes; the table of launches says
which one serves. A new design is such a function, a line here, and rows of the table.
"""

import math
from functools import partial

import torch

from ..bordered import bordered_backward
from ..launches import Design, plan_for
from ..two_heads import two_heads_backward
from .paired import paired_backward
from .split import split
from .tiled import tiled
from .whole import fill_whole, fused_from_out_kernel, fused_kernel, rows_kernel

# fill(q, k, v, limits, out, grad, lse, dq, dk, dv, scale, scale_log2, *launches); those below `tiled` wait to be timed.
DESIGNS = {
    'fused': Design(partial(fill_whole, fused_kernel), spare=0),
    'fused_from_out': Design(partial(fill_whole, fused_from_out_kernel), spare=0),
    'rows': Design(partial(fill_whole, rows_kernel), spare=0),
    'split': Design(split),
    'tiled': Design(tiled),
    'paired': Design(paired_backward),
    'bordered': Design(bordered_backward, spare=1),
    'two_heads': Design(two_heads_backward, spare=0),
}


def gradients(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, limits: torch.Tensor, out: torch.Tensor, grad: torch.Tensor,
        lse: torch.Tensor, dq: torch.Tensor, dk: torch.Tensor, dv: torch.Tensor, scale: float) -> None:
    """Fill dq, dk and dv from what `forward` took and returned and from the gradient of its output; `limits`, `out` and
    `grad` are contiguous."""
    plan = plan_for('backward', q, k)
    DESIGNS[plan.design].fill(
        q, k, v, limits, out, grad, lse, dq, dk, dv, scale, scale * math.log2(math.e), *plan.launches)
