"""From a run to the Hub and back: bit for bit, in one commit, with nothing private, whatever goes wrong."""

from __future__ import annotations

import csv
import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hub_client import ALICE, BOB, IMAGES, Client, logits_of
from hub_server import Blob, Hub
from safetensors import safe_open
from safetensors.torch import load, load_file, save_file

import ctc_timm
from ctc_timm.hub.publish import push

REPO = 'alice/test_resnet_ctc'
NAMES = {'.gitattributes', 'README.md', 'config.json', 'model.safetensors', 'plots/training.png', 'recipe.yaml'}


def test_from_a_run_to_the_hub_and_back(
    client: Client, anyone: Callable[..., Client], hub: Hub, trained: Path, tiny: list[str], tmp_path: Path
) -> None:
    done = client.command('publish', str(trained), '--repo-id', REPO, '--tag', 'tiny')
    assert done.code == 0, done.err
    head = hub.repos[REPO].at('main')
    assert head and set(head.files) == NAMES and len(hub.repos[REPO].commits) == 2  # the Hub's own one, and ours
    assert hub.asked('POST .*/commit/') == 1
    url, line = done.out.splitlines()[-2:]
    assert url == f'published: {hub.url}/{REPO}/commit/{head.oid}'
    assert line == (
        f'python -c "import timm; model = timm.create_model(\'hf-hub:{REPO}@{head.oid}\', pretrained=True)"'
    )
    weights = load(head.files['model.safetensors'].data)
    trained_weights = load_file(trained / 'best.safetensors')
    assert list(weights) == sorted(trained_weights) or set(weights) == set(trained_weights)
    assert all(torch.equal(weights[key], trained_weights[key]) for key in weights)
    assert (
        'test_resnet"' in head.files['config.json'].data.decode()
        and '_ctc' not in head.files['config.json'].data.decode()
    )
    expected = logits_of(trained)

    load_line = line.removeprefix('python -c "').removesuffix('"')
    save = f'; import torch, numpy; numpy.save("logits.npy", model.eval()({IMAGES}).detach().numpy())'
    plain = anyone(cache='plain')  # nobody, with an empty cache, in a process that never imports ctc_timm
    done = plain(f'{load_line}{save}; import sys; assert not [m for m in sys.modules if m.startswith("ctc_timm")]')
    assert done.code == 0, done.err
    assert np.array_equal(np.load(client.folder / 'logits.npy'), expected)

    ours = anyone(cache='ours', CTC_TIMM_NAMESPACE='alice')
    done = ours(f'import timm, ctc_timm; model = timm.create_model("test_resnet_ctc", pretrained=True){save}')
    assert done.code == 0, done.err
    assert np.array_equal(np.load(client.folder / 'logits.npy'), expected)

    code = f"""
import numpy, sys, torch
from transformers import AutoImageProcessor, AutoModelForImageClassification
model = AutoModelForImageClassification.from_pretrained('{REPO}', revision='{head.oid}').eval()
processor = AutoImageProcessor.from_pretrained('{REPO}')
assert model.config.num_labels == 12 and processor.data_config['input_size'] == (3, 16, 16)
for tensor in [*model.parameters(), *model.buffers()]:  # which lie in the file as it is mapped, aligned anyhow, and
    tensor.data = tensor.data.clone()  # where numbers lie decides the order in which the processor adds them
numpy.save('logits.npy', model(pixel_values={IMAGES}).logits.detach().numpy())
assert not [m for m in sys.modules if m.startswith('ctc_timm')]
"""
    done = anyone(cache='transformers')(code)
    assert done.code == 0, done.err
    assert np.array_equal(np.load(client.folder / 'logits.npy'), expected)

    # Fine-tuned, with ten classes in place of twelve, from the published weights, and published itself.
    words = [word if word != 'test_resnet' else 'test_resnet_ctc' for word in tiny]
    where = ['--output', str(tmp_path / 'runs'), '--experiment', 'tuned', '--epochs', '1', '--mode', 'vanilla']
    done = ours.script('train.py', *words, '--pretrained', '--lr', '1e-12', '--opt', 'sgd', *where)
    assert done.code == 0, done.err
    tuned = load_file(tmp_path / 'runs' / 'tuned' / 'best.safetensors')
    for key, tensor in tuned.items():
        if not key.startswith('fc.') and tensor.is_floating_point() and 'running' not in key:
            assert torch.allclose(tensor, trained_weights[key], atol=1e-6), key  # of such a small step
    assert tuned['fc.weight'].shape[0] == 10 and trained_weights['fc.weight'].shape[0] == 12
    done = client.command('publish', str(tmp_path / 'runs' / 'tuned'), '--repo-id', 'alice/test_resnet_ctc.tuned')
    assert done.code == 0, done.err
    done = anyone(cache='last')(
        f'{done.last.removeprefix("python -c ").strip(chr(34))}; assert model.num_classes == 10'
    )
    assert done.code == 0, done.err


