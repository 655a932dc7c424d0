"""Flags of models for commands that don't build settings yet; goes with the last of them."""

from __future__ import annotations

import argparse
from typing import Any

from .arguments import KeyValues, positive_float, probability, whole_number

MOST_CLASSES = 10**6
COMPILE_MODES = ('default', 'reduce-overhead', 'max-autotune', 'max-autotune-no-cudagraphs')


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare timm's model flags."""
    group = parser.add_argument_group('Model')
    group.add_argument(
        '--model', default='resnet50', metavar='NAME', help='any timm name, hf-hub:REPO or local-dir:FOLDER'
    )
    group.add_argument('--pretrained', action='store_true', help="start from the name's pretrained weights")
    group.add_argument('--initial-checkpoint', default='', metavar='FILE', help='start from these weights')
    group.add_argument(
        '--num-classes',
        type=whole_number(1, MOST_CLASSES),
        metavar='N',
        help="outputs; the data set's classes when not given",
    )
    add_architecture_arguments(group)


def add_architecture_arguments(group: Any) -> None:
    """Declare timm's flags of how a model is built."""
    group.add_argument('--gp', metavar='POOL', help='global pooling type')
    group.add_argument('--drop', type=probability, default=0.0, metavar='P', help='dropout before the classifier')
    group.add_argument('--drop-path', type=probability, metavar='P', help='stochastic depth')
    group.add_argument('--drop-block', type=probability, metavar='P', help='drop block')
    group.add_argument('--bn-momentum', type=probability, metavar='M', help='batch norm momentum')
    group.add_argument('--bn-eps', type=positive_float, metavar='EPS', help='batch norm epsilon')
    group.add_argument(
        '--model-kwargs', nargs='*', default={}, action=KeyValues, metavar='KEY=VALUE', help='more for the model'
    )


def add_execution_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare timm's flags for how a model runs."""
    group = parser.add_argument_group('Execution')
    group.add_argument('--channels-last', action='store_true', help='channels-last memory layout')
    group.add_argument('--grad-checkpointing', action='store_true', help='trade time for memory')
    group.add_argument('--torchcompile', nargs='?', const='inductor', metavar='BACKEND', help='compile the model')
    group.add_argument('--torchcompile-mode', choices=COMPILE_MODES, help="torch.compile's mode")
    add_shared_norm_arguments(group)


def add_shared_norm_arguments(group: Any) -> None:
    """Declare timm's flags for batch norm where there are several processes."""
    group.add_argument('--sync-bn', action='store_true', help='batch norm over all processes')
    group.add_argument(
        '--dist-bn',
        choices=('reduce', 'broadcast', ''),
        default='reduce',
        help='how processes share batch norm statistics after an epoch',
    )


def add_source_arguments(parser: argparse.ArgumentParser) -> Any:
    """Declare how a model with its weights is named, for scripts that measure or go on from one.

    Returns:
        The group, for more about the model.
    """
    parser.add_argument(
        'source', nargs='?', metavar='MODEL', help='run folder, weights file, timm name, hf-hub: or local-dir:'
    )
    group = parser.add_argument_group('Model')
    group.add_argument('--model', default='', metavar='NAME', help='timm name, hf-hub: or local-dir:')
    group.add_argument('--checkpoint', default='', metavar='FILE', help='weights file or run folder')
    group.add_argument('--pretrained', action='store_true', help='always meant for a name; taken for timm users')
    return group
