"""What a run on a CPU makes of a machine where something else computes, against PyTorch's own number of threads.

    python -m benchmarks.busy_cpu [--rounds 5] [--output FILE]

Runs the recipe `digits` for four epochs, in turns: with a thread for each core (OMP_NUM_THREADS), and as the command
chooses; alone, and beside one process that counts without end. Images a second are the median of the log's lines but
the first. The machine must be idle but for this.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from autoreg_vit.engine.log import read_log

from .report import RESULTS, provenance, write_rows

CORES = len(os.sched_getaffinity(0))
BUSY = 'while True: pass'


def images_per_second(threads: int | None, busy: bool) -> tuple[float, int]:
    """Of one run, and the threads that it took."""
    environment = {k: v for k, v in os.environ.items() if k != 'OMP_NUM_THREADS'}
    if threads is not None:
        environment['OMP_NUM_THREADS'] = str(threads)
    with tempfile.TemporaryDirectory() as folder:
        other = subprocess.Popen([sys.executable, '-c', BUSY]) if busy else None
        try:
            subprocess.run([sys.executable, '-m', 'autoreg_vit', 'pretrain', '--epochs', '4', '--log-every', '10',
                            '--eval-images', '50', '--output-dir', folder], check=True, env=environment,
                           stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        finally:
            if other:
                other.kill()
        lines = read_log(Path(folder) / 'log.jsonl')
    rates = [line['images_per_second'] for line in lines if line['event'] == 'step'][1:]
    return statistics.median(rates), lines[0]['threads']


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--rounds', type=int, default=5)
    parser.add_argument('--output', type=Path, default=RESULTS / 'busy_cpu.json')
    args = parser.parse_args()
    kinds = [(name, threads, busy) for busy in (False, True)
             for name, threads in (('a thread for each core', CORES), ('chosen', None))]
    found: dict[tuple, list] = {kind: [] for kind in kinds}
    for number in range(args.rounds):
        for kind in kinds if number % 2 == 0 else reversed(kinds):
            found[kind].append(images_per_second(*kind[1:]))
            print(kind, found[kind][-1], flush=True)
    rows = [{'threads': name, 'beside_a_busy_process': busy,
             'threads_taken': [taken for _, taken in found[name, threads, busy]],
             'images_per_second': {'min': min(r for r, _ in found[name, threads, busy]),
                                   'median': statistics.median(r for r, _ in found[name, threads, busy]),
                                   'max': max(r for r, _ in found[name, threads, busy])},
             'of_a_thread_for_each_core': round(statistics.median(
                 mine / theirs for (mine, _), (theirs, _) in zip(found[name, threads, busy],
                                                                 found['a thread for each core', CORES, busy])), 3)}
            for name, threads, busy in kinds]
    for row in rows:
        print(row)
    write_rows(args.output, {**provenance(), 'cores': CORES, 'rounds': args.rounds}, rows=rows)


if __name__ == '__main__':
    main()
