"""The commands: launched as users launch them, their weights read by plain timm, and what they refuse."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from ctc_timm.models.loading import load_model
from runs import TINY

ROOT = Path(__file__).resolve().parents[2]
Script = Callable[..., Any]
LAUNCH = ['-m', 'accelerate.commands.launch', '--num_processes', '1', '--num_machines', '1', '--dynamo_backend', 'no']
TWO = ['-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2']
MODEL = [
    *('--model', 'test_resnet', '--train-split', 'train[:256]', '--val-split', 'validation[:71]'),
    *('--num-negatives', '32'),
]

PLAIN_TIMM = """
import sys
import numpy as np, timm, torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
run, pixels, out = sys.argv[1:]
named = timm.create_model('local-dir:' + run, pretrained=True).eval()
plain = timm.create_model('test_resnet', num_classes=10, checkpoint_path=run + '/best.safetensors').eval()
transform = create_transform(**resolve_model_data_config(named))
data = np.load(pixels)
images = torch.stack([transform(Image.fromarray(x).convert('RGB')) for x in data['images']])
with torch.no_grad():
    logits = plain(images)
    assert torch.equal(logits, named(images))
hits = (logits.argmax(1).numpy() == data['labels']).mean()
np.savez(out, images=images.numpy(), logits=logits.numpy(), top1=100 * hits)
assert not any(name.startswith('ctc_timm') for name in sys.modules)
"""


def execute(*words: str, limit: int = 120) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k not in ('RANK', 'WORLD_SIZE', 'LOCAL_RANK')}
    environment['OMP_NUM_THREADS'] = '1'
    environment['PYTHONWARNINGS'] = 'error:`torch.distributed:FutureWarning'  # a deprecated call of several processes
    return subprocess.run(
        [sys.executable, *words], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=limit
    )


def rows(run: Path) -> list[dict[str, str]]:
    with (run / 'summary.csv').open() as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope='module')
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run through `accelerate launch`: the default recipe, cut to two epochs and one of the temporal stage."""
    output = tmp_path_factory.mktemp('runs')
    words = f'--epochs 3 --output {output} --keep-every 1 --validation-batch-size 50'.split()
    ended = execute(*LAUNCH, '-m', 'ctc_timm', 'train', *words, *MODEL)
    assert ended.returncode == 0, ended.stderr[-2000:]
    (run,) = output.iterdir()
    assert [row['epoch'] for row in rows(run)] == ['0', '1', '2']
    stages = [json.loads(line).get('stage') for line in (run / 'metrics.jsonl').read_text().splitlines()]
    assert [stage for stage in stages if stage] == ['instance', 'instance', 'temporal']
    for hint in ('ctc-timm validate', 'local-dir:', 'best.safetensors', 'training.png'):
        assert hint in ended.stdout
    return run


@pytest.fixture(scope='module')
def validation_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The validation images, from scikit-learn and not from our reader."""
    digits = load_digits()
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    _, kept, _, labels = train_test_split(images, digits.target, test_size=0.2, stratify=digits.target, random_state=0)
    file = tmp_path_factory.mktemp('digits') / 'validation.npz'
    np.savez(file, images=kept[:71], labels=labels[:71])
    return file


def test_plain_timm_loads_the_weights(trained: Path, validation_images: Path, tmp_path: Path) -> None:
    """A process that never imports this package gets the same logits, and the accuracy in the summary."""
    out = tmp_path / 'logits.npz'
    ended = execute('-c', PLAIN_TIMM, str(trained), str(validation_images), str(out))
    assert ended.returncode == 0, ended.stderr[-2000:]
    theirs = np.load(out)
    best = max(float(row['eval_top1']) for row in rows(trained))
    assert float(theirs['top1']) == pytest.approx(best, abs=1e-6)
    with torch.no_grad():
        mine = load_model(str(trained)).model(torch.from_numpy(theirs['images']))
    assert np.abs(mine.numpy() - theirs['logits']).max() < 1e-6


def test_validate_agrees_with_the_summary(script: Script, trained: Path, tmp_path: Path) -> None:
    """A run's folder, one epoch's weights, and the folder as a timm model, each with its own row's numbers."""
    table = rows(trained)
    best = max(table, key=lambda row: float(row['eval_top1']))
    data_flags = ['--dataset', 'digits', '--val-split', 'validation[:71]']
    for words, row in (
        ([str(trained)], best),
        ([str(trained / 'weights' / 'epoch-0000.safetensors')], table[0]),
        (['--checkpoint', str(trained / 'last.safetensors')], table[-1]),
        ([f'local-dir:{trained}', *data_flags], best),
    ):
        ended = script('validate.py', *words, '--output', str(tmp_path), '-b', '50')
        assert ended.code == 0, ended.err
        results = json.loads((tmp_path / 'results.json').read_text())
        assert results['num_images'] == 71 and f'{results["top1"]:.3f} %' in ended.out
        for key in ('top1', 'top5', 'loss'):
            assert results[key] == pytest.approx(float(row[f'eval_{key}']), rel=1e-5)
        by_class = [line['top1'] for line in results['per_class']]
        assert results['mean_per_class'] == pytest.approx(sum(by_class) / len(by_class))


