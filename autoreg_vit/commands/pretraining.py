"""`autoreg-vit pretrain`: the command, what it learns, and the parts of both."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import IterableDataset

from .. import ops
from ..artifacts import write_checksum, writing
from ..data.batches import Batches
from ..data.checks import check_images
from ..data.labelled import Images, NoLabels, open_splits, say_untrained, some_of
from ..data.on_device import DeviceBatches, DeviceImages, SeveralSizes, suits_device
from ..data.order import check_divisible
from ..data.reading import NormalisedBatches, choose_reader, read_by_torchvision
from ..data.samples import Samples, some
from ..data.sources import open_split
from ..data.transforms import ImageSpec, evaluation_transform, training_transform
from ..engine.choices import choices_of
from ..engine.log import Log
from ..engine.objective import Evaluation, Objective, Part
from ..engine.processes import Processes, processes
from ..engine.progress import say
from ..engine.run import Run, begun_with
from ..engine.seeding import mix_seed
from ..engine.trainer import Trainer, prepare
from ..errors import ConfigError, ModelError
from ..evaluation.classifiers import accuracies
from ..evaluation.features import Readable
from ..evaluation.metrics import METRICS
from ..figures import pictures, plots
from ..hub.folders import export_encoder, export_pretraining
from ..models import AutoregressiveViT, create_pretraining_model, interface, pretraining_models
from ..settings.pretraining import PretrainConfig


def pretrain(config: PretrainConfig) -> Path:
    """Pretrain a model, or resume its run, and leave behind its weights, logs and figures.

    Under torchrun every process calls this, and they train together.

    Args:
        config: Settings of the run. Where `output_dir` holds an unfinished run with these settings, it goes on from its
            last checkpoint and ends in the weights it would have ended in.

    Returns:
        The run's folder: `config.yaml`, `log.jsonl`, `last.pt`, `encoder/` and `pretrain/` (timm `local-dir:` folders)
        and `figures/`.

    Raises:
        UsageError: for settings, data or a model that cannot work, before training begins.
        NonFiniteLoss: when training diverges.
        Stopped: when SIGTERM or SIGINT asked for it, after a checkpoint.
    """
    with processes(config.device) as group, ops.implementation(config.impl):
        return _pretrain(dataclasses.replace(config), group)


def _pretrain(config: PretrainConfig, group: Processes) -> Path:
    # The machine. Every draw from here on is a function of the seed and of what it is for.
    prepare(config, group)

    # The model.
    check_untrained(config.model)
    model = create_pretraining_model(config.model, **config.model_options()).to(group.device)
    model.set_grad_checkpointing(config.grad_checkpointing)
    spec, attention = ImageSpec.of(model), attention_of(model, config, group.device)

    # The data.
    resolve_data(config)
    if config.reader == 'auto':  # a resumed run goes on as it began
        config.reader = begun_with(config, 'reader', group) or 'auto'
    check_divisible(config.batch_size, group)
    batches = training_batches(config, spec, group)
    labelled = labelled_sets(config, spec, group)
    train_images = batches.sampler.length if batches.sampler else None

    # What is learned, and the run: begun, resumed, or found finished.
    title = (f'{config.model} on {config.dataset}: {train_images or "streamed"} images, {config.epochs} epochs of '
             f'{batches.per_epoch // config.accumulate} steps of {config.images_per_step} images')
    about = {'attention': attention, 'train_images': train_images or 0}
    objective = Pretraining(config, model, spec, labelled, group, title, about)
    trainer = Trainer(config, objective, batches, group)
    facts = {'train_images': train_images, 'workers': None if batches.sampler else config.loaders}
    with Run(config, f'{config.model}-{Path(config.data_name).name}', group, facts, trainer.steps) as run:
        if run.finished:
            run.say(f'The run in {run.folder} is finished: its weights are in {run.folder / "encoder"} and '
                    f'{run.folder / "pretrain"}. Name another --output-dir for a new one.')
            return run.folder
        trainer.run(run)
        whole = trainer.export(run.folder)
        if group.is_main:
            torch.manual_seed(mix_seed(config.seed, 'figures'))
            examples_from = labelled[1] if labelled else open_split(
                config, config.train_split, evaluation_transform(spec))
            with writing(run.folder):
                draw_figures(whole, run.log, examples_from, spec, run.folder / 'figures')
            report(run)
        run.finish()
        return run.folder


class Pretraining(Objective[AutoregressiveViT]):
    """Autoregressive pretraining: each segment of an image is predicted from those before it.

    Args:
        config: Settings of the run.
        model: The model, on the device.
        spec: Images that it takes.
        labelled: Data sets to fit and to test classifiers of frozen features on, or None.
        group: The processes.
        title: As `Objective` has it.
        about: As `Objective` has it; the numbers of parameters are added.
    """
    evaluated_untrained = True

    def __init__(
            self,
            config: PretrainConfig,
            model: AutoregressiveViT,
            spec: ImageSpec,
            labelled: tuple[Samples, Samples] | None,
            group: Processes,
            title: str = '',
            about: dict[str, Any] | None = None,
    ):
        super().__init__(model, title, {
            **(about or {}), 'parameters': sum(p.numel() for p in model.parameters()),
            'encoder_parameters': sum(p.numel() for p in model.encoder.parameters())})
        self.config, self.spec, self.labelled, self.group = config, spec, labelled, group
        self.share = group.share(config.batch_size)
        # A product and a sum for each parameter and token, and twice as much backward.
        self.flops_per_image = 6.0 * sum(p.numel() for p in model.parameters()) * model.encoder.patch_embed.num_patches
        self.generators = [torch.Generator(group.device)]

    def seed(self, step: int) -> None:
        self.generators[0].manual_seed(mix_seed(self.config.seed, 'ranks', step))
        torch.manual_seed(mix_seed(self.config.seed, 'dropout', step, self.group.rank))

    def loss(self, network: nn.Module, batch: Any, part: Part) -> torch.Tensor:
        if part.place == 0:
            # Orders are drawn for the whole step, so that no sharing out of its images changes them.
            self._ranks = self.model.draw_ranks(
                self.config.images_per_step, generator=self.generators[0], device=self.group.device
            ).split(self.config.batch_size)
        return network(batch[0], self._ranks[part.place][self.share]).loss

    def settle(self, network: nn.Module) -> torch.Tensor:
        nothing = self.spec.nothing(self.share.stop - self.share.start, self.group.device)
        return network(nothing, self.model.draw_ranks(len(nothing), device=self.group.device)).loss

    def evaluate(self, model: AutoregressiveViT) -> Evaluation:
        if self.labelled is None or not self.group.is_main:
            return Evaluation({})
        scores = accuracies(model.encoder, *self.labelled, self.group.device, self.config.precision,
                            self.config.loaders)
        return Evaluation(scores, 'kNN {knn:.1f} %, linear {linear:.1f} %'.format(**scores))

    def export(self, model: AutoregressiveViT, folder: Path) -> None:
        with writing(folder):
            export_encoder(model.encoder, folder / 'encoder', mean=self.spec.mean, std=self.spec.std)
            export_pretraining(model, folder / 'pretrain', mean=self.spec.mean, std=self.spec.std)
            for name in ('encoder', 'pretrain'):
                write_checksum(folder / name / 'model.safetensors')


def resolve_data(config: PretrainConfig) -> None:
    """Resolve the settings of data that depend on others, in place."""
    config.dataset = config.dataset or ('digits' if config.data_dir is None else 'folder')
    config.crop_scale = config.crop_scale or ((0.67, 1.0) if config.is_saim else (0.2, 1.0))


def check_untrained(model: str) -> None:
    """Raise ModelError for a model's name with a tag, which would pass for where training began."""
    name, _, tag = model.partition('.')
    if tag and name in pretraining_models():
        raise ModelError(f'--model {model}: pretraining begins from random weights and takes no tag. Use --model '
                         f'{name}, or finetune, probe, segment or detect with the weights of the tag.')