def test_the_recipe_makes_the_run_again(client: Client, hub: Hub, run: Path, tmp_path: Path) -> None:
    assert client.command('publish', str(run), '--repo-id', REPO).code == 0
    recipe = tmp_path / 'recipe.yaml'
    recipe.write_bytes(hub.repos[REPO].at('main').files['recipe.yaml'].data)  # type: ignore[union-attr]
    where = ['--output', str(tmp_path), '--experiment', 'again', '-j', '0']
    done = client.script('train.py', '-c', str(recipe), *where)
    assert done.code == 0, done.err
    ours, theirs = (list(csv.DictReader((path / 'summary.csv').open())) for path in (run, tmp_path / 'again'))
    assert ours == theirs and len(ours) == 3
    first, second = (load_file(path / 'best.safetensors') for path in (run, tmp_path / 'again'))
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_an_interrupted_upload_shows_nothing_and_a_repeat_completes_it(client: Client, hub: Hub, trained: Path) -> None:
    hub.fail('POST .*/commit/', 'hold', times=1)
    code = 'import sys; sys.argv[0] = "ctc-timm"; from ctc_timm.cli.commands import script; script()'
    process = client.start(code, 'publish', str(trained), '--repo-id', REPO)
    assert hub.reached.wait(60)
    assert hub.objects and set(hub.repos[REPO].at('main').files) == {'.gitattributes'}  # type: ignore[union-attr]
    done = client.kill(process)
    assert done.code == -9
    assert set(hub.repos[REPO].at('main').files) == {'.gitattributes'}  # type: ignore[union-attr]
    uploads = hub.asked('PUT /put/')
    hub.faults.clear()
    done = client.command('publish', str(trained), '--repo-id', REPO)
    assert done.code == 0, done.err
    head = hub.repos[REPO].at('main')
    assert head and set(head.files) == NAMES and hub.asked('PUT /put/') == uploads  # what was there is not sent again
    assert done.out.splitlines()[-2].endswith(head.oid)

    done = client.command('publish', str(trained), '--repo-id', REPO)  # nothing has changed: no commit, the same answer
    assert done.code == 0 and hub.repos[REPO].at('main') is head and done.out.splitlines()[-2].endswith(head.oid)


def test_the_clients_own_transport(
    client: Client, hub: Hub, export: dict[str, Blob], trained: Path, tmp_path: Path
) -> None:
    """Xet, which current clients use unless they are told not to: its storage is a folder here."""
    hub.xet, hub.stored = tmp_path / 'xet', [blob.data for blob in export.values() if blob.lfs]
    by_xet = {'HF_HUB_DISABLE_XET': ''}
    done = client.command('publish', str(trained), '--repo-id', REPO, **by_xet)
    assert done.code == 0, done.err
    assert set(hub.repos[REPO].at('main').files) == NAMES and hub.asked('POST .*/commit/') == 1  # type: ignore[union-attr]
    assert not hub.asked('/put/') and hub.asked('xet-write-token') and list(hub.xet.rglob('xorbs/*'))
    save = f'; import numpy, torch; numpy.save("logits.npy", model.eval()({IMAGES}).detach().numpy())'
    load_it = 'import timm, ctc_timm; model = timm.create_model("test_resnet_ctc", pretrained=True)'
    done = client(load_it + save, CTC_TIMM_NAMESPACE='alice', **by_xet)
    assert done.code == 0, done.err
    assert not hub.asked('GET /get/') and hub.asked('xet-read-token')
    assert np.array_equal(np.load(client.folder / 'logits.npy'), logits_of(trained))

    hub.fail('xet-write-token', 403)
    done = client.command('publish', str(trained), '--repo-id', 'alice/other', **by_xet)
    assert done.code == 2 and 'alice/other: forbidden: use a token that may do this' in done.err, done.err
    assert set(hub.repos['alice/other'].at('main').files) == {'.gitattributes'}  # type: ignore[union-attr]


