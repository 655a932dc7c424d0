"""What the tests of security share: a Hub on loopback with processes that talk to it, and a run made by hand."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import timm
import torch
import yaml
from safetensors.torch import save_file
from timm.models._hub import save_config_for_hf

import ctc_timm  # noqa: F401  (registers the models)


@pytest.fixture(scope='session')
def untrained(tmp_path_factory):
    """A run as training leaves it, of untrained weights."""
    run = tmp_path_factory.mktemp('untrained')
    (run / 'weights').mkdir()
    torch.manual_seed(0)
    model = timm.create_model('test_resnet', num_classes=10, in_chans=1)
    for file in ('best', 'last', 'weights/epoch-0000'):
        save_file(model.state_dict(), run / f'{file}.safetensors', metadata={'format': 'pt'})
    config = {'input_size': (1, 16, 16), 'mean': (0.3,), 'std': (0.4,)}
    save_config_for_hf(model, str(run / 'config.json'), data_config=config)
    args = {'dataset': 'digits', 'val_split': 'validation[:32]', 'mode': 'vanilla', 'model': 'test_resnet'}
    (run / 'args.yaml').write_text(yaml.safe_dump(args))
    (run / 'metrics.jsonl').write_text('')
    return run


@pytest.fixture
def make_run(untrained, tmp_path):
    """A copy of that run, with arguments of one's own."""

    def make(name: str = 'mine', **args: object) -> Path:
        run = Path(shutil.copytree(untrained, tmp_path / 'runs' / name))
        known = yaml.safe_load((run / 'args.yaml').read_text())
        (run / 'args.yaml').write_text(yaml.safe_dump({**known, **args}))
        return run

    return make
