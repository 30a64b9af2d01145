"""`autoreg-vit finetune`: end-to-end training of an encoder with a classifier (RandSAC Table 15)."""

import json
from pathlib import Path
from typing import Any

import torch
from timm.data import Mixup
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.models import save_for_hf
from torch import nn

from ..artifacts import CONFIG, WEIGHTS, replaced, seal, write_config, writing
from ..data.batches import batches_of
from ..data.labelled import LabelledImages, labelled_images
from ..data.transforms import ImageSpec
from ..engine.objective import Evaluation, ForwardPass, Objective
from ..engine.parallel import share_buffers
from ..engine.processes import Processes
from ..engine.run import Run
from ..engine.seeding import mix_seed, seed_cpu
from ..engine.trainer import Trainer
from ..errors import ConfigError, ModelError
from ..evaluation.class_scores import evaluate
from ..evaluation.metrics import scores
from ..hub.folders import export_encoder
from ..hub.lookup import load_encoder, short_name, source_config
from ..models.encoders import SinCosVisionTransformer
from ..models.interface import as_timm
from ..settings.classification import FinetuneConfig
from .runs import begun, evaluation_of, finished, leave_results

#: Entries of timm's configuration of a model that hold for whatever weights it has.
OF_THE_ARCHITECTURE = ('num_classes', 'fixed_input_size', 'pool_size', 'first_conv', 'classifier')


def finetune(config: FinetuneConfig) -> Path:
    """Fine-tune an encoder on labelled images, or resume its run. Under torchrun every process calls this.
    The settings' defaults are RandSAC's Table 15.

    Returns:
        The run's folder: `config.yaml`, `log.jsonl`, `last.pt`, `results.json`, `figures/`, and the classifier in
        `model/` (`average/` for the moving average), folders that `timm.create_model('local-dir:...')` loads.

    Raises:
        UsageError: for settings, data or weights that cannot work, before training begins.
        NonFiniteLoss: when training diverges.
        Stopped: when SIGTERM or SIGINT asked for it, after a checkpoint.
    """
    with begun(config) as (config, group):
        # Data and model, all checked before anything is written.
        check_pairs(config, group)
        model = load_encoder(config.weights, config.pretrained, num_classes=0, **config.model_options())
        spec = ImageSpec.of(model, config.in_chans)
        images = labelled_images(config, spec, group, auto_augment=config.auto_augment, erase=config.erase)
        add_classifier(model, len(images.classes), config.seed)
        model.to(group.device)
        if config.grad_checkpointing:
            as_timm(model).set_grad_checkpointing()
        objective = Finetuning(config, model, spec, images, group)
        trainer = Trainer(config, objective, batches_of(config, images.train, group), group)

        # The run, and what it leaves.
        facts = {'train_images': len(images.train)}
        with Run(config, f'finetune-{short_name(config.weights)}', group, facts, trainer.steps) as run:
            if finished(run):
                return run.folder
            result, average, more = trainer.run(run).result, trainer.average, {}
            if average is not None:
                more['average'] = scores(objective.measure(average.module))
            whole = trainer.export(run.folder)
            if group.is_main:
                with writing(run.folder):
                    export_classifier(whole, run.folder / 'model', config, spec, images.classes)
                    if average is not None:
                        export_classifier(average.module, run.folder / 'average', config, spec, images.classes)
            leave_results(run, config, result, images.classes, epochs=config.epochs, **facts, **more)
            return run.folder


