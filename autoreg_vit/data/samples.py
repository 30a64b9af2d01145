"""What a data set is here: numbered samples, as torch, torchvision and timm have them in one form or another."""

from collections.abc import Sequence
from typing import Any, Protocol, cast

from torch.utils.data import Dataset, Subset


class Samples(Protocol):
    """A map-style data set of any kind. torch's own type of one declares no length, by which samples are numbered."""

    def __len__(self) -> int:
        """How many there are."""

    def __getitem__(self, index: int, /) -> Any:
        """A sample."""


def some(samples: Samples, indices: Sequence[int]) -> Subset:
    """The samples of these numbers."""
    return Subset(cast('Dataset[Any]', samples), indices)
