"""The flags of fine-tuning: those of training that make sense for it, with defaults of its own."""

from __future__ import annotations

import argparse
import math

from ..cli import model_flags as models
from ..cli import training_flags as flags
from ..cli.arguments import Parser, brief, non_negative_int, positive_int
from ..cli.model_flags import add_source_arguments
from . import freezing

DEFAULTS = dict(
    epochs=10,
    batch_size=64,
    lr_base=0.05,
    warmup_epochs=1,
    sched_on_updates=True,
    smoothing=0.0,
    scale=(0.5, 1.0),
    color_jitter=0.0,
    seed=0,
    keep_every=0,
    checkpoint_hist=1,
)
TWO_STAGES = dict(mode='vanilla', temporal_start_epoch=None, temporal_lr_scale=1.0, instance_weight_decay_scale=1.0)
# what tells two runs of the same settings apart, or does not change what is measured
NOT_SETTINGS = (
    *(
        'source',
        'checkpoint',
        'model',
        'pretrained',
        'output',
        'experiment',
        'resume',
        'config',
        'seed',
        'seeds',
        'train_fraction',
    ),
    *('workers', 'cache_dataset', 'pin_mem', 'validation_batch_size', 'dataset_download', 'log_with', 'log_interval'),
    *('checkpoint_hist', 'keep_every', 'monitor_target', 'monitor_every', 'monitor_images'),
)


def fraction(text: str) -> float:
    """A number above 0 and at most 1, for argparse."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f'must be a number above 0 and at most 1, got {brief(text)}')
    return value


def add_arguments(parser: Parser) -> None:
    """Declare the flags of `transfer/finetune.py`."""
    group = add_source_arguments(parser)
    models.add_architecture_arguments(group)
    group = parser.add_argument_group('Fine-tuning')
    group.add_argument(
        '--freeze', choices=freezing.PARTS, default='none', help='what stays as it is; body is all but the classifier'
    )
    group.add_argument(
        '--train-fraction',
        type=fraction,
        nargs='+',
        default=[1.0],
        metavar='F',
        help='of the training images, classes in proportion; a run for each',
    )
    group.add_argument('--seeds', type=positive_int, default=3, metavar='N', help='runs of each, from --seed on')
    group.add_argument(
        '--min-updates',
        type=non_negative_int,
        default=500,
        metavar='N',
        help='a fraction gets as many updates as all images would, up to this, by several passes an epoch',
    )
    group.add_argument(
        '--output', default='', metavar='DIR', help="where the runs go; the run's finetune/ or results/NAME"
    )
    flags.add_common_arguments(parser)
    parser.set_defaults(**DEFAULTS, **TWO_STAGES)
