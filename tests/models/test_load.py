"""`<arch>_ctc` names and the Hub: what is found, in which order, what is refused, and what is left behind."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hub_client import BOB, IMAGES, Client, Done, logits_of
from hub_server import Blob, Hub, Repo
from safetensors.torch import load_file

Shelve = Callable[..., Repo]

NAME = 'test_resnet_ctc.digits'
REPO = f'alice/{NAME}'

# Loads what it is told, saves the logits of fixed images, and prints where the weights are said to be from.
LOAD = f"""
import sys, json, numpy, torch, timm, ctc_timm
options = json.loads(sys.argv[2]) if len(sys.argv) > 2 else {{}}
model = timm.create_model(sys.argv[1], pretrained=True, **options).eval()
numpy.save('logits.npy', model({IMAGES}).detach().numpy())
print(model.pretrained_cfg.get('hf_hub_id') or model.pretrained_cfg.get('file'))
"""
# Tries to load each name in a thread of its own, and prints what came of it.
TRY = """
import sys, json, threading, timm, ctc_timm
found = {}
def load(name):
    try:
        timm.create_model(name, pretrained=True)
        found[name] = ''
    except ctc_timm.UserError as error:
        found[name] = str(error)
threads = [threading.Thread(target=load, args=(name,)) for name in sys.argv[1:]]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
print(json.dumps(found))
"""


@pytest.fixture(scope='module', autouse=True)
def refused(forker: subprocess.Popen, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[], Done]]:
    """A load where nobody listens; the client retries it for half a minute, which other tests use."""
    folder = tmp_path_factory.mktemp('refused')
    with socket.socket() as bound:  # so that nobody else listens there; it does not listen either
        bound.bind(('127.0.0.1', 0))
        where = {'HF_ENDPOINT': f'http://127.0.0.1:{bound.getsockname()[1]}', 'HF_HOME': str(folder)}
        other = Client(forker, folder, {**where, 'CTC_TIMM_NAMESPACE': 'alice', 'HF_HUB_DISABLE_XET': '1'})
        process = other.start(TRY, NAME)
        yield lambda: other.end(process)


def catalog(file: Path, name: str, repo: Repo, **changes: object) -> Path:
    """A catalog of one entry, written by hand."""
    head = repo.at('main')
    assert head is not None
    config = json.loads(head.files['config.json'].data)
    facts = {k: v for k, v in config['pretrained_cfg'].items() if k != 'custom_load'}
    entry = {
        'hub_id': repo.id,
        'revision': head.oid,
        'filename': 'model.safetensors',
        'sha256': head.files['model.safetensors'].sha256,
        'pretrained_cfg': facts,
        'model_args': config['model_args'],
    }
    file.write_text(json.dumps({'version': 1, 'models': {name: {**entry, **changes}}}))
    return file


def scaled(blob: Blob, factor: float) -> Blob:
    """The same weights, times a number."""
    from safetensors.torch import load, save

    return Blob(save({key: value * factor for key, value in load(blob.data).items()}), lfs=True)


def cached(client: Client, name: str) -> list[Path]:
    """Files of that name that a later load would take."""
    return list(Path(client.env['HF_HOME']).rglob(f'snapshots/*/{name}'))


def test_the_namespace_gives_the_published_weights_and_the_cache_keeps_them(
    client: Client, hub: Hub, shelve: Shelve, trained: Path
) -> None:
    head = shelve(REPO).at('main')
    done = client(LOAD, NAME, CTC_TIMM_NAMESPACE='alice')
    assert head and (done.code, done.last) == (0, f'{REPO}@{head.oid}'), done.err
    assert np.array_equal(np.load(client.folder / 'logits.npy'), logits_of(trained))

    asked = len(hub.requests)
    done = client(LOAD, NAME, CTC_TIMM_NAMESPACE='alice', HF_HUB_OFFLINE='1')
    assert (done.code, done.last, len(hub.requests)) == (0, f'{REPO}@{head.oid}', asked), done.err
    assert np.array_equal(np.load(client.folder / 'logits.npy'), logits_of(trained))

    done = client(LOAD, NAME, '{"cache_dir": "elsewhere"}', CTC_TIMM_NAMESPACE='alice', HF_HUB_OFFLINE='1')
    assert done.code == 1 and 'HF_HUB_OFFLINE' in done.err
    done = client(LOAD, NAME, '{"cache_dir": "elsewhere"}', CTC_TIMM_NAMESPACE='alice', HF_HOME='unused')
    assert done.code == 0 and not list(client.folder.glob('unused/**/*.safetensors')), done.err
    assert list(client.folder.glob('elsewhere/models--alice--*/snapshots/*/model.safetensors'))


def test_the_order_of_sources(client: Client, hub: Hub, shelve: Shelve, tmp_path: Path, trained: Path) -> None:
    first = shelve('alice/elsewhere')
    second = shelve(REPO)
    other = scaled(second.at('main').files['model.safetensors'], 2.0)  # type: ignore[union-attr]
    shelve(REPO, {'model.safetensors': other})
    file = catalog(tmp_path / 'zoo.json', NAME, first)
    where = {'CTC_TIMM_ZOO': str(file), 'CTC_TIMM_NAMESPACE': 'alice'}

    done = client(LOAD, NAME, **where)
    assert done.last.startswith('alice/elsewhere@'), done.err
    assert np.array_equal(np.load(client.folder / 'logits.npy'), logits_of(trained))
    assert not hub.asked(f'/{REPO}/')
    done = client(LOAD, NAME, CTC_TIMM_NAMESPACE='alice')
    assert done.last.startswith(f'{REPO}@'), done.err
    assert not np.array_equal(np.load(client.folder / 'logits.npy'), logits_of(trained))

    before = len(hub.requests)
    done = client(TRY, NAME, 'test_resnet_ctc', 'resnet50_ctc')
    assert len(hub.requests) == before  # nobody's repo answers for ours
    for name, error in json.loads(done.out).items():
        arch = name.partition('_ctc')[0]
        assert f"no CTC weights are catalogd for '{name}': there is nothing for {arch} yet" in error
        assert f'`train.py --model {arch} --mode ctc`' in error and '`ctc-timm publish RUN --repo-id USER/' in error
    done = client(TRY, 'test_resnet_ctc.other', 'test_vit_ctc', **where)
    found = json.loads(done.out)
    assert f'there is {NAME}; alice/test_resnet_ctc.other: not on the Hub' in found['test_resnet_ctc.other']
    assert f'; there is {NAME}' in found['test_resnet_ctc.other'] and NAME not in found['test_vit_ctc']
    assert not any('\n' in error for error in found.values())


def test_timm_knows_the_catalog(client: Client, shelve: Shelve, tmp_path: Path) -> None:
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
assert model.num_classes == 12  # the facts of the default weights, as in timm
given = {'state_dict': model.state_dict()}  # a source that the user gives comes first; nothing is fetched
again = timm.create_model('test_resnet_ctc', pretrained=True, pretrained_cfg_overlay=given)
assert all((again.state_dict()[key] == value).all() for key, value in given['state_dict'].items())
print(cfg.hf_hub_id)
"""
    done = client(code, CTC_TIMM_ZOO=f'{one}{os.pathsep}{two}', HF_HUB_OFFLINE='1')
    assert done.code == 0 and done.last.startswith(f'{REPO}@'), done.err


