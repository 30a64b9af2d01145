"""Weights that come with the package: every folder of weights/ is whole, says what is true, and gives what was
recorded; damage is an error that names the file and the remedy."""

import dataclasses
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch

pytest.importorskip('sklearn')

import yaml
from safetensors import safe_open
from safetensors.torch import load_file
from timm.models import DefaultCfg
from torch import nn

from autoreg_vit.artifacts import SUMS, sha256_of, verify_checksum, write_sums
from autoreg_vit.commands.cli import main
from autoreg_vit.engine.log import read_log
from autoreg_vit.errors import CheckpointError, ModelError
from autoreg_vit.hub.golden import deviation, golden_images, record
from autoreg_vit.models import pretrained
from tests.support.exporting import ENCODER, MODEL, write_weights

REPOSITORY = Path(__file__).parents[2]
# But for those that lie on the Hub, which tests do not ask.
SHIPPED = {name: folder for name, folder in pretrained.shipped_weights().items()
           if not pretrained.hub_repository(folder)}


@pytest.fixture(scope='module')
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp('weights')
    return write_weights(root, root / 'run')


def check_sums(folder: Path) -> None:
    """Every file has its line, and matches it."""
    listed = dict(reversed(line.split('  ')) for line in (folder / SUMS).read_text().splitlines())
    assert listed.keys() == {path.name for path in folder.iterdir()} - {SUMS}
    assert listed.keys() == {'README.md', 'config.json', 'config.yaml', 'golden.json', 'log.jsonl', 'model.safetensors'}
    for name, digest in listed.items():
        assert sha256_of(folder / name) == digest, name
        verify_checksum(folder / name)


def check_card(folder: Path, licence: str | None = None) -> None:
    """The card's header is what the Hub reads, and its numbers are those of the files beside it."""
    _, header, body = (folder / 'README.md').read_text(encoding='utf-8').split('---\n', 2)
    header = yaml.safe_load(header)
    assert header['library_name'] == 'timm' and header.get('license') == licence
    assert json.loads((folder / 'config.json').read_text())['pretrained_cfg'].get('license') == licence
    assert f'These weights: {licence}.' in body if licence else 'None is stated for these weights.' in body
    assert header['pipeline_tag'] == 'image-feature-extraction' and 'timm' in header['tags']
    assert body.strip().startswith(f'# {folder.name}\n')

    for name in ('config.json', 'model.safetensors'):
        assert f'| `{name}` | `{sha256_of(folder / name)}` |' in body
    log = read_log(folder / 'log.jsonl')
    for line in log:
        if line['event'] == 'evaluation':
            assert f'| {line["images"]:,} | {line["linear"]:.1f} % | {line["knn"]:.1f} % |' in body
    losses = [line['loss'] for line in log if line['event'] in ('step', 'epoch')]
    for rise in re.findall(r'rise on the way was from ([\d.]+) \(epoch ([\d.]+), .*?\) to ([\d.]+) \(epoch', body):
        lines = {f'{line["epoch"]:g}': line['loss'] for line in log if line['event'] in ('step', 'epoch')}
        assert f'{lines[rise[1]]:.4f}' == rise[0] and float(rise[2]) > 1.01 * float(rise[0])
    assert f'{losses[0]:.4f} in the first' in body and f'{losses[-1]:.4f} in the last' in body
    assert re.search(r'commit [0-9a-f]{7,}', body)
    assert f'autoreg-vit {log[0]["version"]}' in body and f'torch {log[0]["torch"]}' in body

    settings = yaml.safe_load((folder / 'config.yaml').read_text())
    assert settings['data_dir'] is None and settings['output_dir'] is None
    assert f'--model {settings["model"]}' in body or settings['model'] == MODEL
    assert f'--epochs {settings["epochs"]}' in body and f'--batch-size {settings["batch_size"]}' in body

    with safe_open(folder / 'model.safetensors', 'pt') as file:
        tensors = [file.get_slice(name) for name in file.keys()]  # noqa: SIM118  it is no mapping
    assert {tensor.get_dtype() for tensor in tensors} == {'F16' if 'stored as float16' in body else 'F32'}
    millions = sum(torch.Size(tensor.get_shape()).numel() for tensor in tensors) / 1e6
    assert float(re.search(r'of ([\d.]+) million parameters', body)[1]) == pytest.approx(millions, abs=0.006)


def check_outputs(folder: Path, model: nn.Module) -> None:
    """The recorded outputs come out, in float32."""
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    golden = json.loads((folder / 'golden.json').read_text())['outputs']
    assert deviation(record(model), golden) < 1e-4


