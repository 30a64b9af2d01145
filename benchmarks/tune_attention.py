"""Choose the launches of the attention kernels on this GPU and write them to the launch table.

    python -m benchmarks.tune_attention [--head-dims 32 64] [--bits 16 32] [--dry-run]

Every plan that compiles without spills within the shared memory of the architecture, and whose results are as good as
the eager operator's, is timed on RandSAC's encoder attention, device time alone. The fastest forward and backward of
each number of tokens become the rows of this GPU's architecture, with its name; other architectures keep theirs.
Kernels never tune themselves in use: their numerics must not depend on what else a machine was doing.
"""

import argparse
import itertools
import json
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from unittest import mock

import torch
from tqdm import tqdm

from autoreg_vit.ops.triton import backward, forward
from autoreg_vit.ops.triton.launches import TABLE, Launch, find_launch, tuned_arch

from .attention import check, make_case, own_run
from .kernel_resources import SHARED, resources
from .timing import measure

# Rows of the table hold up to so many tokens; the last is for any number and timed at 1,024.
TOKENS = (64, 128, 256, 512, None)
PLANS = {
    16: {'forward': itertools.product((64, 128), (32, 64, 128), (4, 8), (1, 2, 3, 4)),
         'backward': itertools.product((64, 128), (32, 64), (4, 8), (1, 2, 3)),
         'fused_backward': [(b, b, w, 1) for b in (64, 128) for w in (4, 8)]},
    32: {'forward': itertools.product((16, 32, 64), (16, 32), (4, 8), (1, 2)),
         'backward': itertools.product((16, 32), (16, 32), (4, 8), (1, 2)),
         'fused_backward': [(64, 64, 8, 1)]},
}
DTYPES = {16: torch.bfloat16, 32: torch.float32}


def sound(row: dict) -> bool:
    """Whether a launch compiles without spills, transposed accumulators and too much shared memory."""
    try:
        return all(not r['spill_bytes'] and not r['transposed'] and r['shared_kib'] <= SHARED[row['arch']]
                   for r in resources(row, DTYPES[row['bits']]))
    except Exception:  # a plan that the compiler refuses is no candidate
        return False


def tune(
        kernel: str,
        tokens: int | None,
        plans: list[Launch],
        head_dim: int,
        bits: int,
        device: torch.device,
) -> tuple[Launch, float] | None:
    """The fastest sound plan of `kernel` and its microseconds."""
    length = {64: 64, 128: 121, 256: 196, 512: 484, None: 1024}[tokens]
    case = make_case('randsac', length, head_dim, max(1, 50176 // length), 12, DTYPES[bits], device)
    best = None
    for plan in plans:
        if kernel == 'fused_backward' and plan.block < length:
            continue

        def choose(name: str, *args, plan=plan) -> Launch | None:
            if name == kernel:
                return plan
            # A backward pass is timed with whatever forward the table has, and never with the other backward.
            return None if name == 'fused_backward' else find_launch(name, *args)

        with mock.patch.object(forward, 'find_launch', choose), mock.patch.object(backward, 'find_launch', choose):
            try:
                differentiated = kernel != 'forward'
                if check(case, lambda c: own_run(c, 'triton'), 'packed', differentiated) is not None:
                    continue
                run = own_run(case, 'triton')
                if differentiated:
                    out = run(False)[0]

                    def once(out=out):
                        return torch.autograd.grad(out, case.projections, case.grad, retain_graph=True)
                else:
                    def once(run=run):
                        return run(False)
                median = measure(once, device, 0.1)['median_us']
            except Exception as error:
                tqdm.write(f'{kernel} {plan}: {type(error).__name__}: {str(error)[:100]}')
                continue
        if best is None or median < best[1]:
            best = plan, median
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--head-dims', type=int, nargs='+', default=[32, 64])
    parser.add_argument('--bits', type=int, nargs='+', default=[16, 32], choices=[16, 32])
    parser.add_argument('--dry-run', action='store_true', help='print what would be written')
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit('Tuning needs a CUDA GPU.')
    major, minor = torch.cuda.get_device_capability()
    arch, gpu = tuned_arch(major * 10 + minor), torch.cuda.get_device_name()
    rows = []
    for head_dim, bits in itertools.product(args.head_dims, args.bits):
        plans = {kernel: [Launch(*p) for p in plans] for kernel, plans in PLANS[bits].items()}
        candidates = [dict(kernel=kernel, arch=arch, bits=bits, head_dim=head_dim, tokens=plan.block, **plan._asdict())
                      for kernel in plans for plan in plans[kernel]]
        with ProcessPoolExecutor(os.cpu_count(), mp_context=multiprocessing.get_context('spawn')) as pool:
            kept = dict(zip((tuple(c.values()) for c in candidates),
                            tqdm(pool.map(sound, candidates), total=len(candidates), desc='compiling')))
        for tokens in TOKENS:
            times = {}
            for kernel in plans:
                sound_plans = [p for c, p in zip(candidates, itertools.chain(*plans.values()))
                               if c['kernel'] == kernel and kept[tuple(c.values())]]
                found = tune(kernel, tokens, sound_plans, head_dim, bits, torch.device('cuda'))
                if found:
                    times[kernel] = found
            fused, tiled = times.get('fused_backward'), times['backward']
            wanted = ['forward', 'backward']
            if fused and fused[1] < tiled[1] and tokens is not None:
                wanted.append('fused_backward')
            for kernel in wanted:
                plan, median = times[kernel]
                rows.append(dict(kernel=kernel, arch=arch, bits=bits, head_dim=head_dim, tokens=tokens,
                                 **plan._asdict(), timed_on=gpu))
                print(rows[-1], f'{median:.1f} us', flush=True)
    tuned = {(r['arch'], r['bits'], r['head_dim']) for r in rows}
    table = json.loads(TABLE.read_text())['launches']
    table = [r for r in table if (r['arch'], r['bits'], r['head_dim']) not in tuned] + rows
    if not args.dry_run:
        TABLE.write_text('{"launches": [\n' + ',\n'.join('  ' + json.dumps(r) for r in table) + '\n]}\n')


if __name__ == '__main__':
    main()
