"""Estimators that train a critic to tighten a lower bound of mutual information: MINE, InfoNCE, SMILE.

Letters: B batch, X and D coordinates of x and t, E embedding, H hidden.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..utils.errors import UserError, nearest
from .bounds import MovingAverage, donsker_varadhan, infonce_bound, jensen_shannon, mine_loss, off_diagonal, smile_bound
from .estimates import Estimate, Progress, Values, batch_means_error, numbers_of, paired, settings_from, standardized

EVALUATE_EVERY = 5  # steps between two looks at the held-out images


@dataclass(frozen=True)
class Training:
    """How a critic is trained, and on what its bound is read.

    Attributes:
        hidden: H, width of the perceptron.
        layers: Its linear layers, at least 2, with ReLU between them.
        embed: E, size of the embeddings whose inner product is the score; `infonce` and `smile` only.
        learning_rate: Of Adam.
        decay: Lower the learning rate linearly to zero over the second half of the steps.
        steps: Training steps.
        batch_size: B, images a step drawn without replacement, all of them when there are fewer.
        average_rate: Share of the new value in the moving average of the exponential term; `mine` only.
        clip: Bound of the marginal scores; `smile` only.
        marginals: 'draw' pairs the batch's x with the t of a second, independent draw, in which an image may meet
            itself; 'shift' with the t of the batch's next image, never itself. `mine` only: the others use all pairs
            of different images in the batch (`infonce`: with the joint ones).
        standardize: Give each coordinate of x and t mean zero and deviation one over all N images first.
        held_out: Share of the images kept from training; 0 reads the bound on the images trained on.
        window: Steps over which the bound is averaged.
        seed: Of weights, split and draws.
        device: Where the critic is trained.
    """

    hidden: int = 256
    layers: int = 2
    embed: int = 32
    learning_rate: float = 1e-3
    decay: bool = True
    steps: int = 1500
    batch_size: int = 1024
    average_rate: float = 0.1
    clip: float = 5.0
    marginals: str = 'shift'
    standardize: bool = True
    held_out: float = 0.5
    window: int = 200
    seed: int = 0
    device: str | torch.device = 'cpu'

    def __post_init__(self) -> None:
        for name, least in {'hidden': 1, 'layers': 2, 'embed': 1, 'steps': 20, 'batch_size': 2, 'window': 20}.items():
            if getattr(self, name) < least:
                raise UserError(f'{name} must be at least {least}, got {getattr(self, name)}')
        for name in ('learning_rate', 'clip'):
            if not (getattr(self, name) > 0 and math.isfinite(getattr(self, name))):
                raise UserError(f'{name} must be a positive number, got {getattr(self, name)}')
        if not 0 < self.average_rate <= 1:
            raise UserError(f'average_rate must be above 0 and at most 1, got {self.average_rate}')
        if not 0 <= self.held_out < 1:
            raise UserError(f'held_out must be at least 0 and below 1, got {self.held_out}')
        if self.marginals not in ('draw', 'shift'):
            raise UserError(f"marginals must be 'draw' or 'shift', got {self.marginals!r}")
        if self.window > self.steps:
            raise UserError(f'window must be at most the {self.steps} steps, got {self.window}')


def perceptron(inputs: int, hidden: int, outputs: int, layers: int) -> nn.Sequential:
    """`layers` linear layers with ReLU between them."""
    sizes = [inputs] + [hidden] * (layers - 1) + [outputs]
    modules: list[nn.Module] = [nn.Linear(sizes[0], sizes[1])]
    for before, after in zip(sizes[1:-1], sizes[2:]):
        modules += [nn.ReLU(), nn.Linear(before, after)]
    return nn.Sequential(*modules)


class Objective(nn.Module):
    """A critic with the bound it is read by and the loss it is trained on."""

    @abstractmethod
    def scores(self, x_BX: Tensor, t_BD: Tensor, other_BD: Tensor) -> Tensor:
        """Scores of joint and marginal pairs; `other_BD` is the t of other images, for critics that take pairs."""

    @abstractmethod
    def bound(self, scores: Tensor) -> Tensor:
        """The bound in nats, a scalar."""

    @abstractmethod
    def loss(self, scores: Tensor) -> Tensor:
        """What is minimized, a scalar."""


class PairObjective(Objective):
    """MINE: a perceptron on x and t side by side; scores [2, B], joint and marginal."""

    def __init__(self, x_dim: int, t_dim: int, training: Training) -> None:
        super().__init__()
        self.critic = perceptron(x_dim + t_dim, training.hidden, 1, training.layers)
        self.average = MovingAverage(training.average_rate)

    def scores(self, x_BX: Tensor, t_BD: Tensor, other_BD: Tensor) -> Tensor:
        # The first layer of [x, t] is a sum of two products; that of x, nearly all of it when x is an image, serves
        # the joint and the marginal pair.
        first: Any = self.critic[0]
        of_x_HX, of_t_HD = first.weight.split([x_BX.shape[1], t_BD.shape[1]], dim=1)
        from_x_BH = F.linear(x_BX, of_x_HX, first.bias)
        hidden_2BH = torch.stack([from_x_BH + F.linear(t, of_t_HD) for t in (t_BD, other_BD)])
        return self.critic[1:](hidden_2BH).squeeze(-1)

    def bound(self, scores: Tensor) -> Tensor:
        return donsker_varadhan(scores[0], scores[1])

    def loss(self, scores: Tensor) -> Tensor:
        return mine_loss(scores[0], scores[1], self.average)


class ContrastObjective(Objective):
    """InfoNCE: the inner product of an embedding of x and one of t, over sqrt(E); scores [B, B]."""

    def __init__(self, x_dim: int, t_dim: int, training: Training) -> None:
        super().__init__()
        self.of_x = perceptron(x_dim, training.hidden, training.embed, training.layers)
        self.of_t = perceptron(t_dim, training.hidden, training.embed, training.layers)
        self.clip = training.clip

    def scores(self, x_BX: Tensor, t_BD: Tensor, other_BD: Tensor) -> Tensor:
        x_BE, t_BE = self.of_x(x_BX), self.of_t(t_BD)
        return x_BE @ t_BE.T / math.sqrt(x_BE.shape[1])

    def bound(self, scores: Tensor) -> Tensor:
        return infonce_bound(scores)

    def loss(self, scores: Tensor) -> Tensor:
        return -infonce_bound(scores)


class SmileObjective(ContrastObjective):
    """SMILE: the same critic, trained by Jensen and Shannon's bound and read by the clipped one."""

    def bound(self, scores: Tensor) -> Tensor:
        return smile_bound(scores.diagonal(), off_diagonal(scores), self.clip)

    def loss(self, scores: Tensor) -> Tensor:
        return -jensen_shannon(scores.diagonal(), off_diagonal(scores))


