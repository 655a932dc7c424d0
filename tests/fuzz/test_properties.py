"""What holds for any sizes, settings and numbers: losses, banks, negatives, schedules, and recipes against flags.

Truths are written out here from the equations, one number at a time, in float64.

Letters: B batch, C classes, D feature size, E embedding size, K negatives an image, M rows of other classes,
N instances, R rows that a batch shares.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from scipy.stats import chi2
from timm.scheduler import create_scheduler_v2
from torch import Tensor

from ctc_timm import InstanceDiscriminationLoss, NegativeSampler, TemporalContrastLoss
from ctc_timm.arguments import KeyValues, Parser, any_text, parse
from ctc_timm.contrast.banks import momentum_update, new_bank
from ctc_timm.contrast.negatives import Draw, OtherClasses
from ctc_timm.training.flags import add_arguments
from ctc_timm.training.schedules import TwoStageSchedule

settings.register_profile(
    'same every time',
    derandomize=True,
    deadline=None,
    max_examples=60,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile('same every time')

EPS = 1e-7
SEEDS = st.integers(0, 2**31 - 1)
EXTREMES = (0.0, -0.0, 1.0, -3.5, 1e30, -1e30, 1e-30, 1e-40, 1e-45, 65504.0, 1e-8)


def plain_unit(vector: Tensor) -> Tensor:
    """v / |v|."""
    return vector / vector.pow(2).sum().sqrt()


def plain_embedding(projector: Any, feature_D: Tensor) -> Tensor:
    """normalize(W x + b)."""
    return plain_unit(projector.weight @ feature_D + projector.bias)


def plain_instance(loss: Any, features_BD: Tensor, index_B: Tensor, lam_B: Tensor | None) -> Tensor:
    """mean_b -log(exp(<v_b, bank_b> / T) / sum_n exp(<v_b, bank_n> / T)), the partner's share beside it."""
    terms = []
    for b, feature_D in enumerate(features_BD):
        scores = [plain_embedding(loss.projector, feature_D) @ row / loss.temperature for row in loss.bank]
        top = max(float(score.detach()) for score in scores)
        spread = top + torch.stack([(score - top).exp() for score in scores]).sum().log()
        own = scores[int(index_B[b])]
        if lam_B is not None:
            own = lam_B[b] * own + (1 - lam_B[b]) * scores[int(index_B.flip(0)[b])]
        terms.append(spread - own)
    return torch.stack(terms).mean()


def plain_temporal(
    loss: Any,
    present_BD: Tensor,
    past_BD: Tensor,
    index_B: Tensor,
    rows: list[list[tuple[int, float]]],
    positives: list[int],
    lam_B: Tensor | None,
) -> Tensor:
    """Both directions of the contrast, with each image's negatives as (row, weight)."""
    rate, B = loss.num_negatives / loss.num_instances, len(index_B)
    total = torch.zeros((), dtype=torch.float64)
    for features_BD, projector, bank, normalizer in (
        (present_BD, loss.present_projector, loss.past_bank, loss.present_normalizer),
        (past_BD, loss.past_projector, loss.present_bank, loss.past_normalizer),
    ):
        for b in range(B):
            v_E = plain_embedding(projector, features_BD[b])
            out = [(row @ v_E / loss.temperature).exp() / normalizer for row in bank]
            chosen = [(positives[b], 1.0)]
            if lam_B is not None:
                chosen = [(positives[b], float(lam_B[b])), (positives[B - 1 - b], 1 - float(lam_B[b]))]
            for row, weight in chosen:
                total = total - weight * (out[row] / (out[row] + rate + EPS)).log() / B
            for row, weight in rows[b]:
                total = total - weight * (rate / (out[row] + rate + EPS)).log() / B
    return total


def same_value_and_slopes(value: Tensor, expected: Tensor, of: list[Tensor]) -> None:
    """Equal to nine digits, gradients too."""
    torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-12)
    slopes = zip(torch.autograd.grad(value, of), torch.autograd.grad(expected, of))
    for mine, theirs in slopes:
        torch.testing.assert_close(mine, theirs, rtol=1e-7, atol=1e-9 * max(1.0, float(theirs.abs().max())))


