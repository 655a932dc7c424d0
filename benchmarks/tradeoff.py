#!/usr/bin/env python3
"""The comparison that docs/results.md shows: supervised training, CTC, parts of CTC, and what one would try first.

Every method is trained with every seed and for as many epochs, and each kept epoch is measured. A run is a process of
its own: stop this script at any time, and the same command continues where everything was.

    python benchmarks/tradeoff.py --source hfds/CIFAR100 --targets hfds/CIFAR10 digits
    python benchmarks/tradeoff.py --source hfds/CIFAR100 --targets hfds/CIFAR10 digits --methods vanilla --seeds 5
    python benchmarks/tradeoff.py --redraw            # tables and pictures from the stored numbers
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import tradeoff_pictures
import tradeoff_report
from harness import Task, cpu_seconds, main_of, work

from ctc_timm.measure.results import write_json
from ctc_timm.utils.yaml_files import read_recipe

ROOT = Path(__file__).resolve().parents[1]
STEPS = ('--sched', 'multistep', '--decay-milestones', '16', '31')  # counted within a stage, as every schedule is
# Flags of a method beside the recipe, which holds the weights and temperatures of the discriminability recipe.
METHODS: dict[str, list[str]] = {
    'vanilla': ['--mode', 'vanilla'],
    'ctc-discriminability': [],
    'ctc-transferability': [
        *('--instance-weight', '0.5', '--instance-temperature', '0.1', '--temporal-temperature', '0.1')
    ],
    # where supervised training over-compresses: the past is taken before the learning rate falls, and weighs more;
    # chosen on validation rows of the source and training images of CIFAR-10
    'ctc-early-past': ['--temporal-weight', '5', *STEPS],
    'ctc-early-past-no-instance': ['--temporal-weight', '5', '--instance-weight', '0', *STEPS],
    'ctc-no-temporal': ['--temporal-start-epoch', '{epochs}'],
    'ctc-no-instance': ['--instance-weight', '0'],
    # supervised training with the learning rate of ctc-early-past
    'vanilla-steps': ['--mode', 'vanilla', *STEPS],
    # as much weight decay as CTC has in its first stage
    'weight-decay': ['--mode', 'vanilla', '--weight-decay', '1e-3'],
    'label-smoothing': ['--mode', 'vanilla', '--smoothing', '0.1'],
}
# These get every seed; the others the first ones.
SEVERAL = ('vanilla', 'ctc-discriminability', 'ctc-transferability', 'ctc-early-past')


def read_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--source', default='hfds/CIFAR100', metavar='NAME', help='data set to train on')
    parser.add_argument('--source-test', default='test', metavar='SPLIT', help='of the source, for the tables')
    parser.add_argument('--targets', nargs='+', default=['digits'], metavar='NAME', help='data sets to transfer to')
    parser.add_argument('--recipe', default='tradeoff_small', metavar='RECIPE', help='its name or a file')
    parser.add_argument('--methods', nargs='+', default=list(METHODS), choices=list(METHODS), metavar='METHOD')
    parser.add_argument('--seeds', type=int, default=3, metavar='N', help=f'of {", ".join(SEVERAL)}')
    parser.add_argument('--other-seeds', type=int, default=1, metavar='N', help='of the other methods')
    parser.add_argument('--jobs', type=int, default=os.cpu_count() or 1, metavar='N', help='runs at a time')
    parser.add_argument('--output', default='runs/tradeoff', metavar='DIR', help='where the runs go')
    parser.add_argument('--docs', default=ROOT / 'docs', type=Path, metavar='DIR', help='numbers, tables, pictures')
    parser.add_argument('--redraw', action='store_true', help='only tables and pictures, from the stored numbers')
    return parser.parse_args()


def plan(args: argparse.Namespace, folder: Path, epochs: int) -> list[Task]:
    """All runs, seed by seed, so that what is finished can be compared."""
    tasks = []
    for seed in range(max(args.seeds, args.other_seeds)):
        for method in args.methods:
            if seed >= (args.seeds if method in SEVERAL else args.other_seeds):
                continue
            name = f'{method}-{seed}'
            flags = [word.replace('{epochs}', str(epochs)) for word in METHODS[method]]
            data = ['-c', args.recipe, '--dataset', args.source, '--seed', str(seed)]
            place = ['--output', str(folder), '--experiment', name, '--resume', 'auto']
            train = ['-m', 'ctc_timm', 'train', *data, *flags, *place]
            script = str(Path(__file__).with_name('tradeoff_measure.py'))
            measure = [script, str(folder / name), '--source-test', args.source_test, '--target', *args.targets]
            tasks.append(Task(name, (train, measure), folder / name / 'tradeoff.json', folder / f'{name}.log'))
    return tasks


def measured_runs(folder: Path) -> list[tuple[str, int, Path]]:
    """Method, seed and folder of all measured runs, those of earlier calls too, in the order of `METHODS`."""
    runs = []
    for file in folder.glob('*/tradeoff.json'):
        method, _, seed = file.parent.name.rpartition('-')
        if method in METHODS and seed.isdecimal():
            runs.append((method, int(seed), file.parent))
    return sorted(runs, key=lambda run: (list(METHODS).index(run[0]), run[1]))


def collect(args: argparse.Namespace, folder: Path, recipe: dict[str, Any]) -> dict[str, Any]:
    """What is stored: settings and the numbers of all measured runs, without the name of any folder."""
    rows = []
    for method, seed, run in measured_runs(folder):
        cost = {'processor_seconds': cpu_seconds(folder / f'{run.name}.log')}
        rows.append({'method': method, 'seed': seed, **cost, **json.loads((run / 'tradeoff.json').read_text())})
    return {
        'recipe': f'{folder.name}.yaml',
        'source': Path(args.source).name,
        'targets': [Path(target).name for target in args.targets],
        'epochs': recipe['epochs'],
        'temporal_start_epoch': recipe['temporal-start-epoch'],
        'settings': recipe,
        'methods': {row['method']: ' '.join(METHODS[row['method']]) for row in rows},
        'runs': rows,
    }


def redraw(docs: Path) -> None:
    """Write the pictures, and the tables in docs/results.md and in the README beside docs."""
    for name, results in tradeoff_report.stored(docs).items():
        tradeoff_pictures.draw(results, docs / f'{name}.png')
    blocks = tradeoff_report.blocks(docs)
    for file in (docs / 'results.md', docs.parent / 'README.md'):
        if file.is_file():
            file.write_text(tradeoff_report.fill(file.read_text(encoding='utf-8'), blocks), encoding='utf-8')


def main() -> None:
    args = read_args()
    if not args.redraw:
        recipe = read_recipe(args.recipe)
        name = Path(args.recipe).stem
        folder, stored = Path(args.output).resolve() / name, args.docs / 'results' / f'{name}.json'
        for _ in work(plan(args, folder, recipe['epochs']), args.jobs):
            write_json(stored, collect(args, folder, recipe))
    redraw(args.docs)


if __name__ == '__main__':
    main_of(main)
