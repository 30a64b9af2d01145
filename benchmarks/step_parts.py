"""The mix of memories and the patch embedding in a training step, against the formulas that they are.

    python -m benchmarks.step_parts [--model randsac_vit_tiny_patch4_32] [--depth 12] [--batch-size 64] [--rounds 10]
        [--precisions float32 bfloat16] [--compile] [--device cpu|cuda] [--output FILE]

Four steps take turns in one process, on the same weights, images and ranks: as it is; with `torch.einsum` over a stack
of the encoder's layers; with timm's convolution; with both. Each in float32 and under bfloat16 autocast, which takes
ten times as long on a CPU without products in bfloat16. A ratio is of two times of one round; memory, on a GPU, is the
step's peak beyond what it began with.
"""

import argparse
import json
import statistics
from contextlib import ExitStack
from pathlib import Path
from unittest import mock

import timm
import torch

from autoreg_vit.engine.machine import keep_freed_memory
from autoreg_vit.models import AutoregressiveViT, decoders, pretraining
from autoreg_vit.models.interface import positions_of

from .report import RESULTS, device_name, provenance
from .timing import peak_memory, seconds


def by_stack(weights, layers):
    return torch.einsum('lk,kbnc->lbnc', weights, torch.stack(layers)).unbind()


def by_convolution(encoder, images, layout):
    positions = positions_of(encoder)[:, encoder.num_prefix_tokens:]
    return layout.sort(encoder.patch_embed(images) + positions, layout.encoded)


VARIANTS = {
    'as it is': {}, 'stack': {(decoders, 'mix_layers'): by_stack},
    'convolution': {(pretraining, 'embed_patches'): by_convolution},
    'both': {(decoders, 'mix_layers'): by_stack, (pretraining, 'embed_patches'): by_convolution},
}


def make_step(model: AutoregressiveViT, images: torch.Tensor, ranks: torch.Tensor, variant: str, autocast: bool,
              compiled: bool):
    """A forward and backward pass in one of the variants, which it is compiled in."""
    def forward():
        with torch.autocast(images.device.type, torch.bfloat16, enabled=autocast):
            return model(images, ranks).loss

    run = torch.compile(forward) if compiled else forward

    def step() -> float:
        with ExitStack() as stack:
            for (module, name), function in VARIANTS[variant].items():
                stack.enter_context(mock.patch.object(module, name, function))
            loss = run()
            loss.backward()
        model.zero_grad(set_to_none=False)
        return loss.item()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--model', default='randsac_vit_tiny_patch4_32')
    parser.add_argument('--depth', type=int, default=12)
    parser.add_argument('--batch-size', type=int, default=64)
    parser.add_argument('--rounds', type=int, default=10, help='at least 2')
    parser.add_argument('--precisions', nargs='+', default=['float32', 'bfloat16'], choices=['float32', 'bfloat16'])
    parser.add_argument('--compile', action='store_true')
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu', choices=['cpu', 'cuda'])
    parser.add_argument('--output', type=Path)
    args = parser.parse_args()
    if args.rounds < 2:
        parser.error('a spread needs at least 2 rounds.')
    torch.manual_seed(0)
    device = torch.device(args.device)
    if device.type == 'cpu':
        keep_freed_memory()
    model = timm.create_model(args.model, depth=args.depth).to(device)
    images = torch.randn(args.batch_size, 3, *model.encoder.patch_embed.img_size, device=device)
    ranks, rows = model.draw_ranks(args.batch_size, device=device), []
    for precision in args.precisions:
        torch.compiler.reset()
        steps = {name: make_step(model, images, ranks, name, precision == 'bfloat16', args.compile)
                 for name in VARIANTS}
        found = {name: step() for name, step in steps.items()}
        times = {name: [] for name in VARIANTS}
        for number in range(args.rounds):
            for name in [*VARIANTS][::1 if number % 2 else -1]:
                times[name].append(seconds(steps[name], device))
        for name in VARIANTS:
            ratios = [a / b for a, b in zip(times[name], times['as it is'])]
            fifths = statistics.quantiles(ratios, n=5)
            rows.append({
                'precision': precision, 'variant': name, 'median_ms': round(statistics.median(times[name]) * 1e3, 2),
                'ratio': round(statistics.median(ratios), 3), 'ratio_p20': round(fifths[0], 3),
                'ratio_p80': round(fifths[3], 3), 'loss': found[name], 'peak_mib': peak_memory(steps[name], device)})
            print(rows[-1], flush=True)
    output = args.output or RESULTS / f'step_parts-{device_name(device)}.json'
    output.write_text(json.dumps({
        **provenance(), 'threads': torch.get_num_threads(), 'model': args.model, 'depth': args.depth,
        'batch_size': args.batch_size, 'rounds': args.rounds, 'compile': args.compile, 'rows': rows}, indent=1) + '\n')


if __name__ == '__main__':
    main()
