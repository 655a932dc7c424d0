"""The launcher configurations, as Accelerate reads them."""

import os
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser

from ctc_timm.training.trainer import Trainer
from ctc_timm.utils.errors import UserError

FOLDER = Path(__file__).resolve().parents[2] / 'ctc_timm' / 'recipes' / 'accelerate'


@pytest.mark.parametrize(
    'name, kind, machines, processes',
    [('multi_gpu', 'MULTI_GPU', 1, 8), ('multi_node', 'MULTI_GPU', 8, 64)],
)
def test_configurations_are_read(name, kind, machines, processes, monkeypatch):
    """Every key is known to Accelerate, and the launcher takes from it what the file's first line promises."""
    config = load_config_from_file(str(FOLDER / f'{name}.yaml'))
    assert config.distributed_type.value == kind
    for key in list(os.environ):
        if key.startswith('ACCELERATE_'):
            monkeypatch.delenv(key)
    parser = launch_command_parser()
    words = ['--config_file', str(FOLDER / f'{name}.yaml'), 'train.py']
    args, _, _ = _validate_launch_command(parser.parse_args(words))
    assert (args.num_machines, args.num_processes, args.mixed_precision) == (machines, processes, 'bf16')
    assert args.multi_gpu


def test_all_configurations_are_tested():
    assert {file.stem for file in FOLDER.iterdir()} == {'multi_gpu', 'multi_node'}


@pytest.mark.parametrize('name', ['FSDP', 'DEEPSPEED'])
def test_sharded_models_are_refused(name, monkeypatch, flags, tiny):
    """By what the launcher tells its processes, before anything is written."""
    monkeypatch.setenv(f'ACCELERATE_USE_{name}', 'true')
    with pytest.raises(UserError, match=f'accelerate launch: {name} shares out the model'):
        Trainer(flags(*tiny))
