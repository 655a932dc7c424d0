"""The tables and pictures of docs/results.md and README.md, made from docs/results/*.json alone."""

from __future__ import annotations

import json
import math
import re
import statistics
from pathlib import Path
from typing import Any

from ctc_timm.measure.plots.style import COLORS, GRAY, MARKERS, drawing, plt, save
from harness import markdown
from intervals import interval, show
from pretrained_report import pretrained_tables, redraw_pretrained

BASELINE = 'vanilla'
# supervised training's best kept epoch on the source's validation rows, with either schedule
EARLY = {BASELINE: 'early stopping', 'vanilla-steps': 'vanilla-steps, stopped early'}
README_METHODS = (BASELINE, 'ctc-discriminability', 'ctc-early-past')
MAIN = 'tradeoff_overfit'  # the comparison that the README shows
PROBES = {
    'ridge': 'ridge',
    'logistic': 'logistic',
    'SGD protocol': 'sgd-last',
    'kNN, 20': 'knn-20',
    '10-shot ridge': 'ridge-10-shot',
}
FEATURES = {'I(X;T), nats': 'information_xt', 'I(T;Y), nats': 'information_ty', 'effective rank': 'effective_rank'}
DENSE = {
    'box AP': 'detect/box_ap',
    'AP50': 'detect/box_ap50',
    'AP75': 'detect/box_ap75',
    'mIoU': 'segment/miou',
    'pixel accuracy': 'segment/pixel_accuracy',
}
SHOWN = ('vanilla', 'ctc-early-past', 'ctc-discriminability', 'ctc-transferability')  # in the pictures
Table = list[list[str]]
Numbers = dict[str, float]  # of an epoch, by path: source/top1, targets/cifar10/ridge, ...


def flatten(measured: dict[str, Any], prefix: str = '') -> Numbers:
    """What was measured of an epoch, by path."""
    numbers: Numbers = {}
    for key, value in measured.items():
        numbers |= flatten(value, f'{prefix}{key}/') if isinstance(value, dict) else {f'{prefix}{key}': value}
    return numbers


def stored(docs: Path, kind: str = 'tradeoff') -> dict[str, dict[str, Any]]:
    """Every comparison by the name of its file, of `tradeoff` or of `dense`; that of the README first."""
    files = (docs / 'results').glob(f'{kind}_*.json')
    files = sorted(files, key=lambda file: (file.stem != MAIN, not file.stem.startswith(MAIN), file.stem))
    return {file.stem: json.loads(file.read_text()) for file in files}


def ends_of(results: dict[str, Any]) -> dict[str, dict[int, Numbers]]:
    """By method and seed what was measured at the end, with early stopping as a method of its own."""
    ends: dict[str, dict[int, Numbers]] = {}
    for run in results['runs']:
        ends.setdefault(run['method'], {})[run['seed']] = flatten(run['ends']['last'])
        if run['method'] in EARLY and 'best' in run['ends']:
            ends.setdefault(EARLY[run['method']], {})[run['seed']] = flatten(run['ends']['best'])
    return ends


def differences(seeds: dict[int, Numbers], others: dict[int, Numbers], path: str) -> list[float]:
    """Paired differences of a number by seed."""
    return [seeds[seed][path] - others[seed][path] for seed in sorted(seeds.keys() & others.keys())]


def compare(results: dict[str, Any], columns: dict[str, str], digits: int = 1) -> str:
    """A row a method: mean and interval of each number, then the paired difference from supervised training."""
    ends = ends_of(results)
    rows = [['method', 'seeds', *columns]]
    for method, seeds in ends.items():
        cells = [show([numbers[path] for numbers in seeds.values()], digits) for path in columns.values()]
        if method != BASELINE and BASELINE in ends:
            gains = [show(differences(seeds, ends[BASELINE], path), digits, '+') for path in columns.values()]
            cells = [f'{cell} ({gain})' for cell, gain in zip(cells, gains)]
        rows.append([method, str(len(seeds)), *cells])
    return markdown(rows)


def accuracies(results: dict[str, Any]) -> dict[str, str]:
    """Paths of the accuracies that each epoch has: the source's, then each target's."""
    return {'source': 'source/top1'} | {target: f'targets/{target}/ridge' for target in results['targets']}


