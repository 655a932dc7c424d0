"""From a run to the Hub and back: bit for bit, in one commit, whatever goes wrong."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load, load_file, save_file

import ctc_timm
from ctc_timm.api import recipe_settings
from ctc_timm.hub.publish import push
from hub_client import ALICE, BOB, COMMAND, IMAGES, IN_THREADS, PUBLISHED, logits_of

SETTINGS = recipe_settings()
REPO = 'alice/test_resnet_ctc'
EMPTY = {'.gitattributes'}


def test_from_a_run_to_the_hub_and_back(client, anyone, hub, trained):
    done = client.command('publish', str(trained), '--repo-id', REPO)
    assert done.code == 0, done.err
    head = hub.repos[REPO].at()
    assert set(head.files) == PUBLISHED and len(hub.repos[REPO].commits) == 2  # the Hub's own one, and ours
    assert hub.asked('POST .*/commit/') == 1
    assert done.out.splitlines()[-2] == f'published: {hub.url}/{REPO}/commit/{head.oid}'
    assert done.last == f"import timm; model = timm.create_model('hf-hub:{REPO}@{head.oid}', pretrained=True)"
    weights, expected = load(head.files['model.safetensors'].data), load_file(trained / 'best.safetensors')
    assert set(weights) == set(expected) and all(torch.equal(weights[key], expected[key]) for key in weights)
    config = head.files['config.json'].data.decode()
    assert 'test_resnet"' in config and '_ctc' not in config

    save = f'import torch, numpy; numpy.save("logits.npy", model.eval()({IMAGES}).detach().numpy())'
    without = 'import sys; assert not [m for m in sys.modules if m.startswith("ctc_timm")]'
    by_transformers = f"""
from transformers import AutoImageProcessor, AutoModelForImageClassification
model = AutoModelForImageClassification.from_pretrained('{REPO}', revision='{head.oid}').eval()
processor = AutoImageProcessor.from_pretrained('{REPO}')
assert model.config.num_labels == 12 and processor.data_config['input_size'] == (3, 16, 16)
for tensor in [*model.parameters(), *model.buffers()]:  # which lie in the file as it is mapped, aligned anyhow, and
    tensor.data = tensor.data.clone()  # where numbers lie decides the order in which the processor adds them