def test_a_failed_upload_is_one_line_and_shows_nothing(
    client: Client, anyone: Callable[..., Client], hub: Hub, trained: Path, tmp_path: Path
) -> None:
    # Each client sleeps between the retries of the huggingface_hub, so they run side by side.
    cases = {
        'limit': ('alice/limit/preupload', 429, 'too many requests; wait a few minutes'),
        'server': ('alice/server/preupload', 500, 'the Hub is in trouble (HTTP 500); retry later'),
        'batch': ('alice/batch.git/info', 403, 'forbidden: use a token that may do this'),
        'late': ('alice/late/commit/', 503, 'the Hub is in trouble (HTTP 503); retry later'),
        'lost': ('alice/lost/commit/', 'break', 'the connection broke before all was transferred; retry'),
    }
    for request, kind, _ in cases.values():
        hub.fail(request, kind)
    code = """
import sys, json, threading, ctc_timm
run, *names = sys.argv[1:]
found = {}
def send(name):
    try: found[name] = ctc_timm.publish(run, name if '/' in name else f'alice/{name}')
    except ctc_timm.UserError as error: found[name] = str(error)
threads = [threading.Thread(target=send, args=(name,)) for name in names]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
print(json.dumps(found))
"""
    done = client(code, str(trained), *cases, 'bob/theirs')
    found = json.loads(done.out)
    for name, (_, _, text) in cases.items():
        assert text in found[name] and found[name].startswith(f'alice/{name}: ') and '\n' not in found[name], found[
            name
        ]
        there = set(hub.repos[f'alice/{name}'].at('main').files)  # type: ignore[union-attr]
        assert there == (NAMES if name == 'lost' else {'.gitattributes'})  # there the answer was lost, not the commit
    assert found['bob/theirs'].startswith('bob/theirs: forbidden') and 'bob/theirs' not in hub.repos
    for token, text in (('', 'log in with `hf auth login`'), ('hf_wrongWrongWrongWrong', 'set a valid HF_TOKEN')):
        done = anyone(token).command('publish', str(trained), '--repo-id', 'alice/nobody')
        assert done.code == 2 and done.err.startswith('ctc-timm: error: alice/nobody: ') and text in done.err, done.err
        assert done.err.count('\n') == 1 and 'hf_wrong' not in done.err and 'alice/nobody' not in hub.repos
    with socket.socket() as unused:
        unused.bind(('127.0.0.1', 0))
        nowhere = f'http://127.0.0.1:{unused.getsockname()[1]}'
        done = client.command('publish', str(trained), '--repo-id', REPO, HF_ENDPOINT=nowhere)
    assert done.code == 2 and f'{nowhere} cannot be reached' in done.err and done.err.count('\n') == 1
    done = client.command('publish', str(trained), '--repo-id', REPO, HF_HUB_OFFLINE='1')
    assert done.code == 2 and 'HF_HUB_OFFLINE keeps the Hub away' in done.err
    hub.faults.clear()
    assert json.loads((done := client(code, str(trained), *cases)).out).keys() == cases.keys(), done.err
    for name in cases:
        repo = hub.repos[f'alice/{name}']
        assert set(repo.at('main').files) == NAMES and len(repo.commits) == 2  # type: ignore[union-attr]


def test_a_login_is_seen_before_a_long_run(client: Client, anyone: Callable[..., Client], hub: Hub) -> None:
    code = 'import sys; from ctc_timm.hub.publish import check_target; check_target(sys.argv[1])'
    assert client(code, REPO).code == 0 and not hub.repos
    for token, name, text in (
        ('', REPO, 'log in with `hf auth login`'),
        ('hf_wrongWrongWrongWrong', REPO, 'set a valid HF_TOKEN'),
        (ALICE, 'alice', '--repo-id'),
    ):
        done = anyone(token)(code, name)
        assert done.code == 1 and text in done.err.splitlines()[-1], done.err


def test_branches_pull_requests_and_privacy_of_repos(
    client: Client, anyone: Callable[..., Client], hub: Hub, trained: Path
) -> None:
    publish = ('publish', str(trained), '--repo-id')
    assert client.command(*publish, 'alice/hidden', '--private').code == 0
    assert hub.repos['alice/hidden'].private
    assert client.command(*publish, REPO, '--revision', 'next').code == 0
    repo = hub.repos[REPO]
    assert not repo.private
    assert set(repo.at('main').files) == {'.gitattributes'} and set(repo.at('next').files) == NAMES  # type: ignore[union-attr]
    done = anyone(BOB).command(*publish, REPO, '--create-pr')
    assert done.code == 0, done.err
    pull = repo.at('refs/pr/1')
    assert pull and set(pull.files) == NAMES and set(repo.at('main').files) == {'.gitattributes'}  # type: ignore[union-attr]
    assert f'pull request: {hub.url}/{REPO}/discussions/1' in done.out and pull.oid in done.last
    done = client(done.last.removeprefix('python -c ').strip('"'), HF_HOME='elsewhere')
    assert done.code == 0, done.err


