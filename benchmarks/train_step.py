"""Images a second of a whole pretraining step, against the published design and this machine's matrix products.

    python benchmarks/train_step.py [--batch-size 64] [--rounds 5] [--output FILE]

For RandSAC and SAIM with ViT-Tiny at 32 x 32, each variant lives in a process of its own and takes a turn a round, so
that a machine whose speed drifts treats all alike; ratios are taken round by round. A turn is one step to warm up,
since the memory of a waiting process may be taken away, and the median of three that count.

- package: the step as `autoreg-vit pretrain` runs it;
- eager: the same with the eager implementation of segment attention;
- default_malloc: the same, but freed memory goes back to the kernel (without `keep_freed_memory`);
- dense: the way SAIM's published code works: float masks [B, 1, N, N] of 0 and -inf built once a step and added to
  scores, unfused softmax, separate q, k and v, float32, memory handled as by default.

The ceiling is the fastest product of two 2048 x 2048 matrices seen in any round, in the precision of the step. FLOPs
are those of matrix products, attention counted over all keys, forward and backward.
"""

import argparse
import json
import multiprocessing
import statistics
import time
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

def worker(pipe, model_name: str, variant: str, batch_size: int, threads: int) -> None:
    """Answer each message with the seconds of a step; the first answer is its FLOPs."""
    torch.set_num_threads(threads)
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

    with FlopCounterMode(display=False) as counter:
        step()
    pipe.send(counter.get_total_flops())
    while pipe.recv() == 'step':
        step()
        times = []
        for _ in range(3):
            start = time.perf_counter()
            step()
            times.append(time.perf_counter() - start)
        pipe.send(statistics.median(times))

def matmul_flops(dtype: torch.dtype) -> float:
    """FLOP/s of the fastest of five products of 2048 x 2048 matrices."""
    a, b = torch.randn(2, 2048, 2048).to(dtype)
    best = float('inf')
    for _ in range(5):
        start = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - start)
    return 2 * 2048 ** 3 / best

def serialization_seconds(model_name: str, batch_size: int) -> float:
    """Median seconds of drawing ranks, sorting and computing limits for a batch."""
    model, times = timm.create_model(model_name), []
    for _ in range(11):
        start = time.perf_counter()
        Layout.of(model.draw_ranks(batch_size), model.first_segment, model.encoder.num_prefix_tokens)
        times.append(time.perf_counter() - start)
    return statistics.median(times)

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
    dtype = torch.bfloat16 if precision == 'bfloat16' else torch.float32
    threads, rows = torch.get_num_threads(), []
    for model_name in MODELS:
        pipes, flops, seconds, ceilings = {}, {}, {v: [] for v in VARIANTS}, []
        for variant in VARIANTS:
            pipes[variant], theirs = context.Pipe()
            context.Process(target=worker, args=(theirs, model_name, variant, args.batch_size, threads),
                            daemon=True).start()
            flops[variant] = pipes[variant].recv()
        for _ in range(args.rounds):
            ceilings.append(matmul_flops(dtype))
            for variant, pipe in pipes.items():
                pipe.send('step')
                seconds[variant].append(pipe.recv())
        for pipe in pipes.values():
            pipe.send('stop')
        ceiling = max(ceilings)
        serialization = serialization_seconds(model_name, args.batch_size)
        for variant in VARIANTS:
            rows.append({
                'model': model_name, 'variant': variant, 'batch_size': args.batch_size,
                'precision': 'float32' if variant == 'dense' else precision,
                'images_per_second': spread([args.batch_size / s for s in seconds[variant]], 1),
                'speed_over_dense': spread([d / s for d, s in zip(seconds['dense'], seconds[variant])], 2),
                'gflop_per_image': round(flops['package'] / args.batch_size / 1e9, 3),
                'fraction_of_ceiling': spread([flops['package'] / s / ceiling for s in seconds[variant]]),
                'ceiling_gflops': round(ceiling / 1e9, 1),
                'serialization_share_of_step': round(serialization / statistics.median(seconds[variant]), 5),
            })
            print(rows[-1], flush=True)
    result = {**provenance(), 'threads': threads, 'rounds': args.rounds, 'rows': rows}
    with open(args.output, 'w') as file:
        file.write(json.dumps(result, indent=2) + '\n')


if __name__ == '__main__':
    main()
