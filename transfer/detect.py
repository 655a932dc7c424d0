#!/usr/bin/env python3
"""Train a detector on any body, and measure it as COCO does.

python transfer/detect.py                                                  # scenes of digits, a small body from scratch
python transfer/detect.py runs/NAME --data-dir COCO --detector maskrcnn --freeze-stages 2 --freeze-bn
accelerate launch transfer/detect.py resnet50 --data-dir COCO --img-size 800 --layer-decay 0.8 --clip-grad 1
"""

from __future__ import annotations

from pathlib import Path

import ctc_timm  # noqa: F401  (registers the models)
from ctc_timm.cli.arguments import Parser, parse, run_script
from ctc_timm.dense.detection import detect
from ctc_timm.dense.detection_flags import add_arguments
from ctc_timm.dense.fitting_flags import presets

DIGITS = Path(__file__).resolve().parents[1] / 'ctc_timm' / 'recipes' / 'detect_digits.yaml'


def main() -> None:
    parser = Parser(description=__doc__.split('\n')[0])
    add_arguments(parser)
    detect(parse(parser, presets=presets(parser, DIGITS)))


if __name__ == '__main__':
    run_script(main)
