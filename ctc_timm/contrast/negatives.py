"""Which bank rows an image is contrasted with: rows of other classes only, drawn on the training device.

What a draw depends on that is the same in every step, such as sizes of classes, is read once, on the host: a
step must not wait for the device to tell. Only draws on the processor itself look at their own numbers.

Letters: B batch (of all processes together where banks are split), C classes, N instances, K negatives an image,
R rows shared by a batch or held by a process, M rows of other classes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .sharding import BankShard, gather_rows

MODES = ('sampled', 'shared', 'all')
POSITIVES = ('exact', 'relaxed')


# Random rows that are sorted at a time, 32 MiB of them.
_ROWS_AT_ONCE = 1 << 22
# With fewer bank rows per negative than this it is cheaper to score the whole bank, a matrix product, and to
# weight the rows than to gather each image's own.
WHOLE_BANK_RATIO = 12


@dataclass(frozen=True)
class OtherClasses:
    """Which rows are of other classes than each image, made a block of rows at a time.

    Stands where a [B, R] boolean tensor could: `mask[:, start:stop]` is its block of columns, `mask.sum(dim=1)`
    the number of true entries in each row. Nothing of size B x R is ever there.

    Args:
        labels_B: Class of each image.
        partners_B: Class of the image mixed into each, left out too; None when nothing is mixed.
        labels_R: Class of each row.
        count_B: Rows of other classes for each image.
    """

    labels_B: Tensor
    partners_B: Tensor | None
    labels_R: Tensor
    count_B: Tensor

    def __getitem__(self, place: tuple[slice, slice]) -> Tensor:
        rows, columns = place
        partners_B = None if self.partners_B is None else self.partners_B[rows]
        return ~own_class(self.labels_B[rows], partners_B, self.labels_R[columns])

    def sum(self, dim: int) -> Tensor:
        """Rows of other classes for each image, [B]; `dim` is 1."""
        return self.count_B


class Draw(NamedTuple):
    """One step's rows.

    Attributes:
        negatives: [B, K], each image's own rows; [R], rows for the whole batch; None, the whole bank, R = N. With
            split banks, places in this process's share.
        use_BR: Which of the batch's rows are negatives of which image, [B, R] booleans, or the same as a mask
            made block by block. None with rows of each image's own.
        scale_B: Factor of each image's sum over its negatives, [B], so that they stand for K; None for one.
        positives_B: The positive's row for each image of this process, by its number in the whole bank.
    """

    negatives: Tensor | None
    use_BR: Tensor | OtherClasses | None
    scale_B: Tensor | None
    positives_B: Tensor


class NegativeSampler:
    """Draws negatives, and positives of the same class, with a generator of its own.

    `sampled` gives each image K rows of other classes, without repetition where there are that many and with
    repetition where there are not, as in the paper's code. `shared` draws K rows of the whole set once for the
    batch and leaves out, image by image, those of the image's class; the sum over the rest is scaled by K over
    their number, so that an image's loss has the same expectation as with K rows of its own. `all` draws nothing:
    every row of another class counts K / M times, which is that expectation itself.

        sampler = NegativeSampler(labels_N, num_negatives=16384)
        draw = sampler.draw(index_B)

    Args:
        labels_N: Class of each training image, [N], integers from 0.
        num_negatives: K.
        mode: 'sampled', 'shared' or 'all'.
        positives: 'exact' takes the image itself, 'relaxed' a random image of its class.
        seed: Of the generator. Processes that train together share it for `shared` and differ by `rank` for
            `sampled`, and for both with split banks.
        rank: This process's number among those that train together.
        device: Where to draw.
        split: This process's share of split banks. It then draws K / P of its own rows for the images of all
            processes, weighted so that the processes' sums together stand for K rows of the whole bank: for every
            image the expectation is that of a whole bank.

    Raises:
        ValueError: K below one or below the number of processes of a split, fewer than two classes, an unknown
            mode, labels that are not [N] integers.
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
        if mode not in MODES:
            raise ValueError(f'negatives must be one of {", ".join(MODES)}, got {mode!r}')
        if positives not in POSITIVES:
            raise ValueError(f'positives must be one of {", ".join(POSITIVES)}, got {positives!r}')
        if num_negatives < 1:
            raise ValueError(f'num_negatives must be at least 1, got {num_negatives}')
        labels_N = torch.as_tensor(labels_N)
        if labels_N.ndim != 1 or labels_N.is_floating_point():
            raise ValueError(f'labels must be [N] integers, got {labels_N.dtype} of shape {tuple(labels_N.shape)}')
        if labels_N.numel() and int(labels_N.min()) < 0:
            raise ValueError(f'labels must not be negative, got {int(labels_N.min())}')
        sizes_C = torch.bincount(labels_N.long().cpu())
        if int((sizes_C > 0).sum()) < 2:
            raise ValueError('negatives come from other classes, but the data set has fewer than two classes')
        if split is not None and num_negatives < split.world:
            raise ValueError(f'num_negatives must be at least 1 a process, {split.world}, got {num_negatives}')
        self.num_negatives = num_negatives
        self.mode = mode
        self.positives = positives
        self.device = torch.device(device)
        self.split = split
        self._on_host = self.device.type == 'cpu'
        self.generator = torch.Generator(device=self.device)
        self.generator.manual_seed(seed if mode == 'shared' and split is None else seed + 7919 * rank)
        self._labels_N = labels_N.long().to(self.device)
        self._sizes_C = sizes_C.to(self.device)
        # An image mixed from both of two classes has no third; its partner's class then counts as another.
        self._two_classes = int((sizes_C > 0).sum()) == 2
        if positives == 'relaxed':
            # Rows sorted by class make every class one run.
            self._by_class_N = torch.argsort(self._labels_N, stable=True)
            self._starts_C = self._sizes_C.cumsum(0) - self._sizes_C
        # Of the rows held here: their classes, how many to draw, and how many an image has at least and at most.
        self._labels_R, self._draw_size, held_C = self._labels_N, num_negatives, sizes_C
        if split is not None:
            self._labels_R = self._labels_N[split.rows(self.device)]
            self._draw_size = len(range(split.rank, num_negatives, split.world))
            held_C = torch.bincount(self._labels_R.cpu(), minlength=len(sizes_C))
        self._held_C = held_C.to(self.device)
        largest = held_C.sort(descending=True).values[:2].tolist()
        self._others = {False: len(self._labels_R) - largest[0], True: len(self._labels_R) - sum(largest)}
        self._most_others = len(self._labels_R) - int(held_C[sizes_C > 0].min())

    @property
    def num_instances(self) -> int:
        """N."""
        return self._labels_N.numel()

    def draw(self, index_B: Tensor, partner_B: Tensor | None = None) -> Draw:
        """Rows to contrast these images with.

        Args:
            index_B: Position of each image of this process in the training set, [B].
            partner_B: For Mixup and CutMix, the position of the image mixed into each, [B]: its class is left out
                too.

        Returns:
            See `Draw`.
        """
        positives_B = self._same_class(self._labels_N[index_B]) if self.positives == 'relaxed' else index_B
        if self._two_classes:
            partner_B = None
        if self.split is not None:
            index_B = gather_rows(index_B)
            partner_B = None if partner_B is None else gather_rows(partner_B)
        labels_B = self._labels_N[index_B]
        partners_B = None if partner_B is None else self._labels_N[partner_B]
        held_B = self._count(labels_B, partners_B, self._held_C)
        others_B = held_B if self.split is None else self._count(labels_B, partners_B, self._sizes_C)
        if self.mode == 'all':
            others = OtherClasses(labels_B, partners_B, self._labels_R, held_B)
            return Draw(None, others, self.num_negatives / others_B, positives_B)
        # What the rows drawn here stand for: of K rows of the whole bank so many would be of those held here.
        share_B = self.num_negatives * held_B / others_B
        if self.mode == 'shared':
            rows_R = self._shared_rows()
            other_BR = ~own_class(labels_B, partners_B, self._labels_R[rows_R])
            return Draw(rows_R, other_BR, share_B / other_BR.sum(dim=1).clamp_(min=1), positives_B)
        scale_B = None if self.split is None else share_B / self._draw_size
        return Draw(*self._sampled(labels_B, partners_B, held_B), scale_B, positives_B)

    def _count(self, labels_B: Tensor, partners_B: Tensor | None, sizes_C: Tensor) -> Tensor:
        """Rows of other classes for each image, [B], among rows of which each class has so many."""
        count_B = sizes_C.sum() - sizes_C[labels_B]
        if partners_B is not None:
            count_B = count_B - sizes_C[partners_B] * (partners_B != labels_B)
        return count_B

    def _sampled(
        self, labels_B: Tensor, partners_B: Tensor | None, others_B: Tensor
    ) -> tuple[Tensor | None, Tensor | None]:
        """Rows of each image's own, or a mask of the whole bank, whichever is cheaper to use."""
        R, K = self._labels_R.numel(), self._draw_size
        enough = self._others[partners_B is not None] >= K
        if not enough and self._most_others >= K:  # it depends on the batch
            enough = int(others_B.min()) >= K
        if not enough:
            return self._with_repetition(labels_B, partners_B), None
        surplus = self._surplus(partners_B is not None)
        if R > WHOLE_BANK_RATIO * K and surplus:
            return self._distinct_rows(labels_B, partners_B, surplus), None
        if self._on_host:
            return None, self._distinct_mask(labels_B, partners_B, others_B)
        own_BR = own_class(labels_B, partners_B, self._labels_R)
        if surplus:
            rows_BK = self._distinct_rows(labels_B, partners_B, surplus)
        else:
            keys_BR = torch.rand(own_BR.shape, generator=self.generator, device=self.device).masked_fill_(own_BR, 2.0)
            rows_BK = keys_BR.topk(K, dim=1, largest=False, sorted=False).indices
        return None, torch.zeros_like(own_BR).scatter_(1, rows_BK, True)

    def _surplus(self, mixed: bool) -> int:
        """How many random rows are sure to hold K different ones of other classes; 0 where that is too many to draw.

        The number of different ones spreads by less than the root of its mean; eight times that is left as a margin.
        """
        R, K, M = self._labels_R.numel(), self._draw_size, self._others[mixed]
        wanted = K + 8 * math.sqrt(K) + 16
        if wanted > M / 2:
            return 0
        return math.ceil(math.log1p(-wanted / M) / math.log1p(-1 / R))

    def _shared_rows(self) -> Tensor:
        """K rows of all held here, [K], without repetition where there are that many."""
        R, K = self._labels_R.numel(), self._draw_size
        if K > R:
            return torch.randint(R, (K,), generator=self.generator, device=self.device)
        wanted = K + 8 * math.sqrt(K) + 16
        if WHOLE_BANK_RATIO * wanted < R:  # a permutation takes a time that grows with R
            drawn_1S = self._random_rows(1, math.ceil(1.1 * wanted))
            return _first_different(drawn_1S, torch.ones_like(drawn_1S, dtype=torch.bool), K)[0]
        return torch.randperm(R, generator=self.generator, device=self.device)[:K]

    def _same_class(self, labels_B: Tensor) -> Tensor:
        """A uniformly random image of each image's class, itself included, [B]."""
        offset_B = self._integers(labels_B.shape) % self._sizes_C[labels_B]
        return self._by_class_N[self._starts_C[labels_B] + offset_B]

    def _distinct_mask(self, labels_B: Tensor, partners_B: Tensor | None, others_B: Tensor) -> Tensor:
        """Which K rows are each image's negatives, [B, N]; every K of its other-class rows equally likely.

        Each row gets a random byte, and the rows with the smallest bytes are taken: all below a level that the
        K-th is sure to reach, and of the few levels around it the first rows by byte, ties at random. Several
        times cheaper than sorting a random number a row.
        """
        own_BN = own_class(labels_B, partners_B, self._labels_R)
        N, K = own_BN.shape[1], self._draw_size
        least, most = K / int(others_B.max()), K / int(others_B.min())
        reach = 256 * 4 * math.sqrt(most * max(1 - least, 0) / N) + 1
        low, high = int(256 * least - reach), int(256 * most + reach) + 1
        if low < 0 or high > 255 or high - low > 64:
            return self._smallest_keys(own_BN)
        words = torch.empty(len(labels_B), -(-N // 8), dtype=torch.int64, device=self.device)
        words.random_(-(2**63), None, generator=self.generator)
        bytes_BN = words.view(torch.uint8)[:, :N].masked_fill_(own_BN, 255)
        mask_BN = bytes_BN < low
        missing_B = K - mask_BN.sum(dim=1)
        image, row = ((bytes_BN - low) < high - low).nonzero(as_tuple=True)  # unsigned: below `low` wraps around
        around_B = torch.bincount(image, minlength=len(labels_B))
        if bool(((missing_B < 0) | (missing_B > around_B)).any()):
            return self._smallest_keys(own_BN)  # four standard deviations off, whichever rows it is about
        order = ((image * 256 + bytes_BN[image, row]) * 2**31 + self._integers(image.shape)).argsort()
        place = torch.arange(len(image), device=self.device) - (around_B.cumsum(0) - around_B)[image]
        taken = order[place < missing_B[image]]
        mask_BN[image[taken], row[taken]] = True
        return mask_BN

    def _smallest_keys(self, own_BN: Tensor) -> Tensor:
        """Which K rows have the smallest of N random keys, [B, N], each image's own class left out.

        Where the K-th key ties with the next, which float32 keys do now and then, that image is drawn again; as
        a tie says nothing about which rows are in it, that leaves all choices equally likely.
        """
        keys_BN = torch.rand(own_BN.shape, generator=self.generator, device=self.device).masked_fill_(own_BN, 2.0)
        # A row at a time: kthvalue keeps an index of eight bytes beside every key.
        kth_B = torch.stack([keys_N.kthvalue(self._draw_size).values for keys_N in keys_BN])
        mask_BN = keys_BN <= kth_B[:, None]
        tied_B = mask_BN.sum(dim=1) != self._draw_size
        if bool(tied_B.any()):
            mask_BN[tied_B] = self._smallest_keys(own_BN[tied_B])
        return mask_BN

    def _distinct_rows(self, labels_B: Tensor, partners_B: Tensor | None, surplus: int) -> Tensor:
        """K different other-class rows for each image, [B, K], for banks of many times K rows.

        Random rows are struck out where they repeat or are of the image's class, and the first K that are left
        are taken, which is sampling without repetition by rejection.
        """
        rows_BK = []
        at_once = max(1, _ROWS_AT_ONCE // surplus)
        for start in range(0, labels_B.shape[0], at_once):
            some = slice(start, start + at_once)
            partners = None if partners_B is None else partners_B[some]
            drawn_BS = self._random_rows(labels_B[some].shape[0], surplus)
            allowed_BS = ~own_class(labels_B[some], partners, self._labels_R[drawn_BS])
            rows_BK.append(_first_different(drawn_BS, allowed_BS, self._draw_size))
        return torch.cat(rows_BK)

    def _random_rows(self, count: int, surplus: int) -> Tensor:
        shape = (count, surplus)
        return torch.randint(self._labels_R.numel(), shape, generator=self.generator, device=self.device)

    def _with_repetition(self, labels_B: Tensor, partners_B: Tensor | None) -> Tensor:
        """K other-class rows for each image, repetitions allowed, [B, K]; any rows for an image that has none here."""
        other_BR = ~own_class(labels_B, partners_B, self._labels_R)
        counts_B1 = other_BR.sum(dim=1, keepdim=True).clamp_(min=1)
        rank_BK = (self._integers((labels_B.numel(), self._draw_size)) % counts_B1).int()
        rows_BK = torch.searchsorted(other_BR.cumsum(dim=1, dtype=torch.int32), rank_BK + 1)
        return rows_BK.clamp_(max=other_BR.shape[1] - 1)

    def _integers(self, shape: Sequence[int]) -> Tensor:
        """Random integers below 2^31."""
        return torch.randint(2**31, tuple(shape), generator=self.generator, device=self.device)

    def get_state(self) -> dict[str, Tensor]:
        """The generator's state."""
        return {'generator': self.generator.get_state()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Continue the draws of the sampler whose `get_state` this is."""
        self.generator.set_state(state['generator'].cpu())


def own_class(labels_B: Tensor, partners_B: Tensor | None, labels: Tensor) -> Tensor:
    """Which rows, by their labels [R] or [B, R], are of the image's class or its partner's, [B, R]."""
    own_BR = labels_B[:, None] == labels
    if partners_B is not None:
        own_BR |= partners_B[:, None] == labels
    return own_BR


def _first_different(drawn_BS: Tensor, allowed_BS: Tensor, count: int) -> Tensor:
    """In each line the first so many values that are allowed and appear for the first time, [B, count]."""
    ordered_BS, order_BS = drawn_BS.sort(dim=1, stable=True)
    first_BS = torch.ones_like(allowed_BS)
    first_BS[:, 1:] = ordered_BS[:, 1:] != ordered_BS[:, :-1]
    allowed_BS = allowed_BS & torch.empty_like(first_BS).scatter_(1, order_BS, first_BS)
    place_BS = allowed_BS.cumsum(dim=1) - 1
    # What is not wanted goes to one place more, which is cut off.
    place_BS = place_BS.masked_fill_(~allowed_BS, count).clamp_(max=count)
    found = drawn_BS.new_zeros(drawn_BS.shape[0], count + 1).scatter_(1, place_BS, drawn_BS)
    return found[:, :count]
