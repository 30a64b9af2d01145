"""Streams and Hugging Face data: every image that is there is trained on, labelled or not, and what is not is named."""

import io
import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from autoreg_vit.data.transforms import ImageSpec, training_transform

pytest.importorskip('sklearn')

from autoreg_vit.commands import pretraining as pretraining
from autoreg_vit.commands.cli import main
from autoreg_vit.data import sources as data
from autoreg_vit.data.batches import Batches
from autoreg_vit.data.labelled import labelled_images
from autoreg_vit.engine.processes import Processes
from autoreg_vit.errors import ConfigError, DataError
from autoreg_vit.settings.classification import ProbeConfig
from autoreg_vit.settings.pretraining import PretrainConfig
from tests.support.launching import log_of
from tests.support.supervising import write_encoder

ONE = Processes(torch.device('cpu'))
TRANSFORM = training_transform(ImageSpec((8, 8), 3, (0.5,) * 3, (0.5,) * 3), (0.5, 1.0), 0.5)
TINY = {'img_size': 8, 'patch_size': 4, 'segments': 2, 'depth': 1, 'embed_dim': 32, 'num_heads': 1, 'decoder_depth': 1,
        'batch_size': 4, 'epochs': 1, 'warmup_epochs': 0, 'precision': 'float32', 'checkpoint_every_minutes': 0}


def pixels(number: int) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, (12, 16, 3), dtype=np.uint8)


def encoded(number: int, kind: str = 'PNG') -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels(number)).save(file, kind)
    return file.getvalue()


def number_of(image: Image.Image) -> int:
    """Which of the first hundred images it is."""
    return next(n for n in range(100) if np.array_equal(pixels(n), np.asarray(image)))


def write_shards(root: Path, samples: list[dict[str, bytes]], info: bool = True) -> Path:
    """Two shards, train-0.tar and train-1.tar, with the members of each sample by ending."""
    root.mkdir(exist_ok=True)
    half = (len(samples) + 1) // 2
    for shard in range(2):
        with tarfile.open(root / f'train-{shard}.tar', 'w') as tar:
            for number, sample in enumerate(samples[shard * half:(shard + 1) * half]):
                for ending, content in sample.items():
                    member = tarfile.TarInfo(f'{shard}{number:03d}.{ending}')
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    if info:
        (root / '_info.json').write_text(json.dumps({'splits': {'train': {
            'name': 'train', 'filenames': ['train-0.tar', 'train-1.tar'],
            'shard_lengths': [half, len(samples) - half], 'num_samples': len(samples)}}}))
    return root


def open_shards(root: Path, transform: Callable = TRANSFORM, **options):
    return data.open_dataset('wds/x', str(root), options.pop('split', 'train'), transform, training=True, batch_size=4,
                             **options)


