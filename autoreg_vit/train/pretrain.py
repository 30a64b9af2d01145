"""`autoreg-vit pretrain`: the training loop, to be read from top to bottom."""

import dataclasses
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import timm
import torch
from timm.optim import create_optimizer_v2, list_optimizers
from timm.scheduler import create_scheduler_v2
from torch.utils.data import IterableDataset, Subset
from tqdm import tqdm

from .. import __version__
from ..errors import ConfigError, UsageError, suggest
from ..models import AutoregressiveViT, create_pretraining_model
from ..models.export import export_encoder, export_pretraining
from . import data, figures
from .config import PretrainConfig, save_config
from .evaluate import accuracies
from .runtime import autocast, keep_freed_memory, new_run_folder, resolve_device, resolve_precision


class NonFiniteLoss(UsageError):
    """The loss became NaN or infinite; weights of the last whole epoch are kept."""


def pretrain(config: PretrainConfig) -> Path:
    """Pretrain a model and leave behind its weights, logs and figures.

    Args:
        config: Settings of the run.

    Returns:
        The run's folder: `config.yaml`, `log.jsonl`, `encoder/` and `pretrain/` (timm `local-dir:` folders) and
        `figures/`.

    Raises:
        UsageError: for settings, data or a model that cannot work, before training begins.
        NonFiniteLoss: when training diverges.
    """
    # 1. The machine.
    config = dataclasses.replace(config)
    device = resolve_device(config.device)
    config.device, config.precision = str(device), resolve_precision(config.precision, device)
    if config.workers is None:
        config.workers = 0 if device.type == 'cpu' else min(os.cpu_count() or 1, 8)
    if device.type == 'cpu':
        keep_freed_memory()
    timm.utils.random_seed(config.seed)

    # 2. The model.
    model = create_pretraining_model(config.model, **config.model_options()).to(device)
    model.set_grad_checkpointing(config.grad_checkpointing)
    spec = data.ImageSpec.of(model)

    # 3. The data.
    if config.dataset is None:
        config.dataset = 'digits' if config.data_dir is None else 'folder'
    if config.crop_scale is None:
        config.crop_scale = (0.67, 1.0) if config.model.startswith('saim') else (0.2, 1.0)
    train_set = data.open_dataset(
        config.dataset, config.data_dir, config.train_split,
        data.training_transform(spec, config.crop_scale, config.hflip), config.download,
        training=True, batch_size=config.batch_size, seed=config.seed)
    loader = data.training_loader(train_set, config.batch_size, config.workers, config.seed, device.type == 'cuda')
    updates_per_epoch = len(loader) // config.accumulate
    if updates_per_epoch == 0:
        raise ConfigError(f'accumulate={config.accumulate} asks for more batches than the {len(loader)} of an epoch.')
    labelled = _labelled_sets(config, spec)

    # 4. The optimizer.
    optimizer = _create_optimizer(config, model)
    if config.warmup_epochs > config.epochs / 2:
        _say(f'Warm-up shortened from {config.warmup_epochs:g} to {config.epochs / 2:g} epochs, half of the run.')
        config.warmup_epochs = config.epochs / 2
    # The cosine begins where the warm-up ends (warmup_prefix) and falls to 0 at the last step.
    schedule, _ = create_scheduler_v2(
        optimizer, sched='cosine', num_epochs=config.epochs - config.warmup_epochs, warmup_prefix=True,
        warmup_epochs=config.warmup_epochs, warmup_lr=0.0, min_lr=0.0, step_on_epochs=False,
        updates_per_epoch=updates_per_epoch)

    # 5. The run.
    folder = new_run_folder(config.output_dir, f'{config.model}-{Path(config.dataset).name}')
    config.output_dir = str(folder)
    save_config(config, folder / 'config.yaml')
    log = Log(folder / 'log.jsonl')
    log.write(event='start', version=__version__, torch=torch.__version__, timm=timm.__version__, device=str(device),
              threads=torch.get_num_threads(), precision=config.precision, train_images=_length(train_set),
              parameters=sum(p.numel() for p in model.parameters()),
              encoder_parameters=sum(p.numel() for p in model.encoder.parameters()))
    _say(f'{config.model} on {config.dataset}: {_length(train_set)} images, {config.epochs} epochs of '
         f'{updates_per_epoch} steps of {config.batch_size * config.accumulate} images; {device}, {config.precision}; '
         f'writing to {folder}')

    def evaluate(images: int) -> None:
        if labelled:
            log.write(event='evaluation', images=images, **accuracies(
                model.encoder, *labelled, device, config.precision, config.workers))
            _say('{images:>9,} images seen: kNN {knn:.1f} %, linear {linear:.1f} %'.format(**log.lines[-1]))

    def save() -> None:
        export_encoder(model.encoder, folder / 'encoder', mean=spec.mean, std=spec.std)
        export_pretraining(model, folder / 'pretrain', mean=spec.mean, std=spec.std)

    evaluate(images=0)
    ranks_generator = torch.Generator(device).manual_seed(config.seed)
    images_seen = update = 0
    updates = config.epochs * updates_per_epoch
    # In a file, a line a minute instead of a bar that redraws itself.
    progress = tqdm(total=updates, unit='step', mininterval=0.5 if sys.stderr.isatty() else 60, dynamic_ncols=True)
    model.train()
    try:
        losses, since = [], time.perf_counter()
        step_loss = torch.zeros((), device=device)
        for epoch in range(config.epochs):
            for batch, (images, _) in enumerate(loader):
                if batch == updates_per_epoch * config.accumulate:
                    break  # too few batches left for a step
                images = images.to(device, non_blocking=True)
                ranks = model.draw_ranks(len(images), generator=ranks_generator, device=device)
                with autocast(config.precision, device):
                    loss = model(images, ranks).loss / config.accumulate
                loss.backward()
                step_loss += loss.detach()
                images_seen += len(images)
                if (batch + 1) % config.accumulate:
                    continue
                if not torch.isfinite(step_loss):
                    raise NonFiniteLoss(
                        f'The loss became {step_loss.item()} at step {update} (epoch {epoch}): lower --lr '
                        f'({config.lr}) or lengthen --warmup-epochs. {_kept(folder)}')
                schedule.step_update(update)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                update += 1
                losses.append(step_loss.item())
                step_loss.zero_()
                progress.update()
                if update % config.log_every == 0 or update == updates:
                    rate = len(losses) * config.batch_size * config.accumulate / (time.perf_counter() - since)
                    log.write(event='step', step=update, epoch=round(update / updates_per_epoch, 3),
                              images=images_seen, loss=sum(losses) / len(losses), lr=optimizer.param_groups[0]['lr'],
                              images_per_second=round(rate, 1))
                    progress.set_postfix_str(f'epoch {epoch + 1}/{config.epochs}, loss {log.lines[-1]["loss"]:.4f}, '
                                             f'{rate:.0f} images/s', refresh=False)
                    losses, since = [], time.perf_counter()
            paused = time.perf_counter()
            save()
            if config.eval_every and (epoch + 1) % config.eval_every == 0 and epoch + 1 < config.epochs:
                evaluate(images_seen)
            since += time.perf_counter() - paused
    except KeyboardInterrupt:
        progress.close()
        _say(f'\nStopped. {_kept(folder)}')
        raise
    progress.close()

    # 6. What was learned.
    evaluate(images_seen)
    examples_from = labelled[1] if labelled else data.open_dataset(
        config.dataset, config.data_dir, config.train_split, data.evaluation_transform(spec), config.download)
    draw_figures(model, log, examples_from, spec, folder / 'figures')
    _report(folder, log)
    return folder


