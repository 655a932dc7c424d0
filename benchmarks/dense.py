#!/usr/bin/env python3
"""Detection and segmentation on the frozen backbones of `tradeoff.py`'s runs, for docs/results.md.

The scenes of digits, one small detector and one small segmenter, trained alike on every backbone as it stood after the
last epoch; only pyramid and heads learn. The seed is that of the run.

    python benchmarks/dense.py runs/tradeoff/tradeoff_small
    python benchmarks/dense.py runs/tradeoff/tradeoff_small --methods vanilla ctc-discriminability --jobs 1
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

from harness import Task, main_of, work
from tradeoff import METHODS, ROOT, measured_runs, redraw

from ctc_timm.measure.results import write_json
from ctc_timm.utils.errors import UserError

EPOCHS = {'detect': 4, 'segment': 6}
KEPT = {'detect': ('box_ap', 'box_ap50', 'box_ap75'), 'segment': ('miou', 'pixel_accuracy')}


def flags(kind: str, stages: int) -> list[str]:
    """Flags beside the recipe of the scenes."""
    return ['--freeze-stages', str(stages), '--freeze-bn', '--epochs', str(EPOCHS[kind])]


def task(kind: str, run: Path, seed: int, output: Path, stages: int) -> Task:
    """A detector or segmenter on one backbone."""
    name = f'{run.name}-{kind}'
    place = ['--output', str(output), '--experiment', name, '--resume', 'auto']
    command = [kind, str(run / 'last.safetensors'), *flags(kind, stages), '--seed', str(seed), *place]
    return Task(name, (['-m', 'ctc_timm', *command],), output / name / 'results.json', output / f'{name}.log')


def collect(runs: list[tuple[str, int, Path]], output: Path, stages: int) -> dict[str, Any]:
    """What is stored, of the runs whose numbers are all there."""
    rows = []
    for method, seed, run in runs:
        files = {kind: output / f'{run.name}-{kind}' / 'results.json' for kind in KEPT}
        if all(file.is_file() for file in files.values()):
            found = {kind: json.loads(file.read_text())['metrics'] for kind, file in files.items()}
            last = {kind: {key: 100 * found[kind][key] for key in keys} for kind, keys in KEPT.items()}
            rows.append({'method': method, 'seed': seed, 'ends': {'last': last}})
    commands = {kind: ' '.join([f'transfer/{kind}.py', *flags(kind, stages)]) for kind in KEPT}
    return {'bodies': output.name, 'epochs': EPOCHS, 'commands': commands, 'runs': rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('runs', type=Path, metavar='FOLDER', help='of the runs: --output of tradeoff.py / its recipe')
    parser.add_argument('--methods', nargs='+', default=list(METHODS), choices=list(METHODS), metavar='METHOD')
    parser.add_argument('--freeze-stages', type=int, default=4, metavar='N', help='of the backbone; 4 is all')
    parser.add_argument('--jobs', type=int, default=os.cpu_count() or 1, metavar='N', help='runs at a time')
    parser.add_argument('--output', type=Path, default='runs/dense', metavar='DIR', help='where the runs go')
    parser.add_argument('--docs', type=Path, default=ROOT / 'docs', metavar='DIR', help='numbers and document')
    args = parser.parse_args()
    runs = [run for run in measured_runs(args.runs.resolve()) if run[0] in args.methods]
    if not runs:
        raise UserError(f'{args.runs}: no measured runs; make them with benchmarks/tradeoff.py')
    output, stored = args.output.resolve() / args.runs.name, args.docs / 'results' / f'dense_{args.runs.name}.json'
    by_seed = sorted(runs, key=lambda run: run[1])
    for _ in work(
        [task(kind, run, seed, output, args.freeze_stages) for _, seed, run in by_seed for kind in KEPT], args.jobs
    ):
        write_json(stored, collect(runs, output, args.freeze_stages))
    redraw(args.docs)


if __name__ == '__main__':
    main_of(main)