@pytest.mark.usefixtures('webdataset')
class TestShards:
    @pytest.fixture
    def webdataset(self):
        pytest.importorskip('webdataset')

    @pytest.mark.parametrize('make', [
        lambda i: {'png': encoded(i), 'cls': b'1'},
        lambda i: {'png': encoded(i)},
        lambda i: {'png': encoded(i), **({'cls': b'1'} if i % 2 else {})},
        lambda i: {'png': encoded(i), 'cls': b'a dog'},
        lambda i: {'png': encoded(i), 'json': b'{}', 'txt': b'a caption', 'seg.png': encoded(99)},
        lambda i: {'TIFF': encoded(i, 'TIFF')},
        lambda i: {'input.bmp': encoded(i, 'BMP'), 'cls': b'1'},
    ])
    def test_every_image_is_read_whatever_its_label(self, make: Callable, tmp_path: Path):
        root = write_shards(tmp_path / 'shards', [make(i) for i in range(12)])
        found = [(number, label) for number, label in open_shards(root, number_of)]
        assert sorted(found) == [(i, -1) for i in range(12)]

    def test_jpeg(self, tmp_path: Path):
        root = write_shards(tmp_path / 'shards', [{'jpeg': encoded(i, 'JPEG')} for i in range(8)])
        assert len({image for image, _ in open_shards(root, lambda image: image.tobytes())}) == 8

    @pytest.mark.parametrize('workers', [0, 1])
    def test_few_damaged_ones_are_counted_named_and_stood_in_for(self, workers: int, tmp_path: Path, capsys):
        root = write_shards(tmp_path / 'shards', [{'png': b'broken' if i == 5 else encoded(i)} for i in range(20)])
        batches = Batches(open_shards(root), 4, 0, ONE, workers=workers, max_corrupt=0.05)
        source = batches.start_at(0)
        assert all(next(source)[0].shape == (4, 3, 8, 8) for _ in range(3 * batches.per_epoch))
        said = capsys.readouterr().out
        assert said.count('1 images cannot be read') == said.count('\n') == 1 and '0005 of ' in said
        with pytest.raises(DataError, match=r'^1 of 20 images cannot be read, more than --max-corrupt 0\.04 .*0005 of'):
            source = Batches(open_shards(root), 4, 0, ONE, workers=workers, max_corrupt=0.04).start_at(0)
            for _ in range(5):
                next(source)

    def test_a_part_of_an_epoch_does_not_raise_the_part_that_is_damaged(self, tmp_path: Path):
        root = write_shards(tmp_path / 'shards', [{'png': b'broken' if i == 5 else encoded(i)} for i in range(20)])
        source = Batches(open_shards(root, images=4), 4, 0, ONE, max_corrupt=0.05).start_at(0)
        assert all(len(next(source)[0]) == 4 for _ in range(12))

    @pytest.mark.parametrize('workers', [0, 1])
    def test_nothing_but_damaged_ones(self, workers: int, tmp_path: Path):
        root = write_shards(tmp_path / 'shards', [{'png': b'broken', 'cls': b'1'}] * 8)
        with pytest.raises(DataError, match=r'^None of the 8 images .* \d{4} of .* \(cannot identify image file\)\.$'):
            next(Batches(open_shards(root), 4, 0, ONE, workers=workers, max_corrupt=1.0).start_at(0))

    def test_too_many_end_the_run(self, tmp_path: Path, capsys):
        root = write_shards(tmp_path / 'shards', [{'png': encoded(i) if i % 8 == 0 else b'-'} for i in range(16)])
        assert main(['pretrain', '--dataset', 'wds/x', '--data-dir', str(root), *flags(TINY),
                     '--output-dir', str(tmp_path / 'run')]) == 2
        last = capsys.readouterr().err.splitlines()[-1]
        assert '14 of 16 images cannot be read, more than --max-corrupt 0.001 allows' in last

    def test_samples_without_an_image_are_named_by_what_they_have(self, tmp_path: Path):
        root = write_shards(tmp_path / 'shards', [{'jpgg': encoded(i), 'cls': b'1'} for i in range(8)])
        with pytest.raises(DataError, match='no image among its members jpgg, cls'):
            next(iter(open_shards(root)))

    def test_of_two_images_one_must_be_named(self, tmp_path: Path):
        root = write_shards(tmp_path / 'shards', [{'a.png': encoded(i), 'b.png': encoded(50 + i)} for i in range(8)])
        with pytest.raises(DataError, match=r'a\.png and b\.png could both be .* --image-column'):
            next(iter(open_shards(root)))
        assert sorted(n for n, _ in open_shards(root, number_of, image_column='b.png')) == list(range(50, 58))

    @pytest.mark.parametrize('workers', [0, 1])
    def test_shards_that_cannot_be_read_to_their_end(self, workers: int, tmp_path: Path):
        root = write_shards(tmp_path / 'shards', [{'png': encoded(i)} for i in range(16)])
        with (root / 'train-1.tar').open('r+b') as file:
            file.seek(4 * 512)
            file.write(b'?' * 4096)  # the header of a member among it, where tarfile ends without a word
        with pytest.raises(DataError, match=r'^The shard .*train-1\.tar ends after \d of 8 samples') as caught:
            source = Batches(open_shards(root), 4, 0, ONE, workers=workers, max_corrupt=1.0).start_at(0)
            for _ in range(4):
                next(source)
        assert '\n' not in str(caught.value)

    def test_shards_that_are_no_tar_files(self, tmp_path: Path):
        root = write_shards(tmp_path / 'shards', [{'png': encoded(i)} for i in range(16)])
        (root / 'train-1.tar').write_bytes(b'?' * 512 + bytes(1024))
        with pytest.raises(DataError, match=r'^The shard .*train-1\.tar cannot be read to its end \(ReadError'):
            list(open_shards(root))

    def test_truncated_or_missing_shards(self, tmp_path: Path):
        root = write_shards(tmp_path / 'shards', [{'png': encoded(i)} for i in range(8)])
        os.truncate(root / 'train-1.tar', 2000)
        with pytest.raises(DataError, match=r'train-1\.tar is cut short'):
            open_shards(root)
        (root / 'train-1.tar').unlink()
        with pytest.raises(DataError, match=r'train-1\.tar is missing'):
            open_shards(root)

    def test_shards_of_unknown_length(self, tmp_path: Path):
        root = write_shards(tmp_path / 'shards', [{'png': encoded(i)} for i in range(8)], info=False)
        with pytest.raises(DataError, match=r'_info\.json beside them, .*--train-split .*--train-images'):
            open_shards(root)
        with pytest.raises(DataError, match='say with --train-images'):
            open_shards(root, split='train-{0..1}.tar')
        for options in ({'split': 'train-{0..1}.tar', 'images': 8}, {'split': 'train-{0..1}.tar|8'}):
            assert sorted(n for n, _ in open_shards(root, number_of, **options)) == list(range(8))

    @pytest.mark.parametrize('workers', [0, 2])
    def test_goes_on_from_any_place(self, workers: int, tmp_path: Path):
        root = write_shards(tmp_path / 'shards', [{'png': b'' if i == 3 else encoded(i)} for i in range(20)])

        def take(start: int, count: int) -> list[torch.Tensor]:
            source = Batches(open_shards(root), 4, 0, ONE, workers=workers, max_corrupt=0.1).start_at(start)
            return [next(source)[0] for _ in range(count)]

        straight = take(0, 8)  # five an epoch, or six where each of two processes rounds up
        assert all(map(torch.equal, take(3, 5), straight[3:]))
        assert not torch.equal(straight[0], straight[1])

    def test_streams_are_not_evaluated_and_that_is_said(self, tmp_path: Path, capsys, no_figures):
        root = write_shards(tmp_path / 'shards', [{'png': encoded(i), 'cls': str(i % 2).encode()} for i in range(8)])
        settings = {**TINY, 'dataset': 'wds/x', 'data_dir': str(root), 'output_dir': str(tmp_path / 'run')}
        with pytest.raises(ConfigError, match=r"eval_split='train' needs labels: .*streams are not evaluated"):
            pretraining.pretrain(PretrainConfig(**settings, eval_split='train'))
        folder = pretraining.pretrain(PretrainConfig(**settings))
        said = capsys.readouterr().out
        assert 'No accuracies will be reported, for want of labels: ' in said and 'streams are not evaluated' in said
        events = [line['event'] for line in log_of(folder)]
        assert events[-1] == 'finish' and 'evaluation' not in events


