"""The flags of `transfer/segment.py`."""

from __future__ import annotations

import argparse

from ..cli.arguments import Parser, brief, non_negative_int, positive_int, whole_number
from . import fitting_flags
from .masks import LAYOUTS, MOST_CLASSES
from .segmenters import HEADS

STRIDES = {'8': 8, '16': 16, '32': 32}


def add_arguments(parser: Parser) -> None:
    """Declare them all."""
    group = parser.add_argument_group('Segmenter')
    group.add_argument('--head', choices=HEADS, default='fpn', help='on all levels, or on the last map of the body')
    group.add_argument('--head-channels', type=whole_number(4, 65536), default=128, metavar='N', help='of the fpn head')
    group.add_argument(
        '--output-stride',
        type=output_stride,
        choices=tuple(STRIDES.values()),
        help="of the body's last map, where timm can change it",
    )
    group.add_argument('--drawn-images', type=positive_int, default=6, metavar='N', help='in the picture of masks')
    group = parser.add_argument_group('Masks')
    group.add_argument('--layout', choices=('auto', *LAYOUTS), default='auto', help='of the folder')
    group.add_argument('--train-split', default='train', metavar='NAME', help="'train' is ADE's 'training'")
    group.add_argument('--val-split', default='val', metavar='NAME', help="'val' is ADE's 'validation'")
    group.add_argument(
        '--num-classes',
        type=whole_number(2, MOST_CLASSES),
        metavar='K',
        help='as classes.txt names, or as the masks show, when not given',
    )
    group.add_argument(
        '--ignore-index', type=non_negative_int, default=255, metavar='V', help='value of pixels that do not count'
    )
    group.add_argument(
        '--reduce-zero-label', action='store_true', help='0 does not count either, and 1 is the first class (ADE20K)'
    )
    fitting_flags.add_arguments(parser, 'segment', scale=[0.5, 2.0])


def output_stride(text: str) -> int:
    """One of `STRIDES` as it is written there, for argparse."""
    if text not in STRIDES:
        raise argparse.ArgumentTypeError(f'must be one of {", ".join(STRIDES)}, got {brief(text)}')
    return STRIDES[text]
