"""What a folder of images holds: files by their endings, class folders, splits, and what of it is left out.

Links to files and folders are followed. What is hidden is no data: names that begin with a dot, and what file managers
and archives leave.
"""

import bisect
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torchvision.datasets import VisionDataset

from ..errors import DataError
from .checks import some_names
from .images import image_extensions, open_image

_SYSTEM_FOLDERS = {'__MACOSX', '__pycache__', '@eaDir', '$RECYCLE.BIN', 'System Volume Information', 'lost+found'}
_SPLIT = re.compile(r'(?:(train)(?:ing)?|(val)(?:id(?:ation)?)?|(test)(?:ing)?)'
                    r'[\W_]*(?:set|split|data|images)?[\W_]*(?:(?:19|20)\d\d)?')

#: Why something is left out, in words for one and for several.
Reason = tuple[str, str]


class LeftOut:
    """What of a folder is not taken: how many things for which reason, and the first three of them."""

    def __init__(self) -> None:
        self.counts: Counter[Reason] = Counter()
        self.first: dict[Reason, list[str]] = defaultdict(list)

    def add(self, found: Iterable[tuple[Reason, str]]) -> None:
        for reason, path in found:
            self.counts[reason] += 1
            bisect.insort(self.first[reason], path)
            del self.first[reason][3:]

    def describe(self, root: Path) -> str | None:
        """What is left out of `root`, in words; None where nothing is."""
        parts = []
        for (one, several), count in self.counts.items():
            names = [os.path.relpath(path, root) for path in self.first[one, several]]
            more = f'; and {count - len(names)} more' if count > len(names) else ''
            parts.append(f'{count} {one if count == 1 else several} ({"; ".join(names)}{more})')
        return f'Left out of {root}: {", ".join(parts)}.' if parts else None


class ImageFiles(VisionDataset):
    """Images of a folder.

    Attributes:
        samples: Files and their labels.
        loader: From a file to its picture.
        left_out: What of the folder is not taken.
    """
    samples: list[tuple[str, int]]

    def __init__(self, root: Path, transform: Callable, left_out: LeftOut | None = None):
        super().__init__(root, transform=transform)
        self.loader, self.left_out = open_image, left_out or LeftOut()

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        path, label = self.samples[index]
        return self.transform(self.loader(path)), label


class FlatFolder(ImageFiles):
    """Images of a folder and its subfolders, without labels (-1)."""

    def __init__(self, root: Path, transform: Callable, left_out: LeftOut | None = None):
        super().__init__(root, transform, left_out)
        self.samples = [(str(file), -1) for file in sorted(map(Path, walk(root, left_out=self.left_out)))]
        if not self.samples:
            raise no_files('images', root, '.jpg, .png, .webp, .tif or what else Pillow reads', self.left_out)


class ClassFolders(ImageFiles):
    """Images of one folder a class, in any depth of it, in the order of torchvision's ImageFolder. The label, of which
    `targets` has a list, is the number of the folder in `classes`, which are sorted. One without images is a DataError.
    """

    def __init__(self, root: Path, classes: list[str], transform: Callable, left_out: LeftOut | None = None):
        super().__init__(root, transform, left_out)
        self.classes = sorted(classes)
        files = [sorted(walk(root / name, left_out=self.left_out, chain=(os.path.realpath(root),)), key=os.path.split)
                 for name in self.classes]
        empty = [name for name, found in zip(self.classes, files) if not found]
        if empty:
            raise DataError(f'Class folders without images under {root}: {some_names(empty, 10)}. Fill or remove them. '
                            f'{self.left_out.describe(root) or ""}')
        self.samples = [(file, label) for label, found in enumerate(files) for file in found]
        self.targets = [label for _, label in self.samples]


def open_folder(data_dir: str | None, split: str, transform: Callable) -> FlatFolder | ClassFolders:
    """Images of a folder, or of the folder of a split in it: of class folders where there are two or more, else flat. A
    folder that is not there, cannot be listed or has no images, no such split or several is a DataError."""
    if data_dir is None:
        raise DataError("dataset='folder' needs --data-dir, the folder of the images.")
    root, left_out = Path(data_dir).expanduser(), LeftOut()
    if not os.path.isdir(root):
        raise DataError(f'No folder {root}: --data-dir names the folder of the images.')
    listing = list_folder(root)
    name = find_split(root, listing.folders, split)
    if name is not None:
        kinds = (None, kind_of_split(name))  # folders of other splits are not left out
        beside = [other for other in listing.folders if other != name and kind_of_split(other) in kinds]
        left_out.add((('folder beside the split', 'folders beside the split'), str(root / other)) for other in beside
                     if has_images(root / other))
        left_out.add((('image beside the split', 'images beside the split'), file) for file in listing.files)
        root = root / name
        listing = list_folder(root)
    elif split != 'train' or any(map(kind_of_split, listing.folders)):
        raise DataError(f'{root} has no split {split!r}: it holds {", ".join(listing.folders[:10]) or "no folders"}. '
                        'Name one with --train-split or --eval-split; folders of classes must not be called so.')
    if len(listing.folders) < 2 or (listing.files and not any(has_images(root / name) for name in listing.folders)):
        return FlatFolder(root, transform, left_out)
    left_out.add((('image beside the class folders', 'images beside the class folders'), f) for f in listing.files)
    left_out.add(listing.others)
    return ClassFolders(root, listing.folders, transform, left_out)