def flags(settings: dict) -> list[str]:
    return [word for name, value in settings.items() for word in ('--' + name.replace('_', '-'), str(value))]


def test_columns_are_for_data_that_have_them(tmp_path: Path):
    for dataset, option in (('folder', 'image_column'), ('digits', 'label_column'), ('wds/x', 'label_column')):
        with pytest.raises(ConfigError, match=f'--{option.replace("_", "-")} x is for .*{dataset}'):
            data.open_dataset(dataset, str(tmp_path), 'train', TRANSFORM, **{option: 'x'})


@pytest.fixture(scope='module')
def datasets():
    module = pytest.importorskip('datasets', reason='the package datasets is not installed')
    module.disable_progress_bars()
    return module


@pytest.fixture
def save(datasets, tmp_path: Path) -> Callable:
    """Writes a split of a data set with columns {name: (values, feature)}, and gives the folder's name."""
    def write(split: str = 'train', folder: str = 'data', **columns: tuple) -> str:
        (tmp_path / folder).mkdir(exist_ok=True)
        features = datasets.Features({name: feature for name, (_, feature) in columns.items()})
        rows = datasets.Dataset.from_dict({name: values for name, (values, _) in columns.items()}, features=features)
        rows.to_parquet(str(tmp_path / folder / f'{split}.parquet'))
        return str(tmp_path / folder)

    return write


