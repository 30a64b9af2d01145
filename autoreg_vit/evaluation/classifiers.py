"""Classifiers of frozen features: nearest neighbours and linear ones."""

import math
from typing import Protocol

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn
from torch.nn.functional import cross_entropy

from ..data.samples import Samples
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
        encoder: torch.nn.Module,
        train: Samples,
        test: Samples,
        device: torch.device,
        precision: str = 'float32',
        workers: int = 0,
) -> dict[str, float]:
    """kNN and linear accuracy on `test`, in percent, of classifiers fitted on `train`. Images that cannot be read are
    left out of both, and counted on the standard output."""
    fitted = extract_features(encoder, Readable(train), device, precision, workers=workers)
    tested = extract_features(encoder, Readable(test), device, precision, workers=workers)
    total, used = len(train) + len(test), len(fitted[1]) + len(tested[1])
    if used < total:
        say(f'{total - used} of {total} images cannot be read, and are left out of the accuracies.')
    return {'knn': knn_accuracy(fitted, tested), 'linear': linear_accuracy(fitted, tested)}


class Head(Protocol):
    """A linear classifier that standardises features first, by a batch norm of its own or by its weights alone."""

    @property
    def norm(self) -> nn.BatchNorm1d | None:
        """Without weights."""

    @property
    def linear(self) -> nn.Linear:
        """From features to logits."""


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
    def copy_to(self, head: Head) -> None:
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
