"""Fine-tuning by its script: what is trained and what is not, on which images, with which results."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from sklearn.datasets import load_digits
from sklearn.metrics import accuracy_score, balanced_accuracy_score, top_k_accuracy_score
from sklearn.model_selection import train_test_split
from timm.data import create_transform, resolve_model_data_config

from ctc_timm.training.build import train
from ctc_timm.training.finetune import FineTuning
from finetuning import STEM, TARGET, read, results

Script = Callable[..., Any]
FROZEN = {'none': (), 'stem': STEM, 'body': (*STEM, 'layer')}


@pytest.fixture(scope='module')
def finished(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two fractions with two seeds each, all states kept."""
    folder = tmp_path_factory.mktemp('finetuned')
    words = (base, *TARGET, '--train-fraction', '0.2', '1', '--seeds', '2', '--min-updates', '6')
    FineTuning(read(*words, '--checkpoint-hist', '2', '--output', folder)).run()
    return folder


def contents(folder: Path) -> dict[Path, bytes]:
    return {file.relative_to(folder): file.read_bytes() for file in folder.rglob('*') if file.is_file()}


def table(file: Path) -> list[dict[str, str]]:
    with file.open(newline='') as lines:
        return list(csv.DictReader(lines))


def test_a_row_is_what_plain_timm_measures(finished: Path) -> None:
    """The saved weights of each run, evaluated by timm and scikit-learn alone."""
    digits = load_digits()
    split = train_test_split(digits.images, digits.target, test_size=0.2, stratify=digits.target, random_state=0)
    images, labels = np.rint(split[1] * (255 / 16)).astype(np.uint8), split[3]
    rows = results(finished)['rows']
    assert [(row['train_fraction'], row['seed']) for row in rows] == [(0.2, 0), (0.2, 1), (1.0, 0), (1.0, 1)]
    for row in rows:
        run = finished / f'fraction-{row["train_fraction"]:g}-seed-{row["seed"]}'
        config = resolve_model_data_config(timm.create_model(f'local-dir:{run}', pretrained=True))
        transform = create_transform(**config)
        batch = torch.stack([transform(Image.fromarray(image)) for image in images[:70]])
        assert batch.shape == (70, 1, 16, 16)
        model = timm.create_model('test_resnet', num_classes=10, in_chans=1, checkpoint_path=f'{run}/last.safetensors')
        with torch.no_grad():
            logits = model.eval()(batch).numpy()
        true, predicted = labels[:70], logits.argmax(axis=1)
        assert row['top1'] == pytest.approx(100 * accuracy_score(true, predicted))
        assert row['top5'] == pytest.approx(100 * top_k_accuracy_score(true, logits, k=5, labels=range(10)))
        assert row['mean_per_class'] == pytest.approx(100 * balanced_accuracy_score(true, predicted))
        assert row['top1_low'] <= row['top1'] <= row['top1_high'] and row['top1_low'] < row['top1_high']
        epochs = table(run / 'summary.csv')
        assert row['epoch'] == len(epochs) - 1 == 1
        assert row['top1'] == pytest.approx(float(epochs[-1]['eval_top1']))
        assert row['best_epoch_top1'] == pytest.approx(max(float(epoch['eval_top1']) for epoch in epochs))
        assert (row['num_train'], row['num_test']) == (26 if row['train_fraction'] == 0.2 else 128, 70)
        assert (row['target'], row['method'], row['freeze']) == ('digits', 'finetune', 'none')


def test_means_over_seeds(finished: Path) -> None:
    """With Student's t: two values have 12.706 standard errors on either side."""
    found = results(finished)
    for mean in found['summary']:
        pair = [row for row in found['rows'] if row['train_fraction'] == mean['train_fraction']]
        assert mean['seeds'] == len(pair) == 2
        for metric in ('top1', 'top5', 'mean_per_class'):
            low, high = sorted(row[metric] for row in pair)
            half = 12.7062047 * (high - low) / 2
            assert mean[metric] == pytest.approx((low + high) / 2)
            assert mean[f'{metric}_low'] == pytest.approx((low + high) / 2 - half)
            assert mean[f'{metric}_high'] == pytest.approx((low + high) / 2 + half)
    for file, rows in (('results.csv', found['rows']), ('results_mean.csv', found['summary'])):
        assert [float(line['top1']) for line in table(finished / file)] == [row['top1'] for row in rows]
    assert Image.open(finished / 'finetune.png').size[0] > 500
    assert found['settings']['layer_decay'] is None and found['settings']['epochs'] == 2


