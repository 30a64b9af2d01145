"""Choose the designs and launches of the attention kernels on this GPU.

    python -m benchmarks.tune_attention [--minutes 3] [--head-dims 32 64] [--dtypes bfloat16 ...] [--out FILE]
    python -m benchmarks.tune_attention --dry-run [--arch 90]
    python -m benchmarks.tune_attention --take FILE

Workers compile every candidate (`benchmarks/candidates.py`), the most valuable first, while this process times those
that compiled without spills within the shared memory of the architecture, one at a time. Each must first be as good as
the eager operator. It is timed on RandSAC's encoder attention, and SAIM's at 65 tokens, device time alone. One of the
candidates of every size is what the table has for it, and the fastest becomes a row unless that is as fast. FILE grows
with every timing, and a second call goes on where the first stopped; a candidate that ended it, as an illegal memory
access does, is not run again. --dry-run only compiles, and needs no GPU.

--take puts the rows of FILE into the table of launches. A row that spills with the installed Triton serves the versions
below it, and what it replaces stays behind it for the others. Kernels never tune themselves in use: their numerics must
not depend on what else a machine was doing.
"""

import argparse
import functools
import itertools
import json
import math
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from autoreg_vit.ops.packing import split
from autoreg_vit.ops.triton import backward, forward
from autoreg_vit.ops.triton.launches import (
    TABLE,
    TRITON,
    Plan,
    capability,
    find_row,
    kind_of,
    plan_of,
    table,
    tuned_arch,
)

from .attention import IMAGES_CHECKED, Case, make_case, own_run
from .candidates import candidate_plans, row_of
from .kernel_resources import refusal
from .report import RESULTS, device_name, provenance, write_rows
from .timing import measure

# Rows hold up to so many tokens, the last any number; what each is timed on. In order of worth.
CASES = {256: ('randsac', 196), 64: ('randsac', 64), 65: ('saim', 64), 128: ('randsac', 121), None: ('randsac', 1024),
         512: ('randsac', 484)}
DTYPES = ('bfloat16', 'float16', 'float32')
HEADS = 12
# Candidates of every size and dtype that come before the rest of any.
FIRST = 8
VERSION = '.'.join(map(str, TRITON))
# Part of a time by which another candidate must be faster to replace what the table has.
NOISE = 0.01
# Seconds kept for what is under way when time is up.
MARGIN = 10


class Job(NamedTuple):
    """A candidate for rows of one size."""
    direction: str
    dtype: torch.dtype
    head_dim: int
    tokens: int | None
    plan: Plan
    today: bool  # whether the table has it

    def row(self, arch: int) -> dict[str, Any]:
        return row_of(self.direction, self.plan, arch, self.dtype, self.head_dim, self.tokens)


def list_jobs(dtypes: list[str], head_dims: list[int], arch: int) -> list[Job]:
    """Every candidate of every size, the most valuable first: what the table has leads those of its size."""
    ranked = []
    kinds = [(getattr(torch, dtype), head_dim) for dtype in dtypes for head_dim in sorted(head_dims, reverse=True)]
    for (k, (dtype, head_dim)), (c, tokens), direction in itertools.product(
            enumerate(kinds), enumerate(CASES), ('backward', 'forward')):
        size = math.inf if tokens is None else tokens
        today = plan_of(find_row(direction, size, head_dim, dtype, arch))
        plans = dict.fromkeys([today, *candidate_plans(direction, dtype, size)])
        ranked += [((rank >= FIRST, k, rank, c), Job(direction, dtype, head_dim, tokens, plan, plan == today))
                   for rank, plan in enumerate(plans)]
    return [job for _, job in sorted(ranked, key=lambda pair: pair[0])]


class Arguments(NamedTuple):
    """What kernels take on one case, and what the first images must give: exact results, and eager's in the dtype."""
    case: Case
    out: torch.Tensor
    lse: torch.Tensor
    gradients: list[torch.Tensor]
    exact: list[torch.Tensor]
    eager: list[torch.Tensor]


@functools.lru_cache(maxsize=len(CASES))
def arguments_of(name: str, tokens: int, head_dim: int, dtype: torch.dtype, images: int, device: str) -> Arguments:
    case = make_case(name, tokens, head_dim, images, HEADS, dtype, torch.device(device))
    # Rows that see nothing, of one image: a kernel once gave NaN there on a card, and nowhere else.
    case.limits[0, 3::7] = 0
    first = case.first(IMAGES_CHECKED)
    double = Case(name, [x.detach().double().requires_grad_() for x in first.projections], first.limits,
                  first.grad.double(), first.causal)
    with torch.no_grad():
        out, lse = forward.forward(*split(case.projections), case.limits, scale_log2(case))
    return Arguments(case, out, lse, [torch.empty_like(x) for x in case.projections], own_run(double, 'eager')(True),
                     own_run(first, 'eager')(True))