inner, model = model, lambda pixels: inner(pixel_values=pixels).logits
model.eval = lambda: model
{save}
{without}
"""
    ours = 'import timm, ctc_timm; model = timm.create_model("test_resnet_ctc", pretrained=True)'
    plain = f'{done.last}; {save}; {without}'
    for cache, code in (('plain', plain), ('ours', f'{ours}; {save}'), ('hf', by_transformers)):
        other = anyone(cache=cache, CTC_TIMM_NAMESPACE='alice')(code)  # nobody, with an empty cache
        assert other.code == 0, other.err
        assert np.array_equal(np.load(client.folder / 'logits.npy'), logits_of(trained)), cache


def test_the_recipe_makes_the_run_again(client, run, tmp_path):
    push(run, REPO, SETTINGS, dry_run=True)
    where = ['--output', str(tmp_path), '--experiment', 'again', '-j', '0']
    done = client.command('train', '-c', str(run / 'publish' / 'recipe.yaml'), *where)
    assert done.code == 0, done.err
    assert (run / 'summary.csv').read_text() == (tmp_path / 'again' / 'summary.csv').read_text()
    first, second = (load_file(path / 'best.safetensors') for path in (run, tmp_path / 'again'))
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_an_interrupted_upload_shows_nothing_and_a_repeat_completes_it(client, hub, trained):
    hub.fail('POST .*/commit/', 'hold')
    publish = ('publish', str(trained), '--repo-id', REPO)
    process = client.start(COMMAND, *publish)
    assert hub.reached.wait(60)
    assert hub.objects and set(hub.files(REPO)) == EMPTY
    assert client.kill(process).code == -9 and set(hub.files(REPO)) == EMPTY
    uploads = hub.asked('PUT /put/')
    hub.faults.clear()
    done = client.command(*publish)
    assert done.code == 0, done.err
    head = hub.repos[REPO].at()
    assert set(head.files) == PUBLISHED and hub.asked('PUT /put/') == uploads  # what was there is not sent again
    done = client.command(*publish)  # nothing has changed: no commit, the same answer
    assert done.code == 0 and hub.repos[REPO].at() is head and done.out.splitlines()[-2].endswith(head.oid)


def test_a_failed_upload_is_one_line_and_shows_nothing(client, anyone, hub, trained):
    # Each client sleeps between the retries of huggingface_hub, so they run side by side.
    cases = {
        'limit': ('alice/limit/preupload', 429, '(HTTP 429); retry later'),
        'server': ('alice/server/preupload', 500, '(HTTP 500); retry later'),
        'batch': ('alice/batch.git/info', 403, '(HTTP 403); use a token that may do this'),
        'late': ('alice/late/commit/', 503, '(HTTP 503); retry later'),
        'lost': ('alice/lost/commit/', 'break', 'check the network and HF_ENDPOINT, then retry'),
    }
    for request, kind, _ in cases.values():
        hub.fail(request, kind)
    code = IN_THREADS.replace('WORK', "ctc_timm.publish(sys.argv[1], name if '/' in name else f'alice/{name}')")
    code = code.replace('sys.argv[1:]', 'sys.argv[2:]')
    found = json.loads(client(code, str(trained), *cases, 'bob/theirs').out)
    for name, (_, _, text) in cases.items():
        assert found[name].startswith(f'alice/{name}: ') and text in found[name] and '\n' not in found[name], found
        # Of 'lost' the answer was lost, not the commit.
        assert set(hub.files(f'alice/{name}')) == (PUBLISHED if name == 'lost' else EMPTY)
    assert 'You have no right to create this repo (HTTP 403)' in found['bob/theirs'] and 'bob/theirs' not in hub.repos
    with socket.socket() as unused:
        unused.bind(('127.0.0.1', 0))
        nowhere = f'http://127.0.0.1:{unused.getsockname()[1]}'
        for token, env, text in (
            ('', {}, 'log in with `hf auth login`'),
            ('hf_wrongWrongWrongWrong', {}, 'set a valid HF_TOKEN'),
            (ALICE, {'HF_ENDPOINT': nowhere}, 'check the network and HF_ENDPOINT, then retry'),
            (ALICE, {'HF_HUB_OFFLINE': '1'}, 'HF_HUB_OFFLINE'),
        ):
            done = anyone(token, **env).command('publish', str(trained), '--repo-id', 'alice/nobody')
            assert done.code == 2 and done.err.startswith('ctc-timm publish: error: alice/nobody: '), done.err
            assert text in done.err and done.err.count('\n') == 1 and 'hf_wrong' not in done.err
            assert 'alice/nobody' not in hub.repos
    hub.faults.clear()
    assert json.loads((done := client(code, str(trained), *cases)).out).keys() == cases.keys(), done.err
    for name in cases:
        assert set(hub.files(f'alice/{name}')) == PUBLISHED and len(hub.repos[f'alice/{name}'].commits) == 2


def test_branches_pull_requests_and_privacy_of_repos(client, anyone, hub, trained):
    publish = ('publish', str(trained), '--repo-id')
    assert client.command(*publish, 'alice/hidden', '--private').code == 0
    assert client.command(*publish, REPO, '--revision', 'next').code == 0
    assert hub.repos['alice/hidden'].private and not hub.repos[REPO].private
    assert set(hub.files(REPO)) == EMPTY and set(hub.files(REPO, 'next')) == PUBLISHED
    done = anyone(BOB).command(*publish, REPO, '--create-pr')
    assert done.code == 0, done.err
    assert set(hub.files(REPO, 'refs/pr/1')) == PUBLISHED and set(hub.files(REPO)) == EMPTY
    assert f'pull request: {hub.url}/{REPO}/discussions/1' in done.out
    assert client(done.last, HF_HOME='elsewhere').code == 0


def test_a_dry_run_sends_nothing(client, hub, run):
    done = client.command('publish', str(run), '--repo-id', REPO, '--dry-run')
    assert done.code == 0 and not hub.requests, done.err
    files = {p.relative_to(run / 'publish').as_posix() for p in (run / 'publish').rglob('*') if p.is_file()}
    assert files == PUBLISHED - EMPTY and client(done.last).code == 0
    with safe_open(run / 'publish' / 'model.safetensors', framework='pt') as file:
        assert not file.metadata()


def test_what_is_no_run_is_refused(run, tmp_path):
    def refused(match: str, folder: Path = run) -> None:
        with pytest.raises(ctc_timm.UserError, match=match) as caught:
            push(folder, REPO, SETTINGS, dry_run=True)
        assert '\n' not in str(caught.value)

    refused('no run; name a folder', tmp_path / 'nothing')
    weights = (run / 'best.safetensors').read_bytes()
    (run / 'best.safetensors').write_bytes(weights[:100])
    refused('not a sound safetensors file')
    broken = load(weights)
    broken['fc.bias'][0] = float('nan')
    save_file(broken, run / 'best.safetensors')
    refused('holds values that are not finite')
    (run / 'best.safetensors').unlink()
    (run / 'last.safetensors').unlink()
    refused('has no best.safetensors yet')
    (run / 'best.safetensors').write_bytes(weights)
    config = json.loads((run / 'config.json').read_text())
    for architecture, text in (('test_vit', 'cannot be exported'), ('../../x', 'unknown to timm')):
        (run / 'config.json').write_text(json.dumps({**config, 'architecture': architecture}))
        refused(text)
    (run / 'config.json').write_text('[')
    refused('config.json')


def test_a_run_is_published_when_it_is_done(client, anyone, hub, tiny, tmp_path):
    """Best weights and card in one commit; who may not is told before anything is trained."""
    where = ['--epochs', '1', '--mode', 'vanilla', '--output', str(tmp_path / 'runs')]
    done = client.command('train', *tiny, *where, '--experiment', 'one', '--push-to-hub', 'alice/pushed')
    assert done.code == 0, done.err
    head = hub.repos['alice/pushed'].at().oid
    assert f'alice/pushed/commit/{head}' in done.out and f'hf-hub:alice/pushed@{head}' in done.out
    for who, target, text in (
        (client, 'pushed', 'must be USER/NAME'),
        (anyone(), 'alice/other', 'log in with `hf auth login`'),
        (anyone('hf_wrongWrongWrongWrong'), 'alice/other', 'set a valid HF_TOKEN'),
    ):
        done = who.command('train', *tiny, *where, '--experiment', 'two', '--push-to-hub', target)
        assert done.code == 2 and target in done.err.splitlines()[-1] and text in done.err.splitlines()[-1], done.err
        assert not (tmp_path / 'runs' / 'two').exists() and 'epoch' not in done.out
