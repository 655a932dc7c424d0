"""What holds for any sizes and classes: which rows are drawn as negatives, and how often.

Letters: B batch, C classes, D feature size, E embedding size, K negatives an image, M rows of other classes,
N instances, R rows that a batch shares.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.stats import chi2
from torch import Tensor

from ctc_timm import NegativeSampler
from ctc_timm.contrast.negatives import Draw, OtherClasses

EPS = 1e-7
SEEDS = st.integers(0, 2**31 - 1)
EXTREMES = (0.0, -0.0, 1.0, -3.5, 1e30, -1e30, 1e-30, 1e-40, 1e-45, 65504.0, 1e-8)


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