@pytest.fixture
def images(datasets) -> tuple:
    return [{'bytes': encoded(i), 'path': f'{i}.png'} for i in range(12)], datasets.Image()


@pytest.fixture
def open_hub(tmp_path: Path) -> Callable:
    def open_data(name: str, split: str = 'train', transform: Callable = number_of, kind: str = 'hfds', **options):
        return data.open_dataset(f'{kind}/{name}', str(tmp_path / 'cache'), split, transform, **options)

    return open_data


class TestHub:
    @pytest.mark.parametrize('values, kind, targets, classes', [
        ([0, 1] * 6, 'names', [0, 1] * 6, ['cat', 'dog']),
        ([3, 5] * 6, 'int64', [3, 5] * 6, None),
        (['dog', 'cat'] * 6, 'string', [1, 0] * 6, ['cat', 'dog']),
        ([True, False] * 6, 'bool', [1, 0] * 6, ['False', 'True']),
    ])
    def test_labels(self, values, kind, targets, classes, save, images, open_hub, datasets):
        feature = datasets.ClassLabel(names=classes) if kind == 'names' else datasets.Value(kind)
        dataset = open_hub(save(image=images, label=(values, feature)))
        assert [dataset[i] for i in range(12)] == list(enumerate(targets))
        assert dataset.classes == classes and data.labels_of(dataset).tolist() == targets

    @pytest.mark.parametrize('values, kind, reason', [
        (None, None, 'no column is known to hold labels, of image: name one with --label-column'),
        ([None] * 12, 'int64', "12 of 12 labels in the column 'label' are missing"),
        (['x', None] * 6, 'string', "6 of 12 labels in the column 'label' are missing"),
        ([-1] * 12, 'names', "12 of 12 labels in the column 'label' are missing"),
        ([0, -1, 1] * 4, 'int64', "4 of 12 labels in the column 'label' are missing"),
        ([0.5, 1.5] * 6, 'float64', 'no column is known to hold labels, of image, label'),
    ])
    def test_without_labels(self, values, kind, reason, save, images, open_hub, datasets, tmp_path):
        feature = datasets.ClassLabel(names=['a', 'b']) if kind == 'names' else kind and datasets.Value(kind)
        name = save(image=images, **({'label': (values, feature)} if kind else {}))
        dataset = open_hub(name)
        assert [dataset[i] for i in range(12)] == [(i, -1) for i in range(12)]
        assert data.labels_of(dataset) is None and reason in dataset.unlabelled
        config = ProbeConfig(weights='x', dataset=f'hfds/{name}', data_dir=str(tmp_path / 'cache'))
        with pytest.raises(DataError, match=r"'train'.* has no labels") as caught:
            labelled_images(config, ImageSpec((8, 8), 3, (0.5,) * 3, (0.5,) * 3), ONE)
        assert reason in str(caught.value)

    def test_one_candidate_is_found(self, save, images, open_hub, datasets):
        one = datasets.ClassLabel(names=['a', 'b'])
        for column, feature in (('fine', one), ('Target', datasets.Value('int32'))):
            name = save(folder=column, img=images, caption=(['text'] * 12, datasets.Value('string')),
                        **{column: ([0, 1] * 6, feature)})
            assert open_hub(name)[1] == (1, 1)

    def test_one_of_several_must_be_named(self, save, images, open_hub, datasets):
        classes = datasets.ClassLabel(names=['a', 'b'])
        name = save(left=images, right=(images[0][::-1], images[1]), fine=([0, 1] * 6, classes),
                    coarse=([1, 0] * 6, classes))
        with pytest.raises(DataError, match=r'left, right all hold images.*--image-column'):
            open_hub(name)
        dataset = open_hub(name, image_column='right')
        assert dataset[0] == (11, -1) and 'fine, coarse could all be labels: name one' in dataset.unlabelled
        assert open_hub(name, image_column='right', label_column='coarse')[0] == (11, 1)
        for options, words in (({'image_column': 'rigth'}, "'rigth'.*Did you mean 'right'"),
                               ({'image_column': 'fine'}, "'fine' holds ClassLabel.*not images"),
                               ({'image_column': 'left', 'label_column': 'right'}, "'right' holds Image.*not labels")):
            with pytest.raises(DataError, match=words):
                open_hub(name, **options)

    def test_files_without_the_packages_own_features(self, datasets, tmp_path: Path, open_hub):
        parquet, pyarrow = pytest.importorskip('pyarrow.parquet'), pytest.importorskip('pyarrow')
        for name, values in (('struct', [{'bytes': encoded(i), 'path': None} for i in range(8)]),
                             ('binary', [encoded(i) for i in range(8)])):
            (tmp_path / name).mkdir()
            table = pyarrow.table({'image': values, 'label': list(range(8))})
            parquet.write_table(table, tmp_path / name / 'train.parquet')
            assert open_hub(str(tmp_path / name))[3] == (3, 3)
            stream = open_hub(str(tmp_path / name), kind='hfids')
            assert [n for n, _ in stream] == list(range(8))

    def test_damaged_ones_are_counted_and_named(self, save, images, open_hub):
        values, feature = images
        values = [*values[:4], {'bytes': b'broken', 'path': '4.png'}, *values[5:11], None]
        dataset = open_hub(save(image=(values, feature)), transform=TRANSFORM)
        assert len(next(Batches(dataset, 12, 0, ONE, max_corrupt=0.2).start_at(0))[0]) == 12
        with pytest.raises(DataError, match=r'2 of 12 images cannot be read.*image 4 of .*, 4\.png; image 11 of'):
            next(Batches(dataset, 12, 0, ONE, max_corrupt=0.1).start_at(0))

    def test_tolerated_damage_does_not_end_the_report(self, save, images, datasets, tmp_path, capsys, no_figures):
        values, feature = images
        values = [*values[:4], {'bytes': b'broken', 'path': '4.png'}, *values[5:11], None]
        name = save(image=(values, feature), label=([0, 1] * 6, datasets.Value('int64')))
        folder = pretraining.pretrain(PretrainConfig(
            **TINY, dataset=f'hfds/{name}', data_dir=str(tmp_path / 'cache'), max_corrupt=0.2,
            output_dir=str(tmp_path / 'run')))
        assert [line['event'] for line in log_of(folder)].count('evaluation') == 2
        said = capsys.readouterr().out
        assert said.count('2 of 12 images cannot be read, and are left out of the accuracies') == 2
        assert ', 4.png' in said
        dataset = data.open_dataset(f'hfds/{name}', str(tmp_path / 'cache'), 'train', TRANSFORM)
        assert pretraining._examples(dataset, 12).shape == (10, 3, 8, 8)

    def test_splits_with_other_classes(self, save, images, datasets, tmp_path: Path):
        text = datasets.Value('string')
        name = save(image=images, label=(['a', 'b'] * 6, text))
        save('test', image=images, label=(['b', 'c'] * 6, text))
        config = ProbeConfig(weights='x', dataset=f'hfds/{name}', data_dir=str(tmp_path / 'cache'), eval_split='test')
        with pytest.raises(DataError, match=r'other classes: a, c are in one alone'):
            labelled_images(config, ImageSpec((8, 8), 3, (0.5,) * 3, (0.5,) * 3), ONE)

    def test_trains_without_labels_and_probes_by_text(self, save, images, datasets, tmp_path, capsys, no_figures):
        plain = save(folder='plain', img=images)
        settings = {**TINY, 'data_dir': str(tmp_path / 'cache')}
        settings |= {'dataset': f'hfds/{plain}', 'output_dir': str(tmp_path / 'run')}
        folder = pretraining.pretrain(PretrainConfig(**settings))
        assert 'No accuracies will be reported' in capsys.readouterr().out
        assert log_of(folder)[0]['train_images'] == 12 and log_of(folder)[-1]['event'] == 'finish'
        named = save(folder='named', img=images, species=(['cat', 'dog'] * 6, datasets.Value('string')))
        assert main(['probe', '--weights', str(write_encoder(tmp_path / 'encoder')), '--dataset', f'hfds/{named}',
                     '--data-dir', str(tmp_path / 'cache'), '--label-column', 'species', '--fast', '--epochs', '1',
                     '--batch-size', '4', '--knn', '2', '--output-dir', str(tmp_path / 'probe')]) == 0
        assert json.loads((tmp_path / 'probe' / 'results.json').read_text())['classes'] == ['cat', 'dog']

    def test_data_that_cannot_be_opened(self, save, images, open_hub, tmp_path: Path):
        with pytest.raises(DataError, match=r"Cannot open the data set .*nowhere"):
            open_hub(str(tmp_path / 'nowhere'))
        with pytest.raises(DataError, match="split 'val'"):
            open_hub(save(image=images), 'val')


