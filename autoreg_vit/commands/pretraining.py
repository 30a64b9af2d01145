"""`autoreg-vit pretrain`, to be read from top to bottom; `loop.run_steps` is the loop around its steps."""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import IterableDataset, Subset

from .. import ops
from ..artifacts import write_checksum, writing
from ..data import sources as data
from ..data.batches import Batches
from ..data.checks import check_images
from ..data.labelled import Images, NoLabels, open_splits, say_untrained, some_of
from ..data.on_device import DeviceBatches, DeviceImages
from ..data.order import check_divisible
from ..data.transforms import ImageSpec, evaluation_transform, training_transform
from ..engine.graph import GraphedStep, check_graph
from ..engine.log import Log
from ..engine.loop import adam_options, create_optimizer, create_schedule, prepare, run_steps, start
from ..engine.losses import Losses
from ..engine.machine import autocast
from ..engine.parallel import WholeModel, get_state, replicate, set_state, settle_buckets, shard, synchronised
from ..engine.processes import Processes, processes
from ..engine.progress import say
from ..engine.run import Run
from ..engine.seeding import mix_seed
from ..errors import ConfigError, ModelError
from ..evaluation.classifiers import accuracies
from ..evaluation.features import Readable
from ..evaluation.metrics import METRICS
from ..figures import pictures, plots
from ..hub.folders import export_encoder, export_pretraining
from ..models import AutoregressiveViT, create_pretraining_model, pretraining_models
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
    # 1. The machine. Every draw from here on is a function of the seed and of what it is for.
    device, shortened = group.device, config.warmup_epochs > config.epochs / 2
    prepare(config, group)

    # 2. The model.
    check_untrained(config.model)
    model = create_pretraining_model(config.model, **config.model_options()).to(device)
    model.set_grad_checkpointing(config.grad_checkpointing)
    spec = ImageSpec.of(model)
    attention = _attention(config, model, device)
    whole = WholeModel(model, config.fsdp)
    if config.fsdp:
        shard(model, group)
    if config.cuda_graph:
        check_graph(config, group)

    # 3. The data.
    if config.dataset is None:
        config.dataset = 'digits' if config.data_dir is None else 'folder'
    if config.crop_scale is None:
        config.crop_scale = (0.67, 1.0) if config.model.startswith('saim') else (0.2, 1.0)
    check_divisible(config.batch_size, group)
    batches = training_batches(config, spec, group)
    labelled = _labelled_sets(config, spec, group)

    # 4. The optimizer.
    options = adam_options(config)
    if config.cuda_graph:
        options['capturable'] = True
    optimizer = create_optimizer(config, model, **options)
    steps_per_epoch = batches.per_epoch // config.accumulate
    steps, images_per_step = config.epochs * steps_per_epoch, config.batch_size * config.accumulate
    schedule = create_schedule(config, optimizer, steps_per_epoch)

    # 5. The run: begun, resumed, or found finished.
    facts = {'train_images': batches.sampler.length if batches.sampler else None,
             'workers': None if batches.sampler else config.workers}
    with Run(config, f'{config.model}-{Path(config.dataset).name}', group, facts, steps) as run:
        folder, log = run.folder, run.log
        if run.finished:
            run.say(f'The run in {folder} is finished: its weights are in {folder / "encoder"} and '
                    f'{folder / "pretrain"}. Name another --output-dir for a new one.')
            return folder

        def explain(step: int) -> str:
            epoch, number = divmod(step * config.accumulate, batches.per_epoch)
            images = f'batch {number} of the stream {config.dataset}'
            if batches.sampler:
                indices = batches.sampler.batch(epoch, number, config.accumulate)
                images = f'images {", ".join(map(str, indices[:8]))}{", ..." * (len(indices) > 8)} of {config.dataset}'
            return (f'(epoch {epoch}, {images}): lower --lr ({config.lr:g}) or lengthen --warmup-epochs in a new run. '
                    f'{_kept(folder)}')

        losses = Losses(group, explain)
        first_step = 0
        if run.state:
            first_step = losses.step = run.state['step']
            losses.values = run.state['losses']
            set_state(model, optimizer, run.state, config.fsdp, str(folder / 'last.pt'))
        start(run, config, attention=attention, train_images=facts['train_images'] or 0,
              parameters=sum(p.numel() for p in model.parameters()),
              encoder_parameters=sum(p.numel() for p in model.encoder.parameters()))
        if shortened:
            run.say(f'Warm-up shortened to {config.warmup_epochs:g} epochs, half of the run.')
        run.say(f'{config.model} on {config.dataset}: {facts["train_images"] or "streamed"} images, {config.epochs} '
                f'epochs of {steps_per_epoch} steps of {images_per_step} images; {group.world_size} x {device}, '
                f'{config.precision}; ' + (f'going on from step {first_step} of {steps} in' if run.state
                                           else 'writing to') + f' {folder}')
        run.state = None  # as large as the model and its optimizer

        def evaluate(step: int) -> None:
            losses.read()
            images = step * images_per_step
            if labelled and not any(line['event'] == 'evaluation' and line['images'] == images for line in log.lines):
                encoder = whole.gather().encoder
                if group.is_main:
                    log.write(event='evaluation', images=images, **accuracies(
                        encoder, *labelled, device, config.precision, config.workers))
                    run.say('{images:>9,} images seen: kNN {knn:.1f} %, linear {linear:.1f} %'.format(**log.lines[-1]))

        def export() -> None:
            whole_model = whole.gather()
            if group.is_main:
                with writing(folder):
                    export_encoder(whole_model.encoder, folder / 'encoder', mean=spec.mean, std=spec.std)
                    export_pretraining(whole_model, folder / 'pretrain', mean=spec.mean, std=spec.std)
                    for name in ('encoder', 'pretrain'):
                        write_checksum(folder / name / 'model.safetensors')

        def save(step: int) -> None:
            losses.read()  # never save what follows a loss that is not finite
            run.save({'step': step, 'losses': losses.values, **get_state(model, optimizer, config.fsdp)})
            if step < steps:
                export()

        def train_step(images_of: Iterator) -> torch.Tensor:
            """Forward, backward and optimizer step; the loss, on the device."""
            # Orders are drawn for the whole step, so that no sharing out of its images changes them.
            ranks = model.draw_ranks(images_per_step, generator=ranks_generator, device=device)
            loss = torch.zeros((), device=device)
            for part, part_ranks in enumerate(ranks.split(config.batch_size)):
                images = next(images_of)[0].to(device, non_blocking=True)
                with synchronised(trained, last=part == config.accumulate - 1):
                    with autocast(config.precision, device):
                        part_loss = trained(images, part_ranks[share]).loss / config.accumulate
                    part_loss.backward()
                loss += part_loss.detach()
            losses.check(loss)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            return loss

        # 6. The loop.
        trained = torch.compile(model) if config.compile else model
        trained = trained if config.fsdp else replicate(trained, group)
        ranks_generator = torch.Generator(device)
        share = group.share(config.batch_size)
        with autocast(config.precision, device):
            nothing = spec.nothing(share.stop - share.start, device)
            settle_buckets(trained, nothing, model.draw_ranks(len(nothing), device=device))
        model.train()
        images_of = batches.start_at(first_step * config.accumulate)
        step_on = GraphedStep(train_step, optimizer, [ranks_generator]) if config.cuda_graph else train_step

        def take_step(step: int) -> torch.Tensor:
            ranks_generator.manual_seed(mix_seed(config.seed, 'ranks', step))
            torch.manual_seed(mix_seed(config.seed, 'dropout', step, group.rank))
            schedule.step_update(step)
            return step_on(images_of)

        run_steps(config, run, losses, optimizer, steps_per_epoch, first_step, take_step=take_step, evaluate=evaluate,
                  save=save, evaluate_first=True)

        # 7. What was learned.
        evaluate(steps)
        export()
        whole_model = whole.gather()
        if group.is_main:
            torch.manual_seed(mix_seed(config.seed, 'figures'))
            examples_from = labelled[1] if labelled else data.open_split(
                config, config.train_split, evaluation_transform(spec))
            with writing(folder):
                draw_figures(whole_model, log, examples_from, spec, folder / 'figures')
            _report(run)
        run.finish()
        return folder


