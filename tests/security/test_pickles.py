"""Pickles and YAML tags that would leave a mark: refused in one line wherever something is read, and not run."""

from __future__ import annotations

import argparse
import io
import json
import pickle
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import yaml
from accelerate import Accelerator
from hub_client import Client
from hub_server import Blob, Hub
from safetensors.torch import load_file, save_file

from ctc_timm.cli.arguments import load_recipe
from ctc_timm.data.datasets import open_split
from ctc_timm.hub.publish import push
from ctc_timm.measure.features import SplitImages, features_of
from ctc_timm.measure.results import RowStore
from ctc_timm.models.creation import load_weights
from ctc_timm.models.loading import LoadedModel, data_flags, load_model
from ctc_timm.utils.errors import UserError
from ctc_timm.utils.yaml_files import read_mapping, read_values

SUFFIXES = ('.pth', '.pt', '.bin', '.ckpt', '.pth.tar', '.safetensors', '.npz', '.npy', '.PTH', '')
DATA = ('--dataset', 'digits', '--val-split', 'validation[:32]', '-j', '0', '-b', '32')
SMALL = ('--model', 'test_resnet', '--img-size', '16', '--epochs', '1')


class Mark:
    """An object that makes a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.file,)


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    """The file that must not appear."""
    return tmp_path / 'mark'


def _torch(thing: Any, zipped: bool = True) -> bytes:
    stream = io.BytesIO()
    torch.save(thing, stream, _use_new_zipfile_serialization=zipped)
    return stream.getvalue()


def _numpy(save: Callable[..., None], *arrays: Any) -> bytes:
    stream = io.BytesIO()
    save(stream, *arrays)
    return stream.getvalue()


def payloads(mark: Path) -> dict[str, bytes]:
    """Files that make the mark when they are read without care."""
    weights = dict(timm.create_model('test_resnet', num_classes=10).state_dict())
    objects = np.array([Mark(mark)], dtype=object)
    return {
        'a pickle': pickle.dumps(Mark(mark)),
        'an old pickle': pickle.dumps(Mark(mark), protocol=0),
        'weights with it': _torch({'state_dict': weights, 'args': Mark(mark)}),
        'weights with it, as torch saved once': _torch({**weights, 'epoch': Mark(mark)}, zipped=False),
        'the model itself': _torch(argparse.Namespace(model=Mark(mark))),
        'an array of objects': _numpy(np.save, objects),
        'an archive of arrays': _numpy(np.savez, objects),
    }


def one_line(error: BaseException) -> str:
    """A refusal's text, which must be one line of printable characters."""
    assert type(error).__str__(error).isprintable(), repr(str(error))
    return str(error)


def refused(ended: Any, mark: Path) -> str:
    """That a script ended with 2 and one line on stderr, and left no mark; the line."""
    assert not mark.exists()
    assert ended.code == 2, ended.err
    lines = [line for line in ended.err.splitlines() if 'error: ' in line]
    assert len(lines) == 1 and ended.err.splitlines()[-1] == lines[0] and 'Traceback' not in ended.err, ended.err
    return lines[0]


def test_the_payloads_are_dangerous(mark: Path) -> None:
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
def test_weights_files(tmp_path: Path, mark: Path, suffix: str) -> None:
    model = timm.create_model('test_resnet', num_classes=10)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name, data in payloads(mark).items():
        file = tmp_path / f'weights{suffix}'
        file.write_bytes(data)
        for read in (
            lambda file=file: load_model(str(file), 'test_resnet', '--checkpoint', num_classes=10),
            lambda file=file: load_weights(model, file, '--initial-checkpoint'),
        ):
            with pytest.raises(UserError) as told:
                read()
            assert str(file) in one_line(told.value), name
            assert not mark.exists(), (name, suffix)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_sound_weights_of_every_kind_are_taken(tmp_path: Path) -> None:
    torch.manual_seed(1)
    weights = dict(timm.create_model('test_resnet', num_classes=10).state_dict())
    save_file(weights, tmp_path / 'a.safetensors')
    torch.save(weights, tmp_path / 'b.pth')
    torch.save({'state_dict': weights, 'epoch': 3, 'args': argparse.Namespace(lr=0.1)}, tmp_path / 'c.pth.tar')
    torch.save(weights, tmp_path / 'd.bin', _use_new_zipfile_serialization=False)
    for file in sorted(tmp_path.iterdir()):
        found = load_model(str(file), 'test_resnet', num_classes=10).model.state_dict()
        assert all(torch.equal(found[name], tensor) for name, tensor in weights.items()), file


