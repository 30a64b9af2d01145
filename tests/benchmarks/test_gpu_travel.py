"""What travels to the machine with the GPU and what is taken from what comes back."""

import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

pytest.importorskip('matplotlib')

from autoreg_vit import __version__
from autoreg_vit.artifacts import sha256_of
from autoreg_vit.engine import provenance
from autoreg_vit.errors import ConfigError
from autoreg_vit.hub.folders import export_encoder
from autoreg_vit.ops.triton import launches
from benchmarks import tune_attention
from benchmarks.gpu import __main__ as command
from benchmarks.gpu import cards, pack, pretraining, sitting, state, take
from tests.support.exporting import write_run

ROOT = Path(__file__).parents[2]
FACTS = {'commit': '0123456789ab', 'device': 'NVIDIA H100 80GB HBM3', 'torch': '2.11.0+cu130', 'triton': '3.6.0',
         'timm': '1.0.31', 'autoreg_vit': __version__, 'toy': False, 'data': 'CIFAR-10'}


def git(folder: Path, *arguments: str) -> str:
    return subprocess.run(['git', '-c', 'user.name=A', '-c', 'user.email=a@b', *arguments], cwd=folder, check=True,
                          capture_output=True, text=True).stdout.strip()


@pytest.fixture
def clone(tmp_path: Path, monkeypatch) -> Path:
    """A clone with a commit, that results can be taken into."""
    root = tmp_path / 'clone'
    (root / 'autoreg_vit/ops/triton').mkdir(parents=True)
    shutil.copy(ROOT / 'setup.py', root)
    shutil.copy(ROOT / 'autoreg_vit/ops/triton/launches.json', root / 'autoreg_vit/ops/triton')
    git(root, 'init', '-q')
    git(root, 'add', '-A')
    git(root, 'commit', '-qm', 'First')
    # Launches go to the table of the package that is imported, and none is compiled here.
    monkeypatch.setattr(tune_attention, 'TABLE', root / 'autoreg_vit/ops/triton/launches.json')
    monkeypatch.setattr(tune_attention, 'refusal', lambda row: None)
    return root


class TestProvenance:
    def test_read_from_a_file_where_there_is_no_clone(self, tmp_path: Path, monkeypatch):
        monkeypatch.setattr(provenance, 'PACKAGE', tmp_path)
        assert provenance.source_commit() is None
        (tmp_path / provenance.SOURCE_COMMIT).write_text('0123456789ab-dirty\n')
        assert provenance.source_commit() == '0123456789ab-dirty'

    def test_a_clone_speaks_for_itself(self, clone: Path, monkeypatch):
        (clone / '__init__.py').touch()
        (clone / provenance.SOURCE_COMMIT).write_text('ffffffffffff\n')
        monkeypatch.setattr(provenance, 'PACKAGE', clone)
        assert provenance.source_commit() == 'ffffffffffff'  # not of this clone yet
        git(clone, 'add', '__init__.py')
        assert provenance.source_commit() == git(clone, 'rev-parse', '--short=12', 'HEAD') + '-dirty'


