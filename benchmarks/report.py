"""What every result says about where it came from."""

import datetime
import json
import os
import platform
import re
from pathlib import Path
from typing import Any

import timm
import torch

import autoreg_vit
from autoreg_vit.engine.provenance import hardware, source_commit

RESULTS = Path(__file__).parent / 'results'


def provenance() -> dict[str, Any]:
    """Hardware, versions, commit and date of a run."""
    return {
        'date': datetime.date.today().isoformat(),
        'commit': source_commit(),
        'device': hardware(torch.device('cuda' if torch.cuda.is_available() else 'cpu')),
        'cores': os.cpu_count(),
        'python': platform.python_version(),
        'torch': torch.__version__,
        'triton': triton_version(),
        'timm': timm.__version__,
        'autoreg_vit': autoreg_vit.__version__,
    }


def triton_version() -> str | None:
    """Triton's version, or None where it is not installed."""
    try:
        import triton
    except ImportError:
        return None
    return triton.__version__


def write_rows(path: Path, head: dict[str, Any], **tables: list[dict[str, Any]]) -> None:
    """Write what is true of all rows and tables of them, a row a line; the file is whole at any time."""
    lines = [f' {json.dumps(key)}: {json.dumps(value)}' for key, value in head.items()]
    for name, rows in tables.items():
        lines.append(f' "{name}": [' + ','.join(f'\n  {json.dumps(row)}' for row in rows) + '\n ]')
    part = path.with_suffix('.part')
    part.write_text('{\n' + ',\n'.join(lines) + '\n}\n')
    part.replace(path)


def device_name(device: torch.device) -> str:
    """A name for files of results: that of the GPU in lower case, or cpu."""
    return re.sub(r'\W+', '-', torch.cuda.get_device_name(device)).lower() if device.type == 'cuda' else 'cpu'
