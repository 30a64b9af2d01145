"""Whatever lies in a folder, pretraining takes what it should of it, or ends in one line that names what is wrong."""

import contextlib
import io
import itertools
import os
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from autoreg_vit.data.transforms import ImageSpec

pytest.importorskip('sklearn')

from autoreg_vit.commands.cli import main
from autoreg_vit.data.pretraining import labelled_sets, training_batches
from autoreg_vit.engine.processes import Processes
from autoreg_vit.evaluation.classifiers import accuracies
from autoreg_vit.models import create_pretraining_model
from autoreg_vit.settings.pretraining import PretrainConfig

ONE = Processes(torch.device('cpu'))
TINY = {'img_size': 8, 'patch_size': 4, 'in_chans': 1, 'depth': 2, 'embed_dim': 32, 'num_heads': 1, 'decoder_depth': 1,
        'segments': 2}
ENDINGS = ('.png', '.tif', '.PNG')
HIDDEN = ('.git', '__MACOSX')
#: Spellings of the split to train on, of other splits, and names that are none.
TRAIN, OTHERS = ('train', 'Training'), ('val', 'TEST')
NAMES = ('a', 'b', 'c', 'x y', 'é', 'two\nlines', '%s{}', 'trainer', *TRAIN, *OTHERS, *HIDDEN)


@dataclass(eq=False)
class Node:
    """A file, folder or link; `kind` says which."""
    kind: str
    content: str = ''
    children: dict = field(default_factory=dict)
    parent: 'Node | None' = None

    @property
    def ancestors(self) -> list['Node']:
        return [] if self.parent is None else [self.parent, *self.parent.ancestors]

    def resolve(self, seen: tuple = ()) -> 'Node | None':
        """What a link leads to at last; None for nowhere."""
        if self.kind != 'link':
            return self
        if self in seen:
            return None
        match self.content:
            case '.':
                return self.parent
            case '..':
                return self.parent.parent
            case 'outside':
                return self.ancestors[-1].children['outside']
        target = self.parent.children.get(self.content)
        return target and target.resolve((*seen, self))


GOOD, BAD = ('grey', 'colour', '16 bits', 'float', 'alpha'), ('cut', 'empty', 'text', 'wide float', 'int32')


def named(endings: tuple[str, ...], node: st.SearchStrategy, names: tuple[str, ...] = NAMES) -> st.SearchStrategy:
    return st.tuples(st.builds(str.__add__, st.sampled_from(names), st.sampled_from(endings)), node)


def folders(children: st.SearchStrategy[dict]) -> st.SearchStrategy[Node]:
    return st.builds(Node, st.just('folder'), st.just(''), children)


def merged(*parts: st.SearchStrategy[dict]) -> st.SearchStrategy[dict]:
    return st.tuples(*parts).map(lambda found: {k: v for part in found for k, v in part.items()})


IMAGE = named(ENDINGS, st.builds(Node, st.just('image'), st.sampled_from(GOOD)))


def trees(depth: int) -> st.SearchStrategy[dict]:
    """What a folder holds by name: as a rule images, now and then something else."""
    link = st.builds(Node, st.just('link'), st.sampled_from(('.', '..', 'outside', 'nowhere', 'a', 'b', 'a.png')))
    others = [named(ENDINGS, st.builds(Node, st.just('image'), st.sampled_from(BAD))),
              named(('.txt', ''), st.builds(Node, st.just('file'))), named(('', '.png'), link)]
    folder = [] if depth == 0 else [named(('',), folders(trees(depth - 1)))] * 2
    return st.lists(st.one_of(*[IMAGE] * 4, *folder, *others), max_size=4).map(dict)


def class_trees() -> st.SearchStrategy[dict]:
    """Class folders of which each holds an image, beside whatever else."""
    filled = folders(merged(trees(1), st.lists(IMAGE, min_size=1, max_size=4).map(dict)))
    several = st.lists(named(('',), filled, NAMES[:8]), min_size=2, max_size=4, unique_by=lambda pair: pair[0])
    return merged(trees(0), several.map(dict))


def roots() -> st.SearchStrategy[dict]:
    """What a data set's folder holds: anything, class folders, or splits of them."""
    split = st.lists(named(('',), folders(class_trees()), (*TRAIN, *OTHERS)), min_size=1, max_size=3).map(dict)
    return st.one_of(trees(2), class_trees(), merged(trees(1), split))