def kind_of_split(name: str) -> str | None:
    """'train', 'val' or 'test' for a usual spelling of one (Training, valid, test_images, train2017), else None."""
    found = _SPLIT.fullmatch(name.casefold())
    return found[found.lastindex or 0] if found else None


def find_split(root: Path, folders: list[str], split: str) -> str | None:
    """The folder of a split: of its very name, or the only one that spells it in another way; raises DataError for
    several that do."""
    if split in folders:
        return split
    kind = kind_of_split(split)
    alike = [name for name in folders if kind and kind_of_split(name) == kind]
    if len(alike) > 1:
        raise DataError(f'{root} has several folders that may be the split {split!r}: {", ".join(alike)}. Name one '
                        'with --train-split or --eval-split.')
    return alike[0] if alike else None


class Listing(NamedTuple):
    """What a folder holds: names of folders, sorted, paths of files, and paths of the rest, each with the reason why
    it is left out."""
    folders: list[str]
    files: list[str]
    others: list[tuple[Reason, str]]


def list_folder(
        folder: str | Path, extensions: Collection[str] | None = None, chain: tuple[str, ...] | None = None,
) -> Listing:
    """What a folder holds, links followed; one that cannot be listed is a DataError. Files are wanted by `extensions`,
    in lower case with their dots, by default those of images. `chain` has the real paths of the folders that led here,
    the folder itself the last: a link to one of them, or to what holds one, leads back."""
    extensions, chain = extensions or image_extensions(), chain or (os.path.realpath(folder),)
    found = Listing([], [], [])
    try:
        with os.scandir(folder) as scan:
            entries = list(scan)
    except OSError as error:
        raise DataError(f'Cannot list the folder {folder}: {error.strerror}.') from error
    for entry in entries:
        is_link = entry.is_symlink()
        is_folder = os.path.isdir(entry.path) if is_link else entry.is_dir()
        is_file = os.path.isfile(entry.path) if is_link else entry.is_file()
        wanted = os.path.splitext(entry.name)[1].lower() in extensions
        if entry.name.startswith('.') or entry.name in _SYSTEM_FOLDERS:
            if is_folder:
                found.others.append((('hidden folder', 'hidden folders'), entry.path))
            elif wanted:
                found.others.append((('hidden file', 'hidden files'), entry.path))
        elif is_folder:
            if is_link and _leads_back(entry.path, chain):
                found.others.append((('link that leads back', 'links that lead back'), entry.path))
            else:
                found.folders.append(entry.name)
        elif wanted and (is_file or is_link):
            found.files.append(entry.path)  # a link to nowhere is an image that cannot be read
        elif is_file:
            found.others.append((('file of another ending', 'files of other endings'), entry.path))
        elif is_link:
            found.others.append((('link to nowhere', 'links to nowhere'), entry.path))
        else:
            found.others.append((('thing that is no file', 'things that are no files'), entry.path))
    found.folders.sort()
    return found


def walk(
        root: str | Path, extensions: Collection[str] | None = None, left_out: LeftOut | None = None,
        chain: tuple[str, ...] = (),
) -> Iterator[str]:
    """Files of a folder and its subfolders, in no order; `extensions` are as `list_folder` takes them, `left_out` is
    told what is left out, and `chain` has real paths of folders around it, which links are not to lead back to."""
    extensions, stack = extensions or image_extensions(), [(os.fspath(root), (*chain, os.path.realpath(root)))]
    while stack:
        folder, chain = stack.pop()
        found = list_folder(folder, extensions, chain)
        yield from found.files
        for name in found.folders:
            path = os.path.join(folder, name)
            stack.append((path, (*chain, os.path.realpath(path))))
        if left_out is not None:
            left_out.add(found.others)


def has_images(root: str | Path) -> bool:
    """Whether a folder or a subfolder of it has an image."""
    return next(walk(root), None) is not None


def no_files(kind: str, root: Path, endings: str, left_out: LeftOut) -> DataError:
    """The error of a folder without the files that it is for."""
    found = left_out.describe(root) or ''
    return DataError(f'No {kind} in {root}: expected files ending in {endings}. {found}'.strip())


def _leads_back(path: str, chain: tuple[str, ...]) -> bool:
    target = os.path.realpath(path)
    return any(os.path.commonpath([target, real]) == target for real in chain)
