"""A run's folder: weights for plain timm, states, and what a resume does."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file
from timm.optim import create_optimizer_v2
from timm.utils import update_summary

from ctc_timm.data.datasets import open_split
from ctc_timm.data.fingerprint import fingerprint
from ctc_timm.data.settings import DataSettings
from ctc_timm.models.loading import load_model
from ctc_timm.runs import Run
from ctc_timm.training.build import build_trainer, train
from ctc_timm.training.checkpoints import PROGRESS, find_resume, values_of
from ctc_timm.training.trainer import Trainer
from ctc_timm.utils.errors import UserError
from ctc_timm.utils.files import write_manifest
from ctc_timm.utils.weights_files import weights_metadata

Flags = Callable[..., Any]
WORDS = '--epochs 4 --temporal-start-epoch 2 --drop 0.2 --reprob 0.3 --model-ema --model-ema-decay 0.9 --keep-every 1'


@pytest.fixture(scope='module')
def whole(flags: Flags, tiny: list[str], tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    """A run of two epochs in each stage, without an interruption, all its states kept."""
    output = str(tmp_path_factory.mktemp('runs'))
    trainer = build_trainer(flags(*tiny, WORDS, f'--output {output} --experiment whole --checkpoint-hist 9'))
    trainer.fit()
    return trainer


@pytest.fixture
def cut(whole: Trainer, tmp_path: Path) -> Callable[[int], Path]:
    """A copy of the run as it was so many epochs in, with leftovers of the epoch that was cut short."""

    def copy(epochs: int) -> Path:
        run = tmp_path / 'runs' / f'cut{epochs}'
        shutil.copytree(whole.run.path, run)
        for epoch in range(epochs, 4):
            shutil.rmtree(run / 'state' / f'epoch-{epoch:04d}')
        return run

    return copy


def images() -> torch.Tensor:
    return torch.randn(5, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def test_weights_load_in_plain_timm(whole: Trainer) -> None:
    """Without any renaming, with the logits of the model that was trained, here its moving average, to rounding."""
    expected = whole.eval_model().eval()(images())
    for file in (whole.run.last_weights, whole.run.kept_weights()[3]):
        model = timm.create_model('test_resnet', num_classes=10, checkpoint_path=str(file))
        torch.testing.assert_close(model.eval()(images()), expected, rtol=1e-5, atol=1e-6)
    best = timm.create_model('test_resnet', num_classes=10)
    best.load_state_dict(load_file(whole.run.best_weights))
    model = timm.create_model(f'local-dir:{whole.run.path}', pretrained=True)  # finds all by config.json
    assert torch.equal(model.eval()(images()), best.eval()(images()))
    assert model.pretrained_cfg['mean'] == pytest.approx((0.3,) * 3)
    assert tuple(model.pretrained_cfg['input_size']) == (3, 16, 16)
    assert torch.equal(load_model(whole.run).model(images()), best(images()))


def test_best_is_of_the_temporal_stage_once_there_is_one(flags: Flags, tiny: list[str], tmp_path: Path) -> None:
    """Whatever the instance stage reached; before, its own best one. The weights say which stage they are of."""
    words = ['--epochs 4 --temporal-start-epoch 2 --keep-every 1', f'--output {tmp_path} --experiment run']
    trainer = build_trainer(flags(*tiny, *words))
    stages, save = list[str](), trainer.run.save_weights

    def note(name: str, model: Any, metadata: Any) -> None:
        stages.extend([f'{metadata["stage"]} {metadata["epoch"]}'] if name == 'best' else [])
        save(name, model, metadata)

    trainer.run.save_weights = note  # type: ignore[method-assign]
    trainer.evaluator = Scripted(trainer.evaluator, iter([50.0, 40.0, 10.0, 8.0]))
    trainer.fit()
    assert stages == ['instance 0', 'temporal 2'] and trainer.state.best == (10.0, 2)
    assert weights_metadata(trainer.run.best_weights)['stage'] == 'temporal'
    assert weights_metadata(trainer.run.kept_weights()[1])['stage'] == 'instance'


@pytest.mark.parametrize('metric, best', [('top1', 1), ('loss', 2), ('top5', 0)])
def test_the_metric_of_the_best_epoch(flags: Flags, tiny: list[str], tmp_path: Path, metric: str, best: int) -> None:
    """Of a loss the smallest is the best, and never one that is no number; a resume by another metric is refused."""
    words = ['--epochs 3 --mode vanilla', f'--output {tmp_path} --experiment run --eval-metric {metric}']
    trainer = build_trainer(flags(*tiny, *words))
    losses, top5s = iter([math.nan, 0.7, 0.2]), iter([99.0, 98.0, 97.0])
    trainer.evaluator = Scripted(trainer.evaluator, iter([50.0, 60.0, 55.0]), losses, top5s)
    trainer.fit()
    assert trainer.state.best is not None and trainer.state.best[1] == best
    assert weights_metadata(trainer.run.best_weights)['epoch'] == str(best)
    other = 'loss' if metric == 'top1' else 'top1'
    with pytest.raises(UserError, match=f"was saved with `eval_metric` '{metric}', this run has '{other}'"):
        build_trainer(flags(*tiny, '--epochs 4 --mode vanilla', f'--resume {tmp_path}/run --eval-metric {other}'))


class Scripted:
    """An evaluator whose metrics are given."""

    def __init__(self, inside: Any, top1s: Iterator[float], *others: Iterator[float]) -> None:
        self.inside, self.numbers = inside, dict(zip(('top1', 'loss', 'top5'), (top1s, *others)))
        self.columns, self.best_metric = inside.columns, inside.best_metric

    def __call__(self, model: Any) -> dict[str, float]:
        return {**self.inside(model), **{name: next(numbers) for name, numbers in self.numbers.items()}}


def test_what_a_run_leaves(whole: Trainer) -> None:
    run = whole.run
    rows = run.rows()
    assert [row['epoch'] for row in rows] == ['0', '1', '2', '3']
    trained = ['train_' + name for name in ('loss', 'task_loss', 'ctc_loss', 'skipped', 'bad_steps')]
    assert list(rows[0]) == ['epoch', *trained, 'eval_loss', 'eval_top1', 'eval_top5', 'lr']
    best = max(rows, key=lambda row: float(row['eval_top1']))
    facts, top1 = weights_metadata(run.best_weights), float(best['eval_top1'])
    assert facts['epoch'] == best['epoch'] and float(facts['eval_top1']) == pytest.approx(top1, 1e-5)
    assert (facts['architecture'], facts['num_classes'], facts['mode']) == ('test_resnet', '10', 'ctc')
    config = json.loads(run.config_file.read_text())
    assert config['label_names'] == [str(digit) for digit in range(10)] == list(run.class_names().values())
    theirs = timm.get_pretrained_cfg('test_resnet').to_dict()  # of weights that the run never had
    gone = {'tag', 'license', 'hf_hub_id'}
    assert gone <= {key for key, value in theirs.items() if value} and not gone & config['pretrained_cfg'].keys()
    assert run.kept_weights() == {i: run.path / f'weights/epoch-{i:04d}.safetensors' for i in range(4)}
    assert {p.name for p in run.path.iterdir()} == {
        *('args.yaml', 'config.json', 'summary.csv', 'metrics.jsonl', 'weights', 'best.safetensors'),
        *('last.safetensors', 'state', 'plots'),
    }
    args = run.args()
    assert (args['model'], args['num_negatives'], args['temporal_start_epoch']) == ('test_resnet', 16, 2)
    summary = run.summary()
    assert (summary.model, summary.mode, summary.epochs) == ('test_resnet', 'ctc', 4)
    assert summary.best_epoch == int(best['epoch']) and summary.best['top1'] == top1
    assert summary.last['loss'] == float(rows[-1]['eval_loss']) and summary.pictures == [run.plots / 'training.png']
    assert f'top-1 {summary.best["top1"]:.2f}%, top-5' in str(summary)
    assert Path(run) == run.path


@pytest.mark.parametrize('epochs, more', [(1, ''), (2, ''), (3, ''), (1, '--cache-dataset')])
def test_a_resume_changes_nothing(
    flags: Flags, tiny: list[str], whole: Trainer, cut: Callable, epochs: int, more: str
) -> None:
    """Cut in the instance stage, between the stages and in the temporal one: the same bits as never cut."""
    run = cut(epochs)
    trainer = build_trainer(flags(*tiny, WORDS, '--resume', str(run), more))
    assert (trainer.state.epoch, trainer.run.path) == (epochs, run.resolve())
    trainer.fit()
    for name in ('last', 'best', 'weights/epoch-0003'):
        mine, theirs = (load_file(folder / f'{name}.safetensors') for folder in (run, whole.run.path))
        assert mine.keys() == theirs.keys() and all(torch.equal(mine[key], theirs[key]) for key in mine), name
    assert (run / 'summary.csv').read_bytes() == (whole.run.path / 'summary.csv').read_bytes()
    assert (run / 'metrics.jsonl').read_bytes() == (whole.run.path / 'metrics.jsonl').read_bytes()


def test_log_rows_after_the_resume_point_are_dropped(tmp_path: Path) -> None:
    """By timm's own writer: what stays is what was written, and the next row fits under the header."""
    run = Run(tmp_path)
    for epoch in range(4):
        numbers = {'loss': epoch / 2}, {'top1': epoch * 10.0}
        update_summary(epoch, *numbers, filename=str(run.summary_file), write_header=not epoch)
        for batch in (1, 2):
            run.log({'epoch': epoch, 'batch': batch})
    before = run.summary_file.read_text().splitlines()
    run.clean_up(2)
    assert run.summary_file.read_text().splitlines() == before[:3]
    assert [row['epoch'] for row in run.log_rows()] == [0, 0, 1, 1]
    run.log_epoch(2, {'loss': 1.0}, {'top1': 20.0}, None)
    for epoch, rows in ((9, before[:4]), (0, [])):
        run.clean_up(epoch)
        assert run.summary_file.read_text().splitlines() == rows
    run.log_epoch(0, {'loss': 0.0}, {'top1': 0.0}, None)
    assert run.summary_file.read_text().splitlines() == before[:2]


