"""Which bank rows an image is contrasted with: rows of other classes only, drawn on the training device.

Letters: B batch, N instances, K negatives an image, R rows shared by a batch, M rows of other classes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

MODES = ('sampled', 'shared', 'all')
POSITIVES = ('exact', 'relaxed')


# With fewer bank rows per negative than this it is cheaper to score the whole bank, a matrix product, and to
# weight the rows than to gather each image's own.
WHOLE_BANK_RATIO = 12


class OtherClasses:
    """Which rows of the whole set are of other classes than each image, made a block of rows at a time.

    Stands where a [B, N] boolean tensor could: `mask[:, start:stop]` is its block of columns, `mask.sum(dim=1)`
    the number of true entries in each row. Nothing of size B x N is ever there.

    Args:
        labels_B: Class of each image.
        partners_B: Class of the image mixed into each, left out too; None when nothing is mixed.
        labels_N: Class of each row.
        sizes_C: Rows of each class.
    """

    dtype = torch.bool

    def __init__(self, labels_B: Tensor, partners_B: Tensor | None, labels_N: Tensor, sizes_C: Tensor) -> None:
        self._labels_B = labels_B
        self._partners_B = partners_B
        self._labels_N = labels_N
        self._sizes_C = sizes_C

    def __getitem__(self, place: tuple[slice, slice]) -> Tensor:
        rows, columns = place
        partners_B = None if self._partners_B is None else self._partners_B[rows]
        return ~_own_class(self._labels_B[rows], partners_B, self._labels_N[columns])

    def sum(self, dim: int) -> Tensor:
        """Rows of other classes for each image, [B]; `dim` is 1."""
        others_B = self._labels_N.numel() - self._sizes_C[self._labels_B]
        if self._partners_B is not None:
            others_B = others_B - self._sizes_C[self._partners_B] * (self._partners_B != self._labels_B)
        return others_B


class Draw(NamedTuple):
    """One step's rows.

    Attributes:
        negatives: [B, K], each image's own rows; [R], rows for the whole batch; None, the whole bank, R = N.
        use_BR: Which of the batch's rows are negatives of which image, [B, R] booleans, or the same as a mask
            made block by block. None with rows of each image's own.
        scale_B: Factor of each image's sum over its negatives, [B], so that they stand for K; None for one.
        positives_B: The positive's row for each image, [B].
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
            `sampled`.
        rank: This process's number among those that train together.
        device: Where to draw.

    Raises:
        ValueError: K below one, fewer than two classes, an unknown mode, labels that are not [N] integers.
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
        sizes_C = torch.bincount(labels_N.long())
        if int((sizes_C > 0).sum()) < 2:
            raise ValueError('negatives come from other classes, but the data set has fewer than two classes')
        self.num_negatives = num_negatives
        self.mode = mode
        self.positives = positives
        self.device = torch.device(device)
        self.generator = torch.Generator(device=self.device)
        self.generator.manual_seed(seed if mode == 'shared' else seed + 7919 * rank)
        self._labels_N = labels_N.long().to(self.device)
        # Rows sorted by class make every class one run, so that "the rows of other classes" is two runs.
        self._by_class_N = torch.argsort(self._labels_N, stable=True)
        self._sizes_C = sizes_C.to(self.device)
        self._starts_C = self._sizes_C.cumsum(0) - self._sizes_C

    @property
    def num_instances(self) -> int:
        """N."""
        return self._labels_N.numel()

    def draw(self, index_B: Tensor, partner_B: Tensor | None = None) -> Draw:
        """Rows to contrast these images with.

        Args:
            index_B: Position of each image in the training set, [B].
            partner_B: For Mixup and CutMix, the position of the image mixed into each, [B]: with `shared`
                negatives its class is left out too.

        Returns:
            See `Draw`.
        """
        labels_B = self._labels_N[index_B]
        positives_B = self._same_class(labels_B) if self.positives == 'relaxed' else index_B
        partners_B = None if partner_B is None else self._labels_N[partner_B]
        if self.mode == 'all':
            others = OtherClasses(labels_B, partners_B, self._labels_N, self._sizes_C)
            return Draw(None, others, self.num_negatives / others.sum(dim=1).clamp_(min=1), positives_B)
        if self.mode == 'shared':
            rows_R = self._shared_rows()
            other_BR = ~_own_class(labels_B, partners_B, self._labels_N[rows_R])
            return Draw(rows_R, other_BR, self.num_negatives / other_BR.sum(dim=1).clamp_(min=1), positives_B)
        others_B = OtherClasses(labels_B, partners_B, self._labels_N, self._sizes_C).sum(dim=1)
        if int(others_B.min()) < self.num_negatives:
            return Draw(self._with_repetition(labels_B, partners_B), None, None, positives_B)
        if self.num_instances > WHOLE_BANK_RATIO * self.num_negatives:
            return Draw(self._distinct_rows(labels_B, partners_B), None, None, positives_B)
        return Draw(None, self._distinct_mask(labels_B, partners_B, others_B), None, positives_B)

    def _shared_rows(self) -> Tensor:
        """K rows of the whole set, [R], without repetition where there are that many."""
        N, K = self.num_instances, self.num_negatives
        if K > N:
            return torch.randint(N, (K,), generator=self.generator, device=self.device)
        return torch.randperm(N, generator=self.generator, device=self.device)[:K]

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
        own_BN = _own_class(labels_B, partners_B, self._labels_N)
        N, K = self.num_instances, self.num_negatives
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
        kth_B = torch.stack([keys_N.kthvalue(self.num_negatives).values for keys_N in keys_BN])
        mask_BN = keys_BN <= kth_B[:, None]
        tied_B = mask_BN.sum(dim=1) != self.num_negatives
        if bool(tied_B.any()):
            mask_BN[tied_B] = self._smallest_keys(own_BN[tied_B])
        return mask_BN

    def _distinct_rows(self, labels_B: Tensor, partners_B: Tensor | None) -> Tensor:
        """K different other-class rows for each image, [B, K], when N is many times K.

        Random rows are struck out where they repeat or are of the image's class, and the first K that are left
        are taken, which is sampling without repetition by rejection.
        """
        classes = len(self._sizes_C)
        kept = 1 - 2 * float(self._sizes_C.max()) / self.num_instances
        surplus = int(self.num_negatives * (1.1 / max(kept, 0.05))) + 64
        rows_B = []
        for b, label in enumerate(labels_B.tolist()):
            own = {label} if partners_B is None else {label, int(partners_B[b])}
            keep_C = torch.ones(classes, dtype=torch.bool, device=self.device)
            keep_C[list(own)] = False
            found = self._labels_N.new_empty(0)
            while found.numel() < self.num_negatives:
                more = torch.randint(self.num_instances, (surplus,), generator=self.generator, device=self.device)
                found = torch.cat([found, more[keep_C[self._labels_N[more]]]])
                found = found[_first_appearances(found)]
            rows_B.append(found[: self.num_negatives])
        return torch.stack(rows_B)

    def _with_repetition(self, labels_B: Tensor, partners_B: Tensor | None) -> Tensor:
        """K other-class rows for each image, repetitions allowed, [B, K]."""
        other_BN = ~_own_class(labels_B, partners_B, self._labels_N)
        # An image whose partner's class leaves no other class at all falls back on its own class's others.
        empty_B = ~other_BN.any(dim=1)
        if bool(empty_B.any()):
            other_BN[empty_B] = ~_own_class(labels_B[empty_B], None, self._labels_N)
        counts_B1 = other_BN.sum(dim=1, keepdim=True)
        rank_BK = (self._integers((labels_B.numel(), self.num_negatives)) % counts_B1).int()
        return torch.searchsorted(other_BN.cumsum(dim=1, dtype=torch.int32), rank_BK + 1)

    def _integers(self, shape: Sequence[int]) -> Tensor:
        """Random integers below 2^31."""
        return torch.randint(2**31, tuple(shape), generator=self.generator, device=self.device)

    def get_state(self) -> dict[str, Any]:
        """The generator's state."""
        return {'generator': self.generator.get_state()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue the draws of the sampler whose `get_state` this is."""
        self.generator.set_state(state['generator'].cpu())


def _own_class(labels_B: Tensor, partners_B: Tensor | None, labels_R: Tensor) -> Tensor:
    """Which rows are of the image's class or its partner's, [B, R]."""
    own_BR = labels_B[:, None] == labels_R[None, :]
    if partners_B is not None:
        own_BR |= partners_B[:, None] == labels_R[None, :]
    return own_BR


def _first_appearances(values: Tensor) -> Tensor:
    """Mask of the places where a value appears for the first time, [n]."""
    ordered, order = values.sort(stable=True)
    first = torch.ones_like(ordered, dtype=torch.bool)
    first[1:] = ordered[1:] != ordered[:-1]
    return torch.zeros_like(first).scatter_(0, order, first)
