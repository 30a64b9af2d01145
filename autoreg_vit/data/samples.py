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
    return Subset(as_dataset(samples), indices)


def named(folder: str | None) -> str:
    """The folder of a command that has refused to start without one."""
    assert folder is not None
    return folder


def as_dataset(samples: Samples) -> Dataset:
    """The samples as torch's loaders take them."""
    return cast('Dataset[Any]', samples)
