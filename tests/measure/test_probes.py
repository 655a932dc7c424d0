"""The probes against direct solves, scikit-learn, loops over images and a plain training loop."""

import json
import math
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.stats import binom
from sklearn.linear_model import LogisticRegression, Ridge
from torch import nn

from ctc_timm.measure import knn as neighbors
from ctc_timm.measure import logistic, ridge, sets
from ctc_timm.measure.knn import neighbor_votes
from ctc_timm.measure.probes import METHODS, predict, probe, ridge_scores
from ctc_timm.measure.scores import bootstrap_scores, point_scores, ranks
from ctc_timm.measure.selection import NEVER, cross_folds, one_split
from ctc_timm.measure.sets import Labeled, check_sets
from ctc_timm.measure.sgd import train_head
from ctc_timm.utils.errors import UserError

DEVICES = ['cpu'] + (['cuda'] if torch.cuda.is_available() else [])


def clouds(count, size=8, classes=4, distance=1.0, seed=0, dtype=torch.float64):
    """Overlapping classes, far from the origin, of unequal scales along unequal axes."""
    rng = np.random.default_rng([seed, count])
    means = distance * np.random.default_rng(99).normal(size=(classes, size))
    labels = rng.permutation(np.arange(count) % classes)
    mix = np.random.default_rng(98).normal(size=(size, size)) * np.linspace(0.05, 1.5, size)
    features = (means[labels] + rng.normal(size=(count, size))) @ mix + 4
    return Labeled(torch.tensor(features, dtype=dtype), torch.tensor(labels))


def in_mean_eigenvalues(features):
    return features.var(axis=0).sum() / features.shape[1]


@pytest.mark.parametrize('count, size', [(80, 12), (20, 50), (30, 30)], ids=['primal', 'dual', 'square'])
@pytest.mark.parametrize('rows', [7, 8192])
def test_ridge_against_a_direct_solve(count, size, rows, monkeypatch):
    monkeypatch.setattr(sets, 'BLOCK_ROWS', rows)
    monkeypatch.setattr(ridge, 'BLOCK_ROWS', rows)
    data = clouds(count, size)
    x, y = data.features_ND.numpy(), np.random.default_rng(1).normal(size=(count, 5)) + 2
    strengths = torch.tensor(ridge.STRENGTHS, dtype=torch.float64)
    weights, biases = ridge.ridge_path(data.features_ND, torch.tensor(y), strengths)
    assert weights.shape == (len(strengths), size, 5) and biases.shape == (len(strengths), 5)
    for s, strength in enumerate(ridge.STRENGTHS):
        # Least squares with the penalty as rows of its own and the bias as one more, unpenalized weight: no means are
        # taken off, and no matrix is squared.
        penalty = np.sqrt(count * strength * in_mean_eigenvalues(x))
        left = np.block([[x, np.ones((count, 1))], [penalty * np.eye(size), np.zeros((size, 1))]])
        solved = np.linalg.lstsq(left, np.concatenate([y, np.zeros((size, 5))]), rcond=None)[0]
        for found, expected in ((weights[s], solved[:-1]), (biases[s], solved[-1])):
            assert np.abs(found.numpy() - expected).max() < 1e-8 * np.abs(expected).max(), strength


def test_ridge_probe_against_scikit_learn():
    train, test = clouds(300, 12, distance=0.3), clouds(200, 12, distance=0.3, seed=1)
    (result,) = probe('ridge', train, test, 4, seed=5)
    x, onehot = train.features_ND.numpy(), np.eye(4)[train.labels_N]
    held = (one_split(train.labels_N, 5) == 0).numpy()

    def fitted(strength, chosen):
        alpha = chosen.sum() * strength * in_mean_eigenvalues(x[chosen])
        return Ridge(alpha=alpha, solver='svd').fit(x[chosen], onehot[chosen])

    hits = [
        (fitted(s, ~held).predict(x[held]).argmax(axis=1) == train.labels_N.numpy()[held]).mean()
        for s in ridge.STRENGTHS
    ]
    best = int(np.argmax(hits))  # the first, the strongest, if several
    assert 0 < best < len(hits) - 1
    assert result.settings == {'strength': ridge.STRENGTHS[best], 'selection_accuracy': pytest.approx(100 * hits[best])}
    expected = fitted(ridge.STRENGTHS[best], np.ones(300, dtype=bool)).predict(test.features_ND.numpy())
    np.testing.assert_allclose(result.logits_MC, expected, atol=1e-8)