@pytest.mark.skipif(provenance.source_commit() is None or not (ROOT / '.git').exists(), reason='needs a clone with git')
class TestPack:
    def archive(self, folder: Path, size: int = 0) -> Path:
        (folder / 'train').mkdir(parents=True)
        (folder / 'train/image').write_bytes(os.urandom(size))
        with tarfile.open(folder / 'images.tar', 'w') as tar:
            tar.add(folder / 'train', 'train')
        return folder / 'images.tar'

    def wheels(self, folder: Path) -> Path:
        folder.mkdir()
        for name in ('timm', 'no_such_package'):
            with zipfile.ZipFile(folder / f'{name}-1.0.31-py3-none-any.whl', 'w') as wheel:
                wheel.writestr(f'{name}/__init__.py', 'here = True\n')
                wheel.writestr(f'{name}-1.0.31.dist-info/METADATA', '')
        return folder

    def test_what_travels(self, tmp_path: Path, monkeypatch):
        file = tmp_path / 'pack.tar.gz'
        said = pack.pack(file, self.archive(tmp_path / 'images'), self.wheels(tmp_path / 'wheels'))
        assert provenance.source_commit() in said and 'images.tar' in said
        with tarfile.open(file) as tar:
            tar.extractall(tmp_path / 'there', filter='data')
        there = tmp_path / 'there' / pack.FOLDER
        assert not (there / 'weights').exists() and (there / 'data/images.tar').is_file()
        assert (there / 'benchmarks/gpu/sweeps/randsac-tiny-cifar10.yaml').is_file()
        assert (there / 'autoreg_vit/models/encoders.py').read_text() == (
            ROOT / 'autoreg_vit/models/encoders.py').read_text()
        commit = provenance.source_commit()
        monkeypatch.setattr(provenance, 'PACKAGE', there / 'autoreg_vit')
        assert provenance.source_commit() == commit
        # There: what is not installed is taken from the wheels, what is stays; data are unpacked once.
        monkeypatch.setattr(command, 'WHEELS', there / 'wheels')
        monkeypatch.setattr(command, 'ROOT', there)
        monkeypatch.setattr(sys, 'path', [*sys.path])
        monkeypatch.setenv('PYTHONPATH', '')
        command.use_wheels()
        assert [p.name for p in (there / 'runs/site').iterdir() if 'info' not in p.name] == ['no_such_package']
        assert os.environ['PYTHONPATH'] == str(there / 'runs/site')
        assert (sitting.unpacked(there / 'data', tmp_path) / 'train/image').is_file()

    def test_what_does_not_fit_is_refused(self, tmp_path: Path, monkeypatch):
        file, wheels = tmp_path / 'pack.tar.gz', self.wheels(tmp_path / 'wheels')
        monkeypatch.setattr(pack, 'MOST_MIB', 1)
        with pytest.raises(ConfigError, match=r'would be \d+\.\d MiB; at most 1 MiB'):
            pack.pack(file, self.archive(tmp_path / 'large', 2 << 20), wheels)
        assert list(tmp_path.glob('pack*')) == []
        with pytest.raises(ConfigError, match='no tar archive'):
            pack.pack(file, tmp_path / 'absent.tar', wheels)
        with pytest.raises(ConfigError, match='no wheel of timm'):
            pack.pack(file, None, tmp_path)


