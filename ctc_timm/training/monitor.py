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

from ..data.settings import DataSettings, LoaderSettings
from ..measure.features import compute_features
from ..measure.geometry import class_spread, effective_rank
from ..measure.probes import ridge_scores
from ..measure.transfer_sets import TransferSet
from ..runs import Run
from ..utils.errors import UserError
from .settings import MonitorSettings

FITTED = 2 / 3  # of the images; the rest is measured
COST = 0.02  # of the training time, that the default interval aims at
COLUMNS = ('monitor_ridge_top1', 'monitor_effective_rank', 'monitor_spread')


def monitor_interval(monitor: MonitorSettings, epochs: int, num_instances: int) -> int:
    """Epochs between measurements.

    Without `monitor_every`, such that a training image's forward and backward taken as three forward passes,
    measuring costs at most 2%.

    Args:
        monitor: Settings.
        epochs: Length of the run.
        num_instances: Training images; 0 when that is not known.
    """
    if monitor.monitor_every is not None:
        return monitor.monitor_every
    cheap = math.ceil(monitor.monitor_images / (3 * COST * num_instances)) if num_instances else 1
    return min(max(round(epochs / 20), cheap, 1), epochs)


class Monitor:
    """Watches one target.

    Args:
        monitor: Settings.
        data: Of the run.
        loader: Of the run.
        config: The model's image transform.
        accelerator: Device, precision and processes.
        every: Epochs between measurements.

    Attributes:
        columns: Names of the numbers: percent, a number of dimensions, a ratio.
        seconds: Spent on measuring so far, without opening the data.

    Raises:
        UserError: A target that can't be opened or measured.
    """

    columns: tuple[str, ...] = COLUMNS

    def __init__(
        self,
        monitor: MonitorSettings,
        data: DataSettings,
        loader: LoaderSettings,
        config: dict[str, Any],
        accelerator: Accelerator,
        every: int,
    ) -> None:
        default = DataSettings()
        data = dataclasses.replace(
            data,
            train_split=default.train_split,
            val_split=default.val_split,
            class_map=default.class_map,
            input_key=default.input_key,
            target_key=default.target_key,
        )
        fitted = max(1, round(monitor.monitor_images * FITTED))
        self.target = TransferSet(
            monitor.monitor_target,
            data,
            loader,
            config['input_size'][0],
            accelerator,
            most=(fitted, max(1, monitor.monitor_images - fitted)),
            setting='monitor_target',
        )
        self._splits = self.target.images(config)
        self._accelerator = accelerator
        self._every = every
        self.seconds = 0.0

    def due(self, epoch: int, last: bool) -> bool:
        """Whether to measure after this epoch."""
        return last or (epoch + 1) % self._every == 0

    def measure(self, model: nn.Module) -> dict[str, float]:
        """Measure the model's features of the target.

        Args:
            model: Left in evaluation mode.

        Returns:
            The values of `columns`.

        Raises:
            UserError: Features that are not finite.
        """
        started = time.monotonic()
        train, test = (compute_features(model, images, self._accelerator) for images in self._splits)
        self.target.check(train, test)
        values = (
            ridge_scores(train, test, self.target.num_classes)['top1'],
            effective_rank(test.features_ND),
            class_spread(test.features_ND, test.labels_N).spread,
        )
        self.seconds += time.monotonic() - started
        return dict(zip(COLUMNS, values))


def check_monitored(monitor: MonitorSettings, resumed: Run) -> None:
    """Refuse to add the monitor's columns to a run that was started without them.

    Raises:
        UserError: Its summary.csv has no columns for it.
    """
    if monitor.monitor_target and not all(f'eval_{column}' in row for row in resumed.rows() for column in COLUMNS):
        raise UserError(
            f'`monitor_target` {monitor.monitor_target}: {resumed} was started without it, and its summary.csv has '
            f'no columns for it; leave it out to go on'
        )
