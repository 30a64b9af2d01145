"""Features computed once and kept: the fast probe, which sweeps learning rates on them, and nearest neighbours."""

import hashlib
import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import Dataset, Subset, TensorDataset

from ..checksums import verify_checksum, write_checksum
from .checkpoint import writing
from .distributed import Processes
from .evaluate import extract_features, knn_accuracy
from .labelled import LabelledImages, hold_out
from .loop import scaled_lr
from .progress import with_progress
from .run import Run
from .seeding import mix_seed
from .supervised import describe, evaluate, images_at_once, scores
from .supervised_config import ProbeConfig

CACHE = 'features.safetensors'


class Features(NamedTuple):
    """Pooled features of images, float32 [images, width], and their labels, int64 [images], on the CPU."""
    features: torch.Tensor
    labels: torch.Tensor


def gather_features(
        encoder: nn.Module,
        dataset: Dataset,
        config: ProbeConfig,
        group: Processes,
) -> Features | None:
    """Features of all images on the main process, None on the others; every process computes its part."""
    part = Subset(dataset, range(group.rank, len(dataset), group.world_size))
    found = extract_features(
        encoder, part, group.device, config.precision, images_at_once(group.device), config.workers,
        group.is_main)
    if group.world_size == 1:
        return Features(*map(torch.from_numpy, found))
    parts = [None] * group.world_size if group.is_main else None
    dist.gather_object(found, parts, group=group.control)
    if not group.is_main:
        return None
    features, labels = np.empty((len(dataset), found[0].shape[1]), np.float32), np.empty(len(dataset), np.int64)
    for rank, (some, their_labels) in enumerate(parts):
        features[rank::group.world_size], labels[rank::group.world_size] = some, their_labels
    return Features(torch.from_numpy(features), torch.from_numpy(labels))


def cached_features(
        config: ProbeConfig,
        run: Run,
        encoder: nn.Module,
        images: LabelledImages,
) -> tuple[Features | None, Features | None]:
    """Features of the training images without augmentation and of the test images, on the main process. They are kept
    in the run's folder and read from there when its command is repeated with the same weights."""
    path, key = run.folder / CACHE, fingerprint(encoder)
    kept = run.group.on_main(lambda: _read(path, key) is not None)
    if kept:
        run.say(f'Reading the features from {path}.')
        return _read(path, key) if run.group.is_main else (None, None)
    sets = tuple(gather_features(encoder, part, config, run.group) for part in (images.plain, images.test))
    if run.group.is_main:
        keep_features(path, key, *sets)
    return sets


def keep_features(path: Path, key: str, train_set: Features, test: Features) -> None:
    """Write features as `cached_features` finds them, to CACHE in a run's folder; `key`: the encoder's fingerprint."""
    with writing(path):
        scratch = path.with_name(path.name + '.new')
        save_file({f'{name}.{field}': value.contiguous() for name, part in (('train', train_set), ('test', test))
                   for field, value in part._asdict().items()}, scratch, metadata={'encoder': key})
        scratch.chmod(0o644)  # safetensors leaves 0600
        scratch.replace(path)
        write_checksum(path)


def _read(path: Path, key: str) -> tuple[Features, Features] | None:
    if not path.exists():
        return None
    verify_checksum(path)
    try:
        with safe_open(path, 'pt') as file:
            if (file.metadata() or {}).get('encoder') != key:
                return None
            return tuple(Features(*(file.get_tensor(f'{name}.{field}') for field in Features._fields))
                         for name in ('train', 'test'))
    except SafetensorError:
        return None  # cut short: computed anew


