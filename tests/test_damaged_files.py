"""Damaged files of a run, a catalog and the cache, as their readers load them: one line of error, or what was saved.

Weights are right only if every tensor is what was saved.
"""

from __future__ import annotations

import json
import random
import shutil
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import Tensor, nn

from ctc_timm.api import recipe_settings
from ctc_timm.data.datasets import open_split
from ctc_timm.data.settings import DataSettings, LoaderSettings
from ctc_timm.data.transforms import data_config
from ctc_timm.hub.collect import add
from ctc_timm.measure.features import SplitImages, features_of
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
from runs import forget_processes

SECONDS = 20  # more is a hang
LETTERS = b'0123456789-aeglnsx_FUI16.'  # that leave a text a text


def damaged(data: bytes, seed: int) -> bytes:
    """Change, cut off, insert, remove, repeat or blank bytes, in half of the cases near the beginning of the file."""
    dice = random.Random(seed)
    place = dice.randrange(dice.choice((len(data), min(len(data), 4000))))
    length = dice.choice((1, 2, 8, 100, 512))
    head, piece, tail = data[:place], data[place : place + length], data[place + length :]
    letter, bit = dice.choice(LETTERS), piece[0] ^ 1 << dice.randrange(8)
    changed = [bytes([letter]) + piece[1:]] * 2 + [bytes([bit]) + piece[1:]] * 2 + [dice.randbytes(len(piece)) + piece]
    changed += [dice.randbytes(len(piece)), b'', piece * 2, b'\0' * len(piece)]
    return dice.choice([head, *(head + change + tail for change in changed)])


def damage(file: Path, count: int) -> Iterator[int]:
    """Replace a file by a damaged copy for each seed, and put it back at the end."""
    data = file.read_bytes()
    for seed in range(count):
        file.write_bytes(damaged(data, seed))
        yield seed
    file.write_bytes(data)


def attempt(load: Callable[..., Any], *args: Any) -> Any:
    """Return what a load gives, or None where it is refused in one line; anything else is a failure."""
    started = time.monotonic()
    try:
        return load(*args)
    except UserError as error:
        message = ' '.join(str(error).split())
        assert message and len(message) < 1500 and 'Traceback' not in message, message
        return None
    finally:
        assert time.monotonic() - started < SECONDS