@pytest.mark.parametrize('place', ['hub', 'run'])
def test_a_wrong_hash_is_refused_and_leaves_nothing(
    place: str, client: Client, shelve: Shelve, trained: Path, tmp_path: Path
) -> None:
    repo = shelve(REPO)
    local = {'path': str(trained / 'best.safetensors')} if place == 'run' else {}
    file = catalog(tmp_path / 'zoo.json', NAME, repo)
    content = json.loads(file.read_text())
    entry = content['models'][NAME]
    if local:
        entry = {**{k: v for k, v in entry.items() if k not in ('hub_id', 'revision', 'filename')}, **local}
    right = hashlib.sha256((trained / 'best.safetensors').read_bytes()).hexdigest() if local else entry['sha256']
    for sha256, expected in (('0' * 64, 1), (right, 0)):
        file.write_text(json.dumps({'version': 1, 'models': {NAME: {**entry, 'sha256': sha256}}}))
        done = client(LOAD, NAME, CTC_TIMM_ZOO=str(file))
        assert done.code == expected, done.err
        if expected:
            assert 'hash differs' in done.err or 'sha256 differs' in done.err
            assert not cached(client, 'model.safetensors') and not list(tmp_path.rglob('blobs/' + entry['sha256']))
    assert (trained / 'best.safetensors').is_file()  # what is not in the cache is not ours to remove
    assert np.array_equal(np.load(client.folder / 'logits.npy'), logits_of(trained))


