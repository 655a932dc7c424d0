"""What timm, a training loop and a resume ask of a CTC task, beyond its two stages."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from copy import deepcopy
from typing import Any

import torch
from timm.utils import ModelEmaV3, unwrap_model
from torch import Tensor, nn

from ..models.backbones import features_and_logits
from ..utils.errors import UserError
from ..utils.tasks import StateReader, TrainerTask
from .losses import InstanceDiscriminationLoss, TemporalContrastLoss
from .negatives import NegativeSampler
from .sharding import BankShard


class Backbone(nn.Module):
    """A timm model whose forward gives features and logits, so that both can be compiled and wrapped as one."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Compute features [B, D] and logits [B, C] of images [B, ...]."""
        return features_and_logits(self.model, images)


class CTCInterface(TrainerTask):
    """Everything of `CTCTask` but its settings and its stages."""

    trainable_module: nn.Module
    sampler: NegativeSampler
    shard: BankShard
    split_banks: bool
    information_bank: Backbone | None
    _compile_kwargs: dict[str, Any] | None = None

    def start_temporal_stage(self, loader: Iterable[tuple[Tensor, Tensor, Tensor]]) -> None:
        """See `CTCTask`."""
        raise NotImplementedError

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

    def freeze(self) -> Backbone:
        """Make the information bank of the model as it is."""
        # Compiled or not is a property of the module that deepcopy would carry along; the copy is made plain.
        self.information_bank = Backbone(deepcopy(self.model)).requires_grad_(False).eval()
        if self._compile_kwargs is not None:
            self.information_bank.compile(**self._compile_kwargs)
        return self.information_bank

    def train(self, mode: bool = True) -> CTCInterface:
        """Set training mode; the information bank stays in evaluation mode."""
        super().train(mode)
        if self.information_bank is not None:
            self.information_bank.eval()
        return self

    def prepare_distributed(self, device_ids: list | None = None, **ddp_kwargs: Any) -> CTCInterface:
        """Wrap what has gradients in DistributedDataParallel; each stage leaves the other's projectors without any."""
        ddp_kwargs.setdefault('find_unused_parameters', True)
        self.trainable_module = nn.parallel.DistributedDataParallel(self.trainable_module, device_ids, **ddp_kwargs)
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
        left_out: set[int] = set()
        if exclude_head:
            classifier: Any = self.model.get_classifier()  # type: ignore[operator]
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
        """Collect all that a resume needs beyond the backbone's own weights.

        Returns:
            'stage', 'instance' and 'temporal' (projectors, banks and normalizers), 'sampler', in the temporal stage
            'information_bank', with sharded banks 'banks', the rows of this rank. Empty for the moving average.
        """
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
        """Continue from what `get_task_state` gave; banks saved in another dtype are cast.

        Raises:
            RuntimeError: Banks or projectors of another size.
        """
        if not state or ema:
            return
        for name, loss in {'instance': self.instance, 'temporal': self.temporal}.items():
            if name in state:
                loss.load_state_dict(state[name], strict=strict)
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
        """Continue from a state; sharded banks may have been saved by another number of ranks.

        Raises:
            UserError: The state has sharded banks and the task whole ones, or the other way round.
        """
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
        """Take over what lies here of a rank's rows [R, E] of each bank; `saved` says which, of any number of ranks.

        Raises:
            RuntimeError: Rows of another number or size.
        """
        for name, bank in self.banks().items():
            if rows[name].shape != (saved.num_rows, bank.shape[1]):
                raise RuntimeError(f'{name} is {tuple(rows[name].shape)}, not {(saved.num_rows, bank.shape[1])}')
            theirs_R, place_R = saved.find(self.shard.rows(bank.device))
            bank[theirs_R] = rows[name].to(bank)[place_R[theirs_R]]
