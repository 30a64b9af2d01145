"""A sweep: settings of a recipe tried one after the other in one process, each from scratch for the same seconds.

    python -m benchmarks.gpu.sweep FILE --data-dir FOLDER --output ROWS.jsonl --until TIME [--toy]

`python -m benchmarks.gpu --sweep FILE` calls this, and keeps and brings home what it writes. Images are loaded once.
Beside that each kind of step is compiled, in a process of its own, into the cache on disk; rows whose steps are alike
come one after the other and share what is compiled. A row's pace is timed first, on its own step, and fixes its epochs,
as a schedule must know its end; then objective and trainer of `autoreg-vit pretrain` take its steps. The settings that
this comes to stand in ROWS/NAME.yaml: `autoreg-vit pretrain --config` of that file trains to the same weights. Linear
classifier and nearest neighbours judge on a held-out fifth of the training images; no other split is opened.
"""

import argparse
import gc
import json
import math
import re
import statistics
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from autoreg_vit.artifacts import write_synced
from autoreg_vit.commands.pretraining import Pretraining, check_untrained, resolve_data
from autoreg_vit.commands.recipes import load_recipe
from autoreg_vit.data.on_device import DeviceBatches, DeviceImages
from autoreg_vit.data.pretraining import labelled_sets, training_batches
from autoreg_vit.data.transforms import ImageSpec
from autoreg_vit.engine.choices import reason_of
from autoreg_vit.engine.log import read_log
from autoreg_vit.engine.machine import resolve_device
from autoreg_vit.engine.processes import Processes
from autoreg_vit.engine.trainer import Supply, Trainer, prepare
from autoreg_vit.errors import ConfigError, UsageError, one_line, suggest
from autoreg_vit.evaluation.cached import fingerprint
from autoreg_vit.evaluation.features import Readable
from autoreg_vit.models import create_pretraining_model
from autoreg_vit.settings.base import make_config, read_settings, save_config
from autoreg_vit.settings.pretraining import PretrainConfig

from ..timing import seconds as timed
from ..train_step import Repeated
from .jobs import Job, end
from .sitting import FULL, TOY, Size

SWEEPS = Path(__file__).parent / 'sweeps'
#: Settings that are the same for all rows, and the sweep's to set.
FIXED = {'data_dir', 'dataset', 'device', 'download', 'epochs', 'eval_every', 'eval_split', 'force_resume', 'fsdp',
         'image_column', 'impl', 'label_column', 'output_dir', 'tracker', 'train_split', 'workers'}
#: Settings that change the step's draws, but no shape and no code.
DRAWN = {'mix_init', 'segments'}
UNTRAINED = 'untrained'
#: What the state's name of a sweep begins with.
PART = 'sweep-'
#: Of the time that rows could have, as no two last alike.
USED = 0.95
#: Steps before a pace is timed: those that a CUDA graph is captured in, and some more.
WARM = 6
#: Of a run whose steps are only timed: long enough for every warm-up.
PACED_EPOCHS = 1000
#: Part of a call's time that is waited for compilers at most.
COMPILING = 0.25


@dataclass(frozen=True)
class Sweep:
    """What is tried.

    Args:
        name: Of its file.
        file: That was read.
        recipe: Bundled, of `autoreg-vit pretrain`.
        settings: Of every row.
        rows: Settings over them, by name, most worth first.
    """
    name: str
    file: Path
    recipe: str
    settings: dict[str, Any]
    rows: dict[str, dict[str, Any]]


