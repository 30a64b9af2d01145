"""What the kernels can address: rows of unit stride, and offsets of rows and heads that int32 holds."""

from collections.abc import Sequence

import torch

# Kernels multiply the index of a row, and of a head, by its stride in int32; only an image's offset has 64 bits.
LARGEST_OFFSET = 2 ** 31 - 1


def addressable(projections: Sequence[torch.Tensor], parts: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """`parts`, the q, k and v [B, N, H, D] in `projections`, with contiguous copies of those that kernels could not
    address in place; the very `parts` where there are none."""
    # What a call nearly always has, seen without a look at each part's strides.
    if all(x.is_contiguous() and x.numel() <= LARGEST_OFFSET for x in projections):
        return parts
    reached = tuple(part if _in_reach(part) else part.contiguous() for part in parts)
    return reached if any(a is not b for a, b in zip(reached, parts)) else parts


def _in_reach(part: torch.Tensor) -> bool:
    _, tokens, heads, width = part.shape
    _, row, head, column = part.stride()
    return column == 1 and (tokens - 1) * row + width <= LARGEST_OFFSET and (heads - 1) * head <= LARGEST_OFFSET
