"""Images a second of a whole pretraining step, against the published design and this machine's matrix products.

    python benchmarks/train_step.py [--batch-size 64] [--rounds 5] [--output FILE]

For RandSAC and SAIM with ViT-Tiny at 32 x 32, the variants take turns, round by round, each turn in a fresh process
that has the machine to itself; ratios are taken within a round. A turn is two steps to warm up, then five that count,
a product of matrices before each: the turn's time is their median, its ceiling the fastest product.

- package: the step as `autoreg-vit pretrain` runs it;
- eager: the same with the eager implementation of segment attention;
- default_malloc: the same, but freed memory goes back to the kernel (without `keep_freed_memory`);
- dense: the way SAIM's published code works: float masks [B, 1, N, N] of 0 and -inf built once a step and added to
  scores, unfused softmax, separate q, k and v, float32, memory handled as by default.

The products are of two 2048 x 2048 matrices in the precision of the step. FLOPs are those of matrix products, attention
counted over all keys, forward and backward.
"""

import argparse
import json
import multiprocessing
import statistics
import time
from collections.abc import Callable
from unittest import mock

import timm
import torch
from report import RESULTS, provenance
from torch.utils.flop_counter import FlopCounterMode

from autoreg_vit import ops
from autoreg_vit.serialization import Layout
from autoreg_vit.train.runtime import autocast, keep_freed_memory, resolve_precision

MODELS = ('randsac_vit_tiny_patch4_32', 'saim_vit_tiny_patch4_32')
VARIANTS = ('package', 'eager', 'default_malloc', 'dense')
CPU = torch.device('cpu')


class DenseAttention:
    """Segment attention from float masks that are built once a step, with contiguous q, k and v."""

    def __init__(self):
        self.masks = {}

    def mask(self, limits: torch.Tensor, keys: int) -> torch.Tensor:
        if id(limits) not in self.masks:
            hidden = torch.arange(keys) >= limits[..., None]
            self.masks[id(limits)] = torch.zeros(hidden.shape).masked_fill(hidden, -torch.inf)[:, None]
        return self.masks[id(limits)]

    def __call__(self, q, k, v, limits, **_):
        q, k, v = (x.transpose(1, 2).contiguous() for x in (q, k, v))
        scores = (q @ k.transpose(-2, -1)) * q.shape[-1] ** -0.5 + self.mask(limits, k.shape[2])
        return (scores.softmax(dim=-1) @ v).transpose(1, 2)


def turn(pipe, model_name: str, variant: str, batch_size: int) -> None:
    """Send the FLOPs of a step, its seconds and the FLOP/s of the fastest product of matrices."""
    torch.manual_seed(0)
    if variant in ('package', 'eager'):
        keep_freed_memory()
    precision = 'float32' if variant == 'dense' else resolve_precision('auto', CPU)
    model = timm.create_model(model_name)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)
    images = torch.randn(batch_size, 3, 32, 32)
    dense = DenseAttention()
    patches = []
    if variant == 'eager':
        patches.append(mock.patch('autoreg_vit.ops.api.choose_implementation', lambda q, k: 'eager'))
    elif variant == 'dense':
        patches.append(mock.patch.object(
            ops, 'segment_attention_qkvpacked', lambda qkv, limits: dense(*qkv.unbind(2), limits)))
        patches.append(mock.patch.object(
            ops, 'segment_attention_kvpacked', lambda q, kv, limits: dense(q, *kv.unbind(2), limits)))
    for patch in patches:
        patch.start()

    def step() -> None:
        dense.masks.clear()
        with autocast(precision, CPU):
            loss = model(images).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    matrices = torch.randn(2, 2048, 2048, dtype=torch.bfloat16 if precision == 'bfloat16' else torch.float32)
    with FlopCounterMode(display=False) as counter:
        step()
    step()
    products, steps = [], []
    for _ in range(5):
        products.append(seconds(lambda: torch.mm(*matrices)))
        steps.append(seconds(step))
    pipe.send((counter.get_total_flops(), statistics.median(steps), 2 * 2048 ** 3 / min(products)))


def seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def serialization_seconds(model_name: str, batch_size: int) -> float:
    """Median seconds of drawing ranks, sorting and computing limits for a batch."""
    model = timm.create_model(model_name)
    return statistics.median(
        seconds(lambda: Layout.of(model.draw_ranks(batch_size), model.first_segment, model.encoder.num_prefix_tokens))
        for _ in range(11))


def spread(values: list[float], digits: int = 3) -> dict[str, float]:
    return {'min': round(min(values), digits), 'median': round(statistics.median(values), digits),
            'max': round(max(values), digits)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--batch-size', type=int, default=64)
    parser.add_argument('--rounds', type=int, default=5)
    parser.add_argument('--output', default=str(RESULTS / 'train_step-cpu.json'))
    args = parser.parse_args()
    context = multiprocessing.get_context('spawn')
    precision = resolve_precision('auto', CPU)
    rows = []
    for model_name in MODELS:
        flops, times, ceilings = {}, {v: [] for v in VARIANTS}, {v: [] for v in VARIANTS}
        for _ in range(args.rounds):
            for variant in VARIANTS:
                mine, theirs = context.Pipe()
                process = context.Process(target=turn, args=(theirs, model_name, variant, args.batch_size), daemon=True)
                process.start()
                flops[variant], time_of_step, ceiling = mine.recv()
                times[variant].append(time_of_step)
                ceilings[variant].append(ceiling)
                process.join()
        serialization = serialization_seconds(model_name, args.batch_size)
        for variant in VARIANTS:
            rows.append({
                'model': model_name, 'variant': variant, 'batch_size': args.batch_size,
                'precision': 'float32' if variant == 'dense' else precision,
                'images_per_second': spread([args.batch_size / s for s in times[variant]], 1),
                'speed_over_dense': spread([d / s for d, s in zip(times['dense'], times[variant])], 2),
                'gflop_per_image': round(flops['package'] / args.batch_size / 1e9, 3),
                'fraction_of_ceiling': spread(
                    [flops['package'] / s / c for s, c in zip(times[variant], ceilings[variant])]),
                'ceiling_gflops': spread([c / 1e9 for c in ceilings[variant]], 1),
                'serialization_share_of_step': round(serialization / statistics.median(times[variant]), 5),
            })
            print(rows[-1], flush=True)
    result = {**provenance(), 'threads': torch.get_num_threads(), 'rounds': args.rounds, 'rows': rows}
    with open(args.output, 'w') as file:
        file.write(json.dumps(result, indent=2) + '\n')


if __name__ == '__main__':
    main()
