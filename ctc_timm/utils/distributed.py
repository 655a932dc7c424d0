"""The processes that train or measure together, and their precision, through Accelerate."""

from __future__ import annotations

import os
from typing import Any

import torch
from accelerate import Accelerator

from .errors import UserError, one_line
from .precision import PrecisionSettings


def create_accelerator(precision: PrecisionSettings, **options: Any) -> Accelerator:
    """Make Accelerate's object by the launcher's environment and the settings of mixed precision.

    Several processes on a machine without a GPU would each run alone, and all write to the same folder, unless
    Accelerate is told that the CPU is meant. `options` are more for `Accelerator`.

    Raises:
        UserError: The device lacks the precision, processes do not find each other, or a launcher shards the model.
    """
    for name in ('FSDP', 'DEEPSPEED', 'MEGATRON_LM'):
        if os.environ.get(f'ACCELERATE_USE_{name}', '').lower() == 'true':
            fault = f'{name} shards the model, of which the information bank is a whole copy'
            hint = 'use distributed_type MULTI_GPU, with `split_banks=True` or `grad_checkpointing=True` to save memory'
            raise UserError(f"accelerate launch's config file: {fault}; {hint}")
    launched = int(os.environ.get('WORLD_SIZE', '1'))
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    without_gpu = device is None or device.type == 'mps'
    mixed = {'float16': 'fp16', 'bfloat16': 'bf16'}[precision.amp_dtype] if precision.amp else None
    try:
        accelerator = Accelerator(cpu=launched > 1 and without_gpu, mixed_precision=mixed, **options)
    except (ValueError, ImportError) as error:
        raise UserError(f'`amp`, `amp_dtype` {precision.amp_dtype}: {one_line(error)}') from None
    if accelerator.num_processes != launched and launched > 1:
        raise UserError(f'{launched} processes were launched, but Accelerate sees {accelerator.num_processes}')
    return accelerator


def leave_process_group() -> None:
    """Leave the group of processes; gloo's threads, if they still run at exit, now and then abort the process."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