@pytest.mark.parametrize('name', SHIPPED)
class TestShipped:
    def test_files(self, name: str):
        check_sums(SHIPPED[name])

    def test_card(self, name: str):
        check_card(SHIPPED[name], 'apache-2.0')

    def test_outputs_by_name(self, name: str):
        check_outputs(SHIPPED[name], timm.create_model(name, pretrained=True))

    def test_outputs_by_folder(self, name: str):
        check_outputs(SHIPPED[name], pretrained.load_folder(SHIPPED[name]))

    def test_registered(self, name: str):
        assert name in timm.list_models(pretrained=True)
        assert Path(timm.models.get_pretrained_cfg(name).file).parent == SHIPPED[name]


class TestDefaults:
    @pytest.mark.parametrize(('method', 'tag'), [('randsac', 'cifar10_280ep'), ('saim', 'cifar10_210ep')])
    def test_bare_names_mean_the_longest_runs(self, method: str, tag: str):
        for name in (f'vit_tiny_patch4_32_{method}', f'{method}_vit_tiny_patch4_32'):
            assert timm.models.get_pretrained_cfg(name).tag == tag
            assert f'{name}.{tag}' in SHIPPED and f'{name}.{tag}' in timm.list_pretrained(f'*{method}*')
            assert timm.models.get_pretrained_cfg(name).license == 'apache-2.0'

    @pytest.mark.parametrize('name', [name for name in SHIPPED if name.startswith('vit_')])
    def test_an_encoder_is_that_of_its_model(self, name: str):
        size, method, tag = re.fullmatch(r'(\w+)_([a-z]+)\.(\w+)', name).groups()
        records = [json.loads((SHIPPED[n] / 'golden.json').read_text())['outputs']['features']
                   for n in (name, f'{method}_{size}.{tag}')]
        assert records[0] == records[1]

    def test_they_fit_a_wheel(self):
        """PyPI takes files of up to 100 MB. Above it, weights move to the Hub, as hub/README.md says."""
        root = REPOSITORY / 'weights'
        assert sum(path.stat().st_size for path in root.rglob('*') if path.is_file()) < 100e6


class TestMadeHere:
    @pytest.mark.parametrize('part', [0, 1])
    def test_as_shipped_ones(self, folders: tuple[Path, Path], part: int):
        check_sums(folders[part])
        check_card(folders[part])
        check_outputs(folders[part], pretrained.load_folder(folders[part]))

    def test_licence_is_the_one_given(self, folders: tuple[Path, Path], tmp_path: Path):
        run = folders[0].parent / 'run'
        assert main(['export', str(run), str(tmp_path), '--tag', 'a', '--license', 'cc-by-4.0', '--no-pretrain']) == 0
        check_card(tmp_path / f'{ENCODER}.a', 'cc-by-4.0')

    def test_recorded_outputs_notice_other_weights(self, folders: tuple[Path, Path]):
        for folder, perturbed in zip(folders, ('patch_embed.proj.weight', 'decoder.blocks.0.mlp.fc2.bias')):
            model = pretrained.load_folder(folder)
            golden = json.loads((folder / 'golden.json').read_text())['outputs']
            with torch.no_grad():
                model.get_parameter(perturbed).view(-1)[0] += 0.5
            assert deviation(record(model), golden) > 1e-4

    def test_images_are_those_of_the_formula(self):
        images = golden_images(3, (4, 6))
        assert images.shape == (2, 3, 4, 6)
        assert images[1, 2, 3, 5].item() == pytest.approx(torch.tensor(0.7 * 143, dtype=torch.float64).sin().item())


