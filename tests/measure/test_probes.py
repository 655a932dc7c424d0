"""The probes against scikit-learn, loops over images and a plain training loop; few shots of each."""

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import stats
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.neighbors import KNeighborsClassifier
from torch import nn

from ctc_timm.measure import geometry, logistic, ridge
from ctc_timm.measure import knn as neighbors
from ctc_timm.measure.features import LabeledFeatures
from ctc_timm.measure.few_shot import few_shot, sample_shots
from ctc_timm.measure.knn import neighbor_votes
from ctc_timm.measure.probes import METHODS, NEVER, cross_folds, hold_out, predict, probe, ridge_scores
from ctc_timm.measure.scores import METRICS, bootstrap_scores, point_scores, ranks
from ctc_timm.measure.sgd import train_head
from ctc_timm.measure.transfer_sets import check_sets
from ctc_timm.utils.errors import UserError

DEVICES = ['cpu'] + (['cuda'] if torch.cuda.is_available() else [])


def clouds(count, size=8, classes=4, distance=1.0, seed=0, dtype=torch.float64):
    """Overlapping classes, far from the origin, of unequal scales along unequal axes."""
    rng = np.random.default_rng([seed, count])
    means = distance * np.random.default_rng(99).normal(size=(classes, size))
    labels = rng.permutation(np.arange(count) % classes)
    mix = np.random.default_rng(98).normal(size=(size, size)) * np.linspace(0.05, 1.5, size)
    features = (means[labels] + rng.normal(size=(count, size))) @ mix + 4
    return LabeledFeatures(torch.tensor(features, dtype=dtype), torch.tensor(labels))


def fit(method, train, test, classes=4, seed=0, device='cpu'):
    """A probe's predictions, as `probe` makes them."""
    return predict(method, train, test, classes, hold_out(train.labels_N, seed), seed, device)


def mean_variance(features):
    return features.var(axis=0).mean()


def fitted_ridge(x, y, strength):
    return Ridge(alpha=len(x) * strength * mean_variance(x), solver='svd').fit(x, y)


# Ridge and logistic regression


@pytest.mark.parametrize('count, size', [(80, 12), (20, 50), (30, 30)], ids=['primal', 'dual', 'square'])
@pytest.mark.parametrize('rows', [7, 8192])
def test_ridge_against_scikit_learn(count, size, rows, monkeypatch):
    monkeypatch.setattr(geometry, 'BLOCK_ROWS', rows)
    monkeypatch.setattr(ridge, 'BLOCK_ROWS', rows)
    data = clouds(count, size)
    x, y = data.features_ND.numpy(), np.eye(4)[data.labels_N]
    for strength, solution in zip(ridge.STRENGTHS, ridge.solve(data, 4, ridge.STRENGTHS), strict=True):
        theirs = fitted_ridge(x, y, strength)
        for found, expected in zip(solution, (theirs.coef_.T, theirs.intercept_)):
            assert np.abs(found.numpy() - expected).max() < 1e-8 * np.abs(expected).max(), strength


def test_the_strength_of_ridge_against_scikit_learn():
    train, test = clouds(300, 12, distance=0.3), clouds(200, 12, distance=0.3, seed=1)
    (found,) = fit('ridge', train, test, seed=5)
    x, onehot = train.features_ND.numpy(), np.eye(4)[train.labels_N]
    held = (hold_out(train.labels_N, 5) == 0).numpy()
    chosen_on = [fitted_ridge(x[~held], onehot[~held], strength).predict(x[held]) for strength in ridge.STRENGTHS]
    hits = [(logits.argmax(axis=1) == train.labels_N.numpy()[held]).mean() for logits in chosen_on]
    best = int(np.argmax(hits))  # the first, the strongest, if several
    assert 0 < best < len(hits) - 1
    assert found.settings == {'strength': ridge.STRENGTHS[best], 'selection_accuracy': pytest.approx(100 * hits[best])}
    expected = fitted_ridge(x, onehot, ridge.STRENGTHS[best]).predict(test.features_ND.numpy())
    np.testing.assert_allclose(found.logits_MC, expected, atol=1e-8)


