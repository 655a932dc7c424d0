"""`transfer/linear_probe.py`: what frozen features are worth on other sets."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from tqdm import tqdm

from ..cli.arguments import KeyValues, Parser, non_negative_int, positive_int
from ..cli.model_flags import add_source_arguments
from ..data.transforms import data_config
from ..models.loading import LoadedModel, load_model, named_source
from ..utils.distributed import add_precision_arguments, create_accelerator
from ..utils.progress import outer_bar
from .features import features_of
from .few_shot import few_shot
from .plots.probes import plot_probes
from .probes import METHODS, probe
from .results import table, write_csv, write_json
from .sets import Labeled
from .transfer_sets import TransferSet, add_target_arguments, open_targets, target_names


def add_arguments(parser: Parser) -> None:
    """Declare the flags of the probes."""
    group = add_source_arguments(parser)
    group.add_argument(
        '--model-kwargs', nargs='*', default={}, action=KeyValues, metavar='KEY=VALUE', help='more for the model'
    )
    add_precision_arguments(group)
    group = parser.add_argument_group('Probes')
    group.add_argument(
        '--probes',
        nargs='+',
        choices=METHODS,
        default=list(METHODS),
        metavar='METHOD',
        help=f'of {", ".join(METHODS)}',
    )
    group.add_argument(
        '--shots', type=positive_int, nargs='+', default=[], metavar='N', help='few-shot: images a class'
    )
    group.add_argument('--seeds', type=positive_int, default=5, metavar='N', help='draws of the few shots')
    group.add_argument('--seed', type=non_negative_int, default=0, metavar='S', help='of everything random')
    group.add_argument('--no-cache', action='store_true', help='keep no features on disk')
    group.add_argument(
        '--output', default='', metavar='DIR', help="where results go; the run's linear_probe/ or results/NAME"
    )
    add_target_arguments(parser)


def linear_probe(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Measure, print, write and draw.

    Returns:
        What each target's results.json holds, by target.

    Raises:
        UserError: A model or a target that cannot be had or measured. Finished rows stay.
    """
    source, architecture, flag = named_source(args)
    accelerator = create_accelerator(args)
    loaded = load_model(source, architecture, flag, in_chans=args.in_chans, **args.model_kwargs)
    config = data_config(args, loaded.model)
    targets = open_targets(target_names(args), args, config['input_size'][0], accelerator)
    folder = Path(args.output) if args.output else (loaded.run or Path('results') / loaded.name) / 'linear_probe'
    found = {}
    with outer_bar(len(targets) * (len(args.probes) * (1 + bool(args.shots))), 'probes', accelerator) as bar:
        for target in targets:
            found[target.name] = _probe_target(loaded, target, config, folder / target.slug, args, accelerator, bar)
    if accelerator.is_main_process:
        for target in targets:
            print(_summary(found[target.name], folder / target.slug))
    accelerator.wait_for_everyone()
    return found


def _probe_target(
    loaded: LoadedModel,
    target: TransferSet,
    config: dict[str, Any],
    folder: Path,
    args: argparse.Namespace,
    accelerator: Accelerator,
    bar: tqdm,
) -> dict[str, Any]:
    """All probes on a target; the files are written anew after each, so that what is finished stays."""
    cache = None if args.no_cache else (loaded.run or Path('results') / loaded.name) / 'features'
    splits = (target.train.images(config), target.test.images(config))
    train, test = (
        Labeled(features.features_ND, features.labels_N)
        for features in (features_of(loaded, images, accelerator, cache) for images in splits)
    )
    results: dict[str, Any] = {
        'model': loaded.model.pretrained_cfg.get('architecture', type(loaded.model).__name__),
        'weights': loaded.weights,
        'parameters': sum(p.numel() for p in loaded.model.parameters()),
        'feature_dim': train.features_ND.shape[1],
        'target': target.name,
        'input_size': list(config['input_size']),
        'num_classes': target.num_classes,
        'rows': [],
    }
    if not accelerator.is_main_process:
        return results
    target.check(train, test)
    about = {'target': target.name, 'split': args.val_split, 'num_test': len(test)}
    for row in _rows(train, test, target, args, accelerator, bar):
        results['rows'].append({**about, **row})
        write_json(folder / 'results.json', results)
        write_csv(folder / 'results.csv', results['rows'])
    plot_probes(results, folder)
    return results


def _rows(
    train: Labeled, test: Labeled, target: TransferSet, args: argparse.Namespace, accelerator: Accelerator, bar: tqdm
) -> Iterator[dict[str, Any]]:
    """A row for each probe, then one for each probe and number of shots."""
    about: dict[str, Any] = {
        'device': accelerator.device,
        'what': f'--target {target.name}',
        'class_names': target.class_names,
    }
    for method in args.probes:
        for result in probe(method, train, test, target.num_classes, seed=args.seed, **about):
            yield {'num_train': len(train), **result.row()}
        bar.update()
    for method in args.probes if args.shots else ():
        seeds = range(args.seed, args.seed + args.seeds)
        for drawn in few_shot(method, train, test, target.num_classes, args.shots, seeds, **about):
            yield drawn.row()
        bar.update()


def _summary(results: dict[str, Any], folder: Path) -> str:
    headings = {
        'method': 'probe',
        'shots': 'shots',
        'top1': 'top-1 %',
        'top1_low': 'from',
        'top1_high': 'to',
        'top5': 'top-5 %',
        'mean_per_class': 'per class %',
    }
    if not any('shots' in row for row in results['rows']):
        del headings['shots']
    first = results['rows'][0]
    return (
        f'\n{results["model"]} ({results["weights"]}) on {results["target"]}, {first["num_train"]:,} training and '
        f'{first["num_test"]:,} test images, {results["feature_dim"]} features, 95% intervals\n'
        f'{table(results["rows"], headings)}\n'
        f'written to {folder / "results.json"}, results.csv, probes.png'
    )
