"""Runs and weights made on the fly: small, with random parameters, and all that a real run leaves."""

import json
from pathlib import Path

import torch

from autoreg_vit.commands.cli import main
from autoreg_vit.hub.folders import export_encoder, export_pretraining
from autoreg_vit.models.designs import create_pretraining_model
from autoreg_vit.models.pretraining import AutoregressiveViT
from autoreg_vit.settings.base import save_config
from autoreg_vit.settings.pretraining import PretrainConfig

MODEL, ENCODER = 'randsac_vit_tiny_patch4_32', 'vit_tiny_patch4_32_randsac'
SETTINGS = {'model': MODEL, 'embed_dim': 32, 'depth': 2, 'num_heads': 2, 'decoder_depth': 1, 'memory': 'last',
            'norm_pix': False, 'dataset': 'folder', 'data_dir': '/somewhere/images', 'epochs': 4, 'batch_size': 50,
            'lr': 2e-3, 'output_dir': '/somewhere/run'}
LINES = [
    {'event': 'start', 'version': '0.1.0', 'commit': '0123456789ab', 'torch': '2.11.0', 'timm': '1.0.23',
     'hardware': 'A processor, avx2', 'device': 'cpu', 'processes': 2, 'threads': 1, 'precision': 'float32',
     'train_images': 1000, 'parameters': 1, 'encoder_parameters': 1},
    {'event': 'evaluation', 'images': 0, 'knn': 21.5, 'linear': 33.25},
    {'event': 'step', 'step': 40, 'epoch': 2.0, 'images': 2000, 'loss': 0.75, 'lr': 1e-3, 'images_per_second': 10.0},
    {'event': 'step', 'step': 80, 'epoch': 4.0, 'images': 4000, 'loss': 0.5, 'lr': 0.0, 'images_per_second': 20.0},
    {'event': 'evaluation', 'images': 4000, 'knn': 43.5, 'linear': 54.75},
    {'event': 'finish'},
]


def write_run(folder: Path, lines: list[dict] = LINES, **settings) -> AutoregressiveViT:
    """A run's folder, by hand; returns its model. Its arguments differ from the architecture's own in what no tensor
    shows (norm_pix) and in what every tensor shows (embed_dim)."""
    config = PretrainConfig(**{**SETTINGS, **settings})
    model = create_pretraining_model(config.model, **config.model_options()).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:  # tables of positions are the same in every run
                parameter += 0.1 * torch.randn_like(parameter)
    export_encoder(model.encoder, folder / 'encoder', mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    export_pretraining(model, folder / 'pretrain', mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    save_config(config, folder / 'config.yaml')
    (folder / 'log.jsonl').write_text(''.join(json.dumps({'time': 0.0, **line}) + '\n' for line in lines))
    return model


def write_weights(root: Path, run: Path, tag: str = 'test') -> tuple[Path, Path]:
    """The folders of encoder and whole model under `root`, by the command line."""
    write_run(run)
    assert main(['export', str(run), str(root), '--tag', tag]) == 0
    return root / f'{ENCODER}.{tag}', root / f'{MODEL}.{tag}'