@pytest.mark.parametrize('count, size, classes', [(240, 8, 4), (40, 60, 3), (100, 6, 2)], ids=['primal', 'dual', 'two'])
def test_logistic_against_scikit_learn(count, size, classes):
    train, test = clouds(count, size, classes), clouds(200, size, classes, seed=1)
    mean, scale = train.features_ND.mean(dim=0), math.sqrt(mean_variance(train.features_ND.numpy()))
    strengths = [1.0, 0.1, 0.01, 1e-3]
    for strength, (weights, bias) in zip(strengths, logistic.solve(train, classes, strengths), strict=True):
        C = (2 if classes == 2 else 1) / (count * strength)
        theirs = LogisticRegression(C=C, solver='newton-cg', tol=1e-10, max_iter=1000)
        theirs.fit((train.features_ND - mean) / scale, train.labels_N)
        coefficients, intercepts = theirs.coef_, theirs.intercept_
        if classes == 2:  # one logit, the difference of two
            coefficients, intercepts = np.outer([-0.5, 0.5], coefficients), np.array([-0.5, 0.5]) * intercepts
        np.testing.assert_allclose(weights.T * scale, coefficients, atol=1e-4)
        found = bias + mean @ weights
        np.testing.assert_allclose(found - found.mean(), intercepts - intercepts.mean(), atol=1e-4)
        predicted = (test.features_ND @ weights + bias).argmax(dim=1)
        assert predicted.tolist() == theirs.predict((test.features_ND - mean) / scale).tolist()


# Nearest neighbors and SGD


def brute_force_votes(train, queries, classes, k):
    features = train.features_ND.double(), queries.double()
    bank, rows = ((x / x.norm(dim=1, keepdim=True).clamp_min(1e-9)).numpy() for x in features)
    cosine = np.round(rows @ bank.T, 12)
    nearest = np.argsort(-cosine, axis=1, kind='stable')[:, :k]
    votes = np.zeros((len(queries), classes))
    weights = np.exp(np.take_along_axis(cosine, nearest, axis=1) / 0.07)
    np.add.at(votes, (np.arange(len(queries))[:, None], train.labels_N.numpy()[nearest]), weights)
    return np.where(votes == 0, -np.inf, votes)


@pytest.mark.parametrize('block', [1, 300, 1 << 23])
@pytest.mark.parametrize('tied', [False, True])
def test_knn_against_a_loop(block, tied, monkeypatch):
    monkeypatch.setattr(neighbors, 'BLOCK_SIMILARITIES', block)
    train, queries = clouds(90, classes=7), clouds(25, classes=7, seed=1).features_ND
    if tied:  # corners of a hypercube in four dimensions: exact cosines, of which there are only five, and zero vectors
        generator = torch.Generator().manual_seed(0)
        corners = torch.randint(0, 2, (85, 4), generator=generator) * 2.0 - 1
        corners[::9] = 0
        train, queries = LabeledFeatures(corners[:60], torch.arange(60) % 7), corners[60:]
    for k, votes in zip((1, 5, 20), neighbor_votes(train, queries, 7), strict=True):
        expected = brute_force_votes(train, queries, 7, k)
        np.testing.assert_allclose(votes * math.exp(1 / 0.07), expected, rtol=1e-9)


def test_a_class_without_a_vote_is_never_predicted():
    """Not in the first five either, however few have votes; an image of it is a miss. Below k = 5 top-5 is blank."""
    near, far = [[1.0, 0.01 * i] for i in range(5)], [[0.0, 1.0 + i] for i in range(4)]
    train = LabeledFeatures(torch.tensor([*near, *far]), torch.tensor([6, 6, 6, 3, 3, 0, 1, 0, 1]))
    test = LabeledFeatures(torch.tensor([[1.0, 0.0]] * 4), torch.tensor([6, 3, 0, 1]))
    one, five, twenty = probe('knn', train, test, 7)
    assert one['top1'] == 25.0 and one['top5'] is one['top5_low'] is one['top5_high'] is None
    assert five['neighbors'] == 5 and (five['top1'], five['top5']) == (25.0, 50.0)
    assert twenty['neighbors'] == 9 and twenty['top5'] == 100.0
    few = LabeledFeatures(train.features_ND[3:6], torch.tensor([6, 3, 0]))
    assert probe('knn', few, test.select(test.labels_N != 1), 7)[2]['top5'] is None  # there are only three images