def test_a_dry_run_sends_nothing(client: Client, hub: Hub, run: Path) -> None:
    done = client.command('publish', str(run), '--repo-id', REPO, '--dry-run')
    assert done.code == 0 and not hub.requests, done.err
    assert {p.relative_to(run / 'publish').as_posix() for p in (run / 'publish').rglob('*') if p.is_file()} == NAMES - {
        '.gitattributes'
    }
    assert client(done.last.removeprefix('python -c ').strip('"')).code == 0
    with safe_open(run / 'publish' / 'model.safetensors', framework='pt') as file:
        assert not file.metadata()


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'repo_id': '../x'}, '--repo-id'),
        ({'repo_id': 'alice/../../x'}, '--repo-id'),
        ({'repo_id': 'alice'}, '--repo-id'),
        ({'repo_id': 'alice/x\ny'}, '--repo-id'),
        ({'repo_id': 'alice/--x'}, '--repo-id'),
        ({'license': 'MIT\ntags: x'}, '--license'),
        ({'tags': ['a\nb']}, '--tag'),
        ({'tags': ['<b>']}, '--tag'),
        ({'revision': '../main'}, '--revision'),
        ({'revision': 'a b'}, '--revision'),
    ],
)
def test_what_is_typed_is_checked_first(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ctc_timm.UserError, match=message):
        push(tmp_path, **{'repo_id': REPO, **options})


def test_what_is_no_run_is_refused(run: Path, tmp_path: Path) -> None:
    def refused(match: str) -> None:
        with pytest.raises(ctc_timm.UserError, match=match) as caught:
            push(run, REPO, dry_run=True)
        assert '\n' not in str(caught.value)

    with pytest.raises(ctc_timm.UserError, match='no run; name a folder'):
        push(tmp_path / 'nothing', REPO, dry_run=True)
    weights = (run / 'best.safetensors').read_bytes()
    (run / 'best.safetensors').write_bytes(weights[:100])
    refused('not sound weights')
    (run / 'best.safetensors').write_bytes(b'\x80\x04cposix\nsystem\n(S"false"\ntR.' * 9)
    refused('not sound weights')
    broken = load(weights)
    broken['fc.bias'][0] = float('nan')
    save_file(broken, run / 'best.safetensors')
    refused('holds values that are not finite')
    (run / 'best.safetensors').unlink()
    (run / 'last.safetensors').unlink()
    refused('has no best.safetensors yet')
    (run / 'best.safetensors').write_bytes(weights)
    (run / 'args.yaml').write_text('!!python/object/apply:os.system ["false"]')
    refused('args.yaml: not valid YAML: could not determine a constructor')
    config = json.loads((run / 'config.json').read_text())
    (run / 'args.yaml').write_text('{}')
    (run / 'config.json').write_text(json.dumps({**config, 'architecture': 'test_vit'}))
    refused('cannot be exported')
    (run / 'config.json').write_text(json.dumps({**config, 'architecture': '../../x'}))
    refused('unknown to timm')
    (run / 'config.json').write_text('[')
    refused('config.json')


def test_a_run_is_pushed_when_it_is_done(
    client: Client, anyone: Callable[..., Client], hub: Hub, tiny: list[str], tmp_path: Path
) -> None:
    """By train.py, best weights and card in one commit; who may not is told before anything is trained."""
    where = ['--epochs', '1', '--mode', 'vanilla', '--output', str(tmp_path / 'runs')]
    done = client.script('train.py', *tiny, *where, '--experiment', 'one', '--push-to-hub', 'alice/pushed')
    assert done.code == 0, done.err
    head = hub.repos['alice/pushed'].at('main').oid  # type: ignore[union-attr]
    assert f'alice/pushed/commit/{head}' in done.out and f'hf-hub:alice/pushed@{head}' in done.out
    for name, who, target in (('two', client, 'pushed'), ('three', anyone(), 'alice/other')):
        done = who.script('train.py', *tiny, *where, '--experiment', name, '--push-to-hub', target)
        assert done.code == 2 and target in done.err.splitlines()[-1], done.err
        assert not (tmp_path / 'runs' / name).exists() and 'epoch' not in done.out