@pytest.mark.parametrize('count, size, classes', [(240, 8, 4), (40, 60, 3), (100, 6, 2)], ids=['primal', 'dual', 'two'])
def test_logistic_against_scikit_learn(count, size, classes):
    train, test = clouds(count, size, classes), clouds(200, size, classes, seed=1)
    mean, scale = train.features_ND.mean(dim=0), math.sqrt(in_mean_eigenvalues(train.features_ND.numpy()))
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


def brute_force_votes(train, queries, classes, k):
    votes = np.zeros((len(queries), classes))
    for m, query in enumerate(queries.tolist()):
        similar = []
        for n, row in enumerate(train.features_ND.tolist()):
            lengths = math.sqrt(sum(x * x for x in row)) * math.sqrt(sum(x * x for x in query))
            cosine = sum(x * y for x, y in zip(row, query)) / lengths if lengths else 0.0
            similar.append((-round(cosine, 12), n))
        for negative, n in sorted(similar)[:k]:
            votes[m, train.labels_N[n]] += math.exp(-negative / 0.07)
    return votes


@pytest.mark.parametrize('block', [1, 300, 1 << 23])
def test_knn_against_a_loop(block, monkeypatch):
    monkeypatch.setattr(neighbors, 'BLOCK_SIMILARITIES', block)
    train, test = clouds(90, classes=7), clouds(25, classes=7, seed=1)
    assert neighbors.NEIGHBORS == (1, 5, 20)
    for k, votes in zip((1, 5, 20), neighbor_votes(train, test.features_ND, 7)):
        expected = brute_force_votes(train, test.features_ND, 7, k)
        np.testing.assert_allclose(votes * math.exp(1 / 0.07), expected, rtol=1e-9)
        for name, value in point_scores(torch.tensor(expected), test.labels_N).items():
            assert point_scores(votes, test.labels_N)[name] == value


@pytest.mark.parametrize('block', [1, 1 << 23])
def test_knn_among_equally_similar_images_takes_the_first(block, monkeypatch):
    monkeypatch.setattr(neighbors, 'BLOCK_SIMILARITIES', block)
    generator = torch.Generator().manual_seed(0)
    # Corners of a hypercube in four dimensions: exact cosines, of which there are only five, and zero vectors.
    train = Labeled(torch.randint(0, 2, (60, 4), generator=generator) * 2.0 - 1, torch.arange(60) % 5)
    train.features_ND[::9] = 0
    queries = torch.randint(0, 2, (20, 4), generator=generator) * 2.0 - 1
    queries[3] = 0
    for k, votes in zip((1, 5, 20), neighbor_votes(train, queries, 5)):
        expected = brute_force_votes(train, queries, 5, k)
        np.testing.assert_allclose(votes * math.exp(1 / 0.07), expected, rtol=1e-9)


def test_knn_with_fewer_training_images_than_neighbors():
    results = probe('knn', clouds(8), clouds(40, seed=1), 4)
    assert [r.method for r in results] == ['knn-1', 'knn-5', 'knn-20']
    assert [r.settings['neighbors'] for r in results] == [1, 5, 8]


