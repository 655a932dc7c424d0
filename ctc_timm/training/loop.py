"""A training run from flags to weights: epochs, evaluation, trackers, progress."""

from __future__ import annotations

import argparse
import contextlib
import logging
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, ProjectConfiguration, broadcast_object_list
from timm.utils import distribute_bn, random_seed, unwrap_model
from torch import Tensor, nn
from tqdm import tqdm

from ..backbones import architecture, check_input
from ..contrast.task import CTCTask
from ..data.flags import data_config
from ..data.loaders import create_eval_loader, keep_batches
from ..data.splits import Source, check_labels, is_streaming, open_split
from ..errors import UserError
from ..measure.evaluation import evaluate
from ..processes import create_accelerator
from ..progress import clock, progress_bar
from . import checkpoints, loaders, mixing, models, optimization, report, schedules, stages
from .checkpoints import RunFolder
from .monitor import COLUMNS, Monitor, monitor_interval

_logger = logging.getLogger(__name__)


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
        data: tuple[Source, Source] | None = None,
        frozen: Collection[str] = (),
    ) -> None:
        self.args = args
        resume = checkpoints.find_resume(args)
        self.run = (
            checkpoints.run_of_state(resume) if resume else RunFolder(Path(args.output) / checkpoints.run_name(args))
        )
        checkpoints.refuse_overwriting(self.run, args, resume)
        self.accelerator = self._accelerator()
        self.run = RunFolder(broadcast_object_list([str(self.run.path)])[0])  # its name holds the time
        world_size, rank = self.accelerator.num_processes, self.accelerator.process_index
        self.device = self.accelerator.device
        random_seed(args.seed)

        if args.mode == 'ctc' and is_streaming(args.dataset):
            raise stages.refused_stream(args)
        with self.accelerator.main_process_first():
            train, val = data or _open_splits(args)
        if args.cache_dataset:
            train = loaders.cached(args, train, quiet=rank > 0)
        self.num_instances = 0 if train.labels_N is None else len(train.labels_N)
        self.model = models.create_model(args, args.num_classes or train.num_classes) if model is None else model
        self.num_classes: int = self.model.num_classes
        check_labels(train, self.num_classes, args.train_split)
        check_labels(val, self.num_classes, args.val_split)
        self.config = data_config(args, self.model)
        check_input(self.model, self.config['input_size'])
        self.model = models.prepare_model(self.model, args, self.device, world_size)

        self.task = stages.create_task(args, self.model, train.labels_N, self.device, rank, frozen)
        if world_size > 1:  # alike up to here, for the moving average copies the model before the processes share it
            random_seed(args.seed, rank)
        self.monitor = self._create_monitor(resume)
        self.mixup = mixing.create_mixup(args, self.num_classes)
        if self.mixup is not None and args.batch_size % 2:
            raise UserError(f'--batch-size {args.batch_size}: must be even with --mixup or --cutmix')
        self.loader: loaders.TrainLoader | loaders.StreamLoader
        if train.labels_N is None:
            self.loader = loaders.StreamLoader(train.dataset, args, self.config, self.device)
        else:
            self.loader = loaders.TrainLoader(train.dataset, args, self.config, self.device, rank, world_size)
        self.eval_loader = create_eval_loader(val.dataset, args, self.config, self.device, world_size > 1)
        if args.cache_dataset:
            keep_batches(self.eval_loader)

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
        self.steps_per_epoch = loaders.steps_per_epoch(len(self.loader), args.grad_accum_steps)
        self.schedule = schedules.TwoStageSchedule(optimizer, args, self.steps_per_epoch, args.mode == 'ctc')
        if args.mode == 'ctc':  # kept with the run, so that a resume for more epochs does not move it
            args.temporal_start_epoch = schedules.temporal_start(args)
        self.task.trainable_module = self.accelerator.prepare_model(module)
        self.optimizer = self.accelerator.prepare_optimizer(optimizer)

        self.epoch = 0
        self.updates = 0
        self.best: tuple[float, int] | None = None
        if resume:
            self._resume(resume)
        if self.accelerator.is_main_process:
            if not resume:
                self.run.forget_from(0)  # of a run that was stopped before its first state
                self.run.create(args)
                self.run.write_config(self.model, self.config)
            else:
                self.run.forget_from(self.epoch)
        if args.log_with:
            self.accelerator.init_trackers('ctc-timm', {k: v for k, v in vars(args).items() if _loggable(v)})

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

    def _create_monitor(self, resume: Path | None) -> Monitor | None:
        if not self.args.monitor_target:
            return None
        if resume and not all(f'eval_{column}' in row for row in self.run.rows() for column in COLUMNS):
            raise UserError(
                f'--monitor-target {self.args.monitor_target}: {self.run.path} was started without it, and its '
                f'summary.csv has no columns for it; leave the flag out to go on'
            )
        every = monitor_interval(self.args, self.num_instances)
        return Monitor(self.args, self.config, self.accelerator, every)

    def _facts(self) -> dict[str, Any]:
        """What a state must agree on with the run that continues it."""
        return {
            'architecture': architecture(self.model),
            'num_classes': self.num_classes,
            'num_instances': self.num_instances,
            'mode': self.args.mode,
        }

    def _resume(self, state: Path) -> None:
        progress = checkpoints.load_state(self.accelerator, self.task, state, self._facts())
        if self.args.mode == 'ctc' and progress['stage'] != self.schedule.stage(progress['epoch'] - 1):
            raise UserError(
                f'--temporal-start-epoch {self.args.temporal_start_epoch}: {state} is in its {progress["stage"]} stage '
                f'after {progress["epoch"]} epochs; leave the flag out to go on as before'
            )
        self.epoch = progress['epoch']
        self.updates = progress['updates']
        self.best = (progress['best_top1'], progress['best_epoch']) if progress['best_epoch'] is not None else None
        self.say(f'continuing {self.run.path} at epoch {self.epoch} of {self.schedule.num_epochs}')

    def _stage(self, epoch: int) -> str:
        return self.schedule.stage(epoch) if isinstance(self.task, CTCTask) else 'vanilla'

    def say(self, text: str) -> None:
        """Print a line, from the main process, above the progress bars."""
        if self.accelerator.is_main_process:
            tqdm.write(text)

    def fit(self, brief: bool = False) -> None:
        """Train to the end of the last epoch, saving after each.

        Args:
            brief: Leave out the lines about where the run begins and where its files are.
        """
        if not brief:
            self._announce()
        started = time.monotonic()
        first = self.epoch
        while self.epoch < self.schedule.num_epochs:
            epoch = self.epoch
            if isinstance(self.task, CTCTask) and epoch == self.schedule.temporal_start:
                self._start_temporal_stage()
            train = self._train_epoch(epoch)
            last = epoch == self.schedule.num_epochs - 1
            metrics: dict[str, Any] = {}
            if last or (epoch + 1) % self.args.eval_interval == 0:
                metrics = self._evaluate()
            if self.monitor is not None and self.monitor.due(epoch, last):
                metrics.update(self.monitor.measure(self._eval_model()))
            self._finish_epoch(epoch, train, metrics)
            spent = time.monotonic() - started
            left = spent / (self.epoch - first) * (self.schedule.num_epochs - self.epoch)
            lr = self.optimizer.param_groups[0]['lr']
            line = report.epoch_line(epoch, self._stage(epoch), train, metrics, lr)
            self.say(line + (f'  {clock(left)} left' if left >= 1 else ''))
        self.accelerator.wait_for_everyone()
        self._conclude(time.monotonic() - started, brief)
        for tracker in self.accelerator.trackers:  # end_training would end the processes' group too
            tracker.finish()

    def _start_temporal_stage(self) -> None:
        assert isinstance(self.task, CTCTask)
        source = open_split(self.args, self.args.train_split)
        loader = loaders.RefreshLoader(source, self.args, self.config, self.device, self.accelerator.num_processes > 1)
        bar = progress_bar(loader, 'fill the banks', self.accelerator)
        with self.accelerator.autocast():
            self.task.start_temporal_stage(bar)
        self.say('temporal stage: the model is frozen as the information bank, and the banks are filled from it')

    def _train_epoch(self, epoch: int) -> dict[str, float]:
        """One pass over the training set; mean losses over the epoch."""
        args, accelerator, task = self.args, self.accelerator, self.task
        stage = self._stage(epoch)
        task.train()
        self.loader.set_epoch(epoch)
        total, accumulate = len(self.loader), args.grad_accum_steps
        mix = self.mixup if not args.mixup_off_epoch or epoch < args.mixup_off_epoch else None
        sums: dict[str, Tensor] = {}
        skipped = self.loader.skipped
        bar = progress_bar(self.loader, f'epoch {epoch} of {self.schedule.num_epochs} ({stage})', accelerator)
        self.schedule.step(epoch)
        batch = -1
        for batch, (images, targets, index) in enumerate(bar):
            in_group = min(accumulate, total - batch // accumulate * accumulate)
            last_of_group = (batch + 1) % accumulate == 0 or batch + 1 == total
            images, targets, lam = self._mix(images, targets, mix)
            if args.channels_last:
                images = images.contiguous(memory_format=torch.channels_last)
            module = task.get_trainable_module()
            waiting = contextlib.nullcontext() if last_of_group else accelerator.no_sync(module)
            with waiting:
                with accelerator.autocast():
                    result = task(images, targets, index, lam) if isinstance(task, CTCTask) else task(images, targets)
                accelerator.backward(result['loss'] / in_group)
            for key in ('loss', 'task_loss', 'ctc_loss'):
                if key in result:
                    sums[key] = sums.get(key, 0) + result[key].detach()
            if last_of_group:
                self._update(epoch, batch // accumulate)
            if (batch + 1) % args.log_interval == 0 or batch + 1 == total:
                self._log_step(epoch, batch, sums, bar)
        if batch < 0:
            raise UserError(f'--dataset {args.dataset}: the training split gave no batch')
        means = {key: value / (batch + 1) for key, value in sums.items()}
        if accelerator.num_processes > 1:
            means = {k: accelerator.reduce(v, 'mean') for k, v in means.items()}
        numbers = {key: float(value) for key, value in means.items()}
        if isinstance(self.loader, loaders.TrainLoader):
            count = torch.tensor(self.loader.skipped - skipped, device=self.device)
            numbers['skipped'] = int(accelerator.reduce(count, 'sum'))
        return numbers

    def _mix(
        self, images: Tensor, targets: Tensor, mix: mixing.InstanceMixup | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        if mix is not None:
            return mix(images, targets)
        if self.mixup is not None:  # mixing has ended, but the criterion still takes soft targets
            smoothing = self.args.smoothing
            one_hot = nn.functional.one_hot(targets, self.num_classes).to(images.dtype)
            targets = one_hot * (1 - smoothing) + smoothing / self.num_classes
        return images, targets, None

    def _update(self, epoch: int, update: int) -> None:
        """One optimiser step with the gradients that are there."""
        optimization.clip_gradients(self.accelerator, self.task, self.args)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.updates += 1
        self.task.update_ema(step=self.updates)
        if self.schedule.on_updates and update + 1 < self.steps_per_epoch:
            self.schedule.step(epoch, update + 1)

    def _log_step(self, epoch: int, batch: int, sums: dict[str, Tensor], bar: tqdm) -> None:
        row = {key: float(value) / (batch + 1) for key, value in sums.items()}
        row['lr'] = self.optimizer.param_groups[0]['lr']
        bar.set_postfix({key: f'{value:.4g}' for key, value in row.items()}, refresh=False)
        self.accelerator.log({f'train/{k}': v for k, v in row.items()}, step=self.updates)
        if self.accelerator.is_main_process:
            self.run.log({'epoch': epoch, 'batch': batch + 1, 'update': self.updates, **row})

    def _evaluate(self) -> dict[str, Any]:
        if self.accelerator.num_processes > 1 and self.args.dist_bn:
            for norm in self.model.modules():
                if norm.training and getattr(norm, 'running_mean', None) is not None:  # a mean would round frozen ones
                    distribute_bn(norm, self.accelerator.num_processes, self.args.dist_bn == 'reduce')
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
        lr = self.optimizer.param_groups[0]['lr']
        stage = self._stage(epoch)
        if 'top1' in metrics and (self.best is None or metrics['top1'] > self.best[0]):
            self.best = (metrics['top1'], epoch)
        self.epoch = epoch + 1
        evaluation = {f'eval/{key}': value for key, value in metrics.items()}
        self.accelerator.log({'epoch': epoch, **evaluation}, step=self.updates)
        if self.accelerator.is_main_process:
            columns = ('loss', 'top1', 'top5', *(COLUMNS if self.monitor is not None else ()))
            blank = {key: metrics.get(key, '') for key in columns}
            self.run.log_epoch(epoch, train, blank, lr)
            self.run.log({'epoch': epoch, 'stage': stage, **train, **evaluation, 'lr': lr})
            self._save_weights(epoch, metrics)
        progress = {
            **self._facts(),
            'epoch': self.epoch,
            'updates': self.updates,
            'stage': self.task.stage if isinstance(self.task, CTCTask) else 'vanilla',
            'best_top1': self.best[0] if self.best else None,
            'best_epoch': self.best[1] if self.best else None,
        }
        checkpoints.save_state(self.accelerator, self.task, self.run, progress, self.args.checkpoint_hist)

    def _save_weights(self, epoch: int, metrics: dict[str, Any]) -> None:
        model = unwrap_model(self._eval_model())  # of processes, compilation or averaging
        facts = {**self._facts(), 'epoch': epoch, **{f'eval_{k}': f'{v:.6g}' for k, v in metrics.items()}}
        self.run.save_weights('last', model, facts)
        if self.best is not None and self.best[1] == epoch:
            self.run.save_weights('best', model, facts)
        every = checkpoints.keep_interval(self.args, self.schedule.num_epochs)
        marks = (self.schedule.temporal_start - 1, self.schedule.num_epochs - 1)
        if every and (epoch % every == every - 1 or epoch in marks):
            self.run.save_weights(f'weights/epoch-{epoch:04d}', model, facts)

    def _announce(self) -> None:
        args = self.args
        parameters = sum(p.numel() for p in self.model.parameters()) / 1e6
        images = f'{self.num_instances:,} images' if self.num_instances else 'a stream of images'
        self.say(
            f'{args.mode}: {architecture(self.model)} ({parameters:.2f}M parameters, {self.num_classes} '
            f'classes) on {images} of {args.dataset or args.data_dir or args.data or "digits"}, '
            f'{self.schedule.num_epochs} epochs, batch {args.batch_size} on {self.accelerator.num_processes} '
            f'process(es), {self.device}, to {self.run.path}'
        )

    def _conclude(self, seconds: float, brief: bool) -> None:
        if not self.accelerator.is_main_process:
            return
        from ..measure.plots import plot_run

        pictures = plot_run(self.run.path)
        if self.monitor is not None:
            self.say(f'monitoring took {100 * self.monitor.seconds / max(seconds, 1e-9):.1f}% of the time')
        if not brief:
            self.say(report.conclusion(self.run.path, seconds, self.best, pictures))


def _open_splits(args: argparse.Namespace) -> tuple[Source, Source]:
    train = open_split(args, args.train_split, is_training=True, batch_size=args.batch_size)
    return train, open_split(args, args.val_split, unsplit=False)


def _loggable(value: Any) -> bool:
    return isinstance(value, (bool, int, float, str))