def test_the_newest_run_that_fits(flags: Flags, tmp_path: Path) -> None:
    """`resume='auto'`: of the same model, data and mode; an experiment's own with its name; else a fresh start."""
    words = ['--dataset', 'digits', '--output', str(tmp_path), '--resume', 'auto']
    assert find_resume(flags(*words)).state is None
    for name, model, epochs in (('a', 'resnet10t', 3), ('b', 'resnet10t', 2), ('c', 'resnet18', 1)):
        run = Run(tmp_path / name)
        run.create(values_of(flags(*words, '--model', model)))
        for epoch in range(epochs):
            state = run.state(epoch + 1, 0, 0)
            state.mkdir()
            (state / PROGRESS).write_text('{}')
            write_manifest(state)
    states = {name: tmp_path / name / 'state' for name in 'abc'}
    for more, expected in (
        ('--model resnet10t', states['b'] / 'epoch-0001'),
        ('--model resnet18', states['c'] / 'epoch-0000'),
        ('--experiment a', states['a'] / 'epoch-0002'),
        ('--model resnet10t --mode vanilla', None),
        (f'--resume {tmp_path / "a"}', states['a'] / 'epoch-0002'),
        (f'--resume {states["a"] / "epoch-0001"}', states['a'] / 'epoch-0001'),
    ):
        assert find_resume(flags(*words, more)).state == expected, more
    with pytest.raises(UserError, match='no run with a saved state there'):
        find_resume(flags('--resume', str(tmp_path)))


