"""Negatives: other classes only, as many as asked for, every choice equally likely.

Letters: B batch, K negatives an image, M rows of other classes, N instances.
"""

from __future__ import annotations

import math

import pytest
import torch
from equations import weights_of
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.stats import chi2

from ctc_timm import NegativeSampler
from ctc_timm.contrast import negatives
from ctc_timm.contrast.sharding import BankShard
from ctc_timm.utils.errors import UserError

SEEDS = st.integers(0, 2**31 - 1)


@given(
    st.lists(st.integers(0, 5), min_size=2, max_size=150),
    st.integers(1, 120),
    st.sampled_from(['sampled', 'shared', 'all']),
    st.booleans(),
    st.booleans(),
    st.sampled_from([0, 10**9]),
    SEEDS,
)
@settings(max_examples=300)
def test_negatives_are_of_other_classes(
    classes: list[int], K: int, mode: str, mixed: bool, relaxed: bool, ratio: int, seed: int
) -> None:
    """Never of the own class or the partner's, no row twice where there are enough; weights stand for K rows."""
    assume(len(set(classes)) > 1)
    labels_N = torch.tensor(classes)
    N = len(classes)
    generator = torch.Generator().manual_seed(seed)
    index_B, partner_B = (torch.randint(N, (6,), generator=generator) for _ in range(2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(negatives, 'WHOLE_BANK_RATIO', ratio)  # rows of each image, or a mask
        sampler = NegativeSampler(labels_N, K, mode=mode, positives='relaxed' if relaxed else 'exact', seed=seed)
        draws = [sampler.draw(index_B, partner_B if mixed else None) for _ in range(2)]
    left_out = [{classes[i]} | ({classes[p]} if mixed else set()) for i, p in zip(index_B, partner_B)]
    if len(set(classes)) == 2:  # with both classes in a mixed image no third is left; the partner's is then used
        left_out = [{classes[i]} for i in index_B]
    allowed_BN = torch.tensor([[label not in out for label in classes] for out in left_out])
    enough = int(allowed_BN.sum(dim=1).min()) >= K
    for draw in draws:
        weight_BN = weights_of(draw, N)
        assert not weight_BN[~allowed_BN].any()
        assert torch.equal(weight_BN.sum(dim=1), draw.count_B.double())
        if mode == 'sampled':
            assert (weight_BN.sum(dim=1) == K).all() and (draw.scale_B == 1).all()
            assert weight_BN.max() == 1 or not enough
        elif mode == 'all':
            assert torch.equal(weight_BN > 0, allowed_BN)
        if mode == 'shared':
            assert len(draw.rows) == K and (K > N or len(set(draw.rows.tolist())) == K)
        has = weight_BN.any(dim=1)
        total_B = draw.scale_B.double() * weight_BN.sum(dim=1)
        wanted_B = K / (_chance_of_any(allowed_BN, K) if mode == 'shared' else torch.ones_like(total_B))
        torch.testing.assert_close(total_B[has], wanted_B[has], rtol=1e-5, atol=0)
        for positive, index in zip(draw.positives_B, index_B):
            assert classes[positive] == classes[index] and (relaxed or positive == index)


def _chance_of_any(allowed_BN: torch.Tensor, K: int) -> torch.Tensor:
    """How likely K rows of N have an allowed one: by counting subsets, or of N^K when rows repeat."""
    B, N = allowed_BN.shape
    own = [N - int(row.sum()) for row in allowed_BN]
    miss = [(n / N) ** K if K > N else math.comb(n, K) / math.comb(N, K) for n in own]
    return 1 - torch.tensor(miss, dtype=torch.float64)


@pytest.mark.parametrize(
    'sizes, K, mixed',
    [
        ((180, 20), 8, False),
        ((3, 57), 2, False),
        ((2, 1), 5, False),
        ((90, 6, 3, 1), 12, False),
        ((50, 40, 5), 9, True),
    ],
)
def test_shared_negatives_of_unbalanced_classes_stand_for_all(sizes: tuple[int, ...], K: int, mixed: bool) -> None:
    """In the mean each other row counts K / M times, within five standard errors, even if most draws miss them."""
    labels_N = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    labels_N = labels_N[torch.randperm(len(labels_N), generator=torch.Generator().manual_seed(3))]
    N, draws = len(labels_N), 3000
    index_B = torch.stack([(labels_N == c).nonzero()[0, 0] for c in range(len(sizes))])
    partner_B = index_B.flip(0) if mixed else None
    others_BN = labels_N != labels_N[index_B][:, None]
    if partner_B is not None:
        others_BN &= labels_N != labels_N[partner_B][:, None]
    sampler = NegativeSampler(labels_N, K, 'shared', seed=4)
    drawn = (sampler.draw(index_B, partner_B) for _ in range(draws))
    weights_DBN = torch.stack([draw.scale_B[:, None] * weights_of(draw, N) for draw in drawn])
    mean_BN, error_BN = weights_DBN.mean(dim=0), weights_DBN.std(dim=0) / draws**0.5
    wanted_BN = others_BN * K / others_BN.sum(dim=1, keepdim=True)
    assert not mean_BN[~others_BN].any()
    assert ((mean_BN - wanted_BN).abs() <= 5 * error_BN + 1e-5 * K).all()


UNIFORM = {
    'mask': ('sampled', 4000, 1000, 400),
    'mask of few': ('sampled', 150, 20, 3000),
    'mask of half': ('sampled', 400, 170, 2000),
    'mask of nearly all': ('sampled', 150, 110, 3000),
    'rows': ('sampled', 1500, 6, 30000),
    'shared, permuted': ('shared', 150, 20, 3000),
    'shared, by rejection': ('shared', 3000, 10, 6000),
}


@pytest.mark.parametrize('form', UNIFORM)
@pytest.mark.parametrize('seed', [1, 2])
def test_negatives_are_uniform(form: str, seed: int) -> None:
    """By a chi-square test at the level of one in a thousand, for every way that rows are drawn; too even is wrong.

    A draw takes rows without repetition, so that counts hang together: divided by (1 - chance), the statistic is
    chi-square with one degree of freedom less than there are rows, once it is multiplied by (M - 1) / M.
    """
    mode, N, K, draws = UNIFORM[form]
    labels_N = (torch.arange(N) * 7919) % N % 8 % 5  # classes of two sizes in no order
    sampler = NegativeSampler(labels_N, K, mode=mode, seed=seed)
    image = int((labels_N == 3).nonzero()[0])
    hits_N = torch.zeros(N, dtype=torch.float64)
    others_N = labels_N >= 0 if mode == 'shared' else labels_N != labels_N[image]
    for images in torch.full((draws,), image).split(1 if mode == 'shared' else 500):  # one shared draw a batch
        drawn = sampler.draw(images)
        assert (drawn.rows is not None) == (form == 'rows' or mode == 'shared')
        hits_N += torch.zeros(N).index_fill_(0, drawn.rows, 1) if mode == 'shared' else weights_of(drawn, N).sum(dim=0)
    assert not hits_N[~others_N].any()
    hits_M = hits_N[others_N]
    M, chance = len(hits_M), K / len(hits_M)
    statistic = float((hits_M - draws * chance).square().sum()) / (draws * chance * (1 - chance)) * (M - 1) / M
    assert 1e-3 < chi2.sf(statistic, M - 1) < 1 - 1e-3


@pytest.mark.parametrize('seed', [1, 2])
def test_repeated_negatives_and_relaxed_positives_are_uniform(seed: int) -> None:
    """More negatives than rows: every one is drawn anew; a relaxed positive is any image of the class."""
    labels_N = torch.arange(60) * 7 % 60 % 3
    sampler = NegativeSampler(labels_N, 90, positives='relaxed', seed=seed)
    image = int((labels_N == 1).nonzero()[4])
    drawn = sampler.draw(torch.full((2000,), image))
    hits_N, others_N = weights_of(drawn, 60).sum(dim=0), labels_N != 1
    positives_N = torch.bincount(drawn.positives_B, minlength=60).double()
    assert not hits_N[~others_N].any() and not positives_N[others_N].any()
    for counts_M, number in ((hits_N[others_N], 2000 * 90), (positives_N[~others_N], 2000)):
        expected = number / len(counts_M)
        statistic = float((counts_M - expected).square().sum()) / expected
        assert 1e-3 < chi2.sf(statistic, len(counts_M) - 1) < 1 - 1e-3


@pytest.mark.parametrize('K', [1200, 6600, 12_000, 17_000])
def test_many_rows_are_equally_likely_and_independent(K):
    """Sixty images draw K of M = K / p rows: within five deviations, blocks have one mean, and two images share K p."""
    labels = (torch.arange(20_000) * 7919 % 20_011) % 53
    sampler = NegativeSampler(labels, num_negatives=K, seed=6)
    image = int((labels == 5).nonzero()[0])
    use = weights_of(sampler.draw(torch.full((60,), image)), 20_000).bool()
    assert (use.sum(dim=1) == K).all() and not use[:, labels == 5].any()
    hits = use[:, labels != 5].sum(dim=0).double()
    M, p = len(hits), K / len(hits)
    variance = 60 * p * (1 - p)
    assert abs(hits.var() - variance) < 5 * variance * (2 / M) ** 0.5 + 0.05 * variance
    blocks = torch.stack([part.mean() for part in hits.split(M // 50)[:50]])
    assert (blocks - 60 * p).abs().max() < 5 * (variance / (M // 50)) ** 0.5
    overlap = (use[::2] & use[1::2]).sum(dim=1).double().mean()
    assert abs(overlap - K * p) < 5 * (K * p * (1 - p) ** 2 / 30) ** 0.5


@pytest.mark.parametrize('count, others, rows', [(1, 1, 50), (10, 17, 20), (30, 200, 220), (100, 110, 400)])
def test_enough_rows_are_drawn(count, others, rows):
    """In 4,000 tries the longest wait for so many different rows stays well below what is drawn, and is of its size."""
    size = negatives._draws_needed(count, others, rows)
    drawn = torch.randint(rows, (4000, size), generator=torch.Generator().manual_seed(1))
    first = torch.full((4000, rows), size).scatter_reduce_(1, drawn, torch.arange(size).expand(4000, -1), 'amin')
    wait = first[:, :others].sort(dim=1).values[:, count - 1].max() + 1
    assert size / 12 < wait < size


def test_seed_and_rank_decide():
    index, labels = torch.arange(8), torch.arange(120) % 7 % 4
    first, again, other, rank = (
        NegativeSampler(labels, 30, seed=s, rank=r).draw(index).weights_BR for s, r in ((1, 0), (1, 0), (2, 0), (1, 1))
    )
    assert torch.equal(first, again) and not torch.equal(first, other) and not torch.equal(first, rank)
    for split in (None, BankShard(120)):  # as a task gives it
        shared = [NegativeSampler(labels, 30, 'shared', seed=1, rank=r, split=split).draw(index).rows for r in (0, 1)]
        assert torch.equal(*shared)


@pytest.mark.parametrize(
    'arguments, words',
    [
        ({'num_negatives': 0}, '`num_negatives` 0: must be at least 1'),
        ({'labels_N': torch.zeros(9, dtype=torch.long)}, 'fewer than two classes'),
        ({'labels_N': torch.ones(9)}, 'integers'),
        ({'labels_N': torch.tensor([0, -1])}, '-1'),
        ({'mode': 'all of them'}, "`negatives` 'all of them': must be one of sampled, shared, all"),
        ({'positives': 'any'}, "`positives` 'any': must be one of exact, relaxed"),
    ],
)
def test_settings_that_cannot_work(arguments, words):
    with pytest.raises(UserError, match=words):
        NegativeSampler(**{'labels_N': torch.tensor([0, 1, 1]), **arguments})
