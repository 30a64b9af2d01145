"""Segment attention against every alternative that an expert would pick, forward and forward with backward.

    python -m benchmarks.attention [--dtype bfloat16] [--tokens 64 196 576 1024] [--head-dims 32 64] [--output FILE]

Cases: RandSAC's encoder (blobs, 11 segments) and its cross-attention to memory; SAIM's encoder, plain causal with a
class token in front, so one token more, and its query stream, causal on rows shifted by that token. Each alternative is
timed twice:

- packed: from the projection [B, N, 3, H, D] to its gradient, as in a model;
- split: from q, k and v that already lie in the layout the alternative likes best, [B, H, N, D], to three gradients.
  Splitting and stacking are left out: the alternative at its very best. Segment attention has no use for it.

What an alternative prepares once a step (a mask, FlexAttention's blocks) is timed apart, in `prepare`. A result is
timed only after it was checked: its error against float64 must be at most twice the eager operator's in the same dtype
(beside the rounding of the result). Fractions of the floor are of what the GPU could do at best: the time to move each
input and output once or to multiply visible pairs alone, whichever is longer, at the bandwidth and the rate of products
measured in the same run. Without --device cuda (to try the script out), nothing but relative order means anything.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from tqdm import tqdm

from autoreg_vit.ops import segment_attention_kvpacked, segment_attention_qkvpacked
from autoreg_vit.serialization import Layout, Serialization

from .report import RESULTS, device_name, provenance
from .timing import measure, peak_memory

IMAGES_CHECKED = 2
# Tokens of a head whose scores one tile of a kernel holds.
ONE_TILE = 64


@dataclass
class Case:
    """Projections ([qkv], or [q, kv] for cross-attention), limits, and the gradient of the output [B, N, H, D]."""
    name: str
    projections: list[torch.Tensor]
    limits: torch.Tensor
    grad: torch.Tensor
    causal: bool

    def split(self) -> list[torch.Tensor]:
        """q, k, v [B, H, N, D], contiguous."""
        tensors = self.projections[0].unbind(2) if len(self.projections) == 1 else [
            self.projections[0], *self.projections[1].unbind(2)]
        return [x.detach().transpose(1, 2).contiguous().requires_grad_() for x in tensors]

    @property
    def keys(self) -> int:
        return self.projections[-1].shape[1]

    def first(self, images: int) -> 'Case':
        return Case(self.name, [x[:images].detach().requires_grad_() for x in self.projections], self.limits[:images],
                    self.grad[:images], self.causal)


def make_case(name: str, tokens: int, head_dim: int, batch: int, heads: int, dtype: torch.dtype, device) -> Case:
    """`tokens` patches on a square grid; SAIM has a class token in front of its keys, and of its encoder's queries."""
    generator = torch.Generator(device).manual_seed(0)
    side = round(tokens ** 0.5)
    if side * side != tokens:
        raise SystemExit(f'--tokens {tokens} is not a square number')
    saim = name.startswith('saim')
    if saim:
        ranks = Serialization('random', (side, side))(batch, generator=generator, device=device)
    else:
        ranks = Serialization('blobs', (side, side), min(11, tokens))(batch, generator=generator, device=device)
    layout = Layout.of(ranks, 'none' if saim else 'self', int(saim))
    limits = layout.encoder_limits if name in ('randsac', 'saim') else layout.memory_limits
    queries, keys = limits.shape[1], tokens + saim

    def random(length: int, *parts: int) -> torch.Tensor:
        return torch.randn(batch, length, *parts, heads, head_dim, generator=generator, device=device).to(dtype)

    projections = [random(keys, 3)] if name in ('randsac', 'saim') else [random(queries), random(keys, 2)]
    return Case(name, [x.requires_grad_() for x in projections], limits, random(queries), saim)


# Alternatives: what is prepared once a step, and attention from [B, H, N, D] to [B, H, N, D] with what was prepared.


def no_preparation(case: Case) -> None:
    return None


def visible_mask(case: Case) -> torch.Tensor:
    return torch.arange(case.keys, device=case.limits.device) < case.limits[:, None, :, None]


