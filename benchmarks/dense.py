#!/usr/bin/env python3
"""Detection and segmentation on the frozen backbones of `tradeoff.py`'s runs, for docs/results.md.

The scenes of digits, one small detector and one small segmenter, trained alike on every backbone as it stood after the
last epoch; only pyramid and heads learn. The seed is that of the run.

    python benchmarks/dense.py runs/tradeoff/tradeoff_small
    python benchmarks/dense.py runs/tradeoff/tradeoff_small --methods vanilla ctc-discriminability --jobs 1
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from ctc_timm.measure.results import write_json
from harness import Task, read_flags, work
from tradeoff import METHODS, ROOT, measured_runs
from tradeoff_report import redraw

EPOCHS = {'detect': 4, 'segment': 6}
KEPT = {'detect': ('box_ap', 'box_ap50', 'box_ap75'), 'segment': ('miou', 'pixel_accuracy')}
FLAGS = {kind: f'--freeze-stages 4 --freeze-bn --epochs {epochs}' for kind, epochs in EPOCHS.items()}


def task(kind: str, run: Path, seed: int, output: Path) -> Task:
    """A detector or segmenter on one backbone."""
    name = f'{run.name}-{kind}'
    place = ['--output', str(output), '--experiment', name, '--resume', 'auto']
    command = [kind, str(run / 'last.safetensors'), *FLAGS[kind].split(), '--seed', str(seed), *place]
    return Task(name, (['-m', 'ctc_timm', *command],), output / name / 'results.json', output / f'{name}.log')


def collect(runs: list[tuple[str, int, Path]], output: Path) -> dict[str, Any]:
    """What is stored, of the runs whose numbers are all there."""
    rows = []
    for method, seed, run in runs:
        files = {kind: output / f'{run.name}-{kind}' / 'results.json' for kind in KEPT}
        if all(file.is_file() for file in files.values()):
            found = {kind: json.loads(file.read_text())['metrics'] for kind, file in files.items()}
            last = {kind: {key: 100 * found[kind][key] for key in keys} for kind, keys in KEPT.items()}
            rows.append({'method': method, 'seed': seed, 'ends': {'last': last}})
    commands = {kind: f'transfer/{kind}.py {flags}' for kind, flags in FLAGS.items()}
    return {'bodies': output.name, 'epochs': EPOCHS, 'commands': commands, 'runs': rows}


if __name__ == '__main__':
    args = read_flags(
        __doc__, 'runs', methods=list(METHODS), jobs=os.cpu_count() or 1, output=Path('runs/dense'), docs=ROOT / 'docs'
    )
    folder = Path(args.runs).resolve()
    runs = [run for run in measured_runs(folder) if run[0] in args.methods]
    output = args.output.resolve() / folder.name
    by_seed = sorted(runs, key=lambda run: run[1])
    for _ in work([task(kind, run, seed, output) for _, seed, run in by_seed for kind in KEPT], args.jobs):
        write_json(args.docs / 'results' / f'dense_{folder.name}.json', collect(runs, output))
    redraw(args.docs)
