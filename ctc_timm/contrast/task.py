"""CTC as a timm training task: the two stages and everything they remember.

Letters: B batch, C classes, D feature size, N training images.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from copy import deepcopy
from typing import Any

import torch
import torch.nn as nn
from timm.task.classification import resolve_classification_loss
from timm.utils import ModelEmaV3, unwrap_model
from torch import Tensor

from ..models.backbones import feature_dim
from ..utils.errors import UserError
from ..utils.tasks import StateReader, TrainerTask
from .losses import InstanceDiscriminationLoss, TemporalContrastLoss
from .modules import Backbone, CTCModule
from .negatives import NegativeSampler
from .sharding import BankShard

_logger = logging.getLogger(__name__)

STAGES = ('instance', 'temporal')
PAST_FEATURES = ('model', 'bank')


class CTCTask(TrainerTask):
    """Contrastive temporal coding (arXiv 2203.03871) around any timm model with a classification head.

    The instance stage adds instance discrimination to the task's loss. `start_temporal_stage` freezes a copy of
    the model as the information bank; from then on temporal contrast is added instead.

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
        past_features: Where the temporal term takes the past's view of an image from: 'model', one forward pass of
            the information bank a step, as published; 'bank', the embedding stored when the temporal stage
            started, which costs nothing and departs from the paper.
        instance_weight: Of the instance term (alpha); zero leaves it out.
        temporal_weight: Of the temporal term (beta); zero leaves it out.
        instance_temperature: Of the instance term.
        temporal_temperature: Of the temporal term.
        instance_momentum: Of the instance stage's bank.
        temporal_momentum: Of the temporal stage's two banks.
        train_projector: Train the instance stage's projector; the published code does not.
        bank_dtype: Of all three banks, float32 or bfloat16.
        split_banks: Each of P processes that train together holds N / P rows of every bank; their group must be
            there already. The same losses, drawn negatives in expectation; see `sharding`.
        seed: Of the banks' first values and of the negatives.
        rank: This process's number among those that train together.
        device: Device for the task's tensors.
        dtype: Dtype for the task's tensors.
        verbose: Log what is set up.

    Raises:
        ValueError: A model without a head, labels outside the model's classes, and all that the losses and the
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
        for name, weight in (('instance_weight', instance_weight), ('temporal_weight', temporal_weight)):
            if not weight >= 0:
                raise ValueError(f'{name} must not be negative, got {weight}')
        if past_features not in PAST_FEATURES:
            raise ValueError(f'past_features must be one of {", ".join(PAST_FEATURES)}, got {past_features!r}')
        dim = feature_dim(model)
        labels = torch.as_tensor(labels)
        num_instances = labels.numel()
        generator = torch.Generator().manual_seed(seed)
        self.stage = 'instance'
        self.past_features = past_features
        self.instance_weight = instance_weight
        self.temporal_weight = temporal_weight
        self.criterion = resolve_classification_loss(criterion, self.device, criterion_kwargs=criterion_kwargs)
        self.split = BankShard.of_processes(num_instances) if split_banks else None
        self.sampler = NegativeSampler(
            labels, num_negatives, negatives, positives, seed=seed, rank=rank, device=self.device, split=self.split
        )
        classes = int(labels.max()) + 1
        if classes > model.num_classes:
            raise ValueError(f'label {classes - 1} is outside the {model.num_classes} classes of the model')
        banks: dict[str, Any] = {'generator': generator, 'bank_dtype': bank_dtype, 'split_banks': split_banks}
        instance = InstanceDiscriminationLoss(
            dim, num_instances, embed_dim, instance_temperature, instance_momentum, **banks
        )
        instance.projector.requires_grad_(train_projector)
        temporal = TemporalContrastLoss(
            dim, num_instances, embed_dim, num_negatives, temporal_temperature, temporal_momentum, **banks
        )
        self.trainable_module: nn.Module = CTCModule(model, instance, temporal).to(self.device)
        self.information_bank: Backbone | None = None
        self._compile_kwargs: dict[str, Any] | None = None
        if self.verbose:
            _logger.info(f'CTCTask: {num_instances} instances, D={dim}, E={embed_dim}, K={num_negatives} {negatives}')

    @property
    def model(self) -> nn.Module:
        """The backbone with its classifier, as timm made it."""
        return unwrap_model(self.trainable_module).body.model

    @property
    def instance(self) -> InstanceDiscriminationLoss:
        """The instance stage's loss."""
        return unwrap_model(self.trainable_module).instance

    @property
    def temporal(self) -> TemporalContrastLoss:
        """The temporal stage's loss."""
        return unwrap_model(self.trainable_module).temporal

    def defer_updates(self, hold: bool = True) -> None:
        """Have the banks wait for `apply_updates` or `drop_updates`, see `banks.BankUpdates`."""
        self.instance.defer_updates = self.temporal.defer_updates = hold

    def apply_updates(self) -> None:
        """Update the banks by the steps since the last time, where they wait for it."""
        self.instance.apply_updates()
        self.temporal.apply_updates()

    def discard_updates(self) -> None:
        """Forget the steps since the last time, where the banks wait."""
        self.instance.discard_updates()
        self.temporal.discard_updates()

    def train(self, mode: bool = True) -> CTCTask:
        """Set training mode; the information bank stays in evaluation mode."""
        super().train(mode)
        if self.information_bank is not None:
            self.information_bank.eval()
        return self

    def forward(  # type: ignore[override]
        self,
        input: Tensor,
        target: Tensor,
        index: Tensor,
        lam: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """One step's forward pass and losses.

        Args:
            input: Images, [B, 3, H, W], mixed already where Mixup or CutMix is used.
            target: Classes [B], or whatever the criterion takes (soft targets [B, C]).
            index: Position of each image in the training set, [B].
            lam: With Mixup or CutMix, the share of image b itself in mixed image b, [B]; the rest is image
                B - 1 - b, timm's partner.

        Returns:
            'loss' (task_loss + weight * ctc_loss), 'output' (logits [B, C]), 'task_loss', 'ctc_loss'.
        """
        if self.stage == 'temporal' and self.temporal_weight > 0:
            past_BD = None
            if self.past_features == 'model':
                assert self.information_bank is not None
                with torch.no_grad():
                    past_BD, _ = self.information_bank(input)
            self.temporal.sync_normalizer_flag()
            draw = self.sampler.draw(index, index.flip(0) if lam is not None else None)
            output, ctc_loss = self.trainable_module(input, index, lam, past_BD, draw)
            weight = self.temporal_weight
        elif self.stage == 'instance' and self.instance_weight > 0:
            output, ctc_loss = self.trainable_module(input, index, lam)
            weight = self.instance_weight
        else:
            output, ctc_loss = self.trainable_module(input)
            weight = 0.0
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
            loader: One pass over the training set, batches of (images, targets, index). With several processes
                each gives a share, all the same number of batches of the same size.

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
        # Compiled or not is a property of the module that deepcopy would carry along; the copy is made plain.
        bank = Backbone(deepcopy(self.model)).requires_grad_(False).eval()
        if self._compile_kwargs is not None:
            bank.compile(**self._compile_kwargs)
        self.information_bank = bank
        return bank

    def prepare_distributed(self, device_ids: list | None = None, **ddp_kwargs: Any) -> CTCTask:
        """Wrap what has gradients in DistributedDataParallel.

        Each stage leaves the other's projectors without gradients, hence `find_unused_parameters`.
        """
        from torch.nn.parallel import DistributedDataParallel

        ddp_kwargs.setdefault('find_unused_parameters', True)
        self.trainable_module = DistributedDataParallel(self.trainable_module, device_ids=device_ids, **ddp_kwargs)
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
        """What gradient clipping applies to; without the head it leaves out the model's classifier, not a projector."""
        left_out: set[int] = set()
        if exclude_head:
            classifier: Any = self.model.get_classifier()  # type: ignore[operator]
            heads = classifier if isinstance(classifier, (tuple, list)) else [classifier]
            left_out = {id(p) for head in heads if head is not None for p in head.parameters()}
        return [p for p in self.trainable_module.parameters() if id(p) not in left_out]

    def get_eval_model(self, module: nn.Module | None = None, ema: bool = False) -> nn.Module | None:
        """The plain timm model, or its moving average."""
        if module is not None:
            return module
        return self.get_trainable_module(ema=True) if ema else self.model

    def get_task_state(self, module: nn.Module | None = None, ema: bool = False) -> dict[str, Any]:
        """All that a resume needs beyond the backbone's own weights.

        Returns:
            'stage', 'instance' and 'temporal' (projectors, banks and normalizers), 'sampler' (the generator's
            state), in the temporal stage 'information_bank', with split banks 'banks', the rows that this process
            holds. Empty for the moving average.
        """
        if ema:
            return {}
        state: dict[str, Any] = {
            'stage': self.stage,
            'instance': self.instance.state_dict(),
            'temporal': self.temporal.state_dict(),
            'sampler': self.sampler.get_state(),
        }
        if self.information_bank is not None:
            state['information_bank'] = self.information_bank.model.state_dict()
        if self.split is not None:
            state['banks'] = self.banks()
        return state

    def banks(self) -> dict[str, Tensor]:
        """All three banks by name, [N, E] each; of split banks the rows that this process holds."""
        return {
            'instance.bank': self.instance.bank,
            'temporal.present_bank': self.temporal.present_bank,
            'temporal.past_bank': self.temporal.past_bank,
        }

    @torch.no_grad()
    def load_rows(self, name: str, rows_RE: Tensor, held: BankShard) -> None:
        """Take over what of another process's rows lies here; with the rows of all of them a bank is whole again.

        Args:
            name: Of `banks`.
            rows_RE: The rows that `held` says; in another dtype they are cast to the bank's.
            held: Of the process that saved them, among any number of processes.

        Raises:
            RuntimeError: Rows of another number or size.
        """
        bank = self.banks()[name]
        if rows_RE.shape != (held.num_rows, bank.shape[1]):
            raise RuntimeError(f'{name} has shape {tuple(rows_RE.shape)}, not {(held.num_rows, bank.shape[1])}')
        here = (self.split or BankShard(held.num_instances)).rows(bank.device)
        theirs, place = held.find(here)
        bank[theirs] = rows_RE.to(bank)[place[theirs]]

    def load_task_state(
        self,
        state: dict[str, Any] | None,
        strict: bool = True,
        module: nn.Module | None = None,
        ema: bool = False,
    ) -> None:
        """Continue from what `get_task_state` gave; banks saved in another dtype are cast.

        Raises:
            RuntimeError: Banks or projectors of another size.
        """
        if not state or ema:
            return
        self.instance.load_state_dict(state['instance'], strict=strict)
        self.temporal.load_state_dict(state['temporal'], strict=strict)
        self.sampler.load_state(state['sampler'])
        if self.split is not None and 'banks' in state:
            for name, rows_RE in state['banks'].items():
                self.load_rows(name, rows_RE, self.split)
        self._load_information_bank(state.get('information_bank'), strict)
        self.stage = state['stage']

    def _load_information_bank(self, tensors: dict[str, Tensor] | None, strict: bool = True) -> None:
        if tensors is None:
            self.information_bank = None
            return
        bank = self._freeze()
        bank.model.load_state_dict(tensors, strict=strict)
        bank.to(self.device)

    # What follows are the trainer's hooks, see `TrainerTask`.

    def run_batch(self, batch: tuple[Any, ...]) -> dict[str, Tensor]:
        """Images, targets, index and lam, which may be None, through `forward`."""
        images, targets, index, lam = batch
        return self(images, targets, index, lam)

    def start_training(self) -> None:
        """Have the banks wait for the optimizer's steps."""
        self.defer_updates()

    def prepare_epoch(self, stage: str, training_images: Callable[[], Iterable[Any]]) -> bool:
        """Start the temporal stage with its first epoch."""
        if stage != 'temporal' or self.stage == 'temporal':
            return False
        self.start_temporal_stage(training_images())
        return True

    def step_taken(self, step: int) -> None:
        """Update the banks, then the moving average."""
        self.apply_updates()
        super().step_taken(step)

    def step_discarded(self) -> None:
        """Leave the banks as they were before the step."""
        self.discard_updates()

    def rank_state(self) -> dict[str, Tensor]:
        """The sampler's generator."""
        return self.sampler.get_state()

    def state_files(self, is_main_process: bool) -> dict[str, dict[str, Tensor]]:
        """The information bank, and with sharded banks the rows of this rank."""
        files: dict[str, dict[str, Tensor]] = {}
        if is_main_process and self.information_bank is not None:
            files['information_bank'] = {  # cloned, as tied weights share their memory
                name: tensor.cpu().contiguous().clone()
                for name, tensor in self.information_bank.model.state_dict().items()
            }
        if self.split is not None:
            files[f'banks_{self.split.rank:05d}'] = {name: bank.cpu() for name, bank in self.banks().items()}
        return files

    def load_state_files(self, stage: str, rank_state: dict[str, Tensor], files: StateReader) -> None:
        """Continue from a state; sharded banks may have been saved by another number of ranks.

        Raises:
            UserError: The state has sharded banks and the task whole ones, or the other way round.
        """
        shards = sorted(name for name in files.names if name.startswith('banks_'))
        if bool(shards) != (self.split is not None):
            raise UserError(f'was saved {"with" if shards else "without"} `split_banks=True`; continue in the same way')
        if 'generator' in rank_state:
            self.sampler.load_state(rank_state)
        self._load_information_bank(files.read('information_bank') if stage == 'temporal' else None)
        for rank, name in enumerate(shards):
            held = BankShard(self.sampler.num_instances, rank, len(shards))
            assert self.split is not None
            if self.split.world == held.world and self.split.rank != rank:
                continue
            for bank, rows_RE in files.read(name).items():
                self.load_rows(bank, rows_RE, held)
        self.stage = stage
