"""`autoreg-vit show`: what its pictures are drawn from, the files it writes, and its errors."""

import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as nps
from PIL import Image

import autoreg_vit.commands
from autoreg_vit.commands import showing as show
from autoreg_vit.commands.cli import main
from autoreg_vit.data.transforms import ImageSpec
from autoreg_vit.errors import ModelError
from autoreg_vit.figures import attention_maps, panels, pictures, plots
from autoreg_vit.hub.folders import export_encoder, export_pretraining
from autoreg_vit.models.targets import patchify, unpatchify

SMALL = dict(patch_size=2, embed_dim=32, depth=3, num_heads=2)
#: RandSAC for digits, SAIM on images that are not square, ViT-iGPT, and AIM's given prefix.
MODELS = {
    'randsac': ('randsac_vit_tiny_patch4_32', dict(img_size=8, in_chans=1, segments=(5, 3), decoder_depth=2)),
    'saim': ('saim_vit_tiny_patch4_32', dict(img_size=(8, 12), in_chans=3)),
    'igpt': ('saim_vit_tiny_patch4_32', dict(
        img_size=8, serialization='raster', decoder='none', first_segment='self', blur=False, norm_pix=False)),
    'aim': ('randsac_vit_tiny_patch4_32', dict(
        img_size=8, serialization='prefix_raster', decoder='none', first_segment='given')),
}


def make(kind: str, randomise) -> torch.nn.Module:
    name, options = MODELS[kind]
    return randomise(timm.create_model(name, **SMALL, **options), std=0.1).eval()


def write_run(model: torch.nn.Module, folder: Path) -> Path:
    """A run's folder as pretraining leaves it."""
    spec = ImageSpec.of(model)
    export_encoder(model.encoder, folder / 'encoder', mean=spec.mean, std=spec.std)
    export_pretraining(model, folder / 'pretrain', mean=spec.mean, std=spec.std)
    return folder


