"""What a call of segment attention costs the host, with kernels that do nothing.

    python -m benchmarks.host_cost [--rounds 100] [--calls 16] [--output FILE]

Needs no GPU: without one, tensors are on the CPU and what stands in for the kernels is the same. Four ways to the same
launchers, for each layout, forward and with backward:

- plain: an autograd function around the launchers and nothing else, the least that a call can cost;
- segment_attention: the public function;
- operator: the public function where it goes through its custom operator, as every call once did and as dispatch modes
  and torch.compile still see it;
- compiled: one of 8 calls in a graph of torch.compile.

Times are the process's CPU time, which other programs disturb less than the clock. Rounds are short and go through all
ways in turn, and a ratio is that of two times of one round.
"""

import argparse
import json
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from unittest import mock

import torch

# Decided when Triton's kernels are first imported.
if not torch.cuda.is_available():
    os.environ['TRITON_INTERPRET'] = '1'

import triton
from triton.runtime import KernelInterface

from autoreg_vit import ops
from autoreg_vit.ops import triton as kernels
from autoreg_vit.ops.packing import split

from . import report

# The public function is to cost no more than so many times the plain one.
GOALS = {'forward': 2.0, 'forward+backward': 1.6}
BATCH, TOKENS, HEADS, HEAD_DIM = 1, 196, 2, 64
LAYOUTS = {'qkv': ops.segment_attention_qkvpacked, 'q+kv': ops.segment_attention_kvpacked,
           'q,k,v': ops.segment_attention}
COMPILED_CALLS = 8
SCALE = HEAD_DIM ** -0.5

Call = Callable[[], list[torch.Tensor]]


@contextmanager
def without_kernels() -> Iterator[None]:
    """Launchers run, and their kernels do not."""
    with mock.patch.object(KernelInterface, '__getitem__', lambda kernel, grid: lambda *arguments, **options: None):
        yield


@contextmanager
def through(way: str) -> Iterator[None]:
    """Calls of the public function see their operator where `way` says so."""
    with mock.patch.object(kernels, 'observed', lambda *tensors: True) if way == 'operator' else nullcontext():
        yield


class Plain(torch.autograd.Function):
    """The launchers and what autograd must have, without checks or choices."""

    @staticmethod
    def forward(ctx, limits, scale, *projections):
        out, lse = kernels.forward.forward(*split(projections), limits, scale * math.log2(math.e))
        ctx.save_for_backward(limits, out, lse, *projections)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx, grad):
        limits, out, lse, *projections = ctx.saved_tensors
        gradients = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in projections]
        kernels.backward.gradients(
            *split(projections), limits, out, grad.contiguous(), lse, *split(gradients), ctx.scale)
        return None, None, *gradients


def make_projections(layout: str, device: torch.device) -> list[torch.Tensor]:
    """Projections of `layout`, float16, which the interpreter takes too, and require their gradients."""
    q, k, v = torch.zeros(3, BATCH, TOKENS, HEADS, HEAD_DIM, dtype=torch.float16, device=device).unbind()
    projections = {'qkv': [torch.stack([q, k, v], 2)], 'q+kv': [q, torch.stack([k, v], 2)], 'q,k,v': [q, k, v]}[layout]
    return [x.clone().requires_grad_() for x in projections]


def ways(layout: str, device: torch.device) -> dict[str, tuple[Call, list[torch.Tensor]]]:
    """All ways but the compiled one, each with the tensors that it differentiates by."""
    projections = make_projections(layout, device)
    limits = torch.full((BATCH, TOKENS), TOKENS, dtype=torch.int32, device=device)
    attend = LAYOUTS[layout]

    def plain() -> list[torch.Tensor]:
        return [Plain.apply(limits, SCALE, *projections)]

    def public() -> list[torch.Tensor]:
        return [attend(*projections, limits, impl='triton')]

    return {'plain': (plain, projections), 'segment_attention': (public, projections),
            'operator': (public, projections)}


