"""What fine-tuning leaves: a row a run, the mean over seeds of each fraction, the picture of both."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..measure.few_shot import mean_score
from ..measure.probes import score_columns
from ..measure.results import table, write_csv, write_json
from ..measure.scores import METRICS
from ..utils.errors import UserError

FILE = 'results.json'
SETTINGS = 'settings.json'
SHARED = ('target', 'split', 'method', 'freeze', 'train_fraction', 'num_train', 'num_test')


def check_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Refuse to mix runs of several settings in a folder.

    Raises:
        UserError: Runs there were made with others.
    """
    file = folder / SETTINGS
    if not file.is_file():
        return
    there, here = json.loads(file.read_text(encoding='utf-8')), _plain(settings)
    changed = [key for key in here if key in there and there[key] != here[key]]  # later versions may know more flags
    if changed:
        told = ', '.join(f'{_name(key)} {_short(there[key])}, not {_short(here[key])}' for key in changed[:3])
        raise UserError(
            f'{folder}: holds runs with {told}{", ..." * (len(changed) > 3)}; go on with those settings, or give the '
            f'new ones a folder of their own with --output'
        )


def write_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Note what the runs in a folder have in common."""
    write_json(folder / SETTINGS, _plain(settings))


def is_finished(run: Path) -> bool:
    """Whether a run was trained to its end and measured."""
    return (run / FILE).is_file()


def write(folder: Path, about: dict[str, Any]) -> None:
    """Write results.json and results.csv of all runs in a folder that are finished.

    Args:
        folder: Of the runs.
        about: What results.json holds beside the rows.
    """
    found = [json.loads(file.read_text(encoding='utf-8')) for file in folder.glob(f'fraction-*-seed-*/{FILE}')]
    rows = sorted(found, key=lambda row: (row['train_fraction'], row['seed']))
    means = summarize(rows)
    write_json(folder / FILE, {**about, 'settings': _plain(about['settings']), 'rows': rows, 'summary': means})
    write_csv(folder / 'results.csv', rows)
    write_csv(folder / 'results_mean.csv', means)


def read(folder: Path) -> dict[str, Any]:
    """What results.json holds."""
    return json.loads((folder / FILE).read_text(encoding='utf-8'))


def summarize(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The mean over seeds for each fraction, with Student's 95% interval of the mean, which one run doesn't have.

    Args:
        rows: Of runs that differ in fraction and seed only.
    """
    means = []
    for fraction in sorted({row['train_fraction'] for row in rows}):
        same = [row for row in rows if row['train_fraction'] == fraction]
        scores = {metric: mean_score([row[metric] for row in same]) for metric in METRICS}
        shared = {key: same[0][key] for key in SHARED}
        means.append({**shared, 'seeds': len(same), **score_columns(scores)})
    return means


def conclude(folder: Path) -> str:
    """Draw the picture; the numbers as tables, and where everything is."""
    from ..measure.plots.finetune import plot_finetune

    results = read(folder)
    picture = plot_finetune(results, folder)
    scores = {
        'top1': 'top-1 %',
        'top1_low': 'from',
        'top1_high': 'to',
        'top5': 'top-5 %',
        'mean_per_class': 'per class %',
    }
    images = {'train_fraction': 'fraction', 'num_train': 'images'}
    first = results['rows'][0]
    return (
        f'\n{first["method"]}: {results["model"]} ({results["weights"]}) on {results["target"]}, '
        f'{first["num_test"]:,} test images, last epoch, 95% intervals over test images\n'
        f'{_table(results["rows"], {**images, "seed": "seed", **scores, "best_epoch_top1": "best epoch"})}\n\n'
        f'mean over seeds, 95% intervals of the mean\n'
        f'{_table(results["summary"], {**images, "seeds": "seeds", **scores})}\n'
        f'written to {folder / FILE}, results.csv, results_mean.csv, {picture.name}'
    )


def _table(rows: Sequence[dict[str, Any]], columns: dict[str, str]) -> str:
    return table([{**row, 'train_fraction': f'{row["train_fraction"]:g}'} for row in rows], columns)


def _plain(settings: dict[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(settings, default=str))


def _name(key: str) -> str:
    return key if key in ('architecture', 'weights', 'processes') else f'--{key.replace("_", "-")}'


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f'{text[:12]}...'
