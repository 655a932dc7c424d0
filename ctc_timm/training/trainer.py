"""The training loop: epochs of optimizer steps, evaluation, logs, weights and states. One for every task."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from typing import IO, Any

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import broadcast_object_list
from timm.utils import random_seed, unwrap_model
from torch.optim import Optimizer
from tqdm import tqdm

from ..measure.plots.training import plot_run
from ..runs import Run, format_metrics
from ..utils.errors import RunError, UserError
from ..utils.progress import clock, progress_bar
from ..utils.tasks import Batch, Evaluator, Loader, TrainerTask, Watcher
from .checkpoints import ResumePoint, TrainState, load_state, raise_on_all_ranks, save_state, settled_facts, values_of
from .optimization import TwoStageSchedule
from .settings import CommandSettings
from .signals import Interrupted, StopSignal, newest_state
from .step import Steps, share_statistics

logger = get_logger(__name__)


class Trainer:
    """Trains a task, whatever it is: `open_run`, then `fit`. Where the run stands is in `state`.

    Args:
        settings: Of a command that trains, with the groups run, optimizer, loader and batch_norm.
        task: With its module on the device; module and optimizer are prepared here.
        run: The run's folder, the same on all ranks.
        facts: What a state must agree on with the run that continues it; metadata of all weights too.
        mixup: mixup(batch, epoch) gives the batch that the task takes; None leaves the loader's.
        images: What tells the training set from others, see `data.fingerprint`; '' for nothing.
        monitor: Measures transfer now and then.
        training_images: Gives one pass over the training set without augmentation, for tasks that ask for it.
    """

    def __init__(
        self,
        settings: CommandSettings,
        task: TrainerTask,
        loader: Loader,
        evaluator: Evaluator,
        optimizer: Optimizer,
        schedule: TwoStageSchedule,
        run: Run,
        accelerator: Accelerator,
        *,
        facts: Mapping[str, Any],
        images: str = '',
        mixup: Callable[[Batch, int], Batch] | None = None,
        monitor: Watcher | None = None,
        training_images: Callable[[], Iterable[Any]] = tuple,
    ) -> None:
        self.all_settings, self.settings, self.facts, self.run = settings, settings.run, dict(facts), run
        self.task, self.loader, self.evaluator, self.schedule = task, loader, evaluator, schedule
        self.accelerator, self.monitor, self.training_images = accelerator, monitor, training_images
        self.global_batch = settings.loader.batch_size * accelerator.num_processes
        self.accumulation_steps = settings.optimizer.grad_accum_steps
        task.trainable_module = accelerator.prepare_model(task.get_trainable_module())
        self.optimizer: Any = accelerator.prepare_optimizer(optimizer)
        self.settled = settled_facts(settings, task, optimizer, accelerator, images)
        self.settled['eval_metric'] = evaluator.best_metric
        # Up to here ranks are alike, as the moving average copies the model; and what was drawn so far depends on
        # what had been imported before.
        random_seed(self.settings.seed, 1 + accelerator.process_index)
        self.steps = Steps(accelerator, task, self.optimizer, settings, mixup)
        task.start_training()
        self.stop, self.state = StopSignal(), TrainState()
        self._lock: IO[str] | None = None
        self._skipped_before = self._named = 0

    def open_run(self, point: ResumePoint, write_config: Callable[[], object] = tuple) -> None:
        """Continue from a state, or create the run's folder with args.yaml and config.json.

        Raises:
            UserError: The state does not fit, or another process trains there; nothing has been written.
            RunError: The folder can't be written to.
        """
        values = values_of(self.all_settings)
        self._take_lock(fresh=point.state is None and self.all_settings.folder.resume != 'auto')
        if point.state:
            self._resume(point)
        with raise_on_all_ranks(self.accelerator, f'{self.run} cannot be written to'):
            if self.accelerator.is_main_process:
                self.run.clean_up(self.state.epoch, self.state.batch)  # also after a stop before the first state
                if not point.state:
                    self.run.create(values)
                    write_config()
        if self.accelerator.log_with:  # trackers write into the run's folder
            self.accelerator.project_configuration.logging_dir = str(self.run)
            plain = {name: value for name, value in values.items() if isinstance(value, (bool, int, float, str))}
            self.accelerator.init_trackers('ctc-timm', plain)

    def _take_lock(self, fresh: bool) -> None:
        """Keep other processes out of the run's folder, which is empty when `fresh`, until `fit` ends."""
        taken = [True]
        with raise_on_all_ranks(self.accelerator, f'{self.run} cannot be written to'):
            if self.accelerator.is_main_process:
                self._lock = self.run.lock()
                taken = [self._lock is not None and not (fresh and self.run.args_file.exists())]
        if not broadcast_object_list(taken)[0]:
            raise UserError(
                f'{self.run}: is in use by another training process; wait for its end, or name another folder'
            )

    def _resume(self, point: ResumePoint) -> None:
        assert point.state is not None
        progress, self.state = load_state(self.accelerator, self.task, point.state, self.facts, self.settled)
        state = self.state
        images, accumulation_steps = progress['step_size']
        if (images, accumulation_steps) != (self.global_batch, self.accumulation_steps):
            # To the nearest step before: no image of the epoch is left out, some may be seen again.
            state.batch = state.batch * images // self.global_batch
            state.batch -= state.batch % self.accumulation_steps
        stage = self.schedule.stage(state.epoch if state.batch else state.epoch - 1)
        if self.schedule.two_stages and progress['stage'] != stage:
            raise UserError(
                f'`temporal_start_epoch` {self.schedule.temporal_start}: {point.state} is in its {progress["stage"]} '
                f'stage after {state.epoch} epochs; leave the setting out to go on as before'
            )
        for damage in point.damaged:
            logger.info(f'{damage}; going on from the state before')
        within = f', batch {state.batch}' if state.batch else ''
        logger.info(f'continuing {self.run} at epoch {state.epoch}{within} of {self.schedule.num_epochs}')

    def fit(self) -> dict[str, float]:
        """Train to the end of the last epoch, saving after each; the last evaluation, unless no epoch was left.

        Raises:
            Stopped: A signal asked the run to stop; its state is saved.
            RunError: Files can't be written, or too many steps in a row had a loss or gradient that is not finite.
        """
        started, first, epochs = time.monotonic(), self.state.epoch, self.schedule.num_epochs
        metrics: dict[str, float] = {}
        with self._lock or nullcontext(), self.stop.heeded(self.run, self.state, self._save_state):
            if self.monitor is not None and not self.state.updates:
                with self.stop.at_once(self.accelerator.num_processes == 1):
                    self.monitor.begin(self.eval_model(), self.evaluator)
            while self.state.epoch < epochs:
                metrics, line = self._run_epoch(self.state.epoch)
                spent = time.monotonic() - started
                left = spent / (self.state.epoch - first) * (epochs - self.state.epoch)
                logger.info(line + (f'  {clock(left)} left' if left >= 1 else ''))
        self.accelerator.wait_for_everyone()
        if self.monitor is not None:
            share = self.monitor.seconds / max(time.monotonic() - started, 1e-9)
            logger.info(f'monitoring took {100 * share:.1f}% of the time')
        if self.accelerator.is_main_process:
            plot_run(self.run)
            if self.monitor is not None and (kept := self.monitor.conclude()):
                logger.info(kept)
        for tracker in self.accelerator.trackers:  # end_training would end the processes' group too
            tracker.finish()
        return metrics

    def _stage(self, epoch: int) -> str:
        return self.schedule.stage(epoch) if self.schedule.two_stages else self.task.stage

    def _run_epoch(self, epoch: int) -> tuple[dict[str, float], str]:
        """Train, evaluate, write; the evaluation's numbers and a line of all."""
        stage, last = self._stage(epoch), epoch == self.schedule.num_epochs - 1
        alone = self.accelerator.num_processes == 1  # several ranks would not all be at one place at a signal
        with self.stop.at_once(alone and stage != self.task.stage), self.accelerator.autocast():
            what = 'pass over the training images'
            if self.task.prepare_epoch(stage, lambda: progress_bar(self.training_images(), what, self.accelerator)):
                logger.info(f'the {stage} stage starts at epoch {epoch}')
        began, done = time.monotonic(), self.state.batch
        train = self._train_epoch(epoch)
        rate = (self.state.batch - done) * self.global_batch / (time.monotonic() - began)
        metrics, watched = dict[str, float](), dict[str, float]()
        with self.stop.at_once(alone):
            if last or (epoch + 1) % self.settings.eval_interval == 0:
                share_statistics(self.task, self.accelerator, self.all_settings.batch_norm.dist_bn)
                metrics = self.evaluator(self.eval_model())
            if self.monitor is not None and self.monitor.due(epoch, last):
                watched = self.monitor.measure(self.eval_model())
        self._finish_epoch(epoch, train, {**metrics, **watched})
        columns = [name for name in self.evaluator.columns[:4] if name in metrics] + list(watched)[:1]
        shown = {name: {**metrics, **watched}[name] for name in columns}
        return metrics, self._epoch_line(epoch, train, shown, rate)

    def _epoch_line(self, epoch: int, train: Mapping[str, float], metrics: Mapping[str, float], rate: float) -> str:
        """An epoch's mean losses, its validation metrics, learning rate and training images a second in one line."""
        parts = [f'epoch {epoch:>3}', f'{self._stage(epoch):<8}', f'loss {train["loss"]:.4f}']
        if 'ctc_loss' in train:
            parts.append(f'(task {train["task_loss"]:.4f}, ctc {train["ctc_loss"]:.4f})')
        parts += [format_metrics(metrics)] if metrics else []
        parts += [f'lr {self._lr():.3g}', f'{rate:.{int(rate < 10)}f} images/s']
        for name, what in (('bad_steps', 'bad steps discarded'), ('skipped', 'unreadable')):
            parts += [f'{train[name]:.0f} {what}'] if train.get(name) else []
        return '  '.join(parts)

    def _train_epoch(self, epoch: int) -> dict[str, float]:
        """One pass over the training set, or what is left of it; mean losses over the epoch."""
        state, accumulate, settings = self.state, self.accumulation_steps, self.settings
        self.task.train()
        self.loader.set_epoch(epoch, state.batch)
        self._skipped_before = (self.loader.skipped or 0) - state.skipped
        self.schedule.step(epoch, min(state.batch // accumulate, self.schedule.updates_per_epoch - 1), state.metrics)
        total, seen = len(self.loader), list[Batch]()
        name = f'epoch {epoch} of {self.schedule.num_epochs} ({self._stage(epoch)})'
        bar = progress_bar(self.loader if state.batch < total else (), name, self.accelerator, state.batch)
        for batch in bar:
            in_step = min(accumulate, total - state.batch // accumulate * accumulate)
            last_of_step = (state.batch + 1) % accumulate == 0 or state.batch + 1 == total
            self.steps.forward_backward(batch, epoch, in_step, last_of_step)
            seen.append((None, *batch[1:]))  # without the images, which would fill the memory
            state.batch += 1
            logs = state.batch % settings.log_interval == 0 or state.batch == total
            stop = self._update(epoch, seen, ask=logs) if last_of_step else False
            if logs:
                self._log_step(epoch, bar)
            if stop:
                raise Interrupted
            due = settings.checkpoint_steps and state.updates % settings.checkpoint_steps == 0
            if last_of_step and due and state.batch < total:
                self._save_state()
        if not state.batch:
            raise UserError('`dataset`: the training split gave no batch')
        reduce = self.accelerator.reduce
        numbers = {'loss': float('nan')}  # of an epoch whose steps were all discarded
        numbers |= {key: float(reduce(value, 'mean')) for key, value in state.means().items()}
        if self._count_skipped():
            numbers['skipped'] = int(reduce(torch.tensor(state.skipped, device=self.accelerator.device), 'sum'))
        return {**numbers, 'bad_steps': state.bad_steps}

    def _count_skipped(self) -> bool:
        """Bring `state.skipped` up to date, which waits for the device; False where it is not counted."""
        skipped = self.loader.skipped
        if skipped is not None:
            self.state.skipped = skipped - self._skipped_before
        return skipped is not None

    def _update(self, epoch: int, seen: list[Batch], ask: bool) -> bool:
        """Take an optimizer step over the batches seen since the last; whether to stop after it."""
        state = self.state
        state.updates += 1
        step = self.steps.update(state.updates, self.stop.received is not None, ask)
        if step.bad:
            self._discard(epoch, [name for batch in seen for name in self.loader.image_names(batch)])
        else:
            state.bad_in_a_row = 0
            state.add(step.losses, len(seen))
        seen.clear()
        update = (state.batch - 1) // self.accumulation_steps + 1
        if self.schedule.on_updates and update < self.schedule.updates_per_epoch:
            self.schedule.step(epoch, update)
        return step.stop

    def _log(self, epoch: int, row: Mapping[str, Any]) -> None:
        if self.accelerator.is_main_process:
            self.run.log({'epoch': epoch, 'batch': self.state.batch, 'update': self.state.updates, **row})

    def _discard(self, epoch: int, names: list[str]) -> None:
        """Count and log a bad step with the names of its images; raise a RunError where it is one too many."""
        state = self.state
        state.bad_steps += 1
        state.bad_in_a_row += 1
        where = f'step {state.updates} (epoch {epoch}, batch {state.batch - 1})'
        self._log(epoch, {'bad_step_of': names})
        if state.bad_in_a_row >= self.settings.max_bad_steps:
            more = f' and {len(names) - 4} more in {self.run.metrics_file}' if len(names) > 4 else ''
            images = f' with the images {", ".join(names[:4])}{more}' if names else ''
            raise RunError(
                f'`max_bad_steps` {state.bad_in_a_row}: loss or gradient not finite in {state.bad_in_a_row} steps in a '
                f'row, up to {where}{images}; {newest_state(self.run)}; try a lower `lr`, `clip_grad`, or '
                f"`amp=False`, then `resume='auto'`"
            )
        if state.bad_steps == 1:
            logger.info(f'{where}: loss or gradient not finite; discarded, see {self.run.metrics_file}')

    def _log_step(self, epoch: int, bar: tqdm) -> None:
        row = {key: float(value) for key, value in self.state.means().items()} | {'lr': self._lr()}
        bar.set_postfix({key: f'{value:.4g}' for key, value in row.items()}, refresh=False)
        self.accelerator.log({f'train/{k}': v for k, v in row.items()}, step=self.state.updates)
        self._log(epoch, row)

    def _lr(self) -> float:
        """Learning rate of the last group, which is the classifier's where layers differ."""
        return self.optimizer.param_groups[-1]['lr']

    def eval_model(self) -> Any:
        """What is evaluated and saved: the model, or its moving average."""
        return self.task.get_eval_model(ema=self.task.has_ema())

    def _finish_epoch(self, epoch: int, train: dict[str, float], metrics: Mapping[str, float]) -> None:
        """Write the epoch's numbers, weights and state."""
        state, value = self.state, metrics.get(self.evaluator.best_metric)
        state.metrics.append(value)
        if value is not None and value == value:  # a NaN is never the best
            # An epoch of the instance stage has not seen the temporal term: it is best only until one has.
            outdated = state.best is not None and state.best[1] < self.schedule.temporal_start <= epoch
            sign = -1 if self.evaluator.best_metric == 'loss' else 1
            if state.best is None or outdated or sign * value > sign * state.best[0]:
                state.best = (value, epoch)
        evaluation = {f'eval/{key}': value for key, value in metrics.items()}
        self.accelerator.log({'epoch': epoch, **evaluation}, step=state.updates)
        with raise_on_all_ranks(self.accelerator, f'{self.run} cannot be written to'):
            if self.accelerator.is_main_process:
                columns = (*self.evaluator.columns, *(self.monitor.columns if self.monitor is not None else ()))
                self.run.log_epoch(epoch, train, {key: metrics.get(key, '') for key in columns}, self._lr())
                names = self.loader.unreadable[self._named :]
                self._named += len(names)
                row = {'epoch': epoch, 'stage': self._stage(epoch), **train, **evaluation, 'lr': self._lr()}
                self.run.log({**row, 'unreadable': names} if names else row)
                self._save_weights(epoch, metrics)
        state.next_epoch()
        self._save_state()

    def _save_weights(self, epoch: int, metrics: Mapping[str, float]) -> None:
        every, epochs = self.settings.keep_every, self.schedule.num_epochs
        every = max(1, round(epochs / 20)) if every is None else every
        kept = epoch % every == every - 1 or epoch in (self.schedule.temporal_start - 1, epochs - 1) if every else False
        best = self.state.best is not None and self.state.best[1] == epoch
        model = unwrap_model(self.eval_model())  # of processes, compilation or averaging
        metadata = {**self.facts, 'epoch': epoch, 'stage': self._stage(epoch)}
        metadata |= {f'eval_{k}': f'{v:.6g}' for k, v in metrics.items()}
        for name, wanted in (('last', True), ('best', best), (f'weights/epoch-{epoch:04d}', kept)):
            if wanted:
                self.run.save_weights(name, model, metadata)

    def _save_state(self) -> None:
        """Save the state, and remove the oldest ones."""
        if self.state.batch:
            self._count_skipped()
        step_size, keep = [self.global_batch, self.accumulation_steps], self.settings.checkpoint_hist
        checked = {**self.settled, **self.facts, 'step_size': step_size, 'stage': self.task.stage}
        save_state(self.accelerator, self.task, self.run, self.state, checked, keep)
