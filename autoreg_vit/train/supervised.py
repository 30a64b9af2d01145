"""What training on annotated images shares: the loop, the accuracies of a classifier, and what a run leaves."""

import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from timm.utils import ModelEmaV3, accuracy
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import Dataset, Subset

from .batches import Batches
from .checkpoint import load_into, writing
from .distributed import Processes
from .figures import plots
from .loading import InOrder
from .loop import create_schedule, length_of, run_steps
from .losses import Losses
from .metrics import METRICS
from .parallel import get_state, set_state, synchronised
from .progress import with_progress
from .run import Run
from .runtime import autocast
from .supervised_config import RunConfig, SupervisedConfig


def images_at_once(device: torch.device) -> int:
    """Images of a forward pass without gradients: more on a CPU leave its caches (ViT-Tiny at 32 pixels, 64 images: 71
    a second a core, 256 images: 56)."""
    return 64 if device.type == 'cpu' else 256


@torch.no_grad()
def evaluate(
        predict: Callable[[torch.Tensor], torch.Tensor],
        dataset: Dataset,
        classes: int,
        config: SupervisedConfig,
        group: Processes,
        batch_size: int | None = None,
) -> dict[str, Any]:
    """Accuracies over `dataset`, of which every process sees its own part of the images, each once.

    Args:
        predict: Images [B, C, H, W] on the device to logits [B, classes].
        dataset: Of (image, label).
        classes: How many there are.
        config: Gives precision and loader processes.
        group: The processes.
        batch_size: Images at a time a process; by default what suits the device.

    Returns:
        On every process: top1 and, for more than five classes, top5 in percent, the mean cross entropy `loss`, how many
        `images`, and `confusion`, int64 [classes, classes], rows the true class, columns the predicted one.
    """
    # Counts as float64, exact below 2^53: the confusion matrix, then hits of top 1 and 5, loss and images.
    counts = torch.zeros(classes * classes + 4, dtype=torch.float64)
    for images, labels in own_part(dataset, batch_size or images_at_once(group.device), config, group):
        with autocast(config.precision, group.device):
            logits = predict(images.to(group.device, non_blocking=True))
        logits = logits.float().cpu()
        hits = [a.item() * len(labels) / 100 for a in accuracy(logits, labels, topk=(1, 5))]
        counts[:-4] += torch.bincount(labels * classes + logits.argmax(1), minlength=classes * classes)
        counts[-4:] += torch.tensor([*hits, cross_entropy(logits, labels, reduction='sum'), len(labels)])
    if group.world_size > 1:
        dist.all_reduce(counts, group=group.control)
    top1, top5, loss, images = counts[-4:].tolist()
    return {
        'top1': 100 * top1 / images, **({'top5': 100 * top5 / images} if classes > 5 else {}), 'loss': loss / images,
        'images': int(images), 'confusion': counts[:-4].view(classes, classes).long().numpy(),
    }


def own_part(
        dataset: Dataset,
        batch_size: int,
        config: RunConfig,
        group: Processes,
        collate: Callable[[list], Any] | None = None,
) -> Iterator:
    """Batches of this process's part of a data set, in its order; the processes together see each image once.

    Args:
        dataset: Map-style.
        batch_size: Images a batch of one process.
        config: Gives loader processes.
        group: The processes.
        collate: Makes a batch of a list of samples; by default tensors are stacked.
    """
    part = Subset(dataset, range(group.rank, len(dataset), group.world_size))
    if not len(part):
        return iter(())
    return iter(with_progress(InOrder(part, batch_size, config.workers, collate), 'evaluating', group.is_main))


def to_device(batch: Any, device: torch.device) -> Any:
    """A batch of any structure, lists, tuples and dictionaries of tensors, with its tensors on the device."""
    if isinstance(batch, torch.Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, dict):
        return {key: to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, (list, tuple)):
        return [to_device(value, device) for value in batch]
    return batch


class Learner:
    """Something in training: what `train` needs beside data and settings.

    Args:
        model: Its state is saved: the whole network when fine-tuning, the linear layer when probing.
        trained: The same over all processes, from `parallel.replicate`.
        optimizer: Over its parameters.
        loss: From a batch of this process, as its loader collates it, on its device, and the number of the forward
            pass, to a scalar.
        evaluate: Gives how many test `images` there were, and the scores that `METRICS` names.
        average: Moving average of the model that every step updates and that is saved too, or None.
    """

    def __init__(
            self,
            model: nn.Module,
            trained: nn.Module,
            optimizer: torch.optim.Optimizer,
            loss: Callable[[Any, int], torch.Tensor],
            evaluate: Callable[[], dict[str, Any]],
            average: ModelEmaV3 | None = None,
    ):
        self.model, self.trained, self.optimizer = model, trained, optimizer
        self.loss, self.evaluate, self.average = loss, evaluate, average

    def state(self) -> dict[str, Any]:
        state = get_state(self.model, self.optimizer, fsdp=False)
        return state if self.average is None else {**state, 'average': self.average.state_dict()}

    def load_state(self, state: dict[str, Any], source: str) -> None:
        set_state(self.model, self.optimizer, state, fsdp=False, source=source)
        if self.average is not None:
            load_into(self.average, state['average'], source)


