"""docs/results.md, its pictures and the README's table, drawn from docs/results/*.json alone."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import tradeoff_pictures
from scipy import stats

BASELINE = 'vanilla'
# plain training's best kept epoch on the source's validation rows, with either schedule
EARLY = {BASELINE: 'early stopping', 'vanilla-steps': 'vanilla-steps, stopped early'}
README_ROWS = (BASELINE, 'ctc-discriminability', 'ctc-early-past')
PROBES = {
    'ridge': 'ridge',
    'logistic': 'logistic',
    'sgd-last': 'SGD protocol',
    'knn-20': 'kNN, 20',
    'ridge-10-shot': '10-shot ridge',
}
MAIN = 'tradeoff_overfit'  # what the README shows
START, END = '<!-- results -->', '<!-- /results -->'
Table = list[list[str]]
Seeds = dict[int, float]
Accuracy = Callable[[dict[str, Any]], float]  # of a kept epoch


def ends_of(results: dict[str, Any]) -> dict[str, dict[int, dict[str, Any]]]:
    """By method and seed what was measured at the end, early stopping of plain training as a method of its own."""
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for run in results['runs']:
        found.setdefault(run['method'], {})[run['seed']] = run['ends']['last']
        if run['method'] in EARLY and 'best' in run['ends']:
            found.setdefault(EARLY[run['method']], {})[run['seed']] = run['ends']['best']
    return found


def interval(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and half of its 95% interval by Student's t, which one value does not have."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, None
    return mean, float(stats.t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))


def shown(values: Sequence[float], digits: int = 1, sign: str = '') -> str:
    """A mean with its interval, as a table shows it."""
    if not values:
        return ''
    mean, half = interval(values)
    mean = round(mean, digits) + 0.0  # never "-0.0"
    return f'{mean:{sign}.{digits}f}' + ('' if half is None else f' ± {half:.{digits}f}')


def differences(mine: Seeds, theirs: Seeds) -> list[float]:
    """By seed what one has more than the other."""
    return [mine[seed] - theirs[seed] for seed in sorted(mine.keys() & theirs.keys())]


def pick(ends: dict[int, dict[str, Any]], *path: str) -> Seeds:
    """One number of each seed."""
    found = {}
    for seed, end in ends.items():
        value: Any = end
        for key in path:
            value = value[key]
        found[seed] = float(value)
    return found


def compare(results: dict[str, Any], columns: dict[str, tuple[str, ...]], digits: int = 1) -> Table:
    """A row a method: mean and interval of each number, then the paired difference from plain training."""
    ends = ends_of(results)
    rows = [['method', 'seeds', *columns]]
    for method, mine in ends.items():
        cells = []
        for path in columns.values():
            values = pick(mine, *path)
            cell = shown(list(values.values()), digits)
            if method != BASELINE and BASELINE in ends:
                cell += f' ({shown(differences(values, pick(ends[BASELINE], *path)), digits, "+")})'
            cells.append(cell)
        rows.append([method, str(len(mine)), *cells])
    return rows


def fallen(results: dict[str, Any], method: str, get: Accuracy) -> tuple[list[int], list[float]]:
    """By run of a method: its best kept epoch by some accuracy, and how far that falls from there to the last one."""
    found = [run['trajectory'] for run in results['runs'] if run['method'] == method]
    best = [max(rows, key=get) for rows in found]
    return [row['epoch'] for row in best], [get(row) - get(rows[-1]) for row, rows in zip(best, found)]


def drops(results: dict[str, Any]) -> Table:
    """A row a method: how far each accuracy falls from its best kept epoch to the last one, and what a run costs."""
    getters: dict[str, Accuracy] = {'source': lambda row: row['source']['top1']}
    getters |= {target: _ridge(target) for target in results['targets']}
    costs = {
        (run['method'], run['seed']): run['processor_seconds']
        for run in results['runs']
        if run['processor_seconds'] is not None
    }
    rows = [['method', *(f'{name}: best epoch, drop to the last' for name in getters), 'processor time']]
    for method in dict.fromkeys(run['method'] for run in results['runs']):
        runs = [run for run in results['runs'] if run['method'] == method]
        cells = []
        for get in getters.values():
            epochs, points = fallen(results, method, get)
            cells.append(f'{", ".join(map(str, epochs))}; {shown(points)}')
        ratios = [
            costs[method, run['seed']] / costs[BASELINE, run['seed']]
            for run in runs
            if {(method, run['seed']), (BASELINE, run['seed'])} <= costs.keys()
        ]
        rows.append([method, *cells, f'{statistics.fmean(ratios):.2f}' if ratios else ''])
    return rows


def verdicts(results: dict[str, Any], columns: dict[str, tuple[str, ...]]) -> list[str]:
    """A sentence for each method with several seeds, on each of its numbers."""
    ends, said = ends_of(results), []
    for method, mine in ends.items():
        if method == BASELINE or len(mine) < 2:
            continue
        parts = []
        for name, path in columns.items():
            found = differences(pick(mine, *path), pick(ends[BASELINE], *path))
            mean, half = interval(found)
            assert half is not None
            clear = 'above' if mean > half else 'below' if mean < -half else 'not told apart from'
            parts.append(f'{clear} plain training on {name} ({shown(found, sign="+")})')
        said.append(f'- **{method}** is {", ".join(parts)}.')
    return said


def _targets(results: dict[str, Any]) -> dict[str, tuple[str, ...]]:
    return {target: ('targets', target, 'ridge') for target in results['targets']}


def markdown(rows: Table) -> str:
    """A table in Markdown; the first row is its head."""
    head, *body = rows
    lines = [head, ['---'] * len(head), *body]
    return '\n'.join(f'| {" | ".join(line)} |' for line in lines)


def command(results: dict[str, Any], method: str, seed: str = 'SEED') -> str:
    """What trains one run of it."""
    flags = results['methods'][method].replace('{epochs}', str(results['epochs']))
    parts = [f'train.py -c recipes/{results["recipe"]} --dataset hfds/{results["source"].upper()} --seed {seed}', flags]
    return ' '.join(part for part in parts if part)


def section(name: str, results: dict[str, Any]) -> str:
    """All about one size of the comparison."""
    settings, source = results['settings'], results['source']
    source_name = {'source': ('source', 'top1')}
    crops = f'crops by {settings["crop-padding"]} pixels' if settings.get('crop-padding') else 'no crops'
    parts = [
        f'## {settings["model"]}, {settings["train-split"]} of {source}, {crops}',
        f'{settings["img-size"]}x{settings["img-size"]} pixels, {results["epochs"]} epochs, of which CTC gives the '
        f'last {results["epochs"] - results["temporal_start_epoch"]} to the temporal stage; everything else is in '
        f"`recipes/{results['recipe']}`. Means with 95% intervals over seeds (Student's t); in brackets the difference "
        'from plain training, seed by seed. One seed has no interval, and proves nothing.',
        *verdicts(results, {'source': source_name['source'], **_targets(results)}),
        f'![Accuracy over the epochs, and target against source accuracy]({name}.png)',
        '### The last epoch',
        markdown(compare(results, {f'{source} top-1': source_name['source'], **_targets(results)})),
    ]
    for target in results['targets']:
        parts += [
            f'### {target}, by probe',
            markdown(
                compare(results, {label: ('targets', target, probe) for probe, label in PROBES.items()}),
            ),
            f'### {target}, what the features hold',
            markdown(compare(results, _held('targets', target), digits=2)),
        ]
    parts += [
        f'### {source}, what the features hold',
        markdown(compare(results, _held('source'), digits=2)),
        '### From the best kept epoch to the last',
        'The best epoch of each seed, and how many points lower the last one is. Processor time is that of training, '
        'as a multiple of plain training with the same seed.',
        markdown(drops(results)),
        '### Commands',
        '\n'.join(f'    {command(results, method)}' for method in results['methods']),
    ]
    return '\n\n'.join(parts).replace('.\n\n- **', '.\n- **')


def _held(*where: str) -> dict[str, tuple[str, ...]]:
    names = {'I(X;T), nats': 'information_xt', 'I(T;Y), nats': 'information_ty', 'effective rank': 'effective_rank'}
    return {label: (*where, key) for label, key in names.items()}


OPENING = """# Results

