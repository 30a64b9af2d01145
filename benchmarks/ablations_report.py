"""What `ablations.py` found, as JSON, Markdown and figures: the papers' tables beside ours, the papers' claims with the
noise of the measurement, and quality against cost.

A difference between rows has two sources of noise. Seeds: the variance between runs that differ in nothing else, pooled
over all rows with several seeds. Images: the same images evaluate every row, so the variance is that of the differences
between what rows get right on each image. Noise is twice the standard error of both together. With one seed a row
everywhere the first is unknown and left out, which the results then say.
"""

import itertools
import json
import math
import statistics
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from autoreg_vit.engine.log import logged, read_log

from .ablations_rows import CLAIMS, CURVES, ROWS, SCALES, Cite, Claim, Row
from .report import provenance

AXES = {'images': 'images seen', 'pflops': 'PFLOPs of training', 'minutes': 'minutes of training'}
METRICS = {'linear': 'linear', 'knn': 'kNN'}


class Found(NamedTuple):
    """A finished row: its runs, one a seed, and which images each gets right, bool [seeds, images]."""
    row: Row
    runs: list[dict[str, Any]]
    right: np.ndarray

    def mean(self, key: str) -> float:
        return statistics.mean(run[key] for run in self.runs)


class Difference(NamedTuple):
    """Accuracy of one side less that of the other, in points, and the noise of it."""
    value: float
    noise: float

    @property
    def verdict(self) -> str:
        if abs(self.value) <= self.noise:
            return 'within noise'
        return 'holds' if self.value > 0 else 'does not hold'


def collect(work: Path, split: str) -> dict[str, Found]:
    """The finished runs of a work folder, by row."""
    found = {}
    for row in ROWS:
        runs, right = [], []
        for folder in sorted(work.glob(f'{row.name}/*'), key=lambda path: path.name):
            if (folder / f'right-{split}.npy').exists():
                runs.append(read_run(folder, split))
                right.append(np.load(folder / f'right-{split}.npy'))
        if runs:
            found[row.name] = Found(row, runs, np.stack(right))
    return found


def read_run(folder: Path, split: str) -> dict[str, Any]:
    """Accuracies and costs of a run."""
    facts = json.loads((folder / 'row.json').read_text())
    result = json.loads((folder / f'probe-{split}' / 'results.json').read_text())
    log = read_log(folder / 'pretrain' / 'log.jsonl')
    steps = [line for line in log if line['event'] == 'step']
    seen = [0, *(line['images'] for line in steps)]
    minutes = sum((b - a) / line['images_per_second'] for a, b, line in zip(seen, seen[1:], steps)) / 60
    return {
        'seed': facts['seed'], **{name: logged(log, name) for name in ('commit', 'hardware', 'precision')},
        'linear': result['top1'], 'knn': result['knn'],
        'loss': steps[-1]['loss'] if steps else None, 'images': seen[-1],
        'gflops_per_image': round(facts['gflops_per_image'], 4),
        'pflops': facts['gflops_per_image'] * seen[-1] / 1e6, 'minutes': minutes,
        'cpu_minutes': round(facts['cpu_minutes'], 2),
        'images_per_second': statistics.median(line['images_per_second'] for line in steps) if steps else None,
    }


def seed_deviation(found: dict[str, Found]) -> float | None:
    """Standard deviation of the linear accuracy over seeds, pooled over rows; None without rows of several."""
    several = [[run['linear'] for run in each.runs] for each in found.values() if len(each.runs) > 1]
    if not several:
        return None
    squares = sum(sum((x - statistics.mean(runs)) ** 2 for x in runs) for runs in several)
    return math.sqrt(squares / sum(len(runs) - 1 for runs in several))


