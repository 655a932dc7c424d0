"""Where images come from and how they are sized and normalized, by timm's flags."""

from __future__ import annotations

import argparse
import os
from typing import Any

from timm.data import resolve_data_config
from torch import nn

from ..cli.arguments import any_text, number, positive_int, whole_number
from ..utils.errors import UserError

LARGEST_SIDE = 16384  # pixels; a batch of larger images fits no memory
INTERPOLATIONS = ('nearest', 'bilinear', 'bicubic', 'box', 'hamming', 'lanczos')


def add_dataset_arguments(parser: argparse.ArgumentParser, positional: bool = True) -> None:
    """Declare timm's flags for where images come from and how they are sized and normalized.

    Args:
        parser: Gets the flags.
        positional: Whether the folder may stand without a flag, as in timm's training script.
    """
    group = parser.add_argument_group('Data')
    parser.set_defaults(data=None)
    if positional:
        group.add_argument('data', nargs='?', metavar='DIR', help='folder with the images, same as --data-dir')
    group.add_argument('--data-dir', metavar='DIR', help='folder with the images')
    group.add_argument(
        '--dataset',
        default='',
        metavar='NAME',
        help="any name that timm's create_dataset takes (hfds/..., torch/..., a folder or tar reader), or digits",
    )
    group.add_argument(
        '--train-split',
        type=any_text,
        default='train',
        metavar='NAME',
        help="training split; hfds and digits also take slices, 'train[:10000]'",
    )
    group.add_argument('--val-split', type=any_text, default='validation', metavar='NAME', help='validation split')
    for split in ('train', 'val'):
        group.add_argument(
            f'--{split}-num-samples',
            type=whole_number(1, 10**12),
            metavar='N',
            help='images in a streaming set that does not say how many it has',
        )
    group.add_argument('--dataset-download', action='store_true', help='let torch/, tfds/ and hfids/ datasets download')
    group.add_argument('--class-map', default='', metavar='FILE', help='class to index mapping')
    group.add_argument('--input-img-mode', metavar='MODE', help='PIL mode images are converted to')
    group.add_argument('--input-key', metavar='KEY', help='column of the images')
    group.add_argument('--target-key', metavar='KEY', help='column of the labels')
    group.add_argument('--img-size', type=whole_number(1, LARGEST_SIDE), metavar='N', help='image size, square')
    group.add_argument('--in-chans', type=whole_number(1, 4096), metavar='N', help='image channels')
    group.add_argument(
        '--input-size',
        type=whole_number(1, LARGEST_SIDE),
        nargs=3,
        metavar=('C', 'H', 'W'),
        help='image channels, height and width',
    )
    group.add_argument('--crop-pct', type=number(0.05, 2), metavar='F', help='center crop share at evaluation')
    group.add_argument('--crop-mode', choices=('squash', 'border', 'center'), help='crop at evaluation')
    group.add_argument('--mean', type=number(-1e6, 1e6), nargs='+', metavar='M', help='channel means, of 1')
    group.add_argument('--std', type=number(1e-6, 1e6), nargs='+', metavar='S', help='channel standard deviations')
    group.add_argument('--interpolation', choices=INTERPOLATIONS, help='resize interpolation at evaluation')
    group.add_argument('-b', '--batch-size', type=positive_int, default=128, metavar='N', help='of each process')
    group.add_argument(
        '-vb', '--validation-batch-size', type=positive_int, metavar='N', help='--batch-size when not given'
    )
    group.add_argument(
        '-j', '--workers', type=whole_number(0, 4096), default=4, metavar='N', help='data loading processes'
    )
    group.add_argument('--cache-dataset', action='store_true', help='decode images once and keep them in memory')
    group.add_argument('--pin-mem', action='store_true', help='pin memory for faster transfer to a GPU')


def data_config(args: argparse.Namespace, model: nn.Module) -> dict[str, Any]:
    """Input size, normalization and interpolation: the flags over the model's own, by timm's rules.

    Raises:
        UserError: As many means or deviations as there are neither channels nor one.
    """
    channels = args.input_size[0] if args.input_size else args.in_chans or 3
    for flag, values in (('--mean', args.mean), ('--std', args.std)):
        if values is not None and len(values) not in (1, channels):
            words = ' '.join(map(str, values))
            raise UserError(f'{flag} {words}: {len(values)} values for {channels} channel(s); give {channels}')
    return resolve_data_config(vars(args), model=model)


def worker_count(args: argparse.Namespace) -> int:
    """`--workers`, but no more than there are processors to run them on."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
    return min(args.workers, usable)
