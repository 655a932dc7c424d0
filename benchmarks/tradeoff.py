#!/usr/bin/env python3
"""The comparison that docs/results.md shows: plain training, CTC, parts of CTC, and what one would try first.

Every method is trained with every seed, by train.py and for as many epochs, and each kept epoch is measured. A run is a
process of its own: stop this script at any time, and the same command goes on where everything was.

    python benchmarks/tradeoff.py --source hfds/CIFAR100 --targets hfds/CIFAR10 digits
    python benchmarks/tradeoff.py --source hfds/CIFAR100 --targets hfds/CIFAR10 digits --methods vanilla --seeds 5
    python benchmarks/tradeoff.py --redraw            # docs/results.md and its pictures from the stored numbers
"""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tradeoff_report
from jobs import Task, processor_seconds, stop_by_sigterm, work
from tqdm import tqdm

from ctc_timm.cli.arguments import Parser, parse, positive_int, run_script
from ctc_timm.measure.results import write_json
from ctc_timm.utils.errors import UserError, nearest
from ctc_timm.utils.yaml_files import read_mapping

ROOT = Path(__file__).resolve().parents[1]
STEPS = ('--sched', 'multistep', '--decay-milestones', '16', '31')  # counted within a stage, as every schedule is
# What a method says beside the recipe, in which stand the weights and temperatures of the discriminability recipe.
METHODS: dict[str, list[str]] = {
    'vanilla': ['--mode', 'vanilla'],
    'ctc-discriminability': [],
    'ctc-transferability': [
        *('--instance-weight', '0.5', '--instance-temperature', '0.1', '--temporal-temperature', '0.1')
    ],
    # where plain training over-compresses: the past is taken before the learning rate falls, and weighs more; chosen on
    # validation rows of the source and training images of CIFAR-10
    'ctc-early-past': ['--temporal-weight', '5', *STEPS],
    'ctc-early-past-no-instance': ['--temporal-weight', '5', '--instance-weight', '0', *STEPS],
    'ctc-no-temporal': ['--temporal-start-epoch', '{epochs}'],
    'ctc-no-instance': ['--instance-weight', '0'],
    # plain training with the learning rate of ctc-early-past
    'vanilla-steps': ['--mode', 'vanilla', *STEPS],
    # as much weight decay as CTC has in its first stage
    'weight-decay': ['--mode', 'vanilla', '--weight-decay', '1e-3'],
    'label-smoothing': ['--mode', 'vanilla', '--smoothing', '0.1'],
}
SEVERAL = (
    'vanilla',
    'ctc-discriminability',
    'ctc-transferability',
    'ctc-early-past',
)  # get every seed; the others the first


@dataclass(frozen=True)
class Run:
    """A method with a seed.

    Attributes:
        method: One of `METHODS`.
        seed: Of everything random.
        folder: Where it goes.
    """

    method: str
    seed: int
    folder: Path

    @property
    def measured(self) -> Path:
        """The file that holds its numbers when it is finished."""
        return self.folder / 'tradeoff.json'

    @property
    def seconds(self) -> Path:
        """Processor seconds of each process that trained it."""
        return self.folder.with_name(f'{self.folder.name}.seconds')

    def train(self, args: argparse.Namespace, epochs: int) -> list[str]:
        """The command that trains it, or what is left of it."""
        flags = [word.replace('{epochs}', str(epochs)) for word in METHODS[self.method]]
        where = ['--output', str(self.folder.parent), '--experiment', self.folder.name, '--resume', 'auto']
        return [
            str(ROOT / 'train.py'),
            '-c',
            args.recipe,
            '--dataset',
            args.source,
            '--seed',
            str(self.seed),
            *flags,
            *where,
        ]

    def measure(self, args: argparse.Namespace) -> list[str]:
        """The command that measures it, or what is left of it."""
        script = Path(__file__).with_name('tradeoff_measure.py')
        return [str(script), str(self.folder), '--source-test', args.source_test, '--target', *args.targets]

    def task(self, args: argparse.Namespace, epochs: int) -> Task:
        """Training and measurement, one after the other."""
        steps = (self.train(args, epochs), self.measure(args))
        log = self.folder.with_name(f'{self.folder.name}.log')
        return Task(self.folder.name, steps, self.measured, log, self.seconds)


