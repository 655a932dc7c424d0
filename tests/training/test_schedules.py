"""Learning rate and weight decay over the two stages."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.scheduler import PlateauLRScheduler, create_scheduler_v2
from torch import nn

from ctc_timm import CTCTask
from ctc_timm.training.optimization import TwoStageSchedule, create_optimizer, resolve_lr
from ctc_timm.training.settings import OptimizerSettings, ScheduleSettings, StageSettings, TrainSettings
from ctc_timm.utils.errors import UserError
from ctc_timm.utils.settings import build, replace
from ctc_timm.utils.yaml_files import read_recipe
from stops import stop_and_go_on

GOLDEN = json.loads((Path(__file__).parents[1] / 'golden' / 'schedules.json').read_text())


def sgd(lr: float = 0.05, weight_decay: float = 5e-4) -> torch.optim.SGD:
    return torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=lr, weight_decay=weight_decay)


def schedule(optimizer: Any, updates: int = 10, two_stages: bool = True, **values: Any) -> TwoStageSchedule:
    """A schedule by flat settings."""
    stages = replace(StageSettings(), **values) if two_stages else None
    return TwoStageSchedule(optimizer, replace(ScheduleSettings(), **values), stages, updates)


def rates(schedule: TwoStageSchedule) -> list[float]:
    """The learning rate of each epoch."""
    out = []
    for epoch in range(schedule.num_epochs):
        schedule.step(epoch)
        out.append(schedule.optimizer.param_groups[0]['lr'])
    return out


@pytest.mark.parametrize('recipe', ['ctc_discriminability', 'ctc_transferability', 'vanilla'])
def test_recipes_follow_the_published_schedules(recipe: str) -> None:
    """The published code's own numbers."""
    settings = build(TrainSettings, read_recipe(f'cifar100_{recipe}'))
    stages = settings.stages if settings.ctc.mode == 'ctc' else None
    assert settings.optimizer.lr is not None
    mine = TwoStageSchedule(sgd(settings.optimizer.lr), settings.schedule, stages, 782)
    golden = GOLDEN[settings.ctc.mode]
    assert mine.num_epochs == golden['epochs']
    assert mine.temporal_start == golden.get('stage_two_epoch', golden['epochs'])
    assert rates(mine) == pytest.approx(golden['values'], rel=1e-12, abs=0)


def cosine(top: float, steps: range, length: int) -> list[float]:
    return [top * 0.5 * (1 + math.cos(math.pi * step / length)) for step in steps]


def test_closed_forms() -> None:
    """The open cosine's warm-up reaches the full rate within its epochs; a prefix comes on top of the epochs."""
    mine = schedule(sgd(0.2), epochs=8, sched='cosine_open', warmup_epochs=4, warmup_lr=0.0, two_stages=False)
    assert rates(mine) == pytest.approx([0.05, 0.1, 0.15, 0.2, *cosine(0.2, range(5, 9), 9)], rel=1e-12)
    mine = schedule(sgd(1.0), epochs=6, temporal_start_epoch=4, warmup_epochs=2, warmup_prefix=True, warmup_lr=0.0)
    assert rates(mine) == pytest.approx([0.0, 0.5, *cosine(1.0, range(4), 4), *cosine(0.1, range(2), 2)], rel=1e-12)


def test_weight_decay_by_stage() -> None:
    """Scaled in the instance stage, plain in the temporal one; groups without any keep none."""
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    optimizer = create_optimizer(OptimizerSettings(lr=0.1, weight_decay=5e-4), module)
    mine = schedule(optimizer, epochs=3, temporal_start_epoch=2, instance_weight_decay_scale=2.0)
    seen = []
    for epoch in range(3):
        mine.step(epoch)
        seen.append(sorted(group['weight_decay'] for group in optimizer.param_groups))
    assert seen == [[0.0, 1e-3], [0.0, 1e-3], [0.0, 5e-4]]


@pytest.mark.parametrize('sched', ['cosine', 'cosine_open', 'none'])
def test_layer_decay_survives_the_stages(sched: str) -> None:
    """Groups keep the ratio of their learning rates, with any schedule and with none."""
    groups = [{'params': [nn.Parameter(torch.zeros(1))], 'lr_scale': scale} for scale in (1.0, 0.5)]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    mine = schedule(optimizer, epochs=4, temporal_start_epoch=2, sched=sched)
    for epoch in range(4):
        mine.step(epoch)
        top, low = (group['lr'] for group in optimizer.param_groups)
        assert 0 < top <= 0.1 and low == pytest.approx(0.5 * top, rel=1e-12)


@pytest.mark.parametrize('epochs, start, expected', [(9, None, 6), (15, None, 10), (300, None, 200), (5, 0, 0)])
def test_where_the_temporal_stage_starts(epochs: int, start: int | None, expected: int) -> None:
    with pytest.raises(UserError, match=f'`temporal_start_epoch` {epochs + 1} lies outside .* use 0 to {epochs}'):
        schedule(sgd(), epochs=epochs, temporal_start_epoch=epochs + 1)
    mine = schedule(sgd(), epochs=epochs, temporal_start_epoch=start)
    assert [mine.stage(epoch) for epoch in range(epochs)].count('instance') == expected


