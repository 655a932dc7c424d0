#!/usr/bin/env python3
"""Train semantic segmentation on any body, and measure mean intersection over union.

python transfer/segment.py                                                 # scenes of digits, a small body from scratch
python transfer/segment.py runs/NAME --data-dir VOC2012 --head deeplabv3 --output-stride 16 --freeze-bn
accelerate launch transfer/segment.py resnet50 --data-dir ADE --reduce-zero-label --layer-decay 0.8 --clip-grad 1
"""

from __future__ import annotations

from pathlib import Path

import ctc_timm  # noqa: F401  (registers the models)
from ctc_timm.cli.arguments import Parser, parse, run_script
from ctc_timm.dense.fitting_flags import presets
from ctc_timm.dense.segmentation import segment
from ctc_timm.dense.segmentation_flags import add_arguments

DIGITS = Path(__file__).resolve().parents[1] / 'ctc_timm' / 'recipes' / 'segment_digits.yaml'


def main() -> None:
    parser = Parser(description=__doc__.split('\n')[0])
    add_arguments(parser)
    segment(parse(parser, presets=presets(parser, DIGITS)))


if __name__ == '__main__':
    run_script(main)