def test_sgd_against_a_plain_loop():
    train, test = clouds(1300, dtype=torch.float32), clouds(300, seed=1, dtype=torch.float32)
    torch.manual_seed(123)
    before = torch.get_rng_state()
    with torch.no_grad():
        run = train_head(train, test, 4, seed=7)
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
    assert run.curve == pytest.approx(curve)
    assert run.best_epoch == curve.index(max(curve)) + 1
    torch.testing.assert_close(run.last_MC, logits[-1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(run.best_MC, logits[run.best_epoch - 1], rtol=1e-4, atol=1e-4)
    assert len(set(curve)) > 3 and max(curve) > curve[-1]  # so that the best and the last epoch differ

    last, best = probe('sgd', train, test, 4, seed=7)
    assert (last.method, last.settings, last.curve) == ('sgd-last', {'epoch': 30}, run.curve)
    assert (best.method, best.settings, best.curve) == ('sgd-best', {'epoch': run.best_epoch}, run.curve)
    assert best.scores['top1'].value == max(curve) and torch.equal(last.logits_MC, run.last_MC)


@pytest.mark.parametrize('method', METHODS)
def test_random_labels_give_chance_and_real_ones_more(method):
    generator = torch.Generator().manual_seed(0)
    train, test = clouds(1200, 16, 10), clouds(2000, 16, 10, seed=1)
    random = [Labeled(s.features_ND, torch.randint(0, 10, (len(s),), generator=generator)) for s in (train, test)]
    # One probe in 1e5 by luck; `sgd-best` is the luckiest of 30 epochs.
    low, high = (100 * binom.ppf(p, 2000, 0.1) / 2000 for p in (1e-5, 1 - 1e-5))
    for result in probe(method, *random, 10):
        assert low <= result.scores['top1'].value <= high, result.row()
    for result in probe(method, train, test, 10):
        assert result.scores['top1'].value > 2 * high, result.row()


@pytest.mark.parametrize('method', METHODS)
def test_nothing_is_chosen_on_the_test_set(method):
    train, test = clouds(200, distance=0.4, dtype=torch.float32), clouds(150, seed=1, dtype=torch.float32)
    other = Labeled(test.features_ND, test.labels_N.roll(7))
    for one, two in zip(probe(method, train, test, 4), probe(method, train, other, 4), strict=True):
        assert one.scores != two.scores
        if one.method != 'sgd-best':
            assert one.settings == two.settings and torch.equal(one.logits_MC, two.logits_MC)
        # The intervals are over these logits, with the probe's seed.
        assert one.scores == bootstrap_scores(one.logits_MC, test.labels_N, seed=0)


@pytest.mark.parametrize('scale', [1e3, 1e-4])
@pytest.mark.parametrize('method', ['ridge', 'logistic', 'knn'])
def test_the_scale_of_the_features_changes_no_prediction(method, scale):
    train, test = clouds(200, dtype=torch.float32), clouds(300, seed=1, dtype=torch.float32)
    plain = probe(method, train, test, 4)
    scaled = probe(method, *(Labeled(s.features_ND * scale, s.labels_N) for s in (train, test)), 4)
    for one, two in zip(plain, scaled, strict=True):
        assert one.settings == two.settings
        assert torch.equal(ranks(one.logits_MC, test.labels_N), ranks(two.logits_MC, test.labels_N))


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('method', METHODS)
def test_every_device_and_precision(method, device):
    train, test = clouds(200), clouds(300, seed=1)
    for dtype, points in ((torch.float64, 0.5), (torch.bfloat16, 6)):
        with torch.inference_mode():
            low = [Labeled(s.features_ND.to(dtype), s.labels_N) for s in (train, test)]
        for one, two in zip(probe(method, train, test, 4), probe(method, *low, 4, device=device), strict=True):
            assert two.logits_MC.device.type == device
            assert two.scores['top1'].value == pytest.approx(one.scores['top1'].value, abs=points)


@pytest.mark.parametrize('method', METHODS)
def test_dead_features_and_a_class_without_images(method):
    train, test = clouds(200, dtype=torch.float32), clouds(100, seed=1, dtype=torch.float32)
    # Three dead features more, and classes 2 and 3 of six without an image.
    dead = [Labeled(F.pad(s.features_ND, (0, 3)), s.labels_N + 2 * (s.labels_N >= 2)) for s in (train, test)]
    for one, two in zip(probe(method, train, test, 4), probe(method, *dead, 6), strict=True):
        assert not torch.isin(two.logits_MC.argmax(dim=1), torch.tensor([2, 3])).any()
        if method != 'sgd':  # whose head starts from other random numbers
            assert two.scores['top1'].value == pytest.approx(one.scores['top1'].value, abs=2)
        if method == 'logistic':
            assert (two.logits_MC[:, 2:4] == -torch.inf).all()
    for size in (8, 300):  # fewer and more features than images
        constant = [Labeled(torch.full((len(s), size), 0.1), s.labels_N) for s in (train, test)]
        for result in probe(method, *constant, 4):
            assert result.scores['top1'].value == 25 and not result.logits_MC.isnan().any()


def test_rows_are_plain_and_the_cheap_ridge_is_the_same():
    train, test = clouds(100), clouds(80, seed=1)
    columns = [n + end for n in ('top1', 'top5', 'mean_per_class') for end in ('', '_low', '_high')]
    for method in METHODS:
        with warnings.catch_warnings():
            warnings.simplefilter('error')
            results = probe(method, train, test, 4)
        for result in results:
            row = result.row()
            assert list(row) == ['method', *columns, *result.settings]
            assert json.loads(json.dumps(row)) == row
            assert row['top1_low'] <= row['top1'] == result.scores['top1'].value <= row['top1_high']
    row = probe('ridge', train, test, 4, seed=3)[0].row()
    assert ridge_scores(train, test, 4, seed=3) == {name: row[name] for name in ('top1', 'top5', 'mean_per_class')}
    with pytest.raises(ValueError, match='ridge, logistic, knn, sgd.*lasso'):
        probe('lasso', train, test, 4)


def test_one_split_holds_out_a_fifth_of_each_class():
    labels = torch.tensor([0] * 50 + [1] * 11 + [2] * 2 + [3])[torch.randperm(64)]
    fold = one_split(labels, seed=0)
    held = torch.bincount(labels[fold == 0], minlength=4)
    assert held.tolist() == [10, 3, 1, 0] and set(fold.tolist()) == {0, NEVER}
    assert torch.equal(fold, one_split(labels, seed=0)) and not torch.equal(fold, one_split(labels, seed=1))
    (prediction,) = predict('ridge', clouds(4), clouds(40, seed=1), 4, one_split(torch.arange(4), 0))
    assert prediction.settings == {'strength': ridge.DEFAULT_STRENGTH, 'selection_accuracy': None}


def test_cross_folds_deal_each_class_out():
    labels = torch.tensor([0, 1, 2]).repeat(7)
    fold = cross_folds(labels, 3, seed=0)
    for c in range(3):
        assert torch.bincount(fold[labels == c]).tolist() == [3, 2, 2]


def broken(what):
    train, test = clouds(40), clouds(40, seed=1)
    if what == 'labels':
        train.labels_N[3] = 9
    if what == 'nan':
        test.features_ND[3:5, 1] = torch.nan
        test.features_ND[4, 2] = torch.inf
    kept = {
        'one class': (train.labels_N == 1, test.labels_N == 1),
        'absent from test': (train.labels_N >= 0, test.labels_N != 2),
        'absent from training': (train.labels_N < 2, test.labels_N >= 0),
        'no images': (train.labels_N >= 0, test.labels_N < 0),
    }.get(what, (slice(None), slice(None)))
    return train.take(kept[0]), test.take(kept[1])


@pytest.mark.parametrize(
    'what, words',
    [
        ('one class', "every image is of class 1 ('cat')"),
        ('absent from test', "no test images of class 2 ('cow')"),
        ('absent from training', "no training images of class 2 ('cow') and 1 more"),
        ('no images', 'no test images'),
        ('labels', 'from 0 to 9'),
        ('nan', 'test features of 2 of 40 images'),
    ],
)
def test_sets_that_cannot_be_probed(what, words):
    with pytest.raises(UserError) as caught:
        check_sets(*broken(what), 4, '--target farm', ['ant', 'cat', 'cow', 'dog'])
    assert str(caught.value).startswith('--target farm: ') and words in str(caught.value)
    assert '\n' not in str(caught.value)
    with pytest.raises(UserError):
        probe('ridge', *broken(what), 4)


def test_labels_that_do_not_fit_the_features():
    with pytest.raises(ValueError, match=r'\[5, 2\] and \[4\]'):
        Labeled(torch.zeros(5, 2), torch.zeros(4, dtype=torch.long))