def test_every_failure_is_one_line_and_a_later_load_works(
    client: Client, hub: Hub, shelve: Shelve, export: dict[str, Blob], tmp_path: Path
) -> None:
    config = json.loads(export['config.json'].data)
    boom = tmp_path / 'executed'
    pickled = b"cposix\nsystem\n(S'touch " + str(boom).encode() + b"'\ntR."
    overlay = {**config, 'model_args': {'pretrained_cfg_overlay': {'file': '/etc/passwd'}}}
    files: dict[str, dict[str, Blob | None]] = {
        'noweights': {'model.safetensors': None, 'pytorch_model.bin': Blob(pickled, lfs=True)},
        'pickle': {'model.safetensors': Blob(pickled, lfs=True)},
        'notjson': {'config.json': Blob(b'[1')},
        'otherarch': {'config.json': Blob(json.dumps({**config, 'architecture': 'resnet18'}).encode())},
        'overlay': {'config.json': Blob(json.dumps(overlay).encode())},
        'otherclasses': {'config.json': Blob(json.dumps({**config, 'num_classes': 3}).encode())},
    }
    wanted = {
        '401': 'log in with `hf auth login`',
        '403': 'forbidden: use a token that may do this',
        '404': 'has no config.json; publish it again',
        '429': 'too many requests; wait a few minutes',
        '500': 'the Hub is in trouble (HTTP 500); retry later',
        'gated': f'accept its conditions at {hub.url}/alice/test_resnet_ctc.gated, and log in',
        'stall': 'the connection stalled; retry, or allow it more seconds with HF_HUB_DOWNLOAD_TIMEOUT',
        'break': 'the connection broke before all was transferred; retry',
        'corrupt': 'is not the file that was published (its hash differs) and was removed from the cache',
        'corruptconfig': 'is not the file that was published (its hash differs) and was removed from the cache',
        'truncate': 'the connection broke before all was transferred; retry',
        'noweights': 'has no model.safetensors; publish it again',
        'pickle': 'does not fit test_resnet: ',
        'notjson': 'config.json is none of timm',
        'otherarch': "holds weights of 'resnet18', not of test_resnet",
        'overlay': "model_args may not set 'pretrained_cfg_overlay'",
        'otherclasses': 'does not fit test_resnet: ',
    }
    names = {case: f'test_resnet_ctc.{case}' for case in wanted}
    for case, name in names.items():
        shelve(f'alice/{name}', files.get(case))
    for case, kind in {case: int(case) if case.isdecimal() else case for case in wanted if case not in files}.items():
        at_storage = kind in ('stall', 'break', 'corrupt', 'truncate')
        request = f'GET /get/.*/{names[case]}/model' if at_storage else f'/{names[case]}/resolve/.*config'
        times = 1 if kind == 'truncate' else float('inf')
        hub.fail(request, 'corrupt' if kind == 'corruptconfig' else kind, times)

    where = {'CTC_TIMM_NAMESPACE': 'alice', 'HF_HUB_DOWNLOAD_TIMEOUT': '1', 'HF_HUB_ETAG_TIMEOUT': '5'}
    found = json.loads(client(TRY, *names.values(), **where).out)
    hub.released.set()
    for case, text in wanted.items():
        error = found[names[case]]
        if case == 'truncate' and not error:
            continue  # newer clients go on where they were cut off
        assert text in error and '\n' not in error, (case, error)
        assert error.startswith((f'alice/{names[case]}', names[case])), error
    kept = {path.parts[-4] for path in cached(client, 'model.safetensors')}
    kept -= {f'models--alice--{names["truncate"]}'} if not found[names['truncate']] else set()
    assert kept == {f'models--alice--{names[case]}' for case in ('pickle', 'otherclasses')}
    assert not boom.exists()

    hub.faults.clear()
    again = [name for case, name in names.items() if case not in files]
    assert set(json.loads(client(TRY, *again, **where).out).values()) == {''}


