"""The launcher configurations, as Accelerate reads them."""

import os
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser

import ctc_timm
from ctc_timm.utils.distributed import create_accelerator
from ctc_timm.utils.errors import UserError
from ctc_timm.utils.precision import PrecisionSettings

FOLDER = Path(ctc_timm.__file__).parent / 'recipes' / 'accelerate'
CONFIGURATIONS = {'multi_gpu': ('MULTI_GPU', 1, 8), 'multi_node': ('MULTI_GPU', 8, 64)}


def test_configurations_are_read(monkeypatch):
    """Every key is known to Accelerate, and the launcher takes from it what the file's first line promises."""
    for key in list(os.environ):
        if key.startswith('ACCELERATE_'):
            monkeypatch.delenv(key)
    assert {file.stem for file in FOLDER.iterdir()} == set(CONFIGURATIONS)
    for name, (kind, machines, processes) in CONFIGURATIONS.items():
        file = str(FOLDER / f'{name}.yaml')
        assert load_config_from_file(file).distributed_type.value == kind
        words = ['--config_file', file, 'train.py']
        args, _, _ = _validate_launch_command(launch_command_parser().parse_args(words))
        assert (args.num_machines, args.num_processes, args.mixed_precision) == (machines, processes, 'bf16')
        assert args.multi_gpu


@pytest.mark.parametrize('name', ['FSDP', 'DEEPSPEED'])
def test_sharded_models_are_refused(name, monkeypatch):
    """By what the launcher tells its processes, before anything is written."""
    monkeypatch.setenv(f'ACCELERATE_USE_{name}', 'true')
    with pytest.raises(UserError, match=f'{name} shards the model.*`split_banks=True`'):
        create_accelerator(PrecisionSettings())
