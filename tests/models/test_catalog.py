"""Catalog files: what is taken, what is refused, and what damage can do."""

from __future__ import annotations

import copy
import json
import os
import random
from pathlib import Path
from typing import Any

import pytest
from timm.models import PretrainedCfg

from ctc_timm.models import catalog as catalog
from ctc_timm.models.catalog import Entry, load, load_all, parse, save
from ctc_timm.utils.errors import UserError

FACTS: dict[str, Any] = {
    'num_classes': 10,
    'input_size': [3, 32, 32],
    'fixed_input_size': False,
    'interpolation': 'bicubic',
    'crop_pct': 0.9,
    'crop_mode': 'center',
    'mean': [0.1, 0.2, 0.3],
    'std': [0.4, 0.5, 0.6],
    'pool_size': None,
    'first_conv': 'conv1',
    'classifier': ['head', 'head_dist'],
}
AT_HUB: dict[str, Any] = {
    'hub_id': 'alice/resnet18_ctc.a',
    'revision': '0123456789abcdef' * 2 + '01234567',
    'filename': 'model.safetensors',
    'sha256': 'ab' * 32,
    'pretrained_cfg': FACTS,
    'model_args': {'in_chans': 3},
    'license': 'mit',
    'results': [{'dataset': 'digits', 'metric': 'top-1 %', 'value': 97.5}],
    'recipe': {'epochs': 3},
}
HERE: dict[str, Any] = {'path': 'runs/a/best.safetensors', 'sha256': 'cd' * 32, 'pretrained_cfg': FACTS}
NAME = 'resnet18_ctc.a'


def changed(entry: dict[str, Any], *keys: str, to: Any) -> dict[str, Any]:
    """A copy with one thing in it different."""
    copied = copy.deepcopy(entry)
    inside = copied
    for key in keys[:-1]:
        inside = inside[key]
    inside[keys[-1]] = to
    return copied


def write(file: Path, models: dict[str, Any]) -> Path:
    file.write_text(json.dumps({'version': 1, 'models': models}))
    return file


def test_the_shipped_catalog_is_sound() -> None:
    entries = load(catalog.SHIPPED)
    for name, entry in entries.items():
        assert name == entry.name
        assert entry.hub_id or Path(entry.path).is_relative_to(catalog.SHIPPED.parent)  # of the package itself


def test_an_entry_says_what_timm_needs(tmp_path: Path) -> None:
    cfg = parse(NAME, AT_HUB, 'zoo.json').pretrained_cfg()
    assert (cfg.hf_hub_id, cfg.hf_hub_filename) == (f'alice/resnet18_ctc.a@{AT_HUB["revision"]}', 'model.safetensors')
    assert (cfg.architecture, cfg.tag, cfg.license, cfg.file) == ('resnet18_ctc', 'a', 'mit', None)
    for key, value in FACTS.items():
        assert getattr(cfg, key) == (tuple(value) if isinstance(value, list) else value)
    given = {*FACTS, 'hf_hub_id', 'hf_hub_filename', 'architecture', 'tag', 'license'}
    for key, value in vars(PretrainedCfg()).items():
        assert key in given or getattr(cfg, key) == value

    local = parse('resnet18_ctc', HERE, 'zoo.json', tmp_path).pretrained_cfg()
    assert (local.file, local.hf_hub_id, local.tag) == (str(tmp_path / HERE['path']), None, None)


def test_what_is_saved_is_what_is_loaded(tmp_path: Path) -> None:
    entries = [parse(NAME, AT_HUB, '', None), parse('resnet18_ctc', HERE, '', tmp_path / 'zoo')]
    elsewhere = Entry('vit_tiny_patch16_224_ctc.b', FACTS, 'ef' * 32, path='/models/b.safetensors')
    file = tmp_path / 'zoo' / 'zoo.json'
    save(file, [*entries, elsewhere])
    assert load(file) == {entry.name: entry for entry in [*entries, elsewhere]}
    written = json.loads(file.read_text())['models']
    assert list(written) == sorted(written)
    assert written['resnet18_ctc']['path'] == HERE['path']  # what lies beside the catalog moves with it
    assert written['vit_tiny_patch16_224_ctc.b']['path'] == '/models/b.safetensors'
    file.parent.rename(tmp_path / 'moved')
    assert load(tmp_path / 'moved' / 'zoo.json')['resnet18_ctc'].path == str(tmp_path / 'moved' / HERE['path'])
    assert not list(tmp_path.rglob('*.tmp'))


