"""How good an encoder's features are: kNN and linear accuracy on frozen features."""

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch.utils.data import Dataset, default_collate

from ..errors import DataError
from .data import image_name
from .images import DAMAGE
from .loading import InOrder
from .progress import say, with_progress
from .runtime import autocast


class Readable(Dataset):
    """Samples of a map-style data set, None in place of one that cannot be read."""

    def __init__(self, dataset: Dataset):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple | None:
        try:
            return self.dataset[index]
        except DAMAGE:
            return None

    def filename(self, index: int) -> str:
        """File of an image where its data set knows it."""
        return image_name(self.dataset, index)


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
    """Pooled features float32 [images, width] and labels [images], without those that the data set gives None for; the
    encoder runs with plain attention. `shown`: with a progress bar.

    Raises:
        DataError: where no image is left.
    """
    was_training = encoder.training
    encoder.eval()
    features, labels = [], []
    loader = InOrder(dataset, batch_size, workers, _collate_readable)
    for batch in with_progress(loader, 'features', shown):
        if batch is None:
            continue
        images, targets = batch
        with autocast(precision, device):
            tokens = encoder.forward_features(images.to(device))
            features.append(encoder.forward_head(tokens, pre_logits=True).float().cpu())
        labels.append(targets)
    encoder.train(was_training)
    if not labels:
        raise DataError(f'None of the {len(dataset)} images to compute features of can be read, of which '
                        f'{image_name(dataset, 0)} is the first: mend or remove them.')
    return torch.cat(features).numpy(), torch.cat(labels).numpy()


def _collate_readable(samples: list) -> list[torch.Tensor] | None:
    samples = [sample for sample in samples if sample is not None]
    return default_collate(samples) if samples else None


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
        train: Dataset,
        test: Dataset,
        device: torch.device,
        precision: str = 'float32',
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
