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
from copy import deepcopy
from typing import Any

import torch
from timm.models import group_parameters
from timm.task.classification import resolve_classification_loss
from timm.utils import ModelEmaV3, unwrap_model
from torch import Tensor, nn

from ..models.backbones import feature_dim, features_and_logits
from ..utils.errors import UserError
from ..utils.tasks import StateReader, TrainerTask
from .losses import LEAST_TEMPERATURE, InstanceDiscriminationLoss, TemporalContrastLoss, check_range
from .negatives import Negatives, NegativeSampler
from .sharding import BankShard

_logger = logging.getLogger(__name__)

PAST_FEATURES = ('model', 'bank')


class Backbone(nn.Module):
    """A timm model whose forward gives features and logits, so that both can be compiled and wrapped as one."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Compute features [B, D] and logits [B, C] of images [B, ...]."""
        return features_and_logits(self.model, images)


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
    ) -> tuple[Tensor, Tensor | None]:
        """Compute logits [B, C] and the contrast: temporal with negatives, else instance; None without index."""
        features_BD, logits_BC = self.body(images)
        if index_B is None:
            return logits_BC, None
        if negatives is None:
            return logits_BC, self.instance(features_BD, index_B, lam_B)
        return logits_BC, self.temporal(features_BD, past_BD, index_B, negatives, lam_B)

    def no_weight_decay(self) -> set[str]:
        """Name the model's own exceptions as this module does (read by timm's optimizer factory)."""
        model: Any = self.body.model
        return (
            {f'body.model.{name}' for name in model.no_weight_decay()} if hasattr(model, 'no_weight_decay') else set()
        )

    def group_matcher(self, coarse: bool = False) -> Callable[[str], int]:
        """Number the model's layers, the projectors with its head (read by timm for layer-wise learning rates)."""
        model: Any = self.body.model
        layers = group_parameters(model, model.group_matcher(coarse=coarse), reverse=True)
        last = max(layers.values(), default=0)
        return lambda name: layers.get(name.removeprefix('body.model.'), last)


