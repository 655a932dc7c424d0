"""Catalog files: what is taken, and what is refused."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path
from typing import Any

import pytest
import timm
from huggingface_hub.utils import validate_repo_id
from timm.models import PretrainedCfg

from ctc_timm.models import catalog
from ctc_timm.models.catalog import Entry, load, load_all, parse, save
from ctc_timm.models.pretrained_cfg import FIELDS
from ctc_timm.utils.errors import UserError

# An input and a shape as timm states them, with lists, texts, numbers and nothing.
_STATED = {k: v for k, v in timm.get_pretrained_cfg('deit_base_distilled_patch16_224').to_dict().items() if k in FIELDS}
CONFIG: dict[str, Any] = {**json.loads(json.dumps(_STATED)), 'mean': [0.1, 0.2, 0.3], 'std': [0.4, 0.5, 0.6]}
AT_HUB: dict[str, Any] = {
    'hub_id': 'alice/resnet18_ctc.a',
    'revision': '0123456789abcdef' * 2 + '01234567',
    'filename': 'model.safetensors',
    'sha256': 'ab' * 32,
    'pretrained_cfg': CONFIG,
    'model_args': {'in_chans': 3},
    'license': 'mit',
    'results': [{'dataset': 'digits', 'metric': 'top-1 %', 'value': 97.5}],
    'recipe': {'epochs': 3},
}
HERE: dict[str, Any] = {'path': 'runs/a/best.safetensors', 'sha256': 'cd' * 32, 'pretrained_cfg': CONFIG}
NAME = 'resnet18_ctc.a'


def changed(place: str, value: Any, entry: dict[str, Any] = AT_HUB) -> dict[str, Any]:
    """An entry with another value at a place such as 'pretrained_cfg/mean'; without it for None."""
    copied = inside = copy.deepcopy(entry)
    *keys, last = place.split('/')
    for key in keys:
        inside = inside[key]
    inside[last] = value
    if value is None:
        del inside[last]
    return copied


def write(file: Path, models: dict[str, Any]) -> Path:
    file.write_text(json.dumps({'version': 1, 'models': models}))
    return file


def test_an_entry_says_what_timm_needs(tmp_path):
    cfg = parse(NAME, AT_HUB, 'zoo.json').to_timm()
    assert (cfg.hf_hub_id, cfg.hf_hub_filename) == (f'alice/resnet18_ctc.a@{AT_HUB["revision"]}', 'model.safetensors')
    assert (cfg.architecture, cfg.tag, cfg.license, cfg.file) == ('resnet18_ctc', 'a', 'mit', None)
    for key, value in CONFIG.items():
        assert getattr(cfg, key) == (tuple(value) if isinstance(value, list) else value)
    known = {*CONFIG, 'hf_hub_id', 'hf_hub_filename', 'architecture', 'tag', 'license'}
    for key, value in vars(PretrainedCfg()).items():
        assert key in known or getattr(cfg, key) == value
    more = {'file': '/x', 'custom_load': True, 'url': 'http://x'}  # no place for weights
    assert parse(NAME, changed('pretrained_cfg', {**CONFIG, **more}), 'zoo.json').to_timm() == cfg

    for path in (HERE['path'], 'a/b..c/x.safetensors', str(tmp_path / 'x.safetensors')):
        local = parse('resnet18_ctc', {**HERE, 'path': path}, 'zoo.json', tmp_path).to_timm()
        assert (local.file, local.hf_hub_id, local.tag) == (str(tmp_path / path), None, None)


def test_what_is_saved_is_what_is_loaded(tmp_path):
    entries = [parse(NAME, AT_HUB, ''), parse('resnet18_ctc', HERE, '', tmp_path / 'zoo')]
    entries += [Entry('vit_tiny_patch16_224_ctc.b', CONFIG, 'ef' * 32, path='/models/b.safetensors')]
    file = tmp_path / 'zoo' / 'zoo.json'
    save(file, entries)
    assert load(file) == {entry.name: entry for entry in entries}
    written = json.loads(file.read_text())['models']
    assert list(written) == sorted(written)
    assert written['resnet18_ctc']['path'] == HERE['path']  # what lies beside the catalog moves with it
    assert written['vit_tiny_patch16_224_ctc.b']['path'] == '/models/b.safetensors'
    file.parent.rename(tmp_path / 'moved')
    assert load(tmp_path / 'moved' / 'zoo.json')['resnet18_ctc'].path == str(tmp_path / 'moved' / HERE['path'])
    assert not list(tmp_path.rglob('*.tmp'))


def test_names_of_no_model():
    odd = [
        'resnet18',
        'resnet18_ctc.',
        '../resnet18_ctc',
        'resnet18_ctc.a/b',
        'resnet18_ctc.a b',
        'a\n_ctc',
        '_ctc',
        '',
    ]
    for name in odd:
        with pytest.raises(UserError, match='no name of a model'):
            parse(name, AT_HUB, 'zoo.json')


@pytest.mark.parametrize(
    ('entry', 'match'),
    [
        (3, 'a mapping'),
        (changed('sha256', None), r"missing or unknown: \['sha256'\]"),
        (changed('revision', None), "'revision'"),
        (changed('path', 'x.safetensors'), "'path'"),
        (changed('meann', [1]), "'meann'"),
        (changed('revision', 'main'), 'a whole commit'),
        (changed('filename', 'model.bin'), 'a .safetensors file'),
        (changed('path', 'model.pth', HERE), 'a .safetensors file'),
        (changed('path', 'a\0.safetensors', HERE), 'a .safetensors file'),
        (changed('path', 'a\n/../x.safetensors', HERE), 'a .safetensors file'),
        (changed('model_args', []), 'a mapping'),
        (changed('model_args/pretrained_cfg_overlay', {'file': '/x'}), 'may not set'),
        (changed('model_args/checkpoint_path', '/x'), 'may not set'),
        (changed('model_args/a b', 1), 'may not set'),
        (changed('results', [{'dataset': 'x'}]), 'dataset, metric and value'),
        (changed('results', [{'dataset': '\x1b[2J', 'metric': 'm', 'value': 1}]), 'dataset, metric and value'),
        (changed('pretrained_cfg', 3), 'a mapping'),
        (changed('pretrained_cfg/num_classes', None), 'has no num_classes'),
        (changed('pretrained_cfg/num_classes', 0), 'num_classes cannot be 0'),
        (changed('pretrained_cfg/input_size', [3, 32, -1]), 'input_size cannot be'),
        (changed('pretrained_cfg/mean', [0.1, 0.2]), 'of the same length'),
        (changed('pretrained_cfg/mean', [float('nan')] * 3), 'mean cannot be'),
        (changed('pretrained_cfg/std', [1, 1, 0.0]), 'std cannot be'),
        (changed('pretrained_cfg/crop_pct', float('inf')), 'crop_pct cannot be'),
        (changed('pretrained_cfg/classifier', '__import__("os")'), 'classifier cannot be'),
    ],
)
def test_entries_that_are_refused(entry, match):
    with pytest.raises(UserError, match=match) as caught:
        parse(NAME, entry, 'some/zoo.json')
    assert 'some/zoo.json' in str(caught.value) and repr(NAME) in str(caught.value) and '\n' not in str(caught.value)


NO_CATALOG = ['', '[]', 'null', '{"version": 1}', '{"version": 2, "models": {}}', '[' * 100_000, '\ufeff{}', b'\xff']
NO_CATALOG += [f'{{"version": 1, "models": {rest}}}' for rest in ('[]', '{}, "more": 1', '{}, "models": {}')]


@pytest.mark.parametrize('content', NO_CATALOG)
def test_files_that_are_no_catalog(content, tmp_path):
    file = tmp_path / 'zoo.json'
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=r'zoo\.json: .*not a catalog|must be a mapping') as caught:
        load(file)
    assert '\n' not in str(caught.value)


def test_several_catalogs(tmp_path, monkeypatch):
    one = write(tmp_path / 'one.json', {NAME: AT_HUB, 'resnet18_ctc.b': HERE})
    mirror = {**HERE, 'sha256': AT_HUB['sha256']}  # the same weights, in a folder
    two = write(tmp_path / 'two.json', {NAME: mirror})
    clash = write(tmp_path / 'clash.json', {NAME: HERE, 'resnet18_ctc.c': HERE})
    shipped = load(catalog.SHIPPED)

    def named(*files: Path) -> tuple[dict[str, Entry], list[UserError]]:
        monkeypatch.setenv(catalog.ENVIRONMENT, os.pathsep.join(map(str, files)))
        entries, problems = load_all()
        return {name: entry for name, entry in entries.items() if name not in shipped}, problems

    entries, problems = named(one, two)
    assert list(entries) == [NAME, 'resnet18_ctc.b'] and not problems
    assert entries[NAME].path and not entries[NAME].hub_id
    entries, problems = named(one, clash)
    assert entries[NAME].hub_id and 'resnet18_ctc.c' not in entries
    assert len(problems) == 1 and 'clash.json' in str(problems[0]) and 'is other weights' in str(problems[0])
    entries, problems = named(tmp_path / 'none.json', one)
    assert len(entries) == 2 and len(problems) == 1 and isinstance(problems[0], catalog.NoCatalog)
    monkeypatch.setenv('HOME', str(tmp_path))
    monkeypatch.setenv(catalog.ENVIRONMENT, f'~/one.json{os.pathsep}{os.pathsep} ')
    assert catalog.named_files() == [one]


def test_repo_ids():
    for text in ('alice/resnet50_ctc.a', 'a-b/c_d.e-f'):
        assert catalog.is_repo_id(text) and not catalog.is_repo_id(f'{text}\n')
        validate_repo_id(text)
    odd = ['alice', 'alice/b/c', 'alice/..', '../b', 'alice/a--b', 'alice/a..b', 'alice/.a', 'alice/a.', 'a/b@c']
    assert not any(map(catalog.is_repo_id, [*odd, 'alice/' + 'a' * 91, None]))
