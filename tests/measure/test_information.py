"""Estimators of mutual information against their definitions written out, and against known information."""

import math

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.spatial.distance import cdist

from ctc_timm.measure.information import create_estimator
from ctc_timm.measure.neural import batch_means_error, donsker_varadhan, mine_loss, paired, read_halves
from ctc_timm.utils.errors import UserError

NAMES = ('renyi', 'mine')
SHORT = {'hidden': 64, 'steps': 250, 'batch_size': 192, 'learning_rate': 5e-3, 'window': 100}


def gaussian_pair(nats, images, dimensions=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    noise = math.exp(-nats / dimensions)
    x, other = torch.randn(2, images, dimensions, generator=generator)
    return x, math.sqrt(1 - noise**2) * x + noise * other


# Bounds on given scores


def test_bound_against_its_formula_and_without_overflow():
    joint, marginal = torch.randn(2, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 2
    expected = joint.mean().item() - math.log(np.mean([math.exp(score) for score in marginal]))
    assert float(donsker_varadhan(joint, marginal)) == pytest.approx(expected, rel=1e-12)
    scores = torch.tensor([[1000.0] * 4, [1000.0, -1000.0, 0.0, 990.0]], requires_grad=True)
    assert float(donsker_varadhan(*scores.detach())) == pytest.approx(math.log(4) - math.exp(-10), abs=1e-3)
    mine_loss(scores, None, 0.1)[0].backward()
    assert scores.grad.isfinite().all()


def test_gradient_with_moving_average_against_its_closed_form():
    # d loss / d joint = -1 / B; d loss / d marginal_m = exp(s_m) / (M * average), the average taken over the steps.
    generator = torch.Generator().manual_seed(2)
    log_average, expected = None, None
    for _ in range(4):
        scores = torch.randn(2, 5, dtype=torch.float64, generator=generator, requires_grad=True)
        loss, log_average = mine_loss(scores, log_average, 0.3)
        loss.backward()
        marginal = np.exp(scores[1].detach().numpy())
        expected = marginal.mean() if expected is None else 0.7 * expected + 0.3 * marginal.mean()
        np.testing.assert_allclose(scores.grad[0], -np.ones(5) / 5, rtol=1e-12)
        np.testing.assert_allclose(scores.grad[1], marginal / (5 * expected), rtol=1e-12)


# Error bars, inputs


def test_batch_means_against_a_loop():
    values = np.random.default_rng(0).normal(size=103).cumsum()
    means = [np.mean(values[3 + 10 * k : 13 + 10 * k]) for k in range(10)]
    assert batch_means_error(values, batches=10) == pytest.approx(stats.sem(means), rel=1e-12)
    assert batch_means_error(np.arange(3.0)) == math.inf


def test_how_inputs_are_read():
    x, t = paired(np.ones((40, 3, 2, 2), dtype=np.uint8), np.arange(40.0))
    assert x.shape == (40, 12) and x.dtype == torch.float32
    assert t.shape == (40, 1) and t.dtype == torch.float64


def with_value(value):
    t = torch.randn(40, 3)
    t[7, 1] = value
    return t


@pytest.mark.parametrize('name', ['mine', 'mine-published'])
def test_no_accelerator_is_seeded(name, monkeypatch):
    """Of a machine with several, they are others' as well."""
    monkeypatch.setattr('torch.cuda.manual_seed_all', lambda seed: pytest.fail('all GPUs are seeded'))
    x, t = gaussian_pair(1, 60)
    create_estimator(name, **{**SHORT, 'steps': 40, 'window': 20}, seed=3).estimate(x, t)


@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize(
    'x, t, words',
    [
        (torch.zeros(40, 2), torch.zeros(41, 2), 'x has 40 rows and t has 41'),
        (torch.zeros(31, 2), torch.zeros(31, 2), '31 images: at least 32'),
        (torch.zeros(40, 2), with_value(math.nan), 't has NaN or infinity in 1 of 40 rows'),
        (with_value(-math.inf), torch.zeros(40, 2), 'x has NaN or infinity'),
        (torch.zeros(40, 0), torch.zeros(40, 2), 'x must be real numbers'),
    ],
)
def test_inputs_that_cannot_work(name, x, t, words):
    with pytest.raises(UserError, match=words):
        create_estimator(name).estimate(x, t)


@pytest.mark.parametrize(
    'name, options, words',
    [
        ('mime', {}, "'mime'; nearest: mine"),
        ('qqq', {}, 'are renyi, mine, mine-published'),
        ('mine', {'held_out': 0.01}, 'leaves 2 to read the bound on and 198'),
        ('mine', {**SHORT, 'learning_rate': 1e30, 'steps': 20}, 'MINE diverged: lower learning_rate'),
    ],
)
def test_estimators_that_cannot_work(name, options, words):
    with pytest.raises(UserError, match=words):
        create_estimator(name, **options).estimate(*gaussian_pair(1, 200))


# MINE on known information


@pytest.mark.parametrize('nats, held_out', [(0.0, 0.5), (1.0, 0.5), (1.0, 0.0)])
def test_known_information_of_a_gaussian_pair(nats, held_out):
    x, t = gaussian_pair(nats, 6000, dimensions=2)
    estimate = create_estimator('mine', **SHORT, held_out=held_out).estimate(x, t)
    assert estimate.nats == pytest.approx(nats, abs=0.12)
    assert 0 < estimate.standard_error < 0.1


def test_held_out_images_do_not_reward_memorizing():
    generator = torch.Generator().manual_seed(5)
    x, t = torch.randn(2, 400, 30, generator=generator)  # independent
    options = {**SHORT, 'steps': 200, 'window': 50}
    in_sample = create_estimator('mine', **options, held_out=0.0).estimate(x, t)
    assert in_sample.nats == pytest.approx(np.mean(in_sample.curve[-50:])) and in_sample.nats > 0.5
    assert create_estimator('mine', **options, held_out=0.5).estimate(x, t).nats == pytest.approx(0, abs=0.05)


def test_each_half_is_read_where_the_other_is_best():
    first, second = np.random.default_rng(13).normal(1.0, 1.0, (2, 60))
    readings, noise = [], []
    for read, other in ((first, second), (second, first)):
        best = max(range(60 - 8 + 1), key=lambda k: sum(other[k : k + 8]))
        readings.append(sum(read[best : best + 8]) / 8)
        noise.append(batch_means_error(read[best : best + 8]))
    nats, error = read_halves(first, second, 8)
    assert nats == pytest.approx(sum(readings) / 2, rel=1e-12)
    expected = max(math.sqrt(noise[0] ** 2 + noise[1] ** 2), abs(readings[0] - readings[1])) / 2
    assert error == pytest.approx(expected, rel=1e-12)
    # Where one half is never above zero, the other's reading is that of the critic that scores all pairs alike.
    harmed = -np.abs(first) - 1
    best = max(range(53), key=lambda k: sum(np.abs(second)[k : k + 8]))
    assert read_halves(harmed, np.abs(second), 8)[0] == pytest.approx(np.mean(harmed[best : best + 8]) / 2, rel=1e-12)
    assert read_halves(harmed, harmed, 8)[0] == 0


def test_information_of_labels():
    # Features that show a symbol, and labels that are it or, with probability 0.25, one of the three others.
    generator = torch.Generator().manual_seed(6)
    sent = torch.randint(4, (4000,), generator=generator)
    flip = torch.rand(4000, generator=generator) < 0.25
    labels = torch.where(flip, (sent + torch.randint(1, 4, (4000,), generator=generator)) % 4, sent)
    features = torch.eye(4)[sent] @ torch.randn(4, 8, generator=generator)
    truth = math.log(4) + 0.75 * math.log(0.75) + 0.25 * math.log(0.25 / 3)
    assert create_estimator('mine', **SHORT).estimate(features, labels).nats == pytest.approx(truth, abs=0.08)


@pytest.mark.parametrize('name', NAMES)
def test_same_seed_same_numbers_and_nothing_else_disturbed(name):
    x, t = gaussian_pair(1, 300, dimensions=3)
    options = {} if name == 'renyi' else {**SHORT, 'steps': 40, 'window': 20}
    torch.manual_seed(11)
    before = torch.get_rng_state()
    first = create_estimator(name, **options, seed=3).estimate(x, t)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(12)
    assert create_estimator(name, **options, seed=3).estimate(x, t) == first
    assert create_estimator(name, **options, seed=4).estimate(x, t) != first


@pytest.mark.parametrize('name', NAMES)
def test_labels_count_like_their_one_hot_rows(name):
    generator = torch.Generator().manual_seed(7)
    x, labels = torch.randn(100, 3, generator=generator), torch.randint(5, (100,), generator=generator)
    estimator = create_estimator(name, **({} if name == 'renyi' else {**SHORT, 'steps': 20, 'window': 20}))
    one_hot = torch.nn.functional.one_hot(labels).float()
    assert estimator.estimate(x, labels) == estimator.estimate(x, one_hot)


def test_published_settings():
    for of_labels, learning_rate, steps in ((False, 8e-5, 10_000), (True, 1e-5, 20_000)):
        s = create_estimator('mine-published', of_labels)
        assert (s.learning_rate, s.steps) == (learning_rate, steps)
        assert (s.hidden, s.layers, s.batch_size, s.average_rate, s.window) == (1024, 4, 5000, 0.01, 500)
        assert (s.held_out, s.shift_marginals, s.standardize, s.decay) == (0, False, False, False)


# Matrix-based Renyi information


def brute_renyi(x, t, alpha):
    """The definition in numpy; labels are one-dimensional."""

    def normalized(values):
        if values.ndim == 1:
            return np.equal.outer(values, values) / len(values)
        distance = cdist(values, values)
        scale = np.sort(distance, axis=1)[:, 1:11].mean()
        return np.exp(-(distance**2) / (2 * scale**2)) / len(values)

    def renyi_entropy(matrix):
        shares = np.clip(np.linalg.eigvalsh(matrix), 0, None)
        if alpha == 1:
            return -sum(p * math.log(p) for p in shares if p > 0)
        return math.log(np.sum(shares**alpha)) / (1 - alpha)

    A, B = normalized(x), normalized(t)
    return renyi_entropy(A) + renyi_entropy(B) - renyi_entropy(A * B / np.trace(A * B))


@pytest.mark.parametrize('alpha', [1, 1.01, 2.0])
@pytest.mark.parametrize('kinds', ['numbers', 'labels', 'labels twice'])
def test_renyi_against_its_definition(alpha, kinds):
    rng = np.random.default_rng(8)
    x = rng.normal(size=(45, 3)) + 5
    t = x[:, :2] + rng.normal(size=(45, 2))
    y, z = rng.integers(0, 4, 45), rng.integers(0, 3, 45)
    first, second = {'numbers': (x, t), 'labels': (x, y), 'labels twice': (y, z)}[kinds]
    estimator = create_estimator('renyi', alpha=alpha, groups=0)
    for a, b in ((first, second), (second, first)):
        assert estimator.estimate(a, b).nats == pytest.approx(brute_renyi(first, second, alpha), abs=1e-9)
    assert estimator.estimate(x * 50 - 7, t).nats == pytest.approx(brute_renyi(x, t, alpha), abs=1e-9)


def test_renyi_of_independent_variables():
    rng = np.random.default_rng(10)
    x, t = rng.normal(size=(2, 600, 20))
    assert create_estimator('renyi').estimate(x, t).nats > 0.5  # in high dimension
    # What a shuffled t shows as well is subtracted.
    assert abs(create_estimator('renyi', shuffles=1).estimate(x, t).nats) < 0.02
    constant = torch.full((600, 3), 2.5)
    assert create_estimator('renyi').estimate(x, constant).nats == pytest.approx(0, abs=1e-9)


def test_renyi_error_covers_the_spread_over_samples():
    estimates = [create_estimator('renyi').estimate(*gaussian_pair(1, 160, 2, seed)) for seed in range(30)]
    spread = np.std([e.nats for e in estimates], ddof=1)
    claimed = np.mean([e.standard_error for e in estimates])
    assert 0.65 < claimed / spread < 1.5


def test_renyi_takes_a_subset_of_many_images():
    x, t = gaussian_pair(1, 400, dimensions=2)
    estimate = create_estimator('renyi', max_images=100, groups=0, seed=5).estimate(x, t)
    rows = np.random.default_rng(5).permutation(400)[:100]
    assert estimate.nats == pytest.approx(create_estimator('renyi', groups=0).estimate(x[rows], t[rows]).nats, abs=1e-9)
    assert estimate.standard_error == math.inf
