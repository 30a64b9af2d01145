"""Images a second of a whole pretraining step, against the published design and this machine's matrix products.

    python -m benchmarks.train_step [--device cpu|cuda] [--rounds 5] [--output FILE]

On a CPU: RandSAC and SAIM with ViT-Tiny at 32 x 32. On a GPU: RandSAC with ViT-Tiny and ViT-Small at 32 x 32, RandSAC
and SAIM with ViT-B/16 at 224. Images are synthetic and on the device. Variants take turns, round by round, each turn in
a fresh process that has the machine to itself; ratios are taken within a round. A turn is some steps to warm up, then
five measurements (of one step on a CPU, of ten on a GPU), a product of matrices before each: the turn's time is their
median, its ceiling the fastest product.

- package: on a CPU, the step of `autoreg-vit pretrain`;
- captured, compiled, plain: on a GPU, that step with --compile and --cuda-graph, with --compile, and with neither;
- eager, sdpa: the plain step with that implementation of segment attention;
- default_malloc: on a CPU, the package's step where freed memory goes back to the kernel;
- dense: the way SAIM's published code works: float masks [B, 1, N, N] of 0 and -inf built once a step and added to
  scores, unfused softmax, separate q, k and v, memory handled as by default.

Products are of two matrices, 2048 x 2048 on a CPU and 8192 x 8192 on a GPU, in the precision of the step. FLOPs are
those of matrix products, attention counted over all keys, forward and backward.
"""

import argparse
import itertools
import json
import multiprocessing
import statistics
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import timm
import torch

from autoreg_vit import ops
from autoreg_vit.commands.pretraining import Pretraining
from autoreg_vit.data.transforms import ImageSpec
from autoreg_vit.engine.machine import keep_freed_memory, resolve_precision
from autoreg_vit.engine.processes import Processes
from autoreg_vit.engine.trainer import Trainer
from autoreg_vit.models import AutoregressiveViT
from autoreg_vit.serialization import Layout
from autoreg_vit.settings.pretraining import PretrainConfig

from .flops import training_gflops
from .report import RESULTS, device_name, provenance
from .timing import seconds

# Models and images a step, by device.
MODELS = {
    'cpu': {'randsac_vit_tiny_patch4_32': 64, 'saim_vit_tiny_patch4_32': 64},
    'cuda': {'randsac_vit_tiny_patch4_32': 1024, 'randsac_vit_small_patch4_32': 1024, 'randsac_vit_base': 256,
             'saim_vit_base': 256},
}
VARIANTS = {'cpu': ('package', 'eager', 'default_malloc', 'dense'),
            'cuda': ('captured', 'compiled', 'plain', 'sdpa', 'dense')}


class DenseAttention:
    """Segment attention from float masks that are built once a step, with contiguous q, k and v."""

    def __init__(self):
        self.masks = {}

    def mask(self, limits: torch.Tensor, keys: int, dtype: torch.dtype) -> torch.Tensor:
        if id(limits) not in self.masks:
            hidden = torch.arange(keys, device=limits.device) >= limits[..., None]
            mask = torch.zeros(hidden.shape, dtype=dtype, device=limits.device).masked_fill(hidden, -torch.inf)
            self.masks[id(limits)] = mask[:, None]
        return self.masks[id(limits)]

    def __call__(self, q, k, v, limits, **_):
        q, k, v = (x.transpose(1, 2).contiguous() for x in (q, k, v))
        scores = (q @ k.transpose(-2, -1)) * q.shape[-1] ** -0.5 + self.mask(limits, k.shape[2], q.dtype)
        return (scores.softmax(dim=-1) @ v).transpose(1, 2)


class Repeated:
    """Stands in for training batches: what `images` gives for the number of a batch, [B, C, H, W] on the device."""
    per_epoch, on_device = 1000, True

    def __init__(self, images: Callable[[int], torch.Tensor]):
        self.images = images

    def start_at(self, batch: int) -> Iterator[tuple[torch.Tensor]]:
        for number in itertools.count(batch):
            yield (self.images(number),)

    def describe(self, batch: int, count: int) -> str:
        return f'batch {batch}'


def trainer_of(
        model: AutoregressiveViT,
        images: Callable[[int], torch.Tensor],
        device: torch.device,
        **settings: Any,
) -> Trainer:
    """What `autoreg-vit pretrain` trains a model with, about to take its first step.

    Args:
        model: On the device.
        images: From the number of a batch to its images [B, C, H, W] on the device.
        device: Where it trains.
        **settings: Of `PretrainConfig`, such as compile and cuda_graph.
    """
    batch_size = len(images(0))
    config = PretrainConfig(
        dataset='synthetic images', batch_size=batch_size, lr=1e-3 * 256 / batch_size, device=device.type, workers=0,
        precision=resolve_precision('auto', device), **settings)
    group = Processes(device)
    trainer = Trainer(config, Pretraining(config, model, ImageSpec.of(model), None, group), Repeated(images), group)
    trainer.begin()
    return trainer