def test_a_damaged_cache_is_not_used_twice(client: Client, shelve: Shelve, trained: Path) -> None:
    shelve(REPO)
    assert client(LOAD, NAME, CTC_TIMM_NAMESPACE='alice').code == 0
    (file,) = cached(client, 'model.safetensors')
    whole = file.read_bytes()
    file.resolve().write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    done = client(LOAD, NAME, CTC_TIMM_NAMESPACE='alice', HF_HUB_OFFLINE='1')
    assert done.code == 1 and 'was removed from the cache' in done.err
    assert not cached(client, 'model.safetensors')
    assert client(LOAD, NAME, CTC_TIMM_NAMESPACE='alice').code == 0
    assert np.array_equal(np.load(client.folder / 'logits.npy'), logits_of(trained))


def test_private_repos_need_their_owners_token(
    client: Client, hub: Hub, anyone: Callable[..., Client], shelve: Shelve
) -> None:
    shelve(REPO, private=True)
    assert client(LOAD, NAME, CTC_TIMM_NAMESPACE='alice').code == 0
    assert hub.asked('GET /get/')  # the storage refuses every request that has a token
    for token in ('', BOB):
        done = anyone(token, cache='theirs')(LOAD, NAME, CTC_TIMM_NAMESPACE='alice')
        assert done.code == 1 and 'not on the Hub, or private' in done.err, done.err
    done = anyone('hf_nobodyKnowsThisOneHere', cache='theirs')(LOAD, NAME, CTC_TIMM_NAMESPACE='alice')
    assert done.code == 1 and 'set a valid HF_TOKEN' in done.err and 'hf_nobody' not in done.err


def test_a_revision_pins(client: Client, hub: Hub, shelve: Shelve, export: dict[str, Blob], trained: Path) -> None:
    repo = shelve(REPO)
    repo.refs['v1.0'] = repo.refs['main']
    shelve(REPO, {'model.safetensors': scaled(export['model.safetensors'], 2.0)})
    for name, old in ((f'{NAME}@v1.0', True), (f'{NAME}@{repo.refs["v1.0"]}', True), (NAME, False)):
        done = client(LOAD, name, CTC_TIMM_NAMESPACE='alice')
        assert done.last == f'{REPO}@{repo.refs["v1.0" if old else "main"]}', done.err
        assert np.array_equal(np.load(client.folder / 'logits.npy'), logits_of(trained)) is old
    done = client(LOAD, f'{NAME}@v2', CTC_TIMM_NAMESPACE='alice')
    assert 'no such branch, tag or commit' in done.err


