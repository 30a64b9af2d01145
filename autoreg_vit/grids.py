"""The grid of tokens that an image is cut into: how many, and which numbers of segments fit."""

import math
from collections.abc import Sequence
from itertools import pairwise
from numbers import Integral

from .errors import SerializationError, ShapeError


def count_tokens(grid: tuple[int, int]) -> int:
    """Tokens of a grid of rows and columns; raises ShapeError for one without any."""
    height, width = grid
    if height < 1 or width < 1:
        raise ShapeError(f'A grid has at least one row and one column of tokens, got {tuple(grid)}.')
    return height * width


def square_side(count: int, grid: tuple[int, int]) -> int:
    """Side of `count` squares that tile the grid, in tokens; 0 if none do."""
    side = math.isqrt(count_tokens(grid) // count)
    tiles = side > 0 and grid[0] % side == 0 and grid[1] % side == 0 and side * side * count == count_tokens(grid)
    return side if tiles else 0


def check_segments(name: str, segments: int | Sequence[int] | None, grid: tuple[int, int]) -> tuple[int, ...]:
    """Segments a level, finest first, of squares or blobs; raises SerializationError for numbers that do not fit."""
    tokens = count_tokens(grid)
    if isinstance(segments, Integral) and not isinstance(segments, bool):
        segments = (segments,)
    if not isinstance(segments, Sequence) or isinstance(segments, str) or len(segments) == 0:
        raise SerializationError(f'{name} needs the number of segments of each level, finest first, such as 11 or '
                                 f'(11, 5); got segments={segments!r}.')
    for count in segments:
        if isinstance(count, bool) or not isinstance(count, Integral) or count < 2:
            raise SerializationError('Each level needs a whole number of at least 2 segments (with one there is '
                                     f'nothing to predict from); got {count!r} in segments={tuple(segments)}.')
        if count > tokens:
            raise SerializationError(f'{count} segments do not fit on a grid of {grid[0]} x {grid[1]} = {tokens} '
                                     f'tokens: use at most {tokens}, a larger image or a smaller patch.')
        if name == 'squares' and not square_side(count, grid):
            fits = [str(fit) for fit in range(tokens, 1, -1) if square_side(fit, grid)]
            raise SerializationError(f'{count} squares do not tile a grid of {grid[0]} x {grid[1]} tokens. Possible '
                                     f'here: {", ".join(fits)}. Blobs take any number.')
    segments = tuple(int(count) for count in segments)
    if any(fine <= coarse for fine, coarse in pairwise(segments)):
        raise SerializationError('A hierarchy goes from fine to coarse, each level with fewer segments than the one '
                                 f'before; got segments={segments}. Write (11, 5), not (5, 11).')
    return segments
