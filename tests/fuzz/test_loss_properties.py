"""What holds for any sizes, settings and numbers: losses and banks.

Truths are written out here from the equations, one number at a time, in float64.

Letters: B batch, C classes, D feature size, E embedding size, K negatives an image, M rows of other classes,
N instances, R rows that a batch shares.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ctc_timm import InstanceDiscriminationLoss, TemporalContrastLoss
from ctc_timm.contrast.banks import momentum_update, new_bank
from ctc_timm.contrast.negatives import Draw, OtherClasses

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
    """Each normalizer is N times the mean of all unnormalized terms; each bank row moves towards its embedding."""
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