class Log:
    """log.jsonl: one JSON object a line, on disk as soon as it is written; `lines` holds them all."""

    def __init__(self, path: Path):
        self.path, self.lines = path, []

    def write(self, **line: Any) -> None:
        self.lines.append({'time': round(time.time(), 3), **line})
        with self.path.open('a', encoding='utf-8') as file:
            file.write(json.dumps(self.lines[-1]) + '\n')


def draw_figures(
        model: AutoregressiveViT,
        log: Log,
        examples_from: torch.utils.data.Dataset,
        spec: data.ImageSpec,
        folder: Path,
) -> None:
    """loss.png, serialization.png and reconstruction.png."""
    folder.mkdir(exist_ok=True)
    if isinstance(examples_from, IterableDataset):
        examples = [image for (image, _), _ in zip(examples_from, range(6))]
    else:
        examples = [examples_from[i][0] for i in
                    torch.linspace(0, len(examples_from) - 1, min(6, len(examples_from))).long().tolist()]
    images = torch.stack(examples)
    figures.loss_figure(log.lines, folder / 'loss.png')
    figures.serialization_figure(model, images, spec, folder / 'serialization.png')
    figures.reconstruction_figure(model, images, spec, folder / 'reconstruction.png')


def _labelled_sets(config: PretrainConfig, spec: data.ImageSpec) -> tuple | None:
    """Data sets to fit and to test classifiers on, or None without labels."""
    transform = data.evaluation_transform(spec)

    def load(split: str):
        return data.open_dataset(config.dataset, config.data_dir, split, transform, config.download)

    train = load(config.train_split)
    labels = data.labels_of(train)
    if labels is None:
        if config.eval_split:
            raise ConfigError(f'eval_split={config.eval_split!r} needs labels, and {config.dataset} '
                              f'{config.data_dir or ""} has none or a single class: leave it out.')
        return None
    if config.eval_split:
        test = load(config.eval_split)
    else:
        # Every fifth image: the encoder has seen it in pretraining, the classifier has not seen its label.
        indices = torch.randperm(len(train), generator=torch.Generator().manual_seed(config.seed)).tolist()
        test, train = Subset(train, indices[::5]), Subset(train, [i for n, i in enumerate(indices) if n % 5])
    return tuple(data.sample(s, config.eval_images, config.seed) for s in (train, test))