class TestTake:
    def results(self, folder: Path, commit: str, **facts) -> Path:
        """What a sitting left: tests, an attention row, a launch and a run."""
        folder.mkdir()
        found = state.State(folder, {**FACTS, 'commit': commit, **facts})
        rows = [{**row, 'timed_on': 'this card'} for row in launches.table()
                if (row['arch'], row['dtype'], row['head_dim']) == (90, 'bfloat16', 64)]
        row = {'case': 'randsac', 'tokens': 64, 'head_dim': 64, 'pass': 'forward+backward', 'name': cards.OURS,
               'layout': 'packed', 'median_us': 292.0, 'floor_us': 288.0}
        inside = {k: found.content[k] for k in ('commit', 'device', 'torch', 'timm')}
        found.update('attention', result={**inside, 'dtype': 'bfloat16', 'rows': [row]}, status='done')
        found.update('tests', outcomes={'a': ['failed', 1.0, 'why']}, counts={'failed': 1}, status='failed')
        found.update('steps', rows=[{'model': 'randsac_vit_base', 'batch_size': 64, 'variant': 'captured',
                                     'images_per_second': 2200.0}], status='done')
        found.update('launches', result={**inside, 'launches': rows, 'timings': []}, status='done')
        run = folder.parent / 'run'
        write_finished_run(run)
        found.update('run', archive=pretraining.archive(run, folder, 'randsac-tiny-cifar10-2ep'), status='done')
        return folder

    def test_everything_goes_where_it_belongs_and_twice_does_no_harm(self, clone: Path, tmp_path: Path):
        folder = self.results(tmp_path / 'back', git(clone, 'rev-parse', '--short=12', 'HEAD'))
        git(clone, 'commit', '-qm', 'Later', '--allow-empty')
        said = take.take(folder, clone)
        results = clone / 'benchmarks/results'
        name = 'nvidia-h100-80gb-hbm3'
        assert {p.name for p in results.iterdir()} == {
            f'gpu-{name}.json', f'attention-{name}.json', f'attention-{name}.png', f'steps-{name}.json',
            f'tune_attention-{name}.json'}
        facts = json.loads((results / f'gpu-{name}.json').read_text())
        assert facts['parts']['tests']['failures'] == {'a': 'why'}
        assert next(g for g in facts['goals'] if g['goal'].startswith('64'))['met'] is True
        table = json.loads((clone / 'autoreg_vit/ops/triton/launches.json').read_text())['launches']
        timed = [row for row in table if row['timed_on'] == 'this card']
        assert timed and all(launches.kind_of(row)[1:] == (90, 'bfloat16', 64) for row in timed)
        assert {launches.kind_of(row) for row in table} == {launches.kind_of(row) for row in launches.table()}
        run = clone / 'runs/randsac-tiny-cifar10-2ep'
        assert sha256_of(run / 'encoder/model.safetensors') == sha256_of(tmp_path / 'run/encoder/model.safetensors')
        assert not (run / 'last.pt').exists() and 'export runs/randsac-tiny-cifar10-2ep' in '\n'.join(said)
        weights = clone / 'runs/randsac-tiny-cifar10-2ep-weights/vit_tiny_patch4_32_randsac.cifar10_2ep'
        assert 'CIFAR-10' in (weights / 'README.md').read_text() and (weights / 'model.safetensors').is_file()
        stamps = {p: p.stat().st_mtime_ns for p in clone.rglob('*') if p.is_file() and '.git' not in p.parts}
        assert '\n'.join(take.take(folder, clone)).count('there already') == 7
        assert stamps == {p: p.stat().st_mtime_ns for p in clone.rglob('*') if p.is_file() and '.git' not in p.parts}

    @pytest.mark.parametrize('what, message', [
        ('unknown', 'does not have'), ('branch', 'neither HEAD nor an ancestor'), ('none', 'name no commit'),
        ('torch', 'torch 2.9.0; supported is 2.11'), ('package', 'check out the version'), ('piece', 'damaged'),
        ('newer', 'nothing is taken'), ('run', 'another run'), ('row', 'does not fit the table')])
    def test_what_does_not_fit_is_refused(self, clone: Path, tmp_path: Path, what: str, message: str):
        commit, facts = git(clone, 'rev-parse', '--short=12', 'HEAD'), {}
        if what == 'branch':
            git(clone, 'checkout', '-qb', 'other')
            git(clone, 'commit', '-qm', 'Aside', '--allow-empty')
            commit = git(clone, 'rev-parse', '--short=12', 'HEAD')
            git(clone, 'checkout', '-q', '-')
        commit = {'unknown': 'f' * 12, 'none': None}.get(what, commit)
        facts |= {'torch': {'torch': '2.9.0'}, 'package': {'autoreg_vit': '9.9'}}.get(what, {})
        folder = self.results(tmp_path / 'back', commit, **facts)
        if what == 'piece':
            (folder / 'run.tar.0').write_bytes(b'short')
        if what == 'row':
            content = state.State(folder, {**FACTS, 'commit': commit})
            del content.part('launches')['result']['launches'][0]['design']
            content.save()
        if what == 'newer':
            git(clone, 'commit', '-qm', 'Later', '--allow-empty')
            path = clone / 'benchmarks/results/steps-nvidia-h100-80gb-hbm3.json'
            path.parent.mkdir(parents=True)
            path.write_text(json.dumps({'commit': git(clone, 'rev-parse', '--short=12', 'HEAD')}))
        if what == 'run':
            (clone / 'runs/randsac-tiny-cifar10-2ep').mkdir(parents=True)
        before = {p for p in clone.rglob('*') if '.git' not in p.parts}
        with pytest.raises(ConfigError, match=message):
            take.take(folder, clone)
        assert before == {p for p in clone.rglob('*') if '.git' not in p.parts}

    def test_uncommitted_changes_are_said(self, clone: Path, tmp_path: Path):
        folder = self.results(tmp_path / 'back', git(clone, 'rev-parse', '--short=12', 'HEAD') + '-dirty')
        assert 'uncommitted changes' in take.take(folder, clone)[0]

    def test_a_large_run_is_cut_into_pieces_that_travel(self, tmp_path: Path, monkeypatch):
        write_finished_run(tmp_path / 'run')
        (tmp_path / 'run/figures').mkdir()
        (tmp_path / 'run/figures/noise').write_bytes(os.urandom(5 << 20))
        (tmp_path / 'out').mkdir()
        monkeypatch.setattr(pretraining, 'MOST_FILE_MIB', 2)
        found = pretraining.archive(tmp_path / 'run', tmp_path / 'out', 'name')
        assert sorted(found['pieces']) == [f'run.tar.{n}' for n in range(3)]
        monkeypatch.setattr(pretraining, 'MOST_FILES', 3)
        assert pretraining.archive(tmp_path / 'run', tmp_path / 'out', 'name')['left_at'] == str(tmp_path / 'run')


def write_finished_run(folder: Path) -> None:
    model = write_run(folder)
    spec = json.loads((folder / 'pretrain/config.json').read_text())['pretrained_cfg']
    export_encoder(model.encoder, folder / 'encoder', mean=spec['mean'], std=spec['std'])
    (folder / 'last.pt').write_bytes(os.urandom(1000))
