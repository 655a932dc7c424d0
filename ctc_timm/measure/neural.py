"""Estimators that train a critic to tighten a lower bound of mutual information: MINE, InfoNCE, SMILE.

A critic scores pairs. Joint pairs are an image's own x and t, marginal pairs the x of one image and the t of another.
A bound says how much information is needed to distinguish the two kinds as well as the critic does.

Letters: N images, B batch, M marginal pairs, X and D coordinates of x and t, E embedding, H hidden, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import MLP

from ..utils.errors import UserError

EVALUATE_EVERY = 5  # steps between two readings of the held-out images
Progress = Callable[[int, int], None]
Values = Tensor | np.ndarray


@dataclass(frozen=True)
class Estimate:
    """One estimate of I(X;T)."""

    nats: float  # for `renyi` in nats of its own entropy
    standard_error: float  # noise of `nats` on these images, in nats; neither bias nor the spread over trainings
    curve: list[float] = field(default_factory=list, repr=False)  # the bound while its critic was trained
    curve_every: int = 1  # training steps between two points of the curve, and before the first


def paired(x: Values, t: Values) -> tuple[Tensor, Tensor]:
    """Check both variables, and return each as floats [N, X] or, for one-dimensional integers (labels), int64 [N].

    Raises:
        UserError: Different numbers of rows, fewer than 32, NaN or infinity, no coordinates.
    """
    if len(x) != len(t):
        raise UserError(f'x has {len(x)} rows and t has {len(t)}: one of each is needed for every image')
    if len(x) < 32:
        raise UserError(f'mutual information of {len(x)} images: at least 32 are needed')
    checked = []
    for name, values in (('x', x), ('t', t)):
        tensor = torch.as_tensor(values).detach()
        if tensor.is_complex() or not tensor.numel():
            raise UserError(f'{name} must be real numbers [N, ...] or labels [N], got {list(tensor.shape)}')
        if tensor.ndim == 1 and not tensor.is_floating_point():
            checked.append(tensor.long())
            continue
        tensor = tensor.reshape(len(tensor), -1)
        wrong = int((~tensor.isfinite().all(dim=1)).sum())
        if wrong:
            raise UserError(f'{name} has NaN or infinity in {wrong} of {len(tensor)} rows: leave those images out')
        checked.append(tensor if tensor.dtype == torch.float64 else tensor.float())
    return checked[0], checked[1]


def labels_of(values: Tensor) -> Tensor | None:
    """Return the class of each image, [N] from 0, of labels [N] or one-hot rows [N, C]; None for other numbers."""
    if values.ndim == 2:
        if values.shape[1] < 2 or not bool(((values == 0) | (values == 1)).all() and (values.sum(dim=1) == 1).all()):
            return None
        values = values.argmax(dim=1)
    return torch.unique(values, return_inverse=True)[1]


def numbers_of(values: Tensor) -> Tensor:
    """Return numbers [N, D] as they are and labels [N] as one-hot rows [N, C]; float32."""
    return values.float() if values.ndim == 2 else F.one_hot(torch.unique(values, return_inverse=True)[1]).float()


def donsker_varadhan(joint_B: Tensor, marginal_M: Tensor) -> Tensor:
    """Compute mean(joint) - log mean exp(marginal), Donsker and Varadhan's bound (MINE, arXiv 1801.04062, eq. 5)."""
    return joint_B.mean() - _log_mean_exp(marginal_M)


def _log_mean_exp(values_M: Tensor) -> Tensor:
    return torch.logsumexp(values_M, dim=0) - math.log(len(values_M))


def _off_diagonal(scores_BB: Tensor) -> Tensor:
    """Return all scores of pairs from different images, [B * (B - 1)]."""
    B = len(scores_BB)
    return scores_BB.flatten()[1:].view(B - 1, B + 1)[:, :-1].flatten()


