"""Pickles and YAML tags that would leave a mark: refused in one line wherever something is read, and not run."""

from __future__ import annotations

import argparse
import io
import json
import pickle
import shutil
import tarfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import yaml
from accelerate import Accelerator
from safetensors.torch import load_file, save_file

from ctc_timm.api import recipe_settings
from ctc_timm.data.datasets import open_split
from ctc_timm.data.settings import DataSettings, LoaderSettings
from ctc_timm.hub.publish import push
from ctc_timm.measure.features import SplitImages, features_of
from ctc_timm.measure.results import RowStore
from ctc_timm.models.loading import LoadedModel, data_settings, load_model, load_weights
from ctc_timm.utils.errors import UserError
from ctc_timm.utils.yaml_files import read_mapping, read_recipe, read_values
from hub_server import Blob
from runs import CONFIG

SETTINGS = recipe_settings()
SUFFIXES = ('.pth', '.pt', '.bin', '.ckpt', '.pth.tar', '.safetensors', '.npz', '.npy', '.PTH', '')
DATA = ('--dataset', 'digits', '--val-split', 'validation[:32]', '-j', '0', '-b', '32')
SUPERVISED = (*DATA, '--mode', 'vanilla', '--epochs', '1')
REPO = 'alice/test_resnet_ctc'


