#!/usr/bin/env python3
"""Train any timm model with contrastive temporal coding.

accelerate launch train.py                                      # the embedded digits, both stages
accelerate launch train.py -c recipes/cifar100_small.yaml --dataset hfds/FOLDER
accelerate launch train.py --model resnet50 --data-dir IMAGES --epochs 100
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import ctc_timm  # noqa: F401  (registers the models)
from ctc_timm.cli.arguments import Parser, parse, run_script
from ctc_timm.cli.commands import repo_id
from ctc_timm.cli.training_flags import add_arguments
from ctc_timm.hub.publish import check_target, push
from ctc_timm.training import checkpoints
from ctc_timm.training.trainer import Trainer

RECIPES = Path(__file__).resolve().parent / 'ctc_timm' / 'recipes'


def resumed(args: argparse.Namespace) -> tuple[dict[str, Any], str] | None:
    """The arguments of the run that `--resume` names: continuing needs no flag typed again."""
    state = checkpoints.find_resume(args).state
    if state is None:
        return None
    run = checkpoints.run_of_state(state)
    known = {k: v for k, v in run.args().items() if k not in ('config', 'resume', 'output', 'experiment')}
    return known, str(run.path / 'args.yaml')


def main() -> None:
    parser = Parser(description=__doc__.split('\n')[0])
    add_arguments(parser)
    group = parser.add_argument_group('Hub')
    group.add_argument(
        '--push-to-hub', type=repo_id, default='', metavar='USER/NAME', help='publish the run there when it is done'
    )
    args = parse(parser, default_recipe=RECIPES / 'digits.yaml', presets=resumed)
    if args.push_to_hub:
        check_target(args.push_to_hub)
    trainer = Trainer(args)
    trainer.fit()
    if args.push_to_hub and trainer.accelerator.is_main_process:
        print(push(trainer.run.path, args.push_to_hub).report())


if __name__ == '__main__':
    run_script(main)
