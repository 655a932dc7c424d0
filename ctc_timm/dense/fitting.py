"""The training loop of detection and segmentation: `Fitting`, over the parts that any training run is made of.

A run's folder is that of train.py: args.yaml, summary.csv, metrics.jsonl, best and last weights, state/ for a resume
that ends at the same bits, plots/. It has no config.json, as its weights are a whole detector's or segmenter's.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, send_to_device
from timm.task import TrainingTask
from timm.utils import random_seed, unwrap_model
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from ..data import decoding as workers
from ..data.indexed import EpochBatches, random_state_kept, seed_transforms
from ..data.transforms import worker_count
from ..models import creation as models
from ..runs import Run, keep_interval, refuse_overwriting, run_name
from ..training import checkpoints, optimization, report, schedules
from ..training.position import TrainState
from ..training.signals import StopSignal
from ..training.step import Steps
from ..training.sync_bn import share_statistics, synchronize
from ..utils.errors import UserError
from ..utils.progress import clock, progress_bar
from .curves import plot_fitting
from .pyramid import Pyramid, tell_layers

Loss = Callable[[nn.Module, Any], dict[str, Tensor]]


class _Task(TrainingTask):
    """A module with its loss, as the shared parts of training take it."""

    def __init__(self, module: nn.Module, loss: Loss, device: torch.device) -> None:
        super().__init__(device=device, verbose=False)
        self.trainable_module = module
        self._loss = loss

    def forward(self, batch: Any) -> dict[str, Tensor]:  # type: ignore[override]
        """The loss and its parts."""
        return self._loss(self.trainable_module, batch)


class _Seeded(Dataset):
    """Items by (epoch, index), whose random transforms are a function of the two and the seed alone."""

    def __init__(self, dataset: Any, seed: int) -> None:
        self.dataset = dataset
        self.seed = seed

    def __getitem__(self, key: tuple[int, int]) -> Any:
        with random_state_kept():
            seed_transforms(self.seed, *key)
            return self.dataset[key[1]]


class Fitting:
    """One run.

    Args:
        args: Of `fitting_flags.add_arguments`.
        accelerator: Of `fitting_flags.open_accelerator`.
        module: What to train; holds the pyramid. Parameters that need no gradient stay.
        pyramid: For `--layer-decay` and `--grad-checkpointing`.
        train: Map-style training set; random transforms may draw from PyTorch's, NumPy's and Python's random states.
        collate: Items to a batch: any nest of tensors.
        loss: loss(module, batch on the device) gives 'loss' and any other scalars. The module may be a wrapper of
            several processes, so that it is to be called only.
        evaluate: evaluate(module) gives numbers by name, the same in all processes; the module is in evaluation mode.
        columns: Those of them that go into summary.csv and the picture, the others into metrics.jsonl only. The first
            decides which epoch is the best; larger is better.
        facts: What a state must agree on with the run that continues it.

    Attributes:
        run: Its folder.
        at: Where it stands; `at.best` is the best value so far with its epoch.
        module: On its device.

    Raises:
        UserError: Anything in the flags that cannot work; nothing has been written then.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        *,
        accelerator: Accelerator,
        module: nn.Module,
        pyramid: Pyramid,
        train: Any,
        collate: Callable[[list[Any]], Any],
        loss: Loss,
        evaluate: Callable[[Any], Mapping[str, float]],
        columns: Sequence[str],
        facts: dict[str, Any] | None = None,
    ) -> None:
        self.args, self.accelerator, self.columns = args, accelerator, tuple(columns)
        self._evaluate_module = evaluate
        found = checkpoints.find_resume(args)
        run = checkpoints.run_of_state(found.state) if found.state else Run(Path(args.output) / run_name(args))
        refuse_overwriting(run, args, found.state)
        self.run = Run(broadcast_object_list([str(run.path)])[0])  # its name holds the time
        world, rank, device = accelerator.num_processes, accelerator.process_index, accelerator.device
        self.facts = {'mode': args.mode, 'body': pyramid.name, **(facts or {})}

        if args.grad_checkpointing:
            models.checkpoint_gradients(getattr(pyramid.body, 'model', None), pyramid.name)
        if args.layer_decay is not None:
            tell_layers(module, pyramid)
        self.module = (synchronize(module, device) if args.sync_bn and world > 1 else module).to(device)
        self.task = _Task(self.module, loss, device)
        self.batches = EpochBatches(len(train), args.batch_size, args.seed, rank, world)
        if not len(self.batches):
            raise UserError(
                f'--batch-size {args.batch_size} times {world} process(es) is more than the {len(train)} training '
                f'images; use at most {max(1, len(train) // world)}'
            )
        count = worker_count(args)
        self.loader = DataLoader(
            _Seeded(train, args.seed),
            batch_sampler=self.batches,
            num_workers=count,
            collate_fn=collate,
            pin_memory=args.pin_mem,
            persistent_workers=count > 0,
            generator=torch.Generator(),  # workers' seeds must not draw from the state that the model draws from
        )
        args.lr = optimization.resolve_lr(args, world)
        optimizer = optimization.create_optimizer(args, self.module)
        self.steps_per_epoch = math.ceil(len(self.batches) / args.grad_accum_steps)
        self.schedule = schedules.TwoStageSchedule(optimizer, args, self.steps_per_epoch, two_stages=False)
        self.task.trainable_module = accelerator.prepare_model(self.module)
        self.optimizer = accelerator.prepare_optimizer(optimizer)
        random_seed(args.seed, 1 + rank)
        self.steps = Steps(args, accelerator, self.task, self.optimizer, None, 0)
        self.stop = StopSignal()
        self.at = TrainState()
        if found.state:
            self._resume(found)
        with checkpoints.raise_on_all_ranks(accelerator, f'{self.run.path} cannot be written to'):
            if accelerator.is_main_process:
                self.run.clear_up(self.at.epoch, self.at.batch)
                if not found.state:
                    self.run.create(args)
        if args.log_with:
            report.start_trackers(accelerator, args)

    def _resume(self, found: checkpoints.ResumePoint) -> None:
        assert found.state is not None
        progress, own = checkpoints.load_state(self.accelerator, self.task, found.state, self.facts)
        self.at = TrainState.of(progress, own, self._global_batch, self.args.grad_accum_steps, self.accelerator.device)
        for damaged in found.damaged:
            self.say(f'{damaged}; going on from the state before')
        within = f', batch {self.at.batch}' if self.at.batch else ''
        self.say(f'continuing {self.run.path} at epoch {self.at.epoch}{within} of {self.schedule.num_epochs}')

    @property
    def _global_batch(self) -> int:
        return self.args.batch_size * self.accelerator.num_processes

    def say(self, text: str) -> None:
        """Print a line, from the main process, above the progress bars."""
        if self.accelerator.is_main_process:
            tqdm.write(text)

    def fit(self) -> dict[str, float]:
        """Train to the end of the last epoch, saving after each.

        Returns:
            The numbers of the last evaluation; empty where a finished run was continued.

        Raises:
            Stopped: A signal told the run to stop; its state is saved.
            RunError: Files can't be written, or too many steps in a row gave no number.
        """
        started, metrics = time.monotonic(), {}
        with report.early_end(self.run, self.stop, self.at, self._save_state):
            metrics = self._run_epochs(started)
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            picture = plot_fitting(self.run, self.columns)
            best = self.at.best
            reached = f'best {self.columns[0]} {best[0]:.4f} at epoch {best[1]}' if best else 'not evaluated'
            self.say(
                f'\ndone in {clock(time.monotonic() - started)}: {reached}\n'
                f'  weights   {self.run.path / "best.safetensors"}, {self.run.path / "last.safetensors"}\n'
                f'  numbers   {self.run.summary}, {self.run.metrics}\n'
                f'  pictures  {picture}'
            )
        for tracker in self.accelerator.trackers:  # end_training would end the processes' group too
            tracker.finish()
        return metrics

    def _run_epochs(self, started: float) -> dict[str, float]:
        first, metrics = self.at.epoch, {}
        while self.at.epoch < self.schedule.num_epochs:
            epoch = self.at.epoch
            began = time.monotonic()
            train = self._train_epoch(epoch)
            rate = len(self.batches) * self._global_batch / (time.monotonic() - began)
            measured: dict[str, float] = {}
            with self.stop.at_once(self.accelerator.num_processes == 1):
                if epoch == self.schedule.num_epochs - 1 or (epoch + 1) % self.args.eval_interval == 0:
                    measured = metrics = self._evaluate()
            self._finish_epoch(epoch, train, measured)
            spent = time.monotonic() - started
            left = spent / (self.at.epoch - first) * (self.schedule.num_epochs - self.at.epoch)
            parts = [f'epoch {epoch:>3}', f'loss {train["loss"]:.4f}']
            parts += [f'{name} {measured[name]:.4f}' for name in self.columns[:4] if name in measured]
            parts += [f'lr {self.optimizer.param_groups[-1]["lr"]:.3g}', f'{rate:.1f} images/s']
            if train['bad_steps']:
                parts.append(f'{train["bad_steps"]:.0f} bad steps left out')
            self.say('  '.join(parts) + (f'  {clock(left)} left' if left >= 1 else ''))
        return metrics

    def _train_epoch(self, epoch: int) -> dict[str, float]:
        """One pass over the training set, or what is left of it; mean losses over the epoch."""
        at, args, total = self.at, self.args, len(self.batches)
        accumulate = args.grad_accum_steps
        self.task.train()
        self.batches.epoch, self.batches.first = epoch, at.batch
        rest = self.loader if at.batch < total else ()
        bar = progress_bar(rest, f'epoch {epoch} of {self.schedule.num_epochs}', self.accelerator, at.batch)
        bar.total = total
        self.schedule.step(epoch, min(at.batch // accumulate, self.steps_per_epoch - 1))
        in_step = 0
        with workers.translate_errors():
            for batch in bar:
                parts = min(accumulate, total - at.batch // accumulate * accumulate)
                last_of_step = (at.batch + 1) % accumulate == 0 or at.batch + 1 == total
                self.steps.take((send_to_device(batch, self.accelerator.device),), parts, last_of_step)
                at.batch, in_step = at.batch + 1, in_step + 1
                logs = at.batch % args.log_interval == 0 or at.batch == total
                stop = False
                if last_of_step:
                    stop, in_step = self._update(epoch, in_step, ask=logs), 0
                if logs:
                    self._log_step(epoch, bar)
                due = args.checkpoint_steps and at.updates % args.checkpoint_steps == 0 and at.batch < total
                if stop or (last_of_step and due):
                    self._save_state()
                if stop:
                    raise report.stopped(self.run, self.stop.received, at.updates)
        reduce = self.accelerator.reduce
        numbers = {key: float(reduce(value, 'mean')) for key, value in at.means().items()}
        return {'loss': float('nan'), **numbers, 'bad_steps': at.bad_steps}

    def _update(self, epoch: int, batches: int, ask: bool) -> bool:
        """One optimizer step; whether to stop after it."""
        at = self.at
        at.updates += 1
        step = self.steps.update(at.updates, self.stop.received is not None, ask)
        if step.bad:
            at.bad_steps += 1
            at.bad_in_a_row += 1
            where = f'step {at.updates} (epoch {epoch}, batch {at.batch - 1})'
            if at.bad_in_a_row >= self.args.max_bad_steps:
                raise report.too_many_bad_steps(self.run, at.bad_in_a_row, where, [])
            if at.bad_steps == 1:
                self.say(f'{where}: loss or gradient not finite; left out')
        else:
            at.bad_in_a_row = 0
            at.add(step.losses, batches)
        update = (at.batch - 1) // self.args.grad_accum_steps
        if self.schedule.on_updates and update + 1 < self.steps_per_epoch:
            self.schedule.step(epoch, update + 1)
        return step.stop

    def _log_step(self, epoch: int, bar: tqdm) -> None:
        row = {key: float(value) for key, value in self.at.means().items()}
        row['lr'] = self.optimizer.param_groups[-1]['lr']
        bar.set_postfix({key: f'{value:.4g}' for key, value in row.items()}, refresh=False)
        self.accelerator.log({f'train/{k}': v for k, v in row.items()}, step=self.at.updates)
        if self.accelerator.is_main_process:
            self.run.log({'epoch': epoch, 'batch': self.at.batch, 'update': self.at.updates, **row})

    def _evaluate(self) -> dict[str, float]:
        share_statistics(self.module, None, self.accelerator.num_processes, self.args.dist_bn)
        self.task.eval()
        with torch.no_grad(), random_state_kept(self.accelerator.device):
            return dict(self._evaluate_module(self.module))

    def _finish_epoch(self, epoch: int, train: dict[str, float], metrics: dict[str, float]) -> None:
        """Write the epoch's numbers, weights and state."""
        lr, at = self.optimizer.param_groups[-1]['lr'], self.at
        value = metrics.get(self.columns[0])
        if value is not None and (at.best is None or value > at.best[0]):
            at.best = (value, epoch)
        evaluation = {f'eval/{key}': value for key, value in metrics.items()}
        self.accelerator.log({'epoch': epoch, **evaluation}, step=at.updates)
        with checkpoints.raise_on_all_ranks(self.accelerator, f'{self.run.path} cannot be written to'):
            if self.accelerator.is_main_process:
                self.run.log_epoch(epoch, train, {key: metrics.get(key, '') for key in self.columns}, lr)
                self.run.log({'epoch': epoch, **train, **evaluation, 'lr': lr})
                self._save_weights(epoch, metrics)
        at.next_epoch()
        self._save_state()

    def _save_state(self) -> None:
        """Save the state, and drop the oldest ones."""
        progress = {**self.facts, **self.at.progress(self._global_batch, self.args.grad_accum_steps)}
        state = checkpoints.save_state(self.accelerator, self.task, self.run, progress, self.at.own())
        with checkpoints.raise_on_all_ranks(self.accelerator, f'{state} could not be checked'):
            if self.accelerator.is_main_process:
                checkpoints.prune_states(self.run, state, self.args.checkpoint_hist)

    def _save_weights(self, epoch: int, metrics: dict[str, float]) -> None:
        model = unwrap_model(self.module)
        facts = {**self.facts, 'epoch': epoch, **{f'eval_{k}': f'{v:.6g}' for k, v in metrics.items()}}
        self.run.save_weights('last', model, facts)
        if self.at.best is not None and self.at.best[1] == epoch:
            self.run.save_weights('best', model, facts)
        every = keep_interval(self.args, self.schedule.num_epochs)
        if every and (epoch % every == every - 1 or epoch == self.schedule.num_epochs - 1):
            self.run.save_weights(f'weights/epoch-{epoch:04d}', model, facts)