@pytest.mark.parametrize(
    'name',
    ['resnet18', 'resnet18_ctc.', '../resnet18_ctc', 'resnet18_ctc.a/b', 'resnet18_ctc.a b', 'a\n_ctc', '_ctc', ''],
)
def test_names_of_no_model(name: str) -> None:
    with pytest.raises(UserError, match='no name of a model'):
        parse(name, AT_HUB, 'zoo.json')


@pytest.mark.parametrize(
    ('entry', 'match'),
    [
        (3, 'a mapping'),
        ({k: v for k, v in AT_HUB.items() if k != 'sha256'}, "missing or unknown: 'sha256'"),
        ({k: v for k, v in AT_HUB.items() if k != 'revision'}, "'revision'"),
        ({**AT_HUB, 'path': 'x.safetensors'}, "'path'"),
        ({**AT_HUB, 'meann': [1]}, "'meann'"),
        ({**HERE, 'url': 'http://x'}, "'url'"),
        (changed(AT_HUB, 'sha256', to='AB' * 32), '64 hexadecimal digits'),
        (changed(AT_HUB, 'sha256', to=''), '64 hexadecimal digits'),
        (changed(AT_HUB, 'revision', to='main'), 'a whole commit'),
        (changed(AT_HUB, 'revision', to='0' * 39), 'a whole commit'),
        (changed(AT_HUB, 'hub_id', to='../../etc/x'), 'USER/NAME'),
        (changed(AT_HUB, 'hub_id', to='alice/x@main'), 'USER/NAME'),
        (changed(AT_HUB, 'hub_id', to='alice'), 'USER/NAME'),
        (changed(AT_HUB, 'filename', to='model.bin'), 'a .safetensors file'),
        (changed(AT_HUB, 'filename', to='../model.safetensors'), 'a .safetensors file'),
        (changed(HERE, 'path', to='model.pth'), 'a .safetensors file'),
        (changed(HERE, 'path', to='a\0.safetensors'), 'a .safetensors file'),
        (changed(AT_HUB, 'model_args', to=[]), 'a mapping'),
        (changed(AT_HUB, 'model_args', 'pretrained_cfg_overlay', to={'file': '/x'}), 'may not set'),
        (changed(AT_HUB, 'model_args', 'checkpoint_path', to='/x'), 'may not set'),
        (changed(AT_HUB, 'model_args', 'a b', to=1), 'may not set'),
        (changed(AT_HUB, 'recipe', to=''), 'a mapping'),
        (changed(AT_HUB, 'results', to=[{'dataset': 'x'}]), 'dataset, metric and value'),
        (changed(AT_HUB, 'results', to=[{'dataset': '\x1b[2J', 'metric': 'm', 'value': 1}]), 'short texts|dataset'),
        (changed(AT_HUB, 'results', to=[{'dataset': 'd', 'metric': 'm', 'value': '1'}]), 'dataset, metric and value'),
        (changed(AT_HUB, 'pretrained_cfg', to=None), 'a mapping'),
        (changed(AT_HUB, 'pretrained_cfg', to={}), 'has no num_classes'),
        (changed(AT_HUB, 'pretrained_cfg', 'file', to='/x'), "has no 'file'"),
        (changed(AT_HUB, 'pretrained_cfg', 'custom_load', to=True), "has no 'custom_load'"),
        (changed(AT_HUB, 'pretrained_cfg', 'num_classes', to=0), 'num_classes cannot be 0'),
        (changed(AT_HUB, 'pretrained_cfg', 'num_classes', to=True), 'num_classes cannot be'),
        (changed(AT_HUB, 'pretrained_cfg', 'input_size', to=[3, 32]), 'input_size cannot be'),
        (changed(AT_HUB, 'pretrained_cfg', 'input_size', to=[3, 32, -1]), 'input_size cannot be'),
        (changed(AT_HUB, 'pretrained_cfg', 'mean', to=[0.1, 0.2]), 'of the same length'),
        (changed(AT_HUB, 'pretrained_cfg', 'mean', to=['a']), 'mean cannot be'),
        (changed(AT_HUB, 'pretrained_cfg', 'mean', to=[float('nan')] * 3), 'mean cannot be'),
        (changed(AT_HUB, 'pretrained_cfg', 'std', to=[0, 1, 1]), 'std cannot be'),
        (changed(AT_HUB, 'pretrained_cfg', 'crop_pct', to=float('inf')), 'crop_pct cannot be'),
        (changed(AT_HUB, 'pretrained_cfg', 'interpolation', to='<b>'), 'interpolation cannot be'),
        (changed(AT_HUB, 'pretrained_cfg', 'classifier', to='__import__("os")'), 'classifier cannot be'),
        (changed(AT_HUB, 'pretrained_cfg', 'first_conv', to=[1]), 'first_conv cannot be'),
    ],
)
def test_entries_that_are_refused(entry: Any, match: str) -> None:
    with pytest.raises(UserError, match=match) as caught:
        parse(NAME, entry, 'some/zoo.json')
    assert 'some/zoo.json' in str(caught.value) and repr(NAME) in str(caught.value) and '\n' not in str(caught.value)


