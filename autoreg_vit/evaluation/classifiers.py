"""Classifiers of frozen features: nearest neighbours and linear ones."""

import math
from typing import NamedTuple

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn
from torch.nn.functional import cross_entropy

from ..data.samples import Samples
from ..engine.processes import Processes
from ..engine.progress import say, with_progress
from ..engine.seeding import mix_seed
from ..settings.classification import ProbeConfig
from .features import Features, Readable, extract_features


def knn_accuracy(train: tuple[np.ndarray, np.ndarray], test: tuple[np.ndarray, np.ndarray], k: int = 20) -> float:
    """Percent right by the k nearest neighbours in cosine similarity s, weighted by exp(s / 0.07) as is usual for
    self-supervised features (Wu et al. 2018)."""
    classifier = KNeighborsClassifier(
        min(k, len(train[1])), metric='cosine', algorithm='brute', weights=lambda distance: np.exp(-distance / 0.07))
    return 100 * classifier.fit(*train).score(*test)


def linear_accuracy(train: tuple[np.ndarray, np.ndarray], test: tuple[np.ndarray, np.ndarray]) -> float:
    """Percent right by L2-regularised logistic regression (C = 1) on standardised features; of a single class,
    that class is always the answer."""
    if len(np.unique(train[1])) == 1:  # which scikit-learn's solver refuses
        return 100 * float(np.mean(test[1] == train[1][0]))
    classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    return 100 * classifier.fit(*train).score(*test)


def accuracies(
        encoder: nn.Module, train: Samples, test: Samples, device: torch.device, precision: str = 'float32',
        workers: int = 0,
) -> dict[str, float]:
    """kNN and linear accuracy on `test`, in percent, of classifiers fitted on `train`. Images that cannot be read are
    left out of both, and counted on the standard output."""
    fitted, tested = (extract_features(encoder, Readable(part), device, precision, workers=workers)
                      for part in (train, test))
    total, used = len(train) + len(test), len(fitted[1]) + len(tested[1])
    if used < total:
        say(f'{total - used} of {total} images cannot be read, and are left out of the accuracies.')
    return {'knn': knn_accuracy(fitted, tested), 'linear': linear_accuracy(fitted, tested)}


class LinearHead(nn.Module):
    """A linear classifier of features, after a batch norm without parameters where asked for (SAIM "Image
    classification", MAE). Features are frozen, so that its statistics are over the batch of all processes. The initial
    weights are of standard deviation 0.01, as in MoCo v3 and SAIM's published code."""

    def __init__(self, width: int, classes: int, batch_norm: bool, seed: int, group: Processes):
        super().__init__()
        self.norm = nn.BatchNorm1d(width, eps=1e-6, affine=False) if batch_norm else None
        self.linear = nn.Linear(width, classes)
        self.group = group
        nn.init.trunc_normal_(self.linear.weight, std=0.01, generator=torch.Generator().manual_seed(seed))
        nn.init.zeros_(self.linear.bias)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Logits [B, classes] of features [B, width]."""
        return self.linear(features if self.norm is None else self._normalise(features, self.norm))

    def _normalise(self, features: torch.Tensor, norm: nn.BatchNorm1d) -> torch.Tensor:
        if not self.training or self.group.world_size == 1:
            return norm(features)
        mean = self.group.mean(features.mean(0))
        variance = self.group.mean((features - mean).square().mean(0))
        count = len(features) * self.group.world_size
        assert norm.running_mean is not None and norm.running_var is not None and norm.momentum is not None
        assert norm.num_batches_tracked is not None  # all of which a batch norm keeps by default
        with torch.no_grad():
            norm.running_mean.lerp_(mean, norm.momentum)
            norm.running_var.lerp_(variance * count / (count - 1), norm.momentum)
            norm.num_batches_tracked += 1
        return (features - mean) * (variance + norm.eps).rsqrt()


class Bank(NamedTuple):
    """Linear classifiers, `weight` [classifiers, width + 1, classes] with the bias as the last row, of the same
    features, standardised by `mean` and `std` [width]."""
    weight: torch.Tensor
    mean: torch.Tensor
    std: torch.Tensor

    @torch.no_grad()
    def accuracies(self, data: Features) -> list[float]:
        """Percent right of each classifier; 0 for one whose weights are not finite."""
        features = (data.features - self.mean) / self.std
        logits = features @ self.weight[:, :-1] + self.weight[:, -1:]  # [classifiers, images, classes]
        right = 100 * (logits.argmax(2) == data.labels).float().mean(1)
        return torch.where(self.weight.isfinite().all(2).all(1), right, 0.0).tolist()

    @torch.no_grad()
    def copy_to(self, head: LinearHead) -> None:
        """Make `head` the first classifier, with the standardisation in its norm or its weights."""
        weight, bias = self.weight[0, :-1].T, self.weight[0, -1]  # [classes, width], [classes]
        if head.norm is not None:
            assert head.norm.running_mean is not None and head.norm.running_var is not None
            head.norm.running_mean.copy_(self.mean)
            head.norm.running_var.copy_(self.std.square() - head.norm.eps)
        else:
            weight = weight / self.std
            bias = bias - weight @ self.mean
        head.linear.weight.copy_(weight)
        head.linear.bias.copy_(bias)


def fit_bank(data: Features, rates: list[float], classes: int, config: ProbeConfig) -> Bank:
    """Fit a classifier at each of the learning rates of a step, all at once, on the device of the data; `config` gives
    epochs, batch, momentum, weight decay and seed."""
    mean, std = data.features.mean(0), data.features.std(0).clamp_min(1e-6)
    device, (count, width) = data.features.device, data.features.shape
    features = torch.cat([(data.features - mean) / std, torch.ones(count, 1, device=device)], dim=1)
    lr = torch.tensor(rates, device=device).view(-1, 1, 1)
    weight = torch.zeros(len(rates), width + 1, classes, device=device, requires_grad=True)
    momentum = torch.zeros_like(weight)
    decay = torch.ones(width + 1, 1, device=device)
    decay[-1] = 0
    batch = min(config.batch_size * config.accumulate, count)
    steps = config.epochs * (count // batch)
    for epoch in with_progress(range(config.epochs), 'fitting', unit='epoch'):
        generator = torch.Generator().manual_seed(mix_seed(config.seed, 'fast', epoch))
        order = torch.randperm(count, generator=generator).to(device)
        for number in range(count // batch):
            some = order[number * batch:(number + 1) * batch]
            logits = features[some] @ weight  # [rates, batch, classes]
            loss = cross_entropy(logits.flatten(0, 1), data.labels[some].repeat(len(rates)), reduction='sum') / batch
            gradient, = torch.autograd.grad(loss, weight)
            with torch.no_grad():
                gradient += config.weight_decay * decay * weight
                momentum.mul_(config.momentum).add_(gradient)
                done = (epoch * (count // batch) + number) / steps
                weight -= lr * (0.5 + 0.5 * math.cos(math.pi * done)) * momentum
    return Bank(weight, mean, std)