@pytest.mark.parametrize('sched, cooldown', [('cosine_open', 2), ('cosine', 2), ('multistep', 0)])
def test_a_temporal_stage_that_never_starts(sched: str, cooldown: int) -> None:
    """The learning rates of supervised training, with the weight decay of the instance stage."""
    values = dict(epochs=6, sched=sched, cooldown_epochs=cooldown, instance_weight_decay_scale=2.0)
    two, one = sgd(), sgd()
    mine, alone = schedule(two, temporal_start_epoch=6, **values), schedule(one, two_stages=False, **values)
    assert mine.num_epochs == mine.temporal_start == alone.num_epochs == 6 + cooldown
    for epoch in range(6 + cooldown):
        mine.step(epoch)
        alone.step(epoch)
        assert mine.stage(epoch) == 'instance'
        assert two.param_groups[0]['lr'] == one.param_groups[0]['lr']
        assert two.param_groups[0]['weight_decay'] == 2 * one.param_groups[0]['weight_decay']


@pytest.mark.parametrize(
    'values, expected',
    [({}, 0.1 * 1024 / 256), ({'opt': 'adamw'}, 0.1 * (1024 / 256) ** 0.5), ({'opt': 'adamw', 'lr': 0.3}, 0.3)],
)
def test_learning_rate_by_batch_size(values: dict[str, Any], expected: float) -> None:
    """timm's rule: linear in the images a step, by their square root for adaptive optimizers."""
    settings = OptimizerSettings(lr_base=0.1, lr_base_size=256, grad_accum_steps=4, **values)
    assert resolve_lr(settings, batch_size=128, world_size=2) == pytest.approx(expected)


@pytest.mark.parametrize(
    'values', [{}, {'warmup_epochs': 2}, {'sched': 'step', 'decay_epochs': 3, 'warmup_prefix': True}]
)
def test_a_temporal_stage_from_the_start(values: dict[str, Any]) -> None:
    """Its schedule is that of a run of one stage: at the full rate, with the warm-up."""
    mine = schedule(sgd(), epochs=8, temporal_from_start=True, **values)
    alone = schedule(sgd(), epochs=8, two_stages=False, **values)
    assert mine.temporal_start == 0 and mine.stage(0) == 'temporal' and rates(mine) == rates(alone)
    with pytest.raises(UserError, match='`temporal_start_epoch` 3: is 0 with `temporal_from_start`; leave one'):
        schedule(sgd(), epochs=8, temporal_from_start=True, temporal_start_epoch=3)


@pytest.mark.filterwarnings('error:PlateauLRScheduler')
@pytest.mark.parametrize('metric', ['top1', 'loss'])
@pytest.mark.parametrize('values', [{}, {'warmup_epochs': 3, 'warmup_lr': 1e-3}, {'lr_noise': (0.2, 0.8)}])
def test_plateau_is_timms_in_each_stage(metric: str, values: dict[str, Any]) -> None:
    """timm's schedule, stepped after each epoch; the second anew, scaled, and without warm-up. And of the place alone.

    An epoch without an evaluation changes nothing, one whose loss is no number counts as no better.
    """
    draw = torch.Generator().manual_seed(0)
    metrics: list[float | None] = torch.rand(26, generator=draw).mul(100).tolist()
    metrics[4], metrics[9], metrics[20] = None, math.nan, None
    given = dict(epochs=26, temporal_start_epoch=14, sched='plateau', patience_epochs=1, decay_rate=0.5, min_lr=1e-4)
    given |= values
    stages = StageSettings(temporal_start_epoch=14)
    groups = [{'params': [nn.Parameter(torch.zeros(1))], 'lr_scale': scale} for scale in (1.0, 0.5)]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    mine = TwoStageSchedule(optimizer, replace(ScheduleSettings(), **given), stages, 10, metric=metric)
    seen, expected = [], []
    for first, length, scale, warmup in ((0, 14, 1.0, given.get('warmup_epochs', 0)), (14, 12, 0.1, 0)):
        alone = torch.optim.SGD([dict(group, params=[nn.Parameter(torch.zeros(1))]) for group in groups], lr=0.1)
        with pytest.warns(FutureWarning):
            plain = PlateauLRScheduler(
                alone, 0.5, patience_t=1, warmup_t=warmup, warmup_lr_init=1e-3, lr_min=1e-4,
                mode='min' if metric == 'loss' else 'max', noise_seed=42,
                noise_range_t=[0.2 * length, 0.8 * length] if 'lr_noise' in given else None,
            )  # fmt: skip
        for epoch in range(first, first + length):
            if epoch > first:
                plain.step(epoch - first, metrics[epoch - 1])
            expected.append([scale * group['lr'] for group in alone.param_groups])
            mine.step(epoch, metrics=metrics[:epoch])
            seen.append([group['lr'] for group in optimizer.param_groups])
    assert seen == [pytest.approx(rates, rel=1e-12) for rates in expected]
    assert len({rates[0] for rates in seen[:14]}) > 2 and len({rates[0] for rates in seen[14:]}) > 2
    for epoch in torch.randint(26, (20,), generator=draw).tolist():
        mine.step(epoch, 3, metrics[:epoch])  # as after a resume
        assert [group['lr'] for group in optimizer.param_groups] == seen[epoch]


