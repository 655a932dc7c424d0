"""Contrastive temporal coding (CTC, arXiv 2203.03871) as a timm training task, stage by stage.

Instance stage: cross-entropy over classes, and every training image told from all others.

    v    = normalize(projector(features))                             [B, E]
    s    = v @ bank.T / T                                             [B, N]
    loss = task_loss + instance_weight * cross_entropy(s, index)
    bank[index] <- normalize(m * bank[index] + (1 - m) * v)           once the optimizer has stepped

Between the stages the model is frozen: its copy is the information bank. One pass over the training set fills the
banks of the second stage with the embeddings of that copy.

Temporal stage: cross-entropy over classes, and every image contrasted with what the information bank made of it.

    v1   = normalize(present_projector(features))                     the model being trained
    v2   = normalize(past_projector(past_features))                   the information bank, same images
    rows = [index, negatives]                                         [B, 1 + K], negatives of other classes
    out1 = exp(past_bank[rows] @ v1 / T) / Z1                         Z is N mean(out) of the first step
    out2 = exp(present_bank[rows] @ v2 / T) / Z2
    nce  = -mean_b(log(p / (p + q + eps)) + sum_k log(q / (n_k + q + eps)))        of each; p, n_k in out; q = K / N
    loss = task_loss + temporal_weight * (nce(out1) + nce(out2))
    present_bank[index] <- normalize(m * present_bank[index] + (1 - m) * v1)
    past_bank[index]    <- normalize(m * past_bank[index]    + (1 - m) * v2)

`losses` has both contrasts, `negatives` draws the rows, `banks` updates them.

Letters: B batch, C classes, D feature size, E embedding size, K negatives an image, N training images.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import Any

import torch
from timm.models import group_parameters
from timm.task.classification import resolve_classification_loss
from torch import Tensor, nn

from ..models.backbones import feature_dim
from ..utils.errors import UserError
from .interface import Backbone, CTCInterface
from .losses import LEAST_TEMPERATURE, InstanceDiscriminationLoss, TemporalContrastLoss, check_range
from .negatives import Negatives, NegativeSampler
from .sharding import BankShard

_logger = logging.getLogger(__name__)

PAST_FEATURES = ('model', 'bank')


class CTCModule(nn.Module):
    """All that has gradients: the model and both losses' projectors, one module so that DDP sees one forward."""

    def __init__(self, model: nn.Module, instance: InstanceDiscriminationLoss, temporal: TemporalContrastLoss) -> None:
        super().__init__()
        self.body = Backbone(model)
        self.instance = instance
        self.temporal = temporal
        # DDP need not broadcast the banks: every rank holds the same ones, or its shard, see `banks`.
        self._ddp_params_and_buffers_to_ignore = [
            name for name, _ in self.named_buffers() if name.startswith(('instance.', 'temporal.'))
        ]

    def forward(
        self,
        images: Tensor,
        index_B: Tensor | None = None,
        lam_B: Tensor | None = None,
        past_BD: Tensor | None = None,
        negatives: Negatives | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Compute logits [B, C] and the contrast: temporal with negatives, else instance; zero without index."""
        features_BD, logits_BC = self.body(images)
        if index_B is None:
            return logits_BC, logits_BC.new_zeros(())
        if negatives is None:
            return logits_BC, self.instance(features_BD, index_B, lam_B)
        return logits_BC, self.temporal(features_BD, past_BD, index_B, negatives, lam_B)

    def no_weight_decay(self) -> set[str]:
        """Name the model's own exceptions as this module does (read by timm's optimizer factory)."""
        model: Any = self.body.model
        exempt = model.no_weight_decay() if hasattr(model, 'no_weight_decay') else ()
        return {f'body.model.{name}' for name in exempt}

    def group_matcher(self, coarse: bool = False) -> Callable[[str], int]:
        """Number the model's layers, the projectors with its head (read by timm for layer-wise learning rates)."""
        model: Any = self.body.model
        layers = group_parameters(model, model.group_matcher(coarse=coarse), reverse=True)
        last = max(layers.values(), default=0)
        return lambda name: layers.get(name.removeprefix('body.model.'), last)