@pytest.mark.parametrize(
    ('script_name', 'words'),
    [
        ('train.py', (*DATA, *SMALL, '--mode', 'vanilla', '--initial-checkpoint', 'FILE', '--output', 'OUT')),
        ('train.py', (*DATA, *SMALL, '--mode', 'vanilla', '--resume', 'STATE', '--output', 'OUT')),
        ('validate.py', ('RUN', '-j', '0')),
        ('validate.py', ('FILE', '--model', 'test_resnet', *DATA)),
        ('validate.py', ('local-dir:FOLDER', *DATA)),
        ('train.py', (*DATA, '--model', 'local-dir:FOLDER', '--pretrained', '--mode', 'vanilla', '--output', 'OUT')),
        ('transfer/linear_probe.py', ('RUN/weights/epoch-0000.safetensors', *DATA)),
        ('transfer/finetune.py', ('RUN', *DATA, '--epochs', '1', '--output', 'OUT')),
        ('transfer/dynamics.py', ('RUN', '-j', '0')),
    ],
)
def test_scripts(
    script: Callable[..., Any],
    make_run: Callable[..., Path],
    tmp_path: Path,
    mark: Path,
    script_name: str,
    words: tuple[str, ...],
) -> None:
    run = make_run()
    data = payloads(mark)['weights with it']
    file = tmp_path / 'stranger.pth.tar'
    state = run / 'state' / 'epoch-0000'
    state.mkdir(parents=True)
    folder = tmp_path / 'folder'
    folder.mkdir()
    (state / 'progress.json').write_text(json.dumps({'epoch': 1, 'updates': 1, 'stage': 'vanilla'}))
    shutil.copy(run / 'config.json', folder)
    targets = [run / f'{name}.safetensors' for name in ('best', 'last', 'weights/epoch-0000')]
    targets += [state / name for name in ('optimizer.bin', 'model.safetensors', 'random_states_0.pkl', 'scheduler.bin')]
    for target in (file, folder / 'pytorch_model.bin', *targets):
        target.write_bytes(data)
    places = {'FILE': file, 'RUN': run, 'STATE': state, 'FOLDER': folder, 'OUT': tmp_path / 'out'}
    for name, place in places.items():
        words = tuple(word.replace(name, str(place)) for word in words)
    refused(script(script_name, *words), mark)
    assert not list(tmp_path.glob('out/**/*.safetensors'))


def test_a_run_that_is_published(make_run: Callable[..., Path], tmp_path: Path, mark: Path) -> None:
    run = make_run()
    for name, data in payloads(mark).items():
        (run / 'best.safetensors').write_bytes(data)
        with pytest.raises(UserError, match=r'best\.safetensors: not '):
            push(run, 'alice/test_resnet_ctc', dry_run=True)
        assert not mark.exists() and not (run / 'publish').exists(), name


def test_the_hub(client: Client, hub: Hub, make_run: Callable[..., Path], mark: Path) -> None:
    config = (make_run() / 'config.json').read_bytes()
    evil = payloads(mark)
    repos = {
        'mallory/bin': {'pytorch_model.bin': Blob(evil['weights with it'], lfs=True)},
        'mallory/safe': {'model.safetensors': Blob(evil['weights with it'], lfs=True)},
        'mallory/old': {'pytorch_model.bin': Blob(evil['an old pickle'])},
    }
    for repo, files in repos.items():
        hub.commit(hub.create(repo), 'main', 'evil', {'config.json': Blob(config), **files})
        source = f'hf-hub:{repo}'
        line = refused(client.script('validate.py', source, *DATA), mark)
        assert source in line
        where = ['--pretrained', '--mode', 'vanilla', '--output', 'out', '--epochs', '1']
        assert source in refused(client.script('train.py', '--model', source, *DATA, *where), mark)
        assert not (client.folder / 'out').exists()
    done = client.command('zoo', 'add', 'mallory/bin', '--zoo', 'zoo.json')
    assert 'only safetensors are taken' in refused(done, mark)