def difference(found: dict[str, Found], pairs: Sequence[tuple[str, str]]) -> Difference:
    """The mean over pairs of rows of how much better the first is than the second."""
    weights: dict[str, float] = {}
    for better, worse in pairs:
        weights[better] = weights.get(better, 0) + 1 / len(pairs)
        weights[worse] = weights.get(worse, 0) - 1 / len(pairs)
    value = sum(weight * found[name].mean('linear') for name, weight in weights.items())
    by_image = sum(weight * found[name].right.mean(0) for name, weight in weights.items())
    variance = 100 ** 2 * by_image.var() / len(by_image)
    deviation = seed_deviation(found) or 0.0
    variance += sum(weight ** 2 * deviation ** 2 / len(found[name].runs) for name, weight in weights.items())
    return Difference(value, 2 * math.sqrt(variance))


def judge(claim: Claim, found: dict[str, Found]) -> dict[str, Any]:
    """Whether a paper's ordering holds here, over those of its pairs that were run."""
    pairs = [pair for pair in claim.pairs if all(name in found for name in pair)]
    result = {'claim': claim.text, 'table': claim.table, 'pairs': [list(pair) for pair in pairs],
              'of': len(claim.pairs), 'paper': paper_difference(claim, pairs or claim.pairs)}
    if not pairs:
        return {**result, 'verdict': 'not run'}
    total = difference(found, pairs)
    return {**result, 'points': round(total.value, 2), 'noise': round(total.noise, 2), 'verdict': total.verdict,
            'each': [round(difference(found, [pair]).value, 2) for pair in pairs],
            'seeds': min(len(found[name].runs) for pair in pairs for name in pair)}


def paper_difference(claim: Claim, pairs: Sequence[tuple[str, str]]) -> float | None:
    """The mean difference of these pairs of a claim in its paper, in points of linear accuracy, or of fine-tuning where
    the paper has no other."""
    values = {row.name: _paper_value(cite) for row in ROWS for cite in row.cites if cite.table == claim.table}
    known = [values[a] - values[b] for a, b in pairs if a in values and b in values]
    return round(statistics.mean(known), 2) if known else None


def _paper_value(cite: Cite) -> float:
    return cite.finetune if cite.linear is None else cite.linear


def orderings(found: dict[str, Found], table: str) -> dict[str, int]:
    """How many pairs of a table's rows are in the paper's order, within noise, and in the other order."""
    cited = [(cite, row.name) for row in ROWS for cite in row.cites if cite.table == table and row.name in found]
    counts = {'holds': 0, 'within noise': 0, 'does not hold': 0}
    for (a, first), (b, second) in itertools.combinations(cited, 2):
        if _paper_value(a) != _paper_value(b):
            pair = (first, second) if _paper_value(a) > _paper_value(b) else (second, first)
            counts[difference(found, [pair]).verdict] += 1
    return counts


def curves(found: dict[str, Found]) -> dict[str, list[dict[str, float]]]:
    """Points of the cost-quality figure, by design, cheapest first."""
    lines = {}
    for name in CURVES:
        points = [{axis: each.mean(axis) for axis in (*AXES, *METRICS)} | {'row': each.row.name}
                  for each in found.values() if each.row.name == name or each.row.name.startswith(f'{name}-x')]
        if points:
            lines[name] = sorted(points, key=lambda point: point['images'])
    return lines


def curve_noise(found: dict[str, Found]) -> float:
    """The largest noise of the difference between two designs of the cost-quality figure, in points, measured at the
    length that all of them were trained for."""
    names = [name for name in CURVES if name in found]
    return max((difference(found, [pair]).noise for pair in itertools.combinations(names, 2)), default=0.0)


