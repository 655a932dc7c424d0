"""One point of a trajectory: one epoch's weights, measured on one set, part by part.

Each part is kept under a key of everything it depends on, so that none is computed twice: adding a probe to an
earlier measurement computes that probe alone, from the cached features.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator

from ..models.loading import LoadedModel, load_model
from .features import Features, SplitImages, features_of
from .geometry import measure_geometry
from .information import create_estimator
from .probes import probe, score_columns
from .results import RowStore
from .scores import bootstrap_scores
from .sets import Labeled, check_finite
from .transfer_sets import TransferSet

if TYPE_CHECKING:
    from ..dense.frozen import FrozenDetection

PUBLISHED = 'mine-published'  # MINE with the paper's settings, which differ for the two quantities
VERSION = 1  # of what the parts hold; another one measures everything again


class Weights:
    """A weights file of a run, loaded when something has to be computed from it.

    Args:
        file: The weights.
        run: The run's folder.
    """

    def __init__(self, file: Path, run: Path) -> None:
        self.file = file
        self.run = run

    @cached_property
    def hash(self) -> str:
        """sha256 of the file."""
        return hashlib.sha256(self.file.read_bytes()).hexdigest()

    @cached_property
    def loaded(self) -> LoadedModel:
        """The model."""
        return load_model(str(self.file), setting='runs')


class CheckpointEvaluation:
    """One set seen by one epoch's weights.

    Args:
        weights: The epoch's.
        images: The set's test images.
        target: What they belong to; None for the source, whose accuracy is the model's own.
        config: The model's image transform.
        args: Of `dynamics.add_arguments`.
        accelerator: Device, precision and processes.
    """

    def __init__(
        self,
        weights: Weights,
        images: SplitImages,
        target: TransferSet | None,
        config: dict[str, Any],
        args: argparse.Namespace,
        accelerator: Accelerator,
    ) -> None:
        self.weights = weights
        self.images = images
        self.target = target
        self.config = config
        self.args = args
        self.accelerator = accelerator

    def parts(self) -> dict[str, dict[str, Any]]:
        """The parts to measure, with what each depends on beside weights and test images."""
        args = self.args
        if self.target is None:
            parts: dict[str, dict[str, Any]] = {'accuracy': {}}
        else:
            train = self.target.train.images(self.config).facts
            parts = {method: {'train': train, 'seed': args.seed} for method in args.probes}
        parts['geometry'] = {}
        if args.information != 'none':
            parts['information'] = {
                'estimator': args.information,
                'images': args.information_images,
                'seed': args.seed,
            }
        return parts

    def row(self, store: RowStore) -> dict[str, Any]:
        """All parts as one flat row; missing ones are measured and kept."""
        row: dict[str, Any] = {'weights': str(self.weights.file)}
        common = {
            'version': VERSION,
            'weights': self.weights.hash,
            'test': self.images.facts,
            'precision': self.accelerator.mixed_precision,
        }
        for part, facts in self.parts().items():
            text = json.dumps({**common, 'part': part, **facts}, sort_keys=True, default=str)
            key = hashlib.sha256(text.encode()).hexdigest()
            if key not in store.rows:
                store.add(key, self._measure(part), write=self.accelerator.is_main_process)
            row.update(store.rows[key])
        return row

    def _measure(self, part: str) -> dict[str, Any]:
        if part == 'accuracy':
            assert self._test.logits_NC is not None
            scores = bootstrap_scores(self._test.logits_NC, self._test.labels_N, self.args.seed)
            return {'num_test': len(self._test.labels_N), **score_columns(scores)}
        if part == 'geometry':
            return dict(measure_geometry(self._test.features_ND, self._test.labels_N))
        if part == 'information':
            return self._information()
        return self._probe(part)

    def _features(self, images: SplitImages, logits: bool) -> Features:
        loaded = self.weights.loaded
        cache = None if self.args.no_cache else self.weights.run / 'features'
        features = features_of(loaded, images, self.accelerator, cache, logits)
        check_finite(features.features_ND, f'{self.weights.file}: the features of {images.source.name}')
        return features

    @cached_property
    def _test(self) -> Features:
        return self._features(self.images, logits=self.target is None)

    def _probe(self, method: str) -> dict[str, Any]:
        assert self.target is not None
        train = self._features(self.target.train.images(self.config), logits=False)
        fitted, measured = (Labeled(part.features_ND, part.labels_N) for part in (train, self._test))
        what = f'--target {self.target.name}, {self.weights.file}'
        row: dict[str, Any] = {'num_train': len(fitted), 'num_test': len(measured)}
        classes = self.target.num_classes
        for result in probe(
            method, fitted, measured, classes, seed=self.args.seed, device=self.accelerator.device, what=what
        ):
            columns = score_columns(result.scores)
            row.update({f'{result.method}_{name}': value for name, value in columns.items()})
        return row

    def _information(self) -> dict[str, Any]:
        """I(X;T) and I(T;Y) of a seeded draw of the test images."""
        args = self.args
        draw = torch.Generator().manual_seed(args.seed)
        chosen = torch.randperm(len(self._test.labels_N), generator=draw)[: args.information_images]
        pixels, features = self.images.pixels()[chosen], self._test.features_ND[chosen]
        row: dict[str, Any] = {}
        for name, x, t in (('xt', pixels, features), ('ty', features, self._test.labels_N[chosen])):
            options = {'preset': f'published_{name}'} if args.information == PUBLISHED else {}
            known = args.information.removesuffix('-published')
            estimator = create_estimator(known, seed=args.seed, device=self.accelerator.device, **options)
            estimate = estimator.estimate(x, t)
            row[f'information_{name}'] = estimate.nats
            row[f'information_{name}_se'] = estimate.standard_error
        return row


class DetectionEvaluation:
    """One epoch's frozen body under a detector.

    Args:
        weights: The epoch's.
        detection: The folder, and how briefly heads are trained.
        accelerator: Device and precision.
    """

    def __init__(self, weights: Weights, detection: FrozenDetection, accelerator: Accelerator) -> None:
        self.weights = weights
        self.detection = detection
        self.accelerator = accelerator

    def row(self, store: RowStore) -> dict[str, Any]:
        """COCO's metrics of boxes as a flat row; measured and kept where it is missing."""
        precision = self.accelerator.mixed_precision
        facts = {'part': 'detection', 'weights': self.weights.hash, 'precision': precision, **self.detection.facts()}
        key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
        if key not in store.rows:
            loaded = load_model(str(self.weights.file), setting='runs')  # it is cut down
            row = self.detection.measure(loaded, self.accelerator)
            store.add(key, row, write=self.accelerator.is_main_process)
        return {'weights': str(self.weights.file), **store.rows[key]}
