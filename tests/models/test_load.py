"""`<arch>_ctc` names and the Hub: what is found, in which order, what is refused, and what is left behind."""

from __future__ import annotations

import hashlib
import json
import os
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load, save, save_file
from timm.models._hub import save_config_for_hf

import ctc_timm
from ctc_timm.api import recipe_settings
from ctc_timm.hub.collect import add
from ctc_timm.models.catalog import Entry
from ctc_timm.models.download import HubError, fetch, translate_errors
from ctc_timm.models.registry import _with_weights
from ctc_timm.utils.files import sha256
from hub_client import BOB, IMAGES, IN_THREADS, Client, logits_of
from hub_server import Blob, Repo

SETTINGS = recipe_settings()
NAME = 'test_resnet_ctc.digits'
REPO = f'alice/{NAME}'

# Loads what is named, saves the logits of fixed images, and prints where the weights are said to be from.
LOAD = f"""
import sys, json, numpy, torch, timm, ctc_timm
options = json.loads(sys.argv[2]) if len(sys.argv) > 2 else {{}}
model = timm.create_model(sys.argv[1], pretrained=True, **options).eval()
numpy.save('logits.npy', model({IMAGES}).detach().numpy())
print(model.pretrained_cfg.get('hf_hub_id') or model.pretrained_cfg.get('file'))
"""
TRY = IN_THREADS.replace('WORK', 'timm.create_model(name, pretrained=True) and ""')


def catalog(file: Path, name: str, repo: Repo, **changes: object) -> Path:
    """A catalog of one entry, written by hand."""
    head = repo.at()
    config = json.loads(head.files['config.json'].data)
    entry: dict[str, Any] = {key: config[key] for key in ('pretrained_cfg', 'model_args')}
    entry |= {'hub_id': repo.id, 'revision': head.oid, 'filename': 'model.safetensors'}
    entry |= {'sha256': head.files['model.safetensors'].sha256, **changes}
    entry = {key: value for key, value in entry.items() if value is not None}
    file.write_text(json.dumps({'version': 1, 'models': {name: entry}}))
    return file


def doubled(blob: Blob) -> Blob:
    """The same weights, times two."""
    return Blob(save({key: value * 2 for key, value in load(blob.data).items()}), lfs=True)


def cached(client: Client) -> list[Path]:
    """Weights that a later load would take."""
    return list(Path(client.env['HF_HOME']).rglob('snapshots/*/model.safetensors'))


def same_logits(client: Client, run: Path) -> bool:
    return np.array_equal(np.load(client.folder / 'logits.npy'), logits_of(run))


def test_the_namespace_gives_the_published_weights_and_the_cache_keeps_them(client, hub, shelve, trained):
    head = shelve(REPO).at()
    done = client(LOAD, NAME, CTC_TIMM_NAMESPACE='alice')
    assert (done.code, done.last) == (0, f'{REPO}@{head.oid}'), done.err
    assert same_logits(client, trained)

    asked = len(hub.requests)
    done = client(LOAD, NAME, CTC_TIMM_NAMESPACE='alice', HF_HUB_OFFLINE='1')
    assert (done.code, done.last, len(hub.requests)) == (0, f'{REPO}@{head.oid}', asked), done.err
    assert same_logits(client, trained)

    done = client(LOAD, NAME, '{"cache_dir": "elsewhere"}', CTC_TIMM_NAMESPACE='alice', HF_HUB_OFFLINE='1')
    assert done.code == 1 and 'HF_HUB_OFFLINE' in done.err
    done = client(LOAD, NAME, '{"cache_dir": "elsewhere"}', CTC_TIMM_NAMESPACE='alice', HF_HOME='unused')
    assert done.code == 0 and not list(client.folder.glob('unused/**/*.safetensors')), done.err
    assert list(client.folder.glob('elsewhere/models--alice--*/snapshots/*/model.safetensors'))


