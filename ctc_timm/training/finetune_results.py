"""What fine-tuning leaves: a row for each run, the mean over seeds of each fraction, the picture of both."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..measure.plots.accuracy import plot_finetune
from ..measure.results import table, write_csv, write_json
from ..measure.scores import mean_scores
from ..utils.errors import UserError

RESULTS, SETTINGS = 'results.json', 'settings.json'
_SHARED = ('target', 'split', 'method', 'freeze', 'train_fraction', 'num_train', 'num_test')


def is_finished(run: Path) -> bool:
    """Tell whether a run was trained to its end and measured."""
    return (run / RESULTS).is_file()


def write_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Write what the runs in a folder have in common."""
    write_json(folder / SETTINGS, _plain(settings))


def write(folder: Path, about: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """Write results.json and the tables of all finished runs in a folder.

    Args:
        folder: Of the runs.
        about: What results.json holds beside settings and rows.
        settings: What the runs have in common.

    Returns:
        What results.json holds.
    """
    found = [json.loads(file.read_text('utf-8')) for file in folder.glob(f'fraction-*-seed-*/{RESULTS}')]
    rows = sorted(found, key=lambda row: (row['train_fraction'], row['seed']))
    means = summarize(rows)
    results = {**about, 'settings': _plain(settings), 'rows': rows, 'summary': means}
    write_json(folder / RESULTS, results)
    write_csv(folder / 'results.csv', rows)
    write_csv(folder / 'results_mean.csv', means)
    return results


def summarize(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Average over seeds for each fraction, with Student's 95% interval of the mean, which one run does not have.

    Args:
        rows: Of runs that differ in fraction and seed only.
    """
    means = []
    for fraction in sorted({row['train_fraction'] for row in rows}):
        same = [row for row in rows if row['train_fraction'] == fraction]
        means.append({**{key: same[0][key] for key in _SHARED}, 'seeds': len(same), **mean_scores(same)})
    return means


def check_folder(folder: Path, settings: dict[str, Any]) -> None:
    """Refuse to mix runs of several settings in a folder."""
    file = folder / SETTINGS
    if not file.is_file():
        return
    there, here = json.loads(file.read_text(encoding='utf-8')), _plain(settings)
    changed = [key for key in here if key in there and there[key] != here[key]]  # later versions may know more
    if changed:
        parts = [f'{_name(key)} {str(there[key])[:40]}, not {str(here[key])[:40]}' for key in changed[:3]]
        raise UserError(
            f'{folder}: holds runs with {", ".join(parts)}{", ..." * (len(changed) > 3)}; go on with those settings, '
            f'or give the new ones a folder of their own with `output`'
        )


def conclude(folder: Path, results: dict[str, Any]) -> str:
    """Draw the picture, and give the numbers as tables."""
    picture = plot_finetune(results, folder)
    scores = {'top1': 'top-1 %', 'top1_low': 'from', 'top1_high': 'to', 'top5': 'top-5 %'}
    scores |= {'mean_per_class': 'per class %'}
    images = {'train_fraction': 'fraction', 'num_train': 'images'}
    first = results['rows'][0]
    return (
        f'\n{first["method"]}: {results["model"]} ({results["weights"]}) on {results["target"]}, '
        f'{first["num_test"]:,} test images, last epoch, 95% intervals over test images\n'
        f'{_table(results["rows"], {**images, "seed": "seed", **scores, "best_epoch_top1": "best epoch"})}\n\n'
        f'mean over seeds, 95% intervals of the mean\n'
        f'{_table(results["summary"], {**images, "seeds": "seeds", **scores})}\n'
        f'written to {folder / RESULTS}, results.csv, results_mean.csv, {picture.name}'
    )


def _table(rows: list[dict[str, Any]], columns: dict[str, str]) -> str:
    return table([{**row, 'train_fraction': f'{row["train_fraction"]:g}'} for row in rows], columns)


def _plain(settings: dict[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(settings, default=str))


def _name(key: str) -> str:
    return key if key in ('architecture', 'weights', 'processes') else f'`{key}`'