@pytest.mark.parametrize(
    'words, message',
    [
        ('--model test_vit', "saved with architecture 'test_resnet', this run has 'test_vit'"),
        ('--train-split train[:100]', 'saved with num instances 128, this run has 100'),
        ('--mode vanilla', "saved with mode 'ctc', this run has 'vanilla'"),
        ('--num-classes 11', 'saved with num classes 10, this run has 11'),
        ('--embed-dim 64', 'size mismatch'),
        ('--opt adamw', "saved with `opt` 'sgd', this run has 'adamw'"),
        ('--opt lookahead_sgd', "saved with `opt` 'sgd', this run has 'lookahead_sgd'"),
        ('--momentum 0.5', 'saved with `momentum` 0.9, this run has 0.5'),
        ('--opt-kwargs maximize=true', "saved with `opt_kwargs` {}, this run has {'maximize': True}"),
        ('--layer-decay 0.7', 'saved with `layer_decay` None, this run has 0.7'),
        ('--no-filter-bias-and-bn', 'saved with `filter_bias_and_bn` True, this run has False'),
        ('--no-model-ema', 'saved with `model_ema` True, this run has False'),
        ('--train-split train[8:136]', 'was trained on other images: their labels, file names or contents differ'),
        ('--temporal-start-epoch 3', 'is in its temporal stage after 3 epochs'),
    ],
)
def test_a_state_that_does_not_fit(flags: Flags, tiny: list[str], cut: Callable, words: str, message: str) -> None:
    """Refused with the folder left as it was."""
    run = cut(3)
    before = {p: p.read_bytes() for p in run.rglob('*') if p.is_file()}
    with pytest.raises(UserError, match=r'`(resume|temporal)') as error:
        build_trainer(flags(*tiny, WORDS, '--resume', str(run), words))
    assert message in str(error.value)
    assert {p: p.read_bytes() for p in run.rglob('*') if p.is_file()} == before


def test_a_run_is_never_written_over(flags: Flags, tiny: list[str], cut: Callable) -> None:
    run = cut(4)
    before = {file: file.read_bytes() for file in run.rglob('*') if file.is_file()}
    with pytest.raises(UserError, match="`experiment` cut4.*holds a run already.*`resume='auto'`"):
        build_trainer(flags(*tiny, WORDS, f'--output {run.parent} --experiment cut4'))
    assert {file: file.read_bytes() for file in run.rglob('*') if file.is_file()} == before