Drawn by `python benchmarks/tradeoff.py --redraw` from `docs/results/`; nothing here is typed by hand. The runs are made
and measured, as many at a time as there are cores, and after a stop go on where they were, by

    python benchmarks/tradeoff.py --source hfds/CIFAR100 --targets hfds/CIFAR10 digits --recipe recipes/RECIPE.yaml

Source accuracy of the tables is that of the test split of CIFAR-100, 10,000 images, by the model's own classifier; the
pictures follow it on validation rows of the training split. Targets are frozen features under a probe: CIFAR-10
(10,000 training, 5,000 test images here) and scikit-learn's handwritten digits (1,437 and 360). Settings were chosen
on the validation rows of the source and on training images of CIFAR-10. The test images of both, and the digits, were
measured afterwards; the one run of which that is not true is named in [choosing.md](choosing.md), which also says what
follows from the numbers. Early stopping is plain training's kept epoch that is best on the validation rows."""


def stored(docs: Path, kind: str = 'tradeoff') -> dict[str, dict[str, Any]]:
    """Every comparison by the name of its file, of `tradeoff` or of `dense`; that of the README first."""
    files = sorted(
        (docs / 'results').glob(f'{kind}_*.json'),
        key=lambda file: (file.stem != MAIN, not file.stem.startswith(MAIN), file.stem),
    )
    return {file.stem: json.loads(file.read_text()) for file in files}


