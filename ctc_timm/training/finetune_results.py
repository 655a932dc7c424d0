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


def write_results(folder: Path, about: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """Write results.json and the tables of all finished runs in a folder, and return what results.json holds."""
    found = [json.loads(file.read_text('utf-8')) for file in folder.glob(f'fraction-*-seed-*/{RESULTS}')]
    rows = sorted(found, key=lambda row: (row['train_fraction'], row['seed']))
    means = summarize(rows)
    results = {**about, 'settings': plain(settings), 'rows': rows, 'summary': means}
    write_json(folder / RESULTS, results)
    write_csv(folder / 'results.csv', rows)
    write_csv(folder / 'results_mean.csv', means)
    return results


def summarize(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Average over seeds for each fraction, with Student's 95% interval of the mean, which one run does not have."""
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
    there, here = json.loads(file.read_text(encoding='utf-8')), plain(settings)
    changed = [key for key in here if key in there and there[key] != here[key]]  # later versions may know more
    if changed:
        names = {key: key if key in ('architecture', 'weights', 'processes') else f'`{key}`' for key in changed}
        parts = [f'{names[key]} {str(there[key])[:40]}, not {str(here[key])[:40]}' for key in changed[:3]]
        raise UserError(
            f'{folder}: holds runs with {", ".join(parts)}{", ..." * (len(changed) > 3)}; go on with those settings, '
            f'or give the new ones a folder of their own with `output`'
        )


def conclude(folder: Path, results: dict[str, Any]) -> str:
    """Draw the picture, and give the numbers as tables."""
    picture, first = plot_finetune(results, folder), results['rows'][0]
    scores = dict(top1='top-1 %', top1_low='from', top1_high='to', top5='top-5 %', mean_per_class='per class %')
    images = {'train_fraction': 'fraction', 'num_train': 'images'}
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


def plain(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings as JSON holds them."""
    return json.loads(json.dumps(settings, default=str))