def _create_optimizer(config: PretrainConfig, model: AutoregressiveViT) -> torch.optim.Optimizer:
    if config.opt.lower() not in list_optimizers():
        raise ConfigError(f'Unknown optimizer {config.opt!r}. {suggest(config.opt, list_optimizers())}')
    lr = config.lr * config.batch_size * config.accumulate / 256  # linear scaling (RandSAC 5)
    extra = {'betas': config.betas} if 'adam' in config.opt.lower() else {}
    if config.opt.lower() == 'adamw':
        extra['fused'] = True
    return create_optimizer_v2(model, opt=config.opt, lr=lr, weight_decay=config.weight_decay, **extra)


def _report(folder: Path, log: Log) -> None:
    evaluations = [line for line in log.lines if line.get('event') == 'evaluation']
    losses = [line['loss'] for line in log.lines if 'loss' in line]
    _say(f'\nLoss {losses[0]:.4f} at the start, {losses[-1]:.4f} at the end.')
    if evaluations:
        before, after = evaluations[0], evaluations[-1]
        _say('Accuracy of frozen features   untrained   pretrained')
        for metric, name in (('knn', 'kNN'), ('linear', 'linear')):
            _say(f'  {name:<26}{before[metric]:9.1f} %{after[metric]:11.1f} %')
    _say(f'Figures: {folder / "figures"}')
    _say('Load the encoder, with timm alone:\n'
         f"  timm.create_model('local-dir:{folder / 'encoder'}', pretrained=True)")


def _kept(folder: Path) -> str:
    return (f'The weights of the last whole epoch are in {folder / "encoder"} and {folder / "pretrain"}.'
            if (folder / 'encoder').exists() else 'No whole epoch was finished, so no weights were written.')


def _length(dataset) -> int:
    try:
        return len(dataset)
    except TypeError:
        return 0


def _say(text: str) -> None:
    tqdm.write(text)