def read_halves(first: np.ndarray, second: np.ndarray, length: int) -> tuple[float, float]:
    """The bound of each held-out half where the other half's is best over `length` points, averaged.

    A critic that scores all pairs alike has the bound zero. It counts as a choice too, so where no window of the other
    half is above zero the reading is zero.

    Args:
        first: Bounds on one half over the training, in nats.
        second: On the other half, at the same steps.
        length: Points of a window.

    Returns:
        The mean of the two readings, and its error: that of batch means, or half the readings' difference if more.
    """
    readings, errors = [], []
    for own, other in ((first, second), (second, first)):
        means = np.convolve(other, np.full(length, 1 / length), mode='valid')
        start = int(means.argmax())
        window = own[start : start + length]
        readings.append(float(window.mean()) if means[start] > 0 else 0.0)
        errors.append(batch_means_error(window.tolist(), batches=10))
    return sum(readings) / 2, max(math.hypot(*errors), abs(readings[0] - readings[1])) / 2


class NeuralEstimator:
    """Trains a critic on pairs of x and t and reads off a bound.

    With `held_out=0` the estimate is the mean of the bound over the last `window` steps, each on the batch just trained
    on: the published form. A critic can learn images by heart, so this is no lower bound on a finite sample.

    With `held_out` above 0 that share of the images is kept from training and cut in two halves. Every 5 steps the
    bound is read on a batch of each. The window at which one half is best is where the other is read, or zero if no
    window of the one half is above it, and the estimate is the mean of the two readings: stopping early costs no bias,
    for no image helps to choose its own window.

    Args:
        name: In error messages.
        objective: Makes the critic from X, D and the settings.
        training: Settings.
    """

    def __init__(self, name: str, objective: Callable[[int, int, Training], Objective], training: Training) -> None:
        self.name = name
        self.objective = objective
        self.training = training

    def estimate(self, x: Values, t: Values, progress: Progress | None = None) -> Estimate:
        """Estimate I(X;T).

        Args:
            x: [N, ...] numbers, flattened, or class labels [N], one-hot encoded.
            t: Likewise, for the same images.
            progress: Called as `progress(step, steps)` after every step.

        Returns:
            The estimate. Its error is that of batch means over the window; with held-out images half the difference of
            the two readings if that is more.

        Raises:
            UserError: Inputs as in `paired`; too few images to hold out; a training that diverged.
        """
        s = self.training
        x_NX, t_ND = (numbers_of(v) for v in paired(x, t))
        if s.standardize:
            x_NX, t_ND = standardized(x_NX), standardized(t_ND)
        x_NX, t_ND = x_NX.to(s.device), t_ND.to(s.device)
        rng = np.random.default_rng(s.seed)
        train, halves = self._split(len(x_NX), rng)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(s.seed)
            objective = self.objective(x_NX.shape[1], t_ND.shape[1], s).to(s.device)
        optimizer = torch.optim.Adam(objective.parameters(), lr=s.learning_rate)

        def batch(images: np.ndarray) -> Tensor:
            drawn = rng.choice(images, min(s.batch_size, len(images)), replace=False)
            return torch.from_numpy(drawn).to(s.device)

        curves: list[list[Tensor]] = [[] for _ in halves] or [[]]
        for step in range(s.steps):
            if s.decay:
                optimizer.param_groups[0]['lr'] = s.learning_rate * min(1.0, 2 * (1 - step / s.steps))
            own_B = batch(train)
            other_B = own_B.roll(1) if s.marginals == 'shift' else batch(train)
            scores = objective.scores(x_NX[own_B], t_ND[own_B], t_ND[other_B])
            loss = objective.loss(scores)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            with torch.no_grad():
                if not halves:
                    curves[0].append(objective.bound(scores))
                elif (step + 1) % EVALUATE_EVERY == 0:
                    for curve, half in zip(curves, halves):
                        own_B = batch(half)
                        scores = objective.scores(x_NX[own_B], t_ND[own_B], t_ND[own_B.roll(1)])
                        curve.append(objective.bound(scores))
            if progress:
                progress(step + 1, s.steps)
        return self._read([torch.stack(curve).double().cpu().numpy() for curve in curves])

    def _split(self, images: int, rng: np.random.Generator) -> tuple[np.ndarray, list[np.ndarray]]:
        """Positions of the images to train on, and of the two held-out halves when there are any."""
        if not self.training.held_out:
            return np.arange(images), []
        order = rng.permutation(images)
        held = round(images * self.training.held_out)
        if held < 16 or images - held < 16:
            raise UserError(
                f'held_out={self.training.held_out} of {images} images leaves {held} to read the bound on and '
                f'{images - held} to train on: at least 16 of each are needed'
            )
        return order[held:], [order[: held // 2], order[held // 2 : held]]

    def _read(self, curves: list[np.ndarray]) -> Estimate:
        if not all(np.isfinite(curve).all() for curve in curves):
            raise UserError(f'{self.name} diverged: lower learning_rate, now {self.training.learning_rate}')
        if len(curves) == 1:
            window = curves[0][-self.training.window :]
            return Estimate(float(window.mean()), batch_means_error(window.tolist()), curves[0].tolist())
        nats, error = read_halves(curves[0], curves[1], max(4, self.training.window // EVALUATE_EVERY))
        return Estimate(nats, error, ((curves[0] + curves[1]) / 2).tolist(), EVALUATE_EVERY)


_PUBLISHED = Training(
    hidden=1024, layers=4, learning_rate=8e-5, decay=False, steps=10_000, batch_size=5000, average_rate=0.01,
    marginals='draw', standardize=False, held_out=0.0, window=500,
)  # fmt: skip
MINE_PRESETS = {
    'small': Training(),
    'published_xt': _PUBLISHED,
    'published_ty': settings_from(_PUBLISHED, 'mine', {'learning_rate': 1e-5, 'steps': 20_000}),
}


def mine(preset: str = 'small', **options: Any) -> NeuralEstimator:
    """Mutual information neural estimation (Belghazi et al., arXiv 1801.04062).

    Args:
        preset: 'published_xt' is what the CTC paper (arXiv 2203.03871) used for I(X;T), on raw pixels and pooled
            features, and 'published_ty' for I(T;Y), on pooled features and one-hot labels: hours on a processor.
            'small' is for processors, calibrated in docs/information.md, and reads the bound on held-out images.
        options: Fields of `Training` to change.

    Raises:
        UserError: An unknown preset or option, a setting that can't work.
    """
    if preset not in MINE_PRESETS:
        raise UserError(f'mine has no preset {preset!r}{nearest(preset, MINE_PRESETS)}')
    return NeuralEstimator('mine', PairObjective, settings_from(MINE_PRESETS[preset], 'mine', options))


_CONTRAST = Training(batch_size=512, steps=1000, window=50)


def infonce(**options: Any) -> NeuralEstimator:
    """InfoNCE (van den Oord et al., arXiv 1807.03748): little noise, but never above log(batch_size) nats.

    Args:
        options: Fields of `Training` to change.

    Raises:
        UserError: An unknown option, a setting that can't work.
    """
    return NeuralEstimator('infonce', ContrastObjective, settings_from(_CONTRAST, 'infonce', options))


def smile(**options: Any) -> NeuralEstimator:
    """SMILE (Song and Ermon, arXiv 1910.06222): clipping trades the noise of MINE's bound for bias.

    The clipped value is no lower bound: above about `clip` nats it overshoots.

    Args:
        options: Fields of `Training` to change.

    Raises:
        UserError: An unknown option, a setting that can't work.
    """
    return NeuralEstimator('smile', SmileObjective, settings_from(_CONTRAST, 'smile', options))
