#!/usr/bin/env python3
"""Detection and segmentation on the frozen bodies of `tradeoff.py`'s runs, for docs/results.md.

The scenes of digits, one small detector and one small segmenter, trained alike on every body as it stood after the last
epoch; only pyramid and heads learn. The seed is that of the run.

    python benchmarks/dense.py runs/tradeoff/tradeoff_small
    python benchmarks/dense.py runs/tradeoff/tradeoff_small --methods vanilla ctc-discriminability --jobs 1
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import tradeoff_report
from jobs import Task, stop_by_sigterm, work
from tqdm import tqdm
from tradeoff import METHODS, ROOT

from ctc_timm.cli.arguments import Parser, parse, positive_int, run_script
from ctc_timm.measure.results import write_json
from ctc_timm.utils.errors import UserError

EPOCHS = {'detect': 4, 'segment': 6}
KEPT = {'detect': ('box_ap', 'box_ap50', 'box_ap75'), 'segment': ('miou', 'pixel_accuracy')}
FROZEN = ['--freeze-stages', '{stages}', '--freeze-bn']


def bodies(folder: Path, methods: list[str]) -> list[tuple[str, int, Path]]:
    """Method, seed and folder of the runs whose training has ended, seed by seed.

    Raises:
        UserError: There are none.
    """
    found = []
    for file in folder.glob('*/tradeoff.json'):
        method, _, seed = file.parent.name.rpartition('-')
        if method in methods and seed.isdecimal():
            found.append((method, int(seed), file.parent))
    if not found:
        raise UserError(f'{folder}: no measured runs of {", ".join(methods)}; make them with benchmarks/tradeoff.py')
    return sorted(found, key=lambda run: (run[1], list(METHODS).index(run[0])))


def flags(kind: str, stages: int) -> list[str]:
    """What the script is told beside the recipe of the scenes."""
    return [*(word.replace('{stages}', str(stages)) for word in FROZEN), '--epochs', str(EPOCHS[kind])]


def task(kind: str, run: Path, seed: int, output: Path, stages: int) -> Task:
    """A detector or segmenter on one body."""
    name = f'{run.name}-{kind}'
    where = ['--output', str(output), '--experiment', name, '--resume', 'auto']
    script = str(ROOT / 'transfer' / f'{kind}.py')
    command = [script, str(run / 'last.safetensors'), *flags(kind, stages), '--seed', str(seed), *where]
    return Task(name, (command,), output / name / 'results.json', output / f'{name}.log')


def collect(runs: list[tuple[str, int, Path]], output: Path, stages: int, name: str) -> dict[str, Any]:
    """What is stored, of the runs whose numbers are all there."""
    rows = []
    for method, seed, run in sorted(runs, key=lambda run: list(METHODS).index(run[0])):
        files = {kind: output / f'{run.name}-{kind}' / 'results.json' for kind in KEPT}
        if all(file.is_file() for file in files.values()):
            found = {kind: json.loads(file.read_text())['metrics'] for kind, file in files.items()}
            last = {kind: {key: 100 * found[kind][key] for key in keys} for kind, keys in KEPT.items()}
            rows.append({'method': method, 'seed': seed, 'ends': {'last': last}})
    return {
        'bodies': name,
        'epochs': EPOCHS,
        'commands': {kind: ' '.join([f'transfer/{kind}.py', *flags(kind, stages)]) for kind in KEPT},
        'runs': rows,
    }


def add_arguments(parser: Parser) -> None:
    """Declare the flags."""
    parser.add_argument('runs', type=Path, metavar='FOLDER', help='of the runs: --output of tradeoff.py / its recipe')
    parser.add_argument('--methods', nargs='+', default=list(METHODS), choices=list(METHODS), metavar='METHOD')
    parser.add_argument('--freeze-stages', type=positive_int, default=4, metavar='N', help='of the body; 4 is all')
    parser.add_argument('--jobs', type=positive_int, default=os.cpu_count() or 1, metavar='N', help='runs at a time')
    parser.add_argument('--output', type=Path, default=Path('runs/dense'), metavar='DIR', help='where the runs go')
    parser.add_argument('--docs', type=Path, default=ROOT / 'docs', metavar='DIR', help='numbers and document')


def main() -> None:
    parser = Parser(description=__doc__.split('\n')[0])
    add_arguments(parser)
    args: argparse.Namespace = parse(parser)
    stop_by_sigterm()
    runs, output = bodies(args.runs.resolve(), args.methods), args.output.resolve() / args.runs.name
    tasks = [task(kind, run, seed, output, args.freeze_stages) for _, seed, run in runs for kind in KEPT]
    stored = args.docs / 'results' / f'dense_{args.runs.name}.json'
    with tqdm(total=len(tasks), desc='runs', dynamic_ncols=True) as bar:
        for done in work(tasks, args.jobs):
            bar.set_postfix_str(done.name)
            bar.update()
            write_json(stored, collect(runs, output, args.freeze_stages, args.runs.name))
    tradeoff_report.redraw(args.docs)


if __name__ == '__main__':
    run_script(main)
