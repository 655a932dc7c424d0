"""A marked token: everything is run with it, and no byte that is left behind, printed or published holds it."""

from __future__ import annotations

import base64
import pickle
import zipfile
from io import BytesIO
from pathlib import Path
from urllib.parse import quote

import pytest
from PIL import Image

from ctc_timm.utils.errors import UserError, one_line
from ctc_timm.utils.text import holds_token, sanitize, without_tokens

TOKEN = 'hf_' + 'Marked' * 5
SECRETS = {
    'HF_TOKEN': TOKEN,
    'WANDB_API_KEY': 'wandbMarkedMarkedMarked',
    'AWS_SECRET_ACCESS_KEY': 'awsMarkedMarked/Marked+Marked',
    'MY_PASSWORD': 'passwordMarked&Marked',
}


def spellings(secret: str) -> list[bytes]:
    """A secret as it may be written."""
    raw = secret.encode()
    shifted = [base64.b64encode(b'x' * i + raw)[4 if i else 0 : -4] for i in range(3)]  # wherever in a longer text
    return [raw, quote(secret, safe='').encode(), secret.encode('utf-16-le'), raw.hex().encode(), raw[::-1], *shifted]


def search(files: dict[str, bytes]) -> list[str]:
    """The files in which a secret stands, archives and the texts in pictures included."""
    found = []
    for name, data in files.items():
        contents = [data]
        if data[:4] == b'PK\x03\x04':
            with zipfile.ZipFile(BytesIO(data)) as archive:
                contents += [archive.read(inside) for inside in archive.namelist()]
        if name.endswith('.png'):
            with Image.open(BytesIO(data)) as image:
                contents.append(repr(image.info).encode())
        for secret in SECRETS.values():
            found += [name for content in contents for spelling in spellings(secret) if spelling in content]
    return found


def test_the_search_finds():
    for secret in SECRETS.values():
        for text in (secret, quote(secret, safe=''), base64.b64encode(f'u:{secret}'.encode()).decode()):
            assert search({'x': f'some {text} text'.encode()})
    stream = BytesIO()
    with zipfile.ZipFile(stream, 'w', zipfile.ZIP_DEFLATED) as archive:
        archive.writestr('x', 'a' * 100 + TOKEN)
    assert search({'x': stream.getvalue()}) and not search({'x': pickle.dumps('marked')})


def test_every_command_keeps_the_token(client, hub, tiny, tmp_path):
    hub.users[TOKEN] = 'alice'
    out, repo = tmp_path / 'out', 'alice/test_resnet_ctc'
    run = str(out / 'runs' / 'mine')
    where = ['--output', str(out / 'runs'), '--experiment', 'mine', '--epochs', '2', '--keep-every', '1']
    small = ['-j', '0', '-b', '32', '--max-train', '64', '--max-test', '32']
    data = ['--dataset', 'digits', '--val-split', 'validation[:32]', '-j', '0']
    tune = ['-b', '16', '--epochs', '1', '--train-fraction', '0.05', '--seeds', '1', '--min-updates', '1']
    commands: list[tuple[str, ...]] = [
        ('train', *tiny, *where, '--log-with', 'tensorboard', '--push-to-hub', repo, '--model-ema'),
        ('train', '--resume', run, '--epochs', '3'),
        ('validate', run, '-j', '0'),
        ('linear-probe', run, *data, *small, '--probes', 'ridge', '--shots', '1'),
        ('dynamics', run, *data, *small, '--every', '2'),
        ('finetune', run, *data, *tune),
        ('embed', run, *data, '--output', str(out / 'features.npz')),
        ('publish', run, '--repo-id', repo, '--create-pr'),
        ('publish', run, '--repo-id', repo, '--dry-run'),
        ('publish', run, '--repo-id', 'bob/not_mine'),
        ('zoo', 'add', repo, '--zoo', str(out / 'zoo.json')),
        ('validate', f'hf-hub:{repo}', *data, '--output', str(out / 'hub')),
        ('validate', 'hf-hub:bob/not_there', *data),
    ]
    printed: dict[str, bytes] = {}
    for number, words in enumerate(commands):
        done = client.command(*words, **SECRETS)
        assert done.code == (2 if 'bob/' in ' '.join(words) else 0), (words, done.err)
        printed[f'{number} out'], printed[f'{number} err'] = done.out.encode(), done.err.encode()
    files = {str(path): path.read_bytes() for path in tmp_path.rglob('*') if path.is_file() and not path.is_symlink()}
    commits = [commit for known in hub.repos.values() for commit in known.commits.values()]
    published = {f'{commit.oid}/{path}': blob.data for commit in commits for path, blob in commit.files.items()}
    asked = {'requests': repr(hub.requests).encode(), 'titles': repr([commit.title for commit in commits]).encode()}
    kinds = {Path(name).suffix for name in files}
    assert {'.yaml', '.csv', '.jsonl', '.json', '.png', '.safetensors', '.md', '.npz'} <= kinds
    assert any('tfevents' in name for name in files) and len(published) > 10 and len(files) > 40
    assert search({**files, **published, **printed, **asked}) == []
    assert ('GET /api/whoami-v2', 200) in hub.requests  # it was used