def scale_log2(case: Case) -> float:
    return case.grad.shape[-1] ** -0.5 * math.log2(math.e)


def run_of(job: Job, arguments: Arguments) -> Callable[[], list[torch.Tensor]]:
    """A call of a candidate's kernels alone, which returns output or gradient."""
    case = arguments.case
    q, k, v = split([x.detach() for x in case.projections])

    def run() -> list[torch.Tensor]:
        if job.direction == 'forward':
            return [forward.forward(q, k, v, case.limits, scale_log2(case), job.plan)[0]]
        backward.DESIGNS[job.plan.design].fill(
            q, k, v, case.limits, arguments.out, case.grad, arguments.lse, *split(arguments.gradients),
            q.shape[-1] ** -0.5, scale_log2(case), *job.plan.launches)
        return arguments.gradients
    return run


def fault_of(job: Job, run: Callable[[], list[torch.Tensor]], arguments: Arguments) -> str | None:
    """What is wrong with a candidate's results, or None: as `benchmarks.attention.check`, all images finite besides."""
    for x in arguments.gradients:
        x.fill_(math.nan)
    part = slice(0, 1) if job.direction == 'forward' else slice(1, None)
    for value, exact, eager in zip(run(), arguments.exact[part], arguments.eager[part], strict=True):
        error, eager_error = ((x[:IMAGES_CHECKED].double() - exact).abs().max().item() for x in (value, eager))
        allowed = 2 * eager_error + torch.finfo(job.dtype).eps / 4 * exact.abs().max().item()
        if not (error <= allowed and value.isfinite().all()):
            return f'wrong: error {error:.2e}, allowed {allowed:.2e}'
    return None