def train(config: RunConfig, run: Run, batches: Batches, learner: Learner) -> dict[str, Any]:
    """Train from where the run stands to its end, and evaluate it there.

    Args:
        config: Settings.
        run: The run's folder; gives the checkpoint to go on from.
        batches: Training batches of this process.
        learner: What is trained.

    Returns:
        What `learner.evaluate` gives at the end.

    Raises:
        NonFiniteLoss: when training diverges.
        Stopped: when SIGTERM or SIGINT asked for it, after a checkpoint.
    """
    group, optimizer = run.group, learner.optimizer
    steps_per_epoch = batches.per_epoch // config.accumulate
    steps, images_per_step = length_of(config, steps_per_epoch).steps, config.batch_size * config.accumulate
    schedule = create_schedule(config, optimizer, steps_per_epoch, config.min_lr)
    losses = Losses(group, lambda step: (
        f'(epoch {step // steps_per_epoch}): lower --lr ({config.lr:g}) or lengthen the warm-up in a new run. What '
        f'{run.folder} holds is from before.'))
    first_step = 0
    if run.state:
        first_step = losses.step = run.state['step']
        losses.values = run.state['losses']
        learner.load_state(run.state, str(run.folder / 'last.pt'))
        run.say(f'Going on from step {first_step} of {steps} in {run.folder}.')
        run.state = None

    def report(step: int) -> dict[str, Any]:
        losses.read()
        result, images = learner.evaluate(), step * images_per_step
        learner.trained.train()
        if not any(line['event'] == 'evaluation' and line['images'] == images for line in run.log.lines):
            run.log.write(event='evaluation', images=images, test_images=result['images'], **scores(result))
        run.say(f'{images:>11,} images seen: {describe(result)}')
        return result

    def save(step: int) -> None:
        losses.read()  # never save what follows a loss that is not finite
        run.save({'step': step, 'losses': losses.values, **learner.state()})

    def take_step(step: int) -> torch.Tensor:
        loss = torch.zeros((), device=group.device)
        for part in range(config.accumulate):
            batch = to_device(next(supply), group.device)
            number = step * config.accumulate + part
            with synchronised(learner.trained, last=part == config.accumulate - 1):
                with autocast(config.precision, group.device):
                    part_loss = learner.loss(batch, number) / config.accumulate
                part_loss.backward()
            loss += part_loss.detach()
        losses.check(loss)
        schedule.step_update(step)
        if config.clip_grad:
            nn.utils.clip_grad_norm_(learner.model.parameters(), config.clip_grad)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if learner.average is not None:
            learner.average.update(learner.model)
        return loss

    learner.trained.train()
    supply = batches.start_at(first_step * config.accumulate)
    run_steps(config, run, losses, optimizer, steps_per_epoch, first_step, take_step=take_step, evaluate=report,
              save=save)
    return report(steps)


def scores(result: dict[str, Any]) -> dict[str, float]:
    """The numbers of an evaluation that a log line holds."""
    return {name: round(result[name], 4) for name in (*METRICS, 'loss') if name in result}


def describe(result: dict[str, Any]) -> str:
    return ', '.join(f'{metric.label} {result[key]:.2f} %' for key, metric in METRICS.items()
                     if metric.headline and key in result) + f' of {result["images"]:,} images'


def leave_results(run: Run, config: RunConfig, result: dict[str, Any], classes: list[str], **more: Any) -> None:
    """Write results.json and, of a classifier with up to twenty classes, figures/confusion.png, on the main process;
    end the run."""
    if run.group.is_main:
        few = 'confusion' in result and len(classes) <= 20
        content = {
            'weights': config.weights, 'pretrained': config.pretrained, 'data': config.data_name,
            'eval_split': config.eval_split or f'a fifth of {config.train_split}', **scores(result),
            'test_images': result['images'], **more, 'num_classes': len(classes),
            **({'classes': classes, 'confusion': result['confusion'].tolist()} if few else {}),
        }
        with writing(run.folder):
            if few:
                (run.folder / 'figures').mkdir(exist_ok=True)
                plots.confusion_figure(result['confusion'], classes, run.folder / 'figures' / 'confusion.png')
            write_json(run.folder / 'results.json', content)
    run.finish()
    run.say(f'Results: {run.folder / "results.json"}')


def finished(run: Run) -> bool:
    """Whether there is nothing to do in the run's folder, which is then said."""
    if run.finished:
        run.say(f'The run in {run.folder} is finished: its results are in {run.folder / "results.json"}. Name '
                'another --output-dir for a new one.')
    return run.finished


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file whole or not at all."""
    scratch = path.with_name(path.name + '.new')
    text = json.dumps(content, indent=2)
    rows = re.sub(r'\[[^][{}]*\]', lambda match: ' '.join(match[0].split()), text)  # a list of numbers on one line
    scratch.write_text(rows + '\n', encoding='utf-8')
    os.replace(scratch, path)
