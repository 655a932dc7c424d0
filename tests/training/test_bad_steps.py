"""Steps whose loss or gradient is not finite: discarded without a trace, counted, and the end of the run in a row."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from ctc_timm import CTCTask, InstanceDiscriminationLoss, TemporalContrastLoss
from ctc_timm.training.build import build_trainer
from ctc_timm.training.trainer import Trainer
from ctc_timm.utils.errors import RunError

Flags = Callable[..., Any]


def everything(trainer: Trainer) -> dict[str, Any]:
    """All that a step may change."""
    task: Any = trainer.task
    slots = trainer.optimizer.state_dict()['state']
    momenta = {f'momentum.{i}': slot['momentum_buffer'] for i, slot in slots.items()}
    banks = task.banks() if isinstance(task, CTCTask) else {}
    return {k: v.clone() for k, v in {**task.trainable_module.state_dict(), **momenta, **banks}.items()}


def spoil(trainer: Trainer, steps: set[int], seen: list[Any], what: str) -> None:
    """Make the loss or the gradient of some steps not finite; record the state before and after those."""
    criterion, update = trainer.task.criterion, trainer.steps.update
    taken = 0

    class Spoiled(torch.nn.Module):
        def forward(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
            if taken + 1 not in steps:
                return criterion(output, target)
            if what == 'gradient':  # the loss is zero, its slope infinite
                return (output.sum() - output.detach().sum()).sqrt()
            return criterion(output, target) * float(what)

    def recorded(*args: Any) -> Any:
        nonlocal taken
        taken += 1
        before = everything(trainer) if taken - 1 in steps or taken in steps else None
        step = update(*args)
        if taken in steps:
            seen.append((before, everything(trainer), step.bad))
        return step

    trainer.task.criterion = Spoiled()
    trainer.steps.update = recorded  # type: ignore[method-assign]


@pytest.mark.parametrize('what', ['nan', 'inf', 'gradient'])
def test_a_bad_step_leaves_no_trace(flags: Flags, tiny: list[str], tmp_path: Path, what: str) -> None:
    """Weights, momenta, batch norm's statistics and banks are what they were; the epoch's means leave it out."""
    words = f'--output {tmp_path} --experiment run --epochs 2 --temporal-start-epoch 1 --log-interval 1'
    trainer = build_trainer(flags(*tiny, words))
    task: Any = trainer.task
    seen: list[Any] = []
    statistics: list[dict[str, torch.Tensor]] = []
    record = trainer.steps._statistics.record  # type: ignore[union-attr]

    def recorded() -> None:
        record()
        state = task.model.state_dict()
        statistics.append({k: v.clone() for k, v in state.items() if 'running' in k or 'tracked' in k})

    trainer.steps._statistics.record = recorded  # type: ignore[union-attr, method-assign]
    spoil(trainer, {2, 6}, seen, what)
    trainer.fit()
    assert [bad for _, _, bad in seen] == [True, True]
    for place, (before, after, _) in zip((1, 5), seen):
        for name, value in after.items():
            # The forward pass has changed the statistics before the update is to decide.
            expected = statistics[place].get(name.removeprefix('body.model.'), before[name])
            assert torch.equal(value, expected), name
    rows = trainer.run.rows()
    assert [row['train_bad_steps'] for row in rows] == ['1', '1']
    assert all(float(row['train_loss']) < 100 for row in rows)
    recorded_images = [row['bad_step_of'] for row in trainer.run.log_rows() if 'bad_step_of' in row]
    trainer.loader.set_epoch(0)
    assert recorded_images[0] == [f'{i:04d}.png' for _, i in list(trainer.loader.batches)[1]]


def test_too_many(flags: Flags, tiny: list[str], image_folder: Path, tmp_path: Path) -> None:
    """The run ends with the batch's files and the last good state named; its count survives a resume."""
    words = [*tiny[2:], '--data-dir', str(image_folder), '--train-split', 'train', '--val-split', 'validation']
    words += ['--img-size', '32', '-b', '9', '--num-negatives', '4', '--output', str(tmp_path), '--experiment', 'run']
    words += ['--epochs', '3', '--temporal-start-epoch', '2']
    trainer = build_trainer(flags(*words, '--max-bad-steps 3 --checkpoint-steps 1'))
    spoil(trainer, {6, 7, 8}, [], 'nan')
    with pytest.raises(RunError) as error:
        trainer.fit()
    message = str(error.value)
    assert message.startswith('`max_bad_steps` 3: loss or gradient not finite in 3 steps in a row, up to step 8')
    last = trainer.run.states()[-1]
    assert f'its last good state is {last}' in message and last.name == 'epoch-0001-step-000007'
    names = trainer.run.log_rows()[-1]['bad_step_of']
    assert len(names) == 9 and all(Path(name).is_file() for name in names) and names[0] in message
    resumed = build_trainer(flags(*words, '--max-bad-steps 3 --resume auto'))
    assert (resumed.state.updates, resumed.state.bad_in_a_row) == (7, 2)
    resumed.fit()
    assert resumed.state.bad_in_a_row == 0


def test_without_the_check(flags: Flags, tiny: list[str], tmp_path: Path) -> None:
    """`max_bad_steps=0` takes every step, as other training loops do."""
    words = f'--output {tmp_path} --experiment run --epochs 1 --mode vanilla --max-bad-steps 0 --keep-every 0'
    trainer = build_trainer(flags(*tiny, words))
    spoil(trainer, {2}, [], 'nan')
    trainer.fit()
    assert not all(bool(value.isfinite().all()) for value in trainer.eval_model().state_dict().values())


@pytest.mark.parametrize('value', [torch.nan, torch.inf])
def test_features_that_are_not_finite(value: float) -> None:
    """Rows of the banks keep length one, and normalizers stay finite."""
    features, index = torch.randn(6, 8, generator=torch.Generator().manual_seed(0)), torch.arange(6)
    bad = features.index_fill(0, torch.arange(2), value)
    instance, temporal = InstanceDiscriminationLoss(8, 20, 4), TemporalContrastLoss(8, 20, 4, num_negatives=10)
    temporal.refresh(features, index)
    instance.train()(bad, index)
    temporal.train()(bad, features, index, torch.arange(10, 20))
    for bank in (instance.bank, temporal.present_bank, temporal.past_bank):
        torch.testing.assert_close(bank.norm(dim=1), torch.ones(20))
    assert temporal.present_normalizer.isfinite() and temporal.past_normalizer.isfinite()


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16])
def test_a_task_in_half_precision(dtype: torch.dtype) -> None:
    """An image of zeros through a whole task of that precision, both stages: finite throughout."""
    torch.manual_seed(0)
    labels = torch.arange(16) % 4
    model = timm.create_model('test_resnet', num_classes=4)
    task = CTCTask(model, labels, num_negatives=8, dtype=dtype, verbose=False)
    task.model.to(dtype)
    images = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(1)).to(dtype)
    images[0] = 0
    task.train()
    for stage in ('instance', 'temporal'):
        if stage == 'temporal':
            task.start_temporal_stage([(images, labels[:8], torch.arange(8))])
            task.train()
        result = task(images, labels[:8], torch.arange(8))
        result['loss'].backward()
        assert bool(result['loss'].isfinite())
        gradients = [p.grad for p in task.trainable_module.parameters() if p.grad is not None]
        assert all(bool(gradient.isfinite().all()) for gradient in gradients)
        for bank in task.banks().values():
            torch.testing.assert_close(bank.float().norm(dim=1), torch.ones(16), atol=1e-3, rtol=0)