def test_the_order_of_sources(client, hub, shelve, tmp_path, trained):
    first, second = shelve('alice/elsewhere'), shelve(REPO)
    shelve(REPO, {'model.safetensors': doubled(second.at().files['model.safetensors'])})
    where = {'CTC_TIMM_ZOO': str(catalog(tmp_path / 'zoo.json', NAME, first)), 'CTC_TIMM_NAMESPACE': 'alice'}

    done = client(LOAD, NAME, **where)
    assert done.last.startswith('alice/elsewhere@') and same_logits(client, trained), done.err
    assert not hub.asked(f'/{REPO}/')
    done = client(LOAD, NAME, CTC_TIMM_NAMESPACE='alice')
    assert done.last.startswith(f'{REPO}@') and not same_logits(client, trained), done.err

    before = len(hub.requests)
    done = client(TRY, NAME, 'test_resnet_ctc', 'resnet50_ctc')
    assert len(hub.requests) == before  # nobody's repo answers for ours
    for name, error in json.loads(done.out).items():
        arch = name.partition('_ctc')[0]
        assert f"no CTC weights are cataloged for '{name}': there is nothing for {arch} yet" in error
        assert f'`ctc-timm train --model {arch}`' in error and '`ctc-timm publish RUN --repo-id USER/' in error
    found = json.loads(client(TRY, 'test_resnet_ctc.other', 'test_vit_ctc', **where).out)
    assert f'there is {NAME}; alice/test_resnet_ctc.other: Repository not found' in found['test_resnet_ctc.other']
    assert NAME not in found['test_vit_ctc'] and not any('\n' in error for error in found.values())


def test_timm_knows_the_catalog(client, shelve, tmp_path):
    one = catalog(tmp_path / 'one.json', 'test_resnet_ctc.one', shelve(REPO))
    two = catalog(tmp_path / 'two.json', 'test_vit_ctc.two', shelve(REPO))
    code = """
import json, timm, ctc_timm
listed = timm.list_pretrained('test_*_ctc*')  # of the weights in the package, none has such a name
assert listed == ['test_resnet_ctc.one', 'test_vit_ctc.two'], listed
assert timm.is_model_pretrained('test_resnet_ctc') and not timm.is_model_pretrained('resnet50_ctc')
cfg = timm.get_pretrained_cfg('test_resnet_ctc')
assert cfg == timm.get_pretrained_cfg('test_resnet_ctc.one') and (cfg.tag, cfg.num_classes) == ('one', 12)
assert cfg.input_size == (3, 16, 16) and cfg.mean == (0.3, 0.3, 0.3) and cfg.hf_hub_filename == 'model.safetensors'
model = timm.create_model('test_resnet_ctc')
assert model.num_classes == 12  # the config of the default weights, as in timm
given = {'state_dict': model.state_dict()}  # a source that the user gives comes first; nothing is fetched
resolved = timm.models.resolve_model_input_args('test_resnet_ctc', {'img_size': None}, pretrained_cfg_overlay=given)
again = timm.create_model(pretrained=True, **resolved)  # as timm's train script makes it
assert all((again.state_dict()[key] == value).all() for key, value in given['state_dict'].items())
print(cfg.hf_hub_id)
"""
    done = client(code, CTC_TIMM_ZOO=f'{one}{os.pathsep}{two}', HF_HUB_OFFLINE='1')
    assert done.code == 0 and done.last.startswith(f'{REPO}@'), done.err


@pytest.mark.parametrize('place', ['hub', 'run'])
def test_a_wrong_hash_is_refused_and_leaves_nothing(place, client, shelve, trained, tmp_path):
    repo, file = shelve(REPO), trained / 'best.safetensors'
    right, changes = repo.at().files['model.safetensors'].sha256, {}
    if place == 'run':
        right = hashlib.sha256(file.read_bytes()).hexdigest()
        changes = {'path': str(file), 'hub_id': None, 'revision': None, 'filename': None}
    for digest, code in (('0' * 64, 1), (right, 0)):
        zoo = catalog(tmp_path / 'zoo.json', NAME, repo, sha256=digest, **changes)
        done = client(LOAD, NAME, CTC_TIMM_ZOO=str(zoo))
        assert done.code == code, done.err
        if code:
            assert 'hash differs' in done.err or 'sha256 differs' in done.err
            assert not cached(client) and not list(tmp_path.rglob(f'blobs/{right}'))
    assert file.is_file() and same_logits(client, trained)  # what is not in the cache is not ours to remove