def read_sweep(file: str, size: Size) -> Sweep:
    """A sweep from a YAML file, or a bundled one by its name.

    Raises:
        ConfigError: for a file that is none, and a row or setting that does not exist or is not a sweep's to change.
    """
    path = SWEEPS / f'{file}.yaml'
    path = path if path.is_file() else Path(file).expanduser()
    if not path.is_file():
        raise ConfigError(f'No sweep {file!r}: it is neither a file nor bundled. '
                          f'{suggest(file, sorted(p.stem for p in SWEEPS.glob("*.yaml")))}')
    content = read_settings(path)
    if set(content) - {'recipe', 'settings', 'rows'} or not {'recipe', 'rows'} <= set(content):
        raise ConfigError(f'{path} must hold recipe, rows and perhaps settings, got {", ".join(map(str, content))}.')
    rows, common = content['rows'], content.get('settings') or {}
    if not isinstance(rows, dict) or not rows or not isinstance(common, dict):
        raise ConfigError(f'{path}: rows are names with the settings that each changes, got {rows!r:.80}.')
    base = {**load_recipe(content['recipe']), **common, **size.run, 'cache_on_device': True, 'workers': 0}
    for name, changed in {'settings': common, **rows}.items():
        if not re.fullmatch(r'[\w.+-]+', str(name)) or name == UNTRAINED:
            raise ConfigError(f'{path}: a row cannot be called {name!r}. Names are of letters, digits, ".", "+", "-"; '
                              f'{UNTRAINED!r} is the model before training.')
        if not isinstance(changed or {}, dict):
            raise ConfigError(f'{path}, {name}: expected settings as "key: value", got {changed!r}.')
        for key in changed or {}:
            if key in FIXED:
                raise ConfigError(f'{path}, {name}: {key} is the same for all rows of a sweep, which sets it itself.')
        try:
            make_config(PretrainConfig, {**base, **(changed or {})}, {})
        except ConfigError as error:
            raise ConfigError(f'{path}, {name}: {error}') from error
    return Sweep(path.stem, path.resolve(), content['recipe'], base, {str(k): v or {} for k, v in rows.items()})


class OutOfTime(Exception):
    """The call has to end."""


@dataclass
class Costs:
    """Seconds that a row takes beside its training, as measured last.

    Args:
        first: To build and time a step that nothing here has compiled yet.
        again: To do so where it is compiled.
        judged: To judge a model.
    """
    first: float = 0.0
    again: float = 0.0
    judged: float = 0.0