def drops(results: dict[str, Any]) -> str:
    """A row a method: how far each accuracy falls from its best kept epoch to the last, and what training costs."""
    cost = {(run['method'], run['seed']): run['processor_seconds'] for run in results['runs']}
    columns = accuracies(results)
    rows = [['method', *(f'{name}: best epoch, drop to the last' for name in columns), 'CPU time']]
    for method in dict.fromkeys(run['method'] for run in results['runs']):
        cells, runs = [], [run for run in results['runs'] if run['method'] == method]
        for path in columns.values():
            curves = [{row['epoch']: flatten(row)[path] for row in run['trajectory']} for run in runs]
            best = [max(curve, key=lambda epoch, curve=curve: curve[epoch]) for curve in curves]
            lost = [curve[epoch] - curve[max(curve)] for epoch, curve in zip(best, curves)]
            cells.append(f'{", ".join(map(str, best))}; {show(lost)}')
        pairs = [(cost[method, run['seed']], cost.get((BASELINE, run['seed']))) for run in runs]
        ratios = [mine / baseline for mine, baseline in pairs if mine and baseline]
        rows.append([method, *cells, f'{statistics.fmean(ratios):.2f}' if ratios else ''])
    return markdown(rows)


def command(results: dict[str, Any], method: str, seed: str = 'SEED') -> str:
    """The command that trains one run of a method."""
    flags = results['methods'][method].replace('{epochs}', str(results['epochs']))
    recipe, source = Path(results['recipe']).stem, results['source'].upper()
    return f'python -m ctc_timm train -c {recipe} --dataset hfds/{source} --seed {seed} {flags}'.rstrip()


def tradeoff_tables(name: str, results: dict[str, Any]) -> str:
    """All tables of one comparison, its picture and its commands."""
    source, paths = results['source'], accuracies(results)
    parts = [f'![Accuracy over the epochs, and target against source accuracy]({name}.png)', '### The last epoch']
    parts.append(compare(results, {f'{source} top-1': paths.pop('source')} | paths))
    for target in results['targets']:
        by_probe = {label: f'targets/{target}/{probe}' for label, probe in PROBES.items()}
        parts += [f'### {target}, by probe', compare(results, by_probe)]
        parts += _features(results, target, f'targets/{target}')
    parts += _features(results, source, 'source')
    parts += ['### From the best kept epoch to the last', drops(results), '### Commands']
    return '\n\n'.join([*parts, '\n'.join(f'    {command(results, method)}' for method in results['methods'])])


def _features(results: dict[str, Any], name: str, path: str) -> list[str]:
    columns = {label: f'{path}/{key}' for label, key in FEATURES.items()}
    return [f'### {name}, information and rank of the features', compare(results, columns, digits=2)]


def dense_tables(results: dict[str, Any]) -> str:
    """Detection and segmentation on the frozen backbones of one comparison, with the commands."""
    pattern, full = r'transfer/(\w+)\.py(.*)', r'    python -m ctc_timm \1 RUN/last.safetensors\2 --seed SEED'
    commands = [re.sub(pattern, full, line) for line in results['commands'].values()]
    return '\n\n'.join([compare(results, DENSE), '\n'.join(commands)])


def readme_table(results: dict[str, Any]) -> str:
    """A row a method of the README, each with its command."""
    ends, rows = ends_of(results), [['', 'seeds', results['source'], *results['targets'], 'command']]
    for method in README_METHODS:
        if method in ends:
            seeds = ends[method].values()
            cells = [show([numbers[path] for numbers in seeds]) for path in accuracies(results).values()]
            rows.append([method, str(len(seeds)), *cells, f'`{command(results, method, "0")}`'])
    return markdown(rows)


