"""Everything worth a GPU, in order of worth, within the minutes that there are.

    python -m benchmarks.gpu --plan [--minutes 8]                 what would be done, and how long it takes
    python -m benchmarks.gpu --pack FILE [--data ARCHIVE]         what travels to the machine with the GPU
    python -m benchmarks.gpu --minutes 8 --out FOLDER             there, in the unpacked pack
    python -m benchmarks.gpu --sweep FILE --minutes 10 --out FOLDER   there, and in place of the parts: a sweep
    python -m benchmarks.gpu --take FOLDER                        back here, with the folder that it left

The parts: equality of captured and plain steps; tests that need a GPU; candidates and launches of the attention
kernels; attention against its peers; whole steps; one pretraining run in the time that the others leave. A sweep
tries settings of pretraining, each for the same seconds: FILE is YAML (recipe, rows of names and changed settings), or
the name of a bundled one, randsac-tiny-cifar10 (benchmarks/gpu/sweep.py). Results are in
FOLDER as they come, and a second call with the same FOLDER does what is left. FOLDER holds at most 8 files of 15 MiB,
60 MiB together. Logs, caches and the run with its checkpoint stay in --work-dir. Assumed: Python 3.12, torch 2.11,
triton 3.6, 16 cores, an H100 or an H200, and no network.
"""

import argparse
import importlib.util
import os
import sys
import time
import zipfile
from pathlib import Path

from . import plan

ROOT = Path(__file__).parents[2]
WHEELS, ARCHIVES = ROOT / 'wheels', ROOT / 'data'


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog='python -m benchmarks.gpu', description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group()
    what.add_argument('--plan', action='store_true', help='say what would be done')
    what.add_argument('--pack', type=Path, metavar='FILE', help='write what travels, a .tar.gz')
    what.add_argument('--take', type=Path, metavar='FOLDER', help='check what came back and put it where it belongs')
    parser.add_argument('--sweep', metavar='FILE', help='try the settings of a file, in place of the parts')
    parser.add_argument('--minutes', type=float, default=8.0, help='of a call, start to end')
    parser.add_argument('--out', type=Path, help='folder for what travels back; given again, it is gone on with')
    parser.add_argument('--data-dir', type=Path, help='images with class folders under train/; by default the archive '
                                                      'that travelled with the pack')
    parser.add_argument('--data-name', default='CIFAR-10', help='as results and cards should call the images')
    parser.add_argument('--parts', nargs='+', choices=plan.NAMES, default=plan.NAMES, metavar='PART',
                        help=f'only these: {", ".join(plan.NAMES)}')
    parser.add_argument('--work-dir', type=Path, default=ROOT / 'runs' / 'gpu', help='what stays; runs/gpu by default')
    parser.add_argument('--toy', action='store_true', help='all parts at toy size on a CPU, to try the queue out')
    parser.add_argument('--data', type=Path, metavar='ARCHIVE', help='with --pack: a .tar file of images to take along')
    parser.add_argument('--wheels', type=Path, metavar='FOLDER',
                        help="with --pack: wheels to take along; by default timm's is downloaded")
    args = parser.parse_args()
    if args.minutes <= 0:
        parser.error(f'--minutes must be positive, got {args.minutes:g}')
    if not (args.plan or args.pack or args.take or args.out):
        parser.error('name --out FOLDER for what travels back, or --plan, --pack FILE or --take FOLDER')
    if not args.pack and (args.data or args.wheels):
        parser.error('--data and --wheels go with --pack')
    return args


def use_wheels() -> None:
    """Unpack the wheels that came with the pack where what they hold is not installed, here and for all commands."""
    site = ROOT / 'runs' / 'site'
    for wheel in sorted(WHEELS.glob('*.whl')):
        with zipfile.ZipFile(wheel) as content:
            tops = {name.partition('/')[0] for name in content.namelist() if '.dist-info/' not in name}
            if all(importlib.util.find_spec(top.removesuffix('.py')) for top in tops):
                continue
            content.extractall(site)
        print(f'{wheel.name} was not installed here and is taken from the pack.', flush=True)
    if site.is_dir():
        sys.path.insert(0, str(site))
        os.environ['PYTHONPATH'] = os.pathsep.join(p for p in (str(site), os.environ.get('PYTHONPATH')) if p)


def done_before(out: Path | None) -> list[str]:
    """Parts that an earlier call has finished, without importing the package."""
    import json

    path = out / 'gpu.json' if out else None
    if path is None or not path.is_file():
        return []
    try:
        return [name for name, part in json.loads(path.read_text())['parts'].items() if part['status'] == 'done']
    except (ValueError, KeyError, TypeError):
        return []


def main() -> int:
    began, args = time.monotonic(), parse()
    if args.plan:
        print(plan.describe(args.minutes, args.parts, done_before(args.out)))
        return 0
    use_wheels()
    from autoreg_vit.errors import UsageError, one_line

    try:
        if args.pack:
            from .pack import pack
            print(pack(args.pack, args.data, args.wheels))
        elif args.take:
            from .take import take
            print('\n'.join(take(args.take, ROOT)))
        else:
            from .queue import go, go_sweep
            return go_sweep(args, began) if args.sweep else go(args, began)
    except UsageError as error:
        print(f'benchmarks.gpu: {one_line(error)}', file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == '__main__':
    sys.exit(main())