def test_every_failure_is_one_line_and_a_later_load_works(client, hub, shelve, export, tmp_path):
    config, boom = json.loads(export['config.json'].data), tmp_path / 'executed'
    weights = Blob(b"cposix\nsystem\n(S'touch " + str(boom).encode() + b"'\ntR.", lfs=True)

    def changed(**values: object) -> dict[str, Blob | None]:
        return {'config.json': Blob(json.dumps({**config, **values}).encode())}

    damaged, retry = (
        'file that was published (its hash differs) and was removed',
        'the network and HF_ENDPOINT, then retry',
    )
    faults: dict[str, tuple[int | str, str]] = {
        '401': (401, 'made to answer 401 (HTTP 401); log in with `hf auth login`'),
        '403': (403, 'made to answer 403 (HTTP 403); use a token that may do this'),
        '404': (404, '(HTTP 404); check the name'),
        '429': (429, '(HTTP 429); retry later'),
        '500': (500, '(HTTP 500); retry later'),
        'gated': ('gated', 'Access to this model is restricted.'),
        'stall': ('stall', f'timed out; check {retry}'),
        'break': ('break', f'check {retry}'),
        'corrupt': ('corrupt', damaged),
        'corruptconfig': ('corrupt', damaged),
    }
    files: dict[str, tuple[dict[str, Blob | None], str]] = {  # in place of the run's
        'noweights': ({'model.safetensors': None, 'pytorch_model.bin': weights}, 'Entry not found (HTTP 404)'),
        'pickle': ({'model.safetensors': weights}, 'does not fit test_resnet: '),
        'notjson': ({'config.json': Blob(b'[1')}, 'config.json: no config of timm'),
        'otherarch': (changed(architecture='resnet18'), "holds weights of 'resnet18', not of test_resnet"),
        'overlay': (changed(model_args={'pretrained_cfg_overlay': {}}), "may not set 'pretrained_cfg_overlay'"),
        'otherclasses': (changed(num_classes=3), 'does not fit test_resnet: '),
    }
    names = {case: f'test_resnet_ctc.{case}' for case in (*faults, *files)}
    for case, name in names.items():
        shelve(f'alice/{name}', files.get(case, ({}, ''))[0])
    for case, (kind, _) in faults.items():
        at_storage = case in ('stall', 'break', 'corrupt')
        hub.fail(f'GET /get/.*/{names[case]}/model' if at_storage else f'/{names[case]}/resolve/.*config', kind)

    where = {'CTC_TIMM_NAMESPACE': 'alice', 'HF_HUB_DOWNLOAD_TIMEOUT': '1', 'HF_HUB_ETAG_TIMEOUT': '5'}
    found = json.loads(client(TRY, *names.values(), **where).out)
    hub.released.set()
    for case, (_, text) in (*faults.items(), *files.items()):
        error = found[names[case]]
        assert text in error and names[case] in error and '\n' not in error, (case, error)
    kept = {path.parts[-4] for path in cached(client)}
    assert kept == {f'models--alice--{names[case]}' for case in ('pickle', 'otherclasses')}
    assert not boom.exists()

    hub.faults.clear()
    again = json.loads(client(TRY, *(names[case] for case in faults), **where).out)
    assert set(again.values()) == {''}