@pytest.mark.filterwarnings('error:No artists')
@pytest.mark.parametrize(
    'words', [['--val-split', ''], ['--val-split', '', '--keep-every', '0'], ['--keep-every', '0']]
)
def test_what_is_named_at_the_end_is_there(script: Script, tmp_path: Path, words: list[str]) -> None:
    """Files and folders, with and without an evaluation and kept epochs."""
    ended = script('train.py', *TINY, '--epochs', '1', '--output', str(tmp_path), *words)
    assert ended.code == 0, ended.err
    (run,) = tmp_path.iterdir()
    report = ended.out[ended.out.index('  weights  ') :]
    files = [word.strip(',') for word in report[: report.index('next:')].split() if word.startswith(str(tmp_path))]
    assert all(Path(file).exists() for file in files) and f'{run / "last.safetensors"}' in files
    assert (f'{run / "best.safetensors"}' in files) == (run / 'best.safetensors').exists() == ('' not in words)
    assert ('ctc-timm dynamics' in report) == (f'{run / "weights"}/' in files) == ('0' not in words)
    assert ('--split SPLIT' in report) == ('' in words)


def test_resume_goes_on_in_the_temporal_stage(script: Script, trained: Path) -> None:
    """One epoch more, with no flag typed again; every epoch is in the summary once."""
    before = rows(trained)
    for words in (['--resume', str(trained)], ['--resume', 'auto', '--output', str(trained.parent), *MODEL]) * 2:
        words += ['--epochs', str(len(before) + 1)]
        ended = script('train.py', *words)
        assert ended.code == 0, ended.err
        assert f'at epoch {len(before)} of {len(before) + 1}' in ended.out and 'fills the banks' not in ended.out
        after = rows(trained)
        assert after[:-1] == before and after[-1]['epoch'] == str(len(before))
        before = after
    assert [path.name for path in trained.parent.iterdir()] == [trained.name]


