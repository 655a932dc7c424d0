#!/usr/bin/env python3
"""The comparison of ways to fine-tune pretrained weights: accuracy on the source, and what is left for other sets.

Each method is tried with seed 0: at each learning rate with its first strength, then with its other strengths at the
best rate, on the first source alone. The best trial has the highest mean log-odds of the accuracy on validation rows of
the source and of a ridge probe on training images of CIFAR-10. It is then repeated with every seed and measured on the
test images.

Stop this script at any time. The same command continues, and what docs/results/pretrained.json holds is not run again.

    python benchmarks/pretrained.py --data hfds/DATA --model tf_efficientnet_lite0.in1k
    python benchmarks/pretrained.py --data hfds/DATA --model tf_efficientnet_lite0.in1k --methods ctc-none --seeds 0
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import ctc_timm
from ctc_timm.measure.results import write_json
from harness import Task, cpu_seconds, read_flags, work
from pretrained_report import METHODS, SOURCES, START, TARGETS, TUNED_ON, mean_log_odds
from tradeoff_report import redraw

ROOT = Path(__file__).resolve().parents[1]
IMAGES = {'max_train': 2000, 'max_test': 2000}  # of a target, with its class proportions


@dataclass(frozen=True)
class Trial:
    """One run: a source, a method with its flags, and a seed."""

    source: str
    method: str
    flags: str  # a strength of the method
    lr: float
    seed: int

    @property
    def name(self) -> str:
        """The name of the run's folder."""
        strength = METHODS[self.method].index(self.flags)
        return f'{self.source}-{self.method}-{strength}-lr{self.lr:g}-seed{self.seed}'

    def matches(self, row: dict[str, Any]) -> bool:
        """Whether a stored row is this run's."""
        return all(row[key] == value for key, value in asdict(self).items())


class Comparison:
    """The stored rows, and the runs that are missing."""

    def __init__(self, args: Any) -> None:
        self.args, self.file = args, args.docs / 'results' / 'pretrained.json'
        stored = json.loads(self.file.read_text()) if self.file.is_file() else {'common': args.common, 'rows': []}
        self.rows: list[dict[str, Any]] = stored['rows']
        self.folder = args.output.resolve()

    def row(self, trial: Trial, part: str) -> dict[str, Any] | None:
        """A trial's row, if `part` of it was measured."""
        return next((row for row in self.rows if trial.matches(row) and part in row), None)

    def task(self, trial: Trial, part: str) -> Task:
        """Train a trial where that is missing, and measure `part` of it: `validation` or `test`."""
        args, folder = self.args, self.folder / trial.name
        done, steps = folder / f'{part}.json', []
        weights = args.model
        if trial.method != START:
            data = SOURCES[trial.source]
            splits = ['--dataset', f'{args.data}/{trial.source}', '--train-split', data[0], '--val-split', data[1]]
            own = ['--lr', str(trial.lr), '--seed', str(trial.seed), '--seeds', '1', '--output', str(folder)]
            flags = [*args.common.split(), *trial.flags.split()]
            steps.append(['-m', 'ctc_timm', 'finetune', args.model, *splits, *flags, *own])
            weights = str(folder / f'fraction-1-seed-{trial.seed}' / 'last.safetensors')
        measure = ['--measure', weights, '--part', part, '--sources', trial.source, '--output', str(done)]
        steps.append([__file__, *measure, '--data', args.data, '--model', args.model])
        return Task(trial.name, tuple(steps), done, folder / 'log.txt')

    def make(self, trials: Sequence[Trial], part: str) -> None:
        """Run and measure what is missing; rows are stored as they are finished."""
        missing = {trial.name: trial for trial in trials if self.row(trial, part) is None}
        for task in work([self.task(trial, part) for trial in missing.values()], self.args.jobs):
            trial, folder = missing[task.name], task.log.parent
            kept = next((row for row in self.rows if trial.matches(row)), None)
            if kept is None:
                kept = asdict(trial)
                self.rows.append(kept)
            kept[part] = json.loads(task.done.read_text())
            if trial.method != START:
                kept['processor_seconds'] = cpu_seconds(task.log) or kept.get('processor_seconds')
                found = json.loads((folder / 'results.json').read_text())['rows'][0]
                kept['validation'] = {'source': found['top1']} | kept.get('validation', {})
            write_json(self.file, {'common': self.args.common, 'rows': self.rows})

    def tune(self, source: str) -> list[Trial]:
        """Make the trials of all methods; return the best trial of each."""
        rates = [rate for rate in self.args.rates if rate] or SOURCES[source][2]
        first = source == next(iter(SOURCES))
        flags = {m: METHODS[m][0] if first else self._strength(m) for m in self.args.methods}
        trials = {m: [Trial(source, m, flags[m], lr, 0) for lr in rates] for m in self.args.methods}
        self.make([trial for tried in trials.values() for trial in tried], 'validation')
        best = {method: max(tried, key=self._score) for method, tried in trials.items()}
        others = {m: [replace(best[m], flags=flags) for flags in METHODS[m][1:] if first] for m in trials}
        self.make([trial for tried in others.values() for trial in tried], 'validation')
        return [max([best[m], *others[m]], key=self._score) for m in trials]

    def _strength(self, method: str) -> str:
        """The flags of a method's best trial on the first source."""
        first = [row for row in self.rows if row['source'] == next(iter(SOURCES)) and row['method'] == method]
        tried = [row for row in first if TUNED_ON in row.get('validation', {})]
        return max(tried, key=lambda row: mean_log_odds(row['validation']))['flags'] if tried else METHODS[method][0]

    def _score(self, trial: Trial) -> float:
        row = self.row(trial, 'validation')
        return mean_log_odds(row['validation']) if row else float('-inf')

    def run(self) -> None:
        """Tune each method, then measure the best trial of each on the test images, with every seed."""
        for source in self.args.sources:
            if self.args.seeds:
                self.make([Trial(source, START, '', 0.0, 0)], 'test')
            best = self.tune(source)
            repeated = [replace(trial, seed=seed) for seed in range(self.args.seeds) for trial in best]
            self.make(repeated, 'test')