def test_a_plateau_of_what_is_not_measured() -> None:
    with pytest.raises(UserError, match='`sched` plateau: .* use `sched_on_updates=False`'):
        schedule(sgd(), sched='plateau', sched_on_updates=True)


def test_a_run_on_a_plateau_resumes_bit_exact(script: Any, tiny: list[str], tmp_path: Path) -> None:
    """Stopped within an epoch of the second stage, after the rate had decayed in both; and without an evaluation."""
    words = [*tiny, '--sched', 'plateau', '--patience-epochs', '0', '--epochs', '8', '--temporal-start-epoch', '4']
    words += ['--decay-rate', '0.5', '--lr', '0.2', '--eval-metric', 'loss']
    stop_and_go_on(script, 'train.py', words, tmp_path, CTCTask, 'run_batch', step=30)
    with (tmp_path / 'cut' / 'summary.csv').open(newline='') as stream:
        table = [(float(row['lr']), float(row['eval_loss'])) for row in csv.DictReader(stream)]
    for first, scale in ((0, 1.0), (4, 0.1)):
        rate, best = 0.2, math.inf
        for lr, loss in table[first : first + 4]:
            assert lr == pytest.approx(scale * rate)
            rate, best = (rate, loss) if loss < best * (1 - 1e-4) else (rate / 2, best)
        assert len({lr for lr, _ in table[first : first + 4]}) > 1
    ended = script('train.py', *words, '--val-split', '', '--output', str(tmp_path), '--experiment', 'none')
    assert ended.code == 2 and '--sched plateau: follows an evaluation; name a --val-split' in ended.err
    assert not (tmp_path / 'none').exists()


@st.composite
def schedules(draw: Any) -> dict[str, Any]:
    """Settings of a schedule that make sense."""
    epochs = draw(st.integers(1, 40))
    lr = draw(st.floats(1e-4, 2))
    return {
        'epochs': epochs,
        'temporal_start_epoch': draw(st.integers(0, epochs - 1)),
        'sched': draw(st.sampled_from(['cosine', 'tanh', 'step', 'multistep', 'poly', 'constant'])),
        'warmup_epochs': draw(st.integers(0, 6)),
        'warmup_lr': lr * draw(st.floats(0, 1)),
        'min_lr': lr * draw(st.floats(0, 0.5)),
        'temporal_lr_scale': draw(st.floats(0.01, 1)),
        'decay_epochs': draw(st.integers(1, 20)),
        'sched_on_updates': draw(st.booleans()),
        'lr': lr,
    }


def groups(optimizer: Any) -> list[float]:
    return [group['lr'] for group in optimizer.param_groups]


@given(schedules(), st.integers(1, 4), st.integers(0, 2**31 - 1))
@settings(max_examples=120)
def test_each_stage_is_timms_schedule(values: dict[str, Any], updates: int, seed: int) -> None:
    """Of its length, the second one scaled and, after a first, without warm-up; and of the place alone."""
    lr, start, on_updates = values.pop('lr'), values['temporal_start_epoch'], values['sched_on_updates']

    def optimizer() -> torch.optim.SGD:
        first, second = sgd(lr).param_groups + sgd(lr / 2).param_groups
        return torch.optim.SGD([first, second])

    mine, seen = schedule(optimizer(), updates, **values), []
    assert mine.temporal_start == start and mine.num_epochs == values['epochs']
    for epoch, length, warmup, scale in (
        (0, start, values['warmup_epochs'], 1.0),
        (start, values['epochs'] - start, 0 if start else values['warmup_epochs'], values['temporal_lr_scale']),
    ):
        of = {key: values[key] for key in ('sched', 'decay_epochs', 'warmup_lr', 'min_lr')}
        of |= dict(num_epochs=length, warmup_epochs=warmup, step_on_epochs=not on_updates, updates_per_epoch=updates)
        alone = optimizer()
        plain = create_scheduler_v2(alone, **of)[0] if length else None
        for place in range(length * updates):
            assert plain is not None
            plain.step_update(place) if on_updates else plain.step(place // updates)
            mine.step(epoch + place // updates, place % updates)
            seen.append(groups(mine.optimizer))
            assert seen[-1] == pytest.approx([scale * rate for rate in groups(alone)], rel=1e-12)
    for place in torch.randint(len(seen), (10,), generator=torch.Generator().manual_seed(seed)).tolist():
        mine.step(*divmod(place, updates))  # as after a resume
        assert groups(mine.optimizer) == seen[place]
