"""Files of a run, a catalog and the cache with bytes changed, lost or put in: an error in one line, or what was kept.

Every case is drawn from a seed of its own, and is loaded the way its readers load it. Weights are right only if every
tensor is what was written.
"""

from __future__ import annotations

import json
import random
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from accelerate import Accelerator
from runs import forget_processes
from safetensors.torch import load_file
from torch import Tensor

from ctc_timm.data.datasets import open_split
from ctc_timm.data.settings import DataSettings, LoaderSettings
from ctc_timm.data.transforms import data_config
from ctc_timm.hub.collect import add
from ctc_timm.measure.features import LabeledFeatures, SplitImages, features_of
from ctc_timm.measure.plots.training import plot_run, stage_change
from ctc_timm.measure.results import RowStore
from ctc_timm.models import catalog
from ctc_timm.models.creation import load_weights
from ctc_timm.models.loading import data_settings, load_model
from ctc_timm.models.registry import _with_weights
from ctc_timm.runs import Run
from ctc_timm.training.build import train
from ctc_timm.training.checkpoints import find_resume
from ctc_timm.training.settings import TrainSettings
from ctc_timm.utils.errors import UserError
from ctc_timm.utils.settings import build, check_values, settings_of

SECONDS = 20  # more is a hang
LETTERS = b'0123456789-aeglnsx_FUI16.'  # that leave a text a text
tried: Counter[str] = Counter()
refused: Counter[str] = Counter()


def damaged(data: bytes, seed: int, start: int = 0, end: int | None = None) -> bytes:
    """A file with a handful of bytes changed, with a piece cut off, put in, taken out, doubled or blanked.

    Args:
        data: The file.
        seed: Decides what is done to it.
        start: First byte that may be touched.
        end: The one after the last, the file's end when None.
    """
    dice = random.Random(seed)
    end = len(data) if end is None else end
    place, length = dice.randrange(start, end), dice.choice((1, 2, 8, 100, 512))
    kind = dice.choice(('flip', 'flip', 'letter', 'letter', 'bit', 'cut', 'insert', 'remove', 'double', 'blank'))
    if kind in ('flip', 'letter'):
        changed = bytearray(data)
        for _ in range(dice.randint(1, 5) if kind == 'flip' else 1):
            place = dice.randrange(start, end)
            changed[place] = changed[place] ^ dice.randint(1, 255) if kind == 'flip' else dice.choice(LETTERS)
        return bytes(changed)
    if kind == 'bit':
        changed = bytearray(data)
        changed[place] ^= 1 << dice.randrange(8)
        return bytes(changed)
    piece = data[place : min(place + length, end)]
    put = {'insert': dice.randbytes(length), 'double': piece * 2, 'blank': b'\0' * len(piece)}.get(kind, b'')
    rest = b'' if kind == 'cut' else data[place:] if kind == 'insert' else data[place + len(piece) :]
    return data[:place] + put + rest


def one_line(error: UserError) -> None:
    """A message that people can read."""
    message = ' '.join(str(error).split())
    assert message and len(message) < 1500 and 'Traceback' not in message, message


def attempt(kind: str, load: Callable[..., Any], *args: Any) -> Any:
    """What a load gives, or None where it was refused in one line; anything else is a failure."""
    tried[kind] += 1
    started = time.monotonic()
    try:
        return load(*args)
    except UserError as error:
        refused[kind] += 1
        one_line(error)
        return None
    finally:
        assert time.monotonic() - started < SECONDS


