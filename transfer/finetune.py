#!/usr/bin/env python3
"""Measure what a model is worth as the start of training on another data set.

python transfer/finetune.py runs/NAME                                     # target: the embedded digits
python transfer/finetune.py resnet50 --dataset hfds/REPO_OR_FOLDER --train-fraction 0.01 0.1 1.0 --seeds 5
python transfer/finetune.py runs/NAME/weights/epoch-0005.safetensors --data-dir IMAGES --freeze stem --layer-decay 0.7
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import ctc_timm  # noqa: F401  (registers the models)
from ctc_timm.cli.arguments import Parser, load_recipe, parse, run_script
from ctc_timm.training.finetune import finetune
from ctc_timm.training.finetune_flags import add_arguments

DIGITS = Path(__file__).resolve().parents[1] / 'ctc_timm' / 'recipes' / 'finetune_digits.yaml'


def of_the_digits(args: argparse.Namespace) -> tuple[dict[str, Any], str] | None:
    """The digits' own recipe, unless another recipe or another target is named."""
    if args.config or args.data_dir or args.dataset not in ('', 'digits'):
        return None
    return load_recipe(DIGITS), str(DIGITS)


def main() -> None:
    parser = Parser(description=__doc__.split('\n')[0])
    add_arguments(parser)
    finetune(parse(parser, presets=of_the_digits))


if __name__ == '__main__':
    run_script(main)