class CTCTask(TrainerTask):
    """Both stages of CTC around any timm model with a classification head.

        task = CTCTask(model, labels=labels_N)
        result = task(images, targets, index_B)
        result['loss'].backward()
        ...
        task.start_temporal_stage(loader)

    Args:
        model: A timm model with a head.
        labels: Class of each training image, [N] integers; the position is the image's index.
        criterion: The task's loss on logits and targets; made from `criterion_kwargs` by timm when None.
        criterion_kwargs: For timm's `create_classification_loss`: smoothing, loss_type, soft_targets, ...
        embed_dim: E.
        num_negatives: K of the temporal stage.
        negatives: 'sampled', 'shared' or 'all', see `NegativeSampler`.
        positives: 'exact' or 'relaxed', see `NegativeSampler`.
        past_features: Where the temporal term takes v2 from: 'model', one forward pass of the information bank a step,
            as published; 'bank', the embedding stored when the temporal stage started, which costs nothing and
            departs from the paper.
        instance_weight, temporal_weight: Of the stages' terms (alpha, beta); zero leaves a term out.
        instance_temperature, temporal_temperature: T of each stage.
        instance_momentum, temporal_momentum: m of each stage's banks.
        train_projector: Train the instance stage's projector; the published code does not.
        bank_dtype: Of all three banks, float32 or bfloat16.
        split_banks: Each of P ranks holds N / P rows of every bank; the process group must be there already. The same
            losses, drawn negatives in expectation; see `sharding`.
        seed: Of the banks' first values and of the negatives.
        rank: This rank's number.
        device, dtype: For the task's tensors.
        verbose: Log what is set up.

    Raises:
        UserError: A model without a head, labels outside the model's classes, and all that the losses and the
            sampler refuse.
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
        dim = feature_dim(model)
        labels = torch.as_tensor(labels)
        self.stage = 'instance'
        self.past_features = past_features
        self.instance_weight = instance_weight
        self.temporal_weight = temporal_weight
        self.criterion = resolve_classification_loss(criterion, self.device, criterion_kwargs=criterion_kwargs)
        self.shard = BankShard.of_this_rank(labels.numel()) if split_banks else None
        self.sampler = NegativeSampler(
            labels, num_negatives, negatives, positives, seed=seed, rank=rank, device=self.device, split=self.shard
        )
        last_class = int(labels.max())
        if last_class >= model.num_classes:
            raise UserError(f'label {last_class} is outside the {model.num_classes} classes of the model')
        banks: dict[str, Any] = {
            'generator': torch.Generator().manual_seed(seed),
            'bank_dtype': bank_dtype,
            'split_banks': split_banks,
        }
        instance = InstanceDiscriminationLoss(
            dim, labels.numel(), embed_dim, instance_temperature, instance_momentum, **banks
        )
        instance.projector.requires_grad_(train_projector)
        temporal = TemporalContrastLoss(
            dim, labels.numel(), embed_dim, num_negatives, temporal_temperature, temporal_momentum, **banks
        )
        self.trainable_module: nn.Module = CTCModule(model, instance, temporal).to(self.device)
        self.information_bank: Backbone | None = None
        self._compile_kwargs: dict[str, Any] | None = None
        if self.verbose:
            _logger.info(f'CTCTask: {labels.numel()} instances, D={dim}, E={embed_dim}, K={num_negatives} {negatives}')

    @property
    def model(self) -> nn.Module:
        """The backbone with its classifier, as timm made it."""
        return unwrap_model(self.trainable_module).body.model

    eval_model = model  # what timm evaluates and saves

    @property
    def instance(self) -> InstanceDiscriminationLoss:
        """The instance stage's loss."""
        return unwrap_model(self.trainable_module).instance

    @property
    def temporal(self) -> TemporalContrastLoss:
        """The temporal stage's loss."""
        return unwrap_model(self.trainable_module).temporal

    def forward(  # type: ignore[override]
        self, input: Tensor, target: Tensor, index: Tensor, lam: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Compute one step's forward pass and losses.

        Args:
            input: Images, [B, 3, H, W], mixed already where Mixup or CutMix is used.
            target: Classes [B], or whatever the criterion takes (soft targets [B, C]).
            index: Position of each image in the training set, [B].
            lam: With Mixup or CutMix, the share of image b itself in mixed image b, [B]; the rest is image
                B - 1 - b, timm's partner.

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
        if ctc_loss is None:
            ctc_loss = torch.zeros_like(task_loss)
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
            loader: One pass over the training set, batches of (images, targets, index). With several ranks each gives
                a share, all the same number of batches of the same size.

        Raises:
            RuntimeError: The temporal stage has started already.
        """
        if self.stage == 'temporal':
            raise RuntimeError('the temporal stage has started already')
        bank = self._freeze()
        for images, _, index in loader:
            features_BD, _ = bank(images.to(self.device))
            self.temporal.refresh(features_BD, index.to(self.device))
        self.stage = 'temporal'

    def _freeze(self) -> Backbone:
        """Make the information bank of the model as it is."""
        # Compiled or not is a property of the module that deepcopy would carry along; the copy is made plain.
        self.information_bank = Backbone(deepcopy(self.model)).requires_grad_(False).eval()
        if self._compile_kwargs is not None:
            self.information_bank.compile(**self._compile_kwargs)
        return self.information_bank

    def train(self, mode: bool = True) -> CTCTask:
        """Set training mode; the information bank stays in evaluation mode."""
        super().train(mode)
        if self.information_bank is not None:
            self.information_bank.eval()
        return self

    def prepare_distributed(self, device_ids: list | None = None, **ddp_kwargs: Any) -> CTCTask:
        """Wrap what has gradients in DistributedDataParallel; each stage leaves the other's projectors without any."""
        ddp_kwargs.setdefault('find_unused_parameters', True)
        self.trainable_module = nn.parallel.DistributedDataParallel(self.trainable_module, device_ids, **ddp_kwargs)
        return self

    def compile(self, backend: str = 'inductor', mode: str | None = None, **compile_kwargs: Any) -> nn.Module:  # type: ignore[override]
        """Compile the backbone's pass and both losses, in place so that no wrapper's prefix reaches a saved name."""
        self._compile_kwargs = dict(backend=backend, mode=mode, **compile_kwargs)
        for module in (unwrap_model(self.trainable_module).body, self.instance, self.temporal, self.model):
            module.compile(**self._compile_kwargs)
        return self.model

    def setup_ema(
        self, decay: float = 0.9999, use_warmup: bool = False, device: torch.device | None = None, **kwargs: Any
    ) -> nn.Module:
        """Keep an exponential moving average of the backbone alone; banks have a momentum of their own."""
        self.trainable_module_ema = ModelEmaV3(self.model, decay=decay, use_warmup=use_warmup, device=device, **kwargs)
        return self.trainable_module_ema

    def update_ema(self, step: int | None = None) -> None:
        """Move the average towards the backbone."""
        if self.has_ema():
            self.trainable_module_ema.update(self.model, step=step)

    def get_clip_parameters(self, exclude_head: bool = False) -> list[nn.Parameter]:
        """List what is clipped; without the head it leaves out the model's classifier, not a projector."""
        left_out: set[int] = set()
        if exclude_head:
            classifier: Any = self.model.get_classifier()  # type: ignore[operator]
            heads = classifier if isinstance(classifier, (tuple, list)) else [classifier]
            left_out = {id(p) for head in heads if head is not None for p in head.parameters()}
        return [p for p in self.trainable_module.parameters() if id(p) not in left_out]

    def start_training(self) -> None:
        """Have the banks wait for the optimizer's steps, see `losses.BankLoss`."""
        self.instance.defer_updates = self.temporal.defer_updates = True

    def run_batch(self, batch: tuple[Any, ...]) -> dict[str, Tensor]:
        """Run `forward` on (images, targets, index, lam or None)."""
        return self(*batch)

    def prepare_epoch(self, stage: str, training_images: Callable[[], Iterable[Any]]) -> bool:
        """Start the temporal stage before its first epoch."""
        if stage != 'temporal' or self.stage == 'temporal':
            return False
        self.start_temporal_stage(training_images())
        return True

    def step_taken(self, step: int) -> None:
        """Update the banks, then the moving average."""
        self.instance.apply_updates()
        self.temporal.apply_updates()
        super().step_taken(step)

    def step_discarded(self) -> None:
        """Leave the banks as they were before the step."""
        self.instance.discard_updates()
        self.temporal.discard_updates()

    def rank_state(self) -> dict[str, Tensor]:
        """The sampler's generator."""
        return self.sampler.get_state()

    def state_files(self, is_main_process: bool) -> dict[str, dict[str, Tensor]]:
        """The information bank, from the main process, and with sharded banks the rows of this rank."""
        files = {}
        if is_main_process and self.information_bank is not None:
            tensors = self.information_bank.model.state_dict().items()
            files['information_bank'] = {name: tensor.cpu().contiguous().clone() for name, tensor in tensors}
        if self.shard is not None:
            files[f'banks_{self.shard.rank:05d}'] = {name: bank.cpu() for name, bank in self.banks().items()}
        return files

    def load_state_files(self, stage: str, rank_state: dict[str, Tensor], files: StateReader) -> None:
        """Continue from a state; sharded banks may have been saved by another number of ranks.

        Raises:
            UserError: The state has sharded banks and the task whole ones, or the other way round.
        """
        shards = sorted(name for name in files.names if name.startswith('banks_'))
        if bool(shards) != (self.shard is not None):
            raise UserError(f'was saved {"with" if shards else "without"} `split_banks=True`; continue in the same way')
        for rank, name in enumerate(shards):
            saved = BankShard(self.sampler.num_instances, rank, len(shards))
            if self.shard is None or saved.world != self.shard.world or rank == self.shard.rank:
                self.load_rows(files.read(name), saved)
        information_bank = files.read('information_bank') if stage == 'temporal' else None
        self._resume(stage, {**self.rank_state(), **rank_state}, information_bank)

    def get_task_state(self, module: nn.Module | None = None, ema: bool = False) -> dict[str, Any]:
        """Collect all that a resume needs beyond the backbone's own weights.

        Returns:
            'stage', 'instance' and 'temporal' (projectors, banks and normalizers), 'sampler' (the generator's
            state), in the temporal stage 'information_bank', with sharded banks 'banks', the rows of this rank.
            Empty for the moving average.
        """
        if ema:
            return {}
        losses = {'instance': self.instance.state_dict(), 'temporal': self.temporal.state_dict()}
        state: dict[str, Any] = {'stage': self.stage, **losses, 'sampler': self.sampler.get_state()}
        if self.information_bank is not None:
            state['information_bank'] = self.information_bank.model.state_dict()
        return state if self.shard is None else {**state, 'banks': self.banks()}

    def load_task_state(
        self, state: dict[str, Any] | None, strict: bool = True, module: nn.Module | None = None, ema: bool = False
    ) -> None:
        """Continue from what `get_task_state` gave; banks saved in another dtype are cast.

        Raises:
            RuntimeError: Banks or projectors of another size.
        """
        if not state or ema:
            return
        self.instance.load_state_dict(state['instance'], strict=strict)
        self.temporal.load_state_dict(state['temporal'], strict=strict)
        if self.shard is not None and 'banks' in state:
            self.load_rows(state['banks'], self.shard)
        self._resume(state['stage'], state['sampler'], state.get('information_bank'), strict)

    def _resume(
        self, stage: str, sampler: dict[str, Tensor], bank: dict[str, Tensor] | None, strict: bool = True
    ) -> None:
        self.stage = stage
        self.sampler.load_state(sampler)
        self.information_bank = None
        if bank is not None:
            self._freeze().model.load_state_dict(bank, strict=strict)

    def banks(self) -> dict[str, Tensor]:
        """All three banks by name, [N, E] each; of sharded banks the rows of this rank."""
        losses = {'instance': self.instance, 'temporal': self.temporal}
        return {f'{stage}.{name}': getattr(loss, name) for stage, loss in losses.items() for name in loss.bank_names}

    @torch.no_grad()
    def load_rows(self, rows: dict[str, Tensor], saved: BankShard) -> None:
        """Take over what of another rank's rows lies here; with the rows of all of them a bank is whole again.

        Args:
            rows: Of each of `banks`, [R, E]; in another dtype they are cast to the bank's.
            saved: Which rows they are, of any number of ranks.

        Raises:
            RuntimeError: Rows of another number or size.
        """
        for name, bank in self.banks().items():
            if rows[name].shape != (saved.num_rows, bank.shape[1]):
                raise RuntimeError(f'{name} is {tuple(rows[name].shape)}, not {(saved.num_rows, bank.shape[1])}')
            here_R = (self.shard or BankShard(saved.num_instances)).rows(bank.device)
            theirs_R, place_R = saved.find(here_R)
            bank[theirs_R] = rows[name].to(bank)[place_R[theirs_R]]