def time_job(job: Job, device: str, images: int | None, seconds: float) -> dict[str, Any]:
    """Microseconds of a candidate, or why it is refused."""
    name, tokens = CASES[job.tokens]
    try:
        arguments = arguments_of(name, tokens, job.head_dim, job.dtype, images or 50176 // tokens, device)
        run = run_of(job, arguments)
        fault = fault_of(job, run, arguments)
        return {'refused': fault} if fault else measure(run, torch.device(device), seconds)
    except Exception as error:  # a candidate that cannot run here says why
        return {'refused': f'{type(error).__name__}: {str(error).strip()[:120]}'}


def best_rows(timings: list[dict[str, Any]], timed_on: str) -> list[dict[str, Any]]:
    """The fastest candidate of every size for which what the table has was tried too, which stays where it is as
    fast."""
    rows = []
    sizes: dict[tuple, list[dict]] = {}
    for timing in timings:
        sizes.setdefault((*kind_of(timing['row']), timing['row']['tokens']), []).append(timing)
    for found in sizes.values():
        timed = [t for t in found if 'median_us' in t]
        if timed and any(t['today'] for t in found):
            fastest = min(timed, key=lambda t: t['median_us'] * (1 - NOISE * t['today']))
            rows.append({**fastest['row'], 'timed_on': timed_on})
    return rows


def updated_table(old: list[dict[str, Any]], new: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The table with new rows before the old ones of their size, without rows that can no longer serve."""
    kinds = list(dict.fromkeys(map(kind_of, old + new)))
    rows: list[dict[str, Any]] = []
    for row in sorted(new + old, key=lambda row: (kinds.index(kind_of(row)), row['tokens'] or math.inf)):
        if not any(covers(other, row) for other in rows):
            rows.append(row)
    return rows


def covers(first: dict[str, Any], row: dict[str, Any]) -> bool:
    """Whether a row serves wherever another does."""
    return (kind_of(first) == kind_of(row) and (first['tokens'] or math.inf) >= (row['tokens'] or math.inf)
            and end_of(first) >= end_of(row))


def end_of(row: dict[str, Any]) -> tuple[float, ...]:
    """The first version of Triton that a row does not serve, infinity where there is none."""
    return (math.inf,) if row['triton_below'] is None else tuple(map(int, row['triton_below'].split('.')))


def take(path: Path) -> None:
    """Put the rows that were timed into the table of launches."""
    new = json.loads(path.read_text())['launches']
    # Other versions of Triton than this one have spilled rows of these plans.
    ends = {(*kind_of(row), plan_of(row)): row['triton_below'] for row in sorted(table(), key=end_of, reverse=True)}
    for row in new:
        row['triton_below'] = ends.get((*kind_of(row), plan_of(row)))
        if (fault := refusal(row)) and end_of(row) > TRITON:
            row['triton_below'] = VERSION
            print(f'serves Triton below {VERSION}: {fault}')
    text = ',\n'.join('  ' + json.dumps(row) for row in updated_table(table(), new))
    TABLE.write_text(f'{{"launches": [\n{text}\n]}}\n')
    print(f'{len(new)} rows taken')


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--head-dims', type=int, nargs='+', default=[32, 64], choices=[32, 64])
    parser.add_argument('--dtypes', nargs='+', default=list(DTYPES), choices=DTYPES)
    parser.add_argument('--minutes', type=float, default=3.0, help='in all; the rest waits for a second call')
    parser.add_argument('--jobs', type=int, default=max(1, os.cpu_count() - 1),
                        help='processes that compile')
    parser.add_argument('--limit', type=int, default=None, help='candidates, to try the script out')
    parser.add_argument('--images', type=int, default=None, help='by default as many as make 50,176 tokens')
    parser.add_argument('--seconds', type=float, default=0.1, help='of timing, each candidate')
    parser.add_argument('--arch', type=int, default=90, choices=[80, 90, 100], help='with --dry-run')
    parser.add_argument('--dry-run', action='store_true', help='compile the candidates and say what is wrong with them')
    parser.add_argument('--out', type=Path, default=None)
    parser.add_argument('--take', type=Path, default=None, metavar='FILE')
    return parser.parse_args()


def compiled(jobs: list[Job], arch: int, processes: int, deadline: float) -> Iterator[tuple[Job, str | None]]:
    """Jobs in order with what is wrong with their kernels, as workers have compiled them, until the deadline."""
    # The same kernels serve every size.
    keys = {job: job._replace(tokens=None, today=False) for job in jobs}
    with multiprocessing.get_context('spawn').Pool(processes) as pool:
        faults = {key: pool.apply_async(refusal, (key.row(arch),)) for key in dict.fromkeys(keys.values())}
        for job in jobs:
            left = deadline - time.monotonic()
            try:
                if left <= 0:
                    raise multiprocessing.TimeoutError
                yield job, faults[keys[job]].get(left)
            except multiprocessing.TimeoutError:
                tqdm.write('time is up')
                return


def is_lost(device: torch.device) -> bool:
    """Whether a candidate has broken the process's GPU context, which refuses everything after an illegal access."""
    if device.type != 'cuda':
        return False
    try:
        torch.ones(1, device=device).item()
    except RuntimeError:
        return True
    return False


def tune(args: argparse.Namespace, device: torch.device, deadline: float) -> bool:
    """Time candidates until the deadline; False where a candidate broke the process, and another must go on."""
    gpu = torch.cuda.get_device_name() if device.type == 'cuda' else 'cpu'
    head = {**provenance(), 'triton': VERSION}
    path = args.out or RESULTS / f'tune_attention-{device_name(device)}.json'
    timings = json.loads(path.read_text())['timings'] if path.exists() else []
    arch = tuned_arch(capability(device))

    def save() -> None:
        write_rows(path, head, launches=best_rows(timings, f'{gpu}, Triton {VERSION}'), timings=timings)

    known = [timing['row'] for timing in timings]
    jobs = [job for job in list_jobs(args.dtypes, args.head_dims, arch) if job.row(arch) not in known][:args.limit]
    for job, fault in compiled(jobs, arch, args.jobs, deadline):
        # Written before it runs: what ends this process is not run again.
        timing: dict[str, Any] = {'row': job.row(arch), 'today': job.today, 'refused': fault or 'ended the process'}
        timings.append(timing)
        if fault is None:
            save()
            result = time_job(job, device.type, args.images, args.seconds)
            timing.update({'refused': None}, **result)
        save()
        tqdm.write(f'{job.plan} {job.tokens} tokens, {job.dtype} x{job.head_dim}: '
                   f'{timing["refused"] or timing["median_us"]}')
        if timing['refused'] and is_lost(device):
            return False
    return True


def main() -> None:
    start = time.monotonic()
    args = parse()
    deadline = start + 60 * args.minutes - MARGIN
    if args.take:
        take(args.take)
    elif args.dry_run:
        jobs = list_jobs(args.dtypes, args.head_dims, args.arch)[:args.limit]
        faults = {job.plan: fault for job, fault in compiled(jobs, args.arch, args.jobs, deadline) if fault}
        for plan, fault in faults.items():
            print(f'{plan}: {fault}')
        print(f'{len(jobs)} candidates, {len(faults)} plans at fault')
    elif torch.cuda.is_available():
        if not tune(args, torch.device('cuda'), deadline):
            minutes = (deadline + MARGIN - time.monotonic()) / 60
            os.execv(sys.executable, [sys.executable, '-m', 'benchmarks.tune_attention', *sys.argv[1:],
                                      '--minutes', f'{minutes:.2f}'])
    else:
        raise SystemExit('Tuning needs a CUDA GPU; --dry-run compiles the candidates without one.')


if __name__ == '__main__':
    main()