def write_images(folder: Path, count: int, size: tuple[int, int] = (20, 30)) -> Path:
    """A folder of `count` image files of size (height, width)."""
    folder.mkdir(exist_ok=True)
    for number in range(count):
        pixels = np.random.default_rng(number).integers(0, 256, (*size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f'{number}.png')
    return folder


def images_of(model: torch.nn.Module, batch: int = 3) -> torch.Tensor:
    spec = ImageSpec.of(model)
    return torch.randn(batch, spec.channels, *spec.size)


class TestReconstruction:
    @pytest.mark.parametrize('kind', MODELS)
    def test_a_step_is_the_truth_so_far_and_one_prediction(self, kind, randomise):
        model = make(kind, randomise)
        images = images_of(model)
        done = pictures.reconstruct(model, images)
        with torch.no_grad():
            out = model(images, done.ranks)
        truth, target = patchify(images, (2, 2)), model.target.pixels(images)
        pred = out.pred
        if model.target.norm_pix:
            pred = pred * (target.var(-1, keepdim=True) + 1e-6).sqrt() + target.mean(-1, keepdim=True)
        for image in range(3):
            for number in range(done.first, done.counts[image]):
                step, so_far = done.step(image, number), done.predicted(image, number)
                for token, rank in enumerate(done.ranks[image].tolist()):
                    if rank > number:
                        assert step[token].isnan().all() and so_far[token].isnan().all()
                        continue
                    torch.testing.assert_close(step[token], (truth if rank < number else pred)[image, token])
                    torch.testing.assert_close(so_far[token], pred[image, token])

    @pytest.mark.parametrize('kind', ['randsac', 'igpt', 'aim'])  # SAIM's blur carries pixels into their neighbours
    def test_a_step_knows_nothing_of_later_pixels(self, kind, randomise):
        model = make(kind, randomise)
        images = images_of(model, 1)
        before = pictures.reconstruct(model, images)
        for number in range(before.first, before.counts[0]):
            later = before.ranks[0, :, None] > number
            changed = torch.where(later, 7 * torch.randn_like(before.truth[0]), before.truth[0])
            changed = unpatchify(changed[None], model.serialization.grid, (2, 2))
            after = pictures.reconstruct(model, changed, before.ranks)
            torch.testing.assert_close(after.step(0, number), before.step(0, number), equal_nan=True)
            assert not later.any() or not torch.equal(after.truth, before.truth)

    def test_losses_are_the_models_and_given_tokens_have_none(self, randomise):
        for kind in MODELS:
            model = make(kind, randomise).train()
            images = images_of(model)
            done = pictures.reconstruct(model, images)
            assert model.training
            torch.testing.assert_close(done.loss.nanmean(1).mean(), model.eval()(images, done.ranks).loss.detach())
            assert torch.equal(done.loss.isnan(), (done.ranks == 0) & (kind == 'aim'))

    def test_steps_go_from_the_first_to_the_last(self, randomise):
        for kind in MODELS:
            done = pictures.reconstruct(make(kind, randomise), images_of(make(kind, randomise)))
            for image in range(3):
                last = done.counts[image] - 1
                for most in (2, 6, 40):
                    steps = done.steps(image, most)
                    assert len(steps) == most and steps[0] == done.first and steps[-1] == last
                    assert steps == sorted(steps)
                assert set(done.steps(image, last + 1 - done.first)) == set(range(done.first, last + 1))


class TestAttention:
    @pytest.mark.parametrize('options', [
        dict(class_token=False, global_pool='avg'),
        dict(reg_tokens=2, qk_norm=True, init_values=0.1, pre_norm=True),
        dict(depth=1),
    ], ids=['patches alone', 'registers', 'one block'])
    def test_weights_are_those_of_the_block(self, options, randomise):
        encoder = randomise(timm.create_model('vit_tiny_patch16_224', **{**SMALL, 'img_size': 8, **options})).eval()
        images = torch.randn(2, 3, 8, 8)
        seen = {}
        for name in ('attn.qkv', 'attn.proj'):
            encoder.blocks[-1].get_submodule(name).register_forward_hook(
                lambda module, inputs, output, name=name: seen.update({name: (inputs[0], output)}))
        with torch.no_grad():
            encoder(images)
        weights = attention_maps.attention_weights(encoder, images)
        tokens = 16 + encoder.num_prefix_tokens
        assert weights.shape == (2, 2, tokens, tokens)
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, 2, tokens))
        attention = encoder.blocks[-1].attn
        q, k, v = seen['attn.qkv'][1].unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4)  # [B, heads, N, D] each
        for head in range(2):
            scores = attention.q_norm(q[:, head]) @ attention.k_norm(k[:, head]).mT / 4
            torch.testing.assert_close(weights[:, head], scores.exp() / scores.exp().sum(-1, keepdim=True))
        # The block's own attention is these weights on its values.
        torch.testing.assert_close((weights @ v).transpose(1, 2).flatten(2), seen['attn.proj'][0])

    def test_maps_are_of_the_class_token_or_of_all_patches(self, randomise):
        images = torch.randn(2, 3, 8, 12)
        for class_token, registers in ((True, 0), (True, 3), (False, 0)):
            encoder = randomise(timm.create_model(
                'vit_tiny_patch16_224', **SMALL, img_size=(8, 12), class_token=class_token, reg_tokens=registers,
                global_pool='avg'))
            weights = attention_maps.attention_weights(encoder, images)
            maps = attention_maps.attention_maps(encoder, weights)
            assert maps.shape == (2, 2, 4, 6)
            prefix, tokens = encoder.num_prefix_tokens, weights.shape[-1]
            for row, column in ((0, 0), (1, 2), (3, 5)):
                received = weights[..., prefix + 6 * row + column]
                expected = received[:, :, 0] if class_token else received.sum(-1) / 24
                torch.testing.assert_close(maps[:, :, row, column], tokens * expected)

    def test_other_models_are_refused(self):
        for model in (timm.create_model('test_resnet'), timm.create_model('vit_tiny_patch16_224', **SMALL, img_size=8,
                                                                          block_fn=TwistedBlock)):
            with pytest.raises(ModelError, match=f'this model is a {type(model).__name__}'):
                attention_maps.attention_weights(model, torch.zeros(1, 3, 8, 8))


class TwistedBlock(timm.models.vision_transformer.Block):
    """A block that may do anything."""


@settings(max_examples=50, deadline=None)
@given(nps.arrays(bool, st.tuples(st.integers(1, 5), st.integers(1, 5))))
def test_outlines_are_closed(member: np.ndarray):
    lines = panels.boundaries(np.pad(member, 1))
    touched = [point for line in lines for point in line]
    assert all(touched.count(point) % 2 == 0 for point in touched)
    around = np.pad(member, 1).astype(int)
    assert len(lines) == np.abs(np.diff(around, axis=0)).sum() + np.abs(np.diff(around, axis=1)).sum()


