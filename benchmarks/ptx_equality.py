"""Which rows of the launch table are what prototypes of their kernels were when these were timed on a GPU.

    python -m benchmarks.ptx_equality FOLDER [--output FILE]

FOLDER holds the prototypes, which are no part of this repository: `attention.py`, their kernels, and `timings.json`,
what one sitting on a GPU measured. Every row of the table that says it was timed as a prototype is compiled for its
architecture, and so is the prototype that it stands for, with the row's launches, which must have been timed. Both
must give the same PTX but for names: those of the kernel, of files and lines, of parameters, registers and labels,
which are numbered in the order of their first use. Parameters that no instruction reads are left out. Exits with 1 if
a kernel differs or was never timed.
"""

import argparse
import collections
import hashlib
import importlib.util
import json
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import triton
from tqdm import tqdm

from autoreg_vit.ops.triton.launches import TABLE, Launch, plan_of

from .compiling import SCALE, KernelCall, calls_of, compile_call, meta_tensors, record_calls
from .report import RESULTS, provenance, write_rows

# A design of this package: its prototype's name, and for each of its kernels the word in the names of the settings that
# launch it, and what else it must have been timed with (None: without).
PROTOTYPES = {
    'fused': ('fused64', [('', {'dv_first': False})]),
    'rows': ('single_rows', [('', {})]),
    'split': ('split', [('dq', {'merged': True, 'tail': None}), ('kv', {'split': 2})]),
    'tiled': ('shipped', [('', {})]),
}


def normal_ptx(ptx: str) -> str:
    """PTX with its names numbered in the order of first use, without what describes its source."""
    kernel = re.search(r'\.entry (\w+)', ptx)[1]
    parameter = re.compile(rf'\b{kernel}_param_\d+\b')
    lines = [line.partition('//')[0].rstrip() for line in ptx.partition('.section')[0].splitlines()]
    # Of lines of source: directives, and labels that no instruction jumps to.
    lines = [line for line in lines if line and not line.lstrip().startswith(('.loc', '.file', '$L__tmp', '$L__func'))]
    uses = collections.Counter(parameter.findall('\n'.join(lines)))
    kept = []
    for line in lines:
        name = parameter.search(line)
        if name and line.lstrip().startswith('.param'):
            if uses[name[0]] == 1:
                continue
            line = line.rstrip(',')  # the last has none
        kept.append(line)
    numbers: dict[str, str] = {}
    counts: collections.Counter[str] = collections.Counter()

    def number(match: re.Match) -> str:
        if match[0] not in numbers:
            stem = re.sub(r'\d+$', '', match[0])
            numbers[match[0]] = f'{stem}#{counts[stem]}'
            counts[stem] += 1
        return numbers[match[0]]

    return re.sub(rf'{parameter.pattern}|%[a-z]+\d+|\$L\w+', number, '\n'.join(kept)).replace(kernel, 'kernel')


def load_prototypes(folder: Path) -> ModuleType:
    """The prototypes' module."""
    spec = importlib.util.spec_from_file_location('prototypes', folder / 'attention.py')
    module = sys.modules['prototypes'] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def settings_of(row: dict[str, Any]) -> list[dict[str, Any]]:
    """What the prototype of each of a row's kernels must have been timed with."""
    def named(stem: str, launch: Launch) -> dict[str, Any]:
        return {f'{stem}_launch'.lstrip('_'): list(launch[:4]), f'maxnreg_{stem}'.rstrip('_'): launch.maxnreg}

    return [named(stem, launch) | others
            for (stem, others), launch in zip(PROTOTYPES[row['design']][1], plan_of(row).launches, strict=True)]


def prototype_calls(module: ModuleType, row: dict[str, Any], tokens: int) -> list[KernelCall]:
    """The launches of a row's prototype."""
    tensors = meta_tensors(tokens, row['head_dim'], getattr(torch, row['dtype']))
    settings = {k: v for part in settings_of(row) for k, v in part.items() if v is not None}
    name = PROTOTYPES[row['design']][0]
    if row['pass'] == 'forward':
        return record_calls(lambda: module.forward_variants[name](
            *(tensors[x] for x in ('q', 'k', 'v', 'limits')), SCALE, **settings))
    return record_calls(lambda: module.backward_designs[name](*tensors.values(), SCALE, SCALE, **settings))


def compare(row: dict[str, Any], module: ModuleType, timings: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The kernels of a row beside those of its prototype, and the lengths at which these were timed."""
    name = PROTOTYPES[row['design']][0]
    same = [t for t in timings if t.get('design') == name and t['direction'] == row['pass'] and 'us' in t
            and t['tokens'] <= (row['tokens'] or float('inf'))]
    timed = [sorted({t['tokens'] for t in same if all(t.get(k) == v for k, v in settings.items())})
             for settings in settings_of(row)]
    tokens = row['tokens'] or 1024
    own = calls_of(row['pass'], plan_of(row), tokens, row['head_dim'], getattr(torch, row['dtype']))
    prototypes = prototype_calls(module, row, tokens)
    # What is not tuned, such as the sum that makes delta, is a part of every timing.
    timed = [sorted(set().union(*timed))] * (len(own) - len(timed)) + timed
    results = []
    for mine, prototype, lengths in zip(own, prototypes, timed, strict=True):
        texts = [normal_ptx(compile_call(call, row['arch']).asm['ptx']) for call in (mine, prototype)]
        results.append({'kernel': mine.name, 'prototype': prototype.name, 'equal': texts[0] == texts[1],
                        'timed_at_tokens': lengths, 'sha256': hashlib.sha256(texts[0].encode()).hexdigest()})
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('prototypes', type=Path, metavar='FOLDER')
    parser.add_argument('--output', type=Path, default=RESULTS / 'ptx_equality.json')
    args = parser.parse_args()
    module = load_prototypes(args.prototypes)
    timings = json.loads((args.prototypes / 'timings.json').read_text())
    rows = []
    for row in tqdm(json.loads(TABLE.read_text())['launches'], desc='comparing', disable=None):
        if 'prototype' in (row['timed_on'] or ''):
            rows.append({**row, 'kernels': compare(row, module, timings)})
            for result in rows[-1]['kernels']:
                tqdm.write('{kernel} {prototype} equal={equal} timed at {timed_at_tokens}'.format(**result))
    write_rows(args.output, {**provenance(), 'triton': triton.__version__}, rows=rows)
    return int(not all(r['equal'] and r['timed_at_tokens'] for row in rows for r in row['kernels']))


if __name__ == '__main__':
    sys.exit(main())