@pytest.mark.parametrize('file', ['model', 'config'])
def test_a_cache_without_links_is_checked_too(client, hub, shelve, trained, file):
    """There the names of the cached files do not tell what the Hub announced."""
    shelve(REPO)
    where = {'CTC_TIMM_NAMESPACE': 'alice', 'HF_HUB_DISABLE_SYMLINKS': '1', 'HF_HUB_DISABLE_SYMLINKS_WARNING': '1'}
    hub.fail('GET /get/.*/model' if file == 'model' else '/resolve/.*config', 'corrupt')
    done = client(LOAD, NAME, **where)
    assert done.code == 1 and 'file that was published (its hash differs) and was removed' in done.err, done.err
    assert not cached(client) or file == 'config'
    hub.faults.clear()
    for offline in ({}, {'HF_HUB_OFFLINE': '1'}):
        done = client(LOAD, NAME, **where, **offline)
        assert done.code == 0 and same_logits(client, trained), done.err
    assert not any(path.is_symlink() for path in cached(client))


def test_the_bytes_that_were_checked_are_loaded(trained, tmp_path, monkeypatch):
    """A file that is exchanged between the check and the load is loaded as it was checked."""
    file = tmp_path / 'w.safetensors'
    file.write_bytes((trained / 'best.safetensors').read_bytes())
    expected = load(file.read_bytes())
    config = json.loads((trained / 'config.json').read_text())
    entry = Entry('test_resnet_ctc.a', config['pretrained_cfg'], sha256(file), path=str(file))

    def exchanged(*args: Any) -> bytes:
        content = fetch(*args)
        file.write_bytes(save({name: tensor * 0 for name, tensor in expected.items()}))
        return content

    monkeypatch.setattr('ctc_timm.models.download.fetch', exchanged)
    create = partial(timm.create_model, 'test_resnet', pretrained=True, num_classes=12)
    model = _with_weights(create, entry.to_timm(), entry, None)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
    assert 'state_dict' not in model.pretrained_cfg


def test_errors_keep_the_words_of_their_cause():
    full = OSError(28, 'No space left\non device')
    for cause, words in ((full, '[Errno 28] No space left on device'), (None, 'no file')):
        with pytest.raises(HubError) as caught, translate_errors('alice/x'):
            raise LocalEntryNotFoundError('no file') from cause
        assert str(caught.value) == f'alice/x: {words}' and isinstance(caught.value, RuntimeError)
    with pytest.raises(KeyError), translate_errors('alice/x'):
        raise KeyError('a defect')


def test_a_damaged_cache_is_not_used_twice(client, shelve, trained):
    shelve(REPO)
    assert client(LOAD, NAME, CTC_TIMM_NAMESPACE='alice').code == 0
    (file,) = cached(client)
    whole = file.read_bytes()
    file.resolve().write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    done = client(LOAD, NAME, CTC_TIMM_NAMESPACE='alice', HF_HUB_OFFLINE='1')
    assert done.code == 1 and 'was removed from the cache' in done.err and not cached(client)
    assert client(LOAD, NAME, CTC_TIMM_NAMESPACE='alice').code == 0 and same_logits(client, trained)


def test_private_repos_need_their_owners_token(client, hub, anyone, shelve):
    shelve(REPO, private=True)
    assert client(LOAD, NAME, CTC_TIMM_NAMESPACE='alice').code == 0
    assert hub.asked('GET /get/')  # the storage refuses every request that has a token
    for token, text in (('', 'not found'), (BOB, 'not found'), ('hf_nobodyKnowsThisOneHere', 'set a valid HF_TOKEN')):
        done = anyone(token, cache='theirs')(LOAD, NAME, CTC_TIMM_NAMESPACE='alice')
        assert done.code == 1 and text in done.err and 'hf_nobody' not in done.err, done.err


def test_a_revision_pins(client, hub, shelve, export, trained):
    repo = shelve(REPO)
    repo.refs['v1.0'] = repo.refs['main']
    shelve(REPO, {'model.safetensors': doubled(export['model.safetensors'])})
    for name, old in ((f'{NAME}@v1.0', True), (f'{NAME}@{repo.refs["v1.0"]}', True), (NAME, False)):
        done = client(LOAD, name, CTC_TIMM_NAMESPACE='alice')
        assert done.last == f'{REPO}@{repo.refs["v1.0" if old else "main"]}', done.err
        assert same_logits(client, trained) is old
    assert 'Invalid rev id: v2 (HTTP 404)' in client(LOAD, f'{NAME}@v2', CTC_TIMM_NAMESPACE='alice').err


