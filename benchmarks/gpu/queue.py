"""A call of the queue, from beginning to end."""

import argparse
import hashlib
import json
import shutil
import time
from typing import Any

import torch

from autoreg_vit.errors import ConfigError

from ..report import provenance
from . import cards, parts, plan, pretraining, sweep
from .jobs import ROOT, end, listen, pause
from .sitting import FULL, ORDER, TOY, Sitting, unpacked
from .state import State, misfits

#: Seconds without which no part is begun.
LEAST = 5


def go(args: argparse.Namespace, began: float) -> int:
    """Do what fits into the minutes, and what earlier calls have left; the exit status, 1 where a part failed."""
    if not args.toy and not torch.cuda.is_available():
        raise ConfigError('The queue needs a CUDA GPU, and PyTorch sees none here: --plan says what it would do, --toy '
                          'tries all of it on a CPU.')
    listen()
    sitting = open_sitting(args, began)
    state, shares = sitting.state, sitting.shares
    print(plan.describe(args.minutes, [p for p in args.parts if p != 'run' or sitting.data], state.done), flush=True)
    if 'run' in args.parts and sitting.data is None:
        print('run: left out, since no images came: give --data-dir FOLDER, or pack with --data ARCHIVE.', flush=True)
    memory = 0.0 if args.toy else torch.cuda.get_device_properties(0).total_memory / 2 ** 30
    # Beside its figures, a pace leaves a cache of compiled code, which another machine does not have.
    known = 'pace' in state.part('run') and (sitting.work / 'pace').exists()
    pace = Pace(sitting) if 'run' in shares and not known else None
    workers = parts.Workers(sitting, [name for name in shares if name in ('attention', 'steps')], memory)

    def beside() -> None:
        workers.begin()
        if pace:
            pace.look()

    sitting.beside = beside
    try:
        for name in ORDER:
            if name == 'launches':
                workers.settle(parts.SETTLED_WITHIN)
            if name not in shares or sitting.limit(name) < LEAST:
                continue
            if name == 'steps':
                parts.steps(sitting, workers)
            elif name == 'run':
                if pace:
                    pace.wait()
                if 'pace' in state.part('run'):
                    pretraining.run(sitting, sitting.limit('run'))
            else:
                getattr(parts, name)(sitting)
    finally:
        end([*workers.all(), *([pace.job] if pace else [])])
        state.content['goals'] = cards.judge(state.content)
        state.save()
    return report(sitting)


def go_sweep(args: argparse.Namespace, began: float) -> int:
    """Try the rows of a sweep that fit into the minutes, and that earlier calls have left; the exit status, 1 where it
    ended badly.

    Raises:
        ConfigError: for a sweep that is none, another of its name before it in the folder, or no images.
    """
    tried = sweep.read_sweep(args.sweep, TOY if args.toy else FULL)
    if not args.toy and not torch.cuda.is_available():
        raise ConfigError('A sweep needs a CUDA GPU, and PyTorch sees none here: --toy tries it on a CPU.')
    listen()
    sitting, name = open_sitting(args, began), f'{sweep.PART}{tried.name}'
    if sitting.data is None:
        raise ConfigError('A sweep needs images: give --data-dir FOLDER, or pack with --data ARCHIVE.')
    state, path, start = sitting.state, sitting.work / f'{name}.jsonl', time.monotonic()
    before, facts = state.part(name), {'recipe': tried.recipe, 'settings': tried.settings}
    changed = [row['name'] for row in before.get('rows', [])
               if row['name'] != sweep.UNTRAINED and row['changed'] != tried.rows.get(row['name'])]
    if changed or any(before.get(key, value) != value for key, value in facts.items()):
        raise ConfigError(f'{args.out} holds rows of another sweep that is called {tried.name} '
                          f'({", ".join(changed) or "its settings differ"}): name another --out.')
    # What is kept is the state's; the work folder may be another sitting's.
    path.write_text(''.join(json.dumps(row) + '\n' for row in before.get('rows', [])), encoding='utf-8')
    state.update(name, **facts)
    limit = sitting.deadline - plan.RESERVE - time.monotonic()
    job = sitting.start(name, 'benchmarks.gpu.sweep', str(tried.file), '--data-dir', str(sitting.data), '--output',
                        str(path), '--until', f'{time.time() + limit - 3:.1f}', *['--toy'] * args.toy)
    status = sitting.wait(job, limit, lambda: state.update(name, rows=parts.rows_of(path)))
    rows = state.part(name).get('rows', [])
    left = [row for row in tried.rows if row not in {row['name'] for row in rows}]
    why = parts.ending(job, status) if status else f'left: {", ".join(left)}' if left else None
    sitting.finish(name, start, why, complete=bool(status) or not left)
    print(sweep.table(rows))
    if left:
        print(f'Left, for another call with the same --out: {", ".join(left)}. {job.last_words(1)}')
    return int(state.part(name)['status'] == 'failed')


