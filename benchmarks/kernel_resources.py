"""Registers, shared memory and spills of every launch of the attention kernels, compiled without a GPU.

    python -m benchmarks.kernel_resources [--arch 80 90 100] [--jobs N] [--candidates] [--output FILE]
    python -m benchmarks.kernel_resources --unless-recorded

Each row of the launch table that serves the installed version of Triton is launched on meta tensors, and what its
launcher passes is compiled ahead of time. Exits with 1 on a spill, on more shared memory than the architecture's
smallest member has, or on a transpose of an accumulator, which Hopper's compilers have turned into wrong gradients.
--candidates adds the first launches of each design that the tuner would time and the table does not have; what is
wrong with them is said, but is no failure: the tuner leaves them out.

With --unless-recorded, for the checks before a commit, nothing is compiled where a file of results/ has the whole table
without a fault, of the same kernels, rows and Triton.
"""

import argparse
import concurrent.futures
import contextlib
import hashlib
import json
import multiprocessing
import os
import sys
from pathlib import Path
from typing import Any

import torch
import triton
from tqdm import tqdm

from autoreg_vit.ops.triton.launches import TABLE, plan_of, serves_triton

from .candidates import first_candidates
from .compiling import calls_of, compile_call, resources
from .report import RESULTS, provenance, write_rows

# KiB that one program may use. Ampere's rows also serve compute capabilities 8.6, 8.9 and 12.0, which have 99.
SHARED = {80: 99, 90: 227, 100: 227}
COLUMNS = ('kernel', 'arch', 'dtype', 'head_dim', 'tokens', 'block', 'step', 'num_warps', 'num_stages', 'maxnreg',
           'registers', 'shared_kib', 'spill_bytes', 'transposed', 'fault')


def row_resources(row: dict[str, Any]) -> list[dict[str, Any]]:
    """Compile the kernels of a row for its architecture and read what they use."""
    results = []
    dtype = getattr(torch, row['dtype'])
    for call in calls_of(row['pass'], plan_of(row), row['tokens'] or 1024, row['head_dim'], dtype):
        used = resources(compile_call(call, row['arch']))
        fault = used['spill_bytes'] or used['transposed'] or used['shared_kib'] > SHARED[row['arch']]
        options = call.options
        results.append({
            'kernel': call.name, **{k: row[k] for k in ('arch', 'dtype', 'head_dim', 'tokens')},
            'block': options['BLOCK'], 'step': options.get('STEP'),
            **{k: options.get(k) for k in ('num_warps', 'num_stages', 'maxnreg')}, **used, 'fault': bool(fault)})
    return results


def refusal(row: dict[str, Any]) -> str | None:
    """Why a row must not be launched, or None for one whose kernels compile without a fault."""
    try:
        faults = [r for r in row_resources(row) if r['fault']]
    except Exception as error:  # a launch that the compiler refuses
        return f'{type(error).__name__}: {str(error).strip()[-120:]}'
    return ', '.join('{kernel}: {registers} registers, {spill_bytes} B of spills, {shared_kib} KiB, {transposed} '
                     'transposes'.format(**r) for r in faults) or None


def digest_of_sources() -> str:
    """SHA-256 of the kernels, what launches them and the launch table."""
    sha, folder = hashlib.sha256(), TABLE.parent
    for path in sorted(path for path in folder.rglob('*') if path.suffix in ('.py', '.json')):
        sha.update(f'{path.relative_to(folder).as_posix()}\n'.encode() + path.read_bytes())
    return sha.hexdigest()


def is_recorded() -> bool:
    """Whether a file of results has every launch of today's sources for this Triton, none at fault."""
    return any(
        (file.get('sources'), file['triton']) == (digest_of_sources(), triton.__version__)
        and {r['arch'] for r in file['launches']} >= set(SHARED) and not any(r['fault'] for r in file['launches'])
        for file in map(json.loads, map(Path.read_text, RESULTS.glob('kernel_resources-*.json'))))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--arch', type=int, nargs='+', default=[80, 90, 100], choices=[80, 90, 100])
    parser.add_argument('--jobs', type=int, default=os.cpu_count())
    parser.add_argument('--table', type=Path, default=TABLE, help='launch table (the shipped one)')
    parser.add_argument('--candidates', action='store_true', help='also what waits for a GPU')
    parser.add_argument('--output', type=Path, default=None, help='write a JSON file of the table that is printed')
    parser.add_argument('--unless-recorded', action='store_true', help='compile nothing that results/ has as it is')
    args = parser.parse_args()
    if args.unless_recorded and is_recorded():
        print(f'These sources are recorded without a fault for Triton {triton.__version__}.')
        return 0
    table = [row for row in json.loads(args.table.read_text())['launches'] if row['arch'] in args.arch]
    rows = [row for row in table if serves_triton(row)]
    waiting = first_candidates(table, args.arch) if args.candidates else []
    with contextlib.ExitStack() as stack:
        compile_all = map if args.jobs == 1 else stack.enter_context(concurrent.futures.ProcessPoolExecutor(
            args.jobs, mp_context=multiprocessing.get_context('spawn'))).map
        compiled = list(tqdm(compile_all(row_resources, rows + waiting), total=len(rows + waiting), desc='compiling',
                             disable=None))
    # Rows share kernels: that of a few tokens and that of more, or the sum that makes delta.
    shipped, candidates = ([dict(r) for r in dict.fromkeys(tuple(r.items()) for batch in part for r in batch)]
                           for part in (compiled[:len(rows)], compiled[len(rows):]))
    print(*COLUMNS, sep='\t')
    for r in shipped + candidates:
        print(*('any' if r[c] is None else 'FAULT' if r[c] is True else '' if r[c] is False else r[c] for c in COLUMNS),
              sep='\t')
    faults = sum(r['fault'] for r in shipped)
    print(f'{len(shipped)} launches compiled with Triton {triton.__version__}, {faults} at fault; '
          f'{len(table) - len(rows)} rows serve other versions only')
    if args.output:
        about = {**provenance(), 'sources': digest_of_sources() if args.table == TABLE else None}
        write_rows(args.output, about, launches=shipped, candidates=candidates)
    return int(faults > 0)


if __name__ == '__main__':
    sys.exit(main())
