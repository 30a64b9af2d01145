"""Ranks, order and limits: the one place that says what they mean.

A serialization gives every token of an image a **rank**, the position of its segment in the order of prediction.
Tokens of one segment share a rank and are predicted together; segments are predicted one after the other. Ranks are
int64 [B, N], dense (0 ... K-1 without gaps), in raster order, drawn anew for every image.

**Order**: tokens sorted by rank. **Limits**: in sorted order every attention mask of RandSAC and SAIM is a prefix;
query i may attend to the first `limits[b, i]` keys, and no mask needs to be stored.

The functions named as serializations give ranks [batch, N] of `batch` images on a grid of rows and columns of tokens,
N = grid[0] * grid[1]. All functions are vectorised over the batch, run on any device without synchronising with the
host, and draw only from `generator` (PyTorch's default generator of the device where none is given).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from .errors import SerializationError, ShapeError, suggest
from .grids import check_segments, count_tokens, square_side

__all__ = [
    'Layout', 'Serialization', 'blobs', 'check_ranks', 'memory_limits', 'prefix_raster', 'random', 'raster',
    'sort_by_rank', 'source_limits', 'squares',
]

Device = torch.device | str | None


def raster(
        batch: int, grid: tuple[int, int], *, generator: torch.Generator | None = None, device: Device = None,
) -> torch.Tensor:
    """Row by row, one token a segment: rank = token index (iGPT; RandSAC 3.1). Draws nothing."""
    return torch.arange(count_tokens(grid), device=device).expand(batch, -1).contiguous()


def prefix_raster(
        batch: int, grid: tuple[int, int], *, generator: torch.Generator | None = None, device: Device = None,
) -> torch.Tensor:
    """A first segment of the first tokens in raster order, 1 to N - 1 of them at random, and then one token a segment:
    AIM's prefix (El-Nouby et al. 2024), which sees itself both ways. AIM predicts what follows it alone:
    `first_segment='given'`."""
    tokens = count_tokens(grid)
    draw = _uniform(batch, 1, generator=generator, device=device)
    length = 1 + (draw * (tokens - 1)).long().clamp(max=max(tokens - 2, 0))
    return (torch.arange(tokens, device=device) - (length - 1)).clamp(min=0)


def random(
        batch: int, grid: tuple[int, int], *, generator: torch.Generator | None = None, device: Device = None,
) -> torch.Tensor:
    """A uniformly random permutation of single tokens (SAIM Eq. 2; RandSAC Table 2, patch-random)."""
    return _permutations(batch, count_tokens(grid), generator, device)


def squares(
        batch: int, grid: tuple[int, int], segments: int | Sequence[int], *, shuffle: bool = False,
        segment_order: str = 'random', generator: torch.Generator | None = None, device: Device = None,
) -> torch.Tensor:
    """Square segments in random order (RandSAC 3.2, Table 4), with any number of coarser levels (3.3).

    Args:
        segments: Number of squares, finest level first; each must tile the grid. RandSAC's square side M gives
            grid[0] * grid[1] / M**2 squares. A square belongs to the coarser square that holds its centre.
        shuffle: Permute tokens between segments, keeping the segments' sizes (RandSAC Table 6, bottom).
        segment_order: 'random' (RandSAC 3.3), or 'raster': segments, and partitions, by their first tokens in raster
            order, which makes squares those of XTRA's block causal mask (Amrani et al. 2025).

    Raises:
        SerializationError: if the squares do not tile the grid or the hierarchy does not shrink.
    """
    segments = check_segments('squares', segments, grid)
    # Token centres in units of tokens, so that centres of squares are exact.
    points = torch.cartesian_prod(*(torch.arange(size, device=device) + 0.5 for size in grid))

    def assign(points: torch.Tensor, count: int) -> torch.Tensor:
        side = square_side(count, grid)
        cell = (points / side).floor().long()
        return cell[..., 0] * (grid[1] // side) + cell[..., 1]

    return _segment_ranks(points.expand(batch, -1, -1), segments, assign, shuffle, segment_order, generator)


def blobs(
        batch: int, grid: tuple[int, int], segments: int | Sequence[int], *, shuffle: bool = False,
        segment_order: str = 'random', generator: torch.Generator | None = None, device: Device = None,
) -> torch.Tensor:
    """Elliptical segments of a random mixture of Gaussians in random order (RandSAC 3.2, Eq. 1), with any number of
    coarser levels (3.3, Table 7).

    A token belongs to the Gaussian of highest density. Means are drawn from U(-1.75, 1.75) and standard deviations
    from U(0.5, 1) on a grid that spans [-2, 2] both ways. Gaussians that win no token vanish, so an image may have
    fewer segments than asked for. A coarser level draws Gaussians anew and assigns each finer segment by its centre,
    the mean position of its tokens (the paper says only "following the same logic").

    Args:
        segments: Number of Gaussians, finest level first: 11, (11, 5), (11, 7, 3).
        shuffle, segment_order: As for `squares`.

    Raises:
        SerializationError: if there are more segments than tokens or the hierarchy does not shrink.
    """
    segments = check_segments('blobs', segments, grid)
    # A single row or column stands in the middle.
    points = torch.cartesian_prod(*(
        torch.linspace(-2, 2, size, device=device) if size > 1 else torch.zeros(1, device=device) for size in grid))

    def assign(points: torch.Tensor, count: int) -> torch.Tensor:
        draws = _uniform(batch, 1, count, 4, generator=generator, device=device)
        mean = draws[..., :2] * 3.5 - 1.75
        std = draws[..., 2:] * 0.5 + 0.5
        # log density without the constant that all Gaussians share
        log_density = -std.log() - ((points[:, :, None] - mean) / std).square() / 2  # [B, N, K, 2]
        return log_density.sum(-1).argmax(-1)

    return _segment_ranks(points.expand(batch, -1, -1), segments, assign, shuffle, segment_order, generator)


@dataclass(frozen=True)
class Serialization:
    """A named serialization with its options, checked once against the grid it will be drawn on.

    Args:
        name: raster, prefix_raster, random, squares or blobs.
        segments, shuffle, segment_order: As `squares` and `blobs` take them; for those only.

    Raises:
        SerializationError: naming the value and what would do.
    """
    name: str
    grid: tuple[int, int]
    segments: tuple[int, ...] | None = None
    shuffle: bool = False
    segment_order: str = 'random'

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or self.name not in _SERIALIZATIONS:
            near = suggest(str(self.name), list(_SERIALIZATIONS))
            raise SerializationError(f'Unknown serialization {self.name!r}. {near}')
        count_tokens(self.grid)
        if self.segment_order not in ('random', 'raster'):
            raise SerializationError(f"segment_order is 'random' or 'raster', got {self.segment_order!r}.")
        if self.segment_order == 'raster' and self.shuffle:
            raise SerializationError("segment_order='raster' goes by where segments are, and shuffle=True scatters "
                                     'their tokens: leave one of them out.')
        if self.name in _SEGMENTED:
            object.__setattr__(self, 'segments', check_segments(self.name, self.segments, self.grid))
        elif self.segments is not None or self.shuffle or self.segment_order != 'random':
            raise SerializationError(
                f'serialization={self.name!r} predicts single tokens: it takes neither segments '
                f'(got {self.segments!r}) nor shuffle (got {self.shuffle}) nor segment_order '
                f'(got {self.segment_order!r}). Use squares or blobs.')

    def __call__(self, batch: int, *, generator: torch.Generator | None = None, device: Device = None) -> torch.Tensor:
        """Ranks, int64 [batch, N]."""
        if self.segments is None:
            return _SINGLE_TOKENS[self.name](batch, self.grid, generator=generator, device=device)
        return _SEGMENTED[self.name](batch, self.grid, self.segments, shuffle=self.shuffle,
                                     segment_order=self.segment_order, generator=generator, device=device)

    @property
    def last_segment(self) -> int | None:
        """Tokens of the last segment, or None where they differ from draw to draw."""
        if self.segments is None:
            return 1
        return square_side(self.segments[0], self.grid) ** 2 if self.name == 'squares' else None


@dataclass(frozen=True)
class Layout:
    """A batch sorted by rank: its order and the limits that follow, for an encoder with `prefix` class and register
    tokens in front that encodes the first `encoded` tokens in sorted order, all N unless `with_encoded` says otherwise.

    Args:
        order: Raster index of each token in sorted order, int64 [B, N].
        encoder_limits: Source limits of the encoder's tokens, int32 [B, prefix + encoded].
        query_limits: Source limits among predictions, which have no prefix, int32 [B, N].
        memory_limits: Memory limits of predictions over the encoder's tokens, prefix included, int32 [B, N].
    """
    order: torch.Tensor
    encoder_limits: torch.Tensor
    query_limits: torch.Tensor
    memory_limits: torch.Tensor
    prefix: int = 0

    @classmethod
    def of(cls, ranks: torch.Tensor, first_segment: str = 'self', prefix: int = 0) -> 'Layout':
        """The layout of ranks [B, N]; see `memory_limits` for `first_segment`."""
        order, sorted_ranks = sort_by_rank(ranks)
        return cls(order, source_limits(sorted_ranks, prefix), source_limits(sorted_ranks),
                   memory_limits(sorted_ranks, first_segment, prefix), prefix)

    @property
    def encoded(self) -> int:
        """How many tokens in sorted order the encoder takes."""
        return self.encoder_limits.shape[1] - self.prefix

    @property
    def read(self) -> torch.Tensor:
        """How many tokens in sorted order some prediction of the batch reads the encoding of, a scalar."""
        return self.memory_limits.max() - self.prefix

    def with_encoded(self, tokens: int) -> 'Layout':
        """The layout where the encoder takes the first `tokens` in sorted order alone: limits over them end there. For
        as many as `read` no prediction changes."""
        if tokens >= self.encoded:
            return self
        last = self.prefix + tokens
        return replace(self, encoder_limits=self.encoder_limits[:, :last].clamp(max=last),
                       memory_limits=self.memory_limits.clamp(max=last))

    def sort(self, x: torch.Tensor, tokens: int | None = None) -> torch.Tensor:
        """Tokens [B or 1, N, C] from raster order to sorted order, [B, N, C], or the first `tokens` of them."""
        order, x = self.order[:, :tokens], x.expand(self.order.shape[0], -1, -1)
        return x.gather(1, order[..., None].expand(-1, -1, x.shape[-1]))

    def unsort(self, x: torch.Tensor) -> torch.Tensor:
        """Tokens [B, N, C] from sorted order to raster order."""
        inverse = self.order.argsort(dim=1)
        return x.gather(1, inverse[..., None].expand_as(x))


def check_ranks(ranks: torch.Tensor, batch: int, tokens: int) -> None:
    """Raise ShapeError unless `ranks` is an int64 tensor [batch, tokens]."""
    if not isinstance(ranks, torch.Tensor) or ranks.dtype != torch.int64 or ranks.shape != (batch, tokens):
        got = f'{ranks.dtype} {tuple(ranks.shape)}' if isinstance(ranks, torch.Tensor) else type(ranks).__name__
        raise ShapeError(f'ranks must be torch.int64 of shape {(batch, tokens)}, one row an image and one column a '
                         f'token; got {got}. Draw them with autoreg_vit.serialization or model.draw_ranks(batch).')


def sort_by_rank(ranks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Order and sorted ranks, both [B, N]: `sorted = ranks.gather(1, order)`; tokens of one segment stay in raster
    order."""
    sorted_ranks, order = torch.sort(ranks, dim=1, stable=True)
    return order, sorted_ranks