class Finetuning(Objective[nn.Module]):
    """A model with a classifier, on the device, trained end to end. Draws are functions of (seed, forward pass,
    process)."""

    def __init__(
            self, config: FinetuneConfig, model: nn.Module, spec: ImageSpec, images: LabelledImages, group: Processes,
    ):
        count, classes = len(images.train), len(images.classes)
        super().__init__(
            model, f'Fine-tuning {config.weights} on {count:,} images of {classes} classes for {config.epochs} epochs',
            {'train_images': count, 'classes': classes, 'parameters': sum(p.numel() for p in model.parameters())})
        self.config, self.spec, self.images, self.group = config, spec, images, group
        self.mixup = None
        if config.mixup or config.cutmix:
            self.mixup = Mixup(config.mixup, config.cutmix, label_smoothing=config.label_smoothing, num_classes=classes)
            self.criterion: nn.Module = SoftTargetCrossEntropy()
        elif config.label_smoothing:
            self.criterion = LabelSmoothingCrossEntropy(config.label_smoothing)
        else:
            self.criterion = nn.CrossEntropyLoss()

    def loss(self, network: nn.Module, batch: Any, part: ForwardPass) -> torch.Tensor:
        images, labels = batch
        if self.mixup is not None:
            seed_cpu(mix_seed(self.config.seed, 'mixup', part.number, self.group.rank))
            images, labels = self.mixup(images, labels)
        torch.manual_seed(mix_seed(self.config.seed, 'dropout', part.number, self.group.rank))
        return self.criterion(network(images).float(), labels)

    def settle(self, network: nn.Module) -> torch.Tensor:
        return network.eval()(self.spec.nothing(2, self.group.device)).sum()

    def evaluate(self, model: nn.Module) -> Evaluation:
        return evaluation_of(self.measure(model))

    def measure(self, model: nn.Module) -> dict[str, Any]:
        """Accuracies of a classifier on the test images."""
        share_buffers(model, self.group)
        model.eval()
        return evaluate(model, self.images.test, len(self.images.classes), precision=self.config.precision,
                        workers=self.config.loaders, group=self.group)


def check_pairs(config: FinetuneConfig, group: Processes) -> None:
    """Raise ConfigError where mixup or cutmix, which mix an image with its counterpart, meet an odd batch."""
    size = config.batch_size // group.world_size
    if (config.mixup or config.cutmix) and size % 2:
        near = [n * group.world_size for n in (size - 1, size + 1) if n]
        raise ConfigError(
            f'mixup and cutmix mix images in pairs, and a batch of {config.batch_size} images gives each of '
            f'{group.world_size} processes {size}, an odd number: use --batch-size {" or ".join(map(str, near))}, or '
            'turn them off with --mixup 0 --cutmix 0.')


def add_classifier(model: nn.Module, classes: int, seed: int) -> None:
    """Give a timm model a classifier near zero, as fine-tuning in BEiT, MAE and SAIM's published code begins. Raise
    ModelError for a model without a linear one."""
    as_timm(model).reset_classifier(classes)
    head = as_timm(model).get_classifier()
    if not isinstance(head, nn.Linear):
        raise ModelError(f'The classifier of {type(model).__name__} is a {type(head).__name__}: expected a linear '
                         'layer. Name a Vision Transformer or another model with one.')
    with torch.no_grad():
        nn.init.trunc_normal_(head.weight, std=2e-5, generator=torch.Generator().manual_seed(seed))
        if head.bias is not None:
            head.bias.zero_()


def export_classifier(
        model: nn.Module, folder: Path, config: FinetuneConfig, spec: ImageSpec, classes: list[str],
) -> None:
    """Write a classifier as a folder that `timm.create_model('local-dir:FOLDER', pretrained=True)` loads. It says how
    the images were prepared that its accuracy was measured on, and nothing of the weights that training began with:
    their tag, licence and test settings are not those of these."""
    prepared = {'input_size': [spec.channels, *spec.size], 'mean': list(spec.mean), 'std': list(spec.std),
                'crop_pct': config.evaluated_part(spec.size), 'crop_mode': 'center', 'interpolation': 'bicubic'}
    with replaced(folder) as (new,):
        if isinstance(model, SinCosVisionTransformer):
            export_encoder(model, new)
        else:
            source = source_config(config.weights)
            args = {**source.get('model_args', {}), **config.model_options(), 'in_chans': spec.channels}
            save_for_hf(model, str(new), model_args=args, safe_serialization=True)
        content = json.loads((new / CONFIG).read_text(encoding='utf-8'))
        cfg = {k: v for k, v in content['pretrained_cfg'].items() if k in OF_THE_ARCHITECTURE}
        content.update(pretrained_cfg={**cfg, **prepared}, label_names=classes)
        # transformers passes num_classes itself and fails on a second one; drop path belongs to this training.
        for name in ('num_classes', 'drop_path_rate'):
            content.get('model_args', {}).pop(name, None)
        write_config(new / CONFIG, content)
        seal(new / WEIGHTS)
