"""What came back from the machine with the GPU, checked and put where it belongs.

    gpu.json                     -> benchmarks/results/gpu-CARD.json: facts, equality, tests, goals, the run's figures;
                                    at toy size runs/toy/
      attention, steps           -> benchmarks/results/attention-CARD.json with its plot, steps-CARD.json
      sweep-NAME                 -> benchmarks/results/sweep-NAME-CARD.json, and printed as a table
      launches                   -> tune_attention-CARD.json, and its rows to autoreg_vit/ops/triton/launches.json
    run.tar.0, .1, ...           -> runs/NAME, and exported from it, runs/NAME-weights

Everything is checked before anything is written. A file that is there already is left as it is.
"""

import io
import json
import re
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path
from typing import Any

from autoreg_vit import __version__
from autoreg_vit.artifacts import sha256_of, write_checksum, write_synced
from autoreg_vit.errors import ConfigError
from autoreg_vit.hub.folders import export_encoder
from autoreg_vit.hub.publishing import export
from autoreg_vit.models.pretrained import load_folder
from autoreg_vit.ops.triton.launches import kind_of, plan_of
from autoreg_vit.settings.weights import ExportConfig

from .. import attention, tune_attention
from . import cards, sweep
from .pretraining import ARCHIVE
from .state import check_files, misfits, read_state


def take(folder: Path, root: Path) -> list[str]:
    """Put results, launches and runs into the clone at `root`, and say what became of each.

    Raises:
        ConfigError: for what does not fit, before anything is written.
    """
    content = read_state(folder)
    if fault := misfits(folder):
        raise ConfigError(fault)
    archive = content['parts'].get('run', {}).get('archive', {})
    check_files(folder, archive.get('pieces', {}))
    check_commit(content.get('commit'), root)
    check_versions(content, root)
    name = re.sub(r'\W+', '-', content['device']).lower()
    # Figures at toy size are no results.
    results = root / 'runs' / 'toy' if content['toy'] else root / 'benchmarks' / 'results'
    files = {results / f'{kind}-{name}.json': value for kind, value in split(content).items()}
    for path in files:
        check_newer(path, content['commit'], root)
    check_run(root / 'runs' / archive.get('name', ''), archive)
    check_launches(content)
    said = []
    if content['commit'].endswith('-dirty'):
        said.append(f'These are results of uncommitted changes to {content["commit"]}, and say so.')
    said += [f'launches.json: {line}' for line in take_launches(content, results / f'tune_attention-{name}.json')]
    for path, value in files.items():
        changed = put(path, json.dumps(value, indent=1) + '\n')
        said.append(f'{path.relative_to(root)}: {"written" if changed else "there already"}')
        if path.name.startswith('attention-') and (changed or not path.with_suffix('.png').exists()):
            attention.plot(value['rows'], path.with_suffix('.png'),
                           f'Forward + backward, {value["dtype"]}, {content["device"]}, torch {content["torch"]}')
    if archive.get('pieces'):
        said.append(take_run(folder, archive, root))
        said.append(export_run(root / 'runs' / archive['name'], content['data'], root))
    for part, found in content['parts'].items():
        if part.startswith(sweep.PART):
            said += [f'{part}, on held-out training images:', sweep.table(found.get('rows', []))]
    return [*said, 'Goals:', cards.in_words(cards.judge(content))] if 'gpu' in split(content) else said


def check_commit(commit: str | None, root: Path) -> None:
    """Raise ConfigError unless results are of HEAD or an ancestor of it, with uncommitted changes or without."""
    clean = (commit or '').removesuffix('-dirty')
    if not re.fullmatch(r'[0-9a-f]{7,40}', clean):
        raise ConfigError(f'The results name no commit (got {commit!r}): make packs with --pack, which writes it down.')
    if git(root, 'cat-file', '-e', f'{clean}^{{commit}}') is None:
        raise ConfigError(f'The results are of commit {clean}, which this clone does not have: fetch it, or take them '
                          'in the clone that made the pack.')
    if git(root, 'merge-base', '--is-ancestor', clean, 'HEAD') is None:
        raise ConfigError(f'The results are of commit {clean}, which is neither HEAD nor an ancestor of it: check out '
                          'or merge the branch that the pack was made on.')


def check_versions(content: dict[str, Any], root: Path) -> None:
    """Raise ConfigError for results of a version that the project does not support, or parts that disagree."""
    if content.get('autoreg_vit') != __version__:
        raise ConfigError(f'The results are of autoreg_vit {content.get("autoreg_vit")}, this is {__version__}: check '
                          'out the version that the pack was made of.')
    supported = dict(re.findall(r"'(torch|timm|triton)>=([\d.]+)", (root / 'setup.py').read_text(encoding='utf-8')))
    for name, least in supported.items():
        if numbers(content.get(name)) < numbers(least):
            raise ConfigError(f'The results are of {name} {content.get(name)}; supported is {least} or later: measure '
                              'again with it.')
    for part in ('attention', 'launches'):
        inside = content['parts'].get(part, {}).get('result', {})
        for key in ('commit', 'device', 'torch', 'timm'):
            if inside and inside.get(key) != content.get(key):
                raise ConfigError(f'The results of {part} are of {key} {inside.get(key)}, the others of '
                                  f'{content.get(key)}: they are of two sittings. Measure them again.')


def numbers(version: str | None) -> tuple[int, ...]:
    return tuple(int(n) for n in re.findall(r'\d+', (version or '').partition('+')[0])[:3])


