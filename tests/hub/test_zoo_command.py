"""`ctc-timm zoo`: catalogs made of runs and of repos, and used without a network."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file

from ctc_timm.api import recipe_settings
from ctc_timm.hub.collect import add
from ctc_timm.models import catalog
from ctc_timm.utils.errors import UserError
from hub_server import Blob

SETTINGS = recipe_settings()
REPO = 'alice/test_resnet_ctc.digits'


def models(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text())['models']


def test_a_run_on_this_machine_without_a_network(client, hub, trained, tmp_path):
    run = Path(shutil.copytree(trained, tmp_path / 'zoo' / 'runs' / 'my run'))
    file = tmp_path / 'zoo' / 'zoo.json'
    done = client.command('zoo', 'add', str(run), '--tag', 'mine', '--zoo', str(file), HF_HUB_OFFLINE='1')
    assert done.code == 0 and f'export CTC_TIMM_ZOO={file}' in done.out, done.err
    entry = models(file)['test_resnet_ctc.mine']
    assert entry['path'] == 'runs/my run/best.safetensors' and entry['pretrained_cfg']['num_classes'] == 12
    assert entry['recipe']['model'] == 'test_resnet_ctc' and entry['recipe']['dataset'] == 'digits'
    assert not {'output', 'experiment', 'data_dir', 'config', 'resume', 'workers', 'log_with'} & set(entry['recipe'])
    (result,) = entry['results']
    assert result['dataset'] == 'digits' and 0 <= result['value'] <= 100

    # The folder is carried to another machine; its last printed line loads the run there.
    moved = Path(shutil.move(tmp_path / 'zoo', tmp_path / 'carried'))
    where = {'CTC_TIMM_ZOO': str(moved / 'zoo.json'), 'HF_HUB_OFFLINE': '1'}
    check = f"""
from timm.models._hub import save_config_for_hf
plain = timm.create_model('local-dir:{moved / 'runs' / 'my run'}', pretrained=True)
assert all((a == b).all() for a, b in zip(model.state_dict().values(), plain.state_dict().values(), strict=True))
assert timm.list_pretrained('test_*_ctc*') == ['test_resnet_ctc.mine']
save_config_for_hf(model, 'config.json')
"""
    done = client(done.last + check, **where)
    assert done.code == 0, done.err
    config = json.loads((client.folder / 'config.json').read_text())  # saved again it names the base, and no place
    assert config['architecture'] == 'test_resnet' and not {'file', 'hf_hub_id'} & set(config['pretrained_cfg'])
    done = client.command('zoo', 'list', 'test_*', **where)
    assert done.out.startswith('test_resnet_ctc.mine  12 classes  3x16x16  ') and 'top-1 % on digits' in done.out
    done = client.command('zoo', 'list', 'resnet*', **where)
    assert done.out == 'nothing is cataloged as resnet*; see `ctc-timm zoo add --help`\n'
    every = json.loads(client.command('zoo', 'list', '--json', **where).out).keys()
    assert every == {'test_resnet_ctc.mine', *catalog.load(catalog.SHIPPED)}
    assert not hub.requests


def test_names_and_replacing(client, trained, tmp_path):
    run = Path(shutil.copytree(trained, tmp_path / 'runs' / 'Müller & co'))
    file = tmp_path / 'zoo.json'
    assert add(run, file, SETTINGS).name == 'test_resnet_ctc.M_ller_co'
    add(run, file, SETTINGS)  # the same weights again
    add(run, file, SETTINGS, name='test_resnet_ctc')
    assert set(models(file)) == {'test_resnet_ctc', 'test_resnet_ctc.M_ller_co'}
    for name in ('test_vit_ctc.a', 'test_resnet', 'test_resnet_ctc.a/b'):
        with pytest.raises(UserError, match=r'must be test_resnet_ctc or test_resnet_ctc\.TAG'):
            add(run, file, SETTINGS, name=name)

    model = timm.create_model(f'local-dir:{run}', pretrained=True)
    with torch.no_grad():
        model.fc.bias += 1
    save_file(model.state_dict(), run / 'best.safetensors')
    before = file.read_bytes()
    with pytest.raises(UserError, match='is other weights already; give `replace=True`'):
        add(run, file, SETTINGS)
    assert file.read_bytes() == before
    code = 'import timm, ctc_timm; timm.create_model("test_resnet_ctc", pretrained=True)'
    done = client(code, CTC_TIMM_ZOO=str(file))
    assert done.code == 1 and 'is not the file that was cataloged' in done.err
    done = client.command('zoo', 'add', str(run), '--name', 'test_resnet_ctc', '--replace', CTC_TIMM_ZOO=str(file))
    assert done.code == 0 and client(code, CTC_TIMM_ZOO=str(file)).code == 0, done.err
    done = client(code.replace('test_resnet_ctc', 'test_resnet_ctc.M_ller_co'), CTC_TIMM_ZOO=str(file))
    assert done.code == 1 and 'is not the file that was cataloged' in done.err  # that name still means the old weights


def test_a_repo_is_pinned(client, hub, shelve, export, tmp_path):
    repo = shelve(REPO)
    pinned = repo.refs['main']
    shelve(REPO, {'model.safetensors': Blob(b'other', lfs=True)})
    file = tmp_path / 'zoo.json'
    where = {'CTC_TIMM_ZOO': str(file)}
    done = client.command('zoo', 'add', f'{REPO}@{pinned}', **where)
    assert done.code == 0, done.err
    assert 'export' not in done.out and not hub.asked('GET /get/')  # the hash comes from the Hub, not the weights
    entry = models(file)['test_resnet_ctc.digits']
    assert (entry['hub_id'], entry['revision']) == (REPO, pinned)
    assert entry['sha256'] == export['model.safetensors'].sha256 and entry['license'] == 'apache-2.0'
    assert entry['results'][0]['dataset'] == 'digits'
    done = client(done.last, **where)
    assert done.code == 0, done.err

    # Of small files the Hub keeps no sha256.
    shelve('alice/plain', {'model.safetensors': Blob(export['model.safetensors'].data)})
    assert client.command('zoo', 'add', 'alice/plain', **where).code == 0
    assert models(file)['test_resnet_ctc.plain']['sha256'] == entry['sha256']
    for source, text in (
        ('alice/nothing', 'Repository not found (HTTP 404); check the name'),
        (f'{REPO}@v9', 'Invalid rev id: v9 (HTTP 404)'),
        ('nothing', 'neither the folder of a run nor a repo'),
        ('../alice/x', 'neither the folder of a run nor a repo'),
    ):
        done = client.command('zoo', 'add', source, **where)
        assert done.code == 2 and text in done.err and done.err.count('\n') == 1, done.err
