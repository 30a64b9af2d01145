"""How good an encoder's features are: kNN and linear accuracy on frozen features."""

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch.utils.data import DataLoader, Dataset

from .progress import with_progress
from .runtime import autocast


@torch.no_grad()
def extract_features(
        encoder: torch.nn.Module,
        dataset: Dataset,
        device: torch.device,
        precision: str = 'float32',
        batch_size: int = 256,
        workers: int = 0,
        shown: bool = True,
) -> tuple[np.ndarray, np.ndarray]:
    """Pooled features float32 [images, width] and labels [images]; the encoder runs with plain attention. `shown`: with
    a progress bar."""
    was_training = encoder.training
    encoder.eval()
    features, labels = [], []
    for images, targets in with_progress(DataLoader(dataset, batch_size, num_workers=workers), 'features', shown):
        with autocast(precision, device):
            tokens = encoder.forward_features(images.to(device))
            features.append(encoder.forward_head(tokens, pre_logits=True).float().cpu())
        labels.append(targets)
    encoder.train(was_training)
    return torch.cat(features).numpy(), torch.cat(labels).numpy()


def knn_accuracy(train: tuple[np.ndarray, np.ndarray], test: tuple[np.ndarray, np.ndarray], k: int = 20) -> float:
    """Percent right by the k nearest neighbours in cosine similarity s, weighted by exp(s / 0.07) as is usual for
    self-supervised features (Wu et al. 2018)."""
    classifier = KNeighborsClassifier(
        min(k, len(train[1])), metric='cosine', algorithm='brute', weights=lambda distance: np.exp(-distance / 0.07))
    return 100 * classifier.fit(*train).score(*test)


def linear_accuracy(train: tuple[np.ndarray, np.ndarray], test: tuple[np.ndarray, np.ndarray]) -> float:
    """Percent right by L2-regularised logistic regression (C = 1) on standardised features."""
    classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    return 100 * classifier.fit(*train).score(*test)


def accuracies(
        encoder: torch.nn.Module,
        train: Dataset,
        test: Dataset,
        device: torch.device,
        precision: str = 'float32',
        workers: int = 0,
) -> dict[str, float]:
    """kNN and linear accuracy on `test`, in percent, of classifiers fitted on `train`."""
    fitted = extract_features(encoder, train, device, precision, workers=workers)
    tested = extract_features(encoder, test, device, precision, workers=workers)
    return {'knn': knn_accuracy(fitted, tested), 'linear': linear_accuracy(fitted, tested)}