@pytest.fixture(scope='module')
def shown(tmp_path_factory) -> dict[str, Path]:
    """Pictures of a RandSAC model and a SAIM model by the command line, with what they were made from."""
    folder = tmp_path_factory.mktemp('show')
    torch.manual_seed(0)
    for kind, count in (('randsac', 2), ('saim', 3)):
        name, options = MODELS[kind]
        model = timm.create_model(name, **SMALL, **options)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        write_run(model, folder / kind)
        pictures_from = [str(write_images(folder / 'images', 5)), '--count', str(count)]
        assert main(['show', *pictures_from, '--weights', str(folder / kind), '--output-dir',
                     str(folder / f'{kind}-pictures')]) == 0
    return folder


class TestCommand:
    @pytest.mark.parametrize('kind', ['randsac', 'saim'])
    def test_draws_every_figure_of_a_run(self, kind, shown: Path):
        expected = {'order.png', 'reconstruction.png', 'reconstruction.gif', 'comparison.png', 'attention.png'}
        expected |= {'mix.png'} if kind == 'randsac' else set()
        folder = shown / f'{kind}-pictures'
        assert {file.name for file in folder.iterdir()} == expected
        for name in expected:
            with Image.open(folder / name) as image:
                pixels = np.asarray(image.convert('RGB'))
            assert pixels.shape[1] >= 600 and pixels.shape[0] >= 200 and pixels.std() > 20, name
            assert len(np.unique(pixels @ np.array([65536, 256, 1]))) > 60, name

    def test_the_film_unfolds_and_ends_with_everything(self, shown: Path):
        with Image.open(shown / 'saim-pictures' / 'reconstruction.gif') as film:
            assert film.n_frames == 24 + 1 and film.info['loop'] == 0
            empty = []
            for frame in range(film.n_frames):
                film.seek(frame)
                pixels = np.asarray(film.convert('RGB'))
                empty.append((pixels == np.round(255 * np.array(panels.EMPTY))).all(-1).sum())
            assert film.info['duration'] > 1000
        assert empty[0] > 100_000 and empty[-1] < 2000  # edges of letters have the colour too
        assert all(now < before for before, now in pairwise(empty))

    def test_one_figure_alone_is_the_same(self, shown: Path, tmp_path: Path):
        command = ['show', str(shown / 'images'), '--weights', str(shown / 'randsac' / 'pretrain'), '--count', '2',
                   '--figures', 'comparison', '--output-dir', str(tmp_path)]
        assert main(command) == 0
        assert [file.name for file in tmp_path.iterdir()] == ['comparison.png']

        def pixels(folder: Path) -> np.ndarray:
            return np.asarray(Image.open(folder / 'comparison.png'))[100:]  # below the run's name

        np.testing.assert_array_equal(pixels(tmp_path), pixels(shown / 'randsac-pictures'))
        assert main([*command, '--seed', '1']) == 0
        assert (pixels(tmp_path) != pixels(shown / 'randsac-pictures')).any()

    def test_an_encoder_alone_has_its_attention(self, shown: Path, tmp_path: Path, monkeypatch, capsys):
        monkeypatch.chdir(tmp_path)
        image = str(shown / 'images' / '0.png')
        assert main(['show', '--weights', str(shown / 'saim' / 'encoder'), image]) == 0
        assert [file.name for file in (tmp_path / 'runs' / 'show-saim').iterdir()] == ['attention.png']
        assert 'Left out order, reconstruction, comparison, mix' in capsys.readouterr().out

    def test_attention_is_of_the_weights_and_of_none(self, shown: Path, tmp_path: Path, monkeypatch):
        calls = []
        monkeypatch.setattr(attention_maps, 'attention_figure', lambda encoders, *rest: calls.append(dict(encoders)))
        monkeypatch.setattr(plots, 'mix_figure', lambda mix, *rest: calls.append(mix))
        for more in ([], ['--no-pretrained']):
            assert main(['show', '--weights', str(shown / 'randsac'), '--figures', 'attention', 'mix', '--output-dir',
                         str(tmp_path), *more]) == 0
        trained = timm.create_model(f'local-dir:{shown / "randsac" / "pretrain"}', pretrained=True)
        both, mix, alone, fresh_mix = calls
        assert list(both) == ['untrained', 'pretrained'] and list(alone) == ['untrained']
        for name, parameter in trained.encoder.named_parameters():
            assert torch.equal(both['pretrained'].get_parameter(name), parameter)
        for encoder in (both['untrained'], alone['untrained']):
            assert not torch.allclose(encoder.blocks[0].mlp.fc1.weight, trained.encoder.blocks[0].mlp.fc1.weight)
        np.testing.assert_array_equal(mix, trained.decoder.mix.detach().numpy())
        assert fresh_mix[:, -1].tolist() == [1, 1]

    def test_without_images_it_takes_bundled_ones(self):
        digits = show.load_images((), ImageSpec((8, 8), 1, (0.5,), (0.5,)), (2, 2), 3)
        assert digits.shape == (3, 1, 8, 8) and digits.flatten(1).std(1).min() > 0.5
        photographs = show.load_images((), ImageSpec((32, 48), 3, (0.5,) * 3, (0.5,) * 3), (4, 4), 3)
        assert photographs.shape == (2, 3, 32, 48) and photographs.flatten(1).std(1).min() > 0.2

    def test_folders_are_spread_over(self, tmp_path: Path):
        folder = write_images(tmp_path / 'many', 9, (8, 8))
        spec = ImageSpec((8, 8), 3, (0.0,) * 3, (1.0,) * 3)
        images = show.load_images((str(folder), str(folder / '1.png')), spec, (4, 4), 3)
        for image, name in zip(images, ('0', '4', '8', '1'), strict=True):
            expected = np.asarray(Image.open(folder / f'{name}.png'))
            np.testing.assert_allclose(255 * image.permute(1, 2, 0).numpy(), expected, atol=1e-3)


