"""Where a result came from: the hardware, and the commit of the code."""

import platform
import subprocess
from pathlib import Path

import torch

PACKAGE = Path(__file__).parents[1]
#: Written where the package is packed to travel without its clone (`benchmarks/gpu/pack.py`): what `source_commit` says
#: there.
SOURCE_COMMIT = 'SOURCE_COMMIT'


def source_commit() -> str | None:
    """The commit that this package runs from, '-dirty' added where tracked files differ from it; outside a clone what
    the file SOURCE_COMMIT in the package says, None without one."""
    def git(*arguments: str) -> str | None:
        try:
            run = subprocess.run(['git', *arguments], cwd=PACKAGE, capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return run.stdout.strip() if run.returncode == 0 else None

    # Installed in an environment that lies in some other project's clone, it is in that clone but not of it.
    if git('ls-files', '--error-unmatch', '__init__.py') is None:
        packed = PACKAGE / SOURCE_COMMIT
        return (packed.read_text(encoding='utf-8').strip() or None) if packed.is_file() else None
    commit, changed = git('rev-parse', '--short=12', 'HEAD'), git('status', '--porcelain', '-uno')
    return commit and commit + ('-dirty' if changed else '')


def hardware(device: torch.device) -> str:
    """The device's name, for a CPU with the widest vector instructions that matter here."""
    if device.type == 'cuda':
        return torch.cuda.get_device_name(device)
    try:
        text = Path('/proc/cpuinfo').read_text(encoding='utf-8')
    except OSError:
        return platform.processor()
    name = next((line.split(':')[1].strip() for line in text.splitlines() if line.startswith('model name')), '')
    flags = next((line.split(':')[1].split() for line in text.splitlines() if line.startswith('flags')), [])
    widest = next((f for f in ('amx_bf16', 'avx512_bf16', 'avx512f', 'avx2') if f in flags), '')
    return ', '.join(part for part in (name, widest) if part)
