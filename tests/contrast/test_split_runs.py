"""Runs whose ranks shard the banks: the weights of one process, saved and continued by another number of them."""

import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from ctc_timm.contrast.sharding import BankShard
from ctc_timm.training.build import build_trainer
from ctc_timm.training.settings import TrainSettings
from ctc_timm.utils.errors import UserError
from ctc_timm.utils.settings import build
from runs import ROOT

SMALL = dict(
    model='test_vit', train_split='train[:160]', val_split='validation[:70]', img_size=16, mean=0.3, std=0.4,
    num_negatives=32, lr=0.01, negatives='all', temporal_start_epoch=1, workers=0, dataset='digits', smoothing=0.0,
)  # fmt: skip


def trainer_of(**values):
    return build_trainer(build(TrainSettings, {**SMALL, 'batch_size': 32, 'epochs': 3, **values}))


def rows_of(state, name):
    """A bank as the files of all ranks have it."""
    parts = [load_file(file)[name] for file in sorted(state.glob('banks_*.safetensors'))]
    whole = torch.empty(160, 128)
    for rank, part in enumerate(parts):
        whole[BankShard(160, rank, len(parts)).rows()] = part
    return whole, len(parts)


def test_two_processes_with_split_banks(tmp_path):
    """`all` negatives and a model without batch statistics: two processes are one, while training and after a stop."""
    environment = {k: v for k, v in os.environ.items() if k not in ('RANK', 'WORLD_SIZE', 'LOCAL_RANK')}
    # A deprecated call of several processes is an error.
    environment |= {'OMP_NUM_THREADS': '1', 'PYTHONWARNINGS': 'error:`torch.distributed:FutureWarning'}
    flags = [f'--{name.replace("_", "-")}={value}' for name, value in SMALL.items()]
    ended = subprocess.run(
        [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2', 'train.py', *flags,
         '--split-banks', '-b=16', '--epochs=2', f'--output={tmp_path}', '--experiment=two'],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr[-2000:]
    alone = trainer_of(output=str(tmp_path), experiment='one')
    alone.fit()
    run = tmp_path / 'two'
    weights = [load_file(folder / 'weights' / 'epoch-0001.safetensors') for folder in (run, tmp_path / 'one')]
    for key in weights[0]:
        assert torch.allclose(weights[0][key], weights[1][key], atol=1e-6), key

    state = run / 'state' / 'epoch-0001'
    saved = {name: rows_of(state, name)[0] for name in alone.task.banks()}
    assert not any(name.endswith('bank') for name in load_file(state / 'model.safetensors'))
    with pytest.raises(UserError, match='was saved with `split_banks=True`; continue in the same way'):
        trainer_of(resume=str(state))
    again = trainer_of(resume=str(state), split_banks=True)
    for name, bank in again.task.banks().items():
        assert torch.equal(bank, saved[name]), name
        assert not torch.equal(bank, alone.task.banks()[name])  # which is an epoch further
    again.fit()
    for key, value in alone.task.model.state_dict().items():
        assert torch.allclose(again.task.model.state_dict()[key], value, atol=1e-6), key
    assert rows_of(run / 'state' / 'epoch-0002', 'instance.bank')[1] == 1
    with pytest.raises(UserError, match='was saved without `split_banks=True`'):
        trainer_of(resume=str(tmp_path / 'one'), split_banks=True, epochs=4)
