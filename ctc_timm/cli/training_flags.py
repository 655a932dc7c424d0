"""All flags of a training run, each group declared where it is read."""

from __future__ import annotations

from ..training import checkpoints, monitor, optimization, schedules
from ..training import step as steps
from ..training import tasks as stages
from ..utils.distributed import add_precision_arguments
from . import model_flags as models
from .arguments import Parser, non_negative_int, positive_int, probability


def add_arguments(parser: Parser) -> None:
    """Declare every flag of `train.py`."""
    models.add_arguments(parser)
    stages.add_arguments(parser)
    schedules.add_stage_arguments(parser)
    checkpoints.add_arguments(parser)
    add_common_arguments(parser)


def add_common_arguments(parser: Parser) -> None:
    """Declare what holds for any training, of one stage or two, from scratch or not."""
    stages.add_loss_arguments(parser)
    schedules.add_arguments(parser)
    optimization.add_arguments(parser)
    models.add_execution_arguments(parser)
    checkpoints.add_saving_arguments(parser)
    monitor.add_arguments(parser)
    group = parser.add_argument_group('Run')
    group.add_argument('--seed', type=non_negative_int, default=42, metavar='S', help='of everything random')
    steps.add_arguments(group)
    add_precision_arguments(group)
    group.add_argument('--model-ema', action='store_true', help='keep a moving average; it is what is saved')
    group.add_argument('--model-ema-decay', type=probability, default=0.9998, metavar='D', help='its decay')
    group.add_argument('--model-ema-warmup', action='store_true', help='warm its decay up')
    group.add_argument('--model-ema-force-cpu', action='store_true', help='keep it on the CPU')
    group.add_argument('--log-with', metavar='TRACKER', help="Accelerate's trackers: tensorboard, wandb, ...")
    group.add_argument('--eval-interval', type=positive_int, default=1, metavar='N', help='epochs between evaluations')