def damage(folder: Path, kind: str) -> str:
    """Damage a folder of weights; returns the name of the file that is to be named."""
    weights, config = folder / 'model.safetensors', folder / 'config.json'
    data = bytearray(weights.read_bytes())
    if kind == 'gone':
        weights.unlink()
    elif kind == 'cut':
        weights.write_bytes(data[:len(data) // 2])
    elif kind == 'flip':
        data[-1] ^= 1
        weights.write_bytes(data)
    elif kind == 'config':
        config.write_text(config.read_text().replace('"norm_pix": false', '"norm_pix": true').replace('0.1', '0.7'))
    elif kind == 'config gone':
        config.unlink()
    return 'config.json' if 'config' in kind else 'model.safetensors'


@pytest.mark.parametrize('kind', ['gone', 'cut', 'flip', 'config', 'config gone'])
class TestDamage:
    def test_of_an_encoder(self, kind: str, folders: tuple[Path, Path], tmp_path: Path):
        folder = Path(shutil.copytree(folders[0], tmp_path / 'encoder'))
        file = damage(folder, kind)
        with pytest.raises(CheckpointError, match=re.escape(str(folder / file))) as error:
            timm.create_model(ENCODER, embed_dim=32, depth=2, num_heads=2, pretrained=True,
                              pretrained_cfg_overlay={'file': str(folder / 'model.safetensors')})
        assert 'Get a whole copy of it.' in str(error.value)

    def test_of_a_pretraining_model(self, kind: str, folders: tuple[Path, Path], tmp_path: Path):
        if kind == 'config gone':
            pytest.skip('timm itself finds no config.json to read the architecture from')
        folder = Path(shutil.copytree(folders[1], tmp_path / 'pretrain'))
        file = damage(folder, kind)
        with pytest.raises(CheckpointError, match=re.escape(str(folder / file))):
            timm.create_model(f'local-dir:{folder}', pretrained=True)

    def test_of_shipped_ones_names_the_remedy(
            self, kind: str, folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(pretrained, 'ROOTS', (tmp_path / 'weights',))
        folder = Path(shutil.copytree(folders[0], tmp_path / 'weights' / folders[0].name))
        pretrained.check_files(folder)
        if kind != 'config gone':  # without it the folder is none of weights
            damage(folder, kind)
            with pytest.raises(CheckpointError, match='pip install --force-reinstall autoreg-vit'):
                pretrained.check_files(folder / 'model.safetensors')
            (tmp_path / '.git').mkdir()
            with pytest.raises(CheckpointError, match=rf'git checkout -- weights/{re.escape(folder.name)}'):
                pretrained.check_files(folder / 'model.safetensors')


def test_without_checksums_is_an_error_of_shipped_weights_alone(
        folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = Path(shutil.copytree(folders[0], tmp_path / 'weights' / folders[0].name))
    (folder / SUMS).unlink()
    pretrained.check_files(folder)
    monkeypatch.setattr(pretrained, 'ROOTS', (tmp_path / 'weights',))
    with pytest.raises(CheckpointError, match=SUMS):
        pretrained.check_files(folder)


@pytest.fixture
def on_hub(folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of weights/ whose weights were moved to the Hub, as hub/README.md says."""
    monkeypatch.setattr(pretrained, 'ROOTS', (tmp_path / 'weights',))
    folder = Path(shutil.copytree(folders[1], tmp_path / 'weights' / folders[1].name))
    monkeypatch.setattr('timm.models._builder.load_state_dict_from_hf',
                        lambda name, **options: {'owner/name': load_file(folders[1] / 'model.safetensors')}[name])
    (folder / 'model.safetensors').unlink()
    config = json.loads((folder / 'config.json').read_text())
    config['pretrained_cfg']['hf_hub_id'] = 'owner/name'
    (folder / 'config.json').write_text(json.dumps(config))
    write_sums(folder)
    return folder


def create_from(folder: Path) -> nn.Module:
    """The model of a folder of weights/, by the configuration that timm's registry has of it."""
    tag = folder.name.partition('.')[2]
    cfg = pretrained.register_weights({MODEL: {'num_classes': 0}})[MODEL].cfgs[tag]
    return timm.create_model(MODEL, pretrained=True, pretrained_cfg=dataclasses.replace(cfg, tag=tag))


def test_weights_on_the_hub_load_by_name_with_what_they_were_trained_with(on_hub: Path):
    model = create_from(on_hub)
    assert model.target.norm_pix is False and model.encoder.embed_dim == 32
    check_outputs(on_hub, model)


def test_damage_beside_weights_on_the_hub_is_refused(on_hub: Path):
    config = on_hub / 'config.json'
    config.write_text(config.read_text().replace('"norm_pix": false', '"norm_pix": true'))
    with pytest.raises(CheckpointError, match=re.escape(f'{config} does not match its checksum in SHA256SUMS')):
        create_from(on_hub)


@pytest.mark.parametrize('content', ['', '[]', '{"pretrained_cfg": 3}', '{"pretrained_cfg": {"mean": [0.5]}, "a": 1}'])
def test_damage_does_not_keep_the_package_from_importing(
        content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(pretrained, 'ROOTS', (tmp_path / 'weights',))
    folder = tmp_path / 'weights' / f'{ENCODER}.test'
    folder.mkdir(parents=True)
    (folder / 'config.json').write_text(content)
    (tmp_path / 'weights' / 'no_such_model.test').mkdir()
    cfgs = pretrained.register_weights({ENCODER: {'num_classes': 0}})[ENCODER]
    assert list(cfgs.tags) == ['test', 'untrained']
    assert cfgs.default.file == str(folder / 'model.safetensors')


class TestDefaultTag:
    """Of several tags, the bare name means the one that declares itself, not the one that sorts first."""

    @pytest.fixture
    def root(self, folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        """weights/ with the tags a, b and c of one encoder; b's mean is 0.25."""
        monkeypatch.setattr(pretrained, 'ROOTS', (tmp_path / 'weights',))
        for tag in 'abc':
            shutil.copytree(folders[0], tmp_path / 'weights' / f'{ENCODER}.{tag}')
        self.edit(tmp_path / 'weights' / f'{ENCODER}.b', lambda c: c['pretrained_cfg'].update(mean=[0.25] * 3))
        return tmp_path / 'weights'

    def edit(self, folder: Path, change: Callable[[dict], object]) -> None:
        content = json.loads((folder / 'config.json').read_text())
        change(content)
        (folder / 'config.json').write_text(json.dumps(content))
        write_sums(folder)

    def declare(self, root: Path, *tags: str) -> None:
        for tag in tags:
            self.edit(root / f'{ENCODER}.{tag}', lambda c: c.update(default_tag=True))

    def register(self) -> DefaultCfg:
        return pretrained.register_weights({ENCODER: {'num_classes': 0, 'mean': (0.5,) * 3}})[ENCODER]

    def options(self, cfgs: DefaultCfg, monkeypatch: pytest.MonkeyPatch, **options) -> dict:
        monkeypatch.setattr(pretrained, 'resolve_pretrained_cfg', lambda name, source, overlay: dataclasses.replace(
            cfgs.cfgs[source or cfgs.tags[0]], tag=source or cfgs.tags[0]))
        return pretrained.weights_options(ENCODER, cfgs, True, options)

    def test_declared(self, root: Path, monkeypatch: pytest.MonkeyPatch):
        self.declare(root, 'b')
        cfgs = self.register()
        assert pretrained.default_tags(ENCODER) == ['b'] and cfgs.tags[0] == 'b'
        assert cfgs.default.mean == (0.25,) * 3 and sorted(cfgs.tags) == ['a', 'b', 'c', 'untrained']
        assert self.options(cfgs, monkeypatch)['embed_dim'] == 32

    @pytest.mark.parametrize(('declared', 'message'), [
        ('', "has the weights a, b, c, and none of them is its default: name one, as in '{0}.a'"),
        ('ac', "and weights/{0}.a and weights/{0}.c all declare themselves its default: name one, as in '{0}.a'")])
    def test_none_or_several_are_an_error(
            self, root: Path, monkeypatch: pytest.MonkeyPatch, declared: str, message: str):
        self.declare(root, *declared)
        cfgs = self.register()
        assert cfgs.tags[0] == 'untrained' and cfgs.default.mean == (0.5,) * 3
        with pytest.raises(ModelError, match=re.escape(message.format(ENCODER))):
            self.options(cfgs, monkeypatch)
        assert self.options(cfgs, monkeypatch, pretrained_cfg='b')['embed_dim'] == 32

    def test_of_one_tag_is_that(self, root: Path):
        for tag in 'ac':
            shutil.rmtree(root / f'{ENCODER}.{tag}')
        assert self.register().tags[0] == 'b'

    def test_export_declares_it(self, folders: tuple[Path, Path], tmp_path: Path):
        run = folders[0].parent / 'run'
        assert main(['export', str(run), str(tmp_path), '--tag', 'a', '--default-tag']) == 0
        for name, other in zip((ENCODER, MODEL), folders):
            assert json.loads((tmp_path / f'{name}.a' / 'config.json').read_text())['default_tag'] is True
            assert 'default_tag' not in json.loads((other / 'config.json').read_text())
            check_sums(tmp_path / f'{name}.a')
            check_card(tmp_path / f'{name}.a')


@pytest.mark.parametrize('name', [ENCODER, MODEL])
def test_unknown_tags_name_their_neighbours(name: str):
    with pytest.raises(ModelError, match=f"'{name}' has no tag 'untraned'. Did you mean 'untrained'"):
        timm.create_model(f'{name}.untraned')