class TestErrors:
    @pytest.mark.parametrize('arguments, message', [
        ([], '--weights names a run'),
        (['--weights', 'RUN', '--figures', 'atention'], "Unknown figure 'atention'. Did you mean 'attention'"),
        (['--weights', 'RUN', '--figures', 'order', 'IMAGE'], 'Name images before the options.'),
        (['--weights', 'RUN', '--count', '0'], 'count is between 1 and 8'),
        (['--weights', 'RUN', 'nothing.png'], 'No image nothing.png'),
        (['--weights', 'RUN', 'DAMAGED'], 'damaged or no image'),
        (['--weights', 'RUN', 'TINY'], 'less than one patch of this model, 2 x 2'),
        (['--weights', 'RUN', 'EMPTY'], 'No images in'),
        (['--weights', 'RUN', *['IMAGE'] * 9], '9 images are too many'),
        (['--weights', 'RUN', '--output-dir', 'IMAGE'], 'is a file. Name another --output-dir.'),
        (['--weights', 'RUN/encoder', '--figures', 'attention', 'reconstruction'], 'name the pretrain/ folder'),
        (['--weights', 'RUN', '--figures', 'mix'], 'the model learned none'),
        (['--weights', 'test_resnet', '--no-pretrained'], 'Nothing to draw of test_resnet'),
        (['--weights', 'saim_vit_tiny'], '--no-pretrained'),
        (['--weights', 'EMPTY'], 'holds no encoder'),
        (['--weights', 'vit_tiny_patch16_225', '--no-pretrained'], 'vit_tiny_patch16_224'),
    ])
    def test_one_line_before_anything_is_written(self, arguments, message, shown: Path, tmp_path: Path, monkeypatch,
                                                 capsys):
        monkeypatch.chdir(tmp_path)
        (tmp_path / 'damaged.png').write_bytes((shown / 'images' / '0.png').read_bytes()[:300])
        (tmp_path / 'empty').mkdir()
        tiny = write_images(tmp_path / 'tiny', 1, (1, 5))
        before = sorted(tmp_path.rglob('*'))
        names = {'RUN': str(shown / 'saim'), 'RUN/encoder': str(shown / 'saim' / 'encoder'), 'EMPTY': 'empty',
                 'IMAGE': str(shown / 'images' / '0.png'), 'DAMAGED': 'damaged.png', 'TINY': str(tiny / '0.png')}
        assert main(['show', *(names.get(argument, argument) for argument in arguments)]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count('\n') == 1
        assert sorted(tmp_path.rglob('*')) == before

    def test_missing_matplotlib_is_named(self, shown: Path, monkeypatch, capsys):
        for name in [*sys.modules]:
            if name.startswith(('autoreg_vit.commands.showing', 'autoreg_vit.figures')):
                monkeypatch.delitem(sys.modules, name)
        monkeypatch.delattr(autoreg_vit.commands, 'showing')
        monkeypatch.delattr(autoreg_vit, 'figures')
        monkeypatch.setitem(sys.modules, 'matplotlib', None)
        assert main(['show', '--weights', str(shown / 'saim')]) == 2
        assert "needs the package 'matplotlib': pip install" in capsys.readouterr().err