def add_arguments(parser: Parser) -> None:
    """Declare the flags."""
    parser.add_argument('--source', default='', metavar='NAME', help='data set to train on, CIFAR-100')
    parser.add_argument('--source-test', default='test', metavar='SPLIT', help='of the source, for the tables')
    parser.add_argument('--targets', nargs='+', default=['digits'], metavar='NAME', help='data sets to transfer to')
    parser.add_argument('--recipe', default=str(ROOT / 'recipes' / 'tradeoff_small.yaml'), metavar='FILE')
    parser.add_argument(
        '--methods', nargs='+', default=list(METHODS), metavar='METHOD', help=f'of {", ".join(METHODS)}'
    )
    parser.add_argument('--seeds', type=positive_int, default=3, metavar='N', help=f'of {", ".join(SEVERAL)}')
    parser.add_argument('--other-seeds', type=positive_int, default=1, metavar='N', help='of the other methods')
    parser.add_argument('--jobs', type=positive_int, default=os.cpu_count() or 1, metavar='N', help='runs at a time')
    parser.add_argument('--output', default='runs/tradeoff', metavar='DIR', help='where the runs go')
    parser.add_argument('--docs', default=str(ROOT / 'docs'), metavar='DIR', help='numbers, pictures and document')
    parser.add_argument('--redraw', action='store_true', help='only the document, from the numbers stored earlier')


def plan(args: argparse.Namespace) -> list[Run]:
    """All runs, in the order they are made: seed by seed, so that what is finished can be compared."""
    for method in args.methods:
        if method not in METHODS:
            raise UserError(f'--methods {method}: no method{nearest(method, METHODS)}; use of {", ".join(METHODS)}')
    return [
        Run(method, seed, _folder(args) / f'{method}-{seed}')
        for seed in range(max(args.seeds, args.other_seeds))
        for method in args.methods
        if seed < (args.seeds if method in SEVERAL else args.other_seeds)
    ]


def _folder(args: argparse.Namespace) -> Path:
    return Path(args.output).resolve() / Path(args.recipe).stem


def finished(args: argparse.Namespace) -> list[Run]:
    """All runs with numbers, those of earlier calls too, in the order of `METHODS`."""
    found = []
    for file in _folder(args).glob('*/tradeoff.json'):
        method, _, seed = file.parent.name.rpartition('-')
        if method in METHODS and seed.isdecimal():
            found.append(Run(method, int(seed), file.parent))
    return sorted(found, key=lambda run: (list(METHODS).index(run.method), run.seed))


def collect(args: argparse.Namespace, recipe: dict[str, Any]) -> dict[str, Any]:
    """What is stored: settings, and the numbers of all finished runs. No name of a folder is in it."""
    rows = []
    for run in finished(args):
        numbers = json.loads(run.measured.read_text())
        cost = {'processor_seconds': processor_seconds(run.seconds)}
        rows.append({'method': run.method, 'seed': run.seed, **cost, **numbers})
    return {
        'recipe': Path(args.recipe).name,
        'source': Path(args.source).name,
        'targets': [Path(target).name for target in args.targets],
        'epochs': recipe['epochs'],
        'temporal_start_epoch': recipe['temporal-start-epoch'],
        'settings': recipe,
        'methods': {row['method']: ' '.join(METHODS[row['method']]) for row in rows},
        'runs': rows,
    }


def main() -> None:
    parser = Parser(description=__doc__.split('\n')[0])
    add_arguments(parser)
    args = parse(parser)
    if args.redraw:
        tradeoff_report.redraw(Path(args.docs))
        return
    stop_by_sigterm()
    if not args.source:
        parser.error('--source: name the data set to train on, hfds/REPO_OR_FOLDER of CIFAR-100')
    recipe = read_mapping(Path(args.recipe))
    runs = plan(args)
    stored = Path(args.docs) / 'results' / f'{Path(args.recipe).stem}.json'
    with tqdm(total=len(runs), desc='runs', dynamic_ncols=True) as bar:
        for task in work([run.task(args, recipe['epochs']) for run in runs], args.jobs):
            bar.set_postfix_str(task.name)
            bar.update()
            write_json(stored, collect(args, recipe))
    write_json(stored, collect(args, recipe))
    tradeoff_report.redraw(Path(args.docs))


if __name__ == '__main__':
    run_script(main)
