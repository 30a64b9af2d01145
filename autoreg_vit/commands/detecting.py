"""`autoreg-vit detect`: object detection and instance segmentation by Mask R-CNN (SAIM "Object detection and instance
segmentation on COCO")."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..artifacts import write_synced, writing
from ..data.batches import batches_of
from ..data.boxes import Part, collate, open_data
from ..data.transforms import ImageSpec
from ..engine.objective import Evaluation, ForwardPass, Objective
from ..engine.processes import Processes
from ..engine.run import Run
from ..engine.seeding import mix_seed
from ..engine.trainer import Trainer
from ..errors import ConfigError
from ..evaluation.box_scores import coco_results, evaluate
from ..figures.plots import learning_figure
from ..figures.predicted_boxes import detection_figure
from ..hub.lookup import short_name
from ..models.dense.detector import ViTMaskRCNN, save_detector
from ..settings.dense import DetectConfig
from .dense import dense_encoder, require
from .runs import begun, evaluation_of, finished, leave_results


def detect(config: DetectConfig) -> Path:
    """Train a detector on an encoder, or resume its run. Under torchrun every process calls this.
    The settings' defaults are those of Li et al. 2021 for ViT-B.

    Returns:
        The run's folder: `config.yaml`, `log.jsonl`, `last.pt`, `results.json`, `figures/`, and the detector in
        `model/`, a folder that `autoreg_vit.models.dense.detector.load_detector` loads.

    Raises:
        UsageError: for settings, data or weights that cannot work, before training begins.
        NonFiniteLoss: when training diverges.
        Stopped: when SIGTERM or SIGINT asked for it, after a checkpoint.
    """
    require('detect', 'torchmetrics', 'faster_coco_eval')
    with begun(config) as (config, group):
        # Data and model, all checked before anything is written.
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
        objective = Detection(config, model, spec, train_part, test_part, group)
        trainer = Trainer(config, objective, batches_of(config, train_part, group, collate), group)

        # The run, and what it leaves.
        facts = {'train_images': len(train_part), 'test_images': len(test_part)}
        with Run(config, f'detect-{short_name(config.weights)}', group, facts, trainer.steps) as run:
            if finished(run):
                return run.folder
            result, figures = trainer.run(run).result, run.folder / 'figures'
            if group.is_main:
                with writing(run.folder):
                    save_detector(model, run.folder / 'model', source, options, categories)
                    figures.mkdir(exist_ok=True)
                    learning_figure({'': run.log.lines}, figures / 'learning.png')
                    detection_figure(test_part, result['detections'], figures / 'detections.png')
                    if config.save_detections:
                        write_synced(run.folder / 'detections.json',
                                     json.dumps(coco_results(result['detections'], test_part)))
            leave_results(run, config, result, list(categories.values()), **facts, steps=config.steps,
                          per_class={name: {k: round(v, 4) for k, v in scores.items()}
                                     for name, scores in result['per_class'].items()})
            return run.folder


class Detection(Objective[ViTMaskRCNN]):
    """Boxes, classes and masks of objects, by a model on the device. Draws, of regions and of stochastic depth, are
    functions of (seed, forward pass, process)."""

    def __init__(
            self, config: DetectConfig, model: ViTMaskRCNN, spec: ImageSpec, train_part: Part, test_part: Part,
            group: Processes,
    ):
        count, self.categories = len(train_part), train_part.dataset.categories
        super().__init__(
            model, f'Training Mask R-CNN on {config.weights} with {count:,} images of {len(self.categories)} classes '
            f'for {config.steps:,} steps of {config.images_per_step}',
            {'train_images': count, 'test_images': len(test_part), 'classes': len(self.categories),
             'parameters': sum(p.numel() for p in model.parameters())})
        self.network = SumOfLosses(model)
        self.config, self.spec, self.test_part, self.group = config, spec, test_part, group

    def loss(self, network: nn.Module, batch: Any, part: ForwardPass) -> torch.Tensor:
        images, targets = batch
        torch.manual_seed(mix_seed(self.config.seed, 'detection', part.number, self.group.rank))
        return network([image / 255 for image in images], targets)

    def settle(self, network: nn.Module) -> torch.Tensor:
        network.train()
        for module in network.modules():
            if isinstance(module, _BatchNorm):
                module.eval()  # an empty image leaves their statistics as they are
        target = {'boxes': torch.tensor([[0.0, 0.0, 32.0, 32.0]]), 'labels': torch.tensor([1]),
                  'masks': torch.ones(1, *self.config.canvas, dtype=torch.uint8)}
        image = torch.zeros(self.spec.channels, *self.config.canvas, device=self.group.device)
        return network([image], [{name: value.to(self.group.device) for name, value in target.items()}])

    def evaluate(self, model: ViTMaskRCNN) -> Evaluation:
        model.eval()
        return evaluation_of(evaluate(
            model, self.test_part, self.categories, precision=self.config.precision, workers=self.config.loaders,
            group=self.group))


class SumOfLosses(nn.Module):
    """A detector in training as one module with one loss, for DistributedDataParallel."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, images: list[torch.Tensor], targets: list[dict[str, torch.Tensor]]) -> torch.Tensor:
        return sum(self.model(images, targets).values())