def test_seeds_and_fractions_are_different_runs(finished: Path) -> None:
    """Other heads, other images, and an epoch of a fraction makes as many updates as one of all images."""
    weights = [load_file(run / 'last.safetensors') for run in sorted(finished.glob('fraction-*'))]
    assert len(weights) == 4
    assert all(not torch.equal(a['fc.weight'], b['fc.weight']) for i, a in enumerate(weights) for b in weights[:i])
    for run in finished.glob('fraction-*'):
        lines = [json.loads(line) for line in (run / 'metrics.jsonl').read_text().splitlines()]
        # 128 images are 4 batches of 32; --min-updates 6 over 2 epochs asks a fraction for 3
        assert max(line.get('update', 0) for line in lines) == (8 if 'fraction-1-' in run.name else 6)


def test_again_changes_nothing(script: Script, base: Path, finished: Path, tmp_path: Path) -> None:
    """What is finished is kept to the byte; another seed is one run more, whose neighbors stay."""
    folder = tmp_path / 'copy'
    shutil.copytree(finished, folder)
    before = contents(folder)
    words = [str(base), *TARGET, '--min-updates', '6', '--output', str(folder)]
    ended = script('transfer/finetune.py', *words, '--train-fraction', '0.2', '1', '--seeds', '2')
    assert ended.code == 0, ended.err
    assert '4 of 4 runs are finished and kept' in ended.out and 'run 1' not in ended.out
    assert contents(folder) == before
    ended = script('transfer/finetune.py', *words, '--train-fraction', '0.2', '--seeds', '3')
    assert ended.code == 0, ended.err
    assert 'run 3 of 3: fraction 0.2, 26 images, seed 2, batch size cut to 26, 3 passes an epoch' in ended.out
    after = contents(folder)
    assert all(after[file] == before[file] for file in before if file.parts[0].startswith('fraction'))
    old, new = results(finished)['rows'], results(folder)['rows']
    assert [row for row in new if row['seed'] < 2] == old and [row['seed'] for row in new] == [0, 1, 2, 0, 1]


def test_other_settings_are_refused(script: Script, base: Path, finished: Path) -> None:
    """Nothing is written; other weights are another setting too."""
    before = contents(finished)
    best = load_file(base / 'best.safetensors')['conv1.0.weight']
    kept = (base / 'weights').iterdir()
    (other,) = (file for file in kept if not torch.equal(load_file(file)['conv1.0.weight'], best))
    words = [*TARGET, '--min-updates', '6', '--output', str(finished)]
    for source, more, message in (
        (base, ['--epochs', '3'], 'holds runs with --epochs 2, not 3; go on with those settings, or give the'),
        (base, ['--freeze', 'stem', '--lr', '0.1'], 'holds runs with --freeze none, not stem, --lr None, not 0.1'),
        (other, [], 'holds runs with weights '),
    ):
        ended = script('transfer/finetune.py', str(source), *words, *more)
        assert ended.code == 2 and len(ended.err.splitlines()) == 1 and message in ended.err, ended.err
    assert contents(finished) == before


def test_an_interrupted_run_goes_on(script: Script, base: Path, finished: Path, tmp_path: Path) -> None:
    """Cut after its first epoch: the same weights and the same row as never cut."""
    folder = tmp_path / 'cut'
    shutil.copytree(finished, folder)
    run = folder / 'fraction-1-seed-1'
    (run / 'results.json').unlink()
    shutil.rmtree(run / 'state' / 'epoch-0001')
    words = [str(base), *TARGET, '--min-updates', '6', '--checkpoint-hist', '2', '--output', str(folder)]
    ended = script('transfer/finetune.py', *words, '--train-fraction', '0.2', '1', '--seeds', '2')
    assert ended.code == 0, ended.err
    assert 'run 4 of 4' in ended.out and f'continuing {run} at epoch 1 of 2' in ended.out
    assert results(folder) == results(finished)
    mine, theirs = (load_file(f / 'fraction-1-seed-1' / 'last.safetensors') for f in (folder, finished))
    assert all(torch.equal(mine[key], theirs[key]) for key in theirs)


