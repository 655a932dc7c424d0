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
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tradeoff_report
from tqdm import tqdm

from ctc_timm.arguments import Parser, parse, positive_int, run_script
from ctc_timm.errors import RunError, Stopped, UserError, nearest
from ctc_timm.measure.results import write_json
from ctc_timm.plain_yaml import read_mapping

ROOT = Path(__file__).resolve().parents[1]
# What a method says beside the recipe, in which stand the weights and temperatures of the discriminability recipe.
METHODS: dict[str, list[str]] = {
    'vanilla': ['--mode', 'vanilla'],
    'ctc-discriminability': [],
    'ctc-transferability': [
        *('--instance-weight', '0.5', '--instance-temperature', '0.1', '--temporal-temperature', '0.1')
    ],
    # for few images, chosen on validation rows of the source and training images of CIFAR-10
    'ctc-tuned': ['--instance-temperature', '0.1', '--temporal-weight', '0.1'],
    'ctc-no-temporal': ['--temporal-start-epoch', '{epochs}'],
    'ctc-no-instance': ['--instance-weight', '0'],
    'label-smoothing': ['--mode', 'vanilla', '--smoothing', '0.1'],
}
SEVERAL = (
    'vanilla',
    'ctc-discriminability',
    'ctc-transferability',
    'ctc-tuned',
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


@dataclass
class Job:
    """A process at work on a run."""

    run: Run
    process: subprocess.Popen
    training: bool
    log: Path

    def ended(self, options: int = 0) -> bool:
        """Whether it has ended; the processor seconds of training are noted beside the run."""
        pid, status, usage = os.wait4(self.process.pid, options)
        if not pid:
            return False
        self.process.returncode = os.waitstatus_to_exitcode(status)
        if self.training:
            with self.run.seconds.open('a') as stream:
                stream.write(f'{usage.ru_utime + usage.ru_stime:.1f}\n')
        return True


def work(runs: list[Run], args: argparse.Namespace, epochs: int) -> Iterator[Run]:
    """Train and measure all runs, some at a time.

    Yields:
        Each run when its numbers are there.

    Raises:
        RunError: A process failed; the others are stopped, and go on with the next call.
    """
    waiting, jobs = deque(run for run in runs if not run.measured.is_file()), list[Job]()
    yield from (run for run in runs if run.measured.is_file())
    try:
        while waiting or jobs:
            while waiting and len(jobs) < args.jobs:
                jobs.append(_start(run := waiting.popleft(), run.train(args, epochs), training=True))
            time.sleep(1)
            for job in [job for job in jobs if job.ended(os.WNOHANG)]:
                jobs.remove(job)
                if job.process.returncode:
                    raise RunError(f'{job.run.folder.name} ended with {job.process.returncode}; see {job.log}')
                if job.training:
                    jobs.append(_start(job.run, job.run.measure(args), training=False))
                else:
                    yield job.run
    finally:
        for job in jobs:
            job.process.terminate()  # a training run keeps its state first
        for job in jobs:
            job.ended()


def _start(run: Run, command: list[str], training: bool) -> Job:
    run.folder.parent.mkdir(parents=True, exist_ok=True)
    log = run.folder.with_name(f'{run.folder.name}.log')
    alone = {'OMP_NUM_THREADS': os.environ.get('OMP_NUM_THREADS', '1')}
    with log.open('a') as stream:
        process = subprocess.Popen(
            [sys.executable, *command], stdout=stream, stderr=stream, env={**os.environ, **alone}
        )
    return Job(run, process, training, log)


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
        seconds = sum(map(float, run.seconds.read_text().split())) if run.seconds.is_file() else None
        numbers = json.loads(run.measured.read_text())
        rows.append({'method': run.method, 'seed': run.seed, 'processor_seconds': seconds, **numbers})
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


def _stopped(*_: Any) -> None:
    raise Stopped('stopped by SIGTERM; the same command goes on')


def main() -> None:
    parser = Parser(description=__doc__.split('\n')[0])
    add_arguments(parser)
    args = parse(parser)
    if args.redraw:
        tradeoff_report.redraw(Path(args.docs))
        return
    signal.signal(signal.SIGTERM, _stopped)
    if not args.source:
        parser.error('--source: name the data set to train on, hfds/REPO_OR_FOLDER of CIFAR-100')
    recipe = read_mapping(Path(args.recipe))
    runs = plan(args)
    stored = Path(args.docs) / 'results' / f'{Path(args.recipe).stem}.json'
    with tqdm(total=len(runs), desc='runs', dynamic_ncols=True) as bar:
        for run in work(runs, args, recipe['epochs']):
            bar.set_postfix_str(run.folder.name)
            bar.update()
            write_json(stored, collect(args, recipe))
    write_json(stored, collect(args, recipe))
    tradeoff_report.redraw(Path(args.docs))


if __name__ == '__main__':
    run_script(main)
