"""A training run from flags to weights: epochs, evaluation, trackers, progress."""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, ProjectConfiguration, broadcast_object_list
from timm.utils import random_seed, unwrap_model
from torch import Tensor, nn
from tqdm import tqdm

from ..contrast.task import CTCTask
from ..data import loaders
from ..data import mixup as mixing
from ..data.cached import cache_split
from ..data.datasets import DatasetSplit, check_classes, check_labels, is_streaming, open_split
from ..data.decoding import ReplacingDataset
from ..data.loaders import create_eval_loader
from ..data.transforms import data_config
from ..measure.evaluation import evaluate
from ..models import creation as models
from ..models.backbones import architecture, check_input
from ..runs import Run, keep_interval, refuse_overwriting, run_name
from ..utils.distributed import create_accelerator
from ..utils.errors import UserError
from ..utils.progress import clock, progress_bar
from . import checkpoints, optimization, report, schedules
from . import tasks as stages
from .monitor import COLUMNS, create_monitor
from .position import TrainState
from .signals import StopSignal
from .step import Steps
from .sync_bn import share_statistics


class Trainer:
    """One training run.

    Args:
        args: Flags of `flags.add_arguments`.
        model: What to train, with its head; made as the flags say when None.
        data: Training and validation split; opened as the flags say when None. For plain training.
        frozen: Names of modules that stay in evaluation mode, see `freezing.freeze`. For plain training.

    Raises:
        UserError: Anything in the flags or the data that cannot work; nothing has been written then.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        *,
        model: Any = None,
        data: tuple[DatasetSplit, DatasetSplit] | None = None,
        frozen: Collection[str] = (),
    ) -> None:
        self.args = args
        found = checkpoints.find_resume(args)
        self.run = checkpoints.run_of_state(found.state) if found.state else Run(Path(args.output) / run_name(args))
        refuse_overwriting(self.run, args, found.state)
        self.accelerator = self._accelerator()
        self.run = Run(broadcast_object_list([str(self.run.path)])[0])  # its name holds the time
        world_size, rank = self.accelerator.num_processes, self.accelerator.process_index
        self.device = self.accelerator.device
        random_seed(args.seed)

        if args.mode == 'ctc' and is_streaming(args.dataset):
            raise stages.refused_stream(args)
        with self.accelerator.main_process_first():
            train, val = data or _open_splits(args)
        self._image_name = ReplacingDataset(train.dataset).name
        if args.cache_dataset:
            train = cache_split(train, quiet=rank > 0)
        self.num_instances = 0 if train.labels_N is None else len(train.labels_N)
        self.model = (
            models.create_model(args, args, args, args.num_classes or train.num_classes) if model is None else model
        )
        self.num_classes: int = self.model.num_classes
        check_labels(train, self.num_classes, args.train_split)
        check_labels(val, self.num_classes, args.val_split)
        self.config = data_config(args, self.model)
        check_input(self.model, self.config['input_size'])
        self.model = models.prepare_model(self.model, args, args, self.device, world_size)

        self.task = stages.create_task(args, self.model, train.labels_N, self.device, rank, frozen)
        resumed = self.run if found.state else None
        self.monitor = create_monitor(args, self.config, self.accelerator, self.num_instances, resumed)
        self.mixup = mixing.create_mixup(args.mixup, self.num_classes, args.loss.smoothing)
        if self.mixup is not None and args.batch_size % 2:
            raise UserError(f'--batch-size {args.batch_size}: must be even with --mixup or --cutmix')
        self.loader: loaders.TrainLoader | loaders.StreamLoader
        if train.labels_N is None:
            self.loader = loaders.StreamLoader(train.dataset, args.loader, args.augmentation, self.config, self.device)
        else:
            self.loader = loaders.TrainLoader(
                train.dataset, args.loader, args.augmentation, self.config, self.device, args.seed, rank, world_size
            )
        self.eval_loader = create_eval_loader(
            val.dataset, args.loader, self.config, self.device, world_size > 1, keep=args.loader.cache_dataset
        )

        if args.torchcompile:
            models.check_compiler(args.torchcompile)
            self.task.compile(backend=args.torchcompile, mode=args.torchcompile_mode)
        if args.model_ema:
            self.task.setup_ema(
                decay=args.model_ema_decay,
                use_warmup=args.model_ema_warmup,
                device=torch.device('cpu') if args.model_ema_force_cpu else None,
            )
        args.lr = optimization.resolve_lr(args, world_size)
        module = self.task.get_trainable_module()
        assert module is not None
        optimizer = optimization.create_optimizer(args, module)
        self.steps_per_epoch = math.ceil(len(self.loader) / args.grad_accum_steps)
        self.schedule = schedules.TwoStageSchedule(optimizer, args, self.steps_per_epoch, args.mode == 'ctc')
        if args.mode == 'ctc':  # kept with the run, so that a resume for more epochs does not move it
            args.temporal_start_epoch = schedules.temporal_start(args)
        self.task.trainable_module = self.accelerator.prepare_model(module)
        self.optimizer = self.accelerator.prepare_optimizer(optimizer)

        # Up to here processes are alike, as the moving average copies the model; and what was drawn so far depends on
        # what had been imported before.
        random_seed(args.seed, 1 + rank)
        self.steps = Steps(args, self.accelerator, self.task, self.optimizer, self.mixup, self.num_classes)
        self.stop = StopSignal()
        self.at = TrainState()
        self._skipped_before = self._named = 0
        if found.state:
            self._resume(found)
        with checkpoints.raise_on_all_ranks(self.accelerator, f'{self.run.path} cannot be written to'):
            if self.accelerator.is_main_process:
                self.run.clear_up(self.at.epoch, self.at.batch)  # also after a run stopped before its first state
                if not found.state:
                    self.run.create(args)
                    self.run.write_config(self.model, self.config)
        if args.log_with:
            report.start_trackers(self.accelerator, args)

    def _accelerator(self) -> Accelerator:
        args = self.args
        handlers = [DistributedDataParallelKwargs(find_unused_parameters=args.mode == 'ctc')]
        if args.log_with:
            report.check_tracker(args.log_with)
        return create_accelerator(
            args,
            log_with=args.log_with,
            project_config=ProjectConfiguration(project_dir=str(self.run.path), logging_dir=str(self.run.path)),
            kwargs_handlers=handlers,
        )

    def _facts(self) -> dict[str, Any]:
        """What a state must agree on with the run that continues it."""
        return {
            'architecture': architecture(self.model),
            'num_classes': self.num_classes,
            'num_instances': self.num_instances,
            'mode': self.args.mode,
        }

    def _resume(self, found: checkpoints.ResumePoint) -> None:
        assert found.state is not None
        progress, own = checkpoints.load_state(self.accelerator, self.task, found.state, self._facts())
        at = TrainState.of(progress, own, self._global_batch, self.args.grad_accum_steps, self.device)
        if self.args.mode == 'ctc' and progress['stage'] != self.schedule.stage(at.epoch if at.batch else at.epoch - 1):
            raise UserError(
                f'--temporal-start-epoch {self.args.temporal_start_epoch}: {found.state} is in its '
                f'{progress["stage"]} stage after {at.epoch} epochs; leave the flag out to go on as before'
            )
        self.at = at
        for damaged in found.damaged:
            self.say(f'{damaged}; going on from the state before')
        within = f', batch {at.batch}' if at.batch else ''
        self.say(f'continuing {self.run.path} at epoch {at.epoch}{within} of {self.schedule.num_epochs}')

    @property
    def _global_batch(self) -> int:
        return self.args.batch_size * self.accelerator.num_processes

    def _stage(self, epoch: int) -> str:
        return self.schedule.stage(epoch) if isinstance(self.task, CTCTask) else 'vanilla'

    def say(self, text: str) -> None:
        """Print a line, from the main process, above the progress bars."""
        if self.accelerator.is_main_process:
            tqdm.write(text)

    def fit(self, quiet: bool = False) -> None:
        """Train to the end of the last epoch, saving after each.

        Args:
            quiet: Leave out the lines about where the run begins and where its files are.

        Raises:
            Stopped: A signal told the run to stop; its state is saved.
            RunError: Files can't be written, or too many steps in a row gave no number.
        """
        if not quiet:
            self.say(report.announcement(self))
        started = time.monotonic()
        with report.early_end(self.run, self.stop, self.at, self._save_state):
            self._run_epochs(started)
        self.accelerator.wait_for_everyone()
        self._conclude(time.monotonic() - started, quiet)
        for tracker in self.accelerator.trackers:  # end_training would end the processes' group too
            tracker.finish()

    def _run_epochs(self, started: float) -> None:
        first, alone = self.at.epoch, self.accelerator.num_processes == 1
        while self.at.epoch < self.schedule.num_epochs:
            epoch = self.at.epoch
            # Several processes would not all be at the same place when the signal comes.
            if self._stage(epoch) == 'temporal' and self.task.stage == 'instance':
                with self.stop.at_once(alone):
                    self._start_temporal_stage()
            train = self._train_epoch(epoch)
            last = epoch == self.schedule.num_epochs - 1
            metrics: dict[str, Any] = {}
            with self.stop.at_once(alone):
                if last or (epoch + 1) % self.args.eval_interval == 0:
                    metrics = self._evaluate()
                if self.monitor is not None and self.monitor.due(epoch, last):
                    metrics.update(self.monitor.measure(self._eval_model()))
            self._finish_epoch(epoch, train, metrics)
            spent = time.monotonic() - started
            left = spent / (self.at.epoch - first) * (self.schedule.num_epochs - self.at.epoch)
            lr = self.optimizer.param_groups[0]['lr']
            line = report.epoch_line(epoch, self._stage(epoch), train, metrics, lr)
            self.say(line + (f'  {clock(left)} left' if left >= 1 else ''))

    def _start_temporal_stage(self) -> None:
        assert isinstance(self.task, CTCTask)
        source = open_split(self.args, self.args.train_split)
        loader = loaders.RefreshLoader(
            source, self.args.loader, self.config, self.device, self.accelerator.num_processes > 1
        )
        bar = progress_bar(loader, 'fill the banks', self.accelerator)
        with self.accelerator.autocast():
            self.task.start_temporal_stage(bar)
        self.say('temporal stage: the model is frozen as the information bank, and the banks are filled from it')

    def _train_epoch(self, epoch: int) -> dict[str, float]:
        """One pass over the training set, or what is left of it; mean losses over the epoch."""
        at, args = self.at, self.args
        self.task.train()
        self.loader.set_epoch(epoch, at.batch)
        total, accumulate = len(self.loader), args.grad_accum_steps
        self._skipped_before = self.loader.skipped - at.skipped
        name = f'epoch {epoch} of {self.schedule.num_epochs} ({self._stage(epoch)})'
        rest = self.loader if at.batch < total else ()
        bar = progress_bar(rest, name, self.accelerator, at.batch)
        self.schedule.step(epoch, min(at.batch // accumulate, self.steps_per_epoch - 1))
        seen: list[Tensor | None] = []
        for images, targets, index in bar:
            in_step = min(accumulate, total - at.batch // accumulate * accumulate)
            last_of_step = (at.batch + 1) % accumulate == 0 or at.batch + 1 == total
            self.steps.batch(images, targets, index, epoch, in_step, last_of_step)
            seen.append(index)
            at.batch += 1
            logs = at.batch % args.log_interval == 0 or at.batch == total
            stop = self._update(epoch, seen, ask=logs) if last_of_step else False
            if logs:
                self._log_step(epoch, bar)
            if stop or (last_of_step and self._save_is_due(total)):
                self._save_state()
            if stop:
                raise report.stopped(self.run, self.stop.received, self.at.updates)
        if not at.batch:
            raise UserError(f'--dataset {args.dataset}: the training split gave no batch')
        reduce = self.accelerator.reduce
        numbers = {key: float(reduce(value, 'mean')) for key, value in at.means().items()}
        if isinstance(self.loader, loaders.TrainLoader):
            at.skipped = self.loader.skipped - self._skipped_before
            numbers['skipped'] = int(reduce(torch.tensor(at.skipped, device=self.device), 'sum'))
        numbers['bad_steps'] = at.bad_steps
        return numbers

    def _update(self, epoch: int, seen: list[Tensor | None], ask: bool) -> bool:
        """One optimizer step over the batches seen since the last; whether to stop after it."""
        at = self.at
        at.updates += 1
        step = self.steps.update(at.updates, self.stop.received is not None, ask)
        if step.bad:
            at.bad_steps += 1
            at.bad_in_a_row += 1
            self._tell_bad_step(epoch, seen)
        else:
            at.bad_in_a_row = 0
            at.add(step.losses, len(seen))
        seen.clear()
        update = (at.batch - 1) // self.args.grad_accum_steps
        if self.schedule.on_updates and update + 1 < self.steps_per_epoch:
            self.schedule.step(epoch, update + 1)
        return step.stop

    def _save_is_due(self, total: int) -> bool:
        every = self.args.checkpoint_steps
        return bool(every) and self.at.updates % every == 0 and self.at.batch < total

    def _tell_bad_step(self, epoch: int, seen: list[Tensor | None]) -> None:
        """Note which images a step that gave no number was of; stop the run after too many."""
        names = [self._image_name(int(i)) for index in seen if index is not None for i in index]
        where = f'step {self.at.updates} (epoch {epoch}, batch {self.at.batch - 1})'
        if self.accelerator.is_main_process:
            self.run.log({'epoch': epoch, 'batch': self.at.batch, 'update': self.at.updates, 'bad_step_of': names})
        if self.at.bad_in_a_row >= self.args.max_bad_steps:
            raise report.too_many_bad_steps(self.run, self.at.bad_in_a_row, where, names)
        if self.at.bad_steps == 1:
            self.say(f'{where}: loss or gradient not finite; left out, its images are in {self.run.metrics}')

    def _log_step(self, epoch: int, bar: tqdm) -> None:
        row = {key: float(value) for key, value in self.at.means().items()}
        row['lr'] = self.optimizer.param_groups[0]['lr']
        bar.set_postfix({key: f'{value:.4g}' for key, value in row.items()}, refresh=False)
        self.accelerator.log({f'train/{k}': v for k, v in row.items()}, step=self.at.updates)
        if self.accelerator.is_main_process:
            self.run.log({'epoch': epoch, 'batch': self.at.batch, 'update': self.at.updates, **row})

    def _evaluate(self) -> dict[str, Any]:
        averaged = self._eval_model() if self.task.has_ema() and not self.args.model_ema_force_cpu else None
        share_statistics(self.model, averaged, self.accelerator.num_processes, self.args.dist_bn)
        metrics = evaluate(
            self._eval_model(), self.eval_loader, self.accelerator, self.num_classes, self.args.channels_last
        )
        return {key: metrics[key] for key in ('loss', 'top1', 'top5')}

    def _eval_model(self) -> nn.Module:
        model = self.task.get_eval_model(ema=self.task.has_ema())
        assert model is not None
        return model

    def _finish_epoch(self, epoch: int, train: dict[str, float], metrics: dict[str, Any]) -> None:
        """Write the epoch's numbers, weights and state."""
        lr, stage, at = self.optimizer.param_groups[0]['lr'], self._stage(epoch), self.at
        if 'top1' in metrics and (at.best is None or metrics['top1'] > at.best[0]):
            at.best = (metrics['top1'], epoch)
        evaluation = {f'eval/{key}': value for key, value in metrics.items()}
        self.accelerator.log({'epoch': epoch, **evaluation}, step=at.updates)
        with checkpoints.raise_on_all_ranks(self.accelerator, f'{self.run.path} cannot be written to'):
            if self.accelerator.is_main_process:
                columns = ('loss', 'top1', 'top5', *(COLUMNS if self.monitor is not None else ()))
                blank = {key: metrics.get(key, '') for key in columns}
                self.run.log_epoch(epoch, train, blank, lr)
                names = self.loader.unreadable[self._named :]
                self._named += len(names)
                unreadable = {'unreadable': names} if names else {}
                self.run.log({'epoch': epoch, 'stage': stage, **train, **evaluation, 'lr': lr, **unreadable})
                self._save_weights(epoch, metrics)
        at.next_epoch()
        self._save_state()

    def _save_state(self) -> None:
        """Save the state, and drop the oldest ones."""
        if self.at.batch:
            self.at.skipped = self.loader.skipped - self._skipped_before
        progress = {
            **self._facts(),
            **self.at.progress(self._global_batch, self.args.grad_accum_steps),
            'stage': self.task.stage if isinstance(self.task, CTCTask) else 'vanilla',
        }
        state = checkpoints.save_state(self.accelerator, self.task, self.run, progress, self.at.own())
        with checkpoints.raise_on_all_ranks(self.accelerator, f'{state} could not be checked'):
            if self.accelerator.is_main_process:
                checkpoints.prune_states(self.run, state, self.args.checkpoint_hist)

    def _save_weights(self, epoch: int, metrics: dict[str, Any]) -> None:
        model = unwrap_model(self._eval_model())  # of processes, compilation or averaging
        facts = {**self._facts(), 'epoch': epoch, **{f'eval_{k}': f'{v:.6g}' for k, v in metrics.items()}}
        self.run.save_weights('last', model, facts)
        if self.at.best is not None and self.at.best[1] == epoch:
            self.run.save_weights('best', model, facts)
        every = keep_interval(self.args, self.schedule.num_epochs)
        marks = (self.schedule.temporal_start - 1, self.schedule.num_epochs - 1)
        if every and (epoch % every == every - 1 or epoch in marks):
            self.run.save_weights(f'weights/epoch-{epoch:04d}', model, facts)

    def _conclude(self, seconds: float, quiet: bool) -> None:
        if not self.accelerator.is_main_process:
            return
        from ..measure.plots import plot_run

        pictures = plot_run(self.run.path)
        if self.monitor is not None:
            self.say(f'monitoring took {100 * self.monitor.seconds / max(seconds, 1e-9):.1f}% of the time')
        if not quiet:
            self.say(report.conclusion(self.run.path, seconds, self.at.best, pictures))


def _open_splits(args: argparse.Namespace) -> tuple[DatasetSplit, DatasetSplit]:
    train = open_split(args, args.train_split, is_training=True, batch_size=args.batch_size)
    val = open_split(args, args.val_split, unsplit=False)
    check_classes(train, val)
    return train, val
