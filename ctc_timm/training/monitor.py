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
from ..runs import Run
from ..utils.errors import UserError
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
        monitor, default = settings.monitor, DataSettings()
        names = ('train_split', 'val_split', 'class_map', 'input_key', 'target_key')  # the run's are of its own data
        data = dataclasses.replace(settings.data, **{name: getattr(default, name) for name in names})
        fitted = max(1, round(monitor.monitor_images * 2 / 3))  # the probe is; the rest is measured
        most = (fitted, max(1, monitor.monitor_images - fitted))
        name, channels = monitor.monitor_target, config['input_size'][0]
        self.target = TransferSet(name, data, settings.loader, channels, accelerator, most, 'monitor_target')
        self._splits, self._accelerator = self.target.images(config), accelerator
        # A training image's forward and backward are taken as three forward passes.
        cheap = math.ceil(monitor.monitor_images / (3 * COST * num_instances)) if num_instances else 1
        epochs = settings.schedule.epochs
        self._every = monitor.monitor_every or min(max(round(epochs / 20), cheap, 1), epochs)

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


def create_monitor(
    settings: TrainSettings, config: dict[str, Any], accelerator: Accelerator, num_instances: int, resumed: Run | None
) -> Monitor | None:
    """Create the monitor that the settings ask for, if any; it can't join a run whose summary.csv lacks its columns."""
    target = settings.monitor.monitor_target
    if not target:
        return None
    if resumed and not all(f'eval_{column}' in row for row in resumed.rows() for column in COLUMNS):
        raise UserError(
            f'`monitor_target` {target}: {resumed} was started without it, and its summary.csv has no columns for it; '
            f'leave it out to go on'
        )
    return Monitor(settings, config, accelerator, num_instances)