@pytest.mark.parametrize(
    'content',
    [
        '',
        '[]',
        'null',
        '{"version": 2, "models": {}}',
        '{"version": 1}',
        '{"version": 1, "models": []}',
        '{"version": 1, "models": {}, "more": 1}',
        '{"version": 1, "models": {}, "models": {}}',
        '[' * 100_000,
        '\ufeff{}',
    ],
)
def test_files_that_are_no_catalog(content: str, tmp_path: Path) -> None:
    file = tmp_path / 'zoo.json'
    file.write_text(content, encoding='utf-8')
    with pytest.raises(UserError, match=r'zoo\.json: .*not a catalog|must be a mapping') as caught:
        load(file)
    assert '\n' not in str(caught.value)
    file.write_bytes(b'\xff\xfe')
    with pytest.raises(UserError, match='cannot be read'):
        load(file)


def test_several_catalogs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = write(tmp_path / 'one.json', {NAME: AT_HUB, 'resnet18_ctc.b': HERE})
    mirror = {**HERE, 'sha256': AT_HUB['sha256']}  # the same weights, in a folder
    two = write(tmp_path / 'two.json', {NAME: mirror})
    clash = write(tmp_path / 'clash.json', {NAME: HERE, 'resnet18_ctc.c': HERE})

    def named(*files: Path) -> tuple[dict[str, Entry], list[UserError]]:
        monkeypatch.setenv(catalog.ENVIRONMENT, os.pathsep.join(map(str, files)))
        entries, problems = load_all()
        return {name: entry for name, entry in entries.items() if name not in shipped}, problems

    shipped = load(catalog.SHIPPED)
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


def test_damage_is_an_error_or_harmless(tmp_path: Path) -> None:
    """Random damage to a catalog: it is refused, or still names the same bytes by the same hash and commit."""
    file = write(tmp_path / 'zoo.json', {NAME: AT_HUB, 'resnet18_ctc.b': HERE})
    whole = file.read_bytes()
    chance = random.Random(0)
    refused = kept = 0
    for _ in range(500):
        damaged = bytearray(whole)
        for _ in range(chance.randint(1, 3)):
            damaged[chance.randrange(len(damaged))] ^= 1 << chance.randrange(8)
        file.write_bytes(damaged)
        try:
            entries = load(file)
        except UserError as error:
            assert '\n' not in str(error)
            refused += 1
        else:
            assert all(catalog.NAME.fullmatch(name) for name in entries)
            for entry in entries.values():  # every load compares the file's hash with an entry's
                assert len(entry.sha256) == 64 and (entry.path or len(entry.revision) == 40)
            kept += 1
    assert refused > 100 and kept > 10


@pytest.mark.parametrize(
    ('text', 'sound'),
    [
        ('alice/resnet50_ctc.a', True),
        ('a-b/c_d.e-f', True),
        ('alice', False),
        ('alice/b/c', False),
        ('alice/..', False),
        ('../alice', False),
        ('alice/a--b', False),
        ('alice/a..b', False),
        ('alice/.a', False),
        ('alice/a.', False),
        ('alice/a\n', False),
        ('alice/' + 'a' * 91, False),
        ('alice/a@main', False),
        (None, False),
    ],
)
def test_repo_ids(text: Any, sound: bool) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    assert catalog.is_repo_id(text) is sound
    if sound:
        validate_repo_id(text)
    elif text and text.count('/') > 1:
        with pytest.raises(HFValidationError):
            validate_repo_id(text)