class Sweeper:
    """Trains and judges the rows of a sweep.

    Args:
        sweep: What is tried.
        data_dir: Folder with class folders under train/.
        output: Rows as they end, a JSON object a line; rows that are there are not tried again.
        deadline: By `time.monotonic`; nothing is begun that would not be over by then.
        most_epochs: Of a row.
    """

    def __init__(self, sweep: Sweep, data_dir: Path, output: Path, deadline: float, most_epochs: float = math.inf):
        self.sweep, self.data_dir, self.output = sweep, data_dir, output
        self.deadline, self.most_epochs = deadline, most_epochs
        self.group = Processes(resolve_device(sweep.settings.get('device', 'auto')))
        self.rows = read_log(output)
        self.costs = Costs()
        self._images: dict[Any, DeviceImages] = {}
        self._judges: dict[ImageSpec, tuple[list, list]] = {}
        self._kind: str | None = None

    # The parts of a row, as `autoreg-vit pretrain` makes them.

    def configure(self, changed: dict[str, Any], epochs: int = PACED_EPOCHS) -> PretrainConfig:
        """Settings of a row, resolved; and what is drawn from here on is seeded."""
        config = make_config(PretrainConfig, {
            **self.sweep.settings, **changed, 'dataset': 'folder', 'data_dir': str(self.data_dir)}, {'epochs': epochs})
        prepare(config, self.group)
        resolve_data(config)
        return config

    def trainer(self, config: PretrainConfig, supply: Supply | None = None) -> Trainer:
        """A model from scratch and what trains it, about to begin; on batches of `supply`, or of the sweep's images."""
        check_untrained(config.model)
        model = create_pretraining_model(config.model, **config.model_options()).to(self.group.device)
        spec = ImageSpec.of(model)
        objective = Pretraining(config, model, spec, self.judges(spec) if supply is None else None, self.group)
        return Trainer(config, objective, supply or self.batches(config, spec), self.group)

    def batches(self, config: PretrainConfig, spec: ImageSpec) -> DeviceBatches:
        """Batches of images that are loaded once."""
        key = spec, config.max_corrupt, config.train_images, config.train_images and config.seed
        if key not in self._images:
            batches = training_batches(config, spec, self.group)
            assert isinstance(batches, DeviceBatches)  # as the settings of every row say
            self._images[key] = batches.images
        return DeviceBatches(self._images[key], config.batch_size, config.accumulate, config.seed, self.group,
                             config.crop_scale, config.hflip)

    def judges(self, spec: ImageSpec) -> tuple[list, list]:
        """Images to fit and to judge by, the same for all rows, decoded once.

        Raises:
            ConfigError: for images without labels.
        """
        if spec not in self._judges:
            sets = labelled_sets(self.configure({}), spec, self.group)
            if sets is None:
                raise ConfigError(f'A sweep is judged by labels: {self.data_dir}/train needs a folder for each class.')
            self._judges[spec] = tuple([sample for i in range(len(part)) if (sample := Readable(part)[i]) is not None]
                                       for part in sets)
        return self._judges[spec]

    # Compiled code.

    def kind(self, changed: dict[str, Any]) -> str:
        """What rows must have in common to share what is compiled."""
        config = make_config(PretrainConfig, {**self.sweep.settings, **changed}, {})
        options = {k: v for k, v in config.model_options().items() if k not in DRAWN}
        return repr((config.model, sorted(options.items()), config.batch_size, config.accumulate, config.precision,
                     config.grad_checkpointing, config.residual_in_fp32, config.impl))

    def settle(self, kind: str) -> bool:
        """Make room for a row of a kind; whether its step was compiled here before.

        Another kind begins with no code: PyTorch would take its shapes for ones that vary, and compile for any, and
        would give up compiling at the ninth.
        """
        alike, self._kind = kind == self._kind, kind
        gc.collect()  # a captured step and what captured it hold each other
        if not alike:
            torch.compiler.reset()
        if self.group.device.type == 'cuda':
            torch.cuda.empty_cache()
        return alike

    def compile(self, name: str) -> None:
        """Take a step of a row on images of nothing, which leaves what it compiles in the cache on disk."""
        config = self.configure(self.sweep.rows[name])
        trainer = self.trainer(config, Repeated(lambda number: nothing))
        nothing = trainer.objective.spec.nothing(config.batch_size, self.group.device)
        trainer.begin()
        trainer.take_step()

    def compile_all(self, names: list[str], arguments: Sequence[str]) -> list[Job]:
        """Processes that compile the steps of rows, one for each kind."""
        compiled = {self.kind(self.sweep.rows[name]): name for name in reversed(names)
                    if {**self.sweep.settings, **self.sweep.rows[name]}.get('compile') is True}
        folder = self.output.with_suffix('')
        return [Job(['benchmarks.gpu.sweep', *arguments, '--compile', name], folder / f'{name}.compile.log')
                for name in compiled.values()]

    # A row.

    def pace(self, changed: dict[str, Any]) -> 'Pace':
        """How fast a row's own step is, by some that are taken for nothing."""
        began, config = time.monotonic(), self.configure(changed)
        trainer = self.trainer(config)
        trainer.begin()
        for _ in range(WARM if trainer.choices.cuda_graph else 1):
            trainer.take_step()

        def steps(count: int) -> float:
            return timed(lambda: [trainer.take_step() for _ in range(count)], self.group.device) / count

        step = steps(2)
        if self.group.device.type == 'cuda':
            step = statistics.median(steps(max(int(0.4 / step), 1)) for _ in range(3))
        return Pace(config.images_per_step / step, trainer.steps_per_epoch * config.images_per_step,
                    time.monotonic() - began)

    def train(self, name: str, pace: 'Pace', share: float) -> dict[str, Any]:
        """Train a row for about `share` seconds and judge it.

        Raises:
            OutOfTime: where the call has to end before the row.
            ConfigError: for a share that is too short for an epoch.
        """
        began, epochs = time.monotonic(), int(min(share * pace.images_per_second / pace.epoch, self.most_epochs))
        if epochs < 1:
            raise ConfigError(f'{share:.1f} s are not enough for an epoch of {pace.epoch} images at '
                              f'{pace.images_per_second:.0f} a second.')
        config = self.configure(self.sweep.rows[name], epochs)
        save_config(config, self.output.with_suffix('') / f'{name}.yaml')
        trainer, losses = self.trainer(config), []
        trainer.begin()
        start = time.monotonic()
        while trainer.step < trainer.steps:
            trainer.take_step()
            if trainer.step % config.log_every == 0 or trainer.step == trainer.steps:
                losses += trainer.losses.take()  # which waits for the device
                if time.monotonic() + self.costs.judged > self.deadline:
                    raise OutOfTime
        spent, images = time.monotonic() - start, trainer.steps * config.images_per_step
        scores = self.judge(trainer)
        return {
            'epochs': epochs, 'steps': trainer.steps, 'images': images, 'seconds': round(spent, 2),
            'images_per_second': round(images / spent, 1), 'pace': round(pace.images_per_second, 1), **scores,
            'loss': statistics.fmean(losses[-trainer.steps_per_epoch:]),
            'seconds_beside': round(pace.seconds + time.monotonic() - began - spent, 2),
            'fingerprint': fingerprint(trainer.objective.model)}

    def judge(self, trainer: Trainer) -> dict[str, Any]:
        """Accuracies of a model, and the numbers of images that they are of."""
        began, objective = time.monotonic(), trainer.objective
        fitted, judged = objective.labelled
        scores = objective.evaluate(objective.model).scores
        self.costs.judged = time.monotonic() - began
        return {**{metric: round(score, 3) for metric, score in scores.items()}, 'fitted_on': len(fitted),
                'judged_on': len(judged), 'seconds_judged': round(self.costs.judged, 2)}

    # The sweep.

    def run(self, arguments: Sequence[str] = ()) -> list[str]:
        """Try what has not been tried, while it fits; the names of rows that are left.

        Args:
            arguments: Of a process of this sweep, for those that compile.
        """
        ended = {row['name'] for row in self.rows}
        left = self.order(name for name in self.sweep.rows if name not in ended)
        if not left:
            return []
        self.output.with_suffix('').mkdir(parents=True, exist_ok=True)
        stop = time.monotonic() + COMPILING * (self.deadline - time.monotonic())
        jobs = self.compile_all(left, arguments)
        try:
            untrained = self.trainer(self.configure({}))  # for which images are loaded
            while any(job.process.poll() is None for job in jobs) and time.monotonic() < stop:
                time.sleep(0.2)
        finally:
            end(jobs)
        scores = self.judge(untrained)
        del untrained
        if UNTRAINED not in ended:
            self.keep(UNTRAINED, {'epochs': 0, 'images': 0, **scores})
        while left and self.attempt(left):
            left = left[1:]
        return left

    def attempt(self, left: list[str]) -> bool:
        """Train and judge the first of the rows that are left; whether there was time for it."""
        name, began = left[0], time.monotonic()
        changed = self.sweep.rows[name]
        compiled = self.settle(self.kind(changed))
        if not self.fits(compiled):
            return False
        try:
            before = graphs()
            pace = self.pace(changed)
            if not compiled:  # the second time it takes what later rows of its kind will
                self.costs.first = pace.seconds
                self.settle(self.kind(changed))
                pace = self.pace(changed)
            self.costs.again = pace.seconds
            share = self.share_of(left)
            if share * pace.images_per_second < pace.epoch and not self.shares():
                print(f'{share:.1f} s a row are not enough for an epoch of {pace.epoch} images at '
                      f'{pace.images_per_second:.0f} a second.')
                return False
            if time.monotonic() + share + self.costs.again + self.costs.judged > self.deadline:
                return False
            self.settle(self.kind(changed))
            self.keep(name, {'share': round(share, 3), **self.train(name, pace, share), 'graphs': graphs() - before})
        except OutOfTime:
            return False
        except (UsageError, RuntimeError) as error:  # settings that do not work, a loss that is not finite, memory
            said = str(error) if isinstance(error, UsageError) else reason_of(error)
            self.keep(name, {'failed': ' '.join(said.split()), 'seconds': round(time.monotonic() - began, 2)})
        return True

    def share_of(self, left: list[str]) -> float:
        """Seconds that each row trains for: those of a row that has ended, or an equal part of what the rows that are
        left, of which the first is ready to train, do not need beside."""
        if shares := self.shares():
            return shares[0]
        kinds = [self.kind(self.sweep.rows[name]) for name in left]
        beside = len(left) * (self.costs.again + self.costs.judged) + sum(
            self.costs.again if kind == other else self.costs.first + self.costs.again
            for kind, other in zip(kinds[1:], kinds))
        return max(USED * (self.deadline - time.monotonic() - beside) / len(left), 0.0)

    def shares(self) -> list[float]:
        """Seconds that rows were given which have ended."""
        return [row['share'] for row in self.rows if 'share' in row]

    def fits(self, compiled: bool) -> bool:
        """Whether a row can be over in time, as far as it is known what one takes."""
        costs, share = self.costs, (self.shares() or [0.0])[0]
        needed = (0.0 if compiled else costs.first) + 2 * costs.again + share + costs.judged
        return time.monotonic() + needed < self.deadline

    def order(self, names: Iterable[str]) -> list[str]:
        """Rows of a kind one after the other, and kinds as they come."""
        kinds: dict[str, list[str]] = {}
        for name in names:
            kinds.setdefault(self.kind(self.sweep.rows[name]), []).append(name)
        return [name for alike in kinds.values() for name in alike]

    def keep(self, name: str, row: dict[str, Any]) -> None:
        """Write a row that has ended."""
        self.rows.append({'event': 'row', 'name': name, 'changed': self.sweep.rows.get(name, {}), **row})
        write_synced(self.output, ''.join(json.dumps(row) + '\n' for row in self.rows))
        print(f'{name}: ' + (row.get('failed') or '{epochs} epochs, {images:,} images, kNN {knn:.1f} %, linear '
                             '{linear:.1f} %'.format(**row)), flush=True)


