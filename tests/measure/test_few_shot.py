"""Few-shot probes: which images are drawn, what is averaged, what is refused."""

import json

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.datasets import load_digits
from sklearn.neighbors import KNeighborsClassifier

from ctc_timm.measure import logistic, ridge
from ctc_timm.measure.few_shot import check_shots, draw_shots, few_shot
from ctc_timm.measure.probes import METHODS
from ctc_timm.measure.sets import Labeled
from ctc_timm.utils.errors import UserError

NAMES = [f'digit {c}' for c in range(10)]


@pytest.fixture(scope='module')
def digits():
    x, y = load_digits(return_X_y=True)
    x, y = torch.tensor(x, dtype=torch.float32), torch.tensor(y)
    return Labeled(x[:1000], y[:1000]), Labeled(x[1000:], y[1000:])


def test_draws_are_balanced_nested_and_seeded(digits):
    labels = digits[0].labels_N
    one, five = draw_shots(labels, 1, seed=3), draw_shots(labels, 5, seed=3)
    assert torch.bincount(labels[five]).tolist() == [5] * 10 and len(five.unique()) == 50
    assert set(one.tolist()) < set(five.tolist())
    assert torch.equal(five, draw_shots(labels, 5, seed=3)) and not torch.equal(five, draw_shots(labels, 5, seed=4))
    single = torch.arange(4)  # one image of each class
    assert draw_shots(single, 1, seed=0).tolist() == [0, 1, 2, 3]


def test_mean_and_interval_against_scikit_learn_and_scipy(digits):
    train, test = digits
    found = {(r.method, r.shots): r for r in few_shot('knn', train, test, 10, [2, 6], range(4))}
    assert list(found) == [(f'knn-{k}', shots) for shots in (2, 6) for k in (1, 5, 20)]
    for shots in (2, 6):
        scores = []
        for seed in range(4):
            drawn = draw_shots(train.labels_N, shots, seed)
            nearest = KNeighborsClassifier(1, metric='cosine').fit(train.features_ND[drawn], train.labels_N[drawn])
            scores.append(100 * nearest.score(test.features_ND, test.labels_N))
        low, high = stats.t.interval(0.95, 3, loc=np.mean(scores), scale=stats.sem(scores))
        row = found['knn-1', shots].row()
        assert (row['top1'], row['top1_low'], row['top1_high']) == pytest.approx((np.mean(scores), low, high))
        assert row['seeds'] == 4


@pytest.mark.parametrize('method', METHODS)
def test_more_shots_are_better(method, digits):
    results = list(few_shot(method, *digits, 10, [1, 10], range(2)))
    names = {'knn': ['knn-1', 'knn-5', 'knn-20'], 'sgd': ['sgd-last', 'sgd-best']}.get(method, [method])
    assert [(r.method, r.shots) for r in results] == [(name, shots) for shots in (1, 10) for name in names]
    for one, ten in zip(results[: len(names)], results[len(names) :]):
        assert 30 < one.scores['top1'].value < ten.scores['top1'].value - 10
        assert json.loads(json.dumps(ten.row())) == ten.row()


@pytest.mark.parametrize('solver', [ridge, logistic])
def test_a_single_shot_takes_the_default_strength(solver, digits):
    train, test = digits
    name = solver.__name__.split('.')[-1]
    (result,) = few_shot(name, train, test, 10, [1], [5])
    ((weights, bias),) = solver.solve(train.take(draw_shots(train.labels_N, 1, 5)), 10, [solver.DEFAULT_STRENGTH])
    predicted = (test.features_ND.double() @ weights + bias).argmax(dim=1)
    expected = 100 * (predicted == test.labels_N).double().mean().item()
    assert result.scores['top1'] == (pytest.approx(expected), None, None)  # one seed: no interval


def test_the_strength_of_several_shots_is_chosen_among_them_alone(digits):
    train, test = digits
    other = Labeled(test.features_ND, test.labels_N.roll(3))
    (one,), (two,) = (few_shot('ridge', train, s, 10, [4], [0]) for s in (test, other))
    assert one.scores['top1'].value > 60 > 30 > two.scores['top1'].value
    drawn = train.take(draw_shots(train.labels_N, 4, 0))
    best = 0.0
    for weights, bias in ridge.solve(drawn, 10, ridge.STRENGTHS):
        hits = (test.features_ND.double() @ weights + bias).argmax(dim=1) == test.labels_N
        best = max(best, 100 * hits.double().mean().item())
    assert best - 8 < one.scores['top1'].value <= best


def test_too_many_shots_are_refused_and_finished_rows_kept(digits):
    train, test = digits
    scarce = train.take((train.labels_N != 7) | (train.labels_N.eq(7).cumsum(0) <= 3))
    rows = []
    with pytest.raises(UserError) as caught:
        for result in few_shot('knn', scarce, test, 10, [1, 3, 25], range(2), what='digits', class_names=NAMES):
            rows.append(result.row())
    assert [row['shots'] for row in rows] == [1, 1, 1, 3, 3, 3]
    assert str(caught.value) == "digits: --shots 25 is more than the 3 training images of class 7 ('digit 7')"
    with pytest.raises(UserError, match='--shots 4 .* 3 training images of class 7$'):
        check_shots(scarce, [1, 4])
    check_shots(scarce, [1, 3])


def test_more_that_is_refused(digits):
    train, test = digits
    with pytest.raises(UserError, match='--shots must be at least 1, got 0'):
        next(few_shot('knn', train, test, 10, [0], range(2)))
    with pytest.raises(UserError, match='--seeds must be at least 1'):
        next(few_shot('knn', train, test, 10, [1], []))
    with pytest.raises(UserError, match='digits: no test images of class 2'):
        next(few_shot('knn', train, test.take(test.labels_N != 2), 10, [1], [0], what='digits'))
