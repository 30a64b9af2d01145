"""How good an encoder's features are: kNN and linear accuracy on frozen features."""

from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset, default_collate

from ..data.checks import image_name
from ..data.images import DAMAGE
from ..data.loaders import InOrder
from ..data.samples import Samples, some
from ..engine.machine import autocast
from ..engine.processes import Processes
from ..engine.progress import with_progress
from ..errors import DataError
from ..models.interface import as_timm


class Readable(Dataset):
    """Samples of a map-style data set, None in place of one that cannot be read."""

    def __init__(self, dataset: Samples):
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
        encoder: nn.Module, dataset: Samples, device: torch.device, precision: str = 'float32', batch_size: int = 256,
        workers: int = 0, shown: bool = True,
) -> tuple[np.ndarray, np.ndarray]:
    """Pooled features float32 [images, width] and labels [images], without those that the data set gives None for; the
    encoder runs with plain attention. `shown`: with a progress bar.

    Raises:
        DataError: where none of the images can be read.
    """
    was_training = encoder.training
    encoder.eval()
    features, labels = [], []
    for batch in with_progress(InOrder(dataset, batch_size, workers, _collate_readable), 'features', shown):
        if batch is not None:
            with autocast(precision, device):
                features.append(features_of(encoder, batch[0].to(device)).float().cpu())
            labels.append(batch[1])
    encoder.train(was_training)
    if not len(dataset):  # the part of a process that had none to share
        return np.empty((0, as_timm(encoder).head_hidden_size), np.float32), np.empty(0, np.int64)
    if not labels:
        raise DataError(f'None of the {len(dataset)} images to compute features of can be read, of which '
                        f'{image_name(dataset, 0)} is the first: mend or remove them.')
    return torch.cat(features).numpy(), torch.cat(labels).numpy()


def _collate_readable(samples: list) -> list[torch.Tensor] | None:
    samples = [sample for sample in samples if sample is not None]
    return default_collate(samples) if samples else None


def images_at_once(device: torch.device) -> int:
    """Images of a forward pass without gradients: more on a CPU leave its caches (ViT-Tiny at 32 pixels, 64 images: 71
    a second a core, 256 images: 56)."""
    return 64 if device.type == 'cpu' else 256


class Features(NamedTuple):
    """Pooled features of images, float32 [images, width], and their labels, int64 [images], on the CPU."""
    features: torch.Tensor
    labels: torch.Tensor


def gather_features(
        encoder: nn.Module, dataset: Samples, *, precision: str, workers: int, group: Processes,
) -> Features | None:
    """Features of all images on the main process, None on the others; every process computes its part."""
    part = some(dataset, range(group.rank, len(dataset), group.world_size))
    found = extract_features(
        encoder, part, group.device, precision, images_at_once(group.device), workers, group.is_main)
    if group.world_size == 1:
        return Features(*map(torch.from_numpy, found))
    parts = group.gather(found)
    if parts is None:
        return None
    features, labels = np.empty((len(dataset), found[0].shape[1]), np.float32), np.empty(len(dataset), np.int64)
    for rank, (their_features, their_labels) in enumerate(parts):
        features[rank::group.world_size], labels[rank::group.world_size] = their_features, their_labels
    return Features(torch.from_numpy(features), torch.from_numpy(labels))


@torch.no_grad()
def features_of(encoder: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Pooled features of images, [B, width]."""
    network = as_timm(encoder)
    return network.forward_head(network.forward_features(images), pre_logits=True)