def compiled(layout: str, device: torch.device) -> tuple[Call, list[torch.Tensor]]:
    """As many calls as `COMPILED_CALLS`, each with projections of its own, in one graph."""
    every = [make_projections(layout, device) for _ in range(COMPILED_CALLS)]
    limits = torch.full((BATCH, TOKENS), TOKENS, dtype=torch.int32, device=device)
    attend = LAYOUTS[layout]

    @torch.compile(fullgraph=True)
    def run(every):
        return [attend(*projections, limits, impl='triton') for projections in every]

    return lambda: run(every), [x for projections in every for x in projections]


def microseconds(call: Call, inputs: list[torch.Tensor], backward: bool, repeats: int) -> float:
    """CPU time of one attention, its outputs counted."""
    outputs = call()
    gradients = [torch.zeros_like(out) for out in outputs]
    start = time.process_time()
    for _ in range(repeats):
        outputs = call()
        if backward:
            torch.autograd.grad(outputs, inputs, gradients)
    return (time.process_time() - start) / (repeats * len(outputs)) * 1e6


def measure(layout: str, device: torch.device, rounds: int, calls: int) -> list[dict]:
    """A row for each way and pass: medians, and 20th and 80th percentiles, of times and of ratios to the plain way."""
    every = {**ways(layout, device), 'compiled': compiled(layout, device)}
    rows = []
    for backward in (False, True):
        times: dict[str, list[float]] = {way: [] for way in every}
        for _ in range(rounds + 1):
            for way, (call, inputs) in every.items():
                repeats = max(1, calls // COMPILED_CALLS) if way == 'compiled' else calls
                with through(way):
                    times[way].append(microseconds(call, inputs, backward, repeats))
        times = {way: t[1:] for way, t in times.items()}  # the first round warms up
        for way, t in times.items():
            ratios = [a / b for a, b in zip(t, times['plain'])]
            rows.append({'layout': layout, 'way': way, 'pass': 'forward+backward' if backward else 'forward',
                         **_spread('us', t, 1), **_spread('ratio', ratios, 2)})
    return rows


def _spread(name: str, values: list[float], digits: int) -> dict[str, float]:
    fifths = statistics.quantiles(values, n=5)
    return {f'median_{name}': round(statistics.median(values), digits), f'p20_{name}': round(fifths[0], digits),
            f'p80_{name}': round(fifths[3], digits)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--rounds', type=int, default=100, help='at least 2')
    parser.add_argument('--calls', type=int, default=16, help='calls of each way in a round')
    parser.add_argument('--output', type=Path)
    args = parser.parse_args()
    if args.rounds < 2 or args.calls < 1:
        parser.error('a spread needs at least 2 rounds, of at least 1 call each.')
    torch.set_num_threads(1)
    device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    rows = []
    with without_kernels():
        for layout in LAYOUTS:
            rows += measure(layout, device, args.rounds, args.calls)
    missed = 0
    for row in rows:
        goal = GOALS[row['pass']] if row['way'] == 'segment_attention' else None
        missed += bool(goal) and row['median_ratio'] > goal
        print(f"{row['layout']:6} {row['pass']:17} {row['way']:18} {row['median_us']:7.1f} us "
              f"({row['p20_us']:.1f} to {row['p80_us']:.1f}), {row['median_ratio']:.2f} x plain "
              f"({row['p20_ratio']:.2f} to {row['p80_ratio']:.2f})" + (f', goal {goal}' if goal else ''))
    print(f'{missed} of {2 * len(LAYOUTS)} goals missed.' if missed else 'Every goal is met.')
    output = args.output or report.RESULTS / f'host_cost-{report.device_name(device)}.json'
    settings = {'shape': [BATCH, TOKENS, HEADS, HEAD_DIM], 'dtype': 'float16', 'threads': 1, 'rounds': args.rounds,
                'calls': args.calls, 'compiled_calls': COMPILED_CALLS, 'triton': triton.__version__}
    output.write_text(json.dumps({**report.provenance(), 'settings': settings, 'goals': GOALS, 'rows': rows}, indent=1)
                      + '\n')


if __name__ == '__main__':
    main()
