"""The flags of `transfer/detect.py`."""

from __future__ import annotations

from ..cli.arguments import KeyValues, Parser, positive_float, positive_int, whole_number
from . import fitting_flags
from .detectors import DETECTORS


def add_arguments(parser: Parser) -> None:
    """Declare them all."""
    group = parser.add_argument_group('Detector')
    group.add_argument(
        '--detector', choices=DETECTORS, default='fasterrcnn', help="torchvision's; maskrcnn measures masks too"
    )
    group.add_argument(
        '--anchor-scale',
        type=positive_float,
        metavar='X',
        help="anchors' size over their level's stride; 8, of retinanet 4, when not given",
    )
    group.add_argument(
        '--head-channels', type=whole_number(1, 65536), default=1024, metavar='N', help="of R-CNN's box head"
    )
    group.add_argument(
        '--detector-kwargs',
        nargs='*',
        default={},
        action=KeyValues,
        metavar='KEY=VALUE',
        help="more for torchvision's class, such as box_batch_size_per_image=128",
    )
    group.add_argument('--drawn-images', type=positive_int, default=6, metavar='N', help='in the picture of detections')
    fitting_flags.add_arguments(parser, 'detect', scale=[0.5, 1.5])