def crossings(lines: dict[str, list[dict[str, float]]], axis: str, noise: float) -> list[dict[str, Any]]:
    """Where two designs change places in linear accuracy along a cost; straight lines over its logarithm join points.

    Returns:
        For each two designs with a common range of the cost: the range, who is ahead at its ends by more than `noise`
        points ('neither' within it), and `at`, the costs at which the lines cross.
    """
    result = []
    for first, second in itertools.combinations(lines, 2):
        (xs, ys), (us, vs) = (([math.log(p[axis]) for p in lines[n]], [p['linear'] for p in lines[n]])
                              for n in (first, second))
        low, high = max(xs[0], us[0]), min(xs[-1], us[-1])
        if low > high:
            continue
        places = sorted({low, high, *(x for x in (*xs, *us) if low <= x <= high)})
        gaps = [float(np.interp(x, xs, ys) - np.interp(x, us, vs)) for x in places]
        turns = [a + (b - a) * before / (before - after)
                 for a, b, before, after in zip(places, places[1:], gaps, gaps[1:]) if before * after < 0]
        ahead = [first if gap > noise else second if gap < -noise else 'neither' for gap in (gaps[0], gaps[-1])]
        result.append({'designs': [first, second], 'axis': axis, 'range': [math.exp(low), math.exp(high)],
                       'ahead': ahead, 'points': [round(gaps[0], 2), round(gaps[-1], 2)],
                       'at': [math.exp(x) for x in turns]})
    return result


def write_report(work: Path, scale: str, folder: Path, data: str, split: str = 'val') -> None:
    """Write ablations-SCALE.json, .md and figures from what is finished; those of the test split end in -test."""
    found = collect(work, split)
    if not found:
        return
    folder.mkdir(parents=True, exist_ok=True)
    name = f'ablations-{scale}' + ('-test' if split == 'test' else '')
    lines, noise = curves(found), curve_noise(found)
    result = {
        **provenance(), 'scale': scale, 'note': SCALES[scale].note, 'data': data,
        'split': 'test' if split == 'test' else 'held out of train',
        'evaluated_images': int(next(iter(found.values())).right.shape[1]),
        'seed_deviation': seed_deviation(found),
        'rows': [{'row': each.row.name, 'base': each.row.base, 'settings': each.row.settings, 'length': each.row.length,
                  'cites': [cite._asdict() for cite in each.row.cites], 'runs': each.runs} for each in found.values()],
        'claims': [judge(claim, found) for claim in CLAIMS],
        'curve_noise': noise,
        'turns': [turn for axis in AXES for turn in crossings(lines, axis, noise)],
    }
    tables = list(dict.fromkeys(cite.table for row in ROWS for cite in row.cites))
    tables = sorted(table for table in tables if any(_in_table(each, table) for each in found.values()))
    # Written beside and moved into place: several processes may be at it.
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        new = Path(scratch)
        (new / f'{name}.json').write_text(json.dumps(result, indent=2) + '\n')
        (new / f'{name}.md').write_text(markdown(result, found, lines, tables))
        for table in tables:
            table_figure(found, table, new / f'{name}-{table.lower().replace(" ", "-")}.png')
        if len(lines) > 1:
            cost_figure(lines, result['seed_deviation'], new / f'{name}-cost.png')
        for path in new.iterdir():
            path.replace(folder / path.name)


def _in_table(each: Found, table: str) -> bool:
    return any(cite.table == table for cite in each.row.cites)


def markdown(result: dict[str, Any], found: dict[str, Found], lines: dict, tables: list[str]) -> str:
    """The tables as text."""
    deviation = result['seed_deviation']
    spread = ('one seed a row, so that the spread between seeds is unknown and not in the noise' if deviation is None
              else f'a run differs from another seed\'s by a standard deviation of {deviation:.2f} points')
    commits, hardware, precision = (
        ', '.join(sorted({run[name] for each in found.values() for run in each.runs if run[name]}))
        for name in ('commit', 'hardware', 'precision'))
    text = [f'# Ablations, scale {result["scale"]}\n', result['note'] + '\n',
            f'{result["data"]}; accuracy in percent of {result["evaluated_images"]:,} images ({result["split"]}) with '
            f'frozen features, the average of the tokens; {spread}. Noise is twice the standard error over seeds and '
            f'images. {hardware}, {precision}, torch {result["torch"]}, timm {result["timm"]}, runs at commit '
            f'{commits}, {result["date"]}. GFLOPs are those of a training step, an image; '
            f'minutes are of training, and images/s of a machine that may be shared.\n',
            '## Claims\n', '| claim | paper, its difference | here | noise | pairs | seeds | ordering |',
            '| --- | --- | --- | --- | --- | --- | --- |']
    for claim in result['claims']:
        if claim['verdict'] != 'not run':
            text.append(f'| {claim["claim"]} | {claim["table"]}: {claim["paper"]:+.2f} | {claim["points"]:+.2f} | '
                        f'{claim["noise"]:.2f} | {len(claim["pairs"])} of {claim["of"]} | {claim["seeds"]} | '
                        f'{claim["verdict"]}{"" if deviation else ", of this seed"} |')
    for table in tables:
        text += ['', f'## {table}\n', *_table(found, table)]
    text += ['', '## Neither paper\n', *_own_rows(found)]
    if lines:
        text += ['', '## Cost and quality\n', *_cost_table(lines, result['turns'], result['curve_noise'])]
    return '\n'.join(text) + '\n'


