"""The processes that run together, and their precision, through Accelerate."""

from __future__ import annotations

import argparse
import os
from typing import Any

import torch
from accelerate import Accelerator

from .errors import UserError


def add_precision_arguments(group: Any) -> None:
    """Declare timm's flags of mixed precision."""
    group.add_argument('--amp', action='store_true', help='mixed precision')
    group.add_argument('--amp-dtype', choices=('float16', 'bfloat16'), default='float16', help='its type')


def create_accelerator(args: argparse.Namespace, **options: Any) -> Accelerator:
    """Accelerate as the launcher's environment and the precision flags say.

    Accelerate takes several processes on a machine without a device for as many single ones unless it is told
    that the CPU is meant; they would all write to the same folder.

    Args:
        args: With `amp` and `amp_dtype`.
        **options: More for `Accelerator`.

    Raises:
        UserError: A precision that the device does not have, processes that do not find each other, or a launcher
            that is to share out the model itself.
    """
    for name in ('FSDP', 'DEEPSPEED', 'MEGATRON_LM'):
        if os.environ.get(f'ACCELERATE_USE_{name}', '').lower() == 'true':
            raise UserError(
                f'--config_file of accelerate launch: {name} shares out the model, of which the information bank is '
                f'a whole copy; use distributed_type MULTI_GPU, with --split-banks or --grad-checkpointing for room'
            )
    launched = int(os.environ.get('WORLD_SIZE', '1'))
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    without_device = found is None or found.type == 'mps'
    try:
        accelerator = Accelerator(
            cpu=launched > 1 and without_device,
            mixed_precision={'float16': 'fp16', 'bfloat16': 'bf16'}[args.amp_dtype] if args.amp else None,
            **options,
        )
    except (ValueError, ImportError) as error:
        raise UserError(f'--amp, --amp-dtype {args.amp_dtype}: {" ".join(str(error).split())}') from None
    if accelerator.num_processes != launched and launched > 1:
        raise UserError(f'{launched} processes were launched, but Accelerate sees {accelerator.num_processes}')
    return accelerator