class Mark:
    """An object that makes a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.file,)


@pytest.fixture
def mark(tmp_path):
    """The file that must not appear."""
    return tmp_path / 'mark'


def payloads(mark: Path) -> dict[str, bytes]:
    """Files that make the mark when they are read without care."""

    def saved(save: Callable[[Any, io.BytesIO], Any], thing: Any) -> bytes:
        stream = io.BytesIO()
        save(thing, stream)
        return stream.getvalue()

    weights = dict(timm.create_model('test_resnet', num_classes=10).state_dict())
    objects, once = np.array([Mark(mark)], dtype=object), partial(torch.save, _use_new_zipfile_serialization=False)
    return {
        'a pickle': pickle.dumps(Mark(mark)),
        'an old pickle': pickle.dumps(Mark(mark), protocol=0),
        'weights with it': saved(torch.save, {'state_dict': weights, 'args': Mark(mark)}),
        'weights with it, as torch saved once': saved(once, {**weights, 'epoch': Mark(mark)}),
        'the model itself': saved(torch.save, argparse.Namespace(model=Mark(mark))),
        'an array of objects': saved(lambda thing, stream: np.save(stream, thing), objects),
        'an archive of arrays': saved(lambda thing, stream: np.savez(stream, thing), objects),
    }


def refused(call: Callable[[], Any], mark: Path, *words: str) -> None:
    """It is refused in one line that holds the words, and leaves no mark."""
    with pytest.raises(UserError) as caught:
        call()
    text = type(caught.value).__str__(caught.value)
    assert text.isprintable() and all(word in text for word in words), text
    assert not mark.exists()


def ended_in_one_line(ended: Any, mark: Path, *words: str) -> None:
    """A command ended with 2 and one line on stderr that holds the words, and left no mark."""
    assert not mark.exists()
    assert ended.code == 2, ended.err
    lines = [line for line in ended.err.splitlines() if 'error: ' in line]
    assert len(lines) == 1 and ended.err.splitlines()[-1] == lines[0] and 'Traceback' not in ended.err, ended.err
    assert all(word in lines[0] for word in words), lines[0]


def test_the_payloads_are_dangerous(mark):
    for name, data in payloads(mark).items():
        if name.startswith('an ar'):
            found: Any = np.load(io.BytesIO(data), allow_pickle=True)
            found = found['arr_0'] if 'archive' in name else found
        elif name.endswith('pickle'):
            pickle.loads(data)
        else:
            torch.load(io.BytesIO(data), weights_only=False)
        assert mark.exists(), name
        mark.unlink()


@pytest.mark.parametrize('suffix', SUFFIXES)
def test_weights_files(tmp_path, mark, suffix):
    model, file = timm.create_model('test_resnet', num_classes=10), tmp_path / f'weights{suffix}'
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for data in payloads(mark).values():
        file.write_bytes(data)
        refused(lambda: load_model(file, 'test_resnet', 'checkpoint', num_classes=10), mark, str(file))
        refused(lambda: load_weights(model, file, str(file)), mark, str(file))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_sound_weights_of_every_kind_are_taken(tmp_path):
    torch.manual_seed(1)
    weights = dict(timm.create_model('test_resnet', num_classes=10).state_dict())
    save_file(weights, tmp_path / 'a.safetensors')
    torch.save(weights, tmp_path / 'b.pth')
    torch.save({'state_dict': weights, 'epoch': 3, 'args': argparse.Namespace(lr=0.1)}, tmp_path / 'c.pth.tar')
    torch.save(weights, tmp_path / 'd.bin', _use_new_zipfile_serialization=False)
    for file in sorted(tmp_path.iterdir()):
        found = load_model(file, 'test_resnet', num_classes=10).model.state_dict()
        assert all(torch.equal(found[name], tensor) for name, tensor in weights.items()), file


@pytest.mark.parametrize(
    ('name', 'words'),
    [
        ('train.py', (*SUPERVISED, '--model', 'test_resnet', '--initial-checkpoint', 'FILE', '--output', 'OUT')),
        ('train.py', ('--resume', 'STATE')),
        ('validate.py', ('RUN', '-j', '0')),
        ('validate.py', ('FILE', '--model', 'test_resnet', *DATA)),
        ('validate.py', ('local-dir:FOLDER', *DATA)),
        ('train.py', (*SUPERVISED, '--model', 'local-dir:FOLDER', '--pretrained', '--output', 'OUT')),
        ('transfer/linear_probe.py', ('RUN/weights/epoch-0000.safetensors', *DATA)),
        ('transfer/finetune.py', ('RUN', *DATA, '--epochs', '1', '--output', 'OUT')),
        ('transfer/dynamics.py', ('RUN', '-j', '0')),
    ],
)
def test_commands(script, make_run, tmp_path, mark, name, words):
    run, folder, file = make_run(), tmp_path / 'folder', tmp_path / 'stranger.pth.tar'
    state = run / 'state' / 'epoch-0000'
    state.mkdir(parents=True)
    folder.mkdir()
    (state / 'progress.json').write_text(json.dumps({'epoch': 1, 'updates': 1, 'stage': 'vanilla'}))
    shutil.copy(run / 'config.json', folder)
    targets = [run / f'{name}.safetensors' for name in ('best', 'last', 'weights/epoch-0000')]
    targets += [state / name for name in ('optimizer.bin', 'model.safetensors', 'random_states_0.pkl', 'scheduler.bin')]
    for target in (file, folder / 'pytorch_model.bin', *targets):
        target.write_bytes(payloads(mark)['weights with it'])
    places = {'FILE': file, 'RUN': run, 'STATE': state, 'FOLDER': folder, 'OUT': tmp_path / 'out'}
    for place, path in places.items():
        words = tuple(word.replace(place, str(path)) for word in words)
    ended_in_one_line(script(name, *words), mark)
    assert not list(tmp_path.glob('out/**/*.safetensors'))


def test_the_hub(client, hub, make_run, mark):
    config, evil = Blob((make_run() / 'config.json').read_bytes()), payloads(mark)
    repos = {
        'mallory/bin': {'pytorch_model.bin': Blob(evil['weights with it'], lfs=True)},
        'mallory/safe': {'model.safetensors': Blob(evil['weights with it'], lfs=True)},
        'mallory/old': {'pytorch_model.bin': Blob(evil['an old pickle'])},
        REPO: {'model.safetensors': Blob(evil['weights with it'], lfs=True)},
    }
    for repo, files in repos.items():
        hub.commit(hub.create(repo), 'main', 'evil', {'config.json': config, **files})
        source = f'hf-hub:{repo}'
        ended_in_one_line(client.command('validate', source, *DATA), mark, source)
        done = client.command('train', '--model', source, '--pretrained', *SUPERVISED, '--output', 'out')
        ended_in_one_line(done, mark, source)
        assert not (client.folder / 'out').exists()
    done = client.command('zoo', 'add', 'mallory/bin', '--zoo', 'zoo.json')
    ended_in_one_line(done, mark, 'only safetensors are taken')
    # A pickle under the name of published weights; cataloging reads its bytes only.
    assert client.command('zoo', 'add', REPO, '--zoo', 'zoo.json').code == 0
    for env in ({'CTC_TIMM_NAMESPACE': 'alice'}, {'CTC_TIMM_ZOO': 'zoo.json'}):
        done = client.command('validate', 'test_resnet_ctc', *DATA, **env)
        ended_in_one_line(done, mark, 'does not fit test_resnet')


def test_cached_features(tmp_path, mark):
    accelerator = Accelerator(cpu=True)
    loader = LoaderSettings(batch_size=32, workers=0)
    config = {**CONFIG, 'input_size': (1, 16, 16), 'mean': (0.3,), 'std': (0.4,)}
    source = open_split(DataSettings(dataset='digits', in_chans=1), 'validation[:32]')
    images = SplitImages(source, loader, config, accelerator)
    torch.manual_seed(0)
    loaded = LoadedModel(timm.create_model('test_resnet', num_classes=10, in_chans=1).eval(), 'x', 'x')
    first = features_of(loaded, images, accelerator, tmp_path / 'features')
    (file,) = (tmp_path / 'features').iterdir()
    for data in payloads(mark).values():
        file.write_bytes(data)
        again = features_of(loaded, images, accelerator, tmp_path / 'features')
        assert torch.equal(again.features_ND, first.features_ND) and not mark.exists()
        assert torch.equal(load_file(file)['features'], first.features_ND)  # it was written anew
    rows, evil = tmp_path / 'rows.jsonl', pickle.dumps(Mark(mark), protocol=0)
    rows.write_bytes(b'{"key": "a", "row": {"top1": 1.0}}\n' + evil + b'\n[]\n\xff\n{"key": 3}')
    assert RowStore(rows).rows == {'a': {'top1': 1.0}} and not mark.exists()


def test_data_sets(image_folder, tmp_path, mark):
    evil, scripted, cifar = pickle.dumps(Mark(mark)), tmp_path / 'scripted', tmp_path / 'cifar-10-batches-py'
    (tmp_path / 'map.pkl').write_bytes(evil)
    scripted.mkdir()  # a loading script, which Hugging Face's data sets once were
    (scripted / 'scripted.py').write_text(f'open({str(mark)!r}, "w")\nimport datasets\n')
    cifar.mkdir()
    for name in ('batches.meta', 'test_batch', *(f'data_batch_{i}' for i in range(1, 6))):
        (cifar / name).write_bytes(evil)
    for data in (
        DataSettings(data_dir=str(image_folder), class_map=str(tmp_path / 'map.pkl')),
        DataSettings(dataset=f'hfds/{scripted}'),
        DataSettings(dataset='torch/cifar10', data_dir=str(tmp_path)),
    ):
        refused(lambda data=data: open_split(data, 'train'), mark)
    # A tar's index as timm keeps it beside large ones, and a member that would leave the folder.
    images = tmp_path / 'images.tar'
    with tarfile.open(images, 'w') as tar:
        for file in sorted(image_folder.glob('train/*/*')):
            tar.add(file, f'../../outside/{file.parent.name}/{file.name}')
    (tmp_path / '_images_tarinfos.pickle').write_bytes(evil)
    source = open_split(DataSettings(data_dir=str(images)), '')
    assert source.labels_N is not None and len(source.labels_N) == 36
    source.dataset[0]
    assert not mark.exists() and not (tmp_path.parent / 'outside').exists() and not (tmp_path / 'outside').exists()


def yaml_attacks(mark: Path) -> dict[str, str]:
    """YAML that runs something, takes gigabytes, or breaks its reader; and what is only no YAML."""
    levels = [f'a{i}: &a{i} [{", ".join([f"*a{i - 1}"] * 10 if i else ["x"] * 10)}]' for i in range(30)]
    merged = [f'b{i}: &b{i} {{<<: [{", ".join([f"*b{i - 1}"] * 10)}]}}' if i else 'b0: &b0 {x: 1}' for i in range(30)]
    return {
        'system': f'!!python/object/apply:os.system ["touch {mark}"]',
        'nested': f'lr: !!python/object/apply:os.system ["touch {mark}"]',
        'eval': f"epochs: !!python/object/apply:eval [\"open('{mark}', 'w')\"]",
        'new': f'lr: !!python/object/new:pathlib.PosixPath ["{mark}"]',
        'name': 'lr: !!python/name:os.system',
        'module': 'lr: !!python/module:os',
        'a key': f'? !!python/object/apply:os.system ["touch {mark}"]\n: 1',
        'aliases': '\n'.join(levels),
        'merges': '\n'.join(merged),
    }


def test_yaml_runs_nothing(mark, make_run, script):
    attacks = yaml_attacks(mark)
    yaml.unsafe_load(attacks['system'])
    assert mark.exists()
    mark.unlink()
    run = make_run()
    file = run / 'args.yaml'
    for text in (*attacks.values(), 'lr: \udcff'):
        file.write_bytes(text.encode(errors='surrogateescape'))
        refused(lambda: read_mapping(file), mark, str(file))
        refused(lambda: read_recipe(file), mark, '`config`')
        refused(lambda: push(run, REPO, SETTINGS, dry_run=True), mark, 'args.yaml')
    plain = 'a: 1\nb: [x, 2.5, true, null]\nc: {d: "\\u0000"}\ne: |\n  lines\n'
    assert read_values(plain) == yaml.safe_load(plain)

    file.write_text(attacks['nested'])
    (run / 'state' / 'epoch-0000').mkdir(parents=True)
    (run / 'state' / 'epoch-0000' / 'progress.json').write_text('{"epoch": 1}')
    for words in (('validate.py',), ('transfer/dynamics.py', '-j', '0')):
        ended_in_one_line(script(*words, str(run)), mark, 'args.yaml')
    for words in (('--resume', str(run)), ('-c', str(file))):
        ended_in_one_line(script('train.py', *words), mark)


@pytest.mark.parametrize(
    'args',
    [
        {'dataset': 'wds/x', 'data_dir': 'pipe:touch MARK'},
        {'dataset': 'WDS/x', 'val_split': 'pipe:touch MARK; {0..1}.tar'},
        {'dataset': 'wds/x', 'data_dir': "https://host/x'; touch MARK; '", 'val_split': 'a-{0..1}.tar'},
        {'dataset': 'wds/x', 'data_dir': 'https://host/$(touch MARK)'},
        {'dataset': ['wds/x']},
        {'dataset': 'digits', 'workers': '2'},
        {'dataset': 'digits', 'val_split': 3},
    ],
)
def test_data_that_a_stranger_names(script, make_run, mark, args):
    args = {key: value.replace('MARK', str(mark)) if isinstance(value, str) else value for key, value in args.items()}
    run = make_run(**args)
    refused(lambda: data_settings(run), mark, 'args.yaml: `')
    ended_in_one_line(script('validate.py', str(run)), mark)


def test_data_that_a_stranger_may_name(make_run):
    args = {'dataset': 'wds/flowers', 'data_dir': 'https://host/flowers', 'val_split': 'a-{00..12}.tar|1000'}
    assert data_settings(make_run(**args, workers=3, class_map=None)) == {**args, 'workers': 3}