def float_mask(case: Case) -> torch.Tensor:
    """0 and -inf [B, 1, Nq, Nk] in the dtype of q, as a slice of rows whose length is a multiple of 8, which the fast
    kernels ask for."""
    padded = torch.full((*case.limits.shape, -(-case.keys // 8) * 8), float('-inf'), dtype=case.grad.dtype,
                        device=case.limits.device)
    columns = torch.arange(padded.shape[-1], device=case.limits.device)
    return padded.masked_fill_(columns < case.limits[..., None], 0)[:, None, :, :case.keys]


def plain(q, k, v, mask):
    scores = (q @ k.transpose(-2, -1)) * q.shape[-1] ** -0.5
    return scores.masked_fill(~mask, float('-inf')).softmax(-1) @ v


def sdpa(backend: SDPBackend) -> Callable:
    def attend(q, k, v, mask):
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return attend


def causal_sdpa(backend: SDPBackend) -> Callable:
    def attend(q, k, v, _):
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return attend


def flex_blocks(size: int) -> Callable[[Case], BlockMask]:
    """FlexAttention's block mask straight from the limits."""
    def prepare(case: Case) -> BlockMask:
        limits, queries, keys = case.limits, case.limits.shape[1], case.keys
        rows, columns = -(-queries // size), -(-keys // size)
        padded = F.pad(limits, (0, rows * size - queries), value=-1).view(len(limits), 1, rows, size)
        most = padded.amax(-1)
        least = padded.masked_fill(padded < 0, keys).amin(-1)
        full = (least // size).int()
        partial = (-(most // -size)).int() - full
        indices = torch.arange(columns, device=limits.device, dtype=torch.int32).expand(*full.shape, -1)
        return BlockMask.from_kv_blocks(
            partial, ((indices + full[..., None]) % columns).contiguous(), full, indices.contiguous(), BLOCK_SIZE=size,
            mask_mod=lambda b, h, i, j: j < limits[b, i], seq_lengths=(queries, keys))
    return prepare


def flex_created(case: Case) -> BlockMask:
    """FlexAttention's block mask the documented way."""
    limits = case.limits
    return create_block_mask(lambda b, h, i, j: j < limits[b, i], len(limits), None, limits.shape[1], case.keys,
                             device=limits.device)


def alternatives(case: Case, device: torch.device) -> dict[str, tuple[Callable, Callable]]:
    """Every peer that fits a case: name -> (prepare, attend)."""
    compiled_flex = torch.compile(flex_attention, dynamic=False)

    def flex(q, k, v, blocks):
        return compiled_flex(q, k, v, block_mask=blocks)

    found = {
        'plain masked attention': (visible_mask, plain),
        'plain masked attention, compiled': (visible_mask, torch.compile(plain, dynamic=False)),
        'SDPA math, float mask': (float_mask, sdpa(SDPBackend.MATH)),
    }
    if device.type == 'cuda':
        found['SDPA memory-efficient, float mask'] = (float_mask, sdpa(SDPBackend.EFFICIENT_ATTENTION))
        found['SDPA cuDNN, float mask'] = (float_mask, sdpa(SDPBackend.CUDNN_ATTENTION))
    for size in (64, 128):
        found[f'FlexAttention, compiled, blocks of {size}'] = (flex_blocks(size), flex)
    found['FlexAttention, compiled, create_block_mask'] = (flex_created, flex)
    if case.causal:
        found['SDPA flash, causal'] = (no_preparation, causal_sdpa(SDPBackend.FLASH_ATTENTION))
        if device.type == 'cuda':
            found['SDPA cuDNN, causal'] = (no_preparation, causal_sdpa(SDPBackend.CUDNN_ATTENTION))
    return found


# Runs: forward alone, and forward with backward.


def packed_run(case: Case, attend: Callable, prepared: object) -> Callable[[bool], list[torch.Tensor]]:
    """From projections to output [B, N, H, D] and, with backward, to the projections' gradients."""
    def run(backward: bool) -> list[torch.Tensor]:
        tensors = case.projections[0].unbind(2) if len(case.projections) == 1 else [
            case.projections[0], *case.projections[1].unbind(2)]
        out = attend(*(x.transpose(1, 2) for x in tensors), prepared).transpose(1, 2)
        return [out, *(torch.autograd.grad(out, case.projections, case.grad) if backward else ())]
    return run


def split_run(case: Case, attend: Callable, prepared: object) -> Callable[[bool], list[torch.Tensor]]:
    tensors, grad = case.split(), case.grad.transpose(1, 2).contiguous()

    def run(backward: bool) -> list[torch.Tensor]:
        out = attend(*tensors, prepared)
        return [out, *(torch.autograd.grad(out, tensors, grad) if backward else ())]
    return run


def own_run(case: Case, impl: str) -> Callable[[bool], list[torch.Tensor]]:
    """Segment attention of this package."""
    attend = segment_attention_qkvpacked if len(case.projections) == 1 else segment_attention_kvpacked

    def run(backward: bool) -> list[torch.Tensor]:
        out = attend(*case.projections, case.limits, impl=impl)
        return [out, *(torch.autograd.grad(out, case.projections, case.grad) if backward else ())]
    return run


def check(case: Case, make_run: Callable[[Case], Callable], layout: str, backward: bool) -> str | None:
    """What is wrong with the results of the first images, or None."""
    case = case.first(IMAGES_CHECKED)
    exact = Case(case.name, [x.detach().double().requires_grad_() for x in case.projections], case.limits,
                 case.grad.double(), case.causal)
    got, plain_results = make_run(case)(backward), own_run(case, 'eager')(backward)
    if layout == 'split':
        out, *gradients = (x.transpose(1, 2) for x in got)
        packs = [gradients] if len(case.projections) == 1 else [gradients[:1], gradients[1:]]
        got = [out, *(torch.stack(pack, 2) if len(pack) > 1 else pack[0] for pack in packs if pack)]
    for name, value, eager, want in zip(('out', 'grad', 'grad'), got, plain_results, own_run(exact, 'eager')(backward)):
        error, eager_error = ((x.double() - want).abs().max().item() for x in (value, eager))
        allowed = 2 * eager_error + torch.finfo(case.grad.dtype).eps / 4 * want.abs().max().item()
        if not error <= allowed:
            return f'wrong {name}: error {error:.2e}, allowed {allowed:.2e}'
    return None


def floors(case: Case, bandwidth: float, rate: float) -> dict[bool, float]:
    """Microseconds at least of forward and of forward with backward."""
    heads, head_dim = case.grad.shape[2:]
    out = case.grad.numel() * case.grad.element_size()
    # Of the tensors that a backward pass reads, the output is one that it can do without where a tile holds all scores.
    read_again = 0 if max(case.grad.shape[1], case.keys) <= ONE_TILE else out
    projections = sum(x.numel() * x.element_size() for x in case.projections)
    rows = case.limits.numel() * 4 * (1 + heads)  # limits and LSE
    pairs = case.limits.sum().item() * heads
    forward = max((projections + out + rows) / bandwidth, 4 * head_dim * pairs / rate)
    backward = max((2 * projections + out + read_again + rows) / bandwidth, 10 * head_dim * pairs / rate)
    return {False: forward * 1e6, True: (forward + backward) * 1e6}


def measured_limits(dtype: torch.dtype, device: torch.device) -> tuple[float, float]:
    """Bytes/s of a copy and FLOP/s of a product of large matrices."""
    size = 2 ** 28 if device.type == 'cuda' else 2 ** 22
    source, target = torch.empty(2, size, dtype=torch.uint8, device=device)
    bandwidth = 2 * size / measure(lambda: target.copy_(source), device)['median_us'] * 1e6
    side = 8192 if device.type == 'cuda' else 512
    a, b = torch.randn(2, side, side, device=device).to(dtype)
    return bandwidth, 2 * side ** 3 / measure(lambda: a @ b, device)['median_us'] * 1e6


def benchmark(case: Case, device: torch.device, bandwidth: float, rate: float, seconds: float) -> list[dict]:
    floor = floors(case, bandwidth, rate)
    batch, queries, heads, head_dim = case.grad.shape
    rows = []

    def add(name: str, layout: str, make_run: Callable[[Case], Callable], prepare: Callable | None = None) -> None:
        for backward in (False, True):
            row = {'case': case.name, 'tokens': queries, 'head_dim': head_dim, 'batch': batch, 'heads': heads,
                   'pass': 'forward+backward' if backward else 'forward', 'name': name, 'layout': layout}
            rows.append(row)
            try:
                fault = check(case, make_run, layout, backward)
                if fault is None:
                    run = make_run(case)
                    row.update(measure(lambda run=run, backward=backward: run(backward), device, seconds))
                    row['floor_us'] = round(floor[backward], 2)
                    row['fraction_of_floor'] = round(floor[backward] / row['median_us'], 4)
                    row['peak_mib'] = peak_memory(lambda run=run, backward=backward: run(backward), device)
                    if prepare is not None and not backward:
                        row['prepare'] = measure(lambda: prepare(case), device, seconds)
                else:
                    row['refused'] = fault
            # An alternative that cannot run here is a row that says why.
            except Exception as error:
                row['refused'] = f'{type(error).__name__}: {str(error).strip().splitlines()[0][:160]}'

    for impl in ('triton', 'eager', 'sdpa'):
        add(f'segment_attention, {impl}', 'packed', lambda c, impl=impl: own_run(c, impl))
    for name, (prepare, attend) in alternatives(case, device).items():
        own = None if prepare is no_preparation else prepare
        for layout, make in (('packed', packed_run), ('split', split_run)):
            if layout == 'split' and name.startswith('FlexAttention') and 'create_block_mask' in name:
                continue  # differs from the blocks of 128 in preparation alone
            add(name, layout, lambda c, make=make, attend=attend, prepare=prepare: make(c, attend, prepare(c)), own)
    return rows


def plot(rows: list[dict], path: Path, title: str) -> None:
    """Forward with backward: time over the floor, one panel a case and head dimension."""
    import matplotlib
    matplotlib.use('Agg')
    from matplotlib import pyplot as plt

    rows = [r for r in rows if r['pass'] == 'forward+backward' and 'median_us' in r and r['layout'] == 'packed']
    panels = sorted({(r['case'], r['head_dim']) for r in rows})
    names = list(dict.fromkeys(r['name'] for r in rows))
    figure, axes = plt.subplots(len(panels), 1, figsize=(9, 2.9 * len(panels)), squeeze=False, layout='constrained')
    for axis, (case, head_dim) in zip(axes[:, 0], panels):
        own = [r for r in rows if (r['case'], r['head_dim']) == (case, head_dim)]
        lengths = sorted({r['tokens'] for r in own})
        for index, name in enumerate(names):
            for row in (r for r in own if r['name'] == name):
                axis.bar(lengths.index(row['tokens']) + (index - len(names) / 2) * 0.8 / len(names),
                         row['median_us'] / row['floor_us'], 0.8 / len(names), color=f'C{index}')
        axis.axhline(1, color='black', linewidth=0.8, linestyle=':')
        axis.set(xticks=range(len(lengths)), xticklabels=[f'{n} tokens' for n in lengths], yscale='log',
                 ylabel='time / floor', title=f'{case}, head dimension {head_dim}')
    handles = [plt.Rectangle((0, 0), 1, 1, color=f'C{i}') for i in range(len(names))]
    figure.legend(handles, names, loc='outside lower center', ncols=2, fontsize=8, frameon=False)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--dtype', default='bfloat16', choices=['float32', 'float16', 'bfloat16'])
    parser.add_argument('--cases', nargs='+', default=['randsac', 'randsac-memory', 'saim', 'saim-query'],
                        choices=['randsac', 'randsac-memory', 'saim', 'saim-query'])
    parser.add_argument('--tokens', type=int, nargs='+', default=[64, 196, 576, 1024])
    parser.add_argument('--head-dims', type=int, nargs='+', default=[32, 64])
    parser.add_argument('--heads', type=int, default=12)
    parser.add_argument('--batch', type=int, default=None, help='images; by default as many as make 50,176 tokens')
    parser.add_argument('--seconds', type=float, default=0.3, help='of timing, each result')
    parser.add_argument('--output', type=Path, default=None)
    parser.add_argument('--resume', action='store_true', help='time only what the output, of the same commit, lacks')
    args = parser.parse_args()
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    output = args.output or RESULTS / f'attention-{device_name(device)}.json'
    bandwidth, rate = measured_limits(dtype, device)
    result = {**provenance(), 'dtype': args.dtype, 'bandwidth_tb_s': round(bandwidth / 1e12, 3),
              'product_tflop_s': round(rate / 1e12, 2), 'rows': []}
    settings = [(c, n, d) for c in args.cases for n in args.tokens for d in args.head_dims]
    if args.resume and output.exists():
        before = json.loads(output.read_text())
        if all(before[key] == result[key] for key in ('commit', 'device', 'torch', 'dtype')):
            result = before
            there = {(r['case'], r['tokens'] - (r['case'] == 'saim'), r['head_dim']) for r in result['rows']}
            settings = [s for s in settings if s not in there]
    for name, tokens, head_dim in tqdm(settings, desc='attention'):
        torch.compiler.reset()
        case = make_case(name, tokens, head_dim, args.batch or max(1, 50176 // tokens), args.heads, dtype, device)
        rows = benchmark(case, device, bandwidth, rate, args.seconds)
        result['rows'] += rows
        # Written as it grows: a run that is stopped keeps what it has.
        output.write_text(json.dumps(result, indent=1) + '\n')
        for row in rows:
            tqdm.write('{case:15}{tokens:>5} x{head_dim:<3} {pass:17}{name:44}{layout:7}'.format(**row) + (
                '{median_us:>10.1f} us  {p20_us:>10.1f} {p80_us:>10.1f}  {fraction_of_floor:>6.1%} of floor  '
                '{peak_mib} MiB'.format(**row) if 'median_us' in row else row['refused']))
    plot(result['rows'], output.with_suffix('.png'),
         f'Forward + backward, {args.dtype}, {result["device"]}, torch {result["torch"]}')


if __name__ == '__main__':
    main()
