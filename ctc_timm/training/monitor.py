"""Cheap measurements of transfer while training: a ridge probe and two signs of over-compression.

A few images of a target are decoded once and kept; every so many epochs they pass through the model, a ridge
probe is fitted to the features of one part and scored on the other, whose effective rank and within/between
spread are taken. The exact accuracies are for `transfer/`; these show while there is time to act that source
accuracy rises and transfer falls.
"""

from __future__ import annotations

import argparse
import math
import time
from typing import Any

from accelerate import Accelerator
from torch import nn

from ..cli.arguments import positive_int
from ..measure.features import compute_features
from ..measure.geometry import class_spread, effective_rank
from ..measure.probes import ridge_scores
from ..measure.sets import Labeled
from ..measure.transfer_sets import TransferSet
from ..runs import Run
from ..utils.errors import UserError

FITTED = 2 / 3  # of the images; the rest is measured
COST = 0.02  # of the training time, that the default interval aims at
COLUMNS = ('monitor_ridge_top1', 'monitor_effective_rank', 'monitor_spread')


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of the monitor."""
    group = parser.add_argument_group('Monitor')
    group.add_argument(
        '--monitor-target', default='', metavar='DATASET', help='watch transfer to this data set or folder'
    )
    group.add_argument(
        '--monitor-every',
        type=positive_int,
        metavar='N',
        help='epochs between measurements; about 20 over the run, or fewer to stay cheap, when not given',
    )
    group.add_argument(
        '--monitor-images', type=positive_int, default=1500, metavar='N', help='images, two thirds to fit the probe'
    )


def monitor_interval(args: argparse.Namespace, num_instances: int) -> int:
    """Epochs between measurements.

    Without `--monitor-every`, such that a training image's forward and backward taken as three forward passes,
    measuring costs at most 2%.

    Args:
        args: The flags above, and the run's epochs.
        num_instances: Training images; 0 when that is not known.
    """
    if args.monitor_every is not None:
        return args.monitor_every
    cheap = math.ceil(args.monitor_images / (3 * COST * num_instances)) if num_instances else 1
    return min(max(round(args.epochs / 20), cheap, 1), args.epochs)


class Monitor:
    """Watches one target.

    Args:
        args: Data and monitor flags of the run.
        config: The model's image transform.
        accelerator: Device, precision and processes.
        every: Epochs between measurements.

    Attributes:
        seconds: Spent on measuring so far, without opening the data.

    Raises:
        UserError: A target that cannot be had or measured.
    """

    def __init__(self, args: argparse.Namespace, config: dict[str, Any], accelerator: Accelerator, every: int) -> None:
        own = argparse.Namespace(**vars(args))
        own.train_split, own.val_split = 'train', 'validation'
        own.class_map, own.input_key, own.target_key = '', None, None
        own.max_train = max(1, round(args.monitor_images * FITTED))
        own.max_test = max(1, args.monitor_images - own.max_train)
        self.target = TransferSet(
            args.monitor_target, own, config['input_size'][0], accelerator, flag='--monitor-target'
        )
        self._splits = self.target.train.images(config), self.target.test.images(config)
        self._accelerator = accelerator
        self._every = every
        self.seconds = 0.0

    def due(self, epoch: int, last: bool) -> bool:
        """Whether to measure after this epoch."""
        return last or (epoch + 1) % self._every == 0

    def measure(self, model: nn.Module) -> dict[str, float]:
        """The values of `COLUMNS`: percent, a number of dimensions, a ratio.

        Args:
            model: Left in evaluation mode.

        Raises:
            UserError: Features that are not finite.
        """
        started = time.monotonic()
        seen = (compute_features(model, images, self._accelerator) for images in self._splits)
        train, test = (Labeled(features.features_ND, features.labels_N) for features in seen)
        self.target.check(train, test)
        values = (
            ridge_scores(train, test, self.target.num_classes)['top1'],
            effective_rank(test.features_ND),
            class_spread(test.features_ND, test.labels_N).spread,
        )
        self.seconds += time.monotonic() - started
        return dict(zip(COLUMNS, values))


def create_monitor(
    args: argparse.Namespace,
    config: dict[str, Any],
    accelerator: Accelerator,
    num_instances: int,
    resumed: Run | None,
) -> Monitor | None:
    """The monitor that the flags ask for, if any.

    Args:
        args: The flags above and the data flags.
        config: Of `data_config`.
        accelerator: Of the run.
        num_instances: N.
        resumed: The run that goes on.

    Raises:
        UserError: That run was started without it.
    """
    if not args.monitor_target:
        return None
    if resumed and not all(f'eval_{column}' in row for row in resumed.rows() for column in COLUMNS):
        raise UserError(
            f'--monitor-target {args.monitor_target}: {resumed.path} was started without it, and its summary.csv '
            f'has no columns for it; leave the flag out to go on'
        )
    return Monitor(args, config, accelerator, monitor_interval(args, num_instances))
