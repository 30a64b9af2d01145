"""`autoreg-vit probe`: how good frozen features are, by linear probing (RandSAC Table 16) and nearest neighbours."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset

from ..artifacts import save_tensors, writing
from ..data.batches import batches_of
from ..data.labelled import LabelledImages, hold_out, labelled_images, some_of
from ..data.samples import some
from ..data.transforms import ImageSpec
from ..engine.objective import Evaluation, ForwardPass, Objective
from ..engine.processes import Processes
from ..engine.run import Run
from ..engine.trainer import Trainer
from ..evaluation.cached import cached_features
from ..evaluation.class_scores import evaluate
from ..evaluation.classifiers import LinearHead, fit_bank, knn_accuracy
from ..evaluation.features import Features, features_of, gather_features, images_at_once
from ..evaluation.metrics import describe, scores
from ..hub.lookup import load_encoder, short_name
from ..models.interface import as_timm
from ..settings.classification import ProbeConfig
from .runs import begun, evaluation_of, finished, leave_results


def probe(config: ProbeConfig) -> Path:
    """Evaluate an encoder's frozen features, or resume its run. Under torchrun every process calls this.
    The settings' defaults are RandSAC's Table 16 with a smaller batch.

    Returns:
        The run's folder: `config.yaml`, `log.jsonl`, `last.pt`, `results.json`, `classifier.safetensors` and
        `figures/`; with `fast` the cached features in place of a checkpoint.

    Raises:
        UsageError: for settings, data or weights that cannot work, before training begins.
        NonFiniteLoss: when training diverges.
        Stopped: when SIGTERM or SIGINT asked for it, after a checkpoint.
    """
    with begun(config) as (config, group):
        # Data and model, all checked before anything is written.
        encoder = load_encoder(config.weights, config.pretrained, num_classes=0, **config.model_options())
        images = labelled_images(config, ImageSpec.of(encoder, config.in_chans), group)
        encoder.to(group.device).eval().requires_grad_(False)
        objective = Probing(config, encoder, images, group)
        trainer = None if config.fast else Trainer(config, objective, batches_of(config, images.train, group), group)

        # The run, and what it leaves.
        facts, steps = {'train_images': len(images.train)}, trainer.steps if trainer else None
        with Run(config, f'probe-{short_name(config.weights)}', group, facts, steps) as run:
            if finished(run):
                return run.folder
            if trainer is None:
                run.start(config.precision, **objective.about)
                run.say(f'{objective.title}; {group.world_size} x {group.device}, {config.precision}; writing to '
                        f'{run.folder}')
                train_set, test = cached_features(
                    run, encoder, images, precision=config.precision, workers=config.loaders)
                result, more = fit_features(config, run, objective.model, train_set, test)
            else:
                result, more = trainer.run(run).result, {'epochs': config.epochs, 'optimizer': config.opt}
                if config.knn:
                    searched = some_of(np.arange(len(images.plain)), config.knn_images, config.seed).tolist()
                    train_set, test = (
                        gather_features(encoder, part, precision=config.precision, workers=config.loaders, group=group)
                        for part in (some(images.plain, searched), images.test))
            if config.knn:
                more['knn'] = knn(config, run, train_set, test)
            if group.is_main:
                with writing(run.folder):
                    save_tensors(run.folder / 'classifier.safetensors', objective.model.state_dict())
            leave_results(run, config, result, images.classes, **facts, fast=config.fast, batch_norm=config.batch_norm,
                          global_pool=getattr(encoder, 'global_pool', None), **more)
            return run.folder


class Probing(Objective[LinearHead]):
    """A linear classifier of the features of an encoder, which is frozen, in evaluation mode and on the device."""

    def __init__(self, config: ProbeConfig, encoder: nn.Module, images: LabelledImages, group: Processes):
        count, classes, self.width = len(images.train), len(images.classes), as_timm(encoder).head_hidden_size
        super().__init__(
            LinearHead(self.width, classes, config.batch_norm, config.seed, group).to(group.device),
            f'Probing {config.weights} with {count:,} images of {classes} classes',
            {'train_images': count, 'classes': classes, 'width': self.width})
        self.config, self.encoder, self.images, self.group = config, encoder, images, group

    def optimized(self) -> tuple[Any, dict[str, Any]]:
        return lars_groups(self.model), optimizer_options(self.config)

    def loss(self, network: nn.Module, batch: Any, part: ForwardPass) -> torch.Tensor:
        images, labels = batch
        return cross_entropy(network(frozen_features(self.encoder, images)).float(), labels)

    def settle(self, network: nn.Module) -> torch.Tensor:
        # In evaluation mode, so that the batch norm takes no notice.
        return network.eval()(torch.zeros(2, self.width, device=self.group.device)).sum()

    def evaluate(self, model: LinearHead) -> Evaluation:
        model.eval()
        return evaluation_of(evaluate(
            lambda batch: model(frozen_features(self.encoder, batch)), self.images.test, len(self.images.classes),
            precision=self.config.precision, workers=self.config.loaders, group=self.group))


def lars_groups(head: LinearHead) -> list[dict[str, Any]]:
    """Weight and bias apart: LARS adapts the rate of the weight alone, as MAE's does."""
    return [{'params': [head.linear.weight]}, {'params': [head.linear.bias], 'always_adapt': False}]


