"""Learning rate and weight decay over the two stages."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from timm.scheduler import create_scheduler_v2
from torch import nn

from ctc_timm.training.optimization import create_optimizer, resolve_lr
from ctc_timm.training.schedules import TwoStageSchedule
from ctc_timm.utils.errors import UserError

Flags = Callable[..., argparse.Namespace]
GOLDEN = json.loads((Path(__file__).parents[1] / 'golden' / 'schedules.json').read_text())


def sgd(lr: float = 0.05, weight_decay: float = 5e-4) -> torch.optim.SGD:
    return torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=lr, weight_decay=weight_decay)


def rates(schedule: TwoStageSchedule) -> list[float]:
    """The learning rate of each epoch."""
    out = []
    for epoch in range(schedule.num_epochs):
        schedule.step(epoch)
        out.append(schedule.optimizer.param_groups[0]['lr'])
    return out


@pytest.mark.parametrize(
    'recipe, key',
    [
        ('cifar100_ctc_discriminability', 'ctc'),
        ('cifar100_ctc_transferability', 'ctc'),
        ('cifar100_vanilla', 'vanilla'),
    ],
)
def test_recipes_follow_the_published_schedules(flags: Flags, recipe: str, key: str) -> None:
    """The published code's own numbers."""
    args = flags('-c', f'recipes/{recipe}.yaml')
    schedule = TwoStageSchedule(sgd(args.lr), args, 782, args.mode == 'ctc')
    golden = GOLDEN[key]
    assert schedule.num_epochs == golden['epochs']
    assert schedule.temporal_start == golden.get('stage_two_epoch', golden['epochs'])
    assert rates(schedule) == pytest.approx(golden['values'], rel=1e-12, abs=0)


def test_stages_against_plain_timm(flags: Flags) -> None:
    """Each stage is timm's own schedule over its length, the second one scaled, from 10% and without warm-up."""
    args = flags(
        *[
            '--epochs',
            '30',
            '--temporal-start-epoch',
            '20',
            '--warmup-epochs',
            '3',
            '--warmup-lr',
            '1e-4',
            '--min-lr',
            '1e-3',
        ]
    )
    mine = rates(TwoStageSchedule(sgd(0.1), args, 10))
    optimizer = sgd(0.1)
    for start, length, warmup, scale in ((0, 20, 3, 1.0), (20, 10, 0, 0.1)):
        plain, _ = create_scheduler_v2(
            optimizer, 'cosine', num_epochs=length, warmup_epochs=warmup, warmup_lr=1e-4, min_lr=1e-3
        )
        for epoch in range(length):
            plain.step(epoch)
            assert mine[start + epoch] == pytest.approx(scale * optimizer.param_groups[0]['lr'], rel=1e-12)
    warm = [1e-4 + (0.1 - 1e-4) * epoch / 3 for epoch in range(3)]
    assert mine[:3] == pytest.approx(warm, rel=1e-12)


def test_temporal_cosine_in_closed_form(flags: Flags) -> None:
    args = flags(*['--epochs', '12', '--temporal-start-epoch', '4', '--temporal-lr-scale', '0.2'])
    mine = rates(TwoStageSchedule(sgd(0.5), args, 10))
    assert mine[4:] == pytest.approx([0.1 * 0.5 * (1 + math.cos(math.pi * t / 8)) for t in range(8)], rel=1e-12)


def test_on_updates_in_closed_form(flags: Flags) -> None:
    """Every optimizer step is a point of the cosine, in both stages."""
    args = flags(*['--epochs', '5', '--temporal-start-epoch', '3', '--sched-on-updates'])
    schedule = TwoStageSchedule(sgd(0.5), args, 7)
    for epoch in range(5):
        start, length, scale = (0, 3, 1.0) if epoch < 3 else (3, 2, 0.1)
        for update in range(7):
            schedule.step(epoch, update)
            share = ((epoch - start) * 7 + update) / (length * 7)
            expected = scale * 0.25 * (1 + math.cos(math.pi * share))
            assert schedule.optimizer.param_groups[0]['lr'] == pytest.approx(expected, rel=1e-12)


def test_open_cosine_warm_up(flags: Flags) -> None:
    """The warm-up reaches the full rate within its own epochs, then the cosine goes on from where it is."""
    words = '--epochs 8 --mode vanilla --sched cosine_open --warmup-epochs 4 --warmup-lr 0.0'
    mine = rates(TwoStageSchedule(sgd(0.2), flags(words), 10, two_stages=False))
    cosine = [0.1 * (1 + math.cos(math.pi * t / 9)) for t in range(5, 9)]
    assert mine == pytest.approx([0.05, 0.1, 0.15, 0.2, *cosine], rel=1e-12)