def test_a_pickle_under_the_name_of_published_weights(
    client: Client, hub: Hub, make_run: Callable[..., Path], mark: Path
) -> None:
    config = (make_run() / 'config.json').read_bytes()
    weights = Blob(payloads(mark)['weights with it'], lfs=True)
    repo = hub.create('alice/test_resnet_ctc')
    hub.commit(repo, 'main', 'evil', {'config.json': Blob(config), 'model.safetensors': weights})
    line = refused(client.script('validate.py', 'test_resnet_ctc', *DATA, CTC_TIMM_NAMESPACE='alice'), mark)
    assert 'does not fit test_resnet' in line
    assert (
        client.command('zoo', 'add', 'alice/test_resnet_ctc', '--zoo', 'zoo.json').code == 0
    )  # which reads bytes only
    line = refused(client.script('validate.py', 'test_resnet_ctc', *DATA, CTC_TIMM_ZOO='zoo.json'), mark)
    assert 'does not fit test_resnet' in line


def test_cached_features(tmp_path: Path, mark: Path, flags: Callable[..., argparse.Namespace]) -> None:
    accelerator = Accelerator(cpu=True)
    args = flags('--dataset digits --in-chans 1 -j 0 -b 32')
    config = {'input_size': (1, 16, 16), 'mean': (0.3,), 'std': (0.4,), 'interpolation': 'bicubic', 'crop_pct': 1.0}
    images = SplitImages(open_split(args, 'validation[:32]'), args, {**config, 'crop_mode': 'center'}, accelerator)
    torch.manual_seed(0)
    loaded = LoadedModel(timm.create_model('test_resnet', num_classes=10, in_chans=1).eval(), 'x', 'x')
    first = features_of(loaded, images, accelerator, tmp_path / 'features')
    (file,) = (tmp_path / 'features').iterdir()
    for data in payloads(mark).values():
        file.write_bytes(data)
        again = features_of(loaded, images, accelerator, tmp_path / 'features')
        assert torch.equal(again.features_ND, first.features_ND) and not mark.exists()
        assert torch.equal(load_file(file)['features'], first.features_ND)  # it was written anew

    rows = tmp_path / 'rows.jsonl'
    rows.write_bytes(
        b'{"key": "a", "row": {"top1": 1.0}}\n' + pickle.dumps(Mark(mark), protocol=0) + b'\n[]\n\xff\n{"key": 3}'
    )
    assert RowStore(rows).rows == {'a': {'top1': 1.0}} and not mark.exists()


def test_data_sets(flags: Callable[..., argparse.Namespace], image_folder: Path, tmp_path: Path, mark: Path) -> None:
    evil = tmp_path / 'map.pkl'
    evil.write_bytes(pickle.dumps(Mark(mark)))
    args = flags(f'--data-dir {image_folder} --class-map {evil}')
    with pytest.raises(UserError) as told:
        open_split(args, 'train')
    one_line(told.value)
    # A loading script, which Hugging Face's data sets once were.
    folder = tmp_path / 'scripted'
    folder.mkdir()
    (folder / 'scripted.py').write_text(f'open({str(mark)!r}, "w")\nimport datasets\n')
    with pytest.raises(UserError) as told:
        open_split(flags(f'--dataset hfds/{folder}'), 'train')
    one_line(told.value)
    # Batches of pickles in place of CIFAR's.
    (tmp_path / 'cifar-10-batches-py').mkdir()
    for name in ('batches.meta', 'test_batch', *(f'data_batch_{i}' for i in range(1, 6))):
        (tmp_path / 'cifar-10-batches-py' / name).write_bytes(pickle.dumps(Mark(mark)))
    with pytest.raises(UserError) as told:
        open_split(flags(f'--dataset torch/cifar10 --data-dir {tmp_path}'), 'train')
    one_line(told.value)
    # A tar's index as timm keeps it beside large ones, and a member that would leave the folder.
    images = tmp_path / 'images.tar'
    with tarfile.open(images, 'w') as tar:
        for file in sorted(image_folder.glob('train/*/*')):
            tar.add(file, f'../../outside/{file.parent.name}/{file.name}')
    (tmp_path / '_images_tarinfos.pickle').write_bytes(pickle.dumps(Mark(mark)))
    source = open_split(flags(f'--data-dir {images}'), '')
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
        'subprocess': f'a: !!python/object/apply:subprocess.check_output [["touch", "{mark}"]]',
        'name': 'lr: !!python/name:os.system',
        'module': 'lr: !!python/module:os',
        'tuple': 'lr: !!python/tuple [1, 2]',
        'own tag': 'lr: !evil 3',
        'a key': f'? !!python/object/apply:os.system ["touch {mark}"]\n: 1',
        'aliases': '\n'.join(levels),
        'merges': '\n'.join(merged),
        'itself': '&a [*a]',
        'depth': f'lr: {"[" * 3000}{"]" * 3000}',
        'no date': 'lr: 2024-99-99',
        'digits': f'lr: {"9" * 5000}',
        'a list': '- lr',
        'a text': 'lr',
        'two documents': 'lr: 1\n---\nlr: 2',
        'control': 'lr: "\x07"',
    }


