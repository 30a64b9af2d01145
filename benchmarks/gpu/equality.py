"""Whether steps replayed as a CUDA graph equal plain ones: losses and weights of twelve steps from one state, with the
same draws and images, to the bit.

    python -m benchmarks.gpu.equality --device cuda --output FILE

A row a design, written as it comes: the largest differences of losses and of weights between captured and plain steps
whose AdamW keeps its rate on the device too, which should be none; between captured steps and those of
`autoreg-vit pretrain` without a graph, whose AdamW has its rate in double precision on the host; and between plain
steps and themselves, without which the others would say nothing. A CPU has no CUDA graphs and gives the last alone.
"""

import argparse
import json
from pathlib import Path
from typing import Any
from unittest import mock

import timm
import torch

from autoreg_vit.engine.graph import GraphedStep

from ..train_step import trainer_of

STEPS = 12
MODELS = ('randsac_vit_tiny_patch4_32', 'saim_vit_tiny_patch4_32')
DEPTH = 4


def trained(
        model_name: str,
        batch_size: int,
        device: torch.device,
        *,
        graphed: bool = False,
        capturable: bool = False,
        compiled: bool = False,
        accumulate: int = 1,
        **options: Any,
) -> list[torch.Tensor]:
    """Losses [STEPS], then every weight after the steps: captured, or with the optimizer of a captured step, or
    compiled; each of `accumulate` batches."""
    torch.manual_seed(0)
    model = timm.create_model(model_name, **options).to(device)

    def images(number: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(number)
        return torch.randn(batch_size, 3, *model.encoder.patch_embed.img_size, generator=generator).to(device)

    # A graph that is never done with warming up is a plain step with its optimizer.
    warm_up = GraphedStep.warm_up if graphed else STEPS + 1
    with mock.patch.object(GraphedStep, 'warm_up', warm_up):
        trainer = trainer_of(model, images, device, cuda_graph=graphed or capturable,
                             compile=compiled, accumulate=accumulate)
        losses = [trainer.take_step() for _ in range(STEPS)]
    return [torch.stack(losses), *(p.detach() for p in model.parameters())]


def differences(one: list[torch.Tensor], other: list[torch.Tensor]) -> dict[str, float]:
    """The largest, of losses and of weights."""
    largest = [(a.double() - b.double()).abs().max().item() for a, b in zip(one, other)]
    return {'losses': largest[0], 'weights': max(largest[1:])}


def compare(model_name: str, batch_size: int, device: torch.device, **options: Any) -> dict[str, Any]:
    """A row; `equal` says whether nothing differs, None where nothing could be captured."""
    def train(**kind: bool) -> list[torch.Tensor]:
        return trained(model_name, batch_size, device, **kind, **options)

    plain = train()
    row = {'model': model_name, 'batch_size': batch_size, 'steps': STEPS, **options,
           'first_loss': plain[0][0].item(), 'last_loss': plain[0][-1].item(),
           'plain_again': differences(plain, train())}
    if device.type != 'cuda':
        return {**row, 'equal': None, 'refused': 'a CUDA graph needs a GPU'}
    captured = train(graphed=True)
    row['captured'] = differences(captured, train(capturable=True))
    row['captured_and_default'] = differences(captured, plain)
    return {**row, 'equal': not any(row['captured'].values())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--device', default='cuda')
    parser.add_argument('--batch-size', type=int, default=64)
    parser.add_argument('--depth', type=int, default=DEPTH)
    parser.add_argument('--embed-dim', type=int, default=192)
    parser.add_argument('--output', type=Path, required=True, help='rows are added to it, a JSON object a line')
    args = parser.parse_args()
    for name in MODELS:
        row = compare(name, args.batch_size, torch.device(args.device), depth=args.depth, embed_dim=args.embed_dim,
                      num_heads=args.embed_dim // 64 or 1)
        with args.output.open('a', encoding='utf-8') as file:
            file.write(json.dumps(row) + '\n')


if __name__ == '__main__':
    main()