def draw_figures(
        model: AutoregressiveViT,
        log: Log,
        examples_from: Samples | IterableDataset,
        spec: ImageSpec,
        folder: Path,
) -> None:
    """loss.png, serialization.png, reconstruction.png and loss_by_rank.png."""
    folder.mkdir(exist_ok=True)
    images = _examples(examples_from, 256)
    plots.loss_figure(log.lines, folder / 'loss.png')
    pictures.serialization_figure(model, images[:2], spec, folder / 'serialization.png')
    pictures.reconstruction_figure(pictures.reconstruct(model, images[:6]), spec, folder / 'reconstruction.png')
    by_rank = plots.loss_by_rank(model, images)
    log.write(event='loss_by_rank', loss_by_rank=[round(loss, 5) for loss in by_rank.mean.tolist()],
              tokens=by_rank.tokens.tolist())
    plots.loss_by_rank_figure(model, by_rank, folder / 'loss_by_rank.png')


def _examples(dataset: Samples | IterableDataset, most: int) -> torch.Tensor:
    """Up to `most` images [B, C, H, W], spread over the data set, of those that can be read."""
    if isinstance(dataset, IterableDataset):
        return torch.stack([image for (image, _), _ in zip(dataset, range(most))])
    readable, places = Readable(dataset), torch.linspace(0, len(dataset) - 1, min(most, len(dataset))).long().tolist()
    return torch.stack([sample[0] for i in places if (sample := readable[i]) is not None])


