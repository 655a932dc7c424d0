"""The weights in the package: they load with no network, and give the numbers that stand in their catalog."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file

import ctc_timm
from ctc_timm.models import catalog
from runs import ROOT

ENTRIES = {**catalog.load(catalog.SHIPPED), **catalog.load(catalog.BASELINES)}
CIFAR100 = ROOT.parent / 'shared' / 'data' / 'cifar100'


def documented(name: str, metric: str, dataset: str) -> float:
    rows = {(row['metric'], row['dataset'].split()[0]): row['value'] for row in ENTRIES[name].results[::-1]}
    return float(rows[metric, dataset])


@pytest.mark.parametrize('name', ENTRIES)
def test_they_load_with_no_network(name, monkeypatch):
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    entry = ENTRIES[name]
    assert hashlib.sha256(Path(entry.path).read_bytes()).hexdigest() == entry.sha256
    stored = load_file(entry.path)
    state = timm.create_model(name, pretrained=True).state_dict()
    assert state.keys() == stored.keys()
    for key, value in stored.items():
        assert value.dtype in (torch.float16, torch.int64)
        assert torch.equal(state[key], value.to(state[key].dtype)), key
    architecture = timm.create_model(entry.architecture, num_classes=entry.pretrained_cfg['num_classes'])
    architecture.load_state_dict(state)  # plain timm's names and shapes


def test_ctc_and_plain_training_are_both_there():
    assert {name.partition('.')[0].endswith('_ctc') for name in ENTRIES} == {True, False}
    assert sum(Path(entry.path).stat().st_size for entry in ENTRIES.values()) < 5 * 2**20


@pytest.mark.parametrize('name', ENTRIES)
def test_the_probe_gives_the_documented_transfer(name, tmp_path):
    """Of real images that come with a library: scikit-learn's handwritten digits."""
    options = dict(probes=['ridge'], no_cache=True, workers=0, batch_size=250, output=str(tmp_path))
    rows = ctc_timm.linear_probe(model=name, target=['digits'], **options)
    assert rows[0]['top1'] == pytest.approx(documented(name, 'ridge probe top1', 'digits'), abs=0.3)  # an image of 360


@pytest.mark.skipif(not CIFAR100.is_dir(), reason='needs the test split of CIFAR-100')
@pytest.mark.parametrize('name', [name for name in ENTRIES if name.endswith('10000_32px')])
def test_validation_gives_the_documented_accuracy(name, tmp_path):
    options = dict(split='test', workers=0, batch_size=250, output=str(tmp_path))
    found = ctc_timm.validate(model=name, dataset=f'hfds/{CIFAR100}', **options)
    assert found['top1'] == pytest.approx(documented(name, 'top1', 'cifar100'), abs=0.05)
