"""What all parts of a call share: folders, device, sizes, and the time that is left."""

import tarfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autoreg_vit.errors import ConfigError

from .jobs import Job
from .plan import RESERVE
from .state import State

#: Order in time. What compiles does so beside the first three; what is timed comes after them.
ORDER = ('equality', 'tests', 'run', 'launches', 'attention', 'steps')


@dataclass(frozen=True)
class Size:
    """What is done at full size on a GPU, or at toy size on a CPU to try the queue out.

    Args:
        equality: Arguments of `benchmarks.gpu.equality`.
        attention: Arguments of `benchmarks.attention`.
        launches: Arguments of `benchmarks.tune_attention`.
        tests: Files of tests, and pytest's -m; in the order in which they run.
        steps: Model, batch size, options and GiB of the device's memory at most, each a worker.
        run: Settings over the recipe's.
        least_epochs: A shorter run is not begun.
        most_epochs: A longer one neither.
        environment: Of every command.
    """
    equality: tuple[str, ...]
    attention: tuple[str, ...]
    launches: tuple[str, ...]
    tests: tuple[tuple[tuple[str, ...], str], ...]
    steps: tuple[tuple[str, int, dict[str, Any], float], ...]
    run: dict[str, Any]
    least_epochs: int
    most_epochs: float
    environment: dict[str, str]


FULL = Size(
    equality=('--device', 'cuda'),
    attention=('--device', 'cuda', '--cases', 'randsac', 'saim', '--tokens', '64', '196', '1024', '--head-dims', '64'),
    launches=(),
    # By name of file, then those with the marker wherever they are.
    tests=((('tests/**/test_*.py',), 'gpu and not slow'),
           (('tests/ops/test_*.py',), 'not slow')),
    # The last waits until some of the others have compiled, and given back their memory.
    steps=(('randsac_vit_base', 256, {}, 24), ('randsac_vit_base', 64, {}, 8),
           ('randsac_vit_tiny_patch4_32', 512, {}, 5), ('saim_vit_base', 64, {}, 12), ('saim_vit_base', 256, {}, 36)),
    run={'compile': True, 'cuda_graph': True, 'cache_on_device': True, 'check_images': 0,
         'checkpoint_every_minutes': 1.0},
    least_epochs=10,
    most_epochs=float('inf'),
    # Several processes compile at once.
    environment={'TORCHINDUCTOR_COMPILE_THREADS': '3', 'HF_HUB_OFFLINE': '1'},
)
_TINY = {'embed_dim': 32, 'depth': 1, 'num_heads': 1, 'decoder_depth': 1}
TOY = Size(
    equality=('--device', 'cpu', '--batch-size', '2', '--depth', '1', '--embed-dim', '32'),
    attention=('--device', 'cpu', '--dtype', 'float32', '--cases', 'randsac', '--tokens', '4', '--head-dims', '32',
               '--heads', '1', '--batch', '2'),
    launches=('--dry-run', '--limit', '2', '--jobs', '1'),
    tests=((('tests/behaviour/test_gpu.py',), 'gpu'),),
    steps=(('randsac_vit_tiny_patch4_32', 2, _TINY, 0), ('saim_vit_tiny_patch4_32', 2, _TINY, 0)),
    run={**_TINY, 'memory': 'last', 'batch_size': 8, 'eval_images': 10, 'workers': 0, 'device': 'cpu',
         'precision': 'float32', 'log_every': 1},
    least_epochs=1,
    most_epochs=2,
    environment={'TORCH_COMPILE_DISABLE': '1', 'TRITON_INTERPRET': '1', 'OMP_NUM_THREADS': '1', 'HF_HUB_OFFLINE': '1'},
)


@dataclass
class Sitting:
    """One call of the queue.

    Args:
        out: What travels back.
        work: What stays: logs, caches, the run with its checkpoint.
        state: Of `out`.
        size: FULL or TOY.
        shares: Seconds for each part of this call.
        deadline: Of the call, by `time.monotonic`.
        data: Folder of images, or None.
        beside: Called all along while commands run.
    """
    out: Path
    work: Path
    state: State
    size: Size
    shares: dict[str, float]
    deadline: float
    data: Path | None
    beside: Callable[[], None] = lambda: None

    def limit(self, name: str) -> float:
        """Seconds that a part may take from now on: its share, or more where earlier parts have left time. The run,
        which is worth least, has what the parts after it do not need, and so bears every delay."""
        left = max(self.deadline - time.monotonic() - RESERVE, 0)
        spare = left - sum(self.shares.get(other, 0) for other in ORDER[ORDER.index(name) + 1:])
        return max(spare, 0) if name == 'run' else min(max(spare, self.shares.get(name, 0)), left)

    def start(self, name: str, *arguments: str, **environment: str) -> Job:
        """A command with its output in `work`."""
        return Job(arguments, self.work / f'{name}.log', {**self.size.environment, **environment})

    def wait(self, job: Job, limit: float, poll: Callable[[], object] = lambda: None) -> int | None:
        """`Job.wait`, with what happens beside it."""
        def both() -> None:
            poll()
            self.beside()

        return job.wait(limit, both)

    def finish(self, name: str, began: float, why: str | None, complete: bool = True, **results: Any) -> None:
        """Record how a part ended: done, partial where it is to be gone on with, failed where `why` says how."""
        seconds = round(self.state.part(name)['seconds'] + time.monotonic() - began, 1)
        status = 'failed' if why and complete else 'done' if complete else 'partial'
        self.state.update(name, **results, seconds=seconds, why=why, status=status)
        self.state.save()
        print(f'{name}: {status}, {seconds:.0f} s{"; " + why if why else ""}', flush=True)


def unpacked(archives: Path, work: Path) -> Path | None:
    """The images that travelled with the pack, unpacked once, or None where there are none.

    Raises:
        ConfigError: for a damaged archive.
    """
    found = sorted(archives.glob('*.tar*')) if archives.is_dir() else []
    if not found:
        return None
    folder, whole = work / 'data', work / 'data.whole'
    if not whole.exists():
        try:
            with tarfile.open(found[0]) as archive:
                archive.extractall(folder, filter='data')
        except (tarfile.TarError, EOFError, OSError) as error:
            raise ConfigError(f'Cannot unpack {found[0]} ({error}): copy the pack again.') from error
        whole.touch()
    inside = list(folder.iterdir())
    return inside[0] if len(inside) == 1 and (inside[0] / 'train').is_dir() else folder