def training_batches(
        config: PretrainConfig,
        spec: ImageSpec,
        group: Processes,
) -> Batches | NormalisedBatches | DeviceBatches:
    """Batches of the training split, from its files or from images kept on the device; resolves `reader` in place."""
    def opened(transform: Callable) -> Samples | IterableDataset:
        dataset = open_split(
            config, config.train_split, transform, training=True, batch_size=config.batch_size // group.world_size,
            seed=config.seed, images=config.train_images)
        group.on_main(lambda: check_images(dataset, config.check_images, config.max_corrupt))
        return dataset

    def used(dataset: Samples | IterableDataset) -> Samples | IterableDataset:
        if config.train_images is None or isinstance(dataset, IterableDataset):
            return dataset
        return some(dataset, some_of(np.arange(len(dataset)), config.train_images, config.seed).tolist())

    assert config.crop_scale is not None  # by here the method's own
    keeps = choices_of(config.output_dir).get('cache_on_device') if config.cache_on_device == 'auto' else (
        config.cache_on_device)
    by_file = config.reader == 'torchvision' and config.cache_on_device == 'auto'
    if not by_file and (keeps or (keeps is None and group.device.type == 'cuda')):
        pictures = used(opened(lambda image: image))
        # One process decides for all: their memory may differ, and their batches must not.
        if bool(keeps) or group.on_main(lambda: suits_device(pictures, spec, group.device)):
            try:
                images = DeviceImages(pictures, spec, group.device, config.max_corrupt)
            except SeveralSizes:  # which the first image did not tell
                if keeps:
                    raise
            else:
                config.reader = 'pil'
                return DeviceBatches(images, config.batch_size, config.accumulate, config.seed, group,
                                     config.crop_scale, config.hflip)
    dataset = opened(training_transform(spec, config.crop_scale, config.hflip))
    config.reader = choose_reader(config.reader, dataset)
    if config.reader == 'torchvision':
        read_by_torchvision(dataset, spec, config.crop_scale, config.hflip)
    batches = Batches(used(dataset), config.batch_size, config.seed, group, config.loaders, config.accumulate,
                      config.max_corrupt)
    return NormalisedBatches(batches, spec, group.device) if config.reader == 'torchvision' else batches


def labelled_sets(
        config: PretrainConfig,
        spec: ImageSpec,
        group: Processes,
) -> tuple[Images, Images] | None:
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
    fitted, tested = splits.train, splits.test
    return Images(fitted.dataset, fitted.indices, transform), Images(tested.dataset, tested.indices, transform)


def attention_of(model: AutoregressiveViT, config: PretrainConfig, device: torch.device) -> str:
    """The implementation of segment attention that the encoder will run on, tried out."""
    attention = interface.attention_of(interface.blocks_of(model.encoder)[0])
    tokens, heads, width = model.encoder.patch_embed.num_patches, attention.num_heads, attention.head_dim
    q = torch.zeros(1, tokens, heads, width, dtype=getattr(torch, config.precision), device=device)
    ops.segment_attention(q, q, q, torch.ones(1, tokens, dtype=torch.int32, device=device), impl=config.impl)
    return ops.choose_implementation(q, q)


def report(run: Run) -> None:
    """Say what a finished run has come to, and how to load it."""
    lines, folder = run.log.lines, run.folder
    evaluations = [line for line in lines if line['event'] == 'evaluation']
    losses = [line['loss'] for line in lines if line['event'] == 'step']
    if losses:  # a log that was removed beside a whole checkpoint has none
        run.say(f'\nLoss {losses[0]:.4f} at the start, {losses[-1]:.4f} at the end.')
    if evaluations and evaluations[0]['images'] == 0:
        before, after = evaluations[0], evaluations[-1]
        run.say('Accuracy of frozen features   untrained   pretrained')
        for metric in ('knn', 'linear'):
            run.say(f'  {METRICS[metric].label:<26}{before[metric]:9.1f} %{after[metric]:11.1f} %')
    run.say(f'Figures: {folder / "figures"}')
    run.say('Load the encoder, with timm alone:\n'
            f"  timm.create_model('local-dir:{folder / 'encoder'}', pretrained=True)")

