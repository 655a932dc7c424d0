"""Frozen features with labels: what every measure takes, and whether it can be measured at all.

Letters: N images, D feature size, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..utils.errors import UserError

BLOCK_ROWS = 8192


@dataclass(frozen=True)
class LabeledFeatures:
    """Features of images and the class of each."""

    features_ND: Tensor  # pooled, before the classifier
    labels_N: Tensor  # int64, counted from 0
    logits_NC: Tensor | None = None  # of the model's own classifier, where they were computed

    def __len__(self) -> int:
        return len(self.labels_N)

    def select(self, chosen: Tensor) -> LabeledFeatures:
        """Return the images at these positions, or where this mask is true, without logits."""
        return LabeledFeatures(self.features_ND[chosen], self.labels_N[chosen])

    def to(self, device: torch.device | str) -> LabeledFeatures:
        """Return features and labels on a device, without logits."""
        return LabeledFeatures(self.features_ND.to(device), self.labels_N.to(device))


def check_sets(
    train: LabeledFeatures,
    test: LabeledFeatures,
    num_classes: int,
    what: str = 'the target',
    class_names: Sequence[str] | None = None,
) -> None:
    """Refuse sets on which no probe can be fitted or measured; messages begin with `what`, the data set.

    A class without an image in either set is allowed.

    Raises:
        UserError: No images; a label outside 0 to C - 1; one class only; a class in one set and absent from the
            other; features that are not finite.
    """
    parts, present = {'training': train, 'test': test}, {}
    for name, part in parts.items():
        if not len(part):
            raise UserError(f'{what}: no {name} images')
        classes = part.labels_N.unique().tolist()
        if classes[0] < 0 or classes[-1] >= num_classes:
            span = f'from {classes[0]} to {classes[-1]}'
            raise UserError(f'{what}: {name} labels run {span}, but must lie between 0 and {num_classes - 1}')
        present[name] = set(classes)
    if len(present['training'] | present['test']) < 2:
        only = class_label(int(train.labels_N[0]), class_names)
        raise UserError(f'{what}: every image is of {only}, but a probe needs at least two classes')
    for name, other in (('test', 'training'), ('training', 'test')):
        absent = sorted(present[other] - present[name])
        if absent:
            more = f' and {len(absent) - 1} more' if len(absent) > 1 else ''
            raise UserError(
                f'{what}: no {name} images of {class_label(absent[0], class_names)}{more}, of which there are {other} '
                'images; both splits must hold the same classes'
            )
    for name, part in parts.items():
        check_finite(part.features_ND, f'{what}: the {name} features')


def check_finite(features_ND: Tensor, what: str) -> None:
    """Refuse features [N, D] with NaN or infinite entries by a UserError that begins with `what`."""
    bad = int((~torch.isfinite(features_ND).all(dim=1)).sum())
    if bad:
        images = f'{bad} of {len(features_ND)} images'
        raise UserError(f'{what} of {images} are NaN or infinite; take weights from before the training diverged')


def class_label(number: int, class_names: Sequence[str] | None) -> str:
    """Return a class as messages name it: `class 3` or `class 3 ('cat')`."""
    return f'class {number}' if class_names is None else f'class {number} ({class_names[number]!r})'


def unit_rows(features_ND: Tensor) -> Tensor:
    """Normalize each row to unit length, in float32 or better; a zero row stays zero.

    A row is divided by its largest entry first, so that no scale of the features over- or underflows.
    """
    rows_ND = features_ND.to(torch.promote_types(features_ND.dtype, torch.float32))
    largest_N1 = rows_ND.abs().amax(dim=1, keepdim=True)
    rows_ND = rows_ND / torch.where(largest_N1 > 0, largest_N1, 1.0)
    return rows_ND / rows_ND.norm(dim=1, keepdim=True).clamp_min(1)


def float64_device(device: torch.device | str) -> torch.device:
    """Return the device, or the CPU in place of one without float64 (Apple's)."""
    device = torch.device(device)
    return torch.device('cpu') if device.type == 'mps' else device


def exact_mean(features_ND: Tensor) -> Tensor:
    """Average over images, [D], float64, such that a constant feature differs from its mean by exactly zero.

    The differences from the first image are summed: a plain mean leaves a rounding error in a dead feature, which a
    division by its variance would blow up.
    """
    origin_D = features_ND[0].double()
    return origin_D + sum((b.double() - origin_D).sum(dim=0) for b in features_ND.split(BLOCK_ROWS)) / len(features_ND)


def gram(features_ND: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the mean of the features and the smaller of their two second-moment matrices, float64.

    Returns:
        mean [D], and with X the features less their mean, the covariance X'X / N, [D, D], or when there are fewer
        images than features X X' / N, [N, N], which has the same eigenvalues but for zeros.
    """
    count, size = features_ND.shape
    mean_D = exact_mean(features_ND)
    if count < size:
        centered_ND = features_ND.double() - mean_D
        return mean_D, centered_ND @ centered_ND.T / count
    gram_DD = torch.zeros(size, size, dtype=torch.float64, device=features_ND.device)
    for block_BD in features_ND.split(BLOCK_ROWS):  # a float64 copy of all the features would be large
        centered_BD = block_BD.double() - mean_D
        gram_DD.addmm_(centered_BD.T, centered_BD)
    return mean_D, gram_DD / count
