"""Which bank rows an image is contrasted with: rows of other classes only, drawn on the training device.

A step must not wait for the device. What is the same in every step, such as sizes of classes, is therefore read once.

Letters: B batch (of all ranks together where banks are sharded), C classes, K negatives an image, M rows of other
classes, N instances, P classes that an image is mixed from, R rows shared by a batch or held by a rank, S rows drawn.
"""

from __future__ import annotations

import math
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from ..utils.errors import UserError
from .sharding import BankShard

MODES = ('sampled', 'shared', 'all')
POSITIVES = ('exact', 'relaxed')

# With fewer bank rows per negative it is cheaper to score and weight the whole bank than to gather each image's rows.
WHOLE_BANK_RATIO = 12
# Rows that a draw looks through at a time: 2 MiB of their order stay in a CPU core's cache.
_BLOCK = 1 << 19
_BLOCK_GPU = 1 << 25


class Negatives(NamedTuple):
    """A step's negatives, and its positives, from the sampler to the loss. Rows are places in this rank's shard."""

    count_B: Tensor  # sum of each image's weights
    scale_B: Tensor  # factor of each image's sum over its negatives, so that they stand for K
    positives_B: Tensor  # each image's positive, by its number in the whole bank; of this rank's images
    rows: Tensor | None = None  # [B, K], each image's; [R], those of the whole batch; None, the whole bank, R = N
    weights_BR: Tensor | None = None  # booleans, which rows count for which image, or how much; None with [B, K]
    classes_BP: Tensor | None = None  # in place of weights: a row counts whose label is none of the image's classes
    labels_R: Tensor | None = None

    @classmethod
    def of_rows(cls, rows: Tensor | None, scale_B: Tensor, positives_B: Tensor, num_rows: int) -> Negatives:
        """Wrap rows of a bank of so many, counted as often as they are named, in the form cheapest to visit."""
        B, K, times_BR = len(scale_B), num_rows if rows is None else rows.shape[-1], None
        if rows is not None and rows.shape not in ((B, K), (K,)):
            raise UserError(f'negatives must be [B, K], [R] or None, got shape {tuple(rows.shape)}')
        if rows is not None and rows.ndim == 2 and num_rows <= WHOLE_BANK_RATIO * K:
            times_BR = torch.zeros(B, num_rows, device=rows.device)
            times_BR.scatter_add_(1, rows, times_BR.new_ones(()).expand(B, K))
            rows = None
        return cls(torch.full_like(scale_B, K), scale_B, positives_B, rows, times_BR)