@dataclass(frozen=True)
class InfoNCE:
    """InfoNCE (van den Oord et al., arXiv 1807.03748): little noise, but never above log(batch_size) nats.

    A critic is trained on pairs of x and t, and a bound is read off. Its score is the inner product of an embedding of
    x and one of t, over sqrt(E); scores are [B, B]. MINE and SMILE have other critics and bounds.

    With `held_out=0`, the published form, the estimate is the mean of the bound over the last `window` steps, each on
    the batch just trained on. A critic can memorize images, so this is no lower bound on a finite sample. Else that
    share of the images is kept from training and cut in two halves, on a batch of each of which the bound is read every
    5 steps, see `read_halves`: stopping early costs no bias, for no image helps to choose its own window.
    """

    seed: int = 0  # of all random draws
    device: str | torch.device = 'cpu'
    hidden: int = 256  # H, width of the perceptron
    layers: int = 2  # its linear layers, with ReLU between them
    embed: int = 32  # E, size of the embeddings whose inner product is the score; `infonce` and `smile`
    learning_rate: float = 1e-3  # of Adam
    decay: bool = True  # lower it linearly to zero over the second half of the steps
    steps: int = 1000
    batch_size: int = 512  # B, images a step drawn without replacement, all of them when there are fewer
    average_rate: float = 0.1  # share of the new value in the moving average of the exponential term; `mine`
    clip: float = 5.0  # bound of the marginal scores; `smile`
    # Pair the batch's x with the t of the batch's next image; else with that of a second, independent draw, in which an
    # image may meet itself. `mine`; the others use all pairs of different images in the batch.
    shift_marginals: bool = True
    standardize: bool = True  # give each coordinate mean zero and deviation one over all N images first
    held_out: float = 0.5  # share of the images kept from training; 0 reads the bound on the images trained on
    window: int = 50  # steps over which the bound is averaged

    def critic(self, x_dim: int, t_dim: int) -> Any:
        """Create the critic of x [B, X] and t [B, D]."""
        return nn.ModuleList([self.perceptron(dim, self.embed) for dim in (x_dim, t_dim)])

    def perceptron(self, inputs: int, outputs: int) -> nn.Sequential:
        """Create linear layers with ReLU between them."""
        return nn.Sequential(*MLP(inputs, [self.hidden] * (self.layers - 1) + [outputs]))

    def scores(self, critic: Any, x_BX: Tensor, t_BD: Tensor, other_BD: Tensor) -> Tensor:
        """Score joint and marginal pairs; `other_BD` is the t of other images, for critics that take pairs."""
        return critic[0](x_BX) @ critic[1](t_BD).T / math.sqrt(self.embed)

    def bound(self, scores: Tensor) -> Tensor:
        """Compute mean_i(s_ii - log mean_j exp s_ij), in nats (arXiv 1905.06922, eq. 10)."""
        return (scores.diagonal() - scores.logsumexp(dim=1)).mean() + math.log(len(scores))

    def loss(self, critic: Any, scores: Tensor) -> Tensor:
        """Compute what is minimized."""
        return -self.bound(scores)

    def estimate(self, x: Values, t: Values, progress: Progress | None = None) -> Estimate:
        """Estimate I(X;T) of numbers [N, ...], class labels [N] or one-hot rows [N, C], of the same images.

        `progress(step, steps)` is called after each training step. The error is that of batch means over the window.

        Raises:
            UserError: See `paired`; too few images to hold out; a training that diverged.
        """
        x_NX, t_ND = (numbers_of(v) for v in paired(x, t))
        if self.standardize:
            x_NX, t_ND = standardized(x_NX), standardized(t_ND)
        x_NX, t_ND = x_NX.to(self.device), t_ND.to(self.device)
        rng = np.random.default_rng(self.seed)
        train, halves = self._split(len(x_NX), rng)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            critic = self.critic(x_NX.shape[1], t_ND.shape[1]).to(self.device)
        optimizer = torch.optim.Adam(critic.parameters(), lr=self.learning_rate)

        def batch(images: np.ndarray) -> Tensor:
            drawn = rng.choice(images, min(self.batch_size, len(images)), replace=False)
            return torch.from_numpy(drawn).to(self.device)

        def score(index_B: Tensor, other_B: Tensor) -> Tensor:
            return self.scores(critic, x_NX[index_B], t_ND[index_B], t_ND[other_B])

        curves: list[list[Tensor]] = [[] for _ in halves] or [[]]
        for step in range(1, self.steps + 1):
            if self.decay:
                optimizer.param_groups[0]['lr'] = self.learning_rate * min(1.0, 2 * (1 - (step - 1) / self.steps))
            index_B = batch(train)
            scores = score(index_B, index_B.roll(1) if self.shift_marginals else batch(train))
            optimizer.zero_grad()
            self.loss(critic, scores).backward()
            optimizer.step()
            with torch.no_grad():
                if not halves:
                    curves[0].append(self.bound(scores))
                elif step % EVALUATE_EVERY == 0:
                    for curve, half in zip(curves, halves):
                        index_B = batch(half)
                        curve.append(self.bound(score(index_B, index_B.roll(1))))
            if progress:
                progress(step, self.steps)
        return self._read([torch.stack(curve).double().cpu().numpy() for curve in curves])

    def _split(self, images: int, rng: np.random.Generator) -> tuple[np.ndarray, list[np.ndarray]]:
        """Draw the images to train on, and the two held-out halves when there are any."""
        if not self.held_out:
            return np.arange(images), []
        order = rng.permutation(images)
        held = round(images * self.held_out)
        if held < 16 or images - held < 16:
            left = f'{held} to read the bound on and {images - held} to train on'
            raise UserError(f'held_out={self.held_out} of {images} images leaves {left}: at least 16 each are needed')
        return order[held:], [order[: held // 2], order[held // 2 : held]]

    def _read(self, curves: list[np.ndarray]) -> Estimate:
        if not all(np.isfinite(curve).all() for curve in curves):
            raise UserError(f'{type(self).__name__} diverged: lower learning_rate, now {self.learning_rate}')
        if len(curves) == 1:
            window = curves[0][-self.window :]
            return Estimate(float(window.mean()), batch_means_error(window), curves[0].tolist())
        nats, error = read_halves(curves[0], curves[1], max(4, self.window // EVALUATE_EVERY))
        return Estimate(nats, error, ((curves[0] + curves[1]) / 2).tolist(), EVALUATE_EVERY)


@dataclass(frozen=True)
class Mine(InfoNCE):
    """Mutual information neural estimation (Belghazi et al., arXiv 1801.04062): a perceptron on x and t side by side.

    Scores are [2, B], joint and marginal.
    """

    steps: int = 1500
    batch_size: int = 1024
    window: int = 200

    def critic(self, x_dim: int, t_dim: int) -> Any:
        critic: Any = self.perceptron(x_dim + t_dim, 1)
        critic.log_average = None
        return critic

    def scores(self, critic: Any, x_BX: Tensor, t_BD: Tensor, other_BD: Tensor) -> Tensor:
        # The first layer of [x, t] is a sum of two products; that of x, nearly all of it when x is an image, serves
        # the joint and the marginal pair.
        of_x_HX, of_t_HD = critic[0].weight.split([x_BX.shape[1], t_BD.shape[1]], dim=1)
        from_x_BH = F.linear(x_BX, of_x_HX, critic[0].bias)
        hidden_2BH = torch.stack([from_x_BH + F.linear(t, of_t_HD) for t in (t_BD, other_BD)])
        return critic[1:](hidden_2BH).squeeze(-1)

    def bound(self, scores: Tensor) -> Tensor:
        return donsker_varadhan(scores[0], scores[1])

    def loss(self, critic: Any, scores: Tensor) -> Tensor:
        """Compute -(mean(joint) - E / average), the average held constant (eq. 12), for E = mean exp(marginal).

        The gradient of log E is biased, grad(E) / E with a noisy E below; so E below is its moving average over steps,
        the present batch taken in first. It is kept as its logarithm.
        """
        log_mean = _log_mean_exp(scores[1])
        log_average = log_mean.detach()
        if critic.log_average is not None:
            before = critic.log_average + math.log1p(-self.average_rate)
            log_average = torch.logaddexp(before, log_average + math.log(self.average_rate))
        critic.log_average = log_average
        return -(scores[0].mean() - (log_mean - log_average).exp())


class Smile(InfoNCE):
    """SMILE (Song and Ermon, arXiv 1910.06222): InfoNCE's critic, trained by Jensen and Shannon's bound.

    The clipped bound that is read trades the noise of MINE's for bias: above about `clip` nats it overshoots.
    """

    def bound(self, scores: Tensor) -> Tensor:
        """Compute Donsker and Varadhan's bound with marginal scores clipped to [-clip, clip] (eq. 16)."""
        return donsker_varadhan(scores.diagonal(), _off_diagonal(scores).clamp(-self.clip, self.clip))

    def loss(self, critic: Any, scores: Tensor) -> Tensor:
        """Compute mean softplus(-joint) + mean softplus(marginal); its best critic is the log density ratio."""
        return F.softplus(-scores.diagonal()).mean() + F.softplus(_off_diagonal(scores)).mean()


# What the CTC paper (arXiv 2203.03871) used for I(X;T), on raw pixels and pooled features, and for I(T;Y), on pooled
# features and one-hot labels: hours on a processor. 'small' is for processors, calibrated in docs/information.md.
_PUBLISHED = Mine(
    hidden=1024, layers=4, learning_rate=8e-5, decay=False, steps=10_000, batch_size=5000, average_rate=0.01,
    shift_marginals=False, standardize=False, held_out=0.0, window=500,
)  # fmt: skip
MINE_PRESETS = {
    'small': Mine(),
    'published_xt': _PUBLISHED,
    'published_ty': replace(_PUBLISHED, learning_rate=1e-5, steps=20_000),
}


def standardized(values_ND: Tensor) -> Tensor:
    """Give each coordinate mean zero and deviation one; a constant one becomes zero. [N, D]"""
    centered_ND = values_ND - values_ND.mean(dim=0)
    deviation_D = centered_ND.square().mean(dim=0).sqrt()
    # What is left of a constant after rounding must not be blown up to a deviation of one.
    constant_D = deviation_D <= 1e-6 * values_ND.abs().amax(dim=0)
    return torch.where(constant_D, 0.0, centered_ND / deviation_D.masked_fill(constant_D, 1.0))


def read_halves(first: np.ndarray, second: np.ndarray, length: int) -> tuple[float, float]:
    """Read the bound of each held-out half where the other half's is best over `length` points, and average.

    A critic that scores all pairs alike has the bound zero. It counts as a choice too, so where no window of the other
    half is above zero the reading is zero. The error is that of batch means, or half the readings' difference if more.
    """
    readings, errors = [], []
    for read, chosen_by in ((first, second), (second, first)):
        means = np.convolve(chosen_by, np.full(length, 1 / length), mode='valid')
        start = int(means.argmax())
        window = read[start : start + length]
        readings.append(float(window.mean()) if means[start] > 0 else 0.0)
        errors.append(batch_means_error(window, batches=10))
    return sum(readings) / 2, max(math.hypot(*errors), abs(readings[0] - readings[1])) / 2


def batch_means_error(values: np.ndarray, batches: int = 20) -> float:
    """Compute the standard error of the mean of an autocorrelated series, by non-overlapping batch means.

    Neighboring values of a training curve resemble each other, so deviation / sqrt(number) would claim too much. The
    means of long enough stretches are nearly independent; their deviation over sqrt(stretches) is the error. Infinity
    for a series shorter than four values.
    """
    batches = min(batches, len(values) // 2)
    if batches < 2:
        return math.inf
    length = len(values) // batches
    means = np.asarray(values[len(values) - batches * length :]).reshape(batches, length).mean(axis=1)
    return float(means.std(ddof=1) / math.sqrt(batches))