@pytest.fixture(scope='module')
def pair(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The same run, an epoch in each stage, by two processes and by one with twice the batch."""
    output = tmp_path_factory.mktemp('pair')
    words = (
        f'train.py --output {output} --model test_vit --train-split train[:160] --val-split validation[:71] '
        f'--img-size 16 --mean 0.3 --std 0.4 --epochs 2 --temporal-start-epoch 1 --num-negatives 32 --lr 0.01 '
        f'--negatives shared -j 0'
    ).split()
    ended = execute(*TWO, *words, '-b', '16')
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert '2 process(es)' in ended.stdout
    (two,) = output.iterdir()
    alone = execute(*words, '-b', '32', '--experiment', 'alone')
    assert alone.returncode == 0, alone.stderr[-2000:]
    return [two, output / 'alone']


def test_two_processes_train_as_one(pair: list[Path]) -> None:
    """With gloo, a model without batch statistics and negatives that processes share: the same weights."""
    two, one = (load_file(run / 'last.safetensors') for run in pair)
    start = load_file(pair[1] / 'weights' / 'epoch-0000.safetensors')
    for key in one:
        assert torch.allclose(two[key], one[key], atol=1e-6), key
    assert max(float((one[key] - start[key]).abs().max()) for key in one) > 1e-4
    for mine, theirs in zip(rows(pair[0]), rows(pair[1]), strict=True):
        for key in mine:
            assert float(mine[key]) == pytest.approx(float(theirs[key]), rel=1e-5)
    states = sorted(path.name for path in (pair[0] / 'state' / 'epoch-0001').iterdir())
    assert {'random_states_0.pkl', 'random_states_1.pkl', 'information_bank.safetensors'} < set(states)


def test_two_processes_count_every_image_once(pair: list[Path], tmp_path: Path) -> None:
    """71 images do not divide by two: none is left out and none counted twice."""
    ended = execute(*TWO, 'validate.py', str(pair[0]), '--output', str(tmp_path), '-b', '16')
    assert ended.returncode == 0, ended.stderr
    results = json.loads((tmp_path / 'results.json').read_text())
    last = rows(pair[1])[-1]
    best = max(rows(pair[1]), key=lambda row: float(row['eval_top1']))
    assert results['num_images'] == 71 and float(last['eval_top1']) <= float(best['eval_top1'])
    for key in ('top1', 'top5', 'loss'):
        assert results[key] == pytest.approx(float(best[f'eval_{key}']), rel=1e-5)
    assert ended.stdout.count('top-1') == 1


REFUSED = [
    ('train.py --model resnt50', '--model resnt50: unknown to timm; nearest: resnet50'),
    ('train.py --model qwen3_vit_88m_enc --img-size 32', '--model qwen3_vit_88m_enc: has no classification head'),
    ('train.py --model-kwargs num_classes=0', '--model cifar_resnet20: has no classification head'),
    ('train.py --model-kwargs depth=3', "unexpected keyword argument 'depth'"),
    ('train.py --model resnet18_ctc --pretrained', '--model resnet18_ctc: no CTC weights are cataloged'),
    ('train.py --model local-dir:{}/nowhere', '--model local-dir:{}/nowhere'),
    ('train.py --model vit_tiny_patch16_224 --img-size 8', '--img-size: vit_tiny_patch16_224 cannot take 3x8x8'),
    ('train.py -c {}/typo.yaml', "{}/typo.yaml: 'num-negative' is not a setting; nearest: num_negatives"),
    ('train.py --data-dir {}/one --model test_resnet -b 4', 'negatives come from other classes'),
    ('train.py --dataset hfids/{}/hub --model test_resnet', 'table index, which --mode ctc needs'),
    ('train.py --temporal-temperature 0.005', '--temporal-temperature 0.005: must be at least'),
    ('train.py --temporal-start-epoch 16', '--temporal-start-epoch 16 lies outside the run of --epochs 15'),
    ('train.py -b 33 --mixup 0.2', '--batch-size 33: must be even'),
    ('train.py --opt adamm', '--opt adamm: unknown to timm; nearest: adam'),
    ('train.py --opt adamw --opt-betas 0.9', '--opt-betas (0.9,)'),
    ('train.py --log-with foo', '--log-with foo: no tracker of Accelerate'),
    ('train.py --torchcompile foo', '--torchcompile foo: no such backend'),
    ('train.py --resume {}/nowhere', '--resume {}/nowhere: no run with a saved state there'),
    ('train.py --initial-checkpoint {}/nowhere.pth', '--initial-checkpoint {}/nowhere.pth: no such file'),
    ('train.py --initial-checkpoint {}/garbage.safetensors', 'not weights of cifar_resnet20'),
    ('train.py --initial-checkpoint {run}/best.safetensors', 'not weights of cifar_resnet20'),
    ('train.py --resume {run} --mode vanilla', "was saved with mode 'ctc', this run has 'vanilla'"),
    ('train.py --experiment ../up', '--experiment ../up: must be a name inside --output'),
    ('validate.py', 'name a model'),
    ('validate.py resnt18 --dataset digits', 'MODEL resnt18: no run folder, weights file or timm model of that name'),
    ('validate.py {}/nowhere.safetensors --dataset digits', 'MODEL {}/nowhere.safetensors: no such file'),
    ('validate.py {}/garbage.safetensors --dataset digits --model resnet18', 'not weights of resnet18'),
    ('validate.py {}/images --dataset digits', 'is no run'),
    ('validate.py {run} --num-classes 3', 'not weights of test_resnet'),
    ('validate.py {run} --checkpoint {run}/last.safetensors', 'two models are named'),
    ('validate.py {}/images --model test_vit --checkpoint {run}', 'is for test_resnet, not for --model test_vit'),
    ('train.py --pretrained-path {}/garbage.safetensors', '--pretrained-path {}/garbage.safetensors: not weights of'),
]


def test_the_data_folder_stands_beside_a_model_as_in_timm(script: Script, image_folder: Path, tmp_path: Path) -> None:
    file, more = tmp_path / 'three.pth', ['-j', '0', '--model', 'test_resnet']
    torch.save({'state_dict': timm.create_model('test_resnet', num_classes=3).state_dict()}, file)
    more += ['--checkpoint', str(file), '--output', str(tmp_path / 'out')]
    ended = script('validate.py', str(image_folder), *more)
    results = json.loads((tmp_path / 'out' / 'results.json').read_text())
    assert ended.code == 0 and (results['num_images'], results['dataset']) == (15, str(image_folder)), ended.err
    more += ['--epochs', '1', '--seeds', '1', '--min-updates', '0', '--img-size', '32']
    ended = script('transfer/finetune.py', str(image_folder), *more)
    results = json.loads((tmp_path / 'out' / 'results.json').read_text())
    assert ended.code == 0 and results['target'] == str(image_folder), ended.err


@pytest.fixture
def mistakes(image_folder: Path) -> Path:
    """The files that the mistakes below are about."""
    root = image_folder.parent
    (root / 'typo.yaml').write_text('num-negative: 10\n')
    (root / 'garbage.safetensors').write_text('garbage')
    for split in ('train', 'validation'):
        (root / 'one' / split).mkdir(parents=True)
        (root / 'one' / split / 'class0').symlink_to(image_folder / split / 'class0')
    return root


@pytest.mark.parametrize('command, message', REFUSED, ids=[command for command, _ in REFUSED])
def test_mistakes_are_one_line(
    script: Script, mistakes: Path, trained: Path, tmp_path: Path, command: str, message: str
) -> None:
    """Exit code 2, one line that names what is wrong, and nothing written."""
    words, message = (text.replace('{run}', str(trained)).replace('{}', str(mistakes)) for text in (command, message))
    ended = script(*words.split(), '--output', str(tmp_path / 'runs'))
    (line,) = ended.err.splitlines()
    assert ended.code == 2 and message in line and not (tmp_path / 'runs').exists()