@pytest.mark.parametrize(
    'part, more',
    [
        ('none', '--layer-decay 0.5'),
        ('stem', '--layer-decay 0.5 --model-ema --model-ema-decay 0.5'),
        ('stem', '--no-filter-bias-and-bn --opt adamw --lr 0.01'),
        ('body', '--momentum 0.9 --clip-grad 1 --drop 0.3'),
    ],
)
def test_what_is_frozen_keeps_its_bits(base: Path, tmp_path: Path, part: str, more: str) -> None:
    """Running statistics included, under a weight decay that would be seen; all else moves."""
    words = f'--freeze {part} --seeds 1 --weight-decay 0.5 --lr 0.1 --warmup-epochs 0 --epochs 1 {more}'
    FineTuning(read(base, *TARGET, *words.split(), '--output', tmp_path)).run()
    before, after = load_file(base / 'best.safetensors'), load_file(tmp_path / 'fraction-1-seed-0' / 'last.safetensors')
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]) is name.startswith(FROZEN[part]), name


def test_the_optimizer_knows_nothing_of_what_is_frozen(base: Path, tmp_path: Path) -> None:
    """Only what is trained is in a group, with timm's rates by layer: the classifier 1, then halves."""
    words = f'--freeze stem --seeds 1 --epochs 1 --layer-decay 0.5 --output {tmp_path}'.split()
    tuning = FineTuning(read(base, *TARGET, *words))
    trainer = tuning.trainer(tuning.plans[0])
    names = {id(tensor): name for name, tensor in trainer.task.get_eval_model().named_parameters()}
    groups = trainer.optimizer.param_groups
    scales = {names[id(tensor)]: group['lr_scale'] for group in groups for tensor in group['params']}
    assert scales.keys() == {name for name in names.values() if not name.startswith(STEM)}
    depth = len(set(scales.values()))
    assert sorted(set(scales.values())) == [0.5**i for i in reversed(range(depth))] and depth > 2
    assert scales['fc.weight'] == 1 and scales['layer1.0.conv1.weight'] == min(scales.values())


def test_a_new_head_for_another_target(script: Script, base: Path, image_folder: Path, tmp_path: Path) -> None:
    """Three classes in place of ten, in the run's own folder, which is named after method and target."""
    run = tmp_path / 'runs' / 'base'
    shutil.copytree(base, run)
    words = f'--data-dir {image_folder} -b 12 -j 0 --epochs 1 --seeds 1'.split()
    ended = script('transfer/finetune.py', str(run), *words)
    assert ended.code == 0, ended.err
    weights = load_file(run / 'finetune' / 'images' / 'fraction-1-seed-0' / 'last.safetensors')
    assert weights['fc.weight'].shape[0] == weights['fc.bias'].shape[0] == 3
    ended = script('transfer/finetune.py', str(run / 'weights' / 'epoch-0000.safetensors'), *words, '--freeze', 'body')
    assert ended.code == 0, ended.err
    folder = run / 'finetune-body-frozen' / 'images-epoch-0000'
    after = load_file(folder / 'fraction-1-seed-0' / 'last.safetensors')
    before = load_file(run / 'weights/epoch-0000.safetensors')
    assert torch.equal(after['layer1.0.conv1.weight'], before['layer1.0.conv1.weight'])
    assert results(folder)['rows'][0]['method'] == 'finetune-body-frozen'


def test_another_image_size(flags: Callable, tiny: list[str], tmp_path: Path) -> None:
    """A model built for one size is resized by timm, and the run says so to plain timm."""
    words = f'--model test_vit --mode vanilla --epochs 1 --output {tmp_path} --experiment vit'
    train(flags(*tiny, words))
    words = f'--epochs 1 --seeds 1 --img-size 32 --output {tmp_path / "larger"}'
    FineTuning(read(tmp_path / 'vit', *TARGET, *words.split())).run()
    model = timm.create_model(f'local-dir:{tmp_path}/larger/fraction-1-seed-0', pretrained=True)
    assert model.eval()(torch.zeros(1, 3, 32, 32)).shape == (1, 10)
    assert results(tmp_path / 'larger')['input_size'] == [3, 32, 32]


