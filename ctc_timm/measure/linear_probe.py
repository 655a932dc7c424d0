"""What a model's frozen features are worth on other data sets."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.logging import get_logger
from tqdm import tqdm

from ..data.transforms import data_config
from ..models.backbones import architecture
from ..models.loading import LoadedModel, load_model, named_source
from ..utils.distributed import create_accelerator
from ..utils.progress import outer_bar
from ..utils.weights_files import HASH, tensors_hash
from .features import features_of
from .few_shot import few_shot
from .plots.accuracy import plot_probes
from .probes import probe
from .results import table, write_csv, write_json
from .settings import LinearProbeSettings
from .transfer_sets import TransferSet, target_names

logger = get_logger(__name__)


def linear_probe(settings: LinearProbeSettings) -> list[dict[str, Any]]:
    """Measure probes of a model's features on all targets, write results.json, results.csv and probes.png, and log.

    Returns the main process's rows: target, split, num_test, num_train or shots and seeds, method, top1, top1_low, ...
    A UserError: a model or a target that can't be opened or measured. Finished rows stay.
    """
    accelerator, data = create_accelerator(settings.precision), settings.data
    loaded = load_model(
        **named_source(settings.source), head=False, in_chans=data.in_chans, **settings.built.model_kwargs
    )
    config = data_config(data, loaded.model)
    channels, most = config['input_size'][0], (settings.target.max_train, settings.target.max_test)
    names = target_names(settings.target, data)
    targets = [TransferSet(name, data, settings.loader, channels, accelerator, most) for name in names]
    total = len(targets) * len(settings.probe.probes) * (1 + bool(settings.probe.shots))
    with outer_bar(total, 'probes', accelerator) as bar:
        found = [_probe_target(loaded, target, config, settings, accelerator, bar) for target in targets]
    accelerator.wait_for_everyone()
    return [row for rows in found for row in rows]


def _probe_target(
    loaded: LoadedModel,
    target: TransferSet,
    config: dict[str, Any],
    settings: LinearProbeSettings,
    accelerator: Accelerator,
    bar: tqdm,
) -> list[dict[str, Any]]:
    """Measure all probes on a target; the files are written anew after each, so that what is finished stays."""
    chosen, home = settings.probe, loaded.run or Path('results') / loaded.name
    folder = Path(chosen.output or home / 'linear_probe') / target.slug
    cache = None if chosen.no_cache else home / 'features'
    train, test = (features_of(loaded, images, accelerator, cache) for images in target.images(config))
    if not accelerator.is_main_process:
        return []
    results: dict[str, Any] = {
        'model': architecture(loaded.model),
        'weights': loaded.weights,
        HASH: tensors_hash(loaded.model.state_dict()),
        'parameters': sum(p.numel() for p in loaded.model.parameters()),
        'feature_dim': train.features_ND.shape[1],
        'target': target.name,
        'input_size': list(config['input_size']),
        'num_classes': target.num_classes,
        'rows': [],
    }

    def rows() -> Iterator[dict[str, Any]]:
        sets, device = (train, test, target.num_classes), accelerator.device
        for method in chosen.probes:
            for row in probe(method, *sets, chosen.seed, device):
                yield {'num_train': len(train), **row}
            bar.update()
        for method in chosen.probes if chosen.shots else ():
            yield from few_shot(method, *sets, chosen.shots, range(chosen.seed, chosen.seed + chosen.seeds), device)
            bar.update()

    target.check(train, test)
    about = {'target': target.name, 'split': settings.data.val_split, 'num_test': len(test)}
    for row in rows():
        results['rows'].append(about | row)
        write_json(folder / 'results.json', results)
        write_csv(folder / 'results.csv', results['rows'])
    plot_probes(results, folder)
    logger.info(f'{table_of(results)}\nwritten to {folder / "results.json"}, results.csv, probes.png')
    return results['rows']


def table_of(results: dict[str, Any]) -> str:
    """Format what a target's results.json holds for a terminal."""
    few, first = any('shots' in row for row in results['rows']), results['rows'][0]
    headings = {'method': 'probe'} | ({'shots': 'shots'} if few else {}) | {'top1': 'top-1 %', 'top1_low': 'from'}
    headings |= {'top1_high': 'to', 'top5': 'top-5 %', 'mean_per_class': 'per class %'}
    return (
        f'\n{results["model"]} ({results["weights"]}) on {results["target"]}, {first["num_train"]:,} training and '
        f'{first["num_test"]:,} test images, {results["feature_dim"]} features, 95% intervals\n'
        f'{table(results["rows"], headings)}'
    )