def product_rate(precision: str, device: torch.device, side: int | None = None) -> Callable[[], float]:
    """A function that multiplies two matrices and gives the FLOP/s."""
    side = side or (8192 if device.type == 'cuda' else 2048)
    dtype = torch.bfloat16 if precision == 'bfloat16' else torch.float32
    matrices = torch.randn(2, side, side, device=device).to(dtype)
    return lambda: 2 * side ** 3 / seconds(lambda: torch.mm(*matrices), device)


def turn(pipe, device_name: str, model_name: str, variant: str, batch_size: int) -> None:
    """Send the seconds of a step, the FLOP/s of the fastest product of matrices, and the peak memory in MiB."""
    torch.manual_seed(0)
    device = torch.device(device_name)
    if device.type == 'cpu' and variant not in ('default_malloc', 'dense'):
        keep_freed_memory()
    precision = resolve_precision('auto', device)
    model = timm.create_model(model_name).to(device)
    images = torch.randn(batch_size, 3, *model.encoder.patch_embed.img_size, device=device)
    dense = DenseAttention()
    if variant in ('eager', 'sdpa'):
        ops.set_implementation(variant)
    if variant == 'dense':
        mock.patch.object(
            ops, 'segment_attention_qkvpacked', lambda qkv, limits: dense(*qkv.unbind(2), limits)).start()
        mock.patch.object(
            ops, 'segment_attention_kvpacked', lambda q, kv, limits: dense(q, *kv.unbind(2), limits)).start()
    trainer = trainer_of(model, lambda number: images, device, cuda_graph=variant == 'captured',
                         compile=variant in ('captured', 'compiled'))
    count = 10 if device.type == 'cuda' else 1

    def steps() -> None:
        for _ in range(count):
            dense.masks.clear()
            trainer.take_step()

    product = product_rate(precision, device)
    steps()
    steps()
    rates, times = [], []
    for _ in range(5):
        rates.append(product())
        times.append(seconds(steps, device))
    memory = torch.cuda.max_memory_allocated() / 2 ** 20 if device.type == 'cuda' else None
    pipe.send((statistics.median(times) / count, max(rates), memory))


def serialization_seconds(model_name: str, batch_size: int, device: torch.device) -> float:
    """Median seconds of drawing ranks, sorting and computing limits for a batch."""
    model = timm.create_model(model_name)

    def serialize() -> Layout:
        ranks = model.draw_ranks(batch_size, device=device)
        return Layout.of(ranks, model.first_segment, model.encoder.num_prefix_tokens)

    serialize()
    return statistics.median(seconds(serialize, device) for _ in range(11))


def spread(values: list[float], digits: int = 3) -> dict[str, float]:
    return {'min': round(min(values), digits), 'median': round(statistics.median(values), digits),
            'max': round(max(values), digits)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu', choices=['cpu', 'cuda'])
    parser.add_argument('--models', nargs='+', default=None, help='of those above; all by default')
    parser.add_argument('--rounds', type=int, default=5)
    parser.add_argument('--output', default=None)
    args = parser.parse_args()
    device = torch.device(args.device)
    output = args.output or RESULTS / f'train_step-{device_name(device)}.json'
    context, variants = multiprocessing.get_context('spawn'), VARIANTS[args.device]
    result = {**provenance(), 'threads': torch.get_num_threads(), 'rounds': args.rounds,
              'precision': resolve_precision('auto', device), 'rows': []}
    for model_name in args.models or MODELS[args.device]:
        batch_size = MODELS[args.device][model_name]
        times, ceilings, memory = ({v: [] for v in variants} for _ in range(3))
        for _ in range(args.rounds):
            for variant in variants:
                mine, theirs = context.Pipe()
                process = context.Process(
                    target=turn, args=(theirs, args.device, model_name, variant, batch_size), daemon=True)
                process.start()
                theirs.close()  # so that a turn that fails ends the wait with EOFError
                for record, value in zip((times, ceilings, memory), mine.recv()):
                    record[variant].append(value)
                process.join()
        flops = training_gflops(PretrainConfig(model=model_name)) * 1e9
        serialization = serialization_seconds(model_name, batch_size, device)
        for variant in variants:
            result['rows'].append({
                'model': model_name, 'variant': variant, 'batch_size': batch_size,
                'images_per_second': spread([batch_size / s for s in times[variant]], 1),
                'speed_over_dense': spread([d / s for d, s in zip(times['dense'], times[variant])], 2),
                'gflop_per_image': round(flops / 1e9, 3),
                'fraction_of_ceiling': spread(
                    [flops * batch_size / s / c for s, c in zip(times[variant], ceilings[variant])]),
                'ceiling_gflops': spread([c / 1e9 for c in ceilings[variant]], 1),
                'peak_memory_mib': round(max(memory[variant])) if device.type == 'cuda' else None,
                'serialization_share_of_step': round(serialization / statistics.median(times[variant]), 5),
            })
            print(result['rows'][-1], flush=True)
        # Written as it grows: a run that is stopped keeps what it has.
        with open(output, 'w') as file:
            file.write(json.dumps(result, indent=2) + '\n')


if __name__ == '__main__':
    main()
