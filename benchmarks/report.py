"""What every result says about where it came from."""

import datetime
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import timm
import torch

import autoreg_vit

RESULTS = Path(__file__).parent / 'results'


def provenance() -> dict[str, Any]:
    """Hardware, versions, commit and date of a run."""
    def git(*arguments: str) -> str:
        run = subprocess.run(['git', *arguments], cwd=Path(__file__).parent, capture_output=True, text=True)
        return run.stdout.strip()

    return {
        'date': datetime.date.today().isoformat(),
        'commit': git('rev-parse', '--short=12', 'HEAD') + ('-dirty' if git('status', '--porcelain', '-uno') else ''),
        'device': torch.cuda.get_device_name() if torch.cuda.is_available() else _processor(),
        'cores': os.cpu_count(),
        'python': platform.python_version(),
        'torch': torch.__version__,
        'timm': timm.__version__,
        'autoreg_vit': autoreg_vit.__version__,
    }


def device_name(device: torch.device) -> str:
    """A name for files of results: that of the GPU in lower case, or cpu."""
    return re.sub(r'\W+', '-', torch.cuda.get_device_name(device)).lower() if device.type == 'cuda' else 'cpu'


def _processor() -> str:
    try:
        text = Path('/proc/cpuinfo').read_text()
    except OSError:
        return platform.processor()
    name = next((line.split(':')[1].strip() for line in text.splitlines() if line.startswith('model name')), '')
    flags = next((line.split(':')[1].split() for line in text.splitlines() if line.startswith('flags')), [])
    widest = next((f for f in ('amx_bf16', 'avx512_bf16', 'avx512f', 'avx2') if f in flags), '')
    return f'{name}, {widest}'
