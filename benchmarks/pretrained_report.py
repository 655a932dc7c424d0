"""What is compared by pretrained.py, and the tables and the picture of docs/results.md made from its rows."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import Any

from ctc_timm.measure.plots.style import COLORS, GRAY, MARKERS, drawing, plt, save
from harness import markdown
from intervals import interval, show

BASELINE, START = 'plain', 'start'  # START: the pretrained weights, not fine-tuned
TUNED_ON = 'cifar10'  # the target whose training images choose
TARGETS = ('caltech101', 'flowers17', 'cifar10', 'eurosat', 'cifar100')
# Training rows, validation rows, and learning rates.
SOURCES: dict[str, tuple[str, str, tuple[float, ...]]] = {
    'cifar100': ('train[:3000]', 'train[3000:5000]', (0.01, 0.02, 0.04)),
    'eurosat': ('train[:3000]', 'train[3000:4000]', (0.0025, 0.0075, 0.02)),
}
_CTC, _DISTILL = '--mode ctc --past-features', '--mode distill --past-features'
_CENTERED = f'{_CTC} bank --temporal-projector centered'
_JOINED = {
    'averaged': '--start-share 0.3',
    'body-rate': '--body-lr-scale 0.3',
    'ema': '--model-ema --model-ema-decay 0.99',
    'l2-sp': '--l2-sp 0.01',
    'probe-first': '--probe-first',
}
# Flags of a method with each of its strengths; the first is the one that learning rates are tried with.
METHODS: dict[str, tuple[str, ...]] = {
    START: ('',),
    BASELINE: ('',),
    'distill': tuple(f'{_DISTILL} model --temporal-weight {w}' for w in (3, 10, 30)),
    'distill-bank': tuple(f'{_DISTILL} bank --temporal-weight {w}' for w in (10, 3, 30)),
    'l2-sp': tuple(f'--l2-sp {w}' for w in (0.01, 0.1)),
    'averaged': tuple(f'--start-share {share}' for share in (0.5, 0.3)),
    'body-rate': tuple(f'--body-lr-scale {scale}' for scale in (0.3, 0.1)),
    'probe-first': ('--probe-first',),
    'frozen-bn': ('--freeze batch_norm',),
    'ema': ('--model-ema --model-ema-decay 0.99',),
    'ctc-published': (f'{_CTC} model --temporal-projector separate',),
    'ctc-shared': (f'{_CTC} bank --temporal-projector shared',),
    'ctc-model': tuple(f'{_CTC} model --temporal-projector fixed --temporal-weight {w}' for w in (1, 3, 0.3)),
    'ctc-bank': tuple(f'{_CTC} bank --temporal-projector fixed --temporal-weight {w}' for w in (1, 3, 0.3)),
    'ctc-none': tuple(f'{_CTC} bank --temporal-projector none --temporal-weight {w}' for w in (1, 3, 0.3)),
    'ctc-bank-512': (f'{_CTC} bank --temporal-projector fixed --embed-dim 512',),
    'ctc-bank-sampled': (f'{_CTC} bank --temporal-projector fixed --negatives sampled --num-negatives 1024',),
    'ctc-none-cold': (f'{_CTC} bank --temporal-projector none --temporal-temperature 0.05',),
    'ctc-none-warm': (f'{_CTC} bank --temporal-projector none --temporal-temperature 0.2',),
    'ctc-none-0.2-weights': tuple(
        f'{_CTC} bank --temporal-projector none --temporal-temperature 0.2 --temporal-weight {w}' for w in (3, 10)
    ),
    'ctc-none-0.5-weights': tuple(
        f'{_CTC} bank --temporal-projector none --temporal-temperature 0.5 --temporal-weight {w}' for w in (3, 10)
    ),
    'ctc-none-averaged': (f'{_CTC} bank --temporal-projector none --start-share 0.3',),
    'ctc-none-body-rate': (f'{_CTC} bank --temporal-projector none --body-lr-scale 0.3',),
    'ctc-centered': tuple(f'{_CTC} bank --temporal-projector centered --temporal-weight {w}' for w in (1, 0.5, 2)),
    **{f'ctc-centered-{name}': (f'{_CENTERED} {flags}',) for name, flags in _JOINED.items()},
}
Row = dict[str, Any]


def log_odds(percent: float) -> float:
    """Log-odds of an accuracy in percent."""
    return math.log(percent / (100 - percent))


def mean_log_odds(accuracies: dict[str, float]) -> float:
    """Mean log-odds of accuracies in percent."""
    return statistics.fmean(map(log_odds, accuracies.values()))


def targets_of(source: str) -> list[str]:
    """The sets that transfer is measured on: all but the source itself."""
    return [target for target in TARGETS if target != source]


def transfer(source: str, test: dict[str, float]) -> float:
    """Mean log-odds over the targets of a source."""
    return mean_log_odds({target: test[target] for target in targets_of(source)})


def tested(results: dict[str, Any], source: str) -> dict[str, dict[int, Row]]:
    """Rows with test numbers, by method and seed."""
    found: dict[str, dict[int, Row]] = {}
    for name in METHODS:
        rows = [row for row in results['rows'] if (row['source'], row['method']) == (source, name) and 'test' in row]
        if rows:
            found[name] = {row['seed']: row for row in rows}
    return found


def compared(results: dict[str, Any]) -> list[str]:
    """The sources with test numbers of more than the start."""
    return [source for source in SOURCES if len(tested(results, source)) > 1]


def table(results: dict[str, Any], source: str) -> str:
    """A row a method: test accuracies, then the paired difference from plain fine-tuning in mean log-odds, and cost."""
    methods, columns = tested(results, source), ['source', *TARGETS]
    rows = [['method', 'learning rate', 'seeds', *columns, 'mean log-odds', 'CPU time']]
    for name, seeds in methods.items():
        numbers = [row['test'] for row in seeds.values()]
        cells = [show([test[column] for test in numbers if column in test]) for column in columns]
        odds, cost = '', ''
        if plain := methods.get(BASELINE, {}) if name not in (START, BASELINE) else {}:
            pairs = [(row, plain[seed]) for seed, row in seeds.items() if seed in plain]
            gains = [transfer(source, row['test']) - transfer(source, base['test']) for row, base in pairs]
            odds = show(gains, 2, '+')
            costs = [(row['processor_seconds'], base['processor_seconds']) for row, base in pairs]
            ratios = [own / other for own, other in costs if own and other]  # none where a run was interrupted
            cost = f'{statistics.fmean(ratios):.2f}' if ratios else ''
        rate = f'{next(iter(seeds.values()))["lr"]:g}' if name != START else ''
        rows.append([name, rate, str(len(seeds)), *cells, odds, cost])
    return markdown(rows)


def trials(results: dict[str, Any], source: str) -> str:
    """A row a trial: its flags, its learning rate, and the two numbers that choose."""
    rows = [['method', 'flags', 'learning rate', f'{source}, validation rows', f'{TUNED_ON}, training images', 'score']]
    for name in METHODS:
        for row in results['rows']:
            if (row['source'], row['method'], row['seed']) == (source, name, 0) and TUNED_ON in row.get(
                'validation', {}
            ):
                values = row['validation']
                cells = [f'{values["source"]:.1f}', f'{values[TUNED_ON]:.1f}', f'{mean_log_odds(values):.2f}']
                rows.append([name, f'`{row["flags"]}`' if row['flags'] else '', f'{row["lr"]:g}', *cells])
    return markdown(rows)


def stored(docs: Path) -> dict[str, Any]:
    """The rows that were measured, none without a file."""
    file = docs / 'results' / 'pretrained.json'
    return json.loads(file.read_text()) if file.is_file() else {'rows': []}


def pretrained_tables(docs: Path) -> dict[str, str]:
    """The generated text: `pretrained`, test numbers of each source and all trials."""
    results, parts = stored(docs), ['![Transfer against source accuracy](pretrained.png)']
    sources = compared(results)
    for source in sources:
        parts += [f'### Fine-tuned on {source}', table(results, source)]
    for source in sources:
        parts += [f'### Trials on {source}, seed 0', trials(results, source)]
    return {'pretrained': '\n\n'.join(parts)} if sources else {}


def redraw_pretrained(docs: Path) -> None:
    """Write pretrained.png: a panel a source, mean transfer against source accuracy, a point a method."""
    results = stored(docs)
    sources = compared(results)
    if not sources:
        return
    shown = [name for name in METHODS if name != START and any(name in tested(results, source) for source in sources)]
    with drawing():
        figure, axes = plt.subplots(1, len(sources), figsize=(5.2 * len(sources), 4.4), squeeze=False)
        for panel, source in zip(axes.flat, sources):
            for name, seeds in tested(results, source).items():
                tests = [row['test'] for row in seeds.values()]
                means = [statistics.fmean(test[target] for target in targets_of(source)) for test in tests]
                if name == START:
                    panel.axhline(means[0], color=GRAY, linestyle='--', label='the start, frozen')
                    continue
                (x, x_half), (y, y_half) = interval([test['source'] for test in tests]), interval(means)
                style: dict[str, Any] = {
                    'color': COLORS[shown.index(name)],
                    'marker': MARKERS[shown.index(name)],
                    'capsize': 3,
                }
                panel.errorbar(x, y, xerr=x_half, yerr=y_half, markersize=8, linestyle='', label=name, **style)
            panel.set(xlabel=f'{source} top-1 (%)', ylabel='mean of the targets by ridge (%)')
            panel.set_title(f'fine-tuned on {source}', fontsize=10)
        handles = axes.flat[0].get_legend_handles_labels()
        figure.legend(*handles, loc='outside upper center', ncols=4, title='mean over seeds with 95% intervals')
        save(figure, docs / 'pretrained.png')
