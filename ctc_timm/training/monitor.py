"""Cheap measurements of transfer while training: a ridge probe and two signs of over-compression.

A few images of a target are decoded once and kept. Every few epochs they pass through the model, a ridge probe is
fitted to the features of one part and scored on the other, and the other's effective rank and within/between spread
are taken. They show while there is time to act that source accuracy rises and transfer falls; `linear_probe` gives
the exact accuracies.
"""

from __future__ import annotations

import dataclasses
import math
import time
from typing import Any

from accelerate import Accelerator
from timm.utils import unwrap_model
from torch import nn

from ..data.settings import DataSettings
from ..measure.features import compute_features
from ..measure.geometry import class_spread, effective_rank
from ..measure.probes import ridge_scores
from ..measure.transfer_sets import TransferSet
from ..utils.tasks import Evaluator
from .settings import TrainSettings

COST = 0.02  # of the training time, which the default interval does not exceed
COLUMNS = ('monitor_ridge_top1', 'monitor_effective_rank', 'monitor_spread')  # percent, dimensions, a ratio


class Monitor:
    """Watches one target, seen through the model's image transform, `config`; `TransferSet` says what it refuses."""

    columns: tuple[str, ...] = COLUMNS
    seconds = 0.0  # spent on measuring so far, without opening the data

    def __init__(
        self, settings: TrainSettings, config: dict[str, Any], accelerator: Accelerator, num_instances: int
    ) -> None:
        self.target = watched_set(settings, settings.monitor.monitor_target, 'monitor_target', config, accelerator)
        self._splits, self._accelerator = self.target.images(config), accelerator
        self._every = measure_every(settings, 1, num_instances)

    def due(self, epoch: int, last: bool) -> bool:
        """Whether to measure after this epoch."""
        return last or (epoch + 1) % self._every == 0

    def measure(self, model: nn.Module) -> dict[str, float]:
        """Measure the model's features of the target, which must be finite. It is left in evaluation mode."""
        started, plain = time.monotonic(), unwrap_model(model)  # of a moving average, too
        train, test = (compute_features(plain, images, self._accelerator) for images in self._splits)
        self.target.check(train, test)
        top1 = ridge_scores(train, test, self.target.num_classes)['top1']
        values = top1, effective_rank(test.features_ND), class_spread(test.features_ND, test.labels_N).spread
        self.seconds += time.monotonic() - started
        return dict(zip(COLUMNS, values))

    def begin(self, model: nn.Module, evaluate: Evaluator) -> None:
        """Nothing: only epochs are watched."""

    def conclude(self) -> str:
        """Nothing: the picture says it."""
        return ''


def watched_set(
    settings: TrainSettings, name: str, setting: str, config: dict[str, Any], accelerator: Accelerator
) -> TransferSet:
    """Open a set to watch transfer to, of which few images are drawn; `setting` names it in messages."""
    default, count = DataSettings(), settings.monitor.monitor_images
    names = ('train_split', 'val_split', 'class_map', 'input_key', 'target_key')  # the run's are of its own data
    data = dataclasses.replace(settings.data, **{name: getattr(default, name) for name in names})
    fitted = max(1, round(count * 2 / 3))  # the probe is; the rest is measured
    most = (fitted, max(1, count - fitted))
    return TransferSet(name, data, settings.loader, config['input_size'][0], accelerator, most, setting)


def measure_every(settings: TrainSettings, sets: int, num_instances: int) -> int:
    """Choose how many epochs lie between two measurements of so many sets."""
    # A training image's forward and backward are taken as three forward passes.
    images, epochs = sets * settings.monitor.monitor_images, settings.schedule.epochs
    cheap = math.ceil(images / (3 * COST * num_instances)) if num_instances else 1
    return settings.monitor.monitor_every or min(max(round(epochs / 20), cheap, 1), epochs)