@pytest.fixture(scope='module')
def trained(flags: Callable[..., Any], tiny: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of both stages, twice in a catalog beside its files."""
    forget_processes()
    folder = tmp_path_factory.mktemp('runs')
    run = train(flags(*tiny, f'--epochs 2 --output {folder} --experiment run --keep-every 1')).path
    for tag in ('a', 'b'):
        add(str(run), run / 'zoo.json', recipe_settings(), tag=tag)
    return run


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy of the run to damage, and its weights alone beside it."""
    shutil.copy(trained / 'best.safetensors', tmp_path / 'loose.safetensors')
    return Path(shutil.copytree(trained, tmp_path / 'run'))


def same(model: nn.Module, weights: dict[str, Tensor]) -> bool:
    """Whether a model has these weights, every bit of them."""
    held = model.state_dict()
    return set(held) == set(weights) and all(torch.equal(held[name], weights[name]) for name in weights)


def from_run(run: Path) -> list[nn.Module]:
    return [load_model(str(run)).model]


def from_checkpoint(run: Path) -> list[nn.Module]:
    """Load weights as `--initial-checkpoint` does."""
    model = timm.create_model('test_resnet', num_classes=10)
    load_weights(model, run / 'best.safetensors', 'initial_checkpoint')
    return [model]


def from_entry(entry: catalog.Entry) -> nn.Module:
    """Make what `timm.create_model(name, pretrained=True)` makes of a catalog's entry."""
    create = partial(timm.models.model_entrypoint(entry.architecture), pretrained=True)
    return _with_weights(partial(create, **entry.model_args), entry.to_timm(), entry, None)


def from_catalog(run: Path) -> list[nn.Module]:
    entries = [entry for entry in catalog.load(run / 'zoo.json').values() if timm.is_model(entry.architecture)]
    return [model for model in (attempt(from_entry, entry) for entry in entries) if model is not None]


@pytest.mark.parametrize(
    'name, load, count',
    [
        ('best.safetensors', from_run, 120),
        ('best.safetensors', from_checkpoint, 40),
        ('../loose.safetensors', lambda run: from_run(run.parent / 'loose.safetensors'), 40),
        ('config.json', from_run, 100),
        ('zoo.json', from_catalog, 120),
    ],
)
def test_models_have_the_weights_that_were_saved(
    run: Path, name: str, load: Callable[[Path], list[nn.Module]], count: int
) -> None:
    """Whatever is damaged: hashes find what a sound header would hide."""
    weights = load_file(run / 'best.safetensors')
    for seed in damage(run / name, count):
        for model in attempt(load, run) or ():
            assert same(model, weights), seed
            config = attempt(data_config, DataSettings(), model)
            assert config is None or len(config['mean']) == len(config['std'])
    models = load(run)
    assert models and all(same(model, weights) for model in models)


def test_cataloged_weights_are_refused_after_any_change(run: Path) -> None:
    """In the header, the metadata or the tensors."""
    entry = catalog.load(run / 'zoo.json')['test_resnet_ctc.a']
    file = run / 'best.safetensors'
    data = file.read_bytes()
    for seed in damage(file, 60):
        assert (attempt(from_entry, entry) is None) == (file.read_bytes() != data), seed


def test_arguments_of_a_run(run: Path) -> None:
    """Read as a measurement reads them, and as a resume or a recipe does."""
    file = run / 'args.yaml'
    for _ in damage(file, 60):
        attempt(data_settings, run)
        args = attempt(Run(run).args) or {}
        known = {key: value for key, value in args.items() if key in settings_of(TrainSettings)}
        attempt(check_values, TrainSettings, known, str(file))


@pytest.mark.parametrize('name', ['summary.csv', 'metrics.jsonl'])
def test_numbers_of_a_run(run: Path, name: str) -> None:
    """Drawn, or refused; and a resume, which cuts off what it writes again, refuses or keeps the rows before."""
    file = run / name
    for seed in damage(file, 60):
        before = iter(file.read_bytes().splitlines(keepends=True))
        if seed < 15:  # a picture takes its time
            assert all(picture.stat().st_size for picture in attempt(plot_run, Run(run)) or ())
        attempt(lambda: (Run(run).rows(), stage_change(Run(run))))
        attempt(Run(run).clean_up, 1)
        assert all(line in before for line in file.read_bytes().splitlines(keepends=True)), seed  # in that order


def test_cached_features(run: Path, tmp_path: Path) -> None:
    """A damaged file is computed anew: the features are always the model's own."""
    data, loader = DataSettings(dataset='digits', img_size=16, mean=(0.3,), std=(0.4,)), LoaderSettings(workers=0)
    loaded, accelerator = load_model(str(run)), Accelerator()
    images = SplitImages(open_split(data, 'validation[:20]'), loader, data_config(data, loaded.model), accelerator)
    load = partial(features_of, loaded, images, accelerator, tmp_path / 'cache', logits=True)
    wanted = load()
    (file,) = (tmp_path / 'cache').iterdir()
    for _ in damage(file, 60):
        cached = load()
        assert torch.equal(cached.features_ND, wanted.features_ND) and torch.equal(cached.labels_N, wanted.labels_N)
        assert torch.equal(cached.logits_NC, wanted.logits_NC)


def test_rows_of_a_measurement(tmp_path: Path) -> None:
    """A damaged row is measured again, the others stay; what is added can be read."""
    file = tmp_path / 'rows.jsonl'
    store = RowStore(file)
    for i in range(6):
        store.add(f'key {i}{i}', {'top1': i / 3, 'name': 'größe'})
    lines, rows = file.read_bytes().splitlines(), store.rows
    for _ in damage(file, 40):
        untouched = [line for line in file.read_bytes().splitlines() if line in lines][1:-1]
        again = RowStore(file)
        assert all(again.rows[key] == rows[key] for key in (json.loads(line)['key'] for line in untouched))
        again.add('new', {'top1': 1.0})
        assert RowStore(file).rows['new'] == {'top1': 1.0}


def test_states_of_a_run(run: Path) -> None:
    """Damage to any file of the newest state: it is named and the one before is used; to both: a refusal."""
    older, newest = Run(run).states()
    by_run, by_state = (build(TrainSettings, {'resume': path}) for path in (run, newest))
    files = sorted(path for path in newest.rglob('*') if path.is_file())
    assert len(files) > 5
    for file in files:
        data = file.read_bytes()
        for seed in damage(file, 180 // len(files) + 1):
            changed, resume = file.read_bytes(), find_resume(by_run)
            if resume.state == newest:  # its manifest says the same in other bytes
                assert file.name == 'manifest.json' and json.loads(changed) == json.loads(data) or changed == data, seed
                continue
            assert resume.state == older and attempt(find_resume, by_state) is None, seed
            (line,) = resume.damaged
            assert str(newest) in line and (file.name in line or file.name == 'manifest.json'), seed
    lost = files[0].rename(run / 'lost')
    assert find_resume(by_run).state == older
    lost.rename(files[0])
    for extra in (newest / 'more', newest / 'folder' / 'more'):
        extra.parent.mkdir(exist_ok=True)
        extra.touch()
        assert find_resume(by_run).state == older
        extra.unlink()
    extra.parent.rmdir()
    assert find_resume(by_run).state == find_resume(by_state).state == newest
    largest = [max(state.rglob('*'), key=lambda path: path.stat().st_size) for state in (older, newest)]
    for _ in zip(*(damage(file, 20) for file in largest)):
        assert attempt(find_resume, by_run) is None
