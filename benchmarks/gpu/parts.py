"""The parts of the queue but for the pretraining run; each goes on where an earlier call has left it."""

import ast
import importlib.util
import json
import time
from pathlib import Path
from typing import Any

from ..tune_attention import MARGIN
from . import outcomes
from .jobs import ROOT, Job, end, pause
from .sitting import Sitting
from .steps import VARIANTS

#: Seconds after which a worker that still compiles is given up, so that nothing compiles beside what is timed.
READY_WITHIN = 150
#: Seconds after which all are, of which some wait for others' memory.
SETTLED_WITHIN = 240
#: Part of the device's memory that workers may take while they compile.
ROOM = 0.95
#: pytest's plugins that are used where they are installed.
PLUGINS = ('xdist', 'pytest_timeout')


def rows_of(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a file that is being written."""
    text = path.read_text(encoding='utf-8') if path.is_file() else ''
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith('\n')]


def whole(path: Path) -> dict[str, Any] | None:
    """A JSON file, or None where it is missing or half written."""
    try:
        return json.loads(path.read_text(encoding='utf-8'))
    except (OSError, ValueError):
        return None


def equality(sitting: Sitting) -> None:
    """Captured against plain steps."""
    began, path = time.monotonic(), sitting.work / 'equality.jsonl'
    path.unlink(missing_ok=True)
    job = sitting.start('equality', 'benchmarks.gpu.equality', *sitting.size.equality, '--output', str(path))
    status = sitting.wait(job, sitting.limit('equality'), lambda: sitting.state.update('equality', rows=rows_of(path)))
    sitting.finish('equality', began, ending(job, status), status is not None)


def ending(job: Job, status: int | None) -> str | None:
    """Why a command did not end well, or None."""
    return 'stopped for want of time' if status is None else job.last_words() or f'exit {status}' if status else None


# Tests.


def missing_modules(files: list[Path]) -> dict[str, list[str]]:
    """What test files import at their top that is not installed here, with the files that want it."""
    missing: dict[str, list[str]] = {}
    beside = {'autoreg_vit', 'benchmarks', 'tests'}
    for path in files:
        for node in ast.parse(path.read_text(encoding='utf-8')).body:
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [
                node.module or ''] if isinstance(node, ast.ImportFrom) else []
            for name in {n.partition('.')[0] for n in names} - beside:
                if importlib.util.find_spec(name) is None:
                    missing.setdefault(name, []).append(path.name)
    return missing


def tests(sitting: Sitting) -> None:
    """pytest over what needs a GPU, without the plugins and files that want what is not installed here."""
    began, path, state = time.monotonic(), sitting.work / 'outcomes.jsonl', sitting.state
    known = outcomes.read(path)
    for test, (outcome, seconds, words) in state.part('tests').get('outcomes', {}).items():
        if test not in known:
            outcomes.write(path, test, outcome, seconds, words)
    groups = [(sorted({p for pattern in patterns for p in ROOT.glob(pattern)}), mark)
              for patterns, mark in sitting.size.tests]
    # Files without the marker would only be imported, by every process.
    groups = [([p for p in files if 'gpu' not in mark or 'mark.gpu' in p.read_text(encoding='utf-8')], mark)
              for files, mark in groups]
    missing = missing_modules([p for files, _ in groups for p in files])
    plugins = [name for name in PLUGINS if importlib.util.find_spec(name) is None]
    without = {**missing, **{name: [] for name in plugins}}
    for name, files in sorted(without.items()):
        what = 'the tests do without it' if name in plugins else f'left out: {", ".join(sorted(set(files)))}'
        print(f'tests: {name} is not installed here; {what}.', flush=True)
    left_out = {file for files in missing.values() for file in files}
    options = ['-o', 'addopts=', '-q', '--strict-markers', '-p', 'benchmarks.gpu.outcomes', '-p', 'no:cacheprovider']
    options += [] if 'xdist' in plugins or sitting.state.content['toy'] else ['-n', '6', '--dist', 'load']
    # A test that hangs would take the time of all others.
    options += [] if 'pytest_timeout' in plugins else ['--timeout', '90']

    def read() -> dict[str, list]:
        found = outcomes.read(path)
        counts = {kind: sum(o == kind for o, *_ in found.values()) for kind in ('passed', 'failed', 'skipped')}
        state.update('tests', outcomes=found, counts=counts, without=without)
        return counts

    status, why = 0, None
    for files, mark in groups:
        chosen = [str(p.relative_to(ROOT)) for p in files if p.name not in left_out]
        if not chosen or why:
            continue
        job = sitting.start('tests', 'pytest', *options, '-m', mark, *chosen, **{outcomes.VARIABLE: str(path)})
        status = sitting.wait(job, sitting.limit('tests'), read)
        # 1: some tests failed, which their outcomes say; 5: none were left.
        why = None if status in (0, 1, 5) else ending(job, status)
    counts = read()
    if counts['failed']:
        why = f'{counts["failed"]} of {sum(counts.values())} tests failed'
    sitting.finish('tests', began, why, status is not None)


# Kernels.


def launches(sitting: Sitting) -> None:
    """The tuner, for as long as there is; it goes on with the rows that its file has."""
    began, path, limit = time.monotonic(), sitting.work / 'launches.json', sitting.limit('launches')
    restore(path, sitting.state.part('launches').get('result'))

    def read() -> None:
        if (found := whole(path)) is not None:
            sitting.state.update('launches', result=found)

    job = sitting.start('launches', 'benchmarks.tune_attention', '--minutes', f'{limit / 60:.2f}', '--out', str(path),
                        *sitting.size.launches, TRITON_INTERPRET='0')
    status = sitting.wait(job, limit + 10, read)
    # It ends by itself, once everything is timed or, a margin before its minutes are over, for want of time.
    complete = status is not None and time.monotonic() - began < limit - MARGIN - 1
    sitting.finish('launches', began, ending(job, status), complete or bool(status))


def restore(path: Path, content: dict[str, Any] | None) -> None:
    """Write a result that came with the state of an earlier call, where the work folder has none."""
    if content is not None and not path.exists():
        path.write_text(json.dumps(content) + '\n', encoding='utf-8')


def attention_command(sitting: Sitting, name: str, output: Path, seconds: float) -> Job:
    return sitting.start(name, 'benchmarks.attention', *sitting.size.attention, '--seconds', str(seconds), '--output',
                         str(output), '--resume')


def attention(sitting: Sitting) -> None:
    """Attention against its peers; cases that its file has are not timed again."""
    began, path = time.monotonic(), sitting.work / 'attention.json'
    restore(path, sitting.state.part('attention').get('result'))

    def read() -> None:
        if (found := whole(path)) is not None:
            sitting.state.update('attention', result=found)

    job = attention_command(sitting, 'attention', path, 0.1)
    status = sitting.wait(job, sitting.limit('attention'), read)
    sitting.finish('attention', began, ending(job, status), status is not None)


# Steps.


class Workers:
    """Processes that compile the steps of a model each, as far as they fit into the device's memory together, and then
    wait to be timed; and one that compiles the peers of attention.

    Args:
        sitting: Of this call; `wanted` names the parts whose workers are started.
        wanted: Of 'steps' and 'attention'.
        memory_gib: Of the device.
    """

    def __init__(self, sitting: Sitting, wanted: list[str], memory_gib: float):
        self.sitting, self.room = sitting, ROOM * memory_gib
        self.jobs: dict[tuple[str, int], Job] = {}
        self.waiting = [spec for spec in sitting.size.steps if left_to_time(sitting, *spec[:2])] * ('steps' in wanted)
        self.peers = None
        if 'attention' in wanted:
            scratch = sitting.work / 'attention-compiled.json'
            scratch.unlink(missing_ok=True)
            self.peers = attention_command(sitting, 'attention-compiled', scratch, 0.0)

    def path(self, key: tuple[str, int]) -> Path:
        return self.sitting.work / f'steps-{key[0]}-{key[1]}.jsonl'

    def ready(self, key: tuple[str, int]) -> bool:
        return any(row['event'] == 'ready' for row in rows_of(self.path(key)))

    def preparing(self) -> list[tuple[str, int]]:
        return [key for key, job in self.jobs.items() if job.process.poll() is None and not self.ready(key)]

    def begin(self) -> None:
        """Start what fits; called again and again."""
        needs = {(name, batch): gib for name, batch, _, gib in self.sitting.size.steps}
        while self.waiting:
            busy, spec = self.preparing(), self.waiting[0]
            if busy and sum(needs[key] for key in busy) + spec[3] > self.room:
                return
            self.start(*self.waiting.pop(0)[:3])

    def start(self, name: str, batch: int, options: dict[str, Any]) -> Job:
        key = name, batch
        self.path(key).unlink(missing_ok=True)
        self.jobs[key] = self.sitting.start(
            f'steps-{name}-{batch}', 'benchmarks.gpu.steps', '--model', name, '--batch-size', str(batch), '--device',
            'cpu' if self.sitting.state.content['toy'] else 'cuda', '--options', json.dumps(options), '--output',
            str(self.path(key)))
        return self.jobs[key]

    def settle(self, limit: float) -> None:
        """Wait until all is compiled, and end what would take too long."""
        stop = time.monotonic() + limit
        while time.monotonic() < stop:
            self.begin()
            jobs = [self.jobs[key] for key in self.preparing()] + [self.peers] * (self.peers is not None)
            busy = [job for job in jobs if job.process.poll() is None]
            if all(time.monotonic() - job.began > READY_WITHIN for job in busy):
                break
            pause(0.2)
        self.waiting = []
        end([self.jobs.pop(key) for key in self.preparing()] + [self.peers] * (self.peers is not None))

    def all(self) -> list[Job]:
        return [*self.jobs.values(), *[self.peers] * (self.peers is not None)]


def left_to_time(sitting: Sitting, name: str, batch: int) -> list[str]:
    """Variants of a model's step that no call has timed."""
    there = {(row['model'], row['batch_size'], row['variant']) for row in sitting.state.part('steps').get('rows', [])}
    return [variant for variant in VARIANTS if (name, batch, variant) not in there]


def steps(sitting: Sitting, workers: Workers) -> None:
    """Time the workers one at a time, each variant of all of them before the next, since goals are of the first; one
    that is not ready is compiled now if time is left for it."""
    began, failed = time.monotonic(), None
    for variant in VARIANTS:
        for name, batch, options, _ in sitting.size.steps:
            if variant not in left_to_time(sitting, name, batch) or sitting.limit('steps') < 5:
                continue
            key = name, batch
            job = workers.jobs.get(key)
            if job is None or job.process.poll() is not None:
                job = workers.start(name, batch, options)
            job.tell(variant)
            stop = time.monotonic() + sitting.limit('steps')
            while job.process.poll() is None and time.monotonic() < stop and variant in left_to_time(sitting, *key):
                pause(0.05)
                keep_rows(sitting, workers.path(key))
            if job.process.poll():
                failed = f'{name} at batch {batch}: {ending(job, job.process.returncode)}'
    left = [f'{name} at batch {batch}, {variant}' for name, batch, *_ in sitting.size.steps
            for variant in left_to_time(sitting, name, batch)]
    why = failed or (f'left: {"; ".join(left)}' if left else None)
    sitting.finish('steps', began, why, complete=bool(failed) or not left)


def keep_rows(sitting: Sitting, path: Path) -> None:
    """Add what a worker has timed to the state."""
    kept = sitting.state.part('steps').get('rows', [])
    if new := [row for row in rows_of(path) if row['event'] == 'row' and row not in kept]:
        sitting.state.update('steps', rows=kept + new)