def check_untrained(model: str) -> None:
    """Raise ModelError for a model's name with a tag, which would pass for where training began."""
    name, _, tag = model.partition('.')
    if tag and name in pretraining_models():
        raise ModelError(f'--model {model}: pretraining begins from random weights and takes no tag. Use --model '
                         f'{name}, or finetune, probe, segment or detect with the weights of the tag.')


def draw_figures(
        model: AutoregressiveViT,
        log: Log,
        examples_from: torch.utils.data.Dataset,
        spec: ImageSpec,
        folder: Path,
) -> None:
    """loss.png, serialization.png, reconstruction.png and loss_by_rank.png."""
    folder.mkdir(exist_ok=True)
    images = _examples(examples_from, 256)
    plots.loss_figure(log.lines, folder / 'loss.png')
    pictures.serialization_figure(model, images[:2], spec, folder / 'serialization.png')
    pictures.reconstruction_figure(model, images[:6], spec, folder / 'reconstruction.png')
    by_rank = plots.loss_by_rank(model, images)
    log.write(event='loss_by_rank', loss_by_rank=[round(loss, 5) for loss in by_rank.mean.tolist()],
              tokens=by_rank.tokens.tolist())
    plots.loss_by_rank_figure(model, by_rank, folder / 'loss_by_rank.png')