def split(content: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The content of results files by the start of their names."""
    facts = {k: v for k, v in content.items() if k not in ('parts', 'sha256', 'format', 'goals')}
    sweeps = {name: part for name, part in content['parts'].items() if name.startswith(sweep.PART)}
    parts = {name: part for name, part in content['parts'].items() if name not in sweeps}
    files = {name: {**facts, **part} for name, part in sweeps.items()}
    shown = {name: {k: v for k, v in part.items() if k != 'outcomes'} for name, part in parts.items()
             if name not in ('attention', 'steps', 'launches')}
    if 'tests' in shown:
        shown['tests']['failures'] = {test: words for test, (outcome, _, words) in parts['tests']['outcomes'].items()
                                      if outcome == 'failed'}
    if parts or not sweeps:  # a folder with sweeps alone says nothing of the others
        files['gpu'] = {**facts, 'goals': cards.judge(content), 'parts': shown}
    if parts.get('attention', {}).get('result'):
        files['attention'] = parts['attention']['result']
    if parts.get('steps', {}).get('rows'):
        files['steps'] = {**facts, 'rows': parts['steps']['rows']}
    if parts.get('launches', {}).get('result'):
        files['tune_attention'] = parts['launches']['result']
    return files


def check_launches(content: dict[str, Any]) -> None:
    """Raise ConfigError for rows of launches that are not of this version's table."""
    for row in content['parts'].get('launches', {}).get('result', {}).get('launches', []):
        try:
            kind_of(row), plan_of(row), row['tokens'], row['triton_below'], row['timed_on']
        except (KeyError, TypeError) as error:
            raise ConfigError(f'A row of launches does not fit the table ({type(error).__name__}: {error}): it is of '
                              'another version. Tune again with this one.') from error


def take_launches(content: dict[str, Any], results: Path) -> list[str]:
    """Put the rows that were timed into the table, unless the results file says that they are there."""
    result = content['parts'].get('launches', {}).get('result', {})
    if not result.get('launches'):
        return []
    text = json.dumps(result, indent=1) + '\n'
    if content['toy'] or (results.exists() and results.read_text(encoding='utf-8') == text):
        return ['left as it is, the figures are of toy size' if content['toy'] else 'its rows are there already']
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / 'launches.json'
        path.write_text(text, encoding='utf-8')
        tune_attention.take(path)
    return [f'{len(result["launches"])} rows taken']


def check_newer(path: Path, commit: str, root: Path) -> None:
    """Raise ConfigError where a results file is of a later commit than what would replace it."""
    if not path.exists():
        return
    there = (json.loads(path.read_text(encoding='utf-8')).get('commit') or '').removesuffix('-dirty')
    ours = commit.removesuffix('-dirty')
    if there and there != ours and git(root, 'merge-base', '--is-ancestor', ours, there) is not None:
        raise ConfigError(f'{path} is of commit {there}, later than {ours}: nothing is taken. Remove it first if the '
                          'older results are to replace it.')


def check_run(target: Path, archive: dict[str, Any]) -> None:
    """Raise ConfigError where another run has the folder that the one that came back is to have."""
    if archive.get('pieces') and target.exists():
        weights = target / 'encoder' / 'model.safetensors'
        if not weights.is_file() or sha256_of(weights) != archive['encoder_sha256']:
            raise ConfigError(f'{target} holds another run than the one that came back: rename or remove it first.')


def put(path: Path, text: str) -> bool:
    """Write a file, and say whether it changed."""
    if path.exists() and path.read_text(encoding='utf-8') == text:
        return False
    path.parent.mkdir(parents=True, exist_ok=True)
    write_synced(path, text)
    return True


def take_run(folder: Path, archive: dict[str, Any], root: Path) -> str:
    """Unpack the run, and make its encoder again from the whole model."""
    target = root / 'runs' / archive['name']
    if target.exists():
        return f'{target.relative_to(root)}: there already'
    content = b''.join((folder / f'{ARCHIVE}.{n}').read_bytes() for n in range(len(archive['pieces'])))
    scratch = target.with_name(target.name + '.new')
    shutil.rmtree(scratch, ignore_errors=True)
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        tar.extractall(scratch, filter='data')
    run = scratch / archive['name']
    model = load_folder(run / 'pretrain')
    spec = json.loads((run / 'pretrain' / 'config.json').read_text(encoding='utf-8'))['pretrained_cfg']
    export_encoder(model.encoder, run / 'encoder', mean=spec['mean'], std=spec['std'])
    weights = run / 'encoder' / 'model.safetensors'
    if sha256_of(weights) != archive['encoder_sha256']:
        raise ConfigError(f'The encoder made from {ARCHIVE} is not the one that was trained (SHA-256 '
                          f'{archive["encoder_sha256"]}): {scratch} holds what came. Copy the pieces again.')
    write_checksum(weights)
    run.replace(target)
    scratch.rmdir()
    return f'{target.relative_to(root)}: written'


def export_run(run: Path, data: str, root: Path) -> str:
    """Export the run's weights, with the tag that its name ends in: cifar10_70ep."""
    target = run.with_name(f'{run.name}-weights')
    if target.exists():
        return f'{target.relative_to(root)}: there already'
    export(ExportConfig(run=str(run), folder=str(target), tag='_'.join(run.name.split('-')[-2:]), data=data))
    return (f'{target.relative_to(root)}: written; with accuracies in its card: autoreg-vit export '
            f'{run.relative_to(root)} FOLDER --results results.json')


def git(root: Path, *arguments: str) -> str | None:
    """What git says in `root`, or None where it fails."""
    run = subprocess.run(['git', *arguments], cwd=root, capture_output=True, text=True)
    return run.stdout if run.returncode == 0 else None
