"""MINE, the mutual information neural estimator (Belghazi et al., arXiv 1801.04062), and what all estimators share.

A critic is trained to score joint pairs, an image's own x and t, and marginal pairs, the x of one image and the t of
another. Letters: N images, B batch, M marginal pairs, X and D coordinates of x and t, C classes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import MLP

from ..utils.errors import UserError

EVALUATE_EVERY = 5  # steps between two readings of the held-out images
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

    A UserError: different numbers of rows, fewer than 32, NaN or infinity, no coordinates.
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
        if wrong := int((~tensor.isfinite().all(dim=1)).sum()):
            raise UserError(f'{name} has NaN or infinity in {wrong} of {len(tensor)} rows: leave those images out')
        checked.append(tensor if tensor.dtype == torch.float64 else tensor.float())
    return checked[0], checked[1]


def donsker_varadhan(joint_B: Tensor, marginal_M: Tensor) -> Tensor:
    """Compute mean(joint) - log mean exp(marginal), Donsker and Varadhan's bound (eq. 5)."""
    return joint_B.mean() - _log_mean_exp(marginal_M)


def mine_loss(scores_2B: Tensor, log_average: Tensor | None, average_rate: float) -> tuple[Tensor, Tensor]:
    """Compute -(mean(joint) - E / average), the average held constant (eq. 12), and the log of the new average.

    The gradient of the log of E = mean exp(marginal) is biased, grad(E) / E with a noisy E below; so E below is its
    moving average over steps, the present batch taken in first.
    """
    log_mean = _log_mean_exp(scores_2B[1])
    new_average = log_mean.detach()
    if log_average is not None:
        before = log_average + math.log1p(-average_rate)
        new_average = torch.logaddexp(before, new_average + math.log(average_rate))
    return -(scores_2B[0].mean() - (log_mean - new_average).exp()), new_average


def _log_mean_exp(values_M: Tensor) -> Tensor:
    return torch.logsumexp(values_M, dim=0) - math.log(len(values_M))


@dataclass(frozen=True)
class Mine:
    """MINE, whose critic is a perceptron on x and t side by side.

    With `held_out=0` the estimate is the mean of the bound over the last `window` steps, each on the batch just trained
    on: the published form, no lower bound on a finite sample, for a critic can memorize images. Above 0 that share of
    the images is kept from training and cut in two halves. Every 5 steps the bound is read on a batch of each, see
    `read_halves`: stopping early costs no bias, for no image helps to choose its own window.
    """

    seed: int = 0  # of all random draws
    device: str | torch.device = 'cpu'
    hidden: int = 256  # width of the perceptron
    layers: int = 2  # its linear layers, with ReLU between them
    learning_rate: float = 1e-3  # of Adam
    decay: bool = True  # lower it linearly to zero over the second half of the steps
    steps: int = 1500
    batch_size: int = 1024  # B, images a step drawn without replacement, all of them when there are fewer
    average_rate: float = 0.1  # share of the new value in the moving average of the exponential term
    # Pair the batch's x with the t of the batch's next image; else with that of a second, independent draw, in which an
    # image may meet itself.
    shift_marginals: bool = True
    standardize: bool = True  # give each coordinate mean zero and deviation one over all N images first
    held_out: float = 0.5  # share of the images kept from training; 0 reads the bound on the images trained on
    window: int = 200  # steps over which the bound is averaged

    def estimate(self, x: Values, t: Values) -> Estimate:
        """Estimate I(X;T) of numbers [N, ...], class labels [N] or one-hot rows [N, C], of the same images.

        A UserError: see `paired`; too few images to hold out; a training that diverged.
        """
        x_NX, t_ND = (v if v.ndim == 2 else F.one_hot(v.unique(return_inverse=True)[1]) for v in paired(x, t))
        x_NX, t_ND = x_NX.float(), t_ND.float()
        if self.standardize:
            x_NX, t_ND = _standardized(x_NX), _standardized(t_ND)
        x_NX, t_ND = x_NX.to(self.device), t_ND.to(self.device)
        sizes, rng = [x_NX.shape[1], t_ND.shape[1]], np.random.default_rng(self.seed)
        train, halves = self._split(len(x_NX), rng)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(self.seed)  # torch.manual_seed would also seed all accelerators
            critic = nn.Sequential(*MLP(sum(sizes), [self.hidden] * (self.layers - 1) + [1])).to(self.device)
        first: Any = critic[0]
        optimizer = torch.optim.Adam(critic.parameters(), lr=self.learning_rate)

        def batch(images: np.ndarray) -> Tensor:
            drawn = rng.choice(images, min(self.batch_size, len(images)), replace=False)
            return torch.from_numpy(drawn).to(self.device)

        def score(index_B: Tensor, other_B: Tensor) -> Tensor:
            """Score joint and marginal pairs, [2, B]; the product with x, often an image, serves both."""
            of_x_HX, of_t_HD = first.weight.split(sizes, dim=1)
            from_x_BH = F.linear(x_NX[index_B], of_x_HX, first.bias)
            hidden_2BH = torch.stack([from_x_BH + F.linear(t_ND[i], of_t_HD) for i in (index_B, other_B)])
            return critic[1:](hidden_2BH).squeeze(-1)

        curves, log_average = [list[Tensor]() for _ in halves or [train]], None
        for step in range(1, self.steps + 1):
            if self.decay:
                optimizer.param_groups[0]['lr'] = self.learning_rate * min(1.0, 2 * (1 - (step - 1) / self.steps))
            index_B = batch(train)
            scores_2B = score(index_B, index_B.roll(1) if self.shift_marginals else batch(train))
            loss, log_average = mine_loss(scores_2B, log_average, self.average_rate)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            with torch.no_grad():
                if not halves:
                    curves[0].append(donsker_varadhan(*scores_2B))
                elif step % EVALUATE_EVERY == 0:
                    for curve, half in zip(curves, halves):
                        index_B = batch(half)
                        curve.append(donsker_varadhan(*score(index_B, index_B.roll(1))))
        read = [torch.stack(curve).double().cpu().numpy() for curve in curves]
        if not all(np.isfinite(curve).all() for curve in read):
            raise UserError(f'MINE diverged: lower learning_rate, now {self.learning_rate}')
        if not halves:
            window = read[0][-self.window :]
            return Estimate(float(window.mean()), batch_means_error(window), read[0].tolist())
        nats, error = read_halves(read[0], read[1], max(4, self.window // EVALUATE_EVERY))
        return Estimate(nats, error, ((read[0] + read[1]) / 2).tolist(), EVALUATE_EVERY)

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


def _standardized(values_ND: Tensor) -> Tensor:
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

    Neighboring values of a curve resemble each other; the means of long enough stretches are nearly independent.
    Infinity for a series shorter than four values.
    """
    batches = min(batches, len(values) // 2)
    if batches < 2:
        return math.inf
    length = len(values) // batches
    means = np.asarray(values[len(values) - batches * length :]).reshape(batches, length).mean(axis=1)
    return float(means.std(ddof=1) / math.sqrt(batches))
