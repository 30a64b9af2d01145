"""Hugging Face data sets, read by the package datasets: which column holds the images, and which the labels."""

import hashlib
import io
from collections.abc import Callable
from typing import Any

import fsspec
import torch
from torchvision.datasets import VisionDataset

from ..errors import DataError, one_line, suggest
from .images import open_image

#: Columns that are taken for labels where no column is of ClassLabel's type; such a one needs no name.
LABEL_NAMES = ('label', 'labels', 'target', 'class')


class HubImages(VisionDataset):
    """Images of a split, map-style, and their labels where all have one, else -1.

    Args:
        name: On the Hub, or a folder.
        data_dir: Where downloads are kept; by default the package's own cache.

    Attributes:
        targets: Classes as whole numbers, or None without labels.
        classes: Names of the classes, or None where the data do not name them.
        unlabelled: Why there are no labels, or None.

    Raises:
        DataError: for data that cannot be opened, or columns that are not there or could be several.
    """

    def __init__(
            self, name: str, data_dir: str | None, split: str, transform: Callable, image_column: str | None = None,
            label_column: str | None = None,
    ):
        super().__init__(transform=transform)
        rows = load(name, data_dir, split)
        column = find_image_column(rows.features, image_column)
        self.name, self.images = name, undecoded(rows.select_columns([column]), column)
        label, self.unlabelled = find_label_column(rows.features, label_column)
        self.targets: list[int] | None = None
        self.classes: list[str] | None = None
        if label is not None:
            self._read_labels(list(rows[label]), getattr(rows.features[label], 'names', None), label)

    def _read_labels(self, values: list, names: list[str] | None, column: str) -> None:
        missing = sum(value is None or value == -1 for value in values)  # -1 stands for a class that is kept back
        if missing:
            self.unlabelled = f'{missing} of {len(values)} labels in the column {column!r} are missing'
        elif values and isinstance(values[0], (str, bool)):
            found = sorted(set(values))
            number = {value: index for index, value in enumerate(found)}
            self.targets, self.classes = [number[v] for v in values], list(map(str, found))
        else:
            self.targets, self.classes = values, names

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        value, = self.images[index].values()
        return self.transform(open_image(content_of(value))), -1 if self.targets is None else self.targets[index]

    def filename(self, index: int) -> str:
        """Which image it is, for messages."""
        value, = self.images[index].values()
        return f'image {index} of {self.name}' + (f', {value["path"]}' if value and value.get('path') else '')


def load(name: str, data_dir: str | None, split: str, streaming: bool = False) -> Any:
    """`datasets.load_dataset` of one split; raises DataError for whatever keeps it from being opened."""
    try:
        import datasets
    except ImportError as error:
        raise DataError(f'The data set {name!r} of Hugging Face needs the package datasets: pip install datasets.'
                        ) from error
    try:
        rows = datasets.load_dataset(name, split=split, cache_dir=data_dir, streaming=streaming)
        if rows.features is None:  # a stream that does not say them itself: they are those of its first rows
            rows = rows._resolve_features()
    except Exception as error:  # OSError, ValueError, RuntimeError, those of pyarrow and of the Hub: by the cause
        raise DataError(f'Cannot open the data set {name!r} of Hugging Face, split {split!r} '
                        f'({type(error).__name__}: {one_line(error, 400)}).') from error
    return rows


def undecoded(rows: Any, column: str) -> Any:
    """Rows whose images are left as files, for `content_of`."""
    import datasets

    return rows.cast_column(column, datasets.Image(decode=False))


def content_of(value: dict[str, Any] | None) -> str | io.BytesIO:
    """The file of an image that was left undecoded, or its path; raises ValueError where the row has none."""
    if value and value.get('bytes'):
        return io.BytesIO(value['bytes'])
    path = value and value.get('path')
    if not path:
        raise ValueError('the row has no image')
    if '://' not in path:
        return path
    with fsspec.open(path, 'rb') as file:
        return io.BytesIO(file.read())


def row_name(row: dict[str, Any], column: str) -> str:
    """What tells an image from the others of a stream, whose rows have no numbers: path and hash, or the other columns
    where there is no image."""
    value = row[column] or {}
    if value.get('bytes'):
        return f'{value.get("path") or "an image"} (SHA-256 {hashlib.sha256(value["bytes"]).hexdigest()[:12]})'
    return value.get('path') or f'the row {({k: v for k, v in row.items() if k != column})!r:.80}'


def find_image_column(features: dict[str, Any], given: str | None = None) -> str:
    """The column of the images: the given one, 'image', or the only one that can be; raises DataError where it is not
    there, or several can be."""
    import datasets

    def holds_files(kind: Any) -> bool:
        return 'bytes' in kind if isinstance(kind, dict) else getattr(kind, 'dtype', '') in ('binary', 'large_binary')

    if given is not None:
        _check_column(features, given, 'image', lambda kind: (
            isinstance(kind, datasets.Image) or holds_files(kind) or getattr(kind, 'dtype', None) == 'string'))
        return given
    found = [name for name, kind in features.items() if isinstance(kind, datasets.Image)]
    found = found or [name for name, kind in features.items() if holds_files(kind)]
    if 'image' in found or len(found) == 1:
        return 'image' if 'image' in found else found[0]
    what = (f'The columns {", ".join(found)} all hold images' if found else
            f'No column holds images: there are {", ".join(features)}')
    raise DataError(f'{what}. Name the column of the images with --image-column.')


def find_label_column(features: dict[str, Any], given: str | None = None) -> tuple[str | None, str | None]:
    """The column of the labels: the given one, 'label', the only one of ClassLabel's type, or the only one called as
    LABEL_NAMES are; or None and the reason why there is none. Raises DataError where the given one is not there or
    holds no labels."""
    import datasets

    def holds_labels(kind: Any) -> bool:
        dtype = str(getattr(kind, 'dtype', ''))
        return isinstance(kind, datasets.ClassLabel) or (
            isinstance(kind, datasets.Value) and dtype.startswith(('int', 'uint', 'bool', 'string', 'large_string')))

    if given is not None:
        _check_column(features, given, 'label', holds_labels)
        return given, None
    able = {name: kind for name, kind in features.items() if holds_labels(kind)}
    if 'label' in able:
        return 'label', None
    found = [name for name, kind in able.items() if isinstance(kind, datasets.ClassLabel)]
    found = found or [name for name in able if name.lower() in LABEL_NAMES]
    if len(found) == 1:
        return found[0], None
    which = (f'the columns {", ".join(found)} could all be labels' if found else
             f'no column is known to hold labels, of {", ".join(features)}')
    return None, f'{which}: name one with --label-column'


def _check_column(features: dict[str, Any], name: str, what: str, holds: Callable[[Any], bool]) -> None:
    if name not in features:
        raise DataError(f'There is no column {name!r} for --{what}-column. {suggest(name, list(features))}')
    if not holds(features[name]):
        raise DataError(f'The column {name!r} holds {features[name]}, not {what}s: name another with --{what}-column, '
                        f'of {", ".join(features)}.')
