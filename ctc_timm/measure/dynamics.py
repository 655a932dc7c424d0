"""Every kept epoch of every run, measured on its source and on targets.

One row a kept epoch and set: accuracy on the source, the probes' on a target, and on both the information and the
geometry of the test images' features. Each part of a row is kept in the run's dynamics/rows.jsonl as soon as it is
finished, under a key of all that it depends on, and is not measured again: another probe is computed alone, from the
cached features.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from tqdm import tqdm

from ..data.datasets import open_test
from ..data.transforms import data_config, fit_channels
from ..models.loading import LoadedModel, data_settings, load_model
from ..runs import Run
from ..utils.distributed import create_accelerator
from ..utils.errors import UserError, nearest
from ..utils.progress import outer_bar
from .features import LabeledFeatures, SplitImages, check_finite, features_of
from .geometry import measure_geometry
from .information import create_estimator
from .plots.dynamics import by_trajectory, main_column, plot_dynamics
from .plots.training import stage_change
from .probes import probe
from .results import RowStore, table, write_csv, write_json
from .scores import METRICS, bootstrap_scores
from .settings import DynamicsSettings, MeasureSettings
from .transfer_sets import TransferSet, target_names

VERSION = 1  # of what the parts hold; another one measures everything again
logger = get_logger(__name__)


def dynamics(settings: DynamicsSettings) -> dict[str, Any]:
    """Measure all runs on all sets, write results.json, results.csv and the pictures, log, and return what they hold.

    Raises:
        UserError: A run without kept weights, a target that can't be measured. Finished rows stay.
    """
    measures, accelerator = settings.measures, create_accelerator(settings.precision)
    runs = [KeptRun(path, name, settings, accelerator) for path, name in _short_names(measures.runs).items()]
    channels = runs[0].config['input_size'][0]
    names = target_names(settings.target, settings.data)
    most = (settings.target.max_train, settings.target.max_test)
    targets = [TransferSet(name, settings.data, settings.loader, channels, accelerator, most) for name in names]
    total = sum(len(run.weights) for run in runs) * (1 + len(targets))
    with outer_bar(total, 'dynamics', accelerator) as bar:
        rows = [row for run in runs for row in run.measure(targets, bar)]
    results = {
        'runs': [{'name': run.name, 'path': str(run), 'stage_change': run.change} for run in runs],
        'targets': [target.name for target in targets],
        'probes': list(measures.probes),
        'information': measures.information,
        'rows': rows,
    }
    if accelerator.is_main_process:
        output = Path(measures.output or (runs[0].dynamics if len(runs) == 1 else 'results/dynamics'))
        write_json(output / 'results.json', results)
        write_csv(output / 'results.csv', rows)
        pictures = ', '.join(str(picture) for picture in plot_dynamics(results, output))
        logger.info(f'{table_of(results)}\nwritten to {output / "results.json"}, results.csv, {pictures}')
    accelerator.wait_for_everyone()
    return results


def table_of(results: dict[str, Any]) -> str:
    """Format the last epoch of each run beside its best for a terminal."""
    lines = []
    for (run, kind, dataset), rows in by_trajectory(results['rows']).items():
        column = main_column(kind, results['probes'])
        best, last = max(rows, key=lambda row: row[column]), rows[-1]
        lines.append(
            {'run': run, 'set': f'{kind} {dataset}', 'measure': column, 'best %': best[column], 'epoch': best['epoch']}
            | {'last %': last[column], 'from': last.get(f'{column}_low'), 'to': last.get(f'{column}_high')}
            | {'effective rank': last.get('effective_rank'), 'within/between': last.get('spread')}
        )
    return table(lines, {heading: heading for heading in lines[0]})


def _short_names(paths: tuple[str, ...]) -> dict[Path, str]:
    """Name each run by its folder, or by as many parts of its path as distinguish it from the others."""
    folders, depth = {Path(path): Path(path).resolve().parts for path in paths}, 1
    while len({parts[-depth:] for parts in folders.values()}) < len(set(folders.values())):
        depth += 1
    return {folder: '/'.join(parts[-depth:]) for folder, parts in folders.items()}


class KeptRun(Run):
    """A run with its kept epochs, `weights`, and the images that it was validated on, `source`.

    Its models have the image transform `config`. Its temporal stage starts at `change`, between two epochs, or never,
    None. A folder that is not there, or without kept epochs, is a UserError.
    """

    def __init__(self, path: Path, name: str, settings: DynamicsSettings, accelerator: Accelerator) -> None:
        super().__init__(path)
        self._measures, self._accelerator = settings.measures, accelerator
        if not path.is_dir():
            siblings = [folder.name for folder in path.parent.iterdir()] if path.parent.is_dir() else []
            raise UserError(f'`runs` {path}: no such folder{nearest(path.name, siblings)}')
        kept = self.kept_weights()
        if not kept:
            raise UserError(f'`runs` {path}: no kept epochs in {self.weights_folder}; train with `keep_every` above 0')
        last, flags = max(kept), data_settings(self)
        self.name, self.change, self._mode = name, stage_change(self), str(self.args().get('mode', ''))
        self.weights = dict(list(kept.items())[:: settings.measures.every]) | {last: kept[last]}
        loader = replace(settings.loader, workers=flags.pop('workers', settings.loader.workers))
        data = replace(settings.data, **flags)
        model = load_model(kept[last], setting='runs').model
        with accelerator.main_process_first():
            names = {} if data.class_map else self.class_names()
            source = open_test(fit_channels(data, model), names)
        self.config = data_config(settings.data, model)
        self.source = SplitImages(source, loader, self.config, accelerator)

    def measure(self, targets: list[TransferSet], bar: tqdm) -> Iterator[dict[str, Any]]:
        """Measure all rows, in the order of the epochs."""
        store = RowStore(self.dynamics / 'rows.jsonl', write=self._accelerator.is_main_process)
        images = [target.images(self.config) for target in targets]
        for epoch, file in self.weights.items():
            stage = self._mode if self.change is None else 'instance' if epoch < self.change else 'temporal'
            checkpoint = Checkpoint(self, file, self._measures, self._accelerator)
            parts = [('source', self.source.source.name, partial(checkpoint.measure, store, self.source))]
            for target, (train, test) in zip(targets, images):
                parts.append(('target', target.name, partial(checkpoint.measure, store, test, target, train)))
            for kind, dataset, measure in parts:
                where = {'run': self.name, 'epoch': epoch, 'stage': stage, 'set': kind, 'dataset': dataset}
                yield {**where, 'weights': str(file), **measure()}
                bar.update()


class Checkpoint:
    """The weights of one kept epoch of a run, loaded when something has to be computed from them."""

    def __init__(self, run: Run, file: Path, measures: MeasureSettings, accelerator: Accelerator) -> None:
        self.file, self._measures, self._accelerator = file, measures, accelerator
        self._cache = None if measures.no_cache else run.features

    @cached_property
    def hash(self) -> str:
        """sha256 of the weights file."""
        return hashlib.sha256(self.file.read_bytes()).hexdigest()

    @cached_property
    def loaded(self) -> LoadedModel:
        """The model."""
        return load_model(self.file, setting='runs')

    def features(self, images: SplitImages, logits: bool = False) -> LabeledFeatures:
        """Return the features of a split, from the cache if they are there."""
        features = features_of(self.loaded, images, self._accelerator, self._cache, logits)
        check_finite(features.features_ND, f'{self.file}: the features of {images.source.name}')
        return features

    def measure(
        self, store: RowStore, test: SplitImages, target: TransferSet | None = None, train: SplitImages | None = None
    ) -> dict[str, Any]:
        """Return accuracy, geometry and information as one flat row; parts that the store lacks are measured.

        On test images of a target, with its training images to fit probes on, or else of the source, where accuracy is
        that of the model's classifier.
        """
        measures, seed = self._measures, self._measures.seed
        features = cache(partial(self.features, test, logits=target is None))

        def accuracy() -> dict[str, Any]:
            found = features()
            assert found.logits_NC is not None
            return {'num_test': len(found), **bootstrap_scores(found.logits_NC, found.labels_N, seed)}

        # Of each part what it depends on beside weights and test images, and how it is measured.
        parts: dict[str, tuple[dict[str, Any], Callable[[], dict[str, Any]]]] = {'accuracy': ({}, accuracy)}
        if target is not None and train is not None:
            probing = partial(self._probe, target, train, features)
            values: dict[str, Any] = {'train': train.identity, 'seed': seed}
            parts = {method: (values, partial(probing, method)) for method in measures.probes}
        parts['geometry'] = {}, lambda: measure_geometry(features().features_ND, features().labels_N)
        if measures.information != 'none':
            values = {'estimator': measures.information, 'images': measures.information_images, 'seed': seed}
            parts['information'] = values, lambda: self._information(test, features())
        common = {'version': VERSION, 'weights': self.hash, 'test': test.identity}
        common['precision'] = self._accelerator.mixed_precision
        row: dict[str, Any] = {}
        for part, (values, measure) in parts.items():
            keyed = test.identity is not None and values.get('train', True) is not None
            row |= store.get({**common, 'part': part, **values}, measure) if keyed else measure()
        return row

    def _probe(
        self, target: TransferSet, images: SplitImages, features: Callable[[], LabeledFeatures], method: str
    ) -> dict[str, Any]:
        train, test = self.features(images), features()
        row: dict[str, Any] = {'num_train': len(train), 'num_test': len(test)}
        for scores in probe(method, train, test, target.num_classes, self._measures.seed, self._accelerator.device):
            row |= {f'{scores["method"]}_{name}': value for name, value in scores.items() if name.startswith(METRICS)}
        return row

    def _information(self, images: SplitImages, test: LabeledFeatures) -> dict[str, Any]:
        """Estimate I(X;T) and I(T;Y) of a seeded draw of the test images."""
        measures, row = self._measures, dict[str, Any]()
        draw = torch.Generator().manual_seed(measures.seed)
        chosen = torch.randperm(len(test), generator=draw)[: measures.information_images]
        pixels, features = images.pixels()[chosen], test.features_ND[chosen]
        options: dict[str, Any] = {'seed': measures.seed, 'device': self._accelerator.device}
        for pair, x, t in (('xt', pixels, features), ('ty', features, test.labels_N[chosen])):
            estimate = create_estimator(measures.information, of_labels=pair == 'ty', **options).estimate(x, t)
            row |= {f'information_{pair}': estimate.nats, f'information_{pair}_se': estimate.standard_error}
        return row