def optimizer_options(config: ProbeConfig) -> dict[str, Any]:
    """timm's LARS is plain SGD without weight decay unless it is told to adapt always."""
    adaptive = {'always_adapt': True} if config.opt.lower() in ('lars', 'nlars') else {}
    momentum = {} if 'adam' in config.opt.lower() else {'momentum': config.momentum}
    return {**adaptive, **momentum}


def frozen_features(encoder: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Pooled features [B, width] of images, float32, a part of the batch at a time: without gradients a batch of
    Table 16's 16,384 needs no more memory than a small one."""
    with torch.no_grad():
        return torch.cat([features_of(encoder, part).float()
                          for part in images.split(images_at_once(images.device))])


def fit_features(
        config: ProbeConfig, run: Run, head: LinearHead, train_set: Features | None, test: Features | None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Fit `head` to cached features, on the main process: a held-out part of the training images chooses the learning
    rate, a classifier is trained at it on all of them, and the test images report. What `evaluate` gives, and what else
    the results say, on every process."""
    device = run.group.device

    def fit() -> tuple[dict[str, Any], dict[str, Any]]:
        assert train_set is not None and test is not None  # on the main process
        rates, classes = config.learning_rates, head.linear.out_features
        on_device = Features(*(t.to(device) for t in train_set))
        parts = [torch.from_numpy(i).to(device) for i in hold_out(len(train_set.labels), config.holdout, config.seed)]
        kept, held = (Features(on_device.features[i], on_device.labels[i]) for i in parts)
        trials = fit_bank(kept, [config.scaled(rate) for rate in rates], classes, config).accuracies(held)
        for rate, right in zip(rates, trials):
            run.log.write(event='sweep', lr=rate, held_out_top1=round(right, 4))
        best = int(np.argmax(trials))
        run.say(f'Of {len(rates)} learning rates {rates[best]:g} is best on {len(held.labels):,} held-out training '
                f'images: {trials[best]:.2f} %.' + (
                    ' It is at the end of the sweep: consider a wider one with --learning-rates.'
                    if len(rates) > 1 and best in (0, len(rates) - 1) else ''))
        fit_bank(on_device, [config.scaled(rates[best])], classes, config).copy_to(head)
        # The main process alone evaluates here, so it counts as the only one.
        result = evaluate(head.eval(), TensorDataset(*test), classes, precision=config.precision,
                          workers=config.loaders, group=Processes(device))
        run.log.write(event='evaluation', images=config.epochs * len(on_device.labels), test_images=result['images'],
                      **scores(result))
        return result, {'epochs': config.epochs, 'optimizer': 'sgd', 'learning_rate': rates[best],
                        'held_out_top1': round(trials[best], 4),
                        'sweep': {f'{rate:g}': round(right, 4) for rate, right in zip(rates, trials)}}

    result, more = run.group.on_main(fit)
    run.say(describe(result))
    return result, more


def knn(config: ProbeConfig, run: Run, train_set: Features | None, test: Features | None) -> float:
    """The accuracy of nearest neighbours, found on the main process, in percent."""
    def search() -> float:
        assert train_set is not None and test is not None  # on the main process
        searched = some_of(np.arange(len(train_set.labels)), config.knn_images, config.seed)
        return round(knn_accuracy((train_set.features.numpy()[searched], train_set.labels.numpy()[searched]),
                                  (test.features.numpy(), test.labels.numpy()), config.knn), 4)

    accuracy = run.group.on_main(search)
    run.say(f'{config.knn} nearest neighbours: {accuracy:.2f} %')
    return accuracy
