"""Negatives: other classes only, as many as asked for, every choice equally likely."""

import pytest
import torch

from ctc_timm import NegativeSampler
from ctc_timm.contrast import negatives


@pytest.fixture
def labels():
    # Classes of unequal size in no order.
    torch.manual_seed(0)
    return torch.cat([torch.full((n,), c) for c, n in enumerate([5, 40, 15, 60])])[torch.randperm(120)]


def rows_of(draw, b):
    """The rows of image b, with repetition, whatever form the draw has."""
    if draw.negatives is not None and draw.negatives.ndim == 2:
        return draw.negatives[b]
    rows = draw.use_BR[b].nonzero().squeeze(1)
    return rows if draw.negatives is None else draw.negatives[rows]


@pytest.mark.parametrize('ratio', [0, 10**9], ids=['rows', 'mask'])
def test_sampled_rows_are_different_and_of_other_classes(labels, ratio, monkeypatch):
    monkeypatch.setattr(negatives, 'WHOLE_BANK_RATIO', ratio)
    sampler = NegativeSampler(labels, num_negatives=30)
    index = torch.arange(120)
    draw = sampler.draw(index)
    for b in range(120):
        rows = rows_of(draw, b)
        assert len(rows) == 30 == len(set(rows.tolist()))
        assert (labels[rows] != labels[b]).all()
    assert torch.equal(draw.positives_B, index)


@pytest.mark.parametrize('ratio', [0, 10**9], ids=['rows', 'mask'])
def test_sampled_rows_are_equally_likely(labels, ratio, monkeypatch):
    # Each of the M other-class rows is in a draw of K with probability K / M; the largest deviation over the
    # rows of 3,000 draws is compared with five standard deviations of that binomial.
    monkeypatch.setattr(negatives, 'WHOLE_BANK_RATIO', ratio)
    sampler = NegativeSampler(labels, num_negatives=20, seed=3)
    image = int((labels == 2).nonzero()[0])
    hits = torch.zeros(120)
    draws = 3000
    draw = sampler.draw(torch.full((draws,), image))
    for b in range(draws):
        hits[rows_of(draw, b)] += 1
    others = labels != 2
    chance = 20 / int(others.sum())
    spread = (draws * chance * (1 - chance)) ** 0.5
    assert (hits[others] - draws * chance).abs().max() < 5 * spread
    assert not hits[~others].any()