def test_a_namespace_is_one_word(client: Client, hub: Hub) -> None:
    code = f"""
import os, timm, ctc_timm
for namespace in ('../..', 'alice/bob', 'a@b', 'alice--bob', '-', 'a b', 'a' * 20 + '.'):
    os.environ['CTC_TIMM_NAMESPACE'] = namespace
    try: timm.create_model('{NAME}', pretrained=True)
    except ctc_timm.UserError as error: print(error)
"""
    lines = client(code).out.splitlines()
    assert len(lines) == 7 and not hub.requests
    assert all('must be the name of a user or an organization' in line for line in lines)


def test_a_broken_catalog_stops_loads_and_nothing_else(client: Client, shelve: Shelve, tmp_path: Path) -> None:
    good = catalog(tmp_path / 'good.json', NAME, shelve(REPO))
    bad = tmp_path / 'bad.json'
    code = f"""
import timm, ctc_timm
assert timm.create_model('resnet10t_ctc').num_classes == 1000
for name in ('{NAME}', 'resnet10t_ctc'):
    try: timm.create_model(name, pretrained=True)
    except ctc_timm.UserError as error: print(error)
"""
    for content, said in (('{', True), (None, False)):
        bad.unlink(missing_ok=True)
        if content is not None:
            bad.write_text(content)
        done = client(code, CTC_TIMM_ZOO=f'{good}{os.pathsep}{bad}')
        lines = done.out.splitlines()
        assert len(lines) == 2 and all(str(bad) in line and 'CTC_TIMM_ZOO' in line for line in lines), done.err
        assert (str(bad) in done.err) is said  # a catalog still to be made is nobody's mistake