URL, WORD = 'https://alice:sesameSesame1@host.example/data', 'hf_sesameSesame1sesameSesame1'
FLAGS = {'data-dir': URL, 'experiment': WORD, 'model-kwargs': f'token={WORD}', 'model': f'hf-hub:{URL}'}
FLAGS |= {'initial-checkpoint': 'https://host/x?token=sesameSesame1', 'push-to-hub': URL, 'input-key': 'sesameSesame1'}
TYPED: list[tuple[str, ...]] = [
    *(('train.py', '--dataset', 'digits', f'--{flag}', value) for flag, value in FLAGS.items()),
    ('train.py', '--data-dir', URL),
    ('train.py', '--dataset', f'hfds/{URL}'),
    ('train.py', '-c', 'RECIPE'),
    ('train.py', '--resume', URL),
    ('validate.py', f'hf-hub:{URL}', '--dataset', 'digits'),
    ('validate.py', 'test_resnet', '--dataset', 'digits', '--class-map', URL),
    ('transfer/linear_probe.py', 'test_resnet', '--target', URL),
    ('transfer/finetune.py', URL, '--dataset', 'digits'),
    ('transfer/dynamics.py', URL),
]


@pytest.mark.parametrize('words', TYPED, ids=[' '.join(words)[:60] for words in TYPED])
def test_a_token_on_the_command_line(script, monkeypatch, tmp_path, words):
    monkeypatch.setenv('SOME_TOKEN', 'sesameSesame1')
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    recipe, out = tmp_path / 'recipe.yaml', tmp_path / 'out'
    recipe.write_text(f'dataset: digits\nmodel: test_resnet\nepochs: 1\ndata-dir: {URL}\n')
    words = tuple(word.replace('RECIPE', str(recipe)) for word in words)
    where = ['--output', str(out), '-j', '0']
    if words[0] == 'train.py':
        where += ['--epochs', '1', *(() if '--model' in words else ('--model', 'test_resnet'))]
    ended = script(*words, *where)
    assert ended.code == 2 and 'Traceback' not in ended.err
    assert 'sesameSesame1' not in ended.out + ended.err
    assert ended.err.splitlines()[-1].startswith(f'{Path(words[0]).name}: error: ')
    assert not list(out.rglob('*.yaml')) and not list(out.rglob('*.json'))


@pytest.mark.parametrize(
    ('text', 'kept'),
    [
        ('https://u:sesame@host/x', 'https://***@host/x'),
        ('https://sesame@host/x and http://a:sesame@b', 'https://***@host/x and http://***@b'),
        ('https://u:ses@me@host/x', 'https://***@host/x'),
        ('runs/https:/u:sesame@host/x', 'runs/https:/***@host/x'),
        ('s3://key:sesame@bucket', 's3://***@bucket'),
        ('https://host/x?a=1&token=sesame&b=2', 'https://host/x?a=1&token=***&b=2'),
        ('https://host/x?X-Amz-Signature=sesame#y', 'https://host/x?X-Amz-Signature=***#y'),
        ('got hf_sesamesesamesesamesesame.', 'got ***.'),
        ('ghp_sesamesesamesesamesesame', '***'),
        ('key AKIASESAMESESAMESESA', 'key ***'),
        ('SECRET is open-sesame', 'SECRET is ***'),
    ],
)
def test_what_is_shown_of_a_secret(monkeypatch, text, kept):
    monkeypatch.setenv('MY_API_KEY', 'open-sesame')
    assert without_tokens(text) == kept and 'sesame' not in kept.lower()
    assert holds_token(text) and holds_token([1, text]) and holds_token({'a': {text: 1}})
    assert str(UserError(f'--flag {text}')) == f'--flag {kept}' and one_line(ValueError(text)) == kept


HARMLESS = [
    *('hf-hub:alice/resnet50_ctc@main', 'https://host.example/x@main?revision=3', 'C:/data/a@b', 'alice@host:/data'),
    *('/data/hf_cache/token/key=3', 'hf_hub and hf_short', 'train[:50%]', 'sgd?lr=0.1', ''),
]


@pytest.mark.parametrize('text', HARMLESS)
def test_what_is_no_secret(text):
    assert without_tokens(text) == text == sanitize(text) and not holds_token([text, {'a': text}, 3, None])