def test_sgd_against_a_plain_loop():
    train, test = clouds(1300, dtype=torch.float32), clouds(300, seed=1, dtype=torch.float32)
    torch.manual_seed(123)
    before = torch.get_rng_state()
    with torch.no_grad():
        last, best, best_epoch = train_head(train, test, 4, seed=7)
    assert torch.equal(torch.get_rng_state(), before)

    torch.manual_seed(7)
    head = nn.Linear(8, 4)
    orders = [torch.randperm(1300) for _ in range(30)]
    velocity = [torch.zeros_like(p) for p in head.parameters()]
    curve, logits = [], []
    for epoch, order in enumerate(orders):
        for start in range(0, 1300, 512):
            batch = order[start : start + 512]
            loss = F.cross_entropy(head(train.features_ND[batch]), train.labels_N[batch])
            with torch.no_grad():
                for p, v, g in zip(head.parameters(), velocity, torch.autograd.grad(loss, list(head.parameters()))):
                    v.mul_(0.9).add_(g + 5e-4 * p)
                    p -= 0.2 * (1 + math.cos(math.pi * epoch / 30)) * v
        logits.append(head(test.features_ND).detach())
        curve.append(100 * (logits[-1].argmax(dim=1) == test.labels_N).double().mean().item())
    assert best_epoch == curve.index(max(curve)) + 1
    torch.testing.assert_close(last, logits[-1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(best, logits[best_epoch - 1], rtol=1e-4, atol=1e-4)
    assert len(set(curve)) > 3 and max(curve) > curve[-1]  # so that the best and the last epoch differ
    rows = probe('sgd', train, test, 4, seed=7)
    assert [(r['method'], r['epoch'], r['top1']) for r in rows] == [
        ('sgd-last', 30, pytest.approx(curve[-1])),
        ('sgd-best', best_epoch, pytest.approx(max(curve))),
    ]


# Every probe


@pytest.mark.filterwarnings('error')
@pytest.mark.parametrize('method', METHODS)
def test_rows_are_plain_and_nothing_is_chosen_on_the_test_set(method):
    train, test = clouds(200, distance=0.4, dtype=torch.float32), clouds(150, seed=1, dtype=torch.float32)
    other = LabeledFeatures(test.features_ND, test.labels_N.roll(7))
    rows = probe(method, train, test, 4)
    for row, one, two in zip(rows, fit(method, train, test), fit(method, train, other), strict=True):
        if one.method != 'sgd-best':
            assert one.settings == two.settings and torch.equal(one.logits_MC, two.logits_MC)
        # The intervals are over these logits, with the probe's seed.
        scores = bootstrap_scores(one.logits_MC, test.labels_N, seed=0)
        blank = dict.fromkeys(('top5', 'top5_low', 'top5_high')) if one.method == 'knn-1' else {}
        assert row == {'method': one.method, **scores, **blank, **one.settings} == json.loads(json.dumps(row))
        assert list(scores) == [name + end for name in METRICS for end in ('', '_low', '_high')]
        assert row['top1_low'] <= row['top1'] <= row['top1_high']
        assert scores != bootstrap_scores(two.logits_MC, other.labels_N)


@pytest.mark.parametrize('scale', [1e3, 1e-4])
@pytest.mark.parametrize('method', ['ridge', 'logistic', 'knn'])
def test_the_scale_of_the_features_changes_no_prediction(method, scale):
    train, test = clouds(200, dtype=torch.float32), clouds(300, seed=1, dtype=torch.float32)
    scaled = [LabeledFeatures(s.features_ND * scale, s.labels_N) for s in (train, test)]
    for one, two in zip(fit(method, train, test), fit(method, *scaled), strict=True):
        assert one.settings == two.settings
        assert torch.equal(ranks(one.logits_MC, test.labels_N), ranks(two.logits_MC, test.labels_N))


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('method', METHODS)
def test_every_device_and_precision(method, device):
    train, test = clouds(200), clouds(300, seed=1)
    for dtype, points in ((torch.float64, 0.5), (torch.bfloat16, 6)):
        with torch.inference_mode():
            low = [LabeledFeatures(s.features_ND.to(dtype), s.labels_N) for s in (train, test)]
        assert all(p.logits_MC.device.type == device for p in fit(method, *low, device=device))
        for one, two in zip(probe(method, train, test, 4), probe(method, *low, 4, device=device), strict=True):
            assert two['top1'] == pytest.approx(one['top1'], abs=points)


@pytest.mark.parametrize('method', METHODS)
def test_dead_features_and_a_class_without_images(method):
    pair = clouds(200, dtype=torch.float32), clouds(100, seed=1, dtype=torch.float32)
    # Three dead features more, and classes 2 and 3 of six without an image.
    dead = [LabeledFeatures(F.pad(s.features_ND, (0, 3)), s.labels_N + 2 * (s.labels_N >= 2)) for s in pair]
    for one, two in zip(probe(method, *pair, 4), fit(method, *dead, 6), strict=True):
        assert not torch.isin(two.logits_MC.argmax(dim=1), torch.tensor([2, 3])).any()
        if method != 'sgd':  # whose head starts from other random numbers
            assert point_scores(two.logits_MC, dead[1].labels_N)['top1'] == pytest.approx(one['top1'], abs=2)
        if method == 'logistic':
            assert (two.logits_MC[:, 2:4] == -torch.inf).all()
    for size in (8, 300):  # fewer and more features than images
        constant = [LabeledFeatures(torch.full((len(s), size), 0.1), s.labels_N) for s in pair]
        for found in fit(method, *constant):
            assert point_scores(found.logits_MC, pair[1].labels_N)['top1'] == 25 and not found.logits_MC.isnan().any()


def test_the_cheap_ridge_is_the_same_and_unknown_probes_are_named():
    train, test = clouds(100), clouds(80, seed=1)
    (row,) = probe('ridge', train, test, 4)
    assert ridge_scores(train, test, 4) == {name: row[name] for name in METRICS}
    with pytest.raises(ValueError, match='ridge, logistic, knn, sgd.*lasso'):
        probe('lasso', train, test, 4)


def test_folds_deal_each_class_out_and_few_images_do():
    labels = torch.tensor([0] * 50 + [1] * 11 + [2] * 2 + [3])[torch.randperm(64)]
    fold = hold_out(labels, seed=0)
    held = torch.bincount(labels[fold == 0], minlength=4)
    assert held.tolist() == [10, 3, 1, 0] and set(fold.tolist()) == {0, NEVER}  # a fifth, and no only image
    assert torch.equal(fold, hold_out(labels, seed=0)) and not torch.equal(fold, hold_out(labels, seed=1))
    labels = torch.tensor([0, 1, 2]).repeat(7)
    fold = cross_folds(labels, 3, seed=0)
    assert all(torch.bincount(fold[labels == c]).tolist() == [3, 2, 2] for c in range(3))
    few = probe('knn', clouds(8), clouds(40, seed=1), 4)
    assert [(r['method'], r['neighbors']) for r in few] == [('knn-1', 1), ('knn-5', 5), ('knn-20', 8)]
    for solver in (ridge, logistic):  # an image of each class
        (prediction,) = fit(solver.__name__.split('.')[-1], clouds(4), clouds(40, seed=1))
        assert prediction.settings == {'strength': solver.DEFAULT_STRENGTH, 'selection_accuracy': None}


def mislabel(train, test):
    train.labels_N[3] = 9


def spoil(train, test):
    test.features_ND[3:5, 1] = torch.nan
    test.features_ND[4, 2] = torch.inf


BROKEN = [
    (lambda train, test: (train.labels_N == 1, test.labels_N == 1), "every image is of class 1 ('cat')"),
    (lambda train, test: (train.labels_N >= 0, test.labels_N != 2), "no test images of class 2 ('cow')"),
    (lambda train, test: (train.labels_N < 2, test.labels_N >= 0), "no training images of class 2 ('cow') and 1 more"),
    (lambda train, test: (train.labels_N >= 0, test.labels_N < 0), 'no test images'),
    (mislabel, 'from 0 to 9'),
    (spoil, 'test features of 2 of 40 images'),
]


@pytest.mark.parametrize('change, words', BROKEN)
def test_sets_that_cannot_be_probed(change, words):
    sets = clouds(40), clouds(40, seed=1)
    kept = change(*sets)
    sets = [part.select(chosen) for part, chosen in zip(sets, kept)] if kept else sets
    with pytest.raises(UserError) as caught:
        check_sets(*sets, 4, '`target` farm', ['ant', 'cat', 'cow', 'dog'])
    assert str(caught.value).startswith('`target` farm: ') and words in str(caught.value)
    for refused in (probe, lambda *args: next(few_shot(*args, [1], [0]))):
        with pytest.raises(UserError):
            refused('ridge', *sets, 4)


# Few shots


@pytest.fixture(scope='module')
def digits():
    x, y = load_digits(return_X_y=True)
    x, y = torch.tensor(x, dtype=torch.float32), torch.tensor(y)
    return LabeledFeatures(x[:1000], y[:1000]), LabeledFeatures(x[1000:], y[1000:])


def test_draws_are_balanced_nested_and_seeded(digits):
    labels = digits[0].labels_N
    one, five = sample_shots(labels, 1, seed=3), sample_shots(labels, 5, seed=3)
    assert torch.bincount(labels[five]).tolist() == [5] * 10 and len(five.unique()) == 50
    assert set(one.tolist()) < set(five.tolist())
    assert torch.equal(five, sample_shots(labels, 5, seed=3)) and not torch.equal(five, sample_shots(labels, 5, seed=4))
    assert sample_shots(torch.arange(4), 1, seed=0).tolist() == [0, 1, 2, 3]  # one image of each class


def test_few_shots_against_scikit_learn_and_scipy(digits):
    train, test = digits
    found = {(r['method'], r['shots']): r for r in few_shot('knn', train, test, 10, [2, 6], range(4))}
    assert list(found) == [(f'knn-{k}', shots) for shots in (2, 6) for k in (1, 5, 20)]
    for shots in (2, 6):
        scores = []
        for seed in range(4):
            drawn = sample_shots(train.labels_N, shots, seed)
            nearest = KNeighborsClassifier(1, metric='cosine').fit(train.features_ND[drawn], train.labels_N[drawn])
            scores.append(100 * nearest.score(test.features_ND, test.labels_N))
        low, high = stats.t.interval(0.95, 3, loc=np.mean(scores), scale=stats.sem(scores))
        row = found['knn-1', shots]
        assert (row['top1'], row['top1_low'], row['top1_high']) == pytest.approx((np.mean(scores), low, high))
        assert row['seeds'] == 4
    (row,) = few_shot('ridge', train, test, 10, [1], [5])
    assert row['top1'] > 30 and row['top1_low'] is row['top1_high'] is None  # one seed: no interval


def test_too_many_shots_are_refused_and_finished_rows_kept(digits):
    train, test = digits
    scarce = train.select((train.labels_N != 7) | (train.labels_N.eq(7).cumsum(0) <= 3))
    rows = []
    with pytest.raises(UserError, match='^`shots` 25 .*: class 7 has 3 training images$'):
        for row in few_shot('knn', scarce, test, 10, [1, 3, 25], range(2)):
            rows.append(row['shots'])
    assert rows == [1, 1, 1, 3, 3, 3]
