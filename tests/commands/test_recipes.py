"""Bundled recipes: each is built and stepped once at reduced size, and says what its paper's table says."""

import dataclasses
import pathlib
import typing

import numpy as np
import pytest
import timm
import torch
from timm.optim import create_optimizer_v2

pytest.importorskip('sklearn')

from autoreg_vit.commands import COMMANDS
from autoreg_vit.commands.cli import main
from autoreg_vit.commands.recipes import FOLDER as RECIPES
from autoreg_vit.commands.recipes import bundled_recipes, load_recipe
from autoreg_vit.errors import ConfigError
from autoreg_vit.settings.base import make_config
from autoreg_vit.settings.classification import FinetuneConfig, ProbeConfig
from autoreg_vit.settings.pretraining import PretrainConfig

PAPERS = [name for name in bundled_recipes() if name != 'digits']

#: What the tables say: epochs, batch, base rate, weight decay, betas, warm-up, least area of a crop.
TABLES = {
    'randsac-tiny-cifar10': (1600, 512, 1e-3, 0.05, (0.9, 0.999), 10, 0.2),
    'randsac-tiny-cifar10-800': (800, 512, 1e-3, 0.05, (0.9, 0.999), 10, 0.2),
    'randsac-small-cifar10': (1600, 512, 1e-3, 0.05, (0.9, 0.999), 10, 0.2),
    'randsac-small-cifar100': (1600, 512, 1e-3, 0.05, (0.9, 0.999), 10, 0.2),
    'randsac-small-imagenet100': (800, 4096, 1.5e-4, 0.05, (0.9, 0.95), 40, 0.2),
    'randsac-base-imagenet1k': (1600, 4096, 1.5e-4, 0.05, (0.9, 0.95), 40, 0.2),
    'saim-base-imagenet1k-300': (300, 2048, 2e-4, 0.05, (0.9, 0.95), 30, 0.67),
    'saim-base-imagenet1k-800': (800, 2048, 2e-4, 0.05, (0.9, 0.95), 30, 0.67),
    'igpt-base-imagenet1k': (300, 2048, 2e-4, 0.05, (0.9, 0.95), 30, 0.67),
    'saim-tiny-cifar10': (1600, 512, 1e-3, 0.05, (0.9, 0.999), 10, 0.67),
    'igpt-tiny-cifar10': (1600, 512, 1e-3, 0.05, (0.9, 0.999), 10, 0.67),
}


def reduced(config: PretrainConfig) -> PretrainConfig:
    """The same design on 16 tokens, narrow and of four blocks."""
    settings = {'embed_dim': 32, 'depth': 4, 'num_heads': 2, 'img_size': (64,) if '224' in pixels(config) else (16,)}
    if config.img_size is not None:
        settings['img_size'] = config.img_size
    for name, value in (('decoder_depth', 2), ('decoder_dim', 48), ('decoder_heads', 4)):
        if getattr(config, name) is not None:
            settings[name] = value
    for name, value in settings.items():
        setattr(config, name, value)
    return config


def pixels(config: PretrainConfig) -> str:
    return str(timm.models.get_pretrained_cfg(config.model).input_size)


@pytest.mark.parametrize('name', bundled_recipes())
def test_one_step(name: str):
    config = reduced(make_config(PretrainConfig, load_recipe(name), {}))
    model = timm.create_model(config.model, **config.model_options())
    channels = model.encoder.patch_embed.proj.in_channels
    optimizer = create_optimizer_v2(model, config.opt, lr=config.lr * config.batch_size / 256,
                                    weight_decay=config.weight_decay, betas=config.betas)
    before = {k: v.clone() for k, v in model.named_parameters() if v.requires_grad}
    loss = model(torch.randn(3, channels, *model.encoder.patch_embed.img_size)).loss
    loss.backward()
    optimizer.step()
    assert torch.isfinite(loss)
    # A class token that nothing but itself attends to, for one, gets no gradient.
    moved = [k for k, v in model.named_parameters() if v.requires_grad and not torch.equal(v, before[k])]
    assert len(moved) > 0.9 * len(before)


@pytest.mark.parametrize('name', PAPERS)
def test_says_what_the_table_says(name: str):
    config = make_config(PretrainConfig, load_recipe(name), {})
    assert (config.epochs, config.batch_size * config.accumulate, config.lr, config.weight_decay, config.betas,
            config.warmup_epochs, config.crop_scale[0]) == TABLES[name]
    assert config.opt == 'adamw' and config.hflip == 0.5 and config.crop_scale[1] == 1


def test_designs_of_the_papers():
    """Architectures at full size, of which the papers give the parts (RandSAC 5, A.1; SAIM "Pretraining setup")."""
    base = make_config(PretrainConfig, load_recipe('randsac-base-imagenet1k'), {})
    assert (base.segments, base.decoder_depth, base.decoder_dim, base.decoder_heads) == ((11, 7, 3), 4, 512, 16)
    saim = make_config(PretrainConfig, load_recipe('saim-base-imagenet1k-800'), {})
    assert (saim.serialization, saim.decoder, saim.decoder_depth, saim.blur) == ('random', 'parallel', 12, (9, 1))
    igpt = make_config(PretrainConfig, load_recipe('igpt-base-imagenet1k'), {})
    assert (igpt.serialization, igpt.decoder) == ('raster', 'none')
    assert igpt.model_options()['blur'] is False