def draw(results: dict[str, Any], picture: Path) -> None:
    """Write a PNG file: each target over the epochs, the source likewise, and the first target against the source."""
    methods = [method for method in SHOWN if any(run['method'] == method for run in results['runs'])]
    seeds = max((sum(run['method'] == method for run in results['runs']) for method in methods), default=0)
    spread = f'mean of up to {seeds} seeds with 95% intervals' if seeds > 1 else 'one seed'
    targets, (source_path, *target_paths) = results['targets'], accuracies(results).values()
    with drawing():
        rows = math.ceil(len(targets) / 2) + 1
        figure, axes = plt.subplots(rows, 2, figsize=(10.5, 3.8 * rows))
        *panels, source_panel, across = axes.flat
        for unused in panels[len(targets) :]:
            unused.set_axis_off()
        panels = [*panels[: len(targets)], source_panel]
        for method in methods:
            index = SHOWN.index(method)  # a method has one color in all pictures
            style: dict[str, Any] = {'color': COLORS[index], 'marker': MARKERS[index], 'markersize': 4}
            by_epoch: dict[int, list[Numbers]] = {}
            for run in results['runs']:
                for row in run['trajectory'] if run['method'] == method else ():
                    by_epoch.setdefault(row['epoch'] + 1, []).append(flatten(row))
            for panel, path in zip(panels, [*target_paths, source_path]):
                points = [interval([numbers[path] for numbers in epoch]) for epoch in by_epoch.values()]
                means, halves = [mean for mean, _ in points], [half or 0.0 for _, half in points]
                panel.plot(list(by_epoch), means, **style, label=method.replace('ctc-', 'CTC, ').replace('-', ' '))
                # no accuracy lies outside of 0 to 100, where an interval of few seeds may reach
                low, high = ([min(max(m + side * h, 0.0), 100.0) for m, h in zip(means, halves)] for side in (-1, 1))
                panel.fill_between(list(by_epoch), low, high, color=style['color'], alpha=0.15, linewidth=0)
                if path == target_paths[0]:
                    y, y_half = means, halves
            across.plot(means, y, **style, linewidth=1.2, alpha=0.7)
            style |= {'marker': '*', 'markersize': 15, 'markeredgecolor': 'black', 'capsize': 3, 'zorder': 5}
            across.errorbar(means[-1:], y[-1:], xerr=halves[-1:], yerr=y_half[-1:], **style)
        for panel, name in zip(panels, [*targets, results['source']]):
            panel.axvline(results['temporal_start_epoch'], color=GRAY, linestyle='-.', linewidth=1)
            panel.set(xlabel='epoch (dash-dotted: CTC starts its temporal stage)', ylabel=f'{name} top-1 (%)')
            panel.set_title('target: ridge on frozen features', fontsize=10)
        source_panel.set_title('source: the model itself, on validation rows', fontsize=10)
        across.set(xlabel=source_panel.get_ylabel(), ylabel=panels[0].get_ylabel())
        across.set_title('target against source; star: last epoch', fontsize=10)
        title = f'{results["settings"]["model"]}, {spread}'
        figure.legend(*source_panel.get_legend_handles_labels(), loc='outside upper center', ncols=4, title=title)
        save(figure, picture)


def blocks(docs: Path) -> dict[str, str]:
    """The text of every generated block by name: a comparison's, and `results` for the README."""
    comparisons = stored(docs)
    found = {name: tradeoff_tables(name, results) for name, results in comparisons.items()}
    found |= {name: dense_tables(results) for name, results in stored(docs, 'dense').items()}
    found |= pretrained_tables(docs)
    return found | ({'results': readme_table(comparisons[MAIN])} if MAIN in comparisons else {})


def fill(text: str, blocks: dict[str, str]) -> str:
    """A document with its generated blocks anew, each between `<!-- NAME -->` and `<!-- /NAME -->`."""
    for name, block in blocks.items():
        start, end = f'<!-- {name} -->', f'<!-- /{name} -->'
        before, found, rest = text.partition(start)
        text = f'{before}{start}\n\n{block}\n\n{end}{rest.partition(end)[2]}' if found else text
    return text


def redraw(docs: Path) -> None:
    """Write the pictures, and the generated blocks of docs/results.md and of the README beside docs."""
    for name, results in stored(docs).items():
        draw(results, docs / f'{name}.png')
    redraw_pretrained(docs)
    for file in (docs / 'results.md', docs.parent / 'README.md'):
        if file.is_file():
            file.write_text(fill(file.read_text(encoding='utf-8'), blocks(docs)), encoding='utf-8')