def source_limits(sorted_ranks: torch.Tensor, prefix: int = 0) -> torch.Tensor:
    """How many keys a content token may attend to: those of rank <= its own, up to the end of its segment. RandSAC's
    source mask (4.1, Fig. 4) and SAIM's content mask (Eq. 3).

    Args:
        sorted_ranks: int64 [B, N], ascending.
        prefix: Number of class and register tokens in front, seen by all and seeing only each other (SAIM's published
            code). They count as keys and have the first rows of the result.

    Returns:
        Limits, int32 [B, prefix + N].
    """
    limits = torch.searchsorted(sorted_ranks, sorted_ranks, right=True, out_int32=True) + prefix
    return torch.cat([limits.new_full((limits.shape[0], prefix), prefix), limits], dim=1) if prefix else limits


def memory_limits(sorted_ranks: torch.Tensor, first_segment: str = 'none', prefix: int = 0) -> torch.Tensor:
    """How many encoded tokens the prediction of a token may attend to: those of rank < its own, up to the start of its
    segment. RandSAC's memory mask (4.1, Fig. 4) and SAIM's query mask.

    Args:
        sorted_ranks: int64 [B, N], ascending.
        first_segment: 'self' lets the first segment attend to its own encoding (RandSAC 4.1), 'none' leaves it without
            any but the prefix, and so does 'given', with which it is not predicted at all.
        prefix: Number of class and register tokens in front of the keys, seen by all (SAIM's published code).

    Returns:
        Limits, int32 [B, N]; predictions have no prefix of their own.
    """
    limits = torch.searchsorted(sorted_ranks, sorted_ranks, out_int32=True)
    if first_segment == 'self':
        limits = torch.where(limits == 0, source_limits(sorted_ranks), limits)
    elif first_segment not in ('none', 'given'):
        raise SerializationError(f"first_segment must be 'self', 'none' or 'given', got {first_segment!r}.")
    return limits + prefix