@pytest.mark.parametrize('namespace', ['../..', 'alice/bob', 'a@b', 'alice--bob', '-', 'a b', 'a' * 20 + '.'])
def test_a_namespace_is_one_word(namespace, monkeypatch):
    monkeypatch.setenv('CTC_TIMM_NAMESPACE', namespace)
    with pytest.raises(ctc_timm.UserError, match='must be the name of a user or an organization'):
        timm.create_model(NAME, pretrained=True)


def test_a_broken_catalog_stops_loads_and_nothing_else(client, shelve, tmp_path):
    good, bad = catalog(tmp_path / 'good.json', NAME, shelve(REPO)), tmp_path / 'bad.json'
    code = f"""
import timm, ctc_timm
assert timm.create_model('resnet10t_ctc').num_classes == 1000
for name in ('{NAME}', 'resnet10t_ctc'):
    try: timm.create_model(name, pretrained=True)
    except ctc_timm.UserError as error: print(error)
"""
    for content, warned in ((None, False), ('{', True)):
        if content is not None:
            bad.write_text(content)
        done = client(code, CTC_TIMM_ZOO=f'{good}{os.pathsep}{bad}')
        lines = done.out.splitlines()
        assert len(lines) == 2 and all(str(bad) in line and 'CTC_TIMM_ZOO' in line for line in lines), done.err
        assert (str(bad) in done.err) is warned  # a catalog still to be made is nobody's mistake


def test_arguments_mean_what_they_mean_in_timm(client, tmp_path):
    """Of a cataloged run, against plain timm's `local-dir:` of the same folder, and in what is exported later."""
    for arch, options in {
        'test_resnet': {'in_chans': 1, 'num_classes': 7},
        'test_vit': {'img_size': 32, 'num_classes': 5, 'class_token': False, 'global_pool': 'avg'},
        'test_convnext': {'num_classes': 4, 'act_layer': 'relu'},
        'cifar_resnet20': {'num_classes': 6},
    }.items():
        run, model = tmp_path / arch, timm.create_model(arch, **options)
        run.mkdir()
        save_file(model.state_dict(), run / 'best.safetensors')
        save_config_for_hf(model, run / 'config.json')
        add(run, tmp_path / 'zoo.json', SETTINGS, tag='mine')
    code = """
import json, sys, timm, torch, ctc_timm
from timm.models._hub import save_config_for_hf
cases = [{}, {'num_classes': 2}, {'in_chans': 1}, {'in_chans': 4}, {'features_only': True}, {'num_classes': 0},
         {'features_only': True, 'out_indices': (1, 2)}, {'drop_rate': 0.1}, {'img_size': 64}]
compared = 0
for arch in ('test_resnet', 'test_vit', 'test_convnext', 'cifar_resnet20'):
    for case in cases[:None if arch == 'test_vit' else -1]:
        models = []
        for name in (f'local-dir:{sys.argv[1]}/{arch}', f'{arch}_ctc.mine'):
            torch.manual_seed(9)  # of a new classifier
            models.append(timm.create_model(name, pretrained=True, **case).eval())
        plain, ours = (model.state_dict() for model in models)
        assert type(models[0]) is type(models[1]) and list(plain) == list(ours), (arch, case)
        assert all(torch.equal(plain[key], ours[key]) for key in plain), (arch, case)
        if not case.get('features_only'):
            exported = []
            for model in models:  # what a later export will say the model was built with
                save_config_for_hf(model, 'config.json')
                exported.append(json.load(open('config.json')))
            there, here = (config.pop('pretrained_cfg') for config in exported)
            assert here.pop('tag') == 'mine' and exported[0] == exported[1], (arch, case)
            assert all(there[key] == value for key, value in here.items()), (arch, case)
        compared += 1
print(compared)
"""
    done = client(code, str(tmp_path), CTC_TIMM_ZOO=str(tmp_path / 'zoo.json'), HF_HUB_OFFLINE='1')
    assert (done.code, done.last) == (0, '33'), done.err
