"""The tables of docs/results.md and README.md, made from docs/results/*.json alone."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from harness import markdown
from scipy import stats

BASELINE = 'vanilla'
# supervised training's best kept epoch on the source's validation rows, with either schedule
EARLY = {BASELINE: 'early stopping', 'vanilla-steps': 'vanilla-steps, stopped early'}
README_METHODS = (BASELINE, 'ctc-discriminability', 'ctc-early-past')
MAIN = 'tradeoff_overfit'  # the comparison that the README shows
PROBES = {
    'ridge': 'ridge',
    'logistic': 'logistic',
    'sgd-last': 'SGD protocol',
    'knn-20': 'kNN, 20',
    'ridge-10-shot': '10-shot ridge',
}
FEATURES = {'I(X;T), nats': 'information_xt', 'I(T;Y), nats': 'information_ty', 'effective rank': 'effective_rank'}
DENSE = {
    'box AP': ('detect', 'box_ap'),
    'AP50': ('detect', 'box_ap50'),
    'AP75': ('detect', 'box_ap75'),
    'mIoU': ('segment', 'miou'),
    'pixel accuracy': ('segment', 'pixel_accuracy'),
}
Table = list[list[str]]
Columns = dict[str, tuple[str, ...]]  # where a number lies in what was measured of an epoch, by heading
Seeds = dict[int, float]


def interval(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and half width of its 95% interval by Student's t; None for a single value."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, None
    return mean, float(stats.t.interval(0.95, len(values) - 1, scale=stats.sem(values))[1])


def show(values: Sequence[float], digits: int = 1, sign: str = '') -> str:
    """A mean with its interval."""
    if not values:
        return ''
    mean, half = interval(values)
    mean = round(mean, digits) + 0.0  # never "-0.0"
    return f'{mean:{sign}.{digits}f}' + ('' if half is None else f' ± {half:.{digits}f}')


def differences(values: Seeds, others: Seeds) -> list[float]:
    """Paired differences by seed."""
    return [values[seed] - others[seed] for seed in sorted(values.keys() & others.keys())]


def ends_of(results: dict[str, Any]) -> dict[str, dict[int, Any]]:
    """By method and seed what was measured at the end, with early stopping as a method of its own."""
    ends: dict[str, dict[int, Any]] = {}
    for run in results['runs']:
        ends.setdefault(run['method'], {})[run['seed']] = run['ends']['last']
        if run['method'] in EARLY and 'best' in run['ends']:
            ends.setdefault(EARLY[run['method']], {})[run['seed']] = run['ends']['best']
    return ends


def pick(ends: dict[int, Any], path: Sequence[str]) -> Seeds:
    """One number of each seed."""
    values = dict(ends)
    for key in path:
        values = {seed: value[key] for seed, value in values.items()}
    return values


def compare(results: dict[str, Any], columns: Columns, digits: int = 1) -> Table:
    """A row a method: mean and interval of each number, then the paired difference from supervised training."""
    ends = ends_of(results)
    rows = [['method', 'seeds', *columns]]
    for method, measured in ends.items():
        cells = []
        for path in columns.values():
            values = pick(measured, path)
            cell = show(list(values.values()), digits)
            if method != BASELINE and BASELINE in ends:
                cell += f' ({show(differences(values, pick(ends[BASELINE], path)), digits, "+")})'
            cells.append(cell)
        rows.append([method, str(len(measured)), *cells])
    return rows


def drops(results: dict[str, Any]) -> Table:
    """A row a method: how far each accuracy falls from its best kept epoch to the last, and what training costs."""
    accuracies: dict[str, Callable[[Any], float]] = {'source': lambda row: row['source']['top1']}
    for target in results['targets']:
        accuracies[target] = lambda row, target=target: row['targets'][target]['ridge']
    cost = {(run['method'], run['seed']): run['processor_seconds'] for run in results['runs']}
    rows = [['method', *(f'{name}: best epoch, drop to the last' for name in accuracies), 'CPU time']]
    for method in dict.fromkeys(run['method'] for run in results['runs']):
        runs, cells = [run for run in results['runs'] if run['method'] == method], []
        for accuracy in accuracies.values():
            best = [max(run['trajectory'], key=accuracy) for run in runs]
            lost = [accuracy(row) - accuracy(run['trajectory'][-1]) for row, run in zip(best, runs, strict=True)]
            cells.append(f'{", ".join(str(row["epoch"]) for row in best)}; {show(lost)}')
        pairs = [(cost[method, run['seed']], cost.get((BASELINE, run['seed']))) for run in runs]
        ratios = [mine / baseline for mine, baseline in pairs if mine and baseline]
        rows.append([method, *cells, f'{statistics.fmean(ratios):.2f}' if ratios else ''])
    return rows


def command(results: dict[str, Any], method: str, seed: str = 'SEED') -> str:
    """The command that trains one run of a method."""
    flags = results['methods'][method].replace('{epochs}', str(results['epochs']))
    recipe, source = Path(results['recipe']).stem, results['source'].upper()
    return f'python -m ctc_timm train -c {recipe} --dataset hfds/{source} --seed {seed} {flags}'.rstrip()


def tradeoff_tables(name: str, results: dict[str, Any]) -> str:
    """All tables of one comparison, its picture and its commands."""
    source, accuracy = results['source'], {f'{results["source"]} top-1': ('source', 'top1')}
    parts = [
        f'![Accuracy over the epochs, and target against source accuracy]({name}.png)',
        '### The last epoch',
        markdown(compare(results, accuracy | _ridge(results))),
    ]
    for target in results['targets']:
        by_probe = {label: ('targets', target, probe) for probe, label in PROBES.items()}
        features = {label: ('targets', target, key) for label, key in FEATURES.items()}
        parts += [f'### {target}, by probe', markdown(compare(results, by_probe))]
        parts += [f'### {target}, information and rank of the features', markdown(compare(results, features, digits=2))]
    features = {label: ('source', key) for label, key in FEATURES.items()}
    return '\n\n'.join([
        *parts,
        f'### {source}, information and rank of the features',
        markdown(compare(results, features, digits=2)),
        '### From the best kept epoch to the last',
        markdown(drops(results)),
        '### Commands',
        '\n'.join(f'    {command(results, method)}' for method in results['methods']),
    ])  # fmt: skip


def dense_tables(name: str, results: dict[str, Any]) -> str:
    """Detection and segmentation on the frozen backbones of one comparison, with the commands."""
    lines = [
        re.sub(r'transfer/(\w+)\.py', r'    python -m ctc_timm \1 RUN/last.safetensors', line)
        for line in results['commands'].values()
    ]
    return markdown(compare(results, DENSE)) + '\n\n' + '\n'.join(f'{line} --seed SEED' for line in lines)


def _ridge(results: dict[str, Any]) -> Columns:
    return {target: ('targets', target, 'ridge') for target in results['targets']}


def readme_table(results: dict[str, Any]) -> Table:
    """A row a method of the README, each with its command."""
    ends, rows = ends_of(results), [['', 'seeds', results['source'], *results['targets'], 'command']]
    for method in README_METHODS:
        if method in ends:
            columns = [('source', 'top1'), *_ridge(results).values()]
            cells = [show(list(pick(ends[method], path).values())) for path in columns]
            rows.append([method, str(len(ends[method])), *cells, f'`{command(results, method, "0")}`'])
    return rows


def stored(docs: Path, kind: str = 'tradeoff') -> dict[str, dict[str, Any]]:
    """Every comparison by the name of its file, of `tradeoff` or of `dense`; that of the README first."""
    files = (docs / 'results').glob(f'{kind}_*.json')
    files = sorted(files, key=lambda file: (file.stem != MAIN, not file.stem.startswith(MAIN), file.stem))
    return {file.stem: json.loads(file.read_text()) for file in files}


def blocks(docs: Path) -> dict[str, str]:
    """The text of every generated block by name: a comparison's, and `results` for the README."""
    comparisons = stored(docs)
    found = {name: tradeoff_tables(name, results) for name, results in comparisons.items()}
    found |= {name: dense_tables(name, results) for name, results in stored(docs, 'dense').items()}
    if MAIN in comparisons:
        found['results'] = markdown(readme_table(comparisons[MAIN]))
    return found


def fill(text: str, blocks: dict[str, str]) -> str:
    """A document with its generated blocks anew, each between `<!-- NAME -->` and `<!-- /NAME -->`."""

    def block(match: re.Match[str]) -> str:
        start, name, _, end = match.groups()
        return f'{start}\n\n{blocks[name]}\n\n{end}' if name in blocks else match[0]

    return re.sub(r'(<!-- (\w+) -->)(.*?)(<!-- /\2 -->)', block, text, flags=re.DOTALL)
