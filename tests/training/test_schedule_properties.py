"""What holds for any schedule: within a stage it is timm's, it keeps its bounds, and it has no jumps."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from timm.scheduler import create_scheduler_v2

from ctc_timm.training.optimization import TwoStageSchedule
from ctc_timm.training.settings import TrainSettings
from ctc_timm.utils.settings import build

SEEDS = st.integers(0, 2**31 - 1)


def sgd(lr: float) -> torch.optim.SGD:
    """An optimizer of two groups."""
    weights = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
    return torch.optim.SGD([{'params': weights[:1]}, {'params': weights[1:], 'lr': lr / 2}], lr=lr)


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


def schedule_of(settings_: dict[str, Any], updates: int) -> tuple[TwoStageSchedule, list[list[float]]]:
    """The schedule, and both groups' learning rates at every update of the run."""
    chosen = build(TrainSettings, settings_)
    schedule = TwoStageSchedule(sgd(settings_['lr']), chosen.schedule, chosen.stages, updates)
    found = []
    for epoch in range(schedule.num_epochs):
        for update in range(updates):
            schedule.step(epoch, update)
            found.append([group['lr'] for group in schedule.optimizer.param_groups])
    return schedule, found


@given(schedules(), st.integers(1, 4))
@settings(max_examples=120)
def test_each_stage_is_timms_schedule(flags: dict[str, Any], updates: int) -> None:
    """Of its length, the second one scaled and without warm-up, whatever schedule it is."""
    schedule, found = schedule_of(flags, updates)
    start = flags['temporal_start_epoch']
    assert schedule.temporal_start == start and schedule.num_epochs == flags['epochs']
    for first, length, warmup, scale in (
        (0, start, flags['warmup_epochs'], 1.0),
        (start, flags['epochs'] - start, 0, flags['temporal_lr_scale']),
    ):
        if not length:
            continue
        optimizer = sgd(flags['lr'])
        plain, _ = create_scheduler_v2(
            optimizer,
            flags['sched'],
            num_epochs=length,
            decay_epochs=flags['decay_epochs'],
            warmup_epochs=warmup,
            warmup_lr=flags['warmup_lr'],
            min_lr=flags['min_lr'],
            step_on_epochs=not flags['sched_on_updates'],
            updates_per_epoch=updates,
        )
        assert plain is not None
        for place in range(length * updates):
            if flags['sched_on_updates']:
                plain.step_update(place)
            else:
                plain.step(place // updates)
            wanted = [scale * group['lr'] for group in optimizer.param_groups]
            assert found[first * updates + place] == pytest.approx(wanted, rel=1e-12)


@given(schedules(), st.integers(1, 4), SEEDS)
def test_learning_rates_keep_their_bounds(flags: dict[str, Any], updates: int, seed: int) -> None:
    """Never above the rate asked for nor below the lower bounds; the stage's top first; of the place alone."""
    schedule, found = schedule_of(flags, updates)
    start = flags['temporal_start_epoch'] * updates
    steps = flags['sched'] in ('step', 'multistep')  # which know no lower bound
    low = 0.0 if steps else min(flags['min_lr'], flags['warmup_lr'])
    for place, (rate, _) in enumerate(found):
        scale = 1.0 if place < start else flags['temporal_lr_scale']
        assert scale * low * (1 - 1e-9) <= rate <= scale * flags['lr'] * (1 + 1e-9)
    if flags['sched'] != 'multistep':  # whose milestones lie where they are put
        exact = 1e-5 if flags['sched'] == 'tanh' else 1e-12  # a tanh has no top
        assert found[start][0] == pytest.approx(flags['temporal_lr_scale'] * flags['lr'], rel=exact)
    generator = torch.Generator().manual_seed(seed)
    for place in torch.randint(len(found), (10,), generator=generator).tolist():  # as after a resume
        schedule.step(*divmod(place, updates))
        assert [group['lr'] for group in schedule.optimizer.param_groups] == found[place]


@given(schedules(), st.integers(1, 4))
def test_cosine_and_warm_up_have_no_jumps(flags: dict[str, Any], updates: int) -> None:
    """From one update to the next the rate moves by no more than the steepest slope of its stage."""
    flags = {**flags, 'sched': 'cosine', 'sched_on_updates': True}
    assume(flags['temporal_start_epoch'] > flags['warmup_epochs'])
    _, found = schedule_of(flags, updates)
    start, warm = flags['temporal_start_epoch'] * updates, flags['warmup_epochs'] * updates
    for place in range(1, len(found)):
        if place == start:
            continue  # the stage changes
        length = start if place < start else len(found) - start
        scale = 1.0 if place < start else flags['temporal_lr_scale']
        steepest = scale * flags['lr'] * math.pi / 2 / length
        if place <= warm:
            steepest = max(steepest, flags['lr'] / warm)
        if place == warm:  # timm's cosine goes on from where it would be without the warm-up
            steepest += flags['lr'] * (1 - math.cos(math.pi * warm / length)) / 2
        assert abs(found[place][0] - found[place - 1][0]) <= steepest * (1 + 1e-9)
