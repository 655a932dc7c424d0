"""`transfer/dynamics.py`: every kept epoch of every run, measured on its source and on targets.

One row a kept epoch and set: accuracy on the source, the probes' on a target, and on both the information and
the geometry of the test images' features; on coco:FOLDER a detector's average precision. What is finished is on
disk at once, in the run's own dynamics/rows.jsonl, and is not measured again.
"""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate import Accelerator
from tqdm import tqdm

from ..cli.arguments import Parser, non_negative_int, positive_int
from ..data.datasets import open_split
from ..data.transforms import data_config
from ..models.loading import data_flags, load_model, run_arguments
from ..utils.distributed import add_precision_arguments, create_accelerator
from ..utils.errors import UserError, nearest
from ..utils.progress import outer_bar
from .information import ESTIMATORS
from .plots.dynamics import by_trajectory, first_column, plot_dynamics
from .plots.training import stage_change
from .points import PUBLISHED, CheckpointEvaluation, DetectionEvaluation, Weights
from .probes import METHODS
from .results import RowStore, table, write_csv, write_json
from .transfer_sets import COCO, OpenSplit, TransferSet, add_target_arguments, coco_folders, open_targets, target_names

if TYPE_CHECKING:
    from ..dense.frozen import FrozenDetection


def add_arguments(parser: Parser) -> None:
    """Declare the flags of the dynamics."""
    parser.add_argument('runs', nargs='+', metavar='RUN', help='folders of runs, with kept epochs in weights/')
    group = parser.add_argument_group('Measures')
    group.add_argument(
        '--probes', nargs='+', choices=METHODS, default=['ridge'], metavar='METHOD', help=f'of {", ".join(METHODS)}'
    )
    group.add_argument(
        '--information',
        choices=(*ESTIMATORS, PUBLISHED, 'none'),
        default='renyi',
        help='estimator of I(X;T) and I(T;Y)',
    )
    group.add_argument(
        '--information-images', type=positive_int, default=2000, metavar='N', help='test images it is given'
    )
    group.add_argument('--seed', type=non_negative_int, default=0, metavar='S', help='of everything random')
    group.add_argument('--every', type=positive_int, default=1, metavar='N', help='take each N-th kept epoch')
    group.add_argument('--no-cache', action='store_true', help='keep no features on disk')
    group.add_argument(
        '--output',
        default='',
        metavar='DIR',
        help="where results go; the run's dynamics/, or results/dynamics for several",
    )
    add_precision_arguments(group)
    group = parser.add_argument_group('Detection, for --target coco:FOLDER')
    group.add_argument(
        '--detection-epochs', type=positive_int, default=3, metavar='N', help='of training heads on each frozen body'
    )
    group.add_argument(
        '--detection-images', type=positive_int, default=500, metavar='N', help='drawn of the training images'
    )
    add_target_arguments(parser)


@dataclass
class KeptRun:
    """A run and its kept epochs.

    Attributes:
        path: Its folder.
        name: Different from that of every other run measured with it.
        epochs: Weights file by epoch.
        change: Where the temporal stage starts, or None.
        source: The split that it was validated on.
        source_name: Its name.
    """

    path: Path
    name: str
    epochs: dict[int, Path]
    change: float | None
    source: OpenSplit
    source_name: str

    def stage(self, epoch: int) -> str:
        """'instance', 'temporal', or the mode of a run of one stage."""
        if self.change is None:
            return str(run_arguments(self.path).get('mode', ''))
        return 'instance' if epoch < self.change else 'temporal'


def dynamics(args: argparse.Namespace) -> dict[str, Any]:
    """Measure, print, write and draw.

    Returns:
        What results.json holds.

    Raises:
        UserError: A run without kept weights, a target that cannot be measured. Finished rows stay.
    """
    accelerator = create_accelerator(args)
    runs = [kept_run(path, name, args, accelerator) for path, name in _named(args.runs).items()]
    first = load_model(str(next(iter(runs[0].epochs.values()))), setting='runs')
    channels = data_config(args, first.model)['input_size'][0]
    names = target_names(args)
    folders = coco_folders(names)
    targets = open_targets([name for name in names if name not in folders], args, channels, accelerator)
    detections = {name: _open_detection(name, args) for name in folders}
    total = sum(len(run.epochs) for run in runs) * (1 + len(targets) + len(detections))
    rows: list[dict[str, Any]] = []
    with outer_bar(total, 'dynamics', accelerator) as bar:
        for run in runs:
            rows += _measure_run(run, targets, detections, args, accelerator, bar)
    results = {
        'runs': [{'name': run.name, 'path': str(run.path), 'stage_change': run.change} for run in runs],
        'targets': [target.name for target in targets],
        'detection': {name: detection.facts() for name, detection in detections.items()},
        'probes': args.probes,
        'information': args.information,
        'rows': rows,
    }
    if accelerator.is_main_process:
        output = Path(args.output or (runs[0].path / 'dynamics' if len(runs) == 1 else 'results/dynamics'))
        write_json(output / 'results.json', results)
        write_csv(output / 'results.csv', rows)
        pictures = plot_dynamics(results, output)
        print(_summary(results, output, pictures))
    accelerator.wait_for_everyone()
    return results