class Pace(NamedTuple):
    """How fast a row's steps are.

    Args:
        images_per_second: Of its step.
        epoch: Images of an epoch.
        seconds: It took to build what takes them, to compile it and to time it.
    """
    images_per_second: float
    epoch: int
    seconds: float


def graphs() -> int:
    """Graphs that PyTorch has compiled in this process."""
    return torch._dynamo.utils.counters['stats']['unique_graphs']


def table(rows: list[dict[str, Any]]) -> str:
    """Rows as a table, the best by linear accuracy first, and those that failed last."""
    lines = ['| | linear | 20-NN | loss | epochs | images seen | images/s |', '| --- ' * 7 + '|']
    for row in sorted(rows, key=lambda row: row.get('linear', -1.0), reverse=True):
        if 'failed' in row:
            lines.append(f'| {row["name"]} | failed: {row["failed"]} | | | | | |')
            continue
        cells = [f'{row["linear"]:.1f}', f'{row["knn"]:.1f}', f'{row["loss"]:.4f}' if 'loss' in row else '',
                 str(row['epochs']), f'{row["images"]:,}',
                 f'{row["images_per_second"]:,.0f}' if 'images_per_second' in row else '']
        lines.append(f'| {row["name"]} | {" | ".join(cells)} |')
    return '\n'.join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('file', help='a YAML file, or the name of a bundled one')
    parser.add_argument('--data-dir', type=Path, required=True, help='images with class folders under train/')
    parser.add_argument('--output', type=Path, required=True, help='rows, as they end; given again, it is gone on with')
    parser.add_argument('--until', type=float, required=True, help='when to be done, by the clock, in seconds')
    parser.add_argument('--toy', action='store_true', help='at toy size on a CPU')
    parser.add_argument('--compile', metavar='ROW', help='take a step of a row, for the cache on disk, and end')
    args = parser.parse_args()
    size = TOY if args.toy else FULL
    try:
        sweeper = Sweeper(read_sweep(args.file, size), args.data_dir, args.output,
                          time.monotonic() + args.until - time.time(), size.most_epochs)
        if args.compile:
            sweeper.compile(args.compile)
            return 0
        if left := sweeper.run(sys.argv[1:]):
            print(f'Left for want of time: {", ".join(left)}.')
    except UsageError as error:
        print(one_line(error), file=sys.stderr)
        return 2
    return 0


if __name__ == '__main__':
    sys.exit(main())
