"""What a run keeps of its start's transfer: accuracy of a ridge probe on the user's own sets, before, during and after.

The sets are measured as the monitor measures its target, on few images, and beside it where there is one.
"""

from __future__ import annotations

import time
from statistics import fmean
from typing import Any

from accelerate import Accelerator
from timm.utils import unwrap_model
from torch import nn

from ..measure.features import compute_features
from ..measure.plots.kept import plot_kept
from ..measure.probes import ridge_scores
from ..runs import Run
from ..utils.errors import UserError
from ..utils.tasks import Evaluator, Watcher
from .monitor import Monitor, measure_every, watched_set
from .settings import TrainSettings


class KeepReport:
    """Watches several sets, and what `monitor` watches, through the model's image transform `config`."""

    def __init__(
        self,
        settings: TrainSettings,
        config: dict[str, Any],
        accelerator: Accelerator,
        num_instances: int,
        run: Run,
        monitor: Monitor | None,
    ) -> None:
        names, self._run, self._monitor, self._accelerator = settings.monitor.keep_report, run, monitor, accelerator
        self._sets = [watched_set(settings, name, 'keep_report', config, accelerator) for name in names]
        self._images = [watched.images(config) for watched in self._sets]
        self._keep_columns = tuple(f'keep_{watched.slug}' for watched in self._sets)
        if len(set(self._keep_columns)) < len(names):
            raise UserError(f'`keep_report` {" ".join(names)}: several sets end in the same name; rename one')
        self.columns = (*(monitor.columns if monitor is not None else ()), *self._keep_columns)
        self.seconds = 0.0
        self._every = measure_every(settings, len(names), num_instances)

    def due(self, epoch: int, last: bool) -> bool:
        """Whether to measure after this epoch."""
        also = self._monitor is not None and self._monitor.due(epoch, last)
        return also or last or (epoch + 1) % self._every == 0

    def measure(self, model: nn.Module) -> dict[str, float]:
        """Measure all sets, and what the monitor measures."""
        watched = self._monitor.measure(model) if self._monitor is not None else {}
        started, plain = time.monotonic(), unwrap_model(model)
        for column, transfer, images in zip(self._keep_columns, self._sets, self._images):
            train, test = (compute_features(plain, split, self._accelerator) for split in images)
            transfer.check(train, test)
            watched[column] = ridge_scores(train, test, transfer.num_classes)['top1']
        self.seconds += time.monotonic() - started
        return watched

    def begin(self, model: nn.Module, evaluate: Evaluator) -> None:
        """Measure the start, on the validation split too, and keep that with the run."""
        start, top1 = self.measure(model), evaluate(model).get('top1')
        if self._accelerator.is_main_process:
            self._run.write_start({'top1': top1, **{name: start[name] for name in self._keep_columns}})

    def conclude(self) -> str:
        """Draw source against transfer accuracy, and say in a line what was kept."""
        start, last = self._run.start(), self._run.rows()[-1]
        if not start or not all(last.get(f'eval_{name}') for name in self._keep_columns):
            return ''
        plot_kept(self._run, self._keep_columns)
        pairs = {name.removeprefix('keep_'): (float(last[f'eval_{name}']), start[name]) for name in self._keep_columns}
        share = 100 * fmean(now for now, _ in pairs.values()) / max(fmean(then for _, then in pairs.values()), 1e-9)
        sets = ', '.join(f'{name} {now:.1f} of {then:.1f}' for name, (now, then) in pairs.items())
        source = f'; source {float(last["eval_top1"]):.1f}' if last.get('eval_top1') else ''
        return f"kept {share:.0f}% of the start's transfer: {sets}{source}"


def create_watcher(
    settings: TrainSettings,
    config: dict[str, Any],
    accelerator: Accelerator,
    num_instances: int,
    run: Run,
    resumed: bool,
) -> Watcher | None:
    """Create the monitor and the report that the settings ask for, if any.

    Raises:
        UserError: They can't join a run whose summary.csv lacks their columns.
    """
    chosen = settings.monitor
    monitor = Monitor(settings, config, accelerator, num_instances) if chosen.monitor_target else None
    watcher: Watcher | None = monitor
    if chosen.keep_report:
        watcher = KeepReport(settings, config, accelerator, num_instances, run, monitor)
    if watcher is not None and resumed:
        absent = [name for name in watcher.columns if not all(f'eval_{name}' in row for row in run.rows())]
        if absent:
            setting = 'keep_report' if absent[0].startswith('keep_') else 'monitor_target'
            value = getattr(chosen, setting)
            shown = value if isinstance(value, str) else ' '.join(value)
            fault = f'{run} was started without it, and its summary.csv has no columns for it'
            raise UserError(f'`{setting}` {shown}: {fault}; leave it out to go on')
    return watcher