def _named(paths: list[str]) -> dict[Path, str]:
    """A short name for each run: its folder's, or so much of its path as tells it from the others."""
    folders = list(dict.fromkeys(Path(path) for path in paths))
    depth = 1
    while len({folder.resolve().parts[-depth:] for folder in folders}) < len({f.resolve() for f in folders}):
        depth += 1
    return {folder: '/'.join(folder.resolve().parts[-depth:]) for folder in folders}


def kept_run(path: Path, name: str, args: argparse.Namespace, accelerator: Accelerator) -> KeptRun:
    """Find a run's kept epochs and open what it was validated on.

    Args:
        path: The run's folder.
        name: What to call it.
        args: Of `add_arguments`.
        accelerator: Device and processes.

    Raises:
        UserError: No such folder, or no kept epochs in it.
    """
    if not path.is_dir():
        raise UserError(f'RUN {path}: no such folder{nearest(path.name, _siblings(path))}')
    found = {_epoch(file): file for file in sorted((path / 'weights').glob('epoch-*.safetensors'))}
    if not found:
        raise UserError(f'RUN {path}: no kept epochs in {path / "weights"}; train with --keep-every N above 0')
    kept = dict(list(found.items())[:: args.every])
    kept.setdefault(max(found), found[max(found)])
    run_args = run_arguments(path)
    own = argparse.Namespace(**{**vars(args), **data_flags(run_args)})
    with accelerator.main_process_first():
        source = open_split(own, own.val_split, unsplit=False)
    return KeptRun(
        path, name, kept, stage_change(path / 'metrics.jsonl'), OpenSplit(source, own, accelerator), source.name
    )


def _epoch(file: Path) -> int:
    match = re.fullmatch(r'epoch-(\d+)', file.stem)
    if match is None:
        raise UserError(f'{file}: not named as a kept epoch is, epoch-0005.safetensors')
    return int(match[1])


def _siblings(path: Path) -> list[str]:
    return [folder.name for folder in path.parent.iterdir()] if path.parent.is_dir() else []


def _open_detection(name: str, args: argparse.Namespace) -> FrozenDetection:
    from ..dense.frozen import FrozenDetection  # needs a package of its own

    folder = name.removeprefix(COCO)
    return FrozenDetection.open(folder, f'--target {COCO}', args.detection_epochs, args.detection_images, args.seed)


def _measure_run(
    run: KeptRun,
    targets: list[TransferSet],
    detections: dict[str, FrozenDetection],
    args: argparse.Namespace,
    accelerator: Accelerator,
    bar: tqdm,
) -> list[dict[str, Any]]:
    """All rows of a run, in the order of its epochs."""
    store = RowStore(run.path / 'dynamics' / 'rows.jsonl')
    rows = []
    config: dict[str, Any] | None = None
    for epoch, file in run.epochs.items():
        weights = Weights(file, run.path)
        if config is None:  # the same for all epochs of a run
            config = data_config(args, weights.loaded.model)
        for target in (None, *targets):
            split = target.test if target else run.source
            point = CheckpointEvaluation(weights, split.images(config), target, config, args, accelerator)
            stage = run.stage(epoch)
            about = {'set': 'target' if target else 'source', 'dataset': target.name if target else run.source_name}
            rows.append({'run': run.name, 'epoch': epoch, 'stage': stage, **about, **point.row(store)})
            bar.update()
        for name, detection in detections.items():
            own = DetectionEvaluation(weights, detection, accelerator).row(store)
            about = {'set': 'detection', 'dataset': name}
            rows.append({'run': run.name, 'epoch': epoch, 'stage': run.stage(epoch), **about, **own})
            bar.update()
    return rows


def _summary(results: dict[str, Any], output: Path, pictures: list[Path]) -> str:
    """The last epoch of each run beside its best, and where everything is."""
    lines = []
    for (run, kind, dataset), mine in by_trajectory(results['rows']).items():
        column = {'source': 'top1', 'detection': 'box_ap'}.get(kind, first_column(results['probes']))
        best, last = max(mine, key=lambda row: row[column]), mine[-1]
        lines.append(
            {
                'run': run,
                'set': f'{kind} {dataset}',
                'measure': column,
                'best': best[column],
                'epoch': best['epoch'],
                'last': last[column],
                'low': last.get(f'{column}_low'),
                'high': last.get(f'{column}_high'),
                'rank': last.get('effective_rank'),
                'spread': last.get('spread'),
            }
        )
    headings = {
        'run': 'run',
        'set': 'set',
        'measure': 'measure',
        'best': 'best %',
        'epoch': 'epoch',
        'last': 'last %',
        'low': 'from',
        'high': 'to',
        'rank': 'effective rank',
        'spread': 'within/between',
    }
    written = ', '.join(str(picture) for picture in pictures)
    return f'{table(lines, headings)}\nwritten to {output / "results.json"}, results.csv, {written}'