def test_a_run_stopped_before_its_first_state_starts_afresh(flags: Flags, tiny: list[str], tmp_path: Path) -> None:
    words = f'--output {tmp_path} --experiment one --epochs 1 --mode vanilla --keep-every 0 --resume auto'
    settings = flags(*tiny, words)
    run = Run(tmp_path / 'one')
    run.create(values_of(settings))
    run.log({'epoch': 0, 'batch': 1, 'loss': 1.0})
    train(settings)
    assert [row['epoch'] for row in run.rows()] == ['0'] and run.kept_weights() == {}
    assert [row.get('batch') for row in run.log_rows()] == [4, None]  # the first row is the epoch's last batch


def test_a_state_that_says_less_is_taken(flags: Flags, tiny: list[str], cut: Callable) -> None:
    """One of before, which knew neither the optimizer nor the images; its average shows in its files."""
    run = cut(3)
    state = Run(run).states()[-1]
    progress = json.loads((state / PROGRESS).read_text())
    kept = {'architecture', 'num_classes', 'num_instances', 'mode', 'step_size', 'stage', 'epoch', 'batch', 'updates'}
    kept |= {'bad_in_a_row', 'best_top1', 'best_epoch'}
    (state / PROGRESS).write_text(json.dumps({key: value for key, value in progress.items() if key in kept}))
    write_manifest(state)
    assert build_trainer(flags(*tiny, WORDS, '--resume', str(run), '--momentum 0.8')).state.epoch == 3
    with pytest.raises(UserError, match='saved with `model_ema` True, this run has False'):
        build_trainer(flags(*tiny, WORDS, '--resume', str(run), '--no-model-ema'))


@pytest.mark.parametrize('opt', ['lookahead_adam', 'Lookahead_Momentum', 'adahessian'])
def test_optimizers_of_timms_factory_resume(flags: Flags, tiny: list[str], tmp_path: Path, opt: str) -> None:
    """Those with slow weights too: the same bits, but of AdaHessian, which draws from a state of its own."""
    words = f'--mode vanilla --epochs 2 --keep-every 1 --opt {opt} --output {tmp_path} --checkpoint-hist 9'
    trainer = build_trainer(flags(*tiny, words, '--experiment whole'))
    plain = create_optimizer_v2(trainer.task.get_trainable_module(), opt=opt, lr=0.01)
    assert type(trainer.optimizer.optimizer) is type(plain)
    trainer.fit()
    shutil.copytree(trainer.run.path, tmp_path / 'cut')
    shutil.rmtree(tmp_path / 'cut' / 'state' / 'epoch-0001')
    train(flags(*tiny, words, '--resume', str(tmp_path / 'cut')))
    mine, theirs = (load_file(tmp_path / name / 'last.safetensors') for name in ('cut', 'whole'))
    assert opt == 'adahessian' or all(torch.equal(mine[key], theirs[key]) for key in theirs)


def test_a_misspelled_lookahead(flags: Flags, tiny: list[str], tmp_path: Path) -> None:
    for opt in ('lokahead_adam', 'lookahead_adm', 'lookahead_'):
        with pytest.raises(UserError, match=f'`opt` {opt}: unknown to timm'):
            build_trainer(flags(*tiny, f'--output {tmp_path} --opt {opt}'))


def test_a_monitor_sees_the_moving_average(flags: Flags, tiny: list[str], tmp_path: Path) -> None:
    words = f'--epochs 2 --model-ema --monitor-target digits --monitor-images 60 --monitor-every 1 --output {tmp_path}'
    run = train(flags(*tiny, words))
    assert all(0 <= float(row['eval_monitor_ridge_top1']) <= 100 for row in run.rows()) and len(run.rows()) == 2


def test_training_sets_are_told_apart(image_folder: Path, tmp_path: Path) -> None:
    """By the names, the classes and the contents of their files, not by where they lie."""

    def read(folder: Path) -> str:
        return fingerprint(open_split(DataSettings(data_dir=str(folder)), 'train'))

    first = image_folder / 'train' / 'class0'
    known = read(image_folder)
    copied = shutil.copytree(image_folder, tmp_path / 'copy')
    assert read(copied) == known == read(image_folder)
    changes: list[Callable[[], object]] = [
        lambda: (first / '003.png').rename(first / '0033.png'),
        lambda: (first / '0033.png').rename(image_folder / 'train' / 'class1' / '0033.png'),
        lambda: shutil.copy(first / '005.png', first / '006.png'),
    ]
    seen = {known}
    for change in changes:
        change()
        seen.add(read(image_folder))
    assert len(seen) == 4
    digits = [fingerprint(open_split(DataSettings(dataset='digits'), split)) for split in ('train[:9]', 'train[1:10]')]
    assert digits[0] != digits[1]
