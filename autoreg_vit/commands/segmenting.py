"""`autoreg-vit segment`: semantic segmentation with UPerNet, trained end to end (RandSAC C, SAIM "Semantic segmentation
on ADE20K")."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ..artifacts import writing
from ..data.batches import Batches
from ..data.order import check_divisible
from ..data.transforms import ImageSpec
from ..engine.loop import adam_options, create_optimizer, prepare, start
from ..engine.machine import autocast
from ..engine.parallel import replicate, settle_buckets, share_buffers
from ..engine.processes import Processes, processes
from ..engine.run import Run
from ..engine.seeding import mix_seed
from ..errors import ConfigError
from ..figures.plots import learning_figure
from ..hub.lookup import short_name
from ..settings.segmenting import SegmentConfig
from .dense import dense_encoder, require
from .results import finished, leave_results
from .supervised import Learner, train


def segment(config: SegmentConfig) -> Path:
    """Train a segmentation network on an encoder, or resume its run. Under torchrun every process calls this.

    Args:
        config: Settings of the run; the defaults are those of both papers for ViT-Base on ADE20K.

    Returns:
        The run's folder: `config.yaml`, `log.jsonl`, `last.pt`, `results.json`, `figures/`, and the network in
        `model/`, which `models.segmenter.load_segmenter` loads.

    Raises:
        UsageError: for settings, data or weights that cannot work, before training begins.
        NonFiniteLoss: when training diverges.
        Stopped: when SIGTERM or SIGINT asked for it, after a checkpoint.
    """
    require('segment', 'segmentation_models_pytorch', 'torchmetrics')
    with processes(config.device) as group:
        return _segment(dataclasses.replace(config), group)


def _segment(config: SegmentConfig, group: Processes) -> Path:
    from ..data.masks import open_data
    from ..evaluation.mask_scores import evaluate, predict
    from ..figures.predicted_masks import predictions_figure
    from ..models.dense.segmenter import Segmenter, save_segmenter

    # 1. Settings, data and model, all checked before anything is written.
    prepare(config, group)
    check_divisible(config.batch_size, group)
    synced = group.world_size > 1 and group.device.type == 'cuda'  # PyTorch has no such batch norm for the CPU
    if config.batch_size // (1 if synced else group.world_size) < 2:
        raise ConfigError(
            f'UPerNet normalises over the images of a batch, and one of {config.batch_size} leaves each of '
            f'{group.world_size} processes a single image: use --batch-size {2 * group.world_size} or more.')
    encoder, source = dense_encoder(config, in_chans=config.in_chans)
    spec = dataclasses.replace(ImageSpec.of(encoder, config.in_chans), size=config.crop)
    data = open_data(config, spec, group)
    classes = len(data.classes)
    model = Segmenter(encoder, classes, config.crop, decoder_channels=config.decoder_channels,
                      auxiliary=config.auxiliary, dropout=config.dropout).to(group.device)
    if synced:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    batches = Batches(data.train, config.batch_size, config.seed, group, config.workers, config.accumulate,
                      config.max_corrupt)
    optimizer = create_optimizer(config, model, layer_decay=config.layer_decay, **adam_options(config))

    # 2. The run.
    facts = {'train_images': len(data.train)}
    with Run(config, f'segment-{short_name(config.weights)}', group, facts, config.steps) as run:
        if finished(run):
            return run.folder
        start(run, config, **facts, classes=classes, parameters=sum(p.numel() for p in model.parameters()))
        run.say(f'Segmenting with {config.weights}: {len(data.train):,} images of {classes} classes, {config.steps:,} '
                f'steps; {group.world_size} x {group.device}, {config.precision}; writing to {run.folder}')
        trained = replicate(model, group)
        with autocast(config.precision, group.device):
            settle_buckets(trained.eval(), spec.nothing(2, group.device),
                           torch.zeros(2, *spec.size, dtype=torch.long, device=group.device))

        def loss(batch: list[torch.Tensor], number: int) -> torch.Tensor:
            torch.manual_seed(mix_seed(config.seed, 'dropout', number, group.rank))
            return trained(*batch)

        def measure() -> dict[str, Any]:
            share_buffers(model, group)
            model.eval()
            return evaluate(model, data.test, classes, config, group)

        result = train(config, run, batches, Learner(model, trained, optimizer, loss, measure))

        # 3. What is left, with batch norms' statistics as they were reported.
        model.eval()
        if group.is_main:
            figures = run.folder / 'figures'
            with writing(run.folder):
                figures.mkdir(exist_ok=True)
                learning_figure({'': run.log.lines}, figures / 'learning.png')
                if config.pictures:
                    chosen = np.unique(np.linspace(0, len(data.test) - 1, config.pictures).astype(int))
                    images, truths = zip(*(data.test[int(i)] for i in chosen))
                    found = predict(model, images, [tuple(t.shape) for t in truths], config, group)
                    predictions_figure(images, truths, found, data.classes, spec, figures / 'predictions.png')
                save_segmenter(
                    model, run.folder / 'model', source, classes=list(data.classes),
                    crop_size=list(config.crop), stride=list(config.steps_between_windows), mean=list(spec.mean),
                    std=list(spec.std))
        leave_results(run, config, result, data.classes, steps=config.steps, **facts,
                      iou={name: round(value, 4) for name, value in zip(data.classes, result['iou'])})
        return run.folder
