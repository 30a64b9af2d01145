"""The doors that weights come in by: timm by name and tag, from a clone and from a wheel; torch.hub; timm without this
package; transformers. Each gives the outputs that were recorded when the weights were written."""

import json
import re
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest
import timm
import torch

pytest.importorskip('sklearn')

from autoreg_vit.hub.golden import golden_images
from tests.support.bare import run_bare
from tests.support.exporting import ENCODER, MODEL, write_weights

REPOSITORY = Path(__file__).parents[2]


def numbers(text: str) -> tuple[int, ...]:
    """A version as numbers."""
    return tuple(map(int, re.findall(r'\d+', text)[:3]))


@pytest.fixture(scope='module')
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clone of the repository whose weights/ holds small weights with the tag `test`."""
    folder = tmp_path_factory.mktemp('clone') / 'autoreg-vit'
    shutil.copytree(REPOSITORY / 'autoreg_vit', folder / 'autoreg_vit', ignore=shutil.ignore_patterns('__pycache__'))
    for name in ('hubconf.py', 'setup.py', 'pyproject.toml', 'README.md', 'LICENSE'):
        shutil.copy(REPOSITORY / name, folder)
    (folder / 'weights').mkdir()
    write_weights(folder / 'weights', folder.parent / 'run')
    return folder


@pytest.fixture(scope='module')
def golden(clone: Path) -> dict[str, torch.Tensor]:
    """Recorded outputs: `features` of the encoder, and `loss` and `pred` of the whole model."""
    outputs = json.loads((clone / 'weights' / f'{MODEL}.test' / 'golden.json').read_text())['outputs']
    return {name: torch.tensor(value) for name, value in outputs.items()}


def run_python(script: str, *arguments: object, path: Path | str = '/', **environment: str) -> dict:
    """Run a script outside the repository, with `path` on the path; it prints a JSON object as its last line."""
    run = run_bare(script, *arguments, path=path, folder='/', **environment)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


IMAGES = '''
import json, sys, torch
images = torch.arange(2 * 3 * 32 * 32, dtype=torch.float64).mul(0.7).sin().float().view(2, 3, 32, 32)
'''
BY_NAME = IMAGES + '''
import timm, autoreg_vit
ENCODER, MODEL, results = sys.argv[1], sys.argv[2], {}
results['package'] = autoreg_vit.__file__
results['listed'] = timm.list_models('*randsac*', pretrained=True)
results['file'] = timm.models.get_pretrained_cfg(ENCODER).file
results['mean'] = timm.models.get_pretrained_cfg(ENCODER + '.test').mean
ranks = torch.arange(64).expand(2, -1)
with torch.no_grad():
    for name in (ENCODER, ENCODER + '.test'):
        results[name] = timm.create_model(name, pretrained=True).eval()(images).tolist()
    for name in (MODEL, MODEL + '.test'):
        model = timm.create_model(name, pretrained=True).eval()
        output = model(images, ranks)
        results[name] = {'features': model.encoder(images).tolist(), 'loss': output.loss.item(),
                         'pred': output.pred[0, -1].tolist()}
'''
PRINT = 'print(json.dumps(results))'
CLONE = BY_NAME + '''
def error(make):
    try:
        make()
    except Exception as error:
        return [type(error).__name__, str(error)]

plain = timm.create_model(ENCODER, pretrained=True)
grey = timm.create_model(ENCODER, pretrained=True, in_chans=1, num_classes=5)
results['grey'] = list(grey(images[:, :1]).shape)
# timm adapts in the dtype of the file
grey_weights, weights = grey.patch_embed.proj.weight[:, 0], plain.patch_embed.proj.weight
results['grey weights'] = torch.allclose(grey_weights, weights.sum(1), rtol=1e-3, atol=1e-3)
results['grey norm'] = torch.equal(grey.norm.weight, plain.norm.weight)
large = timm.create_model(ENCODER, pretrained=True, img_size=(64, 48))
results['large'] = list(large.forward_features(torch.randn(1, 3, 64, 48)).shape)
same = plain.pos_embed.unflatten(1, (8, 8)).mean((1, 2)) - large.pos_embed.unflatten(1, (16, 12)).mean((1, 2))
results['large positions'] = same.abs().max().item()
model = timm.create_model(MODEL, pretrained=True, img_size=48)
results['model large'] = list(model(torch.randn(1, 3, 48, 48)).pred.shape)
pyramid = timm.create_model(ENCODER, pretrained=True, features_only=True, out_indices=[0, 1])
results['pyramid'] = [list(f.shape) for f in pyramid(images)]
results['untrained'] = timm.create_model(ENCODER).embed_dim
results['norm_pix'] = [timm.create_model(MODEL, pretrained=True).target.norm_pix,
                       timm.create_model(MODEL).target.norm_pix]
results['near tag'] = error(lambda: timm.create_model(ENCODER + '.tset', pretrained=True))
results['grey model'] = error(lambda: timm.create_model(MODEL, pretrained=True, in_chans=1))
results['no weights'] = error(lambda: timm.create_model('vit_base_randsac', pretrained=True))
'''
OUTSIDE = IMAGES + '''
import timm
clone, name = sys.argv[1:]
results = {}
with torch.no_grad():
    sys.modules['autoreg_vit'] = None  # importing it fails
    try:
        alone = timm.create_model(f'local-dir:{clone}/weights/{name}.test', pretrained=True).eval()
        results.update(alone=alone(images).tolist(), dtype=str(alone.norm.weight.dtype), kind=type(alone).__module__)
    except Exception as error:
        results['alone'] = repr(error)

    del sys.modules['autoreg_vit']
    hub = 'owner/autoreg-vit:main'
    encoder = torch.hub.load(clone, name, pretrained=True, source='local').eval()
    same = torch.hub.load(hub, name, pretrained=True, pretrained_cfg='test', trust_repo=True).eval()
    results.update(local=encoder(images).tolist(), cached=same(images).tolist(),
                   package=sys.modules['autoreg_vit'].__file__,
                   list=torch.hub.list(hub, trust_repo=True), help=torch.hub.help(hub, name, trust_repo=True))
'''


def assert_outputs(results: dict, golden: dict[str, torch.Tensor]) -> None:
    for name in (ENCODER, f'{ENCODER}.test'):
        torch.testing.assert_close(torch.tensor(results[name]), golden['features'], rtol=1e-4, atol=1e-4)
    for name in (MODEL, f'{MODEL}.test'):
        for entry, expected in golden.items():
            torch.testing.assert_close(torch.tensor(results[name][entry]), expected, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope='module')
def in_clone(clone: Path) -> dict:
    return run_python(CLONE + PRINT, ENCODER, MODEL, path=clone)


@pytest.fixture(scope='module')
def outside(clone: Path, tmp_path_factory: pytest.TempPathFactory) -> dict:
    """Where the package is not installed; in torch.hub's cache, the clone is what was downloaded."""
    cache = tmp_path_factory.mktemp('torch') / 'hub'
    cache.mkdir()
    (cache / 'owner_autoreg-vit_main').symlink_to(clone)
    return run_python(OUTSIDE + PRINT, clone, ENCODER, TORCH_HOME=str(cache.parent))