def _accuracy(each: Found, metric: str) -> str:
    values = [run[metric] for run in each.runs]
    spread = f' ± {statistics.stdev(values):.2f} ({len(values)})' if len(values) > 1 else ''
    return f'{statistics.mean(values):.2f}{spread}'


def _costs(each: Found) -> str:
    if not each.mean('images'):
        return '| | |'
    return f'{each.mean("gflops_per_image"):.3f} | {each.mean("images_per_second"):.0f} | {each.mean("minutes"):.1f} |'


def _table(found: dict[str, Found], table: str) -> list[str]:
    cited = [(cite, each) for each in found.values() for cite in each.row.cites if cite.table == table]
    cited.sort(key=lambda pair: -_paper_value(pair[0]))
    ours = sorted((each.mean('linear') for _, each in cited), reverse=True)
    text = ["| row | linear | kNN | place | paper's linear | paper's fine-tuning | paper's place | GFLOPs | images/s | "
            'minutes |', '| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |']
    for place, (cite, each) in enumerate(cited):
        paper = [f'{value:.2f}' if value is not None else '' for value in (cite.linear, cite.finetune)]
        text.append(f'| {cite.label} (`{each.row.name}`) | {_accuracy(each, "linear")} | {_accuracy(each, "knn")} | '
                    f'{ours.index(each.mean("linear")) + 1} | {paper[0]} | {paper[1]} | {place + 1} | {_costs(each)}')
    counts = orderings(found, table)
    if sum(counts.values()):
        text.append(f'\nPairs of rows: {counts["holds"]} in the paper\'s order, {counts["within noise"]} within noise, '
                    f'{counts["does not hold"]} in the other order.')
    return text


def _own_rows(found: dict[str, Found]) -> list[str]:
    text = ['| row | linear | kNN | against | difference | noise | FLOPs of it | GFLOPs | images/s | minutes |',
            '| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |']
    for name, each in found.items():
        if each.row.against is None and (each.row.cites or each.row.length != 1):
            continue
        reference, against = each.row.against, '| | | | |'
        if reference in found:
            gap = difference(found, [(name, reference)])
            ratio = each.mean('gflops_per_image') / found[reference].mean('gflops_per_image')
            against = f'| `{reference}` | {gap.value:+.2f} | {gap.noise:.2f} | {ratio:.2f} |'
        text.append(f'| `{name}` | {_accuracy(each, "linear")} | {_accuracy(each, "knn")} {against} {_costs(each)}')
    return text


def _cost_table(lines: dict, turns: list[dict[str, Any]], noise: float) -> list[str]:
    text = ['| design | images seen | PFLOPs | minutes | linear | kNN |', '| --- | --- | --- | --- | --- | --- |']
    for name, points in lines.items():
        for point in points:
            text.append(f'| {CURVES[name]} | {point["images"]:,.0f} | {point["pflops"]:.3g} | {point["minutes"]:.1f} | '
                        f'{point["linear"]:.2f} | {point["knn"]:.2f} |')
    text += [f'\nWhere the order turns, by linear accuracy between points: the first design less the second at the '
             f'least and at the most of a cost that both have. Up to {noise:.1f} points are noise.\n',
             '| first | second | cost | from → to | points | ahead | lines cross at |',
             '| --- | --- | --- | --- | --- | --- | --- |']
    for turn in turns:
        ends = [CURVES.get(name, 'within noise') for name in turn['ahead']]
        columns = [*(CURVES[name] for name in turn['designs']), AXES[turn['axis']],
                   _each_once(map(_number, turn['range'])), _each_once(f'{x:+.2f}' for x in turn['points']),
                   _each_once(ends), ', '.join(map(_number, turn['at']))]
        text.append(f'| {" | ".join(columns)} |')
    return text