def _permutations(batch: int, size: int, generator: torch.Generator | None, device: Device) -> torch.Tensor:
    return _uniform(batch, size, generator=generator, device=device).argsort(dim=1)


def _uniform(*shape: int, generator: torch.Generator | None, device: Device) -> torch.Tensor:
    """Draws from [0, 1)."""
    # torch.compile knows no `generator`, not even None, once it has made a size symbolic, as at a second batch size.
    if generator is None:
        return torch.rand(shape, device=device)
    return torch.rand(shape, generator=generator, device=device)


def _segment_ranks(
        points: torch.Tensor, segments: tuple[int, ...], assign: Callable[[torch.Tensor, int], torch.Tensor],
        shuffle: bool, segment_order: str, generator: torch.Generator | None,
) -> torch.Tensor:
    """Ranks of a hierarchy: partitions in `segment_order`, at random or in raster order, and so the segments inside
    each, from token positions [B, N, 2]; `assign` takes one point a token and a number of segments to labels [B, N]."""
    batch, tokens, _ = points.shape
    levels, firsts, centres = [], [], points
    for count in segments:
        labels = assign(centres, count)
        levels.append(labels)
        # Every token moves to its segment's centre, so that a segment's tokens stay together on the next level.
        # No matrix product, which autocast and TF32 would round, and no scatter, which is not deterministic on a GPU.
        member = labels[..., None, None] == torch.arange(count, device=points.device)[:, None]  # [B, N, K, 1]
        if segment_order == 'raster':
            firsts.append(member[..., 0].int().argmax(1))  # each segment's first token, [B, K]
        sizes = member.sum(1).clamp(min=1)
        means = (member * points[:, :, None]).sum(1) / sizes  # [B, K, 2]
        centres = means.gather(1, labels[..., None].expand(-1, -1, 2))
    key = torch.zeros(batch, tokens, dtype=torch.int64, device=points.device)
    for level in reversed(range(len(segments))):
        places = tokens if firsts else segments[level]
        visit = firsts[level] if firsts else _permutations(batch, places, generator, points.device)
        key = key * places + visit.gather(1, levels[level])
    if shuffle:
        key = key.gather(1, _permutations(batch, tokens, generator, points.device))
    return _dense(key)


def _dense(key: torch.Tensor) -> torch.Tensor:
    """Dense ranks of the keys in each row: equal keys share a rank, and empty segments leave no gap."""
    ascending, order = key.sort(dim=1)
    steps = torch.zeros_like(key)
    steps[:, 1:] = ascending[:, 1:] != ascending[:, :-1]
    return torch.empty_like(key).scatter_(1, order, steps.cumsum(1))


_SINGLE_TOKENS = {'raster': raster, 'prefix_raster': prefix_raster, 'random': random}
_SEGMENTED = {'squares': squares, 'blobs': blobs}
_SERIALIZATIONS = (*_SINGLE_TOKENS, *_SEGMENTED)