DENSE = {
    'box AP': ('detect', 'box_ap'),
    'AP50': ('detect', 'box_ap50'),
    'AP75': ('detect', 'box_ap75'),
    'mIoU': ('segment', 'miou'),
    'pixel accuracy': ('segment', 'pixel_accuracy'),
}


def dense_section(results: dict[str, Any]) -> str:
    """Detection and segmentation on the bodies of one size of the comparison."""
    lines = [
        f'## Detection and segmentation on the bodies of {results["bodies"]}',
        "Scenes of scikit-learn's digits, 600 to train on and 150 to measure on; Faster R-CNN and a semantic FPN on "
        'the frozen body as it stood after its last epoch, so that only pyramid and heads learn. Percent, as above; '
        f'made by `benchmarks/dense.py runs/tradeoff/{results["bodies"]}`, which runs for each of the bodies',
        '\n'.join(f'    {command} RUN/last.safetensors --seed SEED' for command in results['commands'].values()),
        markdown(compare(results, DENSE)),
        *verdicts(results, DENSE),
    ]
    return '\n\n'.join(lines).replace('.\n\n- **', '.\n- **')


def readme_part(results: dict[str, Any], others: Sequence[dict[str, Any]] = ()) -> str:
    """The table of three rows, each with its command; how far they fall; what CTC gains, in other comparisons too."""
    ends, rows = ends_of(results), [['', 'seeds', results['source'], *results['targets'], 'command']]
    for method in README_ROWS:
        if method in ends:
            columns = [('source', 'top1'), *_targets(results).values()]
            cells = [shown(list(pick(ends[method], *path).values())) for path in columns]
            rows.append([method, str(len(ends[method])), *cells, f'`{command(results, method, "0")}`'])
    falls = [
        f'{name} falls by {" and ".join(_falls(results, name))}'
        for name in (README_ROWS[0], README_ROWS[-1])
        if name in ends
    ]
    said = f'From its best epoch to its last {", ".join(falls)} points.'
    gains = [row for found in (results, *others) for row in _gains(found)]
    if gains:
        head = [f'{README_ROWS[-1]} over {BASELINE}, seed by seed', 'seeds', 'source', 'target', *PROBES.values()]
        said += f'\n\n{markdown([head, *gains])}'
    return f'{markdown(rows)}\n\n{said}'


def _gains(results: dict[str, Any]) -> Table:
    """A row a target: the paired differences of the README's last method from plain training, by every probe."""
    ends, settings = ends_of(results), results['settings']
    if not {BASELINE, README_ROWS[-1]} <= ends.keys():
        return []
    ours, theirs = ends[README_ROWS[-1]], ends[BASELINE]

    def gain(*path: str) -> str:
        return shown(differences(pick(ours, *path), pick(theirs, *path)), sign='+')

    size = f'{settings["img-size"]}x{settings["img-size"]}'
    start = [f'{settings["model"]}, {settings["train-split"]}, {size}', str(len(ours.keys() & theirs.keys()))]
    start.append(gain('source', 'top1'))
    rows = []
    for target in results['targets']:
        rows.append([*start, target, *(gain('targets', target, probe) for probe in PROBES)])
        start = ['', '', '']
    return rows


def _falls(results: dict[str, Any], method: str) -> list[str]:
    return [f'{shown(fallen(results, method, _ridge(target))[1])} ({target})' for target in results['targets']]


def _ridge(target: str) -> Accuracy:
    return lambda row: float(row['targets'][target]['ridge'])


def document(docs: Path) -> str:
    """The text of docs/results.md."""
    sections = [section(name, results) for name, results in stored(docs).items()]
    return '\n\n'.join([OPENING, *sections, *map(dense_section, stored(docs, 'dense').values())]) + '\n'


def with_table(readme: str, found: dict[str, dict[str, Any]]) -> str:
    """The README with its tables anew, between its two marks."""
    part = readme_part(found[MAIN], [results for name, results in found.items() if name != MAIN])
    before, rest = readme.split(START)
    return f'{before}{START}\n\n{part}\n\n{END}{rest.split(END)[1]}'


def redraw(docs: Path) -> None:
    """Write the document and its pictures anew, and the table of the README beside the folder, if there is one."""
    found = stored(docs)
    for name, results in found.items():
        tradeoff_pictures.draw(results, docs / f'{name}.png')
    (docs / 'results.md').write_text(document(docs), encoding='utf-8')
    readme = docs.parent / 'README.md'
    if MAIN in found and readme.is_file() and START in readme.read_text(encoding='utf-8'):
        readme.write_text(with_table(readme.read_text(encoding='utf-8'), found), encoding='utf-8')
