"""Scripts in Pythons of their own that have PyTorch and timm but nothing of this package, forked from one that imported
them once."""

import functools
import gc
import json
import os
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run_bare(script: str, *words: object, path: Path | str = ROOT, folder: Path | str = ROOT,
             **environment: str) -> subprocess.CompletedProcess:
    """What `python -c script *words` would print and end with in a folder, with `path` in front of where it imports
    from."""
    with tempfile.TemporaryDirectory() as written:
        files = [str(Path(written) / name) for name in ('out', 'err')]
        server = _server()
        order = {'script': script, 'words': [*map(str, words)], 'path': str(path), 'folder': str(folder),
                 'environment': environment, 'files': files}
        server.stdin.write(json.dumps(order) + '\n')
        server.stdin.flush()
        status = int(server.stdout.readline())
        return subprocess.CompletedProcess(script, status, *(Path(file).read_text() for file in files))


@functools.cache
def _server() -> subprocess.Popen:
    """The process that forks; it ends with its standard input."""
    environment = {name: value for name, value in os.environ.items() if name not in ('PYTHONPATH', 'TRITON_INTERPRET')}
    return subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                            cwd='/', env={**environment, 'OMP_NUM_THREADS': '1'})


def _serve() -> None:
    gc.disable()
    import timm  # noqa: F401  PyTorch with it

    gc.freeze()
    gc.enable()
    sys.path.remove(str(Path(__file__).parent))
    for line in sys.stdin:
        order = json.loads(line)
        if (child := os.fork()) == 0:
            _become(**order)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def _become(script: str, words: list[str], path: str, folder: str, environment: dict[str, str],
            files: list[str]) -> None:
    """Run a script as if this process had begun with it."""
    for descriptor, name in ((0, os.devnull), *zip((1, 2), files)):
        os.dup2(os.open(name, os.O_RDWR | os.O_CREAT), descriptor)
    status = 0
    try:
        os.environ.update(environment)
        os.chdir(folder)
        sys.path.insert(0, path)
        sys.argv = ['-c', *words]
        exec(script, {'__name__': '__main__'})
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        status = 1
    for stream in (sys.stdout, sys.stderr):
        if stream:
            stream.flush()
    os._exit(status)


if __name__ == '__main__':
    _serve()
