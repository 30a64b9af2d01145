"""`autoreg-vit pretrain`: the command, and what it learns."""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import IterableDataset

from .. import ops
from ..artifacts import write_checksum, writing
from ..data.pretraining import labelled_sets, training_batches
from ..data.samples import Samples
from ..data.sources import open_split
from ..data.transforms import ImageSpec, evaluation_transform
from ..engine.choices import begun_with
from ..engine.log import Log
from ..engine.objective import Evaluation, ForwardPass, Objective
from ..engine.processes import Processes
from ..engine.run import Run
from ..engine.seeding import mix_seed
from ..engine.trainer import Trainer
from ..errors import ModelError
from ..evaluation.classifiers import accuracies
from ..evaluation.features import Readable
from ..evaluation.metrics import METRICS
from ..figures import pictures, plots
from ..hub.folders import export_encoder, export_pretraining
from ..models import AutoregressiveViT, create_pretraining_model, pretraining_models
from ..models.interface import attention_of, blocks_of
from ..settings.pretraining import PretrainConfig
from .runs import begun


def pretrain(config: PretrainConfig) -> Path:
    """Pretrain a model, or resume its run, and leave behind its weights, logs and figures. Under torchrun every process
    calls this, and they train together. Where `config.output_dir` holds an unfinished run with these settings, it goes
    on from its last checkpoint and ends in the weights it would have ended in.

    Returns:
        The run's folder: `config.yaml`, `log.jsonl`, `last.pt`, `encoder/` and `pretrain/` (timm `local-dir:` folders)
        and `figures/`.

    Raises:
        UsageError: for settings, data or a model that cannot work, before training begins.
        NonFiniteLoss: when training diverges.
        Stopped: when SIGTERM or SIGINT asked for it, after a checkpoint.
    """
    with begun(config) as (config, group), ops.implementation(config.impl):
        # Model and data, all checked before anything is written.
        check_untrained(config.model)
        model = create_pretraining_model(config.model, **config.model_options()).to(group.device)
        spec, attention = ImageSpec.of(model), try_attention(model, config, group.device)
        resolve_data(config)
        # A resumed run goes on as it began.
        kept = group.on_main(lambda: begun_with(config.output_dir, type(config)))
        if config.reader == 'auto':
            config.reader = kept.get('reader', 'auto')
        if config.residual_in_fp32 == 'auto':
            config.residual_in_fp32 = kept.get('residual_in_fp32', False)
        batches, labelled = training_batches(config, spec, group), labelled_sets(config, spec, group)
        train_images = batches.sampler.length if batches.sampler else None
        title = (f'{config.model} on {config.dataset}: {train_images or "streamed"} images, {config.epochs} epochs of '
                 f'{batches.per_epoch // config.accumulate} steps of {config.images_per_step} images')
        objective = Pretraining(config, model, spec, labelled, group, title, attention=attention,
                                train_images=train_images or 0)
        trainer = Trainer(config, objective, batches, group)

        # The run, and what it leaves.
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


def check_untrained(model: str) -> None:
    """Raise ModelError for a model's name with a tag, which would pass for where training began."""
    name, _, tag = model.partition('.')
    if tag and name in pretraining_models():
        raise ModelError(f'--model {model}: pretraining begins from random weights and takes no tag. Use --model '
                         f'{name}, or finetune, probe, segment or detect with the weights of the tag.')


def try_attention(model: AutoregressiveViT, config: PretrainConfig, device: torch.device) -> str:
    """Run the encoder's segment attention once; the name of the implementation that it takes."""
    tokens, attention = model.encoder.patch_embed.num_patches, attention_of(blocks_of(model.encoder)[0])
    q = torch.zeros(1, tokens, attention.num_heads, attention.head_dim, device=device,
                    dtype=getattr(torch, config.precision))
    ops.segment_attention(q, q, q, torch.ones(1, tokens, dtype=torch.int32, device=device), impl=config.impl)
    return ops.choose_implementation(q, q)


def resolve_data(config: PretrainConfig) -> None:
    """Resolve the settings of data that depend on others, in place."""
    config.dataset = config.dataset or ('digits' if config.data_dir is None else 'folder')
    config.crop_scale = config.crop_scale or ((0.67, 1.0) if config.is_saim else (0.2, 1.0))


class Pretraining(Objective[AutoregressiveViT]):
    """Autoregressive pretraining of a model on the device: each segment of an image is predicted from those before it.

    Args:
        labelled: Data sets to fit and to test classifiers of frozen features on, or None.
        **about: As `Objective` has it; the numbers of parameters are added.
    """
    evaluated_untrained = True

    def __init__(
            self, config: PretrainConfig, model: AutoregressiveViT, spec: ImageSpec,
            labelled: tuple[Samples, Samples] | None, group: Processes, title: str = '', **about: Any,
    ):
        super().__init__(model, title, {
            **about, 'parameters': sum(p.numel() for p in model.parameters()),
            'encoder_parameters': sum(p.numel() for p in model.encoder.parameters())})
        self.config, self.spec, self.labelled, self.group = config, spec, labelled, group
        model.set_grad_checkpointing(config.grad_checkpointing)
        model.residual_in_fp32 = config.residual_in_fp32 is True
        self.share = group.share(config.batch_size)
        self.normed_values_per_image = model.encoder.patch_embed.num_patches * sum(
            norm.normalized_shape[0] for norm in model.modules() if isinstance(norm, nn.LayerNorm))
        self.generators = [torch.Generator(group.device)]

    def seed(self, step: int) -> None:
        self.generators[0].manual_seed(mix_seed(self.config.seed, 'ranks', step))
        torch.manual_seed(mix_seed(self.config.seed, 'dropout', step, self.group.rank))

    def loss(self, network: nn.Module, batch: Any, part: ForwardPass) -> torch.Tensor:
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


def draw_figures(
        model: AutoregressiveViT, log: Log, examples_from: Samples | IterableDataset, spec: ImageSpec, folder: Path,
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