def test_the_warm_up_may_come_on_top(flags: Flags) -> None:
    args = flags(
        *[
            '--epochs',
            '6',
            '--temporal-start-epoch',
            '4',
            '--warmup-epochs',
            '2',
            '--warmup-prefix',
            '--warmup-lr',
            '0.0',
        ]
    )
    schedule = TwoStageSchedule(sgd(1.0), args, 10)
    assert (schedule.num_epochs, schedule.temporal_start) == (8, 6)
    first = [0.5 * (1 + math.cos(math.pi * t / 4)) for t in range(4)]
    assert rates(schedule)[:6] == pytest.approx([0.0, 0.5, *first], rel=1e-12)


def test_weight_decay_by_stage(flags: Flags) -> None:
    """Scaled in the instance stage, plain in the temporal one; groups without any keep none."""
    args = flags(
        *[
            '--epochs',
            '3',
            '--temporal-start-epoch',
            '2',
            '--instance-weight-decay-scale',
            '2.0',
            '--weight-decay',
            '5e-4',
        ]
    )
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    args.lr = resolve_lr(args, 1)
    schedule = TwoStageSchedule(create_optimizer(args, module), args, 10)
    seen = []
    for epoch in range(3):
        schedule.step(epoch)
        seen.append(sorted(group['weight_decay'] for group in schedule.optimizer.param_groups))
    assert seen == [[0.0, 1e-3], [0.0, 1e-3], [0.0, 5e-4]]


def test_layer_decay_survives_the_stages(flags: Flags) -> None:
    """Groups keep the ratio of their learning rates, with any schedule and with none."""
    for sched in ('cosine', 'cosine_open', 'none'):
        optimizer = torch.optim.SGD(
            [
                {'params': [nn.Parameter(torch.zeros(1))], 'lr_scale': 1.0},
                {'params': [nn.Parameter(torch.zeros(1))], 'lr_scale': 0.5},
            ],
            lr=0.1,
        )
        args = flags(f'--epochs 4 --temporal-start-epoch 2 --sched {sched}')
        schedule = TwoStageSchedule(optimizer, args, 10)
        for epoch in range(4):
            schedule.step(epoch)
            top, low = (group['lr'] for group in optimizer.param_groups)
            assert 0 < top <= 0.1 and low == pytest.approx(0.5 * top, rel=1e-12)


@pytest.mark.parametrize('epochs, start', [(10, 11), (10, 50), (1, 5)])
def test_a_stage_outside_the_run(flags: Flags, epochs: int, start: int) -> None:
    args = flags('--epochs', str(epochs), '--temporal-start-epoch', str(start))
    with pytest.raises(UserError, match=f'--temporal-start-epoch {start} lies outside .* use 0 to {epochs}'):
        TwoStageSchedule(sgd(), args, 10)


@pytest.mark.parametrize('epochs, start, expected', [(9, None, 6), (15, None, 10), (300, None, 200), (5, 0, 0)])
def test_where_the_temporal_stage_starts(flags: Flags, epochs: int, start: int | None, expected: int) -> None:
    words = ['--epochs', str(epochs)] + ([] if start is None else ['--temporal-start-epoch', str(start)])
    schedule = TwoStageSchedule(sgd(), flags(*words), 10)
    assert [schedule.stage(epoch) for epoch in range(epochs)].count('instance') == expected


@pytest.mark.parametrize('sched, cooldown', [('cosine_open', 2), ('cosine', 2), ('multistep', 0)])
def test_a_temporal_stage_that_never_starts(flags: Flags, sched: str, cooldown: int) -> None:
    """The learning rates of plain training, with the weight decay of the instance stage."""
    words = f'--epochs 6 --sched {sched} --cooldown-epochs {cooldown} --lr 0.1 --instance-weight-decay-scale 2'.split()
    two, plain = sgd(), sgd()
    schedule = TwoStageSchedule(two, flags(*words, '--temporal-start-epoch', '6'), 10)
    alone = TwoStageSchedule(plain, flags(*words), 10, two_stages=False)
    assert schedule.num_epochs == schedule.temporal_start == alone.num_epochs == 6 + cooldown
    for epoch in range(6 + cooldown):
        schedule.step(epoch)
        alone.step(epoch)
        assert schedule.stage(epoch) == 'instance'
        for group, other in zip(two.param_groups, plain.param_groups):
            assert group['lr'] == other['lr']
            assert group['weight_decay'] == 2 * other['weight_decay']


def test_learning_rate_by_batch_size(flags: Flags) -> None:
    """timm's rule: linear in the images a step, by their square root for adaptive optimizers."""
    words = ['--lr-base', '0.1', '--lr-base-size', '256', '-b', '128', '--grad-accum-steps', '4']
    assert resolve_lr(flags(*words), 2) == pytest.approx(0.1 * 1024 / 256)
    assert resolve_lr(flags(*words, '--opt', 'adamw'), 2) == pytest.approx(0.1 * (1024 / 256) ** 0.5)
    assert resolve_lr(flags(*words, '--lr', '0.3'), 2) == 0.3