def test_two_processes(base: Path, tmp_path: Path) -> None:
    """An odd number of test images is counted once, rows are written once, and the stem keeps its bits."""
    launch = f'-m torch.distributed.run --standalone --nproc_per_node 2 transfer/finetune.py {base}'.split()
    words = f'--freeze stem --val-split validation[:71] --seeds 1 --epochs 1 --output {tmp_path}'.split()
    ended = subprocess.run([sys.executable, *launch, *TARGET, *words], capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert ended.stdout.count('run 1 of 1') == ended.stdout.count('mean over seeds') == 1
    (row,) = results(tmp_path)['rows']
    run = tmp_path / 'fraction-1-seed-0'
    assert row['num_test'] == 71
    assert row['top1'] == pytest.approx(float(table(run / 'summary.csv')[-1]['eval_top1']))
    before, after = load_file(base / 'best.safetensors'), load_file(run / 'last.safetensors')
    assert all(torch.equal(before[name], after[name]) is name.startswith(STEM) for name in before)


REFUSED = [
    ('', 'name a model'),
    ('{}/nowhere', 'no run folder, weights file or timm model of that name'),
    ('{base} --dataset digit', '--dataset digit: no such data set; nearest: digits'),
    ('{base} --data-dir {}/nowhere', '--data-dir {}/nowhere: no such folder'),
    ('{base} --data-dir {}/one', "of class 0 ('class0')"),
    ('{base} --data-dir {}/absent', "of class 2 ('class2')"),
    ('{base} --dataset hfids/{}/hub', 'a streaming set does not tell its classes'),
    ('{base} --freeze head', "--freeze: must be one of none, stem, body, batch_norm, got 'head'"),
    ('{base} --train-fraction 0.5 1.01', '--train-fraction: must be at most 1, got 1.01'),
    ('{base} --mode ctc --num-negatives 0', '--num-negatives: must be at least 1, got 0'),
    ('{base} --mode ctc --temporal-temperature 0.001', '--temporal-temperature 0.001: must be at least 0.012'),
    ('{base} --opt adamm', '--opt adamm: unknown to timm; nearest: adam'),
]


@pytest.mark.parametrize('command, message', REFUSED, ids=[command for command, _ in REFUSED])
def test_mistakes(script: Script, base: Path, image_folder: Path, tmp_path: Path, command: str, message: str) -> None:
    """Exit code 2, one line that names what is wrong, and nothing written."""
    for split, classes in {'one/train': 1, 'one/validation': 1, 'absent/train': 3, 'absent/validation': 2}.items():
        (tmp_path / split).mkdir(parents=True)
        for klass in range(classes):
            (tmp_path / split / f'class{klass}').symlink_to(image_folder / Path(split).name / f'class{klass}')
    words, message = (text.replace('{base}', str(base)).replace('{}', str(tmp_path)) for text in (command, message))
    before = contents(base)
    ended = script('transfer/finetune.py', *words.split(), '--output', str(tmp_path / 'out'))
    assert ended.code == 2 and len(ended.err.splitlines()) == 1 and message in ended.err, ended.err
    assert not (tmp_path / 'out').exists() and contents(base) == before


def test_rows_stay_when_a_later_run_fails(script: Script, base: Path, finished: Path, tmp_path: Path) -> None:
    """The second run's folder holds a state of other data: one line, and the first run's row is there."""
    shutil.copytree(finished / 'fraction-0.2-seed-0', tmp_path / 'out' / 'fraction-1-seed-1')
    (tmp_path / 'out' / 'fraction-1-seed-1' / 'results.json').unlink()
    ended = script('transfer/finetune.py', str(base), *TARGET, '--seeds', '2', '--output', str(tmp_path / 'out'))
    (error,) = (line for line in ended.err.splitlines() if 'error:' in line)
    assert ended.code == 2 and 'was saved with num instances' in error and 'Traceback' not in ended.err
    assert [row['seed'] for row in results(tmp_path / 'out')['rows']] == [0]
    assert (tmp_path / 'out' / 'results.csv').is_file()


def test_the_embedded_digits_are_the_default(base: Path, script: Script, tmp_path: Path) -> None:
    """With a recipe of their own, which a flag overrides."""
    words = f'--train-split train[:64] --epochs 1 --seeds 1 --hflip 0.25 --output {tmp_path}'.split()
    ended = script('transfer/finetune.py', str(base), *words)
    assert ended.code == 0, ended.err
    found = results(tmp_path)
    assert (found['target'], found['rows'][0]['num_test'], found['rows'][0]['num_train']) == ('digits', 360, 64)
    assert (found['settings']['hflip'], found['settings']['scale']) == (0.25, [0.8, 1.0])
