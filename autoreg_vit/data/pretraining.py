"""Images of a pretraining run: to train on, from their files or kept on the device, and to measure the features by."""

from collections.abc import Callable

import numpy as np
from torch.utils.data import IterableDataset

from ..engine.choices import begun_with
from ..engine.processes import Processes
from ..engine.progress import say
from ..errors import ConfigError
from ..settings.pretraining import PretrainConfig
from .batches import Batches, batches_of
from .checks import check_images
from .labelled import Images, NoLabels, open_splits, say_untrained, some_of
from .on_device import DeviceBatches, DeviceImages, SeveralSizes, suits_device
from .samples import Samples, some
from .sources import open_split
from .torchvision_reader import NormalisedBatches, choose_reader, read_by_torchvision
from .transforms import ImageSpec, evaluation_transform, training_transform


def training_batches(
        config: PretrainConfig, spec: ImageSpec, group: Processes,
) -> Batches | NormalisedBatches | DeviceBatches:
    """Batches of the training split, from its files or from images kept on the device; resolves `reader` in place."""
    assert config.crop_scale is not None  # by here the method's own
    images = images_on_device(config, spec, group)
    if images is not None:
        config.reader = 'pil'
        return DeviceBatches(images, config.batch_size, config.accumulate, config.seed, group, config.crop_scale,
                             config.hflip)
    dataset = _open(config, training_transform(spec, config.crop_scale, config.hflip), group)
    config.reader = choose_reader(config.reader, dataset)
    if config.reader == 'pil':
        return batches_of(config, _used(config, dataset), group)
    read_by_torchvision(dataset, spec, config.crop_scale, config.hflip)
    return NormalisedBatches(batches_of(config, _used(config, dataset), group), spec, group.device)


def images_on_device(config: PretrainConfig, spec: ImageSpec, group: Processes) -> DeviceImages | None:
    """All training images, kept on the device because that was asked for, the run began so, or they suit a GPU; None
    for a run that reads its files again in every epoch."""
    asked = config.cache_on_device
    if asked == 'auto':
        if config.reader == 'torchvision':  # which reads files
            return None
        asked = begun_with(config.output_dir, type(config)).get('cache_on_device', 'auto')
    if asked is False or (asked == 'auto' and group.device.type != 'cuda'):
        return None
    dataset = _used(config, _open(config, lambda image: image, group))
    # One process decides for all: their memory may differ, and their batches must not.
    if asked == 'auto' and not group.on_main(lambda: suits_device(dataset, spec, group.device)):
        return None
    try:
        return DeviceImages(dataset, spec, group.device, config.max_corrupt)
    except SeveralSizes:  # which the first image did not tell
        if asked is True:
            raise
        return None


def _open(config: PretrainConfig, transform: Callable, group: Processes) -> Samples | IterableDataset:
    """The training split, some of its images tried out."""
    dataset = open_split(
        config, config.train_split, transform, training=True, batch_size=config.batch_size // group.world_size,
        seed=config.seed, images=config.train_images)
    group.on_main(lambda: check_images(dataset, config.check_images, config.max_corrupt))
    return dataset


def _used(config: PretrainConfig, dataset: Samples | IterableDataset) -> Samples | IterableDataset:
    """As many of the images as are asked for; a stream counts its own."""
    if config.train_images is None or isinstance(dataset, IterableDataset):
        return dataset
    return some(dataset, some_of(np.arange(len(dataset)), config.train_images, config.seed).tolist())


def labelled_sets(config: PretrainConfig, spec: ImageSpec, group: Processes) -> tuple[Images, Images] | None:
    """Data sets to fit and to test classifiers on, or None without labels. Of a held-out fifth the encoder has seen the
    images in pretraining, and the classifiers have not seen the labels."""
    try:
        splits = open_splits(config, config.eval_images, config.eval_images)
    except NoLabels as error:
        if config.eval_split:
            raise ConfigError(f'eval_split={config.eval_split!r} needs labels: {error} Or leave it out.') from error
        if group.is_main:
            say(f'No accuracies will be reported, for want of labels: {error}')
        return None
    if config.eval_split:
        group.on_main(lambda: check_images(splits.test.dataset, config.check_images, config.max_corrupt))
    group.on_main(lambda: say_untrained(splits))
    transform = evaluation_transform(spec)
    return splits.train.under(transform), splits.test.under(transform)
