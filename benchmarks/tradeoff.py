#!/usr/bin/env python3
"""The comparison that docs/results.md shows: supervised training, CTC, parts of CTC, and what one would try first.

Every method is trained with every seed and for as many epochs, and each kept epoch is measured: on validation rows of
the source, on which the best epoch is chosen, and on the targets; the last and the best epoch on the source's test
split too, by more probes. Runs are processes of their own: stop this script at any time, and the same command
continues where everything was.

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

from ctc_timm.data.datasets import open_split
from ctc_timm.measure.dynamics import Checkpoint, KeptRun
from ctc_timm.measure.features import SplitImages
from ctc_timm.measure.few_shot import few_shot
from ctc_timm.measure.probes import METHODS as PROBES
from ctc_timm.measure.results import RowStore, write_json
from ctc_timm.measure.settings import DynamicsSettings
from ctc_timm.measure.transfer_sets import TransferSet
from ctc_timm.models.loading import data_settings
from ctc_timm.utils.distributed import create_accelerator
from ctc_timm.utils.settings import build, replace
from ctc_timm.utils.yaml_files import read_recipe
from harness import Task, cpu_seconds, read_flags, work
from tradeoff_report import redraw

ROOT = Path(__file__).resolve().parents[1]
STEPS = '--sched multistep --decay-milestones 16 31'  # counted within a stage, as every schedule is
# Flags of a method beside the recipe, which holds the weights and temperatures of the discriminability recipe.
METHODS = {
    'vanilla': '--mode vanilla',
    'ctc-discriminability': '',
    'ctc-transferability': '--instance-weight 0.5 --instance-temperature 0.1 --temporal-temperature 0.1',
    # where supervised training over-compresses: the past is taken before the learning rate falls, and weighs more;
    # chosen on validation rows of the source and training images of CIFAR-10
    'ctc-early-past': f'--temporal-weight 5 {STEPS}',
    'ctc-early-past-no-instance': f'--temporal-weight 5 --instance-weight 0 {STEPS}',
    # the same with the projector that fine-tuning has
    'ctc-early-past-centered': f'--temporal-weight 5 --temporal-projector centered {STEPS}',
    'ctc-no-temporal': '--temporal-start-epoch {epochs}',
    'ctc-no-instance': '--instance-weight 0',
    # supervised training with the learning rate of ctc-early-past
    'vanilla-steps': f'--mode vanilla {STEPS}',
    # as much weight decay as CTC has in its first stage
    'weight-decay': '--mode vanilla --weight-decay 1e-3',
    'label-smoothing': '--mode vanilla --smoothing 0.1',
}
SHOTS, DRAWS = 10, 5
FEATURES = ('information_xt', 'information_ty', 'effective_rank')


def plan(args: argparse.Namespace, folder: Path, epochs: int) -> list[Task]:
    """All runs, seed by seed, so that what is finished can be compared."""
    tasks = []
    for seed in range(args.seeds):
        for method in args.methods:
            name = f'{method}-{seed}'
            data = ['-c', args.recipe, '--dataset', args.source, '--seed', str(seed)]
            place = ['--output', str(folder), '--experiment', name, '--resume', 'auto']
            train = ['-m', 'ctc_timm', 'train', *data, *METHODS[method].format(epochs=epochs).split(), *place]
            measure = [__file__, '--measure', str(folder / name), '--targets', *args.targets]
            tasks.append(Task(name, (train, measure), folder / name / 'tradeoff.json', folder / f'{name}.log'))
    return tasks


def measure(path: Path, targets: list[str]) -> dict[str, Any]:
    """Measure a run: `trajectory`, one entry a kept epoch, and `ends`, `last` and `best` on the validation rows."""
    settings = build(DynamicsSettings, {'runs': [path], 'workers': 0})  # a core has a run of its own
    accelerator = create_accelerator(settings.precision)
    run = KeptRun(path, path.name, settings, accelerator)
    store, data, loader = RowStore(run.dynamics / 'rows.jsonl'), settings.data, settings.loader
    sets = [TransferSet(name, data, loader, run.config['input_size'][0], accelerator) for name in targets]
    images = [target.images(run.config) for target in sets]
    source_test = open_split(replace(data, **data_settings(run)), 'test')
    source_images = SplitImages(source_test, loader, run.config, accelerator)

    def entry(epoch: int, full: bool) -> dict[str, Any]:
        probes, information = (PROBES, 'renyi') if full else (('ridge',), 'none')
        measures = replace(settings.measures, probes=probes, information=information)
        checkpoint = Checkpoint(run, run.weights[epoch], measures, accelerator)
        names = FEATURES if full else FEATURES[-1:]
        source, transfer = checkpoint.measure(store, source_images if full else run.source), {}
        for target, (train, test) in zip(sets, images):
            measured = checkpoint.measure(store, test, target, train)
            found = {key.removesuffix('_top1'): value for key, value in measured.items() if key.endswith('_top1')}
            if full:
                splits = (checkpoint.features(train), checkpoint.features(test))
                (shots,) = few_shot('ridge', *splits, target.num_classes, [SHOTS], range(DRAWS))
                found[f'ridge-{SHOTS}-shot'] = shots['top1']
            transfer[target.slug] = found | {name: measured[name] for name in names}
        found = {'top1': source['top1'], **{name: source[name] for name in names}}
        return {'epoch': epoch, 'source': found, 'targets': transfer}

    trajectory = [entry(epoch, full=False) for epoch in run.weights]
    best = max(trajectory, key=lambda row: row['source']['top1'])['epoch']
    ends = {'last': entry(max(run.weights), full=True), 'best': entry(best, full=True)}
    return {'stage_change': run.change, 'trajectory': trajectory, 'ends': ends}


def measured_runs(folder: Path) -> list[tuple[str, int, Path]]:
    """Method, seed and folder of all measured runs, those of earlier calls too, in the order of `METHODS`."""
    found = [(*file.parent.name.rsplit('-', 1), file.parent) for file in folder.glob('*/tradeoff.json')]
    runs = [(method, int(seed), run) for method, seed, run in found]
    return sorted(runs, key=lambda run: (list(METHODS).index(run[0]), run[1]))


def collect(args: argparse.Namespace, folder: Path, recipe: dict[str, Any]) -> dict[str, Any]:
    """What is stored: settings and the numbers of all measured runs, without the name of any folder."""
    rows = []
    for method, seed, run in measured_runs(folder):
        cost = cpu_seconds(folder / f'{run.name}.log')
        numbers = json.loads((run / 'tradeoff.json').read_text())
        rows.append({'method': method, 'seed': seed, 'processor_seconds': cost, **numbers})
    return {
        'recipe': f'{folder.name}.yaml',
        'source': Path(args.source).name,
        'targets': [Path(target).name for target in args.targets],
        'epochs': recipe['epochs'],
        'temporal_start_epoch': recipe['temporal-start-epoch'],
        'settings': recipe,
        'methods': {row['method']: METHODS[row['method']] for row in rows},
        'runs': rows,
    }


if __name__ == '__main__':
    args = read_flags(
        __doc__, source='hfds/CIFAR100', targets=['digits'], recipe='tradeoff_small', methods=list(METHODS), seeds=3,
        jobs=os.cpu_count() or 1, output=Path('runs/tradeoff'), docs=ROOT / 'docs', measure='', redraw=False,
    )  # fmt: skip
    if args.measure:
        write_json(Path(args.measure) / 'tradeoff.json', measure(Path(args.measure), args.targets))
    elif not args.redraw:
        recipe, folder = read_recipe(args.recipe), args.output.resolve() / Path(args.recipe).stem
        for _ in work(plan(args, folder, recipe['epochs']), args.jobs):
            write_json(args.docs / 'results' / f'{folder.name}.json', collect(args, folder, recipe))
    if not args.measure:
        redraw(args.docs)
