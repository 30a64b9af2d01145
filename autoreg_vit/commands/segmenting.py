"""`autoreg-vit segment`: semantic segmentation with UPerNet, trained end to end (RandSAC C, SAIM "Semantic segmentation
on ADE20K")."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ..artifacts import writing
from ..data.batches import batches_of
from ..data.masks import SegmentationData, open_data
from ..data.transforms import ImageSpec
from ..engine.objective import Evaluation, ForwardPass, Objective
from ..engine.parallel import share_buffers
from ..engine.processes import Processes
from ..engine.run import Run
from ..engine.seeding import mix_seed
from ..engine.trainer import Trainer
from ..errors import ConfigError
from ..evaluation.mask_scores import Windows, evaluate, predict
from ..figures.plots import learning_figure
from ..figures.predicted_masks import predictions_figure
from ..hub.lookup import short_name
from ..models.dense.segmenter import Segmenter, save_segmenter
from ..settings.dense import SegmentConfig
from .dense import dense_encoder, require
from .runs import begun, evaluation_of, finished, leave_results


def segment(config: SegmentConfig) -> Path:
    """Train a segmentation network on an encoder, or resume its run. Under torchrun every process calls this.
    The settings' defaults are those of both papers for ViT-Base on ADE20K.

    Returns:
        The run's folder: `config.yaml`, `log.jsonl`, `last.pt`, `results.json`, `figures/`, and the network in
        `model/`, which `models.dense.segmenter.load_segmenter` loads.

    Raises:
        UsageError: for settings, data or weights that cannot work, before training begins.
        NonFiniteLoss: when training diverges.
        Stopped: when SIGTERM or SIGINT asked for it, after a checkpoint.
    """
    require('segment', 'segmentation_models_pytorch', 'torchmetrics')
    with begun(config) as (config, group):
        # Data and model, all checked before anything is written.
        synced = group.world_size > 1 and group.device.type == 'cuda'  # PyTorch has no such batch norm for the CPU
        check_batch(config, group, synced)
        encoder, source = dense_encoder(config, in_chans=config.in_chans)
        spec = dataclasses.replace(ImageSpec.of(encoder, config.in_chans), size=config.crop)
        data = open_data(config, spec, group)
        model = Segmenter(encoder, len(data.classes), config.crop, decoder_channels=config.decoder_channels,
                          auxiliary=config.auxiliary, dropout=config.dropout).to(group.device)
        if synced:
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        objective = Segmentation(config, model, spec, data, group)
        trainer = Trainer(config, objective, batches_of(config, data.train, group), group)

        # The run, and what it leaves, with batch norms' statistics as they were reported.
        facts = {'train_images': len(data.train)}
        with Run(config, f'segment-{short_name(config.weights)}', group, facts, trainer.steps) as run:
            if finished(run):
                return run.folder
            result = trainer.run(run).result
            model.eval()
            if group.is_main:
                with writing(run.folder):
                    draw_figures(objective, run)
                    save_segmenter(
                        model, run.folder / 'model', source, classes=list(data.classes), crop_size=list(config.crop),
                        stride=list(config.steps_between_windows), mean=list(spec.mean), std=list(spec.std))
            leave_results(run, config, result, data.classes, steps=config.steps, **facts,
                          iou={name: round(value, 4) for name, value in zip(data.classes, result['iou'])})
            return run.folder


class Segmentation(Objective[Segmenter]):
    """A class for each pixel, by a model on the device that takes crops as `spec` says. Draws are functions of (seed,
    forward pass, process)."""

    def __init__(
            self, config: SegmentConfig, model: Segmenter, spec: ImageSpec, data: SegmentationData, group: Processes,
    ):
        count, classes = len(data.train), len(data.classes)
        super().__init__(
            model, f'Segmenting with {config.weights}: {count:,} images of {classes} classes, {config.steps:,} steps',
            {'train_images': count, 'classes': classes, 'parameters': sum(p.numel() for p in model.parameters())})
        self.config, self.spec, self.data, self.group = config, spec, data, group

    def loss(self, network: nn.Module, batch: Any, part: ForwardPass) -> torch.Tensor:
        torch.manual_seed(mix_seed(self.config.seed, 'dropout', part.number, self.group.rank))
        return network(*batch)

    def settle(self, network: nn.Module) -> torch.Tensor:
        return network.eval()(self.spec.nothing(2, self.group.device),
                              torch.zeros(2, *self.spec.size, dtype=torch.long, device=self.group.device)).sum()

    def evaluate(self, model: Segmenter) -> Evaluation:
        share_buffers(model, self.group)
        model.eval()
        return evaluation_of(evaluate(
            model, self.data.test, len(self.data.classes), windows_of(self.config), precision=self.config.precision,
            workers=self.config.loaders, group=self.group))


def windows_of(config: SegmentConfig) -> Windows:
    """How windows slide over the images of an evaluation."""
    return Windows(config.crop, config.steps_between_windows, config.batch_size)


def check_batch(config: SegmentConfig, group: Processes, synced: bool) -> None:
    """Raise ConfigError for a batch that leaves a process less than two images to normalise over."""
    if config.batch_size // (1 if synced else group.world_size) < 2:
        raise ConfigError(
            f'UPerNet normalises over the images of a batch, and one of {config.batch_size} leaves each of '
            f'{group.world_size} processes a single image: use --batch-size {2 * group.world_size} or more.')


def draw_figures(objective: Segmentation, run: Run) -> None:
    """figures/learning.png, and figures/predictions.png where pictures are asked for."""
    config, data, figures = objective.config, objective.data, run.folder / 'figures'
    figures.mkdir(exist_ok=True)
    learning_figure({'': run.log.lines}, figures / 'learning.png')
    if config.pictures:
        chosen = np.unique(np.linspace(0, len(data.test) - 1, config.pictures).astype(int))
        images, truths = zip(*(data.test[int(i)] for i in chosen))
        found = predict(objective.model, images, [tuple(t.shape) for t in truths], windows_of(config),
                        precision=config.precision, group=run.group)
        predictions_figure(images, truths, found, data.classes, objective.spec, figures / 'predictions.png')