def write(node: Node, path: Path) -> None:
    """Make a folder, file or link on the disk."""
    if node.kind == 'folder':
        path.mkdir()
        for name, child in node.children.items():
            child.parent = node
            write(child, path / name)
    elif node.kind == 'link':
        base = next(p for p in path.parents if p.name == 'base')
        os.symlink({'nowhere': '/nonexistent', 'outside': base / 'outside'}.get(node.content, node.content), path)
    elif node.kind == 'file' or node.content in ('text', 'empty'):
        path.write_text('' if node.content == 'empty' else 'no image')
    else:
        values = np.arange(16, dtype=np.uint8).reshape(4, 4)
        image = Image.fromarray({
            '16 bits': values.astype(np.uint16) * 4000, 'float': values.astype(np.float32) / 15,
            'wide float': values.astype(np.float32), 'int32': values.astype(np.int32)}.get(node.content, values))
        image = image.convert({'colour': 'RGB', 'alpha': 'LA'}.get(node.content, image.mode))
        image.save(path, 'TIFF' if image.mode in ('F', 'I') else 'PNG')
        if node.content == 'cut':
            os.truncate(path, path.stat().st_size // 2)


def visible(folder: Node, chain: list[Node]) -> tuple[dict[str, Node], dict[str, bool]]:
    """Subfolders by name, and images by name, whether they can be read. A link to what was come through is neither."""
    folders, images = {}, {}
    for name, child in folder.children.items():
        target = child.resolve()
        leads_back = child.kind == 'link' and any(target is c or target in c.ancestors for c in chain)
        if name in HIDDEN or name.startswith('.'):
            continue
        if target is not None and target.kind == 'folder':
            if not leads_back:
                folders[name] = target
        elif name.lower().endswith(ENDINGS[:2]) and (child.kind == 'link' or target.kind == 'image'
                                                     or target.kind == 'file'):
            images[name] = target is not None and target.content in GOOD
    return folders, images


def images_below(folder: Node, chain: list[Node]) -> list[tuple[str, bool]]:
    """Names of all images in a folder, and whether they can be read."""
    folders, images = visible(folder, [*chain, folder])
    return list(images.items()) + [found for sub in folders.values() for found in images_below(sub, [*chain, folder])]


def expected(root: Node) -> tuple[list[str] | None, list[tuple[str, bool]]] | list[str]:
    """Classes (None for a flat folder) and images, or what the error should name, any of it."""
    folders, _ = visible(root, [root])
    splits = [name for name in TRAIN if name in folders]
    if splits:
        root = folders[splits[0]]  # 'train' itself before another spelling
    elif set(folders) & set(OTHERS):
        return [name for name in OTHERS if name in folders]
    folders, loose = visible(root, [root])
    below = {name: images_below(folder, [root]) for name, folder in folders.items()}
    if len(folders) < 2 or (loose and not any(below.values())):
        found = images_below(root, [])
        return (None, found) if found else ['No images in']
    empty = [name for name, found in below.items() if not found]
    if empty:
        return empty
    return sorted(folders), list(itertools.chain(*below.values()))


@pytest.fixture(scope='module')
def model():
    return create_pretraining_model('randsac_vit_tiny_patch4_32', **TINY)


def check(children: dict, max_corrupt: float, model) -> None:
    outside = Node('folder', children={'0.png': Node('image', 'grey'), 'back': Node('link', '..')})
    root = Node('folder', children=children)
    base = Node('folder', children={'outside': outside, 'root': root})
    with tempfile.TemporaryDirectory() as folder:
        write(base, Path(folder, 'base'))
        path = Path(folder, 'base', 'root')
        wanted = expected(root)
        if isinstance(wanted, tuple):
            classes, images = wanted
            unreadable = [name for name, good in images if not good]
            if len(unreadable) > max_corrupt * len(images):
                wanted = unreadable
        config = PretrainConfig(**TINY, data_dir=str(path), dataset='folder', crop_scale=(0.5, 1.0), batch_size=1,
                                max_corrupt=max_corrupt, workers=0, precision='float32')
        if isinstance(wanted, list):
            flags = [f'--{name.replace("_", "-")}={value}' for name, value in TINY.items()]
            error = io.StringIO()
            with contextlib.redirect_stderr(error), contextlib.redirect_stdout(io.StringIO()):
                status = main(['pretrain', *flags, f'--data-dir={path}', f'--max-corrupt={max_corrupt}',
                               '--batch-size=1', f'--output-dir={folder}/run'])
            line, = error.getvalue().splitlines()
            assert status == 2 and any(' '.join(name.split()) in line for name in wanted), (wanted, line)
            assert not Path(folder, 'run').exists()
            return
        with contextlib.redirect_stdout(io.StringIO()):
            spec = ImageSpec.of(model)
            batches = training_batches(config, spec, ONE)
            found = batches.dataset.dataset
            assert (getattr(found, 'classes', None), len(found)) == (classes, len(images))
            model(next(batches.start_at(0))[0]).loss.backward()
            labelled = labelled_sets(config, spec, ONE)
            assert (labelled is None) == (classes is None)
            if labelled and not unreadable:
                assert all(0 <= v <= 100 for v in accuracies(model.encoder, *labelled, ONE.device).values())


@pytest.mark.parametrize('examples', [25, pytest.param(200, marks=pytest.mark.slow)])
def test_any_folder_trains_or_names_what_is_wrong(examples: int, model):
    @given(roots(), st.sampled_from([0.0, 0.5]))
    @settings(max_examples=examples, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    def run(children: dict, max_corrupt: float) -> None:
        check(children, max_corrupt, model)

    run()
