"""A pytest plugin, `-p benchmarks.gpu.outcomes`: writes the outcome of each test as it comes, and leaves out those that
the file has already.

The file is named by AUTOREG_VIT_OUTCOMES, a JSON object a line: test, outcome, seconds, and what a failure said.
"""

import json
import os
from pathlib import Path
from typing import Any

VARIABLE = 'AUTOREG_VIT_OUTCOMES'


def read(path: Path) -> dict[str, list]:
    """Outcome, seconds and last words (None but for a failure) by test; the last of each counts."""
    lines = path.read_text(encoding='utf-8').splitlines(keepends=True) if path.is_file() else []
    return {row.pop('test'): list(row.values()) for row in (json.loads(s) for s in lines if s.endswith('\n'))}


def write(path: Path, test: str, outcome: str, seconds: float, words: str | None) -> None:
    with path.open('a', encoding='utf-8') as file:
        file.write(json.dumps({'test': test, 'outcome': outcome, 'seconds': round(seconds, 2), 'words': words}) + '\n')


def pytest_collection_modifyitems(config: Any, items: list[Any]) -> None:
    settled = {test for test, (outcome, *_) in read(Path(os.environ[VARIABLE])).items() if outcome != 'failed'}
    left_out = [item for item in items if item.nodeid in settled]
    items[:] = [item for item in items if item.nodeid not in settled]
    config.hook.pytest_deselected(items=left_out)


class _Writer:
    def pytest_runtest_logreport(self, report: Any) -> None:
        # A failure may come before, in or after the test itself; a skip comes before.
        if report.when == 'call' or report.outcome != 'passed':
            words = str(report.longrepr)[-600:] if report.outcome == 'failed' else None
            write(Path(os.environ[VARIABLE]), report.nodeid, report.outcome, report.duration, words)


def pytest_configure(config: Any) -> None:
    if not hasattr(config, 'workerinput'):  # xdist's main process hears of every test
        config.pluginmanager.register(_Writer())
