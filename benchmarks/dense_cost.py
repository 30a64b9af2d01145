"""What a step of dense prediction costs at the papers' real size: time, peak memory, and where the memory goes.

One whole step of training (forward, backward, AdamW) with ViT-Base in a process of its own. Memory is then split into
what every batch needs, weights, gradients and AdamW's two averages, and what each image adds, the tensors that the
forward pass keeps for the backward pass, so that other batches can be computed:

    bytes(batch) = 16 x parameters + batch x kept

in float32, roughly: gradients come as kept tensors go, and single operations need scratch space. On a CPU precision is
float32 and the peak is that of the process, whose own seconds stand beside those of the clock, since a machine may be
shared; on a GPU it is bfloat16 autocast and the allocator's peak, and the second of two steps is timed.

    python -m benchmarks.dense_cost [--tasks segment detect] [--device cuda] [--batch-size 16] [--grad-checkpointing]
"""

import argparse
import functools
import json
import multiprocessing
import os
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

import autoreg_vit  # noqa: F401  registers the encoders

from .report import RESULTS, provenance

ENCODER = 'vit_base_randsac'


def segment(batch_size: int, grad_checkpointing: bool) -> tuple[nn.Module, list[Any], str]:
    """UPerNet on 512 x 512 pixels, 150 classes (RandSAC C)."""
    from autoreg_vit.models.dense.segmenter import Segmenter

    encoder = timm.create_model(ENCODER, num_classes=0, dynamic_img_size=True, drop_path_rate=0.1)
    encoder.set_grad_checkpointing(grad_checkpointing)
    inputs = [torch.randn(batch_size, 3, 512, 512), torch.randint(0, 150, (batch_size, 512, 512))]
    return Segmenter(encoder, 150, 512), inputs, 'UPerNet, 512 x 512, 150 classes'


def detect(batch_size: int, grad_checkpointing: bool, attention: str = 'windowed') -> tuple[nn.Module, list[Any], str]:
    """Mask R-CNN on 1024 x 1024 pixels, 80 classes, eight objects an image (SAIM on COCO, Li et al. 2021)."""
    from autoreg_vit.models.dense.detector import ViTMaskRCNN

    encoder = timm.create_model(ENCODER, num_classes=0, dynamic_img_size=True, drop_path_rate=0.1)
    encoder.set_grad_checkpointing(grad_checkpointing)
    size, places = (1024, 1024), torch.arange(8) * 100.0
    boxes = torch.stack([places, places, places + 200, places + 150], dim=1)
    masks = torch.zeros(8, *size, dtype=torch.uint8)
    for mask, (left, top, right, bottom) in zip(masks, boxes.int().tolist()):
        mask[top:bottom, left:right] = 1
    targets = [{'boxes': boxes, 'labels': torch.arange(1, 9), 'masks': masks} for _ in range(batch_size)]
    network = ViTMaskRCNN(encoder, 80, size, mean=(0.5,) * 3, std=(0.25,) * 3, attention=attention)
    return network, [[torch.rand(3, *size) for _ in range(batch_size)], targets], (
        f'Mask R-CNN, 1024 x 1024, 80 classes, {attention} attention')


#: From batch size and whether to recompute blocks, to a network, what it takes to give its loss, and a description.
TASKS: dict[str, Callable[[int, bool], tuple[nn.Module, list[Any], str]]] = {
    'segment': segment, 'detect': detect, 'detect-global': functools.partial(detect, attention='global')}
#: Images of a step where none are named: UPerNet's batch norm needs two.
LEAST = {'segment': 2, 'detect': 1, 'detect-global': 1}


def measure(task: str, batch_size: int, grad_checkpointing: bool, device: str) -> dict[str, Any]:
    """One step, in this process, which has done nothing before."""
    on_gpu = device != 'cpu'
    before = 0 if on_gpu else _peak()
    torch.manual_seed(0)
    network, inputs, what = TASKS[task](batch_size, grad_checkpointing)
    network.to(device).train()
    inputs = _to(inputs, device)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, fused=True)
    for parameter in network.parameters():  # a step without effect, so that AdamW's averages are there as in any other
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    own, kept = {p.untyped_storage().data_ptr() for p in network.parameters()}, {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    seconds = []
    for _ in range(2 if on_gpu else 1):
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
            torch.cuda.synchronize()
        start, start_cpu = time.perf_counter(), time.process_time()
        kept.clear()
        with (torch.autocast(device, torch.bfloat16, enabled=on_gpu),
              torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)):
            loss = network(*inputs)
        loss = sum(loss.values()) if isinstance(loss, dict) else loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if on_gpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
        cpu_seconds = time.process_time() - start_cpu
    assert torch.isfinite(loss)
    parameters = sum(p.numel() for p in network.parameters())
    peak = torch.cuda.max_memory_allocated() if on_gpu else _peak() - before
    return {
        'task': task, 'what': what, 'encoder': ENCODER, 'batch_size': batch_size,
        'grad_checkpointing': grad_checkpointing, 'precision': 'bfloat16 autocast' if on_gpu else 'float32',
        'seconds': round(seconds[-1], 2), **({} if on_gpu else {'cpu_seconds': round(cpu_seconds, 2)}),
        'parameters': parameters, 'peak_gib': _gib(peak),
        'fixed_gib': _gib(16 * parameters), 'kept_gib_per_image': _gib(sum(kept.values()) / batch_size),
    }


def _to(value: Any, device: str) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(device)
    return {k: _to(v, device) for k, v in value.items()} if isinstance(value, dict) else [_to(v, device) for v in value]


def _gib(count: float) -> float:
    return round(count / 2 ** 30, 3)


def _peak() -> int:
    """Bytes of the largest resident set of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _run(queue: multiprocessing.Queue, *arguments: Any) -> None:
    queue.put(measure(*arguments))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--tasks', nargs='+', choices=TASKS, default=list(TASKS))
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--batch-size', type=int, help='by default the least that trains')
    parser.add_argument('--grad-checkpointing', action='store_true')
    parser.add_argument('--output', type=Path)
    args = parser.parse_args()

    context, rows = multiprocessing.get_context('spawn'), []
    for task in args.tasks:
        queue = context.Queue()
        batch_size = args.batch_size or LEAST[task]
        process = context.Process(target=_run, args=(queue, task, batch_size, args.grad_checkpointing, args.device))
        process.start()
        row = queue.get()
        process.join()
        for images in (2, 16):
            row[f'computed_gib_batch_{images}'] = round(row['fixed_gib'] + images * row['kept_gib_per_image'], 1)
        rows.append({**row, **provenance(), 'threads': os.environ.get('OMP_NUM_THREADS', torch.get_num_threads())})
        print(json.dumps(row, indent=2), flush=True)
    # Rows of tasks that were measured before stay; each row says where it comes from.
    output = args.output or RESULTS / f'dense_cost-{args.device.partition(":")[0]}.json'
    before = json.loads(output.read_text())['rows'] if output.exists() else []
    rows += [row for row in before if row['task'] not in args.tasks]
    rows.sort(key=lambda row: list(TASKS).index(row['task']))
    output.write_text(json.dumps({'rows': rows}, indent=2) + '\n')


if __name__ == '__main__':
    main()