def test_arguments_mean_what_they_mean_in_timm(client: Client, tmp_path: Path) -> None:
    code = """
import json, sys, timm, torch, ctc_timm
from pathlib import Path
from safetensors.torch import save_file
from timm.models._hub import save_config_for_hf
from ctc_timm.hub.collect import add
folder = Path(sys.argv[1])
archs = {
    'test_resnet': {'in_chans': 1, 'num_classes': 7},
    'test_vit': {'img_size': 32, 'num_classes': 5, 'class_token': False, 'global_pool': 'avg'},
    'test_convnext': {'num_classes': 4, 'act_layer': 'relu'},
    'test_efficientnet': {'num_classes': 3},
    'cifar_resnet20': {'num_classes': 6},
}
for seed, (arch, options) in enumerate(archs.items()):
    torch.manual_seed(seed)
    run = folder / arch
    run.mkdir()
    model = timm.create_model(arch, **options)
    save_file(model.state_dict(), run / 'best.safetensors')
    save_config_for_hf(model, run / 'config.json')
    add(str(run), folder / 'zoo.json', tag='mine')
"""
    assert (done := client(code, str(tmp_path))).code == 0, done.err
    code = """
import json, sys, timm, torch, ctc_timm
from timm.models._hub import save_config_for_hf
folder = sys.argv[1]
cases = [{}, {'num_classes': 2}, {'in_chans': 1}, {'in_chans': 4}, {'features_only': True}, {'num_classes': 0},
         {'features_only': True, 'out_indices': (1, 2)}, {'drop_rate': 0.1}, {'img_size': 64}]
compared = 0
for arch in ('test_resnet', 'test_vit', 'test_convnext', 'test_efficientnet', 'cifar_resnet20'):
    for case in cases:
        if 'img_size' in case and arch != 'test_vit':
            continue
        models = []
        for name in (f'local-dir:{folder}/{arch}', f'{arch}_ctc.mine'):
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
    assert (done.code, done.last) == (0, '41'), done.err


def test_what_timms_own_scripts_call(client: Client, shelve: Shelve, trained: Path, tmp_path: Path) -> None:
    """What timm's train and validate scripts do with `--device-modules`, `--model`, `--pretrained` and `hf-hub:`."""
    shelve('alice/test_resnet_ctc')
    file = catalog(tmp_path / 'zoo.json', NAME, shelve(REPO))
    train = """
import importlib, sys, timm
from types import SimpleNamespace
from timm.models import create_model, resolve_model_input_args
importlib.import_module('ctc_timm')  # --device-modules ctc_timm
args = SimpleNamespace(model=sys.argv[1], img_size=None, input_size=None, in_chans=None)
for channels in (None, 3):
    resolved = resolve_model_input_args(args.model, vars(args), pretrained=True, num_classes=5, in_chans=channels)
    model = create_model(**{k: v for k, v in resolved.items() if v is not None})
    again = create_model(args.model, pretrained=True, in_chans=3, num_classes=5)
    body = {k: v for k, v in model.state_dict().items() if not k.startswith('fc.')}
    assert model.num_classes == 5 and all((again.state_dict()[k] == v).all() for k, v in body.items())
config = timm.data.resolve_data_config({}, model=model)
assert config['input_size'] == (3, 16, 16) and config['mean'] == (0.3, 0.3, 0.3)
from safetensors.torch import save_file
save_file(body, 'body.safetensors')
"""
    expected = load_file(trained / 'best.safetensors')
    for name, where in (('test_resnet_ctc', {'CTC_TIMM_NAMESPACE': 'alice'}), (NAME, {'CTC_TIMM_ZOO': str(file)})):
        done = client(train, name, **where)
        assert done.code == 0, done.err
        body = load_file(client.folder / 'body.safetensors')
        assert len(body) == len(expected) - 2 and all(torch.equal(body[key], expected[key]) for key in body)

    write_digits(tmp_path / 'images' / 'validation')
    validate = """
import sys, torch, timm
from timm.data import create_dataset, create_loader, resolve_input_data_config
from timm.models import create_model, is_model, list_models, resolve_model_input_args
from timm.utils import AverageMeter, accuracy
name, folder = sys.argv[1:]
assert not is_model(name) and not list_models(name, pretrained=True)  # so it is no pattern, but a model
args = {'img_size': None, 'input_size': None, 'in_chans': None, 'mean': None, 'std': None, 'crop_pct': None}
model = create_model(**resolve_model_input_args(name, args, pretrained=True, num_classes=None)).eval()
config = resolve_input_data_config(model, args, use_test_size=True)
loader = create_loader(create_dataset('', root=folder, split='validation'), batch_size=35, num_workers=0,
                       device=torch.device('cpu'), **{k: config[k] for k in ('input_size', 'mean', 'std', 'crop_pct')},
                       interpolation=config['interpolation'])
meter = AverageMeter()
with torch.inference_mode():
    for images, labels in loader:
        meter.update(accuracy(model(images), labels)[0].item(), len(images))
assert not [module for module in sys.modules if module.startswith('ctc_timm')]
print(meter.count, meter.avg)
"""
    done = client(validate, 'hf-hub:alice/test_resnet_ctc', str(tmp_path / 'images'))
    assert done.code == 0, done.err
    count, top1 = done.last.split()
    assert count == '70'
    assert float(top1) == pytest.approx(
        json.loads((trained / 'validation' / 'results.json').read_text())['top1'], abs=1e-3
    )


def write_digits(folder: Path) -> None:
    """The images that the run was validated on, as class folders."""
    from PIL import Image

    from ctc_timm.data.digits import create_digits

    for number, (pixels, label) in enumerate(create_digits('validation[:70]', 'RGB')):
        (folder / f'{label:02d}').mkdir(parents=True, exist_ok=True)
        assert isinstance(pixels, Image.Image)
        pixels.save(folder / f'{label:02d}' / f'{number:03d}.png')


def test_a_refused_connection_is_one_line(refused: Callable[[], Done]) -> None:
    (error,) = json.loads(refused().out).values()
    assert error.startswith(f'{REPO}: http://127.0.0.1:') and '\n' not in error
    assert error.endswith(' cannot be reached; check the network and HF_ENDPOINT, then retry')
