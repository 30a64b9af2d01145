"""How the commands that train begin, and what those on annotated images leave."""

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from ..artifacts import write_json, writing
from ..data.order import check_divisible
from ..engine.objective import Evaluation
from ..engine.processes import Processes, processes
from ..engine.run import Run
from ..engine.trainer import prepare
from ..evaluation.metrics import describe, scores
from ..figures import plots
from ..settings.classification import Classification
from ..settings.dense import Dense
from ..settings.parts import Training

C = TypeVar('C', bound=Training)


@contextmanager
def begun(config: C) -> Iterator[tuple[C, Processes]]:
    """A copy of a command's settings, resolved for the machine, and the processes that torchrun or srun started, joined
    until the end. What is drawn from here on is a function of the seed and of what it is for."""
    with processes(config.device) as group:
        config = dataclasses.replace(config)
        prepare(config, group)
        check_divisible(config.batch_size, group)
        yield config, group


def finished(run: Run) -> bool:
    """Whether there is nothing to do in the run's folder, which is then said."""
    if run.finished:
        run.say(f'The run in {run.folder} is finished: its results are in {run.folder / "results.json"}. Name '
                'another --output-dir for a new one.')
    return run.finished


def evaluation_of(result: dict[str, Any]) -> Evaluation:
    """Scores as `evaluation` measures them, as the trainer takes them."""
    return Evaluation({'test_images': result['images'], **scores(result)}, describe(result), result)


def leave_results(
        run: Run, config: Classification | Dense, result: dict[str, Any], classes: Sequence[str], **more: Any,
) -> None:
    """Write results.json and, of a classifier with up to twenty classes, figures/confusion.png, on the main process;
    end the run."""
    if run.group.is_main:
        content = {
            'weights': config.weights, 'pretrained': config.pretrained, 'data': config.data_name,
            'eval_split': config.eval_split or f'a fifth of {config.train_split}', **scores(result),
            'test_images': result['images'], **more, 'num_classes': len(classes)}
        with writing(run.folder):
            if 'confusion' in result and len(classes) <= 20:
                content.update(classes=classes, confusion=result['confusion'].tolist())
                (run.folder / 'figures').mkdir(exist_ok=True)
                plots.confusion_figure(result['confusion'], classes, run.folder / 'figures' / 'confusion.png')
            write_json(run.folder / 'results.json', content)
    run.finish()
    run.say(f'Results: {run.folder / "results.json"}')