class NegativeSampler:
    """Draws negatives, and positives of the same class, with a generator of its own.

    `sampled` gives each image K rows of other classes, without repetition where there are that many and with repetition
    where there are not, as in the paper's code. `shared` draws K rows once for the batch and leaves out, image by
    image, those of the image's class; the sum over the rest is scaled to K rows, and by how often there is a rest, so
    that the loss has the same expectation. `all` draws nothing: every row of another class counts K / M times, which is
    that expectation itself.

    Args:
        labels_N, num_negatives, mode: Class of each training image, [N], integers from 0; K; one of the above.
        positives: 'exact' takes the image itself, 'relaxed' a random image of its class.
        seed, rank, device: Of the generator. Ranks share it for `shared`, not for `sampled` and not with shards.
        split: This rank's shard of the banks. It then draws its share of K of its rows for the images of all ranks,
            weighted so that the ranks' sums together stand for K rows of the whole bank, in expectation.

    Raises UserError on K below the number of ranks, fewer than two classes, unknown modes, labels not [N] integers.
    """

    def __init__(
        self,
        labels_N: Tensor,
        num_negatives: int = 16384,
        mode: str = 'sampled',
        positives: str = 'exact',
        seed: int = 42,
        rank: int = 0,
        device: torch.device | str = 'cpu',
        split: BankShard | None = None,
    ) -> None:
        for name, value, known in (('negatives', mode, MODES), ('positives', positives, POSITIVES)):
            if value not in known:
                raise UserError(f'`{name}` {value!r}: must be one of {", ".join(known)}')
        labels_N = torch.as_tensor(labels_N)
        self.shard = split or BankShard(labels_N.numel())
        if num_negatives < self.shard.world:
            raise UserError(f'`num_negatives` {num_negatives}: must be at least {self.shard.world}, one a process')
        if labels_N.ndim != 1 or labels_N.is_floating_point():
            raise UserError(f'labels must be [N] integers, got {labels_N.dtype} of shape {tuple(labels_N.shape)}')
        if (labels_N < 0).any():
            raise UserError(f'labels must not be negative, got {int(labels_N.min())}')
        sizes_C = torch.bincount(labels_N.long().cpu())
        num_classes = int((sizes_C > 0).sum())
        if num_classes < 2:
            raise UserError('negatives come from other classes, but the data set has fewer than two classes')
        self.num_negatives, self.mode, self.positives = num_negatives, mode, positives
        self.device = torch.device(device)
        self.generator = torch.Generator(device=self.device)
        alike = mode == 'shared' and self.shard.world == 1  # on all ranks
        self.generator.manual_seed(seed if alike else seed + 7919 * rank)
        # An image mixed from both of two classes has no third; its partner's class then counts as another.
        self._two_classes = num_classes == 2
        labels_N = labels_N.long().to(self.device)
        self._whole = _ByClass(labels_N, len(sizes_C))
        held_R = labels_N[self.shard.rows(self.device)]
        self._held = self._whole if self.shard.world == 1 else _ByClass(held_R, len(sizes_C))
        self._draw_size = len(range(self.shard.rank, num_negatives, self.shard.world))
        # How many rows of other classes an image has here: at the least, by P, and at the most.
        held_C = self._held.sizes_C.cpu()
        self._least = (self._held.num_rows - held_C.sort(descending=True).values[:2].cumsum(0)).tolist()
        self._most = self._held.num_rows - int(held_C[sizes_C > 0].min())

    def draw(self, index_B: Tensor, partner_B: Tensor | None = None) -> Negatives:
        """Draw rows to contrast this rank's images with; leave out the classes of images mixed into them, too."""
        whole, held, K = self._whole, self._held, self.num_negatives
        positives_B = index_B
        if self.positives == 'relaxed':
            positives_B = whole.same_class(whole.labels_R[index_B], self._integers(2**31, *index_B.shape))
        images = [index_B] if partner_B is None or self._two_classes else [index_B, partner_B]
        index_BP = torch.stack(images, dim=1)
        classes_BP = whole.labels_R[self.shard.gather(index_BP)]
        held_B, others_B = held.count_others(classes_BP), whole.count_others(classes_BP)
        if self.mode == 'all':
            return Negatives(held_B, K / others_B, positives_B, None, None, classes_BP, held.labels_R)
        # What the rows drawn here stand for: of K rows of the whole bank so many would be of those held here.
        share_B = K * held_B / others_B
        if self.mode == 'shared':
            rows_R = self._shared_rows()
            other_BR = ~is_own_class(classes_BP, held.labels_R[rows_R])
            count_B = other_BR.sum(dim=1)
            share_B = share_B / self._chance_of_any(held_B, classes_BP.shape[1])
            return Negatives(count_B, share_B / count_B.clamp(min=1), positives_B, rows_R, other_BR)
        scale_B = torch.ones_like(share_B) if self.shard.world == 1 else share_B / self._draw_size
        return self._sampled(classes_BP, held_B, scale_B, positives_B)

    def _sampled(self, classes_BP: Tensor, held_B: Tensor, scale_B: Tensor, positives_B: Tensor) -> Negatives:
        """Draw K rows for each image: with repetition, as rows of a large bank, or as a mask of the whole bank."""
        R, K, (B, P) = self._held.num_rows, self._draw_size, classes_BP.shape
        least, most = self._least[P - 1], self._most
        block = _BLOCK if self.device.type == 'cpu' else _BLOCK_GPU
        if least < K and (most < K or int(held_B.min()) < K):  # the last depends on the batch
            rows_BK = self._held.other_class(classes_BP, self._integers(2**31, B, K))
        elif R > WHOLE_BANK_RATIO * K and least >= 2 * K:
            size = _draws_needed(K, least, R)
            parts = [self._distinct_rows(part_BP, K, size) for part_BP in classes_BP.split(max(1, block // size))]
            rows_BK = torch.cat(parts)
        else:
            hardest = min(max(2 * K, least), most)
            size = _draws_needed(min(K, hardest - K), hardest, R)
            parts = [self._distinct_mask(part_BP, K, size) for part_BP in classes_BP.split(max(1, block // R))]
            return Negatives(torch.full_like(scale_B, K), scale_B, positives_B, None, torch.cat(parts))
        return Negatives.of_rows(rows_BK, scale_B, positives_B, R)

    def _distinct_rows(self, classes_BP: Tensor, count: int, size: int) -> Tensor:
        """Draw different other-class rows for each image, [B, count], in a time that does not depend on the bank.

        By rejection: of `size` random rows it takes the first that are of other classes and have not appeared before.
        """
        drawn_BS = self._integers(self._held.num_rows, len(classes_BP), size)
        sorted_BS, order_BS = drawn_BS.sort(dim=1, stable=True)
        first_BS = torch.ones_like(drawn_BS, dtype=torch.bool)
        first_BS[:, 1:] = sorted_BS[:, 1:] != sorted_BS[:, :-1]
        wanted_BS = torch.empty_like(first_BS).scatter_(1, order_BS, first_BS)
        wanted_BS &= ~is_own_class(classes_BP, self._held.labels_R[drawn_BS])
        place_BS = wanted_BS.cumsum(dim=1)
        # What is not wanted goes to one place before the others, which is cut off.
        place_BS *= wanted_BS & (place_BS <= count)
        return drawn_BS.new_zeros(len(drawn_BS), count + 1).scatter_(1, place_BS, drawn_BS)[:, 1:]

    def _distinct_mask(self, classes_BP: Tensor, count: int, size: int) -> Tensor:
        """Draw different other-class rows for each image, as a mask [B, R].

        By rejection, too, of the smaller set: an image's rows, or the M - count other rows that are not. Where each
        row appears first is kept for the whole bank, which is faster than sorting.
        """
        others_B1 = self._held.count_others(classes_BP)[:, None].int()
        own_BR = is_own_class(classes_BP, self._held.labels_R)
        drawn_BS = self._integers(self._held.num_rows, len(classes_BP), size)
        first_BR = torch.full(own_BR.shape, size, dtype=torch.int32, device=self.device)
        order_BS = torch.arange(size, dtype=torch.int32, device=self.device).expand(drawn_BS.shape)
        first_BR.scatter_reduce_(1, drawn_BS, order_BS, 'amin').masked_fill_(own_BR, size)
        taken_BS = (first_BR.gather(1, drawn_BS) == order_BS).cumsum(dim=1, dtype=torch.int32)
        taken_BS = taken_BS <= (others_B1 - count).clamp(max=count)
        mask_BR = first_BR < taken_BS.sum(dim=1, keepdim=True, dtype=torch.int32)
        if self._least[classes_BP.shape[1] - 1] < 2 * count:
            mask_BR = (mask_BR ^ (others_B1 < 2 * count)).masked_fill_(own_BR, False)
        return mask_BR

    def _shared_rows(self) -> Tensor:
        """Draw K rows of all held here, [K], without repetition where there are that many."""
        R, K = self._held.num_rows, self._draw_size
        if K > R:
            return self._integers(R, K)
        wanted = K + 8 * math.sqrt(K) + 16
        if WHOLE_BANK_RATIO * wanted < R:  # a permutation takes a time that grows with R
            no_class = self._held.labels_R.new_full((1, 1), -1)
            return self._distinct_rows(no_class, K, math.ceil(1.1 * wanted))[0]
        return torch.randperm(R, generator=self.generator, device=self.device)[:K]

    def _chance_of_any(self, others_B: Tensor, num_classes: int) -> Tensor | float:
        """Compute how likely shared rows have one of another class at all, [B], or 1.0 where that is as good as sure.

        The other draws must make up for those that have none. Of R rows each of K misses the M others that are left
        with 1 - M / R, 1 - M / (R - 1), ... without repetition.
        """
        R, K = self._held.num_rows, self._draw_size
        if self._least[num_classes - 1] * K > 20 * R:  # (1 - M / R)^K is below e^-20, less than float32 resolves
            return 1.0
        left_K = torch.full((K,), R) if K > R else torch.arange(R, R - K, -1)
        miss_BK = 1 - others_B[:, None] / left_K.to(others_B.device)
        return 1 - miss_BK.clamp(min=0).log().sum(dim=1).exp().where(others_B > 0, 0.0)

    def _integers(self, below: int, *shape: int) -> Tensor:
        return torch.randint(below, shape, generator=self.generator, device=self.device)

    def get_state(self) -> dict[str, Tensor]:
        """The generator's state."""
        return {'generator': self.generator.get_state()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Continue the draws of the sampler whose `get_state` this is."""
        self.generator.set_state(state['generator'].cpu())


class _ByClass:
    """Rows by class: sorted by it, every class is one run."""

    def __init__(self, labels_R: Tensor, num_classes: int) -> None:
        self.labels_R = labels_R
        self.num_rows = labels_R.numel()
        self.sizes_C = torch.bincount(labels_R.cpu(), minlength=num_classes).to(labels_R.device)
        self._starts_C = self.sizes_C.cumsum(0) - self.sizes_C

    @cached_property
    def _sorted_R(self) -> Tensor:
        return torch.argsort(self.labels_R, stable=True)

    def same_class(self, classes_B: Tensor, integers_B: Tensor) -> Tensor:
        """Take the rows of these classes that random integers fall on, [B]."""
        return self._sorted_R[self._starts_C[classes_B] + integers_B % self.sizes_C[classes_B]]

    def _sizes(self, classes_BP: Tensor) -> Tensor:
        sizes_BP = self.sizes_C[classes_BP]
        sizes_BP[:, 1:] *= classes_BP[:, 1:] != classes_BP[:, :-1]  # an image may be mixed with one of its class
        return sizes_BP

    def count_others(self, classes_BP: Tensor) -> Tensor:
        """M of each image, [B]."""
        return self.num_rows - self._sizes(classes_BP).sum(dim=1)

    def other_class(self, classes_BP: Tensor, integers_BK: Tensor) -> Tensor:
        """Take the rows of other classes that random integers fall on, [B, K]; any rows where there are none."""
        ranks_BK = integers_BK % self.count_others(classes_BP).clamp(min=1)[:, None]
        classes_BP = classes_BP.sort(dim=1).values
        for start_B, size_B in zip(self._starts_C[classes_BP].unbind(1), self._sizes(classes_BP).unbind(1)):
            ranks_BK = ranks_BK + (ranks_BK >= start_B[:, None]) * size_B[:, None]  # skip the run
        return self._sorted_R[ranks_BK.clamp_(max=self.num_rows - 1)]


def is_own_class(classes_BP: Tensor, labels: Tensor) -> Tensor:
    """Tell which rows, by their labels [R] or [B, R], are of one of the image's classes, [B, R]."""
    own_BR = classes_BP[:, :1] == labels
    for class_B in classes_BP.unbind(1)[1:]:
        own_BR |= class_B[:, None] == labels
    return own_BR


def _draws_needed(count: int, others: int, num_rows: int) -> int:
    """How many of R rows to draw until `count` different ones of `others` rows are among them, but for e^-36.

    The wait for each next one is geometric. A sum of such waits with mean m and least chance p exceeds x m with
    probability exp(-p m (x - 1 - ln x)) at most (S. Janson, Tail bounds for sums of geometric and exponential
    variables, 2018, theorem 2.1), and x = 1 + sqrt(2 c) + c has x - 1 - ln x >= c.
    """
    rest = others - count + 1
    mean = num_rows * (1 / rest + math.log(others / rest)) if count else 0
    least = rest / num_rows
    return math.ceil(mean + math.sqrt(72 * mean / least) + 36 / least)
