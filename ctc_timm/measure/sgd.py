"""The published transfer protocol: a new linear head trained by SGD on frozen features.

Learning rate 0.4, momentum 0.9, weight decay 5e-4 on weights and bias, a cosine over 30 epochs, batches of 512, the
features as they are. The published numbers are those of the epoch that is best on the test set, which flatters them.

Letters: N training images, M test images, D feature size, C classes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .features import LabeledFeatures
from .scores import point_scores

EPOCHS, BATCH_SIZE = 30, 512


def train_head(
    train: LabeledFeatures, test: LabeledFeatures, num_classes: int, seed: int = 0
) -> tuple[Tensor, Tensor, int]:
    """Train a linear head by the published protocol; the learning rate is 0.2 (1 + cos(pi e / 30)) in epoch e from 0.

    The head and each epoch's order are drawn on the CPU, the same for every device; the caller's random state is left
    as it was.

    Returns:
        Test logits [M, C] after the last epoch, those after the epoch of the highest test top-1 (the first if
        several), and that epoch, counted from 1.
    """
    device = train.features_ND.device
    features_ND, test_MD = train.features_ND.float(), test.features_ND.float()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would also seed the accelerators
        head = nn.Linear(features_ND.shape[1], num_classes).to(device)
        orders = [torch.randperm(len(train)) for _ in range(EPOCHS)]
    optimizer = torch.optim.SGD(head.parameters(), lr=0.4, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS)
    best, best_epoch = -1.0, 0
    for epoch, order_N in enumerate(orders, 1):
        for batch_B in order_N.to(device).split(BATCH_SIZE):
            optimizer.zero_grad()
            with torch.enable_grad():
                F.cross_entropy(head(features_ND[batch_B]), train.labels_N[batch_B]).backward()
            optimizer.step()
        schedule.step()
        with torch.no_grad():
            last_MC = head(test_MD)
        top1 = point_scores(last_MC, test.labels_N)['top1']
        if top1 > best:
            best, best_epoch, best_MC = top1, epoch, last_MC
    return last_MC, best_MC, best_epoch