def _examples(dataset: torch.utils.data.Dataset, most: int) -> torch.Tensor:
    """Up to `most` images [B, C, H, W], spread over the data set, of those that can be read."""
    if isinstance(dataset, IterableDataset):
        return torch.stack([image for (image, _), _ in zip(dataset, range(most))])
    readable, places = Readable(dataset), torch.linspace(0, len(dataset) - 1, min(most, len(dataset))).long().tolist()
    return torch.stack([sample[0] for i in places if (sample := readable[i]) is not None])


def training_batches(
        config: PretrainConfig,
        spec: ImageSpec,
        group: Processes,
) -> Batches | DeviceBatches:
    def load(transform: Callable) -> torch.utils.data.Dataset:
        dataset = data.open_split(
            config, config.train_split, transform, training=True, batch_size=config.batch_size // group.world_size,
            seed=config.seed, images=config.train_images)
        group.on_main(lambda: check_images(dataset, config.check_images, config.max_corrupt))
        if config.train_images is None or isinstance(dataset, IterableDataset):
            return dataset
        return Subset(dataset, some_of(np.arange(len(dataset)), config.train_images, config.seed).tolist())

    if config.cache_on_device:
        images = DeviceImages(load(lambda image: image), spec, group.device, config.max_corrupt)
        return DeviceBatches(images, config.batch_size, config.accumulate, config.seed, group, config.crop_scale,
                             config.hflip)
    dataset = load(training_transform(spec, config.crop_scale, config.hflip))
    return Batches(dataset, config.batch_size, config.seed, group, config.workers, config.accumulate,
                   config.max_corrupt)


def _labelled_sets(config: PretrainConfig, spec: ImageSpec, group: Processes) -> tuple | None:
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
    return tuple(Images(part.dataset, part.indices, transform) for part in (splits.train, splits.test))


def _attention(config: PretrainConfig, model: AutoregressiveViT, device: torch.device) -> str:
    """The implementation of segment attention that the encoder will run on, tried out."""
    block, tokens = model.encoder.blocks[0].attn, model.encoder.patch_embed.num_patches
    q = torch.zeros(1, tokens, block.num_heads, block.head_dim, dtype=getattr(torch, config.precision), device=device)
    ops.segment_attention(q, q, q, torch.ones(1, tokens, dtype=torch.int32, device=device), impl=config.impl)
    return ops.choose_implementation(q, q)


def _report(run: Run) -> None:
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


def _kept(folder: Path) -> str:
    return (f'The last checkpoint before it is {folder / "last.pt"}, its weights are in {folder / "encoder"} and '
            f'{folder / "pretrain"}.' if (folder / 'last.pt').exists() else 'No checkpoint was written yet.')