def test_yaml_runs_nothing(mark: Path, tmp_path: Path) -> None:
    attacks = yaml_attacks(mark)
    yaml.unsafe_load(attacks['system'])
    assert mark.exists()
    mark.unlink()
    for name, text in attacks.items():
        file = tmp_path / 'some.yaml'
        file.write_text(text)
        with pytest.raises(UserError) as told:
            read_mapping(file)
        assert str(file) in one_line(told.value) and not mark.exists(), name
    file.write_bytes(b'lr: \xff')
    with pytest.raises(UserError):
        read_mapping(file)
    plain = 'a: 1\nb: [x, 2.5, true, null]\nc: {d: "\\u0000"}\ne: |\n  lines\n'
    assert read_values(plain) == yaml.safe_load(plain)


def test_recipes_run_nothing(mark: Path, tmp_path: Path) -> None:
    for name, text in yaml_attacks(mark).items():
        file = tmp_path / 'recipe.yaml'
        file.write_text(text)
        with pytest.raises(UserError) as told:
            load_recipe(file)
        assert '--config' in one_line(told.value) and not mark.exists(), name


def test_arguments_of_strangers_run_nothing(
    script: Callable[..., Any], make_run: Callable[..., Path], tmp_path: Path, mark: Path
) -> None:
    run = make_run()
    attacks = yaml_attacks(mark)
    for name in ('nested', 'aliases', 'merges', 'depth', 'no date', 'a list'):
        (run / 'args.yaml').write_text(attacks[name])
        with pytest.raises(UserError) as told:
            push(run, 'alice/test_resnet_ctc', dry_run=True)
        assert 'args.yaml' in one_line(told.value) and not mark.exists()
    (run / 'args.yaml').write_text(attacks['nested'])
    for words in (('validate.py', str(run)), ('transfer/dynamics.py', str(run), '-j', '0')):
        assert 'args.yaml' in refused(script(*words), mark)
    (run / 'state' / 'epoch-0000').mkdir(parents=True)
    (run / 'state' / 'epoch-0000' / 'progress.json').write_text('{"epoch": 1}')
    refused(script('train.py', '--resume', str(run)), mark)
    refused(script('train.py', '-c', str(run / 'args.yaml')), mark)


@pytest.mark.parametrize(
    'args',
    [
        {'dataset': 'wds/x', 'data_dir': 'pipe:touch MARK'},
        {'dataset': 'WDS/x', 'val_split': 'pipe:touch MARK; {0..1}.tar'},
        {'dataset': 'wds/x', 'data_dir': "https://host/x'; touch MARK; '", 'val_split': 'a-{0..1}.tar'},
        {'dataset': 'wds/x', 'data_dir': 'https://host/$(touch MARK)'},
        {'dataset': ['wds/x']},
        {'dataset': {'a': 1}},
        {'dataset': 'digits', 'workers': '2'},
        {'dataset': 'digits', 'workers': True},
        {'dataset': 'digits', 'val_split': 3},
    ],
)
def test_data_that_a_stranger_names(
    script: Callable[..., Any], make_run: Callable[..., Path], mark: Path, args: dict[str, Any]
) -> None:
    args = {key: value.replace('MARK', str(mark)) if isinstance(value, str) else value for key, value in args.items()}
    with pytest.raises(UserError, match=r'args\.yaml: --') as told:
        data_flags(args)
    one_line(told.value)
    refused(script('validate.py', str(make_run(**args))), mark)


def test_data_that_a_stranger_may_name() -> None:
    args = {'dataset': 'wds/flowers', 'data_dir': 'https://host/flowers', 'val_split': 'a-{00..12}.tar|1000'}
    assert data_flags({**args, 'workers': 3, 'class_map': None}) == {**args, 'workers': 3}
