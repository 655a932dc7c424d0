"""The flags that detection and segmentation share: train.py's names, with defaults of their own."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, ProjectConfiguration
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock

from ..cli import model_flags as models
from ..cli.arguments import (
    Parser,
    load_recipe,
    non_negative_int,
    number,
    positive_float,
    positive_int,
    probability,
    whole_number,
)
from ..cli.model_flags import add_source_arguments
from ..data.settings import LARGEST_SIDE
from ..models.loading import named_source
from ..training import checkpoints, optimization, report, schedules
from ..training import step as steps
from ..utils.distributed import add_precision_arguments, create_accelerator
from ..utils.errors import UserError
from .pyramid import Pyramid, create_pyramid

DEFAULTS = dict(
    epochs=12,
    opt='adamw',
    lr_base=2e-4,
    lr_base_size=16,
    weight_decay=0.05,
    warmup_epochs=1,
    sched_on_updates=True,
    seed=0,
    keep_every=0,
    checkpoint_hist=1,
)
# what the shared modules of training ask for, and dense training has no flag for
FIXED = dict(
    dataset='',
    data=None,
    channels_last=False,
    temporal_start_epoch=None,
    temporal_lr_scale=1.0,
    instance_weight_decay_scale=1.0,
)


def add_arguments(parser: Parser, mode: str, **defaults: Any) -> None:
    """Declare where model, data and run are, how to train and to augment, and the flags of the body.

    Args:
        parser: Gets them.
        mode: 'detect' or 'segment'; a part of the run's name.
        **defaults: Over `DEFAULTS`; `scale` has none there.
    """
    group = add_source_arguments(parser)
    group.add_argument('--from-scratch', action='store_true', help='random weights for the timm name of --model')
    group.add_argument('--fpn-channels', type=whole_number(1, 4096), default=256, metavar='N', help='of the pyramid')
    group.add_argument(
        '--freeze-stages',
        type=non_negative_int,
        default=0,
        metavar='N',
        help='keep the first N stages of the body as they are; 1 is the stem',
    )
    group.add_argument('--freeze-bn', action='store_true', help="keep the body's batch norms as they are")
    group.add_argument('--grad-checkpointing', action='store_true', help='trade time for memory')
    models.add_shared_norm_arguments(group)
    group = parser.add_argument_group('Data')
    group.add_argument('--data-dir', metavar='DIR', help='folder with the data; scenes of digits when not given')
    group.add_argument(
        '--img-size', type=whole_number(1, LARGEST_SIDE), default=512, metavar='S', help='side of the square canvas'
    )
    group.add_argument('--mean', type=number(-1e6, 1e6), nargs='+', metavar='M', help='channel means, of 1')
    group.add_argument('--std', type=number(1e-6, 1e6), nargs='+', metavar='S', help='channel standard deviations')
    group.add_argument('-b', '--batch-size', type=positive_int, default=8, metavar='N', help='of each process')
    group.add_argument(
        '-vb', '--validation-batch-size', type=positive_int, metavar='N', help='--batch-size when not given'
    )
    group.add_argument(
        '-j', '--workers', type=whole_number(0, 4096), default=4, metavar='N', help='data loading processes'
    )
    group.add_argument('--pin-mem', action='store_true', help='pin memory for faster transfer to a GPU')
    group = parser.add_argument_group('Augmentation')
    group.add_argument('--hflip', type=probability, default=0.5, metavar='P', help='horizontal flip')
    group.add_argument(
        '--scale', type=positive_float, nargs=2, metavar='F', help='random size, over that which fits the canvas'
    )
    checkpoints.add_arguments(parser)
    schedules.add_arguments(parser)
    optimization.add_arguments(parser)
    checkpoints.add_saving_arguments(parser)
    group = parser.add_argument_group('Run')
    group.add_argument('--seed', type=non_negative_int, default=0, metavar='S', help='of everything random')
    steps.add_arguments(group)
    add_precision_arguments(group)
    group.add_argument('--log-with', metavar='TRACKER', help="Accelerate's trackers: tensorboard, wandb, ...")
    group.add_argument('--eval-interval', type=positive_int, default=1, metavar='N', help='epochs between evaluations')
    parser.set_defaults(**{**DEFAULTS, **FIXED, 'mode': mode, **defaults})


def presets(parser: Parser, recipe: Path) -> Callable[[argparse.Namespace], tuple[dict[str, Any], str] | None]:
    """What comes between flags' defaults and the command line, for `arguments.parse`.

    The arguments of the run that `--resume` names; else the recipe of the digits' scenes where no data are named, of
    which the model is left out where one is named, and what RetinaNet doesn't know where it is the detector.

    Args:
        parser: With all flags declared.
        recipe: Of the digits' scenes.
    """

    def between(args: argparse.Namespace) -> tuple[dict[str, Any], str] | None:
        state = checkpoints.find_resume(args).state
        if state is not None:
            run = checkpoints.run_of_state(state)
            flags = set(parser.actions_by_name()) - {'resume', 'output', 'experiment'}
            return {key: value for key, value in run.args().items() if key in flags}, str(run.path / 'args.yaml')
        if args.config or args.data_dir:
            return None
        values = load_recipe(recipe)
        if args.source or args.checkpoint or args.model:
            values = {key: value for key, value in values.items() if key not in ('model', 'from_scratch')}
        if vars(args).get('detector') == 'retinanet':  # has no second stage, whose sizes the recipe gives
            values.pop('detector_kwargs', None)
        return values, str(recipe)

    return between


def open_accelerator(args: argparse.Namespace) -> Accelerator:
    """Accelerate for a dense run, whose heads may leave a parameter without a gradient in some step."""
    if args.log_with:
        report.check_tracker(args.log_with)
    return create_accelerator(
        args,
        log_with=args.log_with,
        project_config=ProjectConfiguration(project_dir=args.output, logging_dir=args.output),
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
    )


def open_pyramid(args: argparse.Namespace, extra: ExtraFPNBlock | None = None, **options: Any) -> Pyramid:
    """The pyramid that the flags describe, frozen as they say.

    Args:
        args: Of `add_arguments`.
        extra: See `Pyramid`.
        **options: For `timm.create_model`.

    Raises:
        UserError: No model, or one that has no pyramid or no such stages.
    """
    source, architecture, flag = named_source(args)
    scratch = args.from_scratch
    if scratch and source != args.model:
        raise UserError(f'--from-scratch: goes with the timm name of --model, not with {source}')
    pyramid = create_pyramid(
        source,
        args.img_size,
        model=architecture,
        flag=flag,
        from_scratch=scratch,
        out_channels=args.fpn_channels,
        extra=extra,
        **options,
    )
    pyramid.freeze_stages(args.freeze_stages)
    if args.freeze_bn:
        pyramid.freeze_norms()
    return pyramid


def normalization(args: argparse.Namespace, pyramid: Pyramid) -> tuple[list[float], list[float]]:
    """Channel means and standard deviations: the flags over the model's own.

    Raises:
        UserError: As many values as there are neither channels nor one.
    """
    found = []
    for flag, given, own in (('--mean', args.mean, 'mean'), ('--std', args.std, 'std')):
        values = list(given if given is not None else pyramid.pretrained_cfg[own])
        values = values * pyramid.in_chans if len(values) == 1 else values
        if len(values) != pyramid.in_chans:
            raise UserError(f'{flag}: {len(values)} values for {pyramid.in_chans} channels; give {pyramid.in_chans}')
        found.append([float(value) for value in values])
    return found[0], found[1]