@pytest.mark.parametrize('serialization', ['raster', 'random'])
def test_ablations_are_flags(serialization: str):
    flags = {'serialization': serialization, 'embed_dim': 32, 'depth': 2, 'num_heads': 2}
    config = make_config(PretrainConfig, load_recipe('randsac-tiny-cifar10-800'), flags)
    assert torch.isfinite(timm.create_model(config.model, **config.model_options())(torch.randn(2, 3, 32, 32)).loss)


def test_evaluation_protocols_of_the_papers():
    table16 = make_config(ProbeConfig, load_recipe('randsac', 'probe'), {'weights': 'x'})
    assert (table16.opt, table16.lr, table16.weight_decay, table16.momentum, table16.batch_size, table16.warmup_epochs,
            table16.epochs) == ('lars', 0.1, 0, 0.9, 16384, 10, 90)
    table15 = make_config(FinetuneConfig, load_recipe('randsac', 'finetune'), {'weights': 'x'})
    assert table15 == FinetuneConfig(weights='x'), 'the defaults are the table'
    assert (table15.opt, table15.lr, table15.weight_decay, table15.betas, table15.layer_decay, table15.batch_size,
            table15.warmup_epochs, table15.epochs, table15.auto_augment, table15.label_smoothing, table15.mixup,
            table15.cutmix, table15.drop_path_rate) == (
        'adamw', 5e-4, 0.05, (0.9, 0.999), 0.65, 1024, 5, 100, 'rand-m9-mstd0.5-inc1', 0.1, 0.8, 1.0, 0.1)
    assert make_config(ProbeConfig, load_recipe('saim', 'probe'), {'weights': 'x'}).batch_norm


@pytest.mark.parametrize('path', sorted(RECIPES.rglob('*.yaml')), ids=lambda path: path.stem)
def test_starts_with_its_source(path):
    first = path.read_text().splitlines()[0]
    assert first.startswith('# ') and any(paper in first for paper in ('RandSAC', 'SAIM', 'scikit-learn'))
    assert path.stem in bundled_recipes('pretrain' if path.parent == RECIPES else path.parent.name)


def test_unknown_names_suggest_those_of_the_command():
    with pytest.raises(ConfigError, match=r"No recipe 'randsak'.*'randsac'"):
        load_recipe('randsak', 'finetune')
    with pytest.raises(ConfigError, match=r"No recipe 'saim-tiny-cifar'.*'saim-tiny-cifar10'"):
        load_recipe('saim-tiny-cifar')


@pytest.mark.parametrize('command', ['pretrain', 'probe', 'finetune', 'segment', 'detect'])
def test_help_lists_them(command: str, capsys):
    with pytest.raises(SystemExit):
        main([command, '--help'])
    text = ' '.join(capsys.readouterr().out.split())
    assert all(name in text for name in bundled_recipes(command)) and bundled_recipes(command)


CONFIGS = [c.config()
           for c in COMMANDS.values()]


#: What a command does not do without.
NEEDED = {'weights': 'vit_tiny', 'data_dir': 'x', 'num_classes': 2, 'run': 'r', 'folder': 'f', 'source': 's'}


@pytest.mark.parametrize('kind', CONFIGS, ids=lambda kind: kind.__name__)
def test_every_path_of_every_command_is_expanded(kind: type, monkeypatch):
    """No setting of text keeps a tilde, so that no folder of that name is made."""
    monkeypatch.setenv('HOME', '/home/someone')
    kept = typing.get_type_hints(kind)
    texts = [f.name for f in dataclasses.fields(kind) if kept[f.name] in (str, str | None)
             and f.name not in ('precision', 'schedule', 'auto_augment', 'global_pool', 'reader')]
    needed = {name: value for name, value in NEEDED.items() if name in kept}
    for name in texts:
        for path in ('~/runs/x', pathlib.Path('~/runs/x')):
            assert getattr(kind(**{**needed, name: path}), name) == '/home/someone/runs/x'


def test_recipes_in_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    (tmp_path / 'mine.yaml').write_text('output_dir: ~/runs/mine')
    assert make_config(PretrainConfig, load_recipe('~/mine.yaml'), {}).output_dir == str(tmp_path / 'runs' / 'mine')


def test_numbers_of_numpy():
    config = PretrainConfig(depth=np.int64(3), lr=np.float32(0.5), segments=(np.int32(7), np.int64(3)),
                            shuffle=np.True_, epochs=np.int16(2), warmup_epochs=np.int64(1))
    assert (config.depth, config.lr, config.segments, config.shuffle, config.epochs, config.warmup_epochs) == (
        3, 0.5, (7, 3), True, 2, 1.0)
    assert {type(v) for v in (config.depth, config.lr, config.segments[0], config.shuffle, config.warmup_epochs)} == {
        int, float, bool}
