#!/usr/bin/env python3
"""Measure what a model's frozen features are worth on other data sets.

python transfer/linear_probe.py runs/NAME                                # target: the embedded digits
python transfer/linear_probe.py resnet50 --target hfds/REPO_OR_FOLDER --shots 1 5 10 25
python transfer/linear_probe.py runs/NAME/weights/epoch-0005.safetensors --probes ridge knn
"""

from __future__ import annotations

import ctc_timm  # noqa: F401  (registers the models)
from ctc_timm.cli.arguments import Parser, parse, run_script
from ctc_timm.measure.linear_probe import add_arguments, linear_probe


def main() -> None:
    parser = Parser(description=__doc__.split('\n')[0])
    add_arguments(parser)
    linear_probe(parse(parser))


if __name__ == '__main__':
    run_script(main)
