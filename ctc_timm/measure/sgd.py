"""The published transfer protocol: a new linear head trained by SGD on frozen features.

Learning rate 0.4, momentum 0.9, weight decay 5e-4 on weights and bias, a cosine over 30 epochs, batches of 512, no
augmentation, the features as they are. It is not free of their scale, as the other probes are. The published numbers
are those of the epoch that is best on the test set, which flatters them; the last epoch has no such choice in it.

Letters: N training images, M test images, D feature size, C classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .scores import point_scores
from .sets import Labeled

LEARNING_RATE, MOMENTUM, WEIGHT_DECAY = 0.4, 0.9, 5e-4
EPOCHS, BATCH_SIZE = 30, 512


@dataclass(frozen=True)
class SgdRun:
    """What training a head gave.

    Attributes:
        last_MC: Test logits after the last epoch, [M, C].
        best_MC: Test logits after the epoch of the highest test top-1, the first if several.
        best_epoch: That epoch, counted from 1.
        curve: Test top-1 after each epoch, percent.
    """

    last_MC: Tensor
    best_MC: Tensor
    best_epoch: int
    curve: tuple[float, ...]


def train_head(train: Labeled, test: Labeled, num_classes: int, seed: int = 0) -> SgdRun:
    """Train a linear head by the published protocol.

    The head starts as `torch.nn.Linear` initializes it after `torch.manual_seed(seed)`, and each epoch's order is the
    next `torch.randperm(N)`. Both are drawn on the CPU, the same for every device, and the caller's random state is
    left as it was. The learning rate changes once an epoch, 0.2 (1 + cos(pi e / 30)) in epoch e from 0.

    Args:
        train: What to train on.
        test: What to measure on, after each epoch.
        num_classes: C.
        seed: Of initialization and order.
    """
    device = train.features_ND.device
    features_ND, test_MD = train.features_ND.float(), test.features_ND.float()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would also seed the accelerators
        head = nn.Linear(features_ND.shape[1], num_classes).to(device)
        orders = [torch.randperm(len(train)) for _ in range(EPOCHS)]
    optimizer = torch.optim.SGD(head.parameters(), lr=LEARNING_RATE, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS)
    curve: list[float] = []
    best_MC = last_MC = torch.empty(0)
    for order_N in orders:
        for batch_B in order_N.to(device).split(BATCH_SIZE):
            optimizer.zero_grad()
            with torch.enable_grad():
                F.cross_entropy(head(features_ND[batch_B]), train.labels_N[batch_B]).backward()
            optimizer.step()
        schedule.step()
        with torch.no_grad():
            last_MC = head(test_MD)
        curve.append(point_scores(last_MC, test.labels_N)['top1'])
        if curve[-1] > max(curve[:-1], default=-1.0):
            best_MC = last_MC
    return SgdRun(last_MC, best_MC, curve.index(max(curve)) + 1, tuple(curve))
