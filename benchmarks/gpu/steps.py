"""One model's whole training step, captured, compiled and plain, and where its time goes; prepared first, timed when
told.

    python -m benchmarks.gpu.steps --model randsac_vit_base --batch-size 64 --device cuda --output FILE

Adds rows to FILE, a JSON object a line. The first, `ready`, says that everything is compiled and memory is given back;
then each line of its standard input names a variant to be timed. At the end of its input it ends.
"""

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch

from autoreg_vit.engine.machine import resolve_precision
from autoreg_vit.settings.pretraining import PretrainConfig

from ..flops import training_gflops
from ..timing import seconds
from ..train_step import product_rate, trainer_of
from .profile import kernels_of, words

VARIANTS = ('captured', 'compiled', 'plain')


class Worker:
    """A model on a device, with images of its size.

    Args:
        model_name: A pretraining model.
        batch_size: Images a step.
        device: Where it trains.
        options: Of the model, for toy sizes.
    """

    def __init__(self, model_name: str, batch_size: int, device: torch.device, **options: Any):
        torch.manual_seed(0)
        self.device, self.precision = device, resolve_precision('auto', device)
        self.model = timm.create_model(model_name, **options).to(device)
        self.images = torch.randn(batch_size, 3, *self.model.encoder.patch_embed.img_size, device=device)
        self.flops = batch_size * 1e9 * training_gflops(PretrainConfig(model=model_name, **options))

    def step(self, variant: str) -> Callable[[], torch.Tensor]:
        trainer = trainer_of(self.model, lambda number: self.images, self.device, cuda_graph=variant == 'captured',
                             compile=variant != 'plain')
        return trainer.take_step

    def prepare(self) -> None:
        """Compile all that the variants launch."""
        step = self.step('compiled')
        step()
        step()
        del step
        self.free()

    def free(self) -> None:
        gc.collect()
        if self.device.type == 'cuda':
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def time(self, variant: str) -> dict[str, Any]:
        """What a step takes, and where its time goes."""
        if variant == 'captured' and self.device.type != 'cuda':
            return {'refused': 'a CUDA graph needs a GPU'}
        step, product = self.step(variant), product_rate(self.precision, self.device,
                                                         None if self.device.type == 'cuda' else 64)
        for _ in range(5):
            step()
        count = min(max(int(0.5 / seconds(step, self.device)), 1), 5) if self.device.type == 'cuda' else 1
        rates, times = [], []
        for _ in range(5):
            rates.append(product())
            times.append(seconds(lambda: [step() for _ in range(count)], self.device) / count)
        median = statistics.median(times)
        row = {
            'images_per_second': round(len(self.images) / median, 1), 'ms': round(median * 1e3, 3),
            'ms_least': round(min(times) * 1e3, 3), 'ms_most': round(max(times) * 1e3, 3),
            'ceiling_tflops': round(max(rates) / 1e12, 2),
            'fraction_of_ceiling': round(self.flops / median / max(rates), 4),
            'peak_gib': round(torch.cuda.max_memory_allocated() / 2 ** 30, 2) if self.device.type == 'cuda' else None,
        }
        kernels = kernels_of(step, 3, self.device)
        row['kernels_ms'] = dict(sorted(kernels.items(), key=lambda item: -item[1])[:12])
        row['profile'] = words(kernels, row['ms'], self.device.type)
        return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--model', required=True)
    parser.add_argument('--batch-size', type=int, required=True)
    parser.add_argument('--device', default='cuda')
    parser.add_argument('--options', type=json.loads, default={}, help='of the model, as JSON, for toy sizes')
    parser.add_argument('--output', type=Path, required=True)
    args = parser.parse_args()

    def write(**row: Any) -> None:
        with args.output.open('a', encoding='utf-8') as file:
            file.write(json.dumps({'model': args.model, 'batch_size': args.batch_size, **row}) + '\n')

    start = time.monotonic()
    worker = Worker(args.model, args.batch_size, torch.device(args.device), **args.options)
    worker.prepare()
    write(event='ready', seconds=round(time.monotonic() - start, 1))
    for line in sys.stdin:
        variant = line.strip()
        if variant not in VARIANTS:
            raise SystemExit(f'Unknown variant {variant!r}: expected {", ".join(VARIANTS)}, one a line.')
        try:
            row = worker.time(variant)
        # A variant that does not fit this card is a row that says so.
        except RuntimeError as error:
            row = {'refused': f'{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}'}
        worker.free()
        write(event='row', variant=variant, gflop_per_image=round(worker.flops / args.batch_size / 1e9, 3), **row)


if __name__ == '__main__':
    main()
