"""Runs whose processes share out the banks: the weights of one process, saved and continued by another number."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ctc_timm.contrast.sharding import BankShard
from ctc_timm.training.trainer import Trainer
from ctc_timm.utils.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
WORDS = (
    '--model test_vit --train-split train[:160] --val-split validation[:70] --img-size 16 --mean 0.3 --std 0.4 '
    '--num-negatives 32 --lr 0.01 --negatives all --temporal-start-epoch 1 -j 0 --dataset digits --smoothing 0'
)


def rows_of(state, name):
    """A bank as the files of all processes have it."""
    parts = [load_file(file)[name] for file in sorted(state.glob('banks_*.safetensors'))]
    whole = torch.empty(160, 128)
    for rank, part in enumerate(parts):
        whole[BankShard(160, rank, len(parts)).rows()] = part
    return whole, len(parts)


def test_two_processes_with_split_banks(flags, tmp_path):
    """`all` negatives and a model without batch statistics: two processes are one, while training and after a stop."""
    environment = {k: v for k, v in os.environ.items() if k not in ('RANK', 'WORLD_SIZE', 'LOCAL_RANK')}
    two = f'train.py {WORDS} --split-banks -b 16 --epochs 2 --output {tmp_path} --experiment two'
    ended = subprocess.run(
        [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2', *two.split()],
        cwd=ROOT, env={**environment, 'OMP_NUM_THREADS': '1'}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr[-2000:]
    alone = Trainer(flags(WORDS, f'-b 32 --epochs 3 --output {tmp_path} --experiment one'))
    alone.fit(quiet=True)
    run = tmp_path / 'two'
    weights = [load_file(folder / 'weights' / 'epoch-0001.safetensors') for folder in (run, tmp_path / 'one')]
    for key in weights[0]:
        assert torch.allclose(weights[0][key], weights[1][key], atol=1e-6), key

    state = run / 'state' / 'epoch-0001'
    saved = {name: rows_of(state, name)[0] for name in alone.task.banks()}
    assert not any(name.endswith('bank') for name in load_file(state / 'model.safetensors'))
    with pytest.raises(UserError, match='--resume .*: was saved with --split-banks; go on in the same way'):
        Trainer(flags(WORDS, f'-b 32 --epochs 3 --resume {state}'))
    again = Trainer(flags(WORDS, f'--split-banks -b 32 --epochs 3 --resume {state}'))
    for name, bank in again.task.banks().items():
        assert torch.equal(bank, saved[name]), name
        assert not torch.equal(bank, alone.task.banks()[name])  # which is an epoch further
    again.fit(quiet=True)
    for key, value in alone.model.state_dict().items():
        assert torch.allclose(again.model.state_dict()[key], value, atol=1e-6), key
    assert rows_of(run / 'state' / 'epoch-0002', 'instance.bank')[1] == 1
    with pytest.raises(UserError, match='was saved without --split-banks'):
        Trainer(flags(WORDS, f'--split-banks -b 32 --epochs 4 --resume {tmp_path / "one"}'))
