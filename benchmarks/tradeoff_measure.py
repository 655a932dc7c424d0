#!/usr/bin/env python3
"""The numbers of one run for docs/results.md, by the parts of transfer/: every kept epoch briefly, its ends in full.

    python benchmarks/tradeoff_measure.py runs/tradeoff/tradeoff_small/vanilla-0 --target hfds/CIFAR10 digits

The source's accuracy over the epochs is that of the run's validation rows, on which `best` is chosen as an engineer
who stops early would; that of the two ends is the source's test split's. What is finished is not measured again.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path
from typing import Any

from ctc_timm.cli.arguments import Parser, parse, run_script
from ctc_timm.data.datasets import open_split
from ctc_timm.data.transforms import data_config
from ctc_timm.measure.dynamics import add_arguments, kept_run
from ctc_timm.measure.features import features_of
from ctc_timm.measure.few_shot import few_shot
from ctc_timm.measure.points import CheckpointEvaluation, Weights
from ctc_timm.measure.probes import METHODS
from ctc_timm.measure.results import RowStore, write_json
from ctc_timm.measure.sets import Labeled
from ctc_timm.measure.transfer_sets import OpenSplit, TransferSet, open_targets
from ctc_timm.models.loading import data_flags, run_arguments
from ctc_timm.utils.distributed import create_accelerator

SHOTS, DRAWS = 10, 5


class Measurement:
    """A run and the sets that it is measured on.

    Args:
        args: Of `transfer/dynamics.py`, for one run.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.accelerator = create_accelerator(args)
        (path,) = map(Path, args.runs)
        self.run = kept_run(path, path.name, args, self.accelerator)
        self.store = RowStore(self.run.path / 'dynamics' / 'rows.jsonl')
        self.config = data_config(args, Weights(self._file(max(self.run.epochs)), self.run.path).loaded.model)
        self.targets = open_targets(args.target, args, self.config['input_size'][0], self.accelerator)
        own = argparse.Namespace(**{**vars(args), **data_flags(run_arguments(self.run.path))})
        self.source_test = OpenSplit(open_split(own, args.source_test), own, self.accelerator)

    def numbers(self) -> dict[str, Any]:
        """Everything: `trajectory`, one entry a kept epoch, and `ends`, `last` and `best` on the validation rows."""
        trajectory = [self._brief(epoch) for epoch in self.run.epochs]
        best = max(trajectory, key=lambda row: row['source']['top1'])['epoch']
        last = trajectory[-1]['epoch']
        ends = {'last': self._full(last), 'best': self._full(best)}
        return {'stage_change': self.run.change, 'trajectory': trajectory, 'ends': ends}

    def _file(self, epoch: int) -> Path:
        return self.run.epochs[epoch]

    def _row(self, weights: Weights, split: OpenSplit, target: TransferSet | None, **changes: Any) -> dict[str, Any]:
        args = copy.copy(self.args)
        vars(args).update(changes)
        point = CheckpointEvaluation(weights, split.images(self.config), target, self.config, args, self.accelerator)
        return point.row(self.store)

    def _brief(self, epoch: int) -> dict[str, Any]:
        weights = Weights(self._file(epoch), self.run.path)
        few = {'probes': ['ridge'], 'information': 'none'}
        source = self._row(weights, self.run.source, None, **few)
        rows = {target.slug: self._row(weights, target.test, target, **few) for target in self.targets}
        return {
            'epoch': epoch,
            'source': {'top1': source['top1'], 'effective_rank': source['effective_rank']},
            'targets': {
                name: {'ridge': row['ridge_top1'], 'effective_rank': row['effective_rank']}
                for name, row in rows.items()
            },
        }

    def _full(self, epoch: int) -> dict[str, Any]:
        weights = Weights(self._file(epoch), self.run.path)
        much = {'probes': list(METHODS), 'information': 'renyi'}
        source = self._row(weights, self.source_test, None, **much)
        found: dict[str, Any] = {'epoch': epoch, 'source': {'top1': source['top1'], **_about(source)}, 'targets': {}}
        for target in self.targets:
            row = self._row(weights, target.test, target, **much)
            accuracies = {key.removesuffix('_top1'): value for key, value in row.items() if key.endswith('_top1')}
            found['targets'][target.slug] = {**accuracies, **self._few_shot(weights, target), **_about(row)}
        return found

    def _few_shot(self, weights: Weights, target: TransferSet) -> dict[str, float]:
        """The mean over draws of a ridge probe's top-1 accuracy."""
        key = f'few-shot {weights.hash} {target.name} {SHOTS} {DRAWS}'
        if key not in self.store.rows:
            cache = self.run.path / 'features'
            train, test = (
                Labeled(found.features_ND, found.labels_N)
                for split in (target.train, target.test)
                for found in [features_of(weights.loaded, split.images(self.config), self.accelerator, cache)]
            )
            (drawn,) = few_shot('ridge', train, test, target.num_classes, [SHOTS], range(DRAWS))
            self.store.add(key, {f'ridge-{SHOTS}-shot': drawn.scores['top1'].value})
        return self.store.rows[key]


def _about(row: dict[str, Any]) -> dict[str, float]:
    return {name: row[name] for name in ('information_xt', 'information_ty', 'effective_rank')}


def main() -> None:
    parser = Parser(description=__doc__.split('\n')[0])
    add_arguments(parser)
    parser.add_argument('--source-test', default='test', metavar='SPLIT', help='of the source, for the tables')
    args = parse(parser)
    measurement = Measurement(args)
    write_json(measurement.run.path / 'tradeoff.json', measurement.numbers())


if __name__ == '__main__':
    run_script(main)
