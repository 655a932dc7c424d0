"""The comparison of ways to fine-tune: what it chooses, and its table against the stored numbers."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.special import logit

import pretrained
import pretrained_report as report
from ctc_timm.training.settings import FinetuneSettings
from ctc_timm.utils.settings import flatten
from runs import ROOT

STORED = report.stored(ROOT / 'docs')


@pytest.mark.parametrize('method', report.METHODS)
def test_every_method_is_one_that_finetune_takes(method: str, flags: Any) -> None:
    default = flatten(flags('', cls=FinetuneSettings))
    found = [flatten(flags(words, cls=FinetuneSettings)) for words in report.METHODS[method]]
    modes = {'ctc': 'ctc', 'distill': 'distill'}
    assert {values['mode'] for values in found} == {modes.get(method.split('-')[0], 'vanilla')}
    assert method in (report.START, report.BASELINE) or all(values != default for values in found)
    assert len({str(sorted(values.items(), key=str)) for values in found}) == len(found)


def test_the_best_trial_has_the_highest_mean_log_odds(tmp_path: Path) -> None:
    """Of all rates and strengths; stored rows are not run again, and another source takes over the best strength."""
    first, second = report.METHODS['distill'][:2]
    tried = {(first, 0.01): (40, 70), (first, 0.02): (48, 69), (first, 0.04): (47, 69.5), (second, 0.02): (50, 68)}
    tried[report.METHODS['distill'][2], 0.02] = (30, 75)
    rows = [
        {'source': 'cifar100', 'method': 'distill', 'flags': flags, 'lr': lr, 'seed': 0}
        | {'validation': {'source': source, 'cifar10': target}}
        for (flags, lr), (source, target) in tried.items()
    ]
    rows += [
        {'source': 'eurosat', 'method': 'distill', 'flags': second, 'lr': lr, 'seed': 0}
        | {'validation': {'source': 90 + lr, 'cifar10': 40.0}}
        for lr in report.SOURCES['eurosat'][2]
    ]
    (tmp_path / 'results').mkdir()
    (tmp_path / 'results' / 'pretrained.json').write_text(json.dumps({'common': '', 'rows': rows}))
    args = Namespace(docs=tmp_path, output=tmp_path / 'runs', common='', rates=[0.0], methods=['distill'], jobs=1)
    comparison = pretrained.Comparison(args)
    scores = {key: logit(np.array(value) / 100).mean() for key, value in tried.items()}
    (best,) = comparison.tune('cifar100')
    assert (best.flags, best.lr) == max(scores, key=lambda key: scores[key])
    (other,) = comparison.tune('eurosat')
    assert (other.flags, other.lr) == (best.flags, 0.02) and not (tmp_path / 'runs').exists()


@pytest.mark.parametrize('source', report.SOURCES)
def test_the_table_holds_the_stored_means(source: str) -> None:
    """Means, and paired differences of the mean log-odds over targets that are not the source, by hand."""
    rows = [row for row in STORED['rows'] if row['source'] == source and 'test' in row]
    lines = {
        line.split(' | ')[0].lstrip('| '): line.split(' | ') for line in report.table(STORED, source).splitlines()[2:]
    }
    assert set(lines) == {row['method'] for row in rows}
    targets = [name for name in report.TARGETS if name != source]

    def odds(row: dict[str, Any]) -> float:
        return float(np.mean([logit(row['test'][name] / 100) for name in targets]))

    plain = {row['seed']: odds(row) for row in rows if row['method'] == 'plain'}
    for method, cells in lines.items():
        mine = [row for row in rows if row['method'] == method]
        assert cells[2] == str(len(mine))
        for cell, name in zip(cells[4:9], report.TARGETS, strict=True):
            assert float(cell.split()[0]) == pytest.approx(np.mean([row['test'][name] for row in mine]), abs=0.051)
        gains = [odds(row) - plain[row['seed']] for row in mine if row['seed'] in plain]
        if method not in ('start', 'plain') and gains:
            assert float(cells[9].split()[0]) == pytest.approx(np.mean(gains), abs=0.0051)