def fingerprint(encoder: nn.Module) -> str:
    """A hash of the encoder's weights."""
    digest = hashlib.sha256()
    for name, value in encoder.state_dict().items():
        digest.update(name.encode() + value.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()


class Bank:
    """Linear classifiers of the same standardised features, each trained at a learning rate of its own, all at once.

    Args:
        data: What they are fitted to, on the device that fits them.
        rates: Learning rates of a step, one a classifier.
        classes: How many.
        config: Gives epochs, batch, momentum, weight decay and seed.
    """

    def __init__(self, data: Features, rates: list[float], classes: int, config: ProbeConfig):
        features, labels = data
        self.mean, self.std = features.mean(0), features.std(0).clamp_min(1e-6)
        features = (features - self.mean) / self.std
        device, (count, width) = features.device, features.shape
        lr = torch.tensor(rates, device=device).view(-1, 1, 1)
        # [rates, width + 1, classes]: the last row is the bias.
        self.weight = torch.zeros(len(rates), width + 1, classes, device=device, requires_grad=True)
        momentum = torch.zeros_like(self.weight)
        decay = torch.ones(width + 1, 1, device=device)
        decay[-1] = 0
        batch = min(config.batch_size * config.accumulate, count)
        steps = config.epochs * (count // batch)
        features = torch.cat([features, torch.ones(count, 1, device=device)], dim=1)
        for epoch in with_progress(range(config.epochs), 'fitting', unit='epoch'):
            generator = torch.Generator().manual_seed(mix_seed(config.seed, 'fast', epoch))
            order = torch.randperm(count, generator=generator).to(device)
            for number in range(count // batch):
                some = order[number * batch:(number + 1) * batch]
                logits = features[some] @ self.weight  # [rates, batch, classes]
                loss = cross_entropy(logits.flatten(0, 1), labels[some].repeat(len(rates)), reduction='sum') / batch
                gradient, = torch.autograd.grad(loss, self.weight)
                with torch.no_grad():
                    gradient += config.weight_decay * decay * self.weight
                    momentum.mul_(config.momentum).add_(gradient)
                    done = (epoch * (count // batch) + number) / steps
                    self.weight -= lr * (0.5 + 0.5 * math.cos(math.pi * done)) * momentum

    @torch.no_grad()
    def accuracies(self, data: Features) -> list[float]:
        """Percent right of each classifier; 0 for one whose weights are not finite."""
        features = (data.features - self.mean) / self.std
        logits = features @ self.weight[:, :-1] + self.weight[:, -1:]  # [rates, images, classes]
        right = 100 * (logits.argmax(2) == data.labels).float().mean(1)
        return torch.where(self.weight.isfinite().all(2).all(1), right, 0.0).tolist()

    @torch.no_grad()
    def copy_to(self, head: nn.Module) -> None:
        """Make `head`, a LinearHead, the first classifier, with the standardisation in its norm or its weights."""
        weight, bias = self.weight[0, :-1].T, self.weight[0, -1]  # [classes, width], [classes]
        if head.norm is not None:
            head.norm.running_mean.copy_(self.mean)
            head.norm.running_var.copy_(self.std.square() - head.norm.eps)
        else:
            weight = weight / self.std
            bias = bias - weight @ self.mean
        head.linear.weight.copy_(weight)
        head.linear.bias.copy_(bias)


def fit_features(
        config: ProbeConfig,
        run: Run,
        head: nn.Module,
        train_set: Features | None,
        test: Features | None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Fit `head` to cached features, on the main process: a held-out part of the training images chooses the learning
    rate, a classifier is trained at it on all of them, and the test images report.

    Returns:
        What `evaluate` gives, and what else the results say, on every process.
    """
    device = run.group.device

    def fit() -> tuple[dict[str, Any], dict[str, Any]]:
        rates, classes = config.learning_rates, head.linear.out_features
        on_device = Features(*(t.to(device) for t in train_set))
        kept, held = (torch.from_numpy(i).to(device)
                      for i in hold_out(len(train_set.labels), config.holdout, config.seed))
        kept, held = (Features(on_device.features[i], on_device.labels[i]) for i in (kept, held))
        trials = Bank(kept, [scaled_lr(config, rate) for rate in rates], classes, config).accuracies(held)
        for rate, right in zip(rates, trials):
            run.log.write(event='sweep', lr=rate, held_out_top1=round(right, 4))
        best = int(np.argmax(trials))
        run.say(f'Of {len(rates)} learning rates {rates[best]:g} is best on {len(held.labels):,} held-out training '
                f'images: {trials[best]:.2f} %.' + (
                    ' It is at the end of the sweep: consider a wider one with --learning-rates.'
                    if len(rates) > 1 and best in (0, len(rates) - 1) else ''))
        Bank(on_device, [scaled_lr(config, rates[best])], classes, config).copy_to(head)
        # The main process alone evaluates here, so it counts as the only one.
        result = evaluate(head.eval(), TensorDataset(*test), classes, config, Processes(device))
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
        draw = torch.randperm(len(train_set.labels), generator=torch.Generator().manual_seed(config.seed))
        some = draw[:config.knn_images].sort().values
        return round(knn_accuracy((train_set.features[some].numpy(), train_set.labels[some].numpy()),
                                  (test.features.numpy(), test.labels.numpy()), config.knn), 4)

    accuracy = run.group.on_main(search)
    run.say(f'{config.knn} nearest neighbours: {accuracy:.2f} %')
    return accuracy
