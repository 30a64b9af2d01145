"""`autoreg-vit detect`: object detection and instance segmentation by Mask R-CNN (SAIM "Object detection and instance
segmentation on COCO")."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..artifacts import writing
from ..data.batches import Batches
from ..data.order import check_divisible
from ..data.transforms import ImageSpec
from ..engine.loop import adam_options, create_optimizer, prepare, start
from ..engine.machine import autocast
from ..engine.parallel import replicate, settle_buckets
from ..engine.processes import Processes, processes
from ..engine.run import Run
from ..engine.seeding import mix_seed
from ..errors import ConfigError
from ..figures.plots import learning_figure
from ..hub.lookup import short_name
from ..settings.detecting import DetectConfig
from .dense import dense_encoder, require
from .results import finished, leave_results
from .supervised import Learner, train


def detect(config: DetectConfig) -> Path:
    """Train a detector on an encoder, or resume its run. Under torchrun every process calls this.

    Args:
        config: Settings of the run; the defaults are those of Li et al. 2021 for ViT-B.

    Returns:
        The run's folder: `config.yaml`, `log.jsonl`, `last.pt`, `results.json`, `figures/`, and the detector in
        `model/`, a folder that `autoreg_vit.models.dense.detector.load_detector` loads.

    Raises:
        UsageError: for settings, data or weights that cannot work, before training begins.
        NonFiniteLoss: when training diverges.
        Stopped: when SIGTERM or SIGINT asked for it, after a checkpoint.
    """
    require('detect', 'torchmetrics', 'faster_coco_eval')
    with processes(config.device) as group:
        return _detect(dataclasses.replace(config), group)


def _detect(config: DetectConfig, group: Processes) -> Path:
    from ..data.boxes import collate, open_data
    from ..evaluation.box_scores import coco_results, evaluate
    from ..figures.predicted_boxes import detection_figure
    from ..models.dense.detector import ViTMaskRCNN, save_detector

    # 1. Settings, data and model, all checked before anything is written.
    prepare(config, group)
    check_divisible(config.batch_size, group)
    if config.norm == 'batch' and group.world_size > 1 and group.device.type != 'cuda':
        raise ConfigError('norm=batch is synchronised over GPUs alone: use --norm layer with several processes on '
                          f'{group.device.type}.')
    encoder, source = dense_encoder(config, in_chans=config.in_chans)
    spec = ImageSpec.of(encoder, config.in_chans)
    train_part, test_part = open_data(config, spec.channels, group)
    categories = train_part.dataset.categories
    options = {**config.detector_options(), 'mean': spec.mean, 'std': spec.std}
    model = ViTMaskRCNN(encoder, len(categories), **options).to(group.device)
    if group.world_size > 1 and group.device.type == 'cuda':
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    batches = Batches(train_part, config.batch_size, config.seed, group, config.workers, config.accumulate,
                      config.max_corrupt, collate)
    optimizer = create_optimizer(config, model, layer_decay=config.layer_decay, **adam_options(config))

    # 2. The run.
    facts = {'train_images': len(train_part), 'test_images': len(test_part)}
    with Run(config, f'detect-{short_name(config.weights)}', group, facts, config.steps) as run:
        if finished(run):
            return run.folder
        start(run, config, **facts, classes=len(categories), parameters=sum(p.numel() for p in model.parameters()))
        run.say(f'Training Mask R-CNN on {config.weights} with {len(train_part):,} images of {len(categories)} classes '
                f'for {config.steps:,} steps of {config.batch_size * config.accumulate}; {group.world_size} x '
                f'{group.device}, {config.precision}; writing to {run.folder}')
        trained = replicate(SumOfLosses(model), group)
        settle(trained, config, spec, group)

        def measure() -> dict[str, Any]:
            model.eval()
            return evaluate(model, test_part, categories, config, group)

        learner = Learner(model, trained, optimizer, seeded_loss(trained, config.seed, group), measure)
        result = train(config, run, batches, learner)

        # 3. What is left.
        if group.is_main:
            with writing(run.folder):
                save_detector(model, run.folder / 'model', source, options, categories)
                (run.folder / 'figures').mkdir(exist_ok=True)
                learning_figure({'': run.log.lines}, run.folder / 'figures' / 'learning.png')
                detection_figure(test_part, result['detections'], run.folder / 'figures' / 'detections.png')
                if config.save_detections:
                    (run.folder / 'detections.json').write_text(
                        json.dumps(coco_results(result['detections'], test_part)), encoding='utf-8')
        leave_results(run, config, result, list(categories.values()), **facts, steps=config.steps,
                      per_class={name: {k: round(v, 4) for k, v in scores.items()}
                                 for name, scores in result['per_class'].items()})
        return run.folder


class SumOfLosses(nn.Module):
    """A detector in training as one module with one loss, for DistributedDataParallel."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, images: list[torch.Tensor], targets: list[dict[str, torch.Tensor]]) -> torch.Tensor:
        return sum(self.model(images, targets).values())


def settle(trained: nn.Module, config: DetectConfig, spec: ImageSpec, group: Processes) -> None:
    """`settle_buckets` with an empty image, which leaves the statistics of batch norms as they are."""
    trained.train()
    for module in trained.modules():
        if isinstance(module, _BatchNorm):
            module.eval()
    target = {'boxes': torch.tensor([[0.0, 0.0, 32.0, 32.0]]), 'labels': torch.tensor([1]),
              'masks': torch.ones(1, *config.canvas, dtype=torch.uint8)}
    with autocast(config.precision, group.device):
        settle_buckets(trained, [torch.zeros(spec.channels, *config.canvas, device=group.device)],
                       [{name: value.to(group.device) for name, value in target.items()}])


def seeded_loss(trained: nn.Module, seed: int, group: Processes):
    """The loss of a batch, whose draws, of regions and of stochastic depth, are a function of (seed, forward pass,
    process)."""
    def loss(batch: list[list], number: int) -> torch.Tensor:
        images, targets = batch
        torch.manual_seed(mix_seed(seed, 'detection', number, group.rank))
        return trained([image / 255 for image in images], targets)

    return loss
