#!/usr/bin/env python3
"""Measure a model's accuracy on a data set.

accelerate launch validate.py runs/NAME                         # a run, on what it was trained on
accelerate launch validate.py runs/NAME/weights/epoch-0005.safetensors --dataset digits
accelerate launch validate.py resnet50 --data-dir IMAGES --split validation
"""

from __future__ import annotations

import argparse
from typing import Any

from ctc_timm.cli.arguments import Parser, parse, run_script
from ctc_timm.measure.validation import add_arguments, validate
from ctc_timm.models.loading import data_flags, run_arguments, run_of


def of_the_run(args: argparse.Namespace) -> tuple[dict[str, Any], str] | None:
    """The data flags of the run that is measured, unless other data are named."""
    source = args.source or args.checkpoint
    if not source or args.dataset or args.data_dir:
        return None
    found = data_flags(run_arguments(run_of(source)))
    return (found, 'args.yaml') if found else None


def main() -> None:
    parser = Parser(description=__doc__.split('\n')[0])
    add_arguments(parser)
    validate(parse(parser, presets=of_the_run))


if __name__ == '__main__':
    run_script(main)
