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
from torch import nn

from ..data.settings import DataSettings
from ..measure.features import compute_features
from ..measure.geometry import class_spread, effective_rank
from ..measure.probes import ridge_scores
from ..measure.transfer_sets import TransferSet
from ..runs import Run
from ..utils.errors import UserError
from .settings import MonitorSettings, TrainSettings

FITTED = 2 / 3  # of the images; the rest is measured
COST = 0.02  # of the training time, that the default interval aims at
COLUMNS = ('monitor_ridge_top1', 'monitor_effective_rank', 'monitor_spread')


def monitor_interval(monitor: MonitorSettings, epochs: int, num_instances: int) -> int:
    """Epochs between measurements.

    Without `monitor_every`, such that a training image's forward and backward taken as three forward passes,
    measuring costs at most 2%. The number of training images is 0 when it is not known.
    """
    if monitor.monitor_every is not None:
        return monitor.monitor_every
    cheap = math.ceil(monitor.monitor_images / (3 * COST * num_instances)) if num_instances else 1
    return min(max(round(epochs / 20), cheap, 1), epochs)


class Monitor:
    """Watches one target, seen through the model's image transform, `config`.

    Attributes:
        columns: Names of the numbers: percent, a number of dimensions, a ratio.
        seconds: Spent on measuring so far, without opening the data.

    Raises:
        UserError: A target that can't be opened or measured.
    """

    columns: tuple[str, ...] = COLUMNS

    def __init__(
        self, settings: TrainSettings, config: dict[str, Any], accelerator: Accelerator, num_instances: int
    ) -> None:
        monitor, default = settings.monitor, DataSettings()
        names = ('train_split', 'val_split', 'class_map', 'input_key', 'target_key')  # the run's are of its own data
        data = dataclasses.replace(settings.data, **{name: getattr(default, name) for name in names})
        fitted = max(1, round(monitor.monitor_images * FITTED))
        most = (fitted, max(1, monitor.monitor_images - fitted))
        name, channels = monitor.monitor_target, config['input_size'][0]
        self.target = TransferSet(name, data, settings.loader, channels, accelerator, most, 'monitor_target')
        self._splits, self._accelerator = self.target.images(config), accelerator
        self._every = monitor_interval(monitor, settings.schedule.epochs, num_instances)
        self.seconds = 0.0

    def due(self, epoch: int, last: bool) -> bool:
        """Whether to measure after this epoch."""
        return last or (epoch + 1) % self._every == 0

    def measure(self, model: nn.Module) -> dict[str, float]:
        """Measure the model's features of the target: the values of `columns`. It is left in evaluation mode.

        Raises:
            UserError: Features that are not finite.
        """
        started = time.monotonic()
        train, test = (compute_features(model, images, self._accelerator) for images in self._splits)
        self.target.check(train, test)
        top1 = ridge_scores(train, test, self.target.num_classes)['top1']
        spread = class_spread(test.features_ND, test.labels_N).spread
        values = top1, effective_rank(test.features_ND), spread
        self.seconds += time.monotonic() - started
        return dict(zip(COLUMNS, values))


def create_monitor(
    settings: TrainSettings, config: dict[str, Any], accelerator: Accelerator, num_instances: int, resumed: Run | None
) -> Monitor | None:
    """Create the monitor that the settings ask for, if any.

    Raises:
        UserError: See `Monitor`; the resumed run was started without it, so that its summary.csv has no columns for it.
    """
    target = settings.monitor.monitor_target
    if not target:
        return None
    if resumed and not all(f'eval_{column}' in row for row in resumed.rows() for column in COLUMNS):
        raise UserError(
            f'`monitor_target` {target}: {resumed} was started without it, and its summary.csv has no columns for it; '
            f'leave it out to go on'
        )
    return Monitor(settings, config, accelerator, num_instances)
