"""How well semantic masks agree: mean intersection over union and pixel accuracy, from a confusion matrix.

K: classes. Rows of the matrix are the true classes, columns the predicted ones.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .masks import IGNORE

METRICS = ('miou', 'pixel_accuracy', 'mean_accuracy')


def confusion(predicted: Tensor, truth: Tensor, num_classes: int) -> Tensor:
    """Count pixels by true and predicted class.

    Args:
        predicted: Classes, any shape.
        truth: Classes, the same shape; pixels of `IGNORE` don't count.
        num_classes: K.

    Returns:
        [K, K], int64.
    """
    counted = truth != IGNORE
    pairs = truth[counted].long() * num_classes + predicted[counted].long()
    return torch.bincount(pairs, minlength=num_classes**2).reshape(num_classes, num_classes)


def scores(matrix_KK: Tensor, names: Sequence[str] | None = None) -> dict[str, float]:
    """Metrics of a confusion matrix, 0 to 1.

    Intersection over union of a class is its hits over all pixels that are, or are said to be, of it (Everingham et al.
    2010, section 4.4). A class that neither is nor is said to be anywhere has none, and does not count in the mean;
    a class without true pixels does not count in the mean accuracy.

    Args:
        matrix_KK: Of `confusion`, summed over images.
        names: Of the classes, for intersection over union of each.

    Returns:
        miou, pixel_accuracy, mean_accuracy; with names also `iou/NAME` of every class that has one.
    """
    matrix_KK = matrix_KK.double().cpu()
    hits_K, true_K, said_K = matrix_KK.diagonal(), matrix_KK.sum(1), matrix_KK.sum(0)
    union_K = true_K + said_K - hits_K
    iou_K = hits_K / union_K
    found = {
        'miou': float(iou_K[union_K > 0].mean()),
        'pixel_accuracy': float(hits_K.sum() / true_K.sum()),
        'mean_accuracy': float((hits_K / true_K)[true_K > 0].mean()),
    }
    each = {f'iou/{name}': float(iou_K[i]) for i, name in enumerate(names or ()) if union_K[i] > 0}
    return {**found, **each}