class TestClone:
    def test_outputs(self, in_clone: dict, clone: Path, golden: dict):
        assert Path(in_clone['package']).is_relative_to(clone)
        assert_outputs(in_clone, golden)

    def test_registry(self, in_clone: dict, clone: Path):
        assert in_clone['listed'] == [f'{MODEL}.test', f'{ENCODER}.test']
        assert in_clone['file'] == str(clone / 'weights' / f'{ENCODER}.test' / 'model.safetensors')
        assert in_clone['mean'] == [0.1, 0.2, 0.3]

    def test_a_tag_brings_what_no_tensor_shows(self, in_clone: dict):
        assert in_clone['norm_pix'] == [False, True]
        assert in_clone['untrained'] == 192

    def test_adaptation(self, in_clone: dict):
        assert in_clone['grey'] == [2, 5] and in_clone['grey weights'] and in_clone['grey norm']
        assert in_clone['large'] == [1, 192, 32] and in_clone['large positions'] < 0.05
        assert in_clone['model large'] == [1, 144, 48]
        assert in_clone['pyramid'] == [[2, 32, 8, 8]] * 2

    def test_errors(self, in_clone: dict):
        assert in_clone['near tag'] == ['ModelError', f"'{ENCODER}' has no tag 'tset'. Did you mean 'test'?"]
        kind, message = in_clone['grey model']
        assert kind == 'CheckpointError' and 'in_chans' in message
        kind, message = in_clone['no weights']
        assert kind == 'CheckpointError' and message.startswith("'vit_base_randsac' has no trained weights")
        assert f'unlike {ENCODER}.test. Take instead' in message and MODEL not in message