def open_sitting(args: argparse.Namespace, began: float) -> Sitting:
    """Folders, state and shares of a call.

    Raises:
        ConfigError: for a folder of another sitting, one that could not travel back, or no images where they should be.
    """
    out, work = args.out.resolve(), args.work_dir.resolve()
    out.mkdir(parents=True, exist_ok=True)
    if fault := misfits(out):
        raise ConfigError(fault)
    if args.data_dir and not (args.data_dir / 'train').is_dir():
        raise ConfigError(f'--data-dir {args.data_dir} has no folder train/: expected class folders under it.')
    facts: dict[str, Any] = {**provenance(), 'toy': args.toy, 'data': args.data_name}
    state = State(out, facts)
    work.mkdir(parents=True, exist_ok=True)
    data = args.data_dir.resolve() if args.data_dir else unpacked(ROOT / 'data', work)
    # What is kept is of one commit, card and set of versions.
    same = hashlib.sha256(str([facts[key] for key in State.MUST_AGREE]).encode()).hexdigest()[:12]
    work = work / same
    work.mkdir(exist_ok=True)
    wanted = [name for name in args.parts if name != 'run' or data]
    seconds = args.minutes * 60
    shares = plan.shares(seconds, wanted, state.done)
    if args.toy:  # the estimates are a GPU's
        shares = dict.fromkeys(shares, (seconds - plan.START - plan.RESERVE) / max(len(shares), 1))
    return Sitting(out, work, state, TOY if args.toy else FULL, shares, began + seconds, data)


class Pace:
    """A short run of the recipe beside the first parts, which times its steps and fills the cache of compiled code."""

    def __init__(self, sitting: Sitting):
        shutil.rmtree(sitting.work / 'pace', ignore_errors=True)
        self.sitting, self.ended = sitting, False
        self.job = pretraining.start(sitting, 'pace', pretraining.PACE_EPOCHS)

    def look(self) -> bool:
        """Whether it has ended; its pace is then in the state."""
        status = self.job.process.poll()
        if self.ended or status is None:
            return self.ended
        self.ended, seconds = True, time.monotonic() - self.job.began
        if status == 0:
            self.sitting.state.update('run', pace=pretraining.pace_of(self.sitting.work / 'pace', seconds))
        else:
            why = parts.ending(self.job, status)
            self.sitting.finish('run', self.job.began, f'its steps could not be timed: {why}')
        return True

    def wait(self) -> None:
        """Wait until it has ended, for as long as the run may take."""
        stop = time.monotonic() + self.sitting.limit('run')
        while not self.look() and time.monotonic() < stop:
            pause(0.1)
        if not self.look():
            self.job.stop()
            self.sitting.finish('run', self.job.began, 'its steps could not be timed in time', complete=False)


def report(sitting: Sitting) -> int:
    """Say what was reached and what is left; the exit status."""
    content, state = sitting.state.content, sitting.state
    for row in content['parts'].get('steps', {}).get('rows', []):
        print('{model}, batch {batch_size}, {variant}: '.format(**row) + (
            row.get('refused') or '{images_per_second} images/s. {profile}'.format(**row)))
    print('Goals:\n' + cards.in_words(content['goals']))
    if doubt := cards.suspicion(content):
        print(f'Beware: {doubt}')
    archive = state.part('run').get('archive', {})
    if archive.get('left_at'):
        print(f'The run is too large to travel ({archive["mib"]} MiB): copy {archive["left_at"]} by hand.')
    left = [name for name in plan.NAMES if name not in state.done]
    if left:
        print(f'Left, for another call with the same --out: {", ".join(left)}.')
    if fault := misfits(sitting.out):
        print(f'Beware: {fault}')
    return int(any(part['status'] == 'failed' for part in content['parts'].values()))