@st.composite
def sizes(draw: Any) -> dict[str, int]:
    """B, D, E, N."""
    return {name: draw(st.integers(*limits)) for name, limits in dict(B=(1, 5), D=(1, 6), E=(2, 6), N=(2, 24)).items()}


@given(sizes(), SEEDS, st.floats(0.01, 20), st.sampled_from([1e-3, 1.0, 1e4]), st.booleans())
def test_instance_loss_is_its_equation(size: dict[str, int], seed: int, T: float, scale: float, mixed: bool) -> None:
    torch.manual_seed(seed)
    loss = InstanceDiscriminationLoss(size['D'], size['N'], size['E'], temperature=T).double().eval()
    features_BD = (torch.randn(size['B'], size['D'], dtype=torch.float64) * scale).requires_grad_()
    index_B = torch.randint(size['N'], (size['B'],))
    lam_B = torch.rand(size['B'], dtype=torch.float64) if mixed else None
    expected = plain_instance(loss, features_BD, index_B, lam_B)
    same_value_and_slopes(loss(features_BD, index_B, lam_B), expected, [features_BD, loss.projector.weight])


FORMS = ('own rows', 'shared rows', 'shared, weighted', 'mask of all', 'all rows', 'other classes')


@given(sizes(), st.integers(1, 12), SEEDS, st.floats(0.02, 5), st.sampled_from(FORMS), st.booleans(), st.booleans())
@settings(max_examples=150)
def test_temporal_loss_is_its_equation(
    size: dict[str, int], K: int, seed: int, T: float, form: str, mixed: bool, relaxed: bool
) -> None:
    torch.manual_seed(seed)
    B, N = size['B'], size['N']
    loss = TemporalContrastLoss(size['D'], N, size['E'], num_negatives=K, temperature=T).double().eval()
    loss.present_normalizer.fill_(float(torch.rand(()) * 10 * N + 0.1))
    loss.past_normalizer.fill_(float(torch.rand(()) * 10 * N + 0.1))
    present_BD, past_BD = (torch.randn(B, size['D'], dtype=torch.float64).requires_grad_() for _ in range(2))
    index_B, positives_B = torch.randint(N, (B,)), torch.randint(N, (B,))
    lam_B = torch.rand(B, dtype=torch.float64) if mixed else None
    scale_B = torch.rand(B, dtype=torch.float64) * 3
    weight_BN = torch.zeros(B, N, dtype=torch.float64)
    if form == 'own rows':
        draw = Draw(torch.randint(N, (B, K)), None, None, positives_B)
        weight_BN.scatter_add_(1, draw.negatives, torch.ones(B, K, dtype=torch.float64))
    elif form in ('shared rows', 'shared, weighted'):
        rows_R = torch.randperm(N)[: max(1, N // 2)]
        use_BR: Any = torch.rand(B, len(rows_R)) < 0.7
        if form == 'shared, weighted':
            use_BR = use_BR.double() * torch.randint(1, 4, use_BR.shape)
        draw = Draw(rows_R, use_BR, scale_B, positives_B)
        weight_BN[:, rows_R] = use_BR.double() * scale_B[:, None]
    elif form == 'other classes':
        labels_N = torch.arange(N) % 2
        others_BN = labels_N[index_B][:, None] != labels_N
        draw = Draw(None, OtherClasses(labels_N[index_B], None, labels_N, others_BN.sum(dim=1)), scale_B, positives_B)
        weight_BN = others_BN.double() * scale_B[:, None]
    else:
        mask_BN = torch.rand(B, N) < 0.6
        draw = Draw(None, mask_BN if form == 'mask of all' else None, scale_B, positives_B)
        weight_BN = (mask_BN.double() if form == 'mask of all' else torch.ones(B, N).double()) * scale_B[:, None]
    if not relaxed:
        draw = draw._replace(positives_B=index_B)
    rows = [[(n, float(w)) for n, w in enumerate(weight_N) if w] for weight_N in weight_BN]
    expected = plain_temporal(loss, present_BD, past_BD, index_B, rows, draw.positives_B.tolist(), lam_B)
    value = loss(present_BD, past_BD, index_B, *draw, lam_B)
    same_value_and_slopes(value, expected, [present_BD, past_BD, loss.present_projector.weight])


@given(sizes(), st.integers(1, 9), SEEDS, st.floats(0.02, 5), st.floats(0, 0.99))
def test_first_temporal_step_sets_normalizers_and_banks(
    size: dict[str, int], K: int, seed: int, T: float, momentum: float
) -> None:
    """Each normalizer is N times the mean of all unnormalised terms; each bank row moves towards its embedding."""
    torch.manual_seed(seed)
    B, N = size['B'], size['N']
    loss = TemporalContrastLoss(size['D'], N, size['E'], num_negatives=K, temperature=T, momentum=momentum).double()
    present_BD, past_BD = torch.randn(2, B, size['D'], dtype=torch.float64)
    index_B, rows_BK = torch.randint(N, (B,)), torch.randint(N, (B, K))
    wanted = {}
    for side, features_BD, other in (('present', present_BD, 'past'), ('past', past_BD, 'present')):
        projector, bank = getattr(loss, f'{side}_projector'), getattr(loss, f'{other}_bank').clone()
        v_BE = [plain_embedding(projector, feature_D) for feature_D in features_BD]
        terms = [(bank[n] @ v_BE[b] / T).exp() for b in range(B) for n in [int(index_B[b]), *rows_BK[b].tolist()]]
        wanted[f'{side}_normalizer'] = torch.stack(terms).mean() * N
        wanted[f'{side}_bank'] = plain_update(getattr(loss, f'{side}_bank'), index_B, torch.stack(v_BE), momentum)
    loss(present_BD, past_BD, index_B, rows_BK)
    for name, value in wanted.items():
        torch.testing.assert_close(getattr(loss, name), value.detach(), rtol=1e-9, atol=1e-12)


@given(
    st.lists(st.lists(st.sampled_from(EXTREMES), min_size=4, max_size=4), min_size=1, max_size=4),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.sampled_from([0.012, 0.1, 1.0, 50.0]),
    st.booleans(),
    SEEDS,
)
@settings(max_examples=200)
def test_losses_are_finite_for_all_finite_features(
    rows: list[list[float]], dtype: torch.dtype, T: float, without_bias: bool, seed: int
) -> None:
    """Zeros, 1e30 and numbers too small to be normal: no loss, gradient, normalizer or bank row is ever no number."""
    torch.manual_seed(seed)
    features_BD = torch.tensor(rows).clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max).to(dtype).requires_grad_()
    other_BD = features_BD.detach().flip(0)
    B, N, K = len(rows), 12, 3
    instance = InstanceDiscriminationLoss(4, N, 5, temperature=T)
    temporal = TemporalContrastLoss(4, N, 5, num_negatives=K, temperature=T)
    if without_bias:
        for projector in (instance.projector, temporal.present_projector, temporal.past_projector):
            torch.nn.init.zeros_(projector.bias)
    index_B = torch.randint(N, (B,))
    for _ in range(2):
        total = instance(features_BD, index_B) + temporal(features_BD, other_BD, index_B, torch.randint(N, (B, K)))
        parameters = [*instance.parameters(), *temporal.parameters()]
        gradients = torch.autograd.grad(total, [features_BD, *parameters])
        assert total.isfinite() and all(gradient.isfinite().all() for gradient in gradients)
    assert 0 < temporal.present_normalizer < math.inf and 0 < temporal.past_normalizer < math.inf
    for bank in (instance.bank, temporal.present_bank, temporal.past_bank):
        torch.testing.assert_close(bank.norm(dim=1), torch.ones(N), rtol=1e-5, atol=0)


def plain_update(bank: Tensor, index_B: Tensor, embedding_BE: Tensor, momentum: float) -> Tensor:
    """bank[index] <- normalize(momentum * bank[index] + (1 - momentum) * embedding), an image's first one counts."""
    after, seen = bank.clone(), set()
    for index, embedding_E in zip(index_B.tolist(), embedding_BE):
        if index not in seen:
            mixed_E = momentum * bank[index] + (1 - momentum) * embedding_E
            after[index] = mixed_E / mixed_E.pow(2).sum().sqrt()
            seen.add(index)
    return after


@given(st.integers(1, 40), st.integers(1, 40), st.integers(2, 8), st.floats(0, 0.999), SEEDS)
def test_bank_updates_are_their_equation(N: int, B: int, E: int, momentum: float, seed: int) -> None:
    """Batches larger than the bank, too, so that images stand in them again and again."""
    generator = torch.Generator().manual_seed(seed)
    bank = new_bank(N, E, generator).double()
    index_B = torch.randint(N, (B,), generator=generator)
    embedding_BE = torch.nn.functional.normalize(torch.randn(B, E, generator=generator, dtype=torch.float64))
    expected = plain_update(bank, index_B, embedding_BE, momentum)
    untouched = [n for n in range(N) if n not in index_B.tolist()]
    before = bank.clone()
    momentum_update(bank, index_B, embedding_BE, momentum)
    torch.testing.assert_close(bank, expected, rtol=1e-12, atol=1e-14)
    assert torch.equal(bank[untouched], before[untouched])


@given(
    st.lists(st.sampled_from(['zero', 'opposite', 'nan', 'inf', 'tiny', 'huge', 'unit']), min_size=1, max_size=8),
    st.sampled_from([0.0, 0.5, 0.9]),
    st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_bank_rows_stay_unit_or_untouched(kinds: list[str], momentum: float, dtype: torch.dtype) -> None:
    """Whatever an embedding is, and also where it cancels the old row."""
    bank = new_bank(8, 4, torch.Generator().manual_seed(3), dtype)
    before = bank.clone()
    made = {
        'zero': lambda row: torch.zeros(4),
        'opposite': lambda row: -row.float() * momentum / (1 - momentum),
        'nan': lambda row: torch.tensor([math.nan, 0, 0, 1]),
        'inf': lambda row: torch.tensor([math.inf, 0, 0, 1]),
        'tiny': lambda row: torch.full((4,), 1e-30),
        'huge': lambda row: torch.full((4,), 1e15),
        'unit': lambda row: torch.full((4,), 0.5),
    }
    embedding_BE = torch.stack([made[kind](bank[i]) for i, kind in enumerate(kinds)])
    momentum_update(bank, torch.arange(len(kinds)), embedding_BE, momentum)
    assert bank.isfinite().all()
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(bank.float().norm(dim=1), torch.ones(8), rtol=tolerance, atol=0)
    for i, kind in enumerate(kinds):
        if kind in ('nan', 'inf'):
            assert torch.equal(bank[i], before[i])
        if kind == 'unit' and momentum == 0:
            torch.testing.assert_close(bank[i].float(), torch.full((4,), 0.5), rtol=tolerance, atol=0)
    assert torch.equal(bank[len(kinds) :], before[len(kinds) :])


def weights_of(draw: Draw, b: int, N: int) -> Tensor:
    """How often each of all rows is a negative of image b, [N]."""
    weight_N = torch.zeros(N, dtype=torch.float64)
    if draw.negatives is not None and draw.negatives.ndim == 2:
        return weight_N.index_add_(0, draw.negatives[b], torch.ones(draw.negatives.shape[1], dtype=torch.float64))
    rows = torch.arange(N) if draw.negatives is None else draw.negatives
    assert draw.use_BR is not None
    use_R = draw.use_BR[:, : len(rows)][b] if isinstance(draw.use_BR, OtherClasses) else draw.use_BR[b]
    return weight_N.index_add_(0, rows, use_R.double())


@given(
    st.lists(st.integers(0, 5), min_size=2, max_size=150),
    st.integers(1, 120),
    st.sampled_from(['sampled', 'shared', 'all']),
    st.booleans(),
    st.booleans(),
    SEEDS,
)
@settings(max_examples=250)
def test_negatives_are_of_other_classes(
    classes: list[int], K: int, mode: str, mixed: bool, relaxed: bool, seed: int
) -> None:
    """Never the own class, nor the partner's, nor a row twice where there are enough; weights stand for K rows."""
    assume(len(set(classes)) > 1)
    labels_N = torch.tensor(classes)
    N = len(classes)
    sampler = NegativeSampler(labels_N, K, mode=mode, positives='relaxed' if relaxed else 'exact', seed=seed)
    generator = torch.Generator().manual_seed(seed)
    index_B, partner_B = (torch.randint(N, (6,), generator=generator) for _ in range(2))
    for _ in range(2):
        draw = sampler.draw(index_B, partner_B if mixed else None)
        for b in range(6):
            left_out = {classes[index_B[b]]}
            if mixed and len(set(classes)) > 2:
                left_out.add(classes[partner_B[b]])
            allowed_N = torch.tensor([label not in left_out for label in classes])
            weight_N = weights_of(draw, b, N)
            assert not weight_N[~allowed_N].any()
            if mode == 'sampled':
                assert weight_N.sum() == K
                assert weight_N.max() == 1 or int(allowed_N.sum()) < K or not _all_have(classes, index_B, partner_B, K)
            elif mode == 'all':
                assert torch.equal(weight_N > 0, allowed_N)
            if mode == 'shared' and K <= N:
                assert weight_N.max() <= 1
            if mode != 'sampled' and weight_N.any():
                assert draw.scale_B is not None
                assert float(draw.scale_B[b] * weight_N.sum()) == pytest.approx(K, rel=1e-5)
            positive = classes[draw.positives_B[b]]
            assert positive == classes[index_B[b]] and (relaxed or draw.positives_B[b] == index_B[b])


def _all_have(classes: list[int], index_B: Tensor, partner_B: Tensor, K: int) -> bool:
    """Whether every image of the batch surely has K rows of other classes than its own and its partner's."""
    sizes = [sum(label not in (classes[i], classes[p]) for label in classes) for i, p in zip(index_B, partner_B)]
    return min(sizes) >= K


def chi_square(hits_M: Tensor, draws: int, chance: float) -> float:
    """The probability of counts at least as uneven as these, when each row is drawn with this chance.

    A draw takes rows without repetition, so that counts hang together: divided by (1 - chance), the statistic is
    chi-square with one degree of freedom less than there are rows, once it is multiplied by (M - 1) / M.
    """
    expected, M = draws * chance, len(hits_M)
    statistic = float((hits_M - expected).pow(2).sum()) / (expected * (1 - chance)) * (M - 1) / M
    return float(chi2.sf(statistic, M - 1))


UNIFORM = {
    'mask by levels': ('sampled', 4000, 1000, 400),
    'mask by keys': ('sampled', 150, 20, 3000),
    'nearly all': ('sampled', 150, 120, 3000),
    'rows': ('sampled', 1500, 6, 30000),
    'shared, permuted': ('shared', 150, 20, 3000),
    'shared, by rejection': ('shared', 3000, 10, 6000),
}


@pytest.mark.parametrize('form', UNIFORM)
@pytest.mark.parametrize('seed', [1, 2])
def test_negatives_are_uniform(form: str, seed: int) -> None:
    """By a chi-square test at the level of one in a thousand, for every way that rows are drawn; too even is wrong."""
    mode, N, K, draws = UNIFORM[form]
    labels_N = (torch.arange(N) * 7919) % N % 8 % 5  # classes of two sizes in no order
    sampler = NegativeSampler(labels_N, K, mode=mode, seed=seed)
    image = int((labels_N == 3).nonzero()[0])
    hits_N = torch.zeros(N, dtype=torch.float64)
    if mode == 'shared':  # one draw a batch
        for _ in range(draws):
            rows_K = sampler.draw(torch.tensor([image])).negatives
            hits_N[rows_K] += 1
        chance, hits_M = K / N, hits_N
    else:
        at_once = 500
        for start in range(0, draws, at_once):
            count = min(at_once, draws - start)
            draw = sampler.draw(torch.full((count,), image))
            if draw.negatives is None:
                hits_N += draw.use_BR.sum(dim=0)
            else:
                hits_N += torch.bincount(draw.negatives.flatten(), minlength=N)
        others_N = labels_N != labels_N[image]
        assert not hits_N[~others_N].any()
        chance, hits_M = K / int(others_N.sum()), hits_N[others_N]
    assert 1e-3 < chi_square(hits_M, draws, chance) < 1 - 1e-3


@pytest.mark.parametrize('seed', [1, 2])
def test_repeated_negatives_and_relaxed_positives_are_uniform(seed: int) -> None:
    """More negatives than rows: every one is drawn anew; a relaxed positive is any image of the class."""
    labels_N = torch.arange(60) % 3
    sampler = NegativeSampler(labels_N, 90, positives='relaxed', seed=seed)
    draw = sampler.draw(torch.full((2000,), 4))
    hits_N = torch.bincount(draw.negatives.flatten(), minlength=60).double()
    others_N = labels_N != labels_N[4]
    for counts_M, number in (
        (hits_N[others_N], 2000 * 90),
        (torch.bincount(draw.positives_B, minlength=60).double()[~others_N], 2000),
    ):
        expected = number / len(counts_M)
        statistic = float((counts_M - expected).pow(2).sum()) / expected
        assert 1e-3 < chi2.sf(statistic, len(counts_M) - 1) < 1 - 1e-3
    assert not hits_N[~others_N].any()


def sgd(lr: float) -> torch.optim.SGD:
    """An optimiser of two groups."""
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


def schedule_of(flags: dict[str, Any], updates: int) -> tuple[TwoStageSchedule, list[list[float]]]:
    """The schedule, and both groups' learning rates at every update of the run."""
    parser = Parser()
    add_arguments(parser)
    args = parse(parser, [])
    vars(args).update(flags)
    schedule = TwoStageSchedule(sgd(flags['lr']), args, updates)
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


TEXT = st.text(st.characters(exclude_categories=['Cc', 'Cs']), min_size=1, max_size=30).filter(
    lambda text: len(text.encode()) <= 200 and text != '--'
)


def a_value(action: argparse.Action) -> st.SearchStrategy[Any]:
    """Values that a flag takes, as a recipe has them."""
    if action.nargs == 0:
        both = isinstance(action, argparse.BooleanOptionalAction)
        return st.booleans() if both else st.just(True)
    if isinstance(action, KeyValues):
        scalars = st.one_of(st.integers(-99, 99), st.booleans(), st.none(), TEXT.map(lambda text: f'x{text}'))
        return st.dictionaries(st.sampled_from(['depth', 'act_layer', 'größe', 'a_1']), scalars, max_size=3)
    if action.choices is not None:
        one: st.SearchStrategy[Any] = st.sampled_from(sorted(action.choices))
    elif action.type is any_text:
        one = TEXT | st.just('')
    elif action.type is None:
        one = TEXT
    else:
        one = st.one_of(st.integers(0, 50), st.floats(1e-7, 2.0)).filter(lambda value: _is_taken(action, value))
    if isinstance(action.nargs, int):
        return st.lists(one, min_size=action.nargs, max_size=action.nargs)
    return st.lists(one, min_size=1, max_size=4) if action.nargs in ('+', '*') else one


def _is_taken(action: argparse.Action, value: float) -> bool:
    assert callable(action.type)
    try:
        action.type(str(value))
    except (argparse.ArgumentTypeError, ValueError):
        return False
    return True


def words_of(action: argparse.Action, value: Any) -> list[str]:
    """The same value on a command line."""
    flag = next(word for word in action.option_strings if word.startswith('--'))
    if action.nargs == 0:
        return [flag if value else flag.replace('--', '--no-', 1)]
    if isinstance(action, KeyValues):
        return [flag, *(f'{key}={json.dumps(each, ensure_ascii=False)}' for key, each in value.items())]
    if isinstance(value, list):
        return [flag, *map(str, value)]
    return [f'{flag}={value}']


def _train_parser() -> Parser:
    parser = Parser()
    add_arguments(parser)
    return parser


FLAGS = {name: action for name, action in _train_parser().actions_by_name().items() if action.option_strings}


@given(st.data())
@settings(max_examples=150)
def test_a_recipe_says_what_the_command_line_says(data: st.DataObject) -> None:
    """Any values of any flags, through YAML and through the shell: the same settings."""
    names = data.draw(st.lists(st.sampled_from(sorted(FLAGS)), min_size=1, max_size=8, unique=True))
    values = {name: data.draw(a_value(FLAGS[name]), label=name) for name in names}
    lists = [word for value in values.values() if isinstance(value, list) for word in value]
    assume(not any(isinstance(word, str) and word.startswith('-') for word in lists))  # the shell's words alone can't
    words = [word for name, value in values.items() for word in words_of(FLAGS[name], value)]
    dashed = data.draw(st.booleans())
    recipe = {name.replace('_', '-') if dashed else name: value for name, value in values.items()}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / 'recipe.yaml'
        file.write_text(yaml.safe_dump(recipe, allow_unicode=data.draw(st.booleans())), encoding='utf-8')
        from_recipe = parse(_train_parser(), ['-c', str(file)])
    typed = parse(_train_parser(), words)
    assert {**vars(from_recipe), 'config': None} == vars(typed)