class CTCTask(CTCInterface):
    """Both stages of CTC around any timm model with a classification head.

        task = CTCTask(model, labels=labels_N)
        task(images, targets, index_B)['loss'].backward()
        ...
        task.start_temporal_stage(loader)

    Args:
        model: A timm model with a head.
        labels: Class of each training image, [N] integers; the position is the image's index.
        criterion: The task's loss on logits and targets; None makes timm's of `criterion_kwargs` (smoothing, ...).
        embed_dim, num_negatives: E, and K of the temporal stage.
        negatives, positives: 'sampled', 'shared' or 'all'; 'exact' or 'relaxed'; see `NegativeSampler`.
        past_features: Where v2 comes from: 'model', a pass through the information bank a step, as published; 'bank',
            the embeddings stored when the temporal stage started, which costs nothing and departs from the paper.
        instance_weight, temporal_weight: Of the stages' terms (alpha, beta); zero leaves a term out.
        instance_temperature, temporal_temperature, instance_momentum, temporal_momentum: T and m of each stage.
        train_projector: Train the instance stage's projector; the published code does not.
        bank_dtype: Of all three banks, float32 or bfloat16.
        split_banks: Each of P ranks holds N / P rows of every bank, see `sharding`. Losses stay the same, with drawn
            negatives in expectation. The process group must be there already.
        seed, rank: Of the banks' first values and of the negatives; this rank's number.
        device, dtype, verbose: For the task's tensors; whether to log what is set up.

    Raises:
        UserError: A model without a head, labels outside its classes, and all that losses and sampler refuse.
    """

    def __init__(
        self,
        model: Any,
        labels: Tensor,
        criterion: nn.Module | Callable | None = None,
        criterion_kwargs: dict[str, Any] | None = None,
        *,
        embed_dim: int = 128,
        num_negatives: int = 16384,
        negatives: str = 'sampled',
        positives: str = 'exact',
        past_features: str = 'model',
        instance_weight: float = 0.5,
        temporal_weight: float = 1.0,
        instance_temperature: float = 0.1,
        temporal_temperature: float = 0.1,
        instance_momentum: float = 0.9,
        temporal_momentum: float = 0.9,
        train_projector: bool = False,
        bank_dtype: torch.dtype = torch.float32,
        split_banks: bool = False,
        seed: int = 42,
        rank: int = 0,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        verbose: bool = True,
    ) -> None:
        super().__init__(device=device, dtype=dtype, verbose=verbose)
        check_range('instance_weight', instance_weight, 0)
        check_range('temporal_weight', temporal_weight, 0)
        check_range('instance_temperature', instance_temperature, 0, above=True)
        check_range('temporal_temperature', temporal_temperature, LEAST_TEMPERATURE)
        check_range('instance_momentum', instance_momentum, 0, 1)
        check_range('temporal_momentum', temporal_momentum, 0, 1)
        if past_features not in PAST_FEATURES:
            raise UserError(f'`past_features` {past_features!r}: must be one of {", ".join(PAST_FEATURES)}')
        labels, dim = torch.as_tensor(labels), feature_dim(model)
        self.stage = 'instance'
        self.past_features = past_features
        self.instance_weight = instance_weight
        self.temporal_weight = temporal_weight
        self.criterion = resolve_classification_loss(criterion, self.device, criterion_kwargs=criterion_kwargs)
        self.split_banks = split_banks
        self.shard = BankShard.create(labels.numel(), split_banks)
        self.sampler = NegativeSampler(
            labels, num_negatives, negatives, positives, seed=seed, rank=rank, device=self.device, split=self.shard
        )
        last_class = int(labels.max())
        if last_class >= model.num_classes:
            raise UserError(f'label {last_class} is outside the {model.num_classes} classes of the model')
        sizes, banks = (dim, labels.numel(), embed_dim), (torch.Generator().manual_seed(seed), bank_dtype, split_banks)
        instance = InstanceDiscriminationLoss(*sizes, instance_temperature, instance_momentum, *banks)
        instance.projector.requires_grad_(train_projector)
        temporal = TemporalContrastLoss(*sizes, num_negatives, temporal_temperature, temporal_momentum, *banks)
        self.trainable_module: nn.Module = CTCModule(model, instance, temporal).to(self.device)
        self.information_bank = None
        if self.verbose:
            _logger.info(f'CTCTask: {labels.numel()} instances, D={dim}, E={embed_dim}, K={num_negatives} {negatives}')

    def forward(  # type: ignore[override]
        self, input: Tensor, target: Tensor, index: Tensor, lam: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Compute one step's forward pass and losses.

        Args:
            input: Images, [B, 3, H, W], mixed already where Mixup or CutMix is used.
            target: Classes [B], or whatever the criterion takes (soft targets [B, C]).
            index: Position of each image in the training set, [B].
            lam: With Mixup or CutMix, the share of image b in mixed image b, [B]; the rest is image B - 1 - b.

        Returns:
            'loss' (task_loss + weight * ctc_loss), 'output' (logits [B, C]), 'task_loss', 'ctc_loss'.
        """
        weight = self.instance_weight if self.stage == 'instance' else self.temporal_weight
        if weight == 0:
            output, ctc_loss = self.trainable_module(input)
        elif self.stage == 'instance':
            output, ctc_loss = self.trainable_module(input, index, lam)
        else:
            past_BD = None
            if self.past_features == 'model':
                assert self.information_bank is not None
                with torch.no_grad():
                    past_BD, _ = self.information_bank(input)
            self.temporal.sync_normalizer_flag()
            negatives = self.sampler.draw(index, None if lam is None else index.flip(0))
            output, ctc_loss = self.trainable_module(input, index, lam, past_BD, negatives)
        task_loss = self.criterion(output, target)
        return {
            'loss': task_loss + weight * ctc_loss,
            'output': output,
            'task_loss': task_loss.detach(),
            'ctc_loss': ctc_loss.detach(),
        }

    @torch.no_grad()
    def start_temporal_stage(self, loader: Iterable[tuple[Tensor, Tensor, Tensor]]) -> None:
        """Freeze the model as the information bank and fill both banks of the temporal stage.

        Args:
            loader: One pass over the training set, batches of (images, targets, index); of several ranks each gives a
                share, all the same number of batches of the same size.

        Raises:
            RuntimeError: The temporal stage has started already.
        """
        if self.stage == 'temporal':
            raise RuntimeError('the temporal stage has started already')
        bank = self.freeze()
        for images, _, index in loader:
            features_BD, _ = bank(images.to(self.device))
            self.temporal.refresh(features_BD, index.to(self.device))
        self.stage = 'temporal'
