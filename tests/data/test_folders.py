"""What a folder of images holds: classes, splits, links, and what is left out and said."""

import os
import pickle
from pathlib import Path

import pytest
from PIL import Image
from torchvision.datasets import ImageFolder

from autoreg_vit.data.checks import check_images

pytest.importorskip('sklearn')

from autoreg_vit.data import sources as data
from autoreg_vit.data.folders import ClassFolders, FlatFolder, kind_of_split, open_folder
from autoreg_vit.errors import DataError


def draw(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new('L', (4, 4)).save(path, format=None if path.suffix.lower() in Image.registered_extensions() else 'PNG')
    return path


def fill(root: Path, *names: str) -> Path:
    for name in names:
        draw(root / name)
    return root


def opened(root: Path, split: str = 'train') -> ClassFolders | FlatFolder:
    return open_folder(str(root), split, lambda image: image)


def names(dataset: ClassFolders | FlatFolder) -> list[str]:
    """Paths of the images in the data set's root."""
    return [os.path.relpath(s[0] if isinstance(s, tuple) else s, dataset.root) for s in dataset.samples]


def said(dataset: ClassFolders | FlatFolder, check: int = 0) -> str:
    messages = []
    check_images(dataset, check, 1.0, messages.append)
    return '\n'.join(messages)


class TestClasses:
    def test_order_and_labels_are_those_of_torchvision(self, tmp_path: Path):
        """So that runs begun before go on with the same images."""
        fill(tmp_path, 'b/2.png', 'b/10.png', 'b/x-y/0.png', 'b/x/0.png', 'b/x/y/0.PNG', 'a/0.jpg', 'B/0.png',
             'é/0.png')
        found, reference = opened(tmp_path), ImageFolder(str(tmp_path))
        assert found.classes == reference.classes == ['B', 'a', 'b', 'é']
        assert found.samples == reference.samples and found.targets == reference.targets
        assert pickle.loads(pickle.dumps(ClassFolders(tmp_path, ['a', 'b'], None))).classes == ['a', 'b']

    @pytest.mark.parametrize('hidden', ['.git', '.ipynb_checkpoints', '__MACOSX', '@eaDir'])
    @pytest.mark.parametrize('place', ['.', 'a'])
    def test_hidden_folders_are_no_classes_and_are_named(self, hidden: str, place: str, tmp_path: Path):
        fill(tmp_path, 'a/0.png', 'b/0.png', f'{place}/{hidden}/0.png')
        found = opened(tmp_path)
        assert found.classes == ['a', 'b'] and names(found) == ['a/0.png', 'b/0.png']
        assert f'1 hidden folder ({Path(place, hidden)})' in said(found)

    def test_what_lies_beside_is_counted_and_named(self, tmp_path: Path):
        fill(tmp_path, 'a/0.png', 'b/0.png', *(f'{n}.jpg' for n in range(5)), 'a/._0.png')
        (tmp_path / 'labels.csv').touch()
        (tmp_path / 'b' / 'note.txt').touch()
        (tmp_path / 'b' / '.DS_Store').touch()
        os.symlink('/nowhere', tmp_path / 'gone')
        os.mkfifo(tmp_path / 'a' / 'pipe.png')
        found = opened(tmp_path)
        assert names(found) == ['a/0.png', 'b/0.png']
        text = said(found)
        assert text.startswith(f'Left out of {tmp_path}: ') and text.count('\n') == 0
        for words in ('5 images beside the class folders (0.jpg; 1.jpg; 2.jpg; and 2 more)',
                      f'2 files of other endings ({Path("b", "note.txt")}; labels.csv)',
                      f'1 hidden file ({Path("a", "._0.png")})', '1 link to nowhere (gone)',
                      f'1 thing that is no file ({Path("a", "pipe.png")})'):
            assert words in text
        assert said(opened(fill(tmp_path / 'b'))) .startswith('Left out') and said(opened(fill(
            tmp_path / 'clean', '0.png'))) == ''

    def test_folders_without_images(self, tmp_path: Path):
        (tmp_path / 'docs').mkdir()
        (tmp_path / 'docs' / 'a.txt').touch()
        fill(tmp_path, 'a/0.png', 'b/0.png')
        with pytest.raises(DataError, match=r'without images under .*: docs\. .*1 file of another ending \(docs/a\.'):
            opened(tmp_path)
        flat = tmp_path / 'flat'
        (flat / 'docs').mkdir(parents=True)
        (flat / 'more').mkdir()
        assert names(opened(fill(flat, '0.png', '1.png'))) == ['0.png', '1.png']

    @pytest.mark.parametrize('ending', ['.jfif', '.JPG', '.gif', '.webp', '.tif', '.jpe', '.jp2', '.tga'])
    def test_endings(self, ending: str, tmp_path: Path):
        assert len(opened(fill(tmp_path, f'all/0{ending}'))) == 1


class TestLinks:
    def test_to_folders_and_files(self, tmp_path: Path):
        fill(tmp_path, 'elsewhere/0.png', 'elsewhere/in/1.png', 'real/a/0.png', 'real/b/0.png')
        os.symlink(tmp_path / 'elsewhere', tmp_path / 'real' / 'c')
        os.symlink(tmp_path / 'elsewhere', tmp_path / 'real' / 'b' / 'more')
        os.symlink(tmp_path / 'elsewhere' / '0.png', tmp_path / 'real' / 'a' / 'linked.png')
        os.symlink(tmp_path / 'real', tmp_path / 'root')
        found = opened(tmp_path / 'root')
        assert found.classes == ['a', 'b', 'c']
        assert names(found) == ['a/0.png', 'a/linked.png', 'b/0.png', 'b/more/0.png', 'b/more/in/1.png', 'c/0.png',
                                'c/in/1.png']

    def test_loops_end_and_are_named(self, tmp_path: Path):
        fill(tmp_path, 'root/a/0.png', 'root/b/0.png', 'out/0.png')
        root = tmp_path / 'root'
        for target, link in (('.', 'a/self'), ('..', 'a/up'), ('../b', 'a/b'), ('../a', 'b/a'), ('..', '../out/top'),
                             ('../out', 'out'), ('loop.png', 'b/loop.png'), ('.', 'here'), ('../root', '../out/root')):
            os.symlink(target, root / link)
        found = opened(root)
        assert found.classes == ['a', 'b', 'out']
        assert names(found) == ['a/0.png', 'a/b/0.png', 'a/b/loop.png', 'b/0.png', 'b/loop.png', 'b/a/0.png',
                                'out/0.png']
        assert '9 links that lead back' in said(found)

    def test_to_nowhere_is_an_image_that_cannot_be_read(self, tmp_path: Path):
        fill(tmp_path, *(f'all/{n}.png' for n in range(4)))
        os.symlink('/nowhere/x.png', tmp_path / 'all' / 'x.png')
        found = opened(tmp_path)
        with pytest.raises(DataError, match=r'1 of 5 images cannot be read.*x\.png \(a link to nowhere\)'):
            check_images(found, 10, 0.0)
        assert '1 of 5 images cannot be read' in said(found, 10)

    def test_a_folder_that_cannot_be_listed(self, tmp_path: Path, monkeypatch):
        fill(tmp_path, 'a/0.png', 'b/0.png')
        scandir = os.scandir

        def refuse(path):
            if str(path).endswith('b'):
                raise PermissionError(13, 'Permission denied')
            return scandir(path)

        monkeypatch.setattr(os, 'scandir', refuse)
        with pytest.raises(DataError, match=r'Cannot list the folder .*/b: Permission denied'):
            opened(tmp_path)


class TestSplits:
    @pytest.mark.parametrize('name, kind', [
        ('train', 'train'), ('Training', 'train'), ('TRAIN', 'train'), ('train_set', 'train'), ('train2017', 'train'),
        ('val', 'val'), ('valid', 'val'), ('Validation', 'val'), ('test', 'test'), ('Testing', 'test'),
        ('test_images', 'test'), ('trainer', None), ('trains', None), ('value', None), ('tester', None), ('dev', None),
        ('train_1', None), ('contest', None), ('trainid', None), ('valing', None)])
    def test_spellings(self, name: str, kind: str | None):
        assert kind_of_split(name) == kind

    @pytest.mark.parametrize('train, test', [('Training', 'Testing'), ('TRAIN', 'Val'), ('train2017', 'valid')])
    def test_are_found_however_spelt(self, train: str, test: str, tmp_path: Path):
        fill(tmp_path, *(f'{split}/{name}/{n}.png' for split, count in ((train, 3), (test, 2)) for name in 'ab'
                         for n in range(count)))
        asked = kind_of_split(test)
        assert [(opened(tmp_path, s).classes, len(opened(tmp_path, s))) for s in ('train', asked, train, test)] == [
            (['a', 'b'], n) for n in (6, 4, 6, 4)]
        with pytest.raises(DataError, match=f"has no split 'fold1': it holds .*{train}"):
            opened(tmp_path, 'fold1')

    def test_an_exact_name_goes_first_and_others_are_named(self, tmp_path: Path):
        fill(tmp_path, 'train/a/0.png', 'train/b/0.png', 'Train/a/0.png', 'test/a/0.png', 'bus/0.png', '0.png')
        (tmp_path / 'annotations').mkdir()
        text = said(opened(tmp_path))
        assert '2 folders beside the split (../Train; ../bus), 1 image beside the split (../0.png)' in text
        with pytest.raises(DataError, match="several folders that may be the split 'training': Train, train"):
            opened(tmp_path, 'training')

    def test_no_split_to_train_on(self, tmp_path: Path):
        fill(tmp_path, 'Testing/a/0.png', 'VAL/a/0.png')
        with pytest.raises(DataError, match=r"has no split 'train': it holds Testing, VAL\."):
            opened(tmp_path)

    def test_a_linked_folder_of_a_split(self, tmp_path: Path):
        fill(tmp_path, 'elsewhere/0.png', 'root/train/note')
        (tmp_path / 'root' / 'train' / 'note').unlink()
        os.symlink(tmp_path / 'elsewhere', tmp_path / 'root' / 'train' / 'images')
        assert names(opened(tmp_path / 'root')) == ['images/0.png']


def test_no_images_says_what_there_is(tmp_path: Path):
    for name in ('a.txt', 'b.txt'):
        (tmp_path / name).touch()
    with pytest.raises(DataError, match=r'No images in .*: expected .*Pillow reads.*2 files of other endings'):
        opened(tmp_path)


def test_unlabelled_images_are_flat(tmp_path: Path):
    found = opened(fill(tmp_path, 'all/1.png', 'all/x/0.png', '2.png'))
    assert isinstance(found, FlatFolder) and names(found) == ['2.png', 'all/1.png', 'all/x/0.png']
    assert found[0][1] == -1 and data.labels_of(found) is None