def _each_once(ends: Iterable[str]) -> str:
    """What stands at both ends of a range, once where it is the same."""
    return ' → '.join(dict.fromkeys(ends))


def _number(value: float) -> str:
    return f'{value:,.0f}' if value >= 1000 else f'{value:.3g}'


def table_figure(found: dict[str, Found], table: str, path: Path) -> None:
    """A table of a paper as two panels, the paper's figures and ours, rows in the paper's order."""
    cited = [(cite, each) for each in found.values() for cite in each.row.cites if cite.table == table]
    cited.sort(key=lambda pair: _paper_value(pair[0]))
    figure = Figure(figsize=(9, 1.7 + 0.32 * len(cited)), layout='constrained')
    paper, ours = figure.subplots(1, 2, sharey=True)
    places = range(len(cited))
    for metric, colour in (('linear', 'C0'), ('finetune', 'C3')):
        points = [(getattr(cite, metric), place) for place, (cite, _) in zip(places, cited)
                  if getattr(cite, metric) is not None]
        if points:
            paper.plot(*zip(*points), 'o', color=colour, label={'finetune': 'fine-tuned'}.get(metric, metric))
    deviation = seed_deviation(found)
    for metric, colour in (('linear', 'C0'), ('knn', 'C1')):
        means = [each.mean(metric) for _, each in cited]
        error = None
        if metric == 'linear' and deviation is not None:
            error = [2 * deviation / math.sqrt(len(each.runs)) for _, each in cited]
        ours.errorbar(means, places, xerr=error, fmt='o', color=colour, label=METRICS[metric], capsize=3)
    paper.set_yticks(places, [cite.label for cite, _ in cited])
    for axes, title in ((paper, f'{table}, as published'), (ours, 'here' + (
            ' (bars: two standard errors over seeds)' if deviation is not None else ' (one seed)'))):
        axes.set(xlabel='top-1 (%)')
        axes.set_title(title, fontsize=9)
        axes.grid(alpha=0.3)
        axes.margins(x=0.1, y=0.15 if len(cited) > 1 else 1)
    handles = {label: handle for axes in (paper, ours) for handle, label in zip(*axes.get_legend_handles_labels())}
    figure.legend(handles.values(), handles.keys(), loc='outside lower center', ncols=len(handles), fontsize=8)
    figure.savefig(path, dpi=110)


def cost_figure(lines: dict[str, list[dict[str, float]]], deviation: float | None, path: Path) -> None:
    """Linear accuracy against images seen, FLOPs and time; bars are two standard deviations over seeds."""
    figure = Figure(figsize=(12, 4.3), layout='constrained')
    panels = figure.subplots(1, len(AXES), sharey=True)
    for axes, (axis, label) in zip(panels, AXES.items()):
        for number, (name, points) in enumerate(lines.items()):
            axes.errorbar([p[axis] for p in points], [p['linear'] for p in points], fmt='o-', color=f'C{number}',
                          yerr=None if deviation is None else 2 * deviation, capsize=3, label=CURVES[name])
        axes.set(xlabel=label, xscale='log')
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(lambda value, _: _number(value))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.grid(alpha=0.3, which='both')
    panels[0].set_ylabel('linear accuracy (%)')
    figure.legend(*panels[0].get_legend_handles_labels(), loc='outside lower center', ncols=len(lines), fontsize=8)
    figure.savefig(path, dpi=110)