def measure(args: Any) -> dict[str, Any]:
    """Measure weights by ridge on frozen features, and with `part` test by their own classifier too."""
    model = {'img_size': 64, 'workers': 0, 'channels_last': True}
    if args.part == 'validation':
        splits, targets = {'train_split': 'train[:2000]', 'val_split': 'train[2000:4000]'}, [TUNED_ON]
    else:
        splits, targets = {'val_split': 'test'}, list(TARGETS)
    found = {}
    if args.part == 'test' and args.measure != args.model:
        source = f'{args.data}/{args.sources[0]}'
        folder = str(Path(args.output).parent / 'validation')
        own = ctc_timm.validate(args.measure, dataset=source, split='test', output=folder, **model)
        found['source'] = own['top1']
    for target in targets:
        place = str(Path(args.output).parent / f'probe-{args.part}-{target}')
        options = {**model, **splits, **(IMAGES if args.part == 'test' else {})}
        rows = ctc_timm.linear_probe(
            args.measure, target=[f'{args.data}/{target}'], probes=['ridge'], no_cache=True, output=place, **options
        )
        found[target] = rows[0]['top1']
    return found


if __name__ == '__main__':
    args = read_flags(
        __doc__, data='hfds/DATA', model='tf_efficientnet_lite0.in1k', sources=list(SOURCES), methods=list(METHODS)[1:],
        rates=[0.0], seeds=3, jobs=os.cpu_count() or 1, output=Path('runs/pretrained'), docs=ROOT / 'docs',
        common='--img-size 64 --epochs 8 -b 64 --eval-interval 8 --channels-last --cache-dataset -j 0',
        measure='', part='test', redraw=False,
    )  # fmt: skip
    if args.measure:
        write_json(args.output, measure(args))
    else:
        if not args.redraw:
            Comparison(args).run()
        redraw(args.docs)
