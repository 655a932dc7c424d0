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
from timm.task.classification import resolve_classification_loss
from timm.utils import ModelEmaV3, unwrap_model
from torch import Tensor, nn

from ..models.backbones import feature_dim
from ..utils.errors import UserError
from ..utils.tasks import StateReader, TrainerTask
from .distillation import FeatureDistillationLoss
from .information_bank import InformationBank
from .losses import MIN_TEMPERATURE, CTCModule, InstanceDiscriminationLoss, TemporalContrastLoss, check_range
from .negatives import NegativeSampler
from .sharding import BankShard

_logger = logging.getLogger(__name__)

PAST_FEATURES = ('model', 'bank')


class CTCTask(TrainerTask):
    """Both stages of CTC around any timm model with a classification head, with timm's and the trainer's hooks.

        task = CTCTask(model, labels=labels_N)
        task(images, targets, index_B)['loss'].backward()
        task.start_temporal_stage(loader)              # after the instance stage's epochs

    Args:
        model: A timm model with a head.
        labels: Class of each training image, [N] integers from 0; the position is the image's index.
        criterion: The task's loss on logits and targets; None makes timm's of `criterion_kwargs` (smoothing, ...).
        embed_dim, num_negatives: E, and K of the temporal stage.
        negatives, positives: 'sampled', 'shared' or 'all'; 'exact' or 'relaxed'; see `NegativeSampler`.
        past_features: Where v2 comes from: 'model', a pass through the information bank a step, as published; 'bank',
            the embeddings stored when the temporal stage started, which costs nothing and departs from the paper.
        instance_weight, temporal_weight: Of the stages' terms (alpha, beta); zero leaves a term out.
        instance_temperature, temporal_temperature, instance_momentum, temporal_momentum: T and m of each stage.
        train_projector: Train the instance stage's projector; the published code does not.
        temporal_projector: 'separate', as published, 'shared', 'fixed', 'centered' or 'none'; see
            `TemporalContrastLoss`.
        temporal_term: 'contrast', or 'cosine', distillation of the features, which uses no negatives.
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
        temporal_projector: str = 'separate',
        temporal_term: str = 'contrast',
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
        check_range('instance_temperature', instance_temperature, MIN_TEMPERATURE)
        check_range('temporal_temperature', temporal_temperature, MIN_TEMPERATURE)
        check_range('instance_momentum', instance_momentum, 0, 1)
        check_range('temporal_momentum', temporal_momentum, 0, 1)
        if past_features not in PAST_FEATURES:
            raise UserError(f'`past_features` {past_features!r}: must be one of {", ".join(PAST_FEATURES)}')
        labels, dim = torch.as_tensor(labels), feature_dim(model)
        self.stage, self.past_features, self.split_banks = 'instance', past_features, split_banks
        self.instance_weight, self.temporal_weight = instance_weight, temporal_weight
        self.criterion = resolve_classification_loss(criterion, self.device, criterion_kwargs=criterion_kwargs)
        self.shard = BankShard.create(labels.numel(), split_banks)
        self.sampler = NegativeSampler(
            labels, num_negatives, negatives, positives, seed=seed, rank=rank, device=self.device, split=self.shard
        )
        if labels.max() >= model.num_classes:
            raise UserError(f'label {int(labels.max())} is outside the {model.num_classes} classes of the model')
        sizes, banks = (dim, labels.numel(), embed_dim), (torch.Generator().manual_seed(seed), bank_dtype, split_banks)
        instance = InstanceDiscriminationLoss(*sizes, instance_temperature, instance_momentum, *banks)
        instance.projector.requires_grad_(train_projector)
        options = num_negatives, temporal_temperature, temporal_momentum
        if temporal_term == 'contrast':
            temporal: Any = TemporalContrastLoss(*sizes, *options, *banks, projector=temporal_projector)
        else:
            temporal = FeatureDistillationLoss(dim, labels.numel(), *banks, stored=past_features == 'bank')
        self.trainable_module: nn.Module = CTCModule(model, instance, temporal).to(self.device)
        self.information_bank: InformationBank | None = None
        self._compile_kwargs: dict[str, Any] | None = None
        if self.verbose:
            _logger.info(f'CTCTask: {labels.numel()} instances, D={dim}, E={embed_dim}, K={num_negatives} {negatives}')

    def forward(  # type: ignore[override]
        self, input: Tensor, target: Tensor, index: Tensor, lam: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Compute a step's 'loss' (task_loss + weight * ctc_loss), 'output' (logits [B, C]), 'task_loss', 'ctc_loss'.

        Args:
            input: Images, [B, 3, H, W], mixed already where Mixup or CutMix is used.
            target: Classes [B], or whatever the criterion takes (soft targets [B, C]).
            index: Position of each image in the training set, [B].
            lam: With Mixup or CutMix, the share of image b in mixed image b, [B]; the rest is image B - 1 - b.
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
                past_BD = self.information_bank(input)
            self.temporal.sync_normalizer_flag()
            negatives = self.sampler.draw(index, None if lam is None else index.flip(0))
            output, ctc_loss = self.trainable_module(input, index, lam, past_BD, negatives)
        task_loss = self.criterion(output, target)
        terms = {'task_loss': task_loss.detach(), 'ctc_loss': ctc_loss.detach()}
        return {'loss': task_loss + weight * ctc_loss, 'output': output, **terms}

    @torch.no_grad()
    def start_temporal_stage(self, loader: Iterable[tuple[Tensor, Tensor, Tensor]]) -> None:
        """Freeze the model as the information bank and fill both banks; raises RuntimeError if that is done already.

        The loader is one pass over the training set, batches of (images, targets, index). Of several ranks each gives
        a share, all the same number of batches of the same size.
        """
        if self.stage == 'temporal':
            raise RuntimeError('the temporal stage has started already')
        bank = self.freeze()
        for images, _, index in loader if self.temporal.bank_names else ():
            self.temporal.refresh(bank(images.to(self.device)), index.to(self.device))
        self.temporal.finish_refresh()
        self.stage = 'temporal'

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

    def banks(self) -> dict[str, Tensor]:
        """All three banks by name, [N, E] each; of sharded banks the rows of this rank."""
        losses = {'instance': self.instance, 'temporal': self.temporal}
        return {f'{stage}.{name}': getattr(loss, name) for stage, loss in losses.items() for name in loss.bank_names}

    def freeze(self) -> InformationBank:
        """Make the information bank of the model as it is."""
        self.information_bank = InformationBank(self.model, self._compile_kwargs)
        return self.information_bank

    def train(self, mode: bool = True) -> CTCTask:
        """Set training mode; the information bank stays in evaluation mode."""
        super().train(mode)
        if self.information_bank is not None:
            self.information_bank.eval()
        return self

    def prepare_distributed(self, device_ids: list | None = None, **ddp_kwargs: Any) -> CTCTask:
        """Wrap what has gradients in DistributedDataParallel; each stage leaves the other's projectors without any."""
        options = {'find_unused_parameters': True, **ddp_kwargs}
        self.trainable_module = nn.parallel.DistributedDataParallel(self.trainable_module, device_ids, **options)
        return self

    def compile(self, backend: str = 'inductor', mode: str | None = None, **kwargs: Any) -> nn.Module:  # type: ignore[override]
        """Compile the backbone's pass and both losses, in place so that no wrapper's prefix reaches a saved name."""
        self._compile_kwargs = dict(backend=backend, mode=mode, **kwargs)
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
        classifier: Any = self.model.get_classifier() if exclude_head else None  # type: ignore[operator]
        heads = classifier if isinstance(classifier, (tuple, list)) else [classifier]
        left_out = {id(p) for head in heads if head is not None for p in head.parameters()}
        return [p for p in self.trainable_module.parameters() if id(p) not in left_out]

    def run_batch(self, batch: tuple[Any, ...]) -> dict[str, Tensor]:
        """Run `forward` on (images, targets, index, lam or None)."""
        return self(*batch)

    def start_training(self) -> None:
        """Have the banks wait for the optimizer's steps, see `losses.BankLoss`."""
        self.instance.defer_updates = self.temporal.defer_updates = True

    def prepare_epoch(self, stage: str, training_images: Callable[[], Iterable[Any]]) -> bool:
        """Start the temporal stage before its first epoch."""
        starts = stage == 'temporal' and self.stage == 'instance'
        if starts:
            self.start_temporal_stage(training_images())
        return starts

    def step_taken(self, step: int) -> None:
        """Update the banks, then the moving average."""
        self.instance.apply_updates()
        self.temporal.apply_updates()
        super().step_taken(step)

    def step_discarded(self) -> None:
        """Leave the banks as they were before the step."""
        self.instance.discard_updates()
        self.temporal.discard_updates()

    def get_task_state(self, module: nn.Module | None = None, ema: bool = False) -> dict[str, Any]:
        """Collect what a resume needs beyond the backbone's weights; sharded banks are those of this rank."""
        if ema:
            return {}
        losses = {'instance': self.instance.state_dict(), 'temporal': self.temporal.state_dict()}
        state: dict[str, Any] = {'stage': self.stage, **losses, 'sampler': self.sampler.get_state()}
        if self.information_bank is not None:
            state['information_bank'] = self.information_bank.model.state_dict()
        return {**state, 'banks': self.banks()} if self.split_banks else state

    def load_task_state(
        self, state: dict[str, Any] | None, strict: bool = True, module: nn.Module | None = None, ema: bool = False
    ) -> None:
        """Continue from `get_task_state`; casts banks of another dtype, raises RuntimeError on another size."""
        if not state or ema:
            return
        for name in {'instance', 'temporal'} & state.keys():
            getattr(self, name).load_state_dict(state[name], strict=strict)
        if self.split_banks and 'banks' in state:
            self.load_rows(state['banks'], self.shard)
        self.stage = state['stage']
        self.sampler.load_state(state['sampler'])
        self.information_bank = None
        if 'information_bank' in state:
            self.freeze().model.load_state_dict(state['information_bank'], strict=strict)

    def rank_state(self) -> dict[str, Tensor]:
        """The sampler's generator."""
        return self.sampler.get_state()

    def state_files(self, is_main_process: bool) -> dict[str, dict[str, Tensor]]:
        """The information bank, from the main process, and with sharded banks the rows of this rank."""
        files = {}
        if is_main_process and self.information_bank is not None:
            tensors = self.information_bank.model.state_dict().items()  # which share memory where weights are tied
            files['information_bank'] = {name: tensor.cpu().contiguous().clone() for name, tensor in tensors}
        if self.split_banks:
            files[f'banks_{self.shard.rank:05d}'] = self.banks()
        return files

    def load_state_files(self, stage: str, rank_state: dict[str, Tensor], files: StateReader) -> None:
        """Continue from a state of any number of ranks; raises UserError if only one of state and task is sharded."""
        shards = sorted(name for name in files.names if name.startswith('banks_'))
        if bool(shards) != self.split_banks:
            raise UserError(f'was saved {"with" if shards else "without"} `split_banks=True`; continue in the same way')
        for rank, name in enumerate(shards):
            saved = BankShard(self.shard.num_instances, rank, len(shards))
            if saved.world != self.shard.world or rank == self.shard.rank:
                self.load_rows(files.read(name), saved)
        bank = {'information_bank': files.read('information_bank')} if stage == 'temporal' else {}
        self.load_task_state({'stage': stage, 'sampler': {**self.rank_state(), **rank_state}, **bank})

    @torch.no_grad()
    def load_rows(self, rows: dict[str, Tensor], saved: BankShard) -> None:
        """Take over what lies here of the banks' rows [R, E] in a shard; raises RuntimeError on another shape."""
        for name, bank in self.banks().items():
            if rows[name].shape != (saved.num_rows, bank.shape[1]):
                raise RuntimeError(f'{name} is {tuple(rows[name].shape)}, not {(saved.num_rows, bank.shape[1])}')
            theirs_R, place_R = saved.find(self.shard.rows(bank.device))
            bank[theirs_R] = rows[name].to(bank)[place_R[theirs_R]]