@pytest.mark.parametrize('K', [1200, 6600, 17000])
def test_large_sets_draw_by_levels_equally_likely(K, monkeypatch):
    # 20,000 images, classes of unequal size. Sixty images of one class draw K rows each; a row's hits are
    # binomial, so over M rows their mean is exactly 60 K / M and their variance 60 p (1 - p) within five
    # standard errors of a variance. Rows in a fixed order of blocks must not differ either.
    monkeypatch.setattr(negatives, 'WHOLE_BANK_RATIO', 10**9)
    monkeypatch.setattr(NegativeSampler, '_smallest_keys', lambda *_: pytest.fail('meant for small sets'))
    labels = (torch.arange(20_000) * 7919 % 20_011) % 53
    sampler = NegativeSampler(labels, num_negatives=K, seed=6)
    image = int((labels == 5).nonzero()[0])
    use = sampler.draw(torch.full((60,), image)).use_BR
    assert (use.sum(dim=1) == K).all() and not use[:, labels == 5].any()
    hits = use[:, labels != 5].sum(dim=0).double()
    M, p = len(hits), K / len(hits)
    variance = 60 * p * (1 - p)
    assert abs(hits.var() - variance) < 5 * variance * (2 / M) ** 0.5 + 0.05 * variance
    blocks = torch.stack([part.mean() for part in hits.split(M // 50)[:50]])
    assert (blocks - 60 * p).abs().max() < 5 * (variance / (M // 50)) ** 0.5
    overlap = (use[::2] & use[1::2]).sum(dim=1).double().mean()
    assert abs(overlap - K * p) < 5 * (K * p * (1 - p) ** 2 / 30) ** 0.5


def test_images_draw_independently(labels):
    # Two images of one class share K * K / M rows on average; equal draws would share K.
    sampler = NegativeSampler(labels, num_negatives=20, seed=4)
    image = int((labels == 0).nonzero()[0])
    masks = sampler.draw(torch.full((400,), image)).use_BR
    shared = (masks[::2] & masks[1::2]).sum(dim=1).float().mean()
    assert abs(shared - 20 * 20 / 115) < 0.5


def test_more_negatives_than_rows_repeat_them(labels):
    sampler = NegativeSampler(labels, num_negatives=200)
    index = torch.arange(120)
    draw = sampler.draw(index)
    assert draw.negatives.shape == (120, 200)
    assert (labels[draw.negatives] != labels[:, None]).all()
    counts = torch.bincount(draw.negatives[labels == 3].flatten(), minlength=120)[labels != 3].float()
    assert counts.min() > 0.7 * counts.mean()  # 12,000 draws over 60 rows: 200 each, spread 14


def test_shared_rows_leave_out_each_images_own_class(labels):
    sampler = NegativeSampler(labels, num_negatives=50, mode='shared')
    index = torch.randperm(120)[:16]
    draw = sampler.draw(index)
    assert draw.negatives.shape == (50,) == (len(set(draw.negatives.tolist())),)
    for b, image in enumerate(index.tolist()):
        own = labels[draw.negatives] == labels[image]
        assert draw.use_BR[b].equal(~own)
        # Scaled by K over their number, they stand for K rows.
        torch.testing.assert_close(draw.use_BR[b].sum() * draw.scale_B[b], torch.tensor(50.0))
    assert NegativeSampler(labels, num_negatives=500, mode='shared').draw(index).negatives.shape == (500,)


@pytest.mark.parametrize('mode', ['sampled', 'shared'])
@pytest.mark.parametrize('K', [10, 100])
def test_mixed_images_leave_out_both_classes(labels, mode, K):
    sampler = NegativeSampler(labels, num_negatives=K, mode=mode)
    index = torch.arange(40)
    draw = sampler.draw(index, index.flip(0))
    for b in range(40):
        rows = rows_of(draw, b)
        assert (labels[rows] != labels[b]).all() and (labels[rows] != labels[39 - b]).all()


def test_two_classes_mixed_still_have_negatives():
    # With both classes in every mixed image no third is left; the partner's class is then used.
    labels = torch.tensor([0, 0, 1, 1])
    for K in (2, 8):
        draw = NegativeSampler(labels, num_negatives=K).draw(torch.tensor([0, 2]), torch.tensor([2, 0]))
        assert rows_of(draw, 0).tolist().count(2) + rows_of(draw, 0).tolist().count(3) == K


def test_relaxed_positives_are_of_the_same_class_and_equally_likely(labels):
    sampler = NegativeSampler(labels, num_negatives=5, positives='relaxed', seed=5)
    image = int((labels == 2).nonzero()[0])
    positives = sampler.draw(torch.full((3000,), image)).positives_B
    counts = torch.bincount(positives, minlength=120).float()
    assert not counts[labels != 2].any()
    assert (counts[labels == 2] - 200).abs().max() < 5 * 200**0.5


def test_the_seed_decides(labels):
    index = torch.arange(8)
    first, again, other = (NegativeSampler(labels, 30, seed=s).draw(index).use_BR for s in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    ranks = [NegativeSampler(labels, 30, seed=1, rank=r).draw(index).use_BR for r in (0, 1)]
    assert not torch.equal(*ranks)
    shared = [NegativeSampler(labels, 30, 'shared', seed=1, rank=r).draw(index).negatives for r in (0, 1)]
    assert torch.equal(*shared)


def test_draws_continue_from_a_saved_state(labels):
    sampler, index = NegativeSampler(labels, 30), torch.arange(8)
    sampler.draw(index)
    state = {k: v.clone() for k, v in sampler.get_state().items()}
    expected = sampler.draw(index).use_BR
    other = NegativeSampler(labels, 30, seed=9)
    other.load_state(state)
    assert torch.equal(other.draw(index).use_BR, expected)


@pytest.mark.parametrize(
    'arguments, words',
    [
        ({'num_negatives': 0}, 'num_negatives.*0'),
        ({'labels_N': torch.zeros(9, dtype=torch.long)}, 'two classes'),
        ({'labels_N': torch.ones(9)}, 'integers'),
        ({'labels_N': torch.tensor([0, -1])}, '-1'),
        ({'mode': 'all of them'}, 'all of them'),
        ({'positives': 'any'}, 'any'),
    ],
)
def test_settings_that_cannot_work(arguments, words):
    with pytest.raises(ValueError, match=words):
        NegativeSampler(**{'labels_N': torch.tensor([0, 1, 1]), **arguments})


@pytest.mark.parametrize('mixed', [False, True])
def test_all_is_every_row_of_other_classes(labels, mixed):
    sampler = NegativeSampler(labels, num_negatives=30, mode='all')
    index = torch.tensor([3, 50, 119, 7])
    draw = sampler.draw(index, index.flip(0) if mixed else None)
    assert draw.negatives is None and torch.equal(draw.positives_B, index)
    for b, image in enumerate(index.tolist()):
        left_out = {int(labels[image]), int(labels[index[3 - b]])} if mixed else {int(labels[image])}
        others = torch.tensor([int(label) not in left_out for label in labels])
        for start, stop in ((0, 120), (17, 60), (119, 500)):
            assert torch.equal(draw.use_BR[:, start:stop][b], others[start:stop])
        assert int(draw.use_BR.sum(dim=1)[b]) == int(others.sum())
        assert draw.scale_B[b] == pytest.approx(30 / int(others.sum()))
