"""Estimators of mutual information against their definitions written out, and against known information."""

import math

import numpy as np
import pytest
import torch

from ctc_timm.measure import bounds
from ctc_timm.measure.estimates import batch_means_error, labels_of, numbers_of, paired, standardized
from ctc_timm.measure.information import ESTIMATORS, MINE_PRESETS, create_estimator
from ctc_timm.measure.neural import ContrastObjective, PairObjective, SmileObjective, Training, read_halves
from ctc_timm.utils.errors import UserError

NEURAL = ('mine', 'infonce', 'smile')
SHORT = {'hidden': 64, 'steps': 250, 'batch_size': 192, 'learning_rate': 5e-3, 'window': 100}


def gaussian_pair(nats, images, dimensions=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    noise = math.exp(-nats / dimensions)
    x, own = torch.randn(2, images, dimensions, generator=generator)
    return x, math.sqrt(1 - noise**2) * x + noise * own


# Bounds on given scores


@pytest.fixture
def scores():
    return torch.randn(6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 2


def pairs(scores):
    """Joint and marginal scores, by a loop."""
    B = len(scores)
    return (
        [float(scores[i, i]) for i in range(B)],
        [float(scores[i, j]) for i in range(B) for j in range(B) if i != j],
    )


def test_off_diagonal_scores(scores):
    assert bounds.off_diagonal(scores).tolist() == pairs(scores)[1]


def test_donsker_varadhan_against_its_formula(scores):
    joint, marginal = pairs(scores)
    expected = np.mean(joint) - math.log(np.mean(np.exp(marginal)))
    value = bounds.donsker_varadhan(scores.diagonal(), bounds.off_diagonal(scores))
    assert float(value) == pytest.approx(expected, rel=1e-12)


def test_smile_against_its_formula(scores):
    joint, marginal = pairs(scores)
    clipped = [min(max(math.exp(s), math.exp(-1.5)), math.exp(1.5)) for s in marginal]
    value = bounds.smile_bound(scores.diagonal(), bounds.off_diagonal(scores), clip=1.5)
    assert float(value) == pytest.approx(np.mean(joint) - math.log(np.mean(clipped)), rel=1e-12)


def test_infonce_against_its_formula(scores):
    rows = [math.log(math.exp(scores[i, i]) / np.mean([math.exp(s) for s in scores[i]])) for i in range(len(scores))]
    assert float(bounds.infonce_bound(scores)) == pytest.approx(np.mean(rows), rel=1e-12)


def test_jensen_shannon_against_its_formula(scores):
    joint, marginal = pairs(scores)
    expected = np.mean([math.log(1 / (1 + math.exp(-s))) for s in joint])
    expected += np.mean([math.log(1 - 1 / (1 + math.exp(-s))) for s in marginal])
    value = bounds.jensen_shannon(scores.diagonal(), bounds.off_diagonal(scores))
    assert float(value) == pytest.approx(expected, rel=1e-12)


def test_the_true_density_ratio_gives_the_true_information():
    # With log p(x, t) / (p(x) p(t)) as the critic Donsker and Varadhan's bound is tight.
    rho, images = 0.8, 200_000
    nats = -0.5 * math.log(1 - rho**2)
    x, t = (v[:, 0].double() for v in gaussian_pair(nats, images))

    def ratio(x, t):
        return nats + t**2 / 2 - (t - rho * x) ** 2 / (2 * (1 - rho**2))

    value = bounds.donsker_varadhan(ratio(x, t), ratio(x, t.roll(1)))
    assert float(value) == pytest.approx(nats, abs=0.01)


def test_large_scores_do_not_overflow():
    joint, marginal = torch.full((4,), 1000.0), torch.tensor([1000.0, -1000.0, 0.0, 990.0])
    assert float(bounds.donsker_varadhan(joint, marginal)) == pytest.approx(math.log(4) - math.exp(-10), abs=1e-3)
    marginal.requires_grad_()
    bounds.mine_loss(joint, marginal, bounds.MovingAverage(0.01)).backward()
    assert marginal.grad.isfinite().all()


def test_gradient_with_moving_average_against_its_closed_form():
    # d loss / d joint = -1 / B; d loss / d marginal_m = exp(s_m) / (M * average), the average taken over the steps.
    generator = torch.Generator().manual_seed(2)
    average, rate, expected = bounds.MovingAverage(0.3), 0.3, None
    for _ in range(4):
        joint = torch.randn(5, dtype=torch.float64, generator=generator, requires_grad=True)
        marginal = torch.randn(7, dtype=torch.float64, generator=generator, requires_grad=True)
        bounds.mine_loss(joint, marginal, average).backward()
        now = np.mean(np.exp(marginal.detach().numpy()))
        expected = now if expected is None else (1 - rate) * expected + rate * now
        np.testing.assert_allclose(joint.grad, -np.ones(5) / 5, rtol=1e-12)
        np.testing.assert_allclose(marginal.grad, np.exp(marginal.detach().numpy()) / (7 * expected), rtol=1e-12)


# Critics


def test_pair_critic_is_a_perceptron_on_both_side_by_side():
    torch.manual_seed(3)
    objective = PairObjective(5, 3, Training(hidden=8, layers=4)).double()
    linear = [m for m in objective.critic if isinstance(m, torch.nn.Linear)]
    assert [tuple(m.weight.shape) for m in linear] == [(8, 8), (8, 8), (8, 8), (1, 8)]
    x, t, other = torch.randn(4, 5).double(), torch.randn(4, 3).double(), torch.randn(4, 3).double()
    values = objective.scores(x, t, other)
    for row, second in enumerate((t, other)):
        torch.testing.assert_close(values[row], objective.critic(torch.cat([x, second], dim=1))[:, 0])


@pytest.mark.parametrize('objective', [ContrastObjective, SmileObjective])
def test_separable_critic_scores_every_pair(objective):
    torch.manual_seed(4)
    objective = objective(5, 3, Training(hidden=8, embed=4)).double()
    x, t = torch.randn(6, 5).double(), torch.randn(6, 3).double()
    values = objective.scores(x, t, t)
    for i in range(6):
        for j in range(6):
            expected = objective.of_x(x[i]) @ objective.of_t(t[j]) / 2
            torch.testing.assert_close(values[i, j], expected)


# Error bars, inputs


def test_batch_means_against_a_loop():
    values = np.random.default_rng(0).normal(size=103).cumsum()
    means = [np.mean(values[3 + 10 * k : 13 + 10 * k]) for k in range(10)]
    deviation = math.sqrt(sum((m - np.mean(means)) ** 2 for m in means) / 9)
    assert batch_means_error(values, batches=10) == pytest.approx(deviation / math.sqrt(10), rel=1e-12)
    assert batch_means_error([1.0, 2.0, 3.0]) == math.inf


def test_batch_means_know_autocorrelation():
    # A first-order series with coefficient 0.8 has an error three times that of independent values.
    rng = np.random.default_rng(1)
    errors = []
    for _ in range(50):
        noise, series = rng.normal(size=2000), [0.0]
        for value in noise:
            series.append(0.8 * series[-1] + value)
        errors.append(batch_means_error(series[1:]))
    assert np.mean(errors) == pytest.approx(1 / (1 - 0.8) / math.sqrt(2000), rel=0.1)


def test_standardized_coordinates():
    values = torch.tensor([[1.0, 7.0, 1e6], [3.0, 7.0, 1e6], [5.0, 7.0, 1e6 + 0.06]])
    result = standardized(values)
    torch.testing.assert_close(result[:, 0], torch.tensor([-1.0, 0.0, 1.0]) * math.sqrt(1.5))
    assert not result[:, 1:].any()


def test_labels_and_one_hot_rows_are_told_from_numbers():
    labels = torch.tensor([7, 2, 7, 9])
    one_hot = torch.nn.functional.one_hot(labels, 10)
    assert labels_of(labels).tolist() == labels_of(one_hot).tolist() == [1, 0, 1, 2]
    assert labels_of(torch.eye(3) * 2) is None and labels_of(torch.ones(4, 1)) is None
    assert numbers_of(labels).tolist() == [[0, 1, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]]


def test_inputs_are_flattened_and_may_come_from_numpy():
    x, t = paired(np.ones((40, 3, 2, 2), dtype=np.uint8), np.arange(40.0))
    assert x.shape == (40, 12) and x.dtype == torch.float32
    assert t.shape == (40, 1) and t.dtype == torch.float64


def with_value(value):
    t = torch.randn(40, 3)
    t[7, 1] = value
    return t


@pytest.mark.parametrize('name', ESTIMATORS)
@pytest.mark.parametrize(
    'x, t, words',
    [
        (torch.zeros(40, 2), torch.zeros(41, 2), 'x has 40 rows and t has 41'),
        (torch.zeros(31, 2), torch.zeros(31, 2), '31 images: at least 32'),
        (torch.zeros(40, 2), with_value(math.nan), 't has NaN or infinity in 1 of 40 rows'),
        (with_value(-math.inf), torch.zeros(40, 2), 'x has NaN or infinity'),
        (torch.zeros(40, 0), torch.zeros(40, 2), 'x has no coordinates'),
        (torch.tensor(3.0), torch.zeros(40, 2), 'x must be real numbers'),
    ],
)
def test_inputs_that_cannot_work(name, x, t, words):
    with pytest.raises(UserError, match=words):
        create_estimator(name).estimate(x, t)


@pytest.mark.parametrize(
    'name, options, words',
    [
        ('mime', {}, "'mime'; nearest: mine"),
        ('qqq', {}, 'there are mine, infonce, smile, renyi'),
        ('mine', {'preset': 'publised_xt'}, 'nearest: published_xt'),
        ('mine', {'learning_rat': 1}, "'learning_rat'; nearest: learning_rate"),
        ('renyi', {'alpa': 1}, "'alpa'; nearest: alpha"),
        ('renyi', {'alpha': 0}, 'alpha.*got 0'),
        ('renyi', {'width': 'wide'}, "neighbors, median.*'wide'"),
        ('renyi', {'max_images': 3}, 'max_images.*got 3'),
        ('renyi', {'groups': 1}, 'groups.*got 1'),
        ('mine', {'steps': 3}, 'steps must be at least 20'),
        ('mine', {'steps': 50, 'window': 51}, 'window must be at most the 50 steps'),
        ('infonce', {'learning_rate': -1.0}, 'learning_rate'),
        ('mine', {'average_rate': 0}, 'average_rate'),
        ('smile', {'held_out': 1.0}, 'held_out'),
        ('mine', {'marginals': 'all'}, "'draw' or 'shift'"),
    ],
)
def test_settings_that_cannot_work(name, options, words):
    with pytest.raises(UserError, match=words):
        create_estimator(name, **options)


def test_too_few_images_to_hold_out():
    with pytest.raises(UserError, match='leaves 4 to read the bound on and 36'):
        create_estimator('mine', held_out=0.1).estimate(*gaussian_pair(1, 40))


def test_a_training_that_diverges_says_so():
    options = {**SHORT, 'learning_rate': 1e30, 'steps': 20, 'window': 20}
    with pytest.raises(UserError, match='mine diverged: lower learning_rate'):
        create_estimator('mine', **options).estimate(*gaussian_pair(1, 200))


# Neural estimators on known information


@pytest.mark.parametrize('nats, held_out', [(0.0, 0.5), (1.0, 0.5), (1.0, 0.0)])
@pytest.mark.parametrize('name', NEURAL)
def test_known_information_of_a_gaussian_pair(name, nats, held_out):
    x, t = gaussian_pair(nats, 6000, dimensions=2)
    estimate = create_estimator(name, **SHORT, held_out=held_out).estimate(x, t)
    assert estimate.nats == pytest.approx(nats, abs=0.12)
    assert 0 < estimate.standard_error < 0.1


def test_in_sample_estimate_is_the_mean_of_the_last_window():
    x, t = gaussian_pair(1, 500)
    estimate = create_estimator('mine', **{**SHORT, 'steps': 60, 'window': 20}, held_out=0.0).estimate(x, t)
    assert len(estimate.curve) == 60 and estimate.curve_every == 1
    assert estimate.nats == pytest.approx(np.mean(estimate.curve[-20:]), rel=1e-12)
    assert estimate.standard_error == pytest.approx(batch_means_error(estimate.curve[-20:]), rel=1e-12)


def test_held_out_images_do_not_reward_learning_by_heart():
    generator = torch.Generator().manual_seed(5)
    x, t = torch.randn(2, 400, 30, generator=generator)  # independent
    options = {**SHORT, 'steps': 200, 'window': 50}
    assert create_estimator('mine', **options, held_out=0.0).estimate(x, t).nats > 0.5
    assert create_estimator('mine', **options, held_out=0.5).estimate(x, t).nats == pytest.approx(0, abs=0.05)


def test_each_half_is_read_where_the_other_is_best():
    first, second = np.random.default_rng(13).normal(1.0, 1.0, (2, 60))
    readings, noise = [], []
    for own, other in ((first, second), (second, first)):
        best = max(range(60 - 8 + 1), key=lambda k: sum(other[k : k + 8]))
        readings.append(sum(own[best : best + 8]) / 8)
        noise.append(batch_means_error(own[best : best + 8]))
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
    for name in NEURAL:
        assert create_estimator(name, **SHORT).estimate(features, labels).nats == pytest.approx(truth, abs=0.08)


def test_infonce_stays_below_the_logarithm_of_its_batch():
    x, _ = gaussian_pair(0, 2000, dimensions=4)
    estimate = create_estimator('infonce', **{**SHORT, 'batch_size': 32}).estimate(x, x)
    assert math.log(32) - 0.5 < estimate.nats <= math.log(32)


@pytest.mark.parametrize('name', ESTIMATORS)
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


@pytest.mark.parametrize('name', ESTIMATORS)
def test_labels_count_like_their_one_hot_rows(name):
    generator = torch.Generator().manual_seed(7)
    x, labels = torch.randn(100, 3, generator=generator), torch.randint(5, (100,), generator=generator)
    options = {} if name == 'renyi' else {**SHORT, 'steps': 20, 'window': 20}
    one_hot = torch.nn.functional.one_hot(labels).float()
    assert create_estimator(name, **options).estimate(x, labels) == create_estimator(name, **options).estimate(
        x, one_hot
    )


@pytest.mark.parametrize('name', ESTIMATORS)
def test_progress_reaches_its_end_in_steps_of_one(name):
    calls = []
    options = {} if name == 'renyi' else {**SHORT, 'steps': 25, 'window': 20}
    create_estimator(name, **options).estimate(*gaussian_pair(1, 100), progress=lambda *c: calls.append(c))
    assert calls == [(k + 1, len(calls)) for k in range(25 if name != 'renyi' else 5)]


def test_published_presets():
    for preset, learning_rate, steps in (('published_xt', 8e-5, 10_000), ('published_ty', 1e-5, 20_000)):
        s = MINE_PRESETS[preset]
        assert (s.learning_rate, s.steps) == (learning_rate, steps)
        assert (s.hidden, s.layers, s.batch_size, s.average_rate, s.window) == (1024, 4, 5000, 0.01, 500)
        assert (s.held_out, s.marginals, s.standardize, s.decay) == (0, 'draw', False, False)


# Matrix-based Renyi information


def brute_renyi(x, t, alpha, width):
    """The definition by loops, in numpy; labels are one-dimensional."""

    def normalized(values):
        N = len(values)
        if values.ndim == 1:
            return np.array([[float(values[i] == values[j]) for j in range(N)] for i in range(N)]) / N
        distance = np.array([[np.linalg.norm(values[i] - values[j]) for j in range(N)] for i in range(N)])
        if width == 'median':
            above = sorted(distance[i, j] for i in range(N) for j in range(i + 1, N))
            scale = above[(len(above) - 1) // 2]
        else:
            scale = np.mean([sorted(distance[i])[1:11] for i in range(N)])
        return np.exp(-(distance**2) / (2 * scale**2)) / N

    def renyi_entropy(matrix):
        shares = np.clip(np.linalg.eigvalsh(matrix), 0, None)
        if alpha == 1:
            return -sum(p * math.log(p) for p in shares if p > 0)
        return math.log(np.sum(shares**alpha)) / (1 - alpha)

    A, B = normalized(x), normalized(t)
    joint = A * B / np.trace(A * B)
    return renyi_entropy(A) + renyi_entropy(B) - renyi_entropy(joint)


@pytest.mark.parametrize('alpha', [1, 1.01, 2.0])
@pytest.mark.parametrize('width', ['neighbors', 'median'])
@pytest.mark.parametrize('kinds', ['numbers', 'labels', 'labels twice'])
def test_renyi_against_its_definition(alpha, width, kinds):
    rng = np.random.default_rng(8)
    x = rng.normal(size=(45, 3)) + 5
    t = x[:, :2] + rng.normal(size=(45, 2))
    y, z = rng.integers(0, 4, 45), rng.integers(0, 3, 45)
    first, second = {'numbers': (x, t), 'labels': (x, y), 'labels twice': (y, z)}[kinds]
    estimator = create_estimator('renyi', alpha=alpha, width=width, groups=0)
    expected = brute_renyi(first, second, alpha, width)
    for a, b in ((first, second), (second, first)):
        assert estimator.estimate(a, b).nats == pytest.approx(expected, abs=1e-9)


def class_entropy(labels, alpha):
    shares = np.unique(labels, return_counts=True)[1] / len(labels)
    if alpha == 1:
        return -np.sum(shares * np.log(shares))
    return math.log(np.sum(shares**alpha)) / (1 - alpha)


@pytest.mark.parametrize('alpha', [1, 1.01])
def test_renyi_of_an_injective_function_of_labels_is_their_entropy(alpha):
    rng = np.random.default_rng(9)
    labels = rng.integers(0, 6, 300)
    features = rng.normal(size=(6, 20))[labels]
    estimate = create_estimator('renyi', alpha=alpha).estimate(features, labels)
    assert estimate.nats == pytest.approx(class_entropy(labels, alpha), abs=1e-9)
    assert len(estimate.curve) == 0


def test_renyi_of_independent_variables_is_near_zero():
    rng = np.random.default_rng(10)
    x, y = rng.normal(size=(600, 1)), rng.integers(0, 3, 600)
    assert 0 <= create_estimator('renyi', width='median').estimate(x, y).nats < 0.02
    # In high dimension only what a shuffled t shows as well is taken off.
    x, t = rng.normal(size=(2, 600, 20))
    assert create_estimator('renyi').estimate(x, t).nats > 0.5
    assert abs(create_estimator('renyi', shuffles=1).estimate(x, t).nats) < 0.02


def test_renyi_of_features_that_never_change_is_zero():
    x = torch.randn(50, 4, generator=torch.Generator().manual_seed(1))
    assert create_estimator('renyi').estimate(x, torch.full((50, 3), 2.5)).nats == pytest.approx(0, abs=1e-9)


def test_renyi_does_not_see_scale_or_place():
    x, t = gaussian_pair(2, 100, dimensions=4)
    plain = create_estimator('renyi').estimate(x, t).nats
    assert create_estimator('renyi').estimate(x.double() * 50 - 7, t).nats == pytest.approx(plain, abs=1e-9)


def test_renyi_error_covers_the_spread_over_samples():
    estimates = [create_estimator('renyi').estimate(*gaussian_pair(1, 160, 2, seed)) for seed in range(30)]
    spread = np.std([e.nats for e in estimates], ddof=1)
    claimed = np.mean([e.standard_error for e in estimates])
    assert 0.65 < claimed / spread < 1.5


def test_renyi_takes_a_subset_of_many_images():
    x, t = gaussian_pair(1, 400, dimensions=2)
    estimate = create_estimator('renyi', max_images=100, groups=0, seed=5).estimate(x, t)
    rows = np.random.default_rng(5).permutation(400)[:100]
    whole = create_estimator('renyi', groups=0).estimate(x[rows], t[rows])
    assert estimate.nats == pytest.approx(whole.nats, abs=1e-9)
    assert estimate.standard_error == math.inf