class TestHubStreams:
    def test_of_unknown_length(self, save, images, tmp_path: Path, capsys, no_figures):
        name = save(image=images, other=images)
        arguments = ['pretrain', '--dataset', f'hfids/{name}', '--data-dir', str(tmp_path / 'cache'), *flags(TINY),
                     '--image-column', 'image', '--output-dir', str(tmp_path / 'run')]
        assert main(arguments) == 2
        assert '--train-images how many images to take' in capsys.readouterr().err
        assert main([*arguments, '--train-images', '8']) == 0
        assert [line['step'] for line in log_of(tmp_path / 'run') if line['event'] == 'step'][-1] == 2

    @pytest.mark.parametrize('workers, download', [(0, False), (1, False), (2, True)])
    def test_every_image_is_read(self, workers: int, download: bool, save, images, open_hub):
        stream = open_hub(save(image=images), kind='hfids', training=True, images=12, download=download)
        source = Batches(stream, 1, 0, ONE, workers=workers).start_at(0)
        first, second = ([int(next(source)[0]) for _ in range(12)] for _ in range(2))
        assert sorted(first) == sorted(second) == list(range(12)) and first != second
        again = Batches(stream, 1, 0, ONE, workers=workers).start_at(5)
        assert [int(next(again)[0]) for _ in range(7)] == first[5:]

    def test_damaged_ones_are_counted_once_and_named(self, save, images, open_hub, capsys):
        values, feature = images
        values = [*values[:4], {'bytes': b'broken', 'path': '4.png'}, *values[5:11], None]
        stream = open_hub(save(image=(values, feature)), transform=TRANSFORM, kind='hfids', training=True,
                          batch_size=4, images=12)
        source = Batches(stream, 4, 0, ONE, max_corrupt=0.2).start_at(0)
        for _ in range(9):
            next(source)
        said = capsys.readouterr().out
        assert '2 images cannot be read' in said and '4.png (SHA-256 ' in said and 'has no image' in said
        with pytest.raises(DataError, match=r'cannot be read, more than --max-corrupt 0\.1'):
            source = Batches(stream, 4, 0, ONE, max_corrupt=0.1).start_at(0)
            for _ in range(3):
                next(source)