class TestOutside:
    def test_timm_alone(self, outside: dict, golden: dict):
        torch.testing.assert_close(torch.tensor(outside['alone']), golden['features'], rtol=1e-4, atol=1e-4)
        assert outside['dtype'] == 'torch.float32' and outside['kind'] == 'timm.models.vision_transformer'

    def test_torch_hub(self, outside: dict, clone: Path, golden: dict):
        assert Path(outside['package']).is_relative_to(clone)
        for door in ('local', 'cached'):
            torch.testing.assert_close(torch.tensor(outside[door]), golden['features'], rtol=1e-4, atol=1e-4)

    def test_torch_hub_names_every_model(self, outside: dict):
        ours = [name for name in timm.list_models()
                if timm.models.model_entrypoint(name).__module__.startswith('autoreg_vit.')]
        assert outside['list'] == sorted(ours) and ENCODER in ours and MODEL in ours
        assert 'ViT-Ti/4 at 32, RandSAC' in outside['help'] and 'Tags: test.' in outside['help']


@pytest.mark.skipif(numbers(version('setuptools')) < (77,), reason='the build needs setuptools 77')
def test_wheel(clone: Path, golden: dict, tmp_path: Path):
    """Built from a copy, so that what the build leaves is not taken for the clone's."""
    source = shutil.copytree(clone, tmp_path / 'source')
    subprocess.run([sys.executable, '-m', 'pip', 'wheel', '--quiet', '--no-build-isolation', '--no-deps', '--no-index',
                    '--wheel-dir', tmp_path, source], check=True, timeout=300)
    shutil.rmtree(source)
    with zipfile.ZipFile(next(tmp_path.glob('*.whl'))) as wheel:
        wheel.extractall(tmp_path / 'site')

    results = run_python(BY_NAME + PRINT, ENCODER, MODEL, path=tmp_path / 'site')

    folder = tmp_path / 'site' / 'autoreg_vit' / 'weights' / f'{ENCODER}.test'
    assert results['file'] == str(folder / 'model.safetensors')
    shipped, cloned = ({p.name: p.read_bytes() for p in f.iterdir()} for f in (folder, clone / 'weights' / folder.name))
    assert shipped == cloned
    assert_outputs(results, golden)


def test_transformers(clone: Path, golden: dict):
    transformers = pytest.importorskip('transformers', reason='a door of its own, of the extra dev')
    folder = clone / 'weights' / f'{ENCODER}.test'
    images = golden_images(3, (32, 32))

    model = transformers.AutoModel.from_pretrained(folder).eval()
    with torch.no_grad():
        output = model(pixel_values=images)
    assert model.dtype == torch.float32  # whatever weights are stored in
    torch.testing.assert_close(output.pooler_output, golden['features'], rtol=1e-4, atol=1e-4)
    assert output.last_hidden_state.shape == (2, 64, 32)

    classifier = transformers.AutoModelForImageClassification.from_pretrained(folder, num_labels=5)
    assert classifier(pixel_values=images).logits.shape == (2, 5)
    torch.testing.assert_close(classifier.timm_model.norm.weight, model.timm_model.norm.weight)

    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    assert tuple(processor.data_config['mean']) == (0.1, 0.2, 0.3)