@pytest.fixture(scope='module')
def trained(flags: Callable[..., Any], tiny: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of both stages."""
    forget_processes()
    folder = tmp_path_factory.mktemp('runs')
    return train(flags(*tiny, f'--epochs 2 --output {folder} --experiment run --keep-every 1')).path


@pytest.fixture(scope='module')
def weights(trained: Path) -> dict[str, Tensor]:
    """What was saved."""
    return load_file(trained / 'best.safetensors')


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy of the run to damage."""
    return Path(shutil.copytree(trained, tmp_path / 'run', ignore=shutil.ignore_patterns('state')))


def same(model: torch.nn.Module, weights: dict[str, Tensor]) -> bool:
    """Whether a model has these weights, every bit of them."""
    held = model.state_dict()
    return set(held) == set(weights) and all(torch.equal(held[name], weights[name]) for name in weights)


def header_end(data: bytes) -> int:
    """Where the tensors of a safetensors file begin."""
    return 8 + int.from_bytes(data[:8], 'little')


@pytest.mark.parametrize('part', ['header', 'tensors'])
def test_weights_of_a_run(run: Path, weights: dict[str, Tensor], part: str) -> None:
    """The file's own hash finds what a sound header would hide."""
    file = run / 'best.safetensors'
    data = file.read_bytes()
    limits = (0, header_end(data)) if part == 'header' else (header_end(data), len(data))
    for seed in range(60):
        file.write_bytes(damaged(data, seed, *limits))
        loaded = attempt(f'weights, {part}', load_model, str(run))
        assert loaded is None or same(loaded.model, weights), seed
    file.write_bytes(data)
    assert same(load_model(str(run)).model, weights)


def test_weights_to_start_from(run: Path, weights: dict[str, Tensor]) -> None:
    """`--initial-checkpoint`, and a file that is named without its run."""
    file = run.parent / 'loose.safetensors'
    data = (run / 'best.safetensors').read_bytes()
    for seed in range(1000, 1040):
        file.write_bytes(damaged(data, seed))
        model = timm.create_model('test_resnet', num_classes=10)
        before = refused['weights, to start from']
        attempt('weights, to start from', load_weights, model, file, 'initial_checkpoint')
        assert refused['weights, to start from'] > before or same(model, weights), seed
        loaded = attempt('weights, loose', load_model, str(file))
        assert loaded is None or same(loaded.model, weights), seed


def test_config_of_a_run(run: Path, weights: dict[str, Tensor]) -> None:
    """Whatever config.json says, the weights are those that were saved, in the architecture they were saved from."""
    file = run / 'config.json'
    data = file.read_bytes()
    for seed in range(100):
        file.write_bytes(damaged(data, seed))
        loaded = attempt('config.json', load_model, str(run))
        if loaded is not None:
            assert same(loaded.model, weights), seed
            config = attempt('config.json, used', data_config, DataSettings(), loaded.model)
            assert config is None or len(config['mean']) == len(config['std'])


def built(entry: catalog.Entry) -> torch.nn.Module:
    """The model that `timm.create_model(name, pretrained=True)` makes of an entry."""
    create = partial(timm.models.model_entrypoint(entry.architecture), pretrained=True, pretrained_cfg=entry.to_timm())
    return _with_weights(partial(create, **entry.model_args), entry, None)


def test_catalog(run: Path, weights: dict[str, Tensor], tmp_path: Path) -> None:
    """An entry that is believed loads the weights that were cataloged, as its hash is checked."""
    file = tmp_path / 'zoo.json'
    for tag in ('a', 'b'):
        add(str(run), file, tag=tag)
    data = file.read_bytes()
    assert len(catalog.load(file)) == 2
    for seed in range(120):
        file.write_bytes(damaged(data, seed))
        entries = attempt('zoo.json', catalog.load, file)
        for entry in (entries or {}).values():
            if not timm.is_model(entry.architecture):
                continue
            model = attempt('zoo.json, loaded', built, entry)
            assert model is None or same(model, weights), seed


def test_weights_of_a_catalog(run: Path, tmp_path: Path) -> None:
    """Any change at all is refused, in the header, the metadata or the tensors."""
    entry = add(str(run), tmp_path / 'zoo.json', tag='a')
    file = run / 'best.safetensors'
    data = file.read_bytes()
    for seed in range(2000, 2060):
        changed = damaged(data, seed)
        file.write_bytes(changed)
        assert (attempt('weights, cataloged', built, entry) is None) == (changed != data), seed


def test_arguments_of_a_run(run: Path) -> None:
    """Read as a measurement reads them, and as a resume or a recipe does."""
    file = run / 'args.yaml'
    data = file.read_bytes()
    for seed in range(60):
        file.write_bytes(damaged(data, seed))
        attempt('args.yaml, for data', data_settings, run)
        found = attempt('args.yaml', Run(run).args)
        if found is not None:
            kept = {k: v for k, v in found.items() if k in settings_of(TrainSettings)}
            attempt('args.yaml, as presets', check_values, TrainSettings, kept, str(file))


@pytest.mark.parametrize('name', ['summary.csv', 'metrics.jsonl'])
def test_numbers_of_a_run(run: Path, name: str) -> None:
    """Drawn, or refused; and a resume, which cuts off what it writes again, refuses or keeps the rows before."""
    file = run / name
    data = file.read_bytes()
    for seed in range(60):
        file.write_bytes(damaged(data, seed))
        before = file.read_bytes()
        if seed < 15:  # a picture takes its time
            pictures = attempt(f'{name}, drawn', plot_run, Run(run))
            assert pictures is None or all(picture.stat().st_size for picture in pictures)
        attempt(f'{name}, read', lambda: (Run(run).rows(), stage_change(Run(run))))
        attempt(f'{name}, resumed', Run(run).clean_up, 1)
        lines = iter(before.splitlines(keepends=True))  # what is kept stood there before, in that order
        assert all(kept in lines for kept in file.read_bytes().splitlines(keepends=True)), seed
    file.write_bytes(data)


def features_by(run: Path, cache: Path) -> tuple[Callable[[], LabeledFeatures], Path]:
    """How to have a model's features of a few images, and the file that keeps them."""
    data, loader = DataSettings(dataset='digits', img_size=16, mean=(0.3,), std=(0.4,)), LoaderSettings(workers=0)
    loaded, accelerator = load_model(str(run)), Accelerator()
    images = SplitImages(open_split(data, 'validation[:20]'), loader, data_config(data, loaded.model), accelerator)
    features_of(loaded, images, accelerator, cache, logits=True)
    (file,) = cache.iterdir()
    return lambda: features_of(loaded, images, accelerator, cache, logits=True), file


def test_cached_features(run: Path, tmp_path: Path) -> None:
    """A damaged file is computed anew: the features are always the model's own."""
    load, file = features_by(run, tmp_path / 'cache')
    wanted, data = load(), file.read_bytes()
    for seed in range(60):
        file.write_bytes(damaged(data, seed, *((0, header_end(data)) if seed % 2 else (0, len(data)))))
        found = attempt('cached features', load)
        assert torch.equal(found.features_ND, wanted.features_ND) and torch.equal(found.labels_N, wanted.labels_N)
        assert torch.equal(found.logits_NC, wanted.logits_NC)
    assert refused['cached features'] == 0


def test_rows_of_a_measurement(tmp_path: Path) -> None:
    """A damaged row is measured again, the others stay; what is added can be read."""
    file = tmp_path / 'rows.jsonl'
    store = RowStore(file)
    for i in range(6):
        store.add(f'key {i}', {'top1': i / 3, 'name': 'größe'})
    data, rows = file.read_bytes(), store.rows
    for seed in range(40):
        file.write_bytes(damaged(data, seed))
        found = attempt('rows.jsonl', RowStore, file)
        untouched = [line for line in file.read_bytes().splitlines() if line in data.splitlines()]
        assert all(found.rows[key] == rows[key] for key in (json.loads(line)['key'] for line in untouched[1:-1]))
        found.add('new', {'top1': 1.0})
        assert RowStore(file).rows['new'] == {'top1': 1.0}


def test_states_of_a_run(trained: Path, tmp_path: Path) -> None:
    """Damage to any file of the newest state: it is named and the one before is used; to both: a refusal."""
    run = Path(shutil.copytree(trained, tmp_path / 'run'))
    older, newest = Run(run).states()
    whole = {file.relative_to(run): file.read_bytes() for state in (older, newest) for file in _files(state)}
    files = _files(newest)
    assert len(files) > 5
    by_run, by_state = (build(TrainSettings, {'resume': path}) for path in (run, newest))
    for seed in range(180):
        file = files[seed % len(files)]
        data = whole[file.relative_to(run)]
        changed = damaged(data, seed)
        file.write_bytes(changed)
        found = attempt('state', find_resume, by_run)
        named = attempt('state, by its name', find_resume, by_state)
        if found.state == newest:  # its manifest says the same in other bytes
            assert file.name == 'manifest.json' and json.loads(changed) == json.loads(data) or changed == data, seed
        else:
            assert found.state == older and named is None, seed
            (told,) = found.damaged
            assert str(newest) in told and (file.name in told or file.name == 'manifest.json'), seed
        file.write_bytes(data)
    for file in (files[0], newest / 'more', newest / 'folder' / 'more'):
        kept = file.read_bytes() if file.exists() else None
        file.parent.mkdir(exist_ok=True)
        file.unlink() if kept is not None else file.write_bytes(b'')
        assert attempt('state, a file less or more', find_resume, by_run).state == older
        file.unlink() if kept is None else file.write_bytes(kept)
    shutil.rmtree(newest / 'folder')
    assert find_resume(by_run).state == find_resume(by_state).state == newest
    for seed in range(20):
        for state in (older, newest):
            tensors = max(_files(state), key=lambda file: file.stat().st_size)
            data = whole[tensors.relative_to(run)]
            tensors.write_bytes(bytes([data[0] ^ (seed + 1)]) + data[1:])
        assert attempt('state, all damaged', find_resume, by_run) is None


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob('*') if path.is_file())


@pytest.fixture(scope='module', autouse=True)
def report() -> Iterator[None]:
    """How many cases there were, and how many of them were refused."""
    yield
    print(json.dumps({kind: [tried[kind], refused[kind]] for kind in tried}, indent=1))


def test_there_were_enough(record_property: Callable[[str, object], None]) -> None:
    """At least 500 damaged files were read, and of every kind some were refused or mended."""
    if 'weights, cataloged' not in tried:
        pytest.fail('run the whole file')
    record_property('damaged', sum(tried.values()))
    assert sum(tried.values()) >= 500
