"""The run folder: every file in it is named, written and read here, and nowhere else.

runs/NAME/
  args.yaml          the settings
  config.json        architecture, classes and image transform, as timm reads them
  summary.csv        a row an epoch
  metrics.jsonl      log rows
  start.json         transfer of the initial model, with `keep_report`
  best.safetensors   last.safetensors   weights/epoch-0005.safetensors
  state/             what a resume needs, after epoch 3 in epoch-0003, and within epoch 4, after the run's 120th
                     optimizer step, in epoch-0004-step-000120; and the lock of the process that trains
  plots/             pictures
  validation/  linear_probe/  features/  dynamics/    measurements
"""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import IO, Any, TypeVar, cast

import yaml
from timm.models._hub import save_config_for_hf
from timm.utils import update_summary
from torch import nn

from .utils.errors import UserError
from .utils.files import atomic_rename, write_text
from .utils.text import file_name
from .utils.weights_files import save_weights, weights_metadata
from .utils.yaml_files import read_mapping

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None  # type: ignore[assignment]

_LARGEST_EPOCH = 10**9
_SHOWN = dict(loss='val loss {:.4f}', top1='top-1 {:.2f}%', top5='top-5 {:.2f}%', monitor_ridge_top1='target {:.2f}%')
T = TypeVar('T')


class Run:
    """Reads and writes one run, whose folder `create` makes. It is accepted wherever a path is."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.args_file = self.path / 'args.yaml'
        self.config_file = self.path / 'config.json'
        self.summary_file = self.path / 'summary.csv'
        self.metrics_file = self.path / 'metrics.jsonl'
        self.start_file = self.path / 'start.json'
        self.last_weights = self.path / 'last.safetensors'
        self.weights_folder = self.path / 'weights'
        self.state_folder = self.path / 'state'
        self.plots = self.path / 'plots'
        self.validation = self.path / 'validation'
        self.linear_probe = self.path / 'linear_probe'
        self.features = self.path / 'features'
        self.dynamics = self.path / 'dynamics'

    def __fspath__(self) -> str:
        return str(self.path)

    __str__ = __fspath__

    def __repr__(self) -> str:
        return f'Run({str(self.path)!r})'

    @property
    def best_weights(self) -> Path:
        """Weights of the best epoch; of the last one where none was evaluated."""
        best = self.path / 'best.safetensors'
        return self.last_weights if self.last_weights.is_file() and not best.is_file() else best

    def kept_weights(self) -> dict[int, Path]:
        """Weights files that were kept, by epoch."""
        files = sorted(self.weights_folder.glob('epoch-[0-9]*.safetensors'))
        return {_numbers(file)[0]: file for file in files}

    def states(self) -> list[Path]:
        """States for a resume, the oldest first; one after an epoch comes before those within the next."""
        places = {state: _numbers(state) for state in self.state_folder.glob('epoch-[0-9]*')}
        return sorted(places, key=lambda state: places[state] if places[state][1:] else [places[state][0] + 1])

    def state(self, epoch: int, batch: int, updates: int) -> Path:
        """The folder of the state that goes on with a batch of an epoch."""
        return self.state_folder / (f'epoch-{epoch:04d}-step-{updates:06d}' if batch else f'epoch-{epoch - 1:04d}')

    def unfinished(self) -> list[Path]:
        """Files and folders that an interruption left half-written."""
        return [*self.path.glob('*.tmp'), *self.weights_folder.glob('*.tmp'), *self.state_folder.glob('.epoch-*')]

    def lock(self) -> IO[str] | None:
        """Lock the folder until the file that is returned is closed; None where another process holds the lock."""
        self.state_folder.mkdir(parents=True, exist_ok=True)
        file = (self.state_folder / '.lock').open('a')
        try:
            if fcntl is not None:  # loader processes do not inherit this kind, so it ends with its process
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            file.close()
            return None
        except OSError:  # a file system without locks
            pass
        return file

    def create(self, values: Mapping[str, Any]) -> None:
        """Make the folder and write args.yaml."""
        for folder in (self.path, self.weights_folder, self.state_folder, self.plots):
            folder.mkdir(parents=True, exist_ok=True)
        plain = json.loads(json.dumps(values, default=str))
        write_text(self.args_file, yaml.safe_dump(plain, sort_keys=True, allow_unicode=True))

    def args(self) -> dict[str, Any]:
        """The settings that the run was started with."""
        return read_mapping(self.args_file)

    def write_config(self, model: nn.Module, data_config: dict[str, Any], class_names: Mapping[int, str]) -> None:
        """Write config.json, by which `timm.create_model('local-dir:<run>', pretrained=True)` loads the run.

        As in timm, `label_names` is the list of the classes' names, or a mapping where some class has none.
        """
        temporary = self.path / 'config.json.tmp'
        complete = list(class_names) == [*range(cast(int, model.num_classes))]
        names = list(class_names.values()) if complete else dict(class_names)
        save_config_for_hf(model, str(temporary), {'label_names': names}, data_config=data_config)
        atomic_rename(temporary, self.config_file)

    def class_names(self) -> dict[int, str]:
        """The names of the classes that config.json holds, by class; of runs of before, empty."""
        try:
            names = json.loads(self.config_file.read_text(encoding='utf-8')).get('label_names') or {}
            pairs = names.items() if isinstance(names, dict) else enumerate(names)
            return {int(index): name for index, name in pairs if isinstance(name, str)}
        except (OSError, ValueError, TypeError, AttributeError, RecursionError):
            return {}

    def check_links(self) -> None:
        """Raise a UserError for a link that leads out of the folder: a run may be of other people."""
        home = os.path.realpath(self.path)
        parts = self.weights_folder, self.state_folder, self.plots, self.validation, self.linear_probe, self.features
        ours = [path for part in (*parts, self.dynamics) for path in part.rglob('*')]
        for path in [*self.path.iterdir(), *ours]:
            if path.is_symlink() and not Path(os.path.realpath(path)).is_relative_to(home):
                raise UserError(f'{path}: is a link that leads out of the run; put a copy of the file in its place')

    def save_weights(self, name: str, model: nn.Module, metadata: Mapping[str, Any]) -> None:
        """Write `<name>.safetensors`: 'best', 'last' or 'weights/epoch-0005'."""
        file = self.path / f'{name}.safetensors'
        save_weights(file.with_suffix('.tmp'), model.state_dict(), metadata)
        atomic_rename(file.with_suffix('.tmp'), file)

    def write_start(self, values: Mapping[str, float | None]) -> None:
        """Keep what was measured of the initial model."""
        write_text(self.start_file, json.dumps(values) + '\n')

    def start(self) -> dict[str, Any]:
        """What was measured of the initial model; empty where nothing was."""
        return read_mapping(self.start_file) if self.start_file.is_file() else {}

    def log(self, row: Mapping[str, Any]) -> None:
        """Append a row to metrics.jsonl."""
        with self.metrics_file.open('a', encoding='utf-8') as file:
            file.write(json.dumps(row) + '\n')

    def log_epoch(self, epoch: int, train: dict[str, Any], evaluation: dict[str, Any], lr: float | None) -> None:
        """Append a row to summary.csv, by timm's column names."""
        update_summary(epoch, train, evaluation, filename=str(self.summary_file), lr=lr)

    def rows(self) -> list[dict[str, str]]:
        """Rows of summary.csv, one an epoch, of numbers and empty cells; raises a UserError for a damaged line."""
        columns: list[str] = []

        def parse(line: bytes) -> dict[str, str] | None:
            (cells,) = csv.reader([line.decode('utf-8')], strict=True)
            if not columns:
                columns.extend(cells)
                return {} if 'epoch' in cells and len(set(cells)) == len(cells) else None
            row = dict(zip(columns, cells, strict=True))
            numbers = [float(cell or 0) for cell in cells]
            return row if numbers and _is_count(int(row['epoch'])) else None

        return _parse(self.summary_file, parse)[1:]

    def log_rows(self) -> list[dict[str, Any]]:
        """Rows of metrics.jsonl, with an 'epoch', and a 'batch' within it; raises a UserError for a damaged line."""

        def parse(line: bytes) -> dict[str, Any] | None:
            row = json.loads(line)
            return row if _is_count(row['epoch']) and _is_count(row.get('batch', 0)) else None

        return _parse(self.metrics_file, parse)

    def clean_up(self, epoch: int, batch: int = 0) -> None:
        """Remove half-written files, and log rows after the resume point: an epoch, from 0, and its batches so far."""
        for path in self.unfinished():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        if self.summary_file.exists():
            header, *lines = _lines(self.summary_file) or [b'']
            kept = [line for row, line in zip(self.rows(), lines) if int(row['epoch']) < epoch]
            _write_lines(self.summary_file, [header, *kept] if kept else [])
        if self.metrics_file.exists():
            rows = zip(self.log_rows(), _lines(self.metrics_file))
            seen = [line for row, line in rows if (row['epoch'], row.get('batch', float('inf'))) <= (epoch, batch)]
            _write_lines(self.metrics_file, seen)

    def summary(self) -> RunSummary:
        """What the run reached; raises a UserError where it is no run, or its files are damaged."""
        args, file = self.args(), self.best_weights
        facts = weights_metadata(file) if file.is_file() else {}
        model = facts.get('architecture') or facts.get('body') or str(args.get('model', ''))
        mode, best_epoch = facts.get('mode') or str(args.get('mode', '')), int(facts.get('epoch', -1))
        evaluations = {
            int(row['epoch']): {key[5:]: float(row[key]) for key in row if key.startswith('eval_') and row[key]}
            for row in self.rows()
        }
        best, last = (evaluations.get(epoch, {}) for epoch in (best_epoch, len(evaluations) - 1))
        pictures = sorted(self.plots.glob('*.png'))
        return RunSummary(self.path, model, mode, len(evaluations), best_epoch if best else None, best, last, pictures)


@dataclass(frozen=True)
class RunSummary:
    """What a run reached, readable by `print`."""

    path: Path
    model: str  # architecture
    mode: str  # 'ctc', 'vanilla', or the name of another task
    epochs: int  # done
    best_epoch: int | None  # from 0; None before the first evaluation
    best: dict[str, float]  # metrics of that epoch, by name; accuracies in percent
    last: dict[str, float]  # of the last epoch; empty where it was not evaluated
    pictures: list[Path]

    def __str__(self) -> str:
        best = f'{format_metrics(self.best)} at epoch {self.best_epoch}' if self.best else 'not evaluated'
        lines = {'best': best, 'last': format_metrics(self.last), 'pictures': ', '.join(map(str, self.pictures))}
        head = f'{self.path}: {self.model}, {self.mode}, {self.epochs} epochs'
        return '\n'.join([head, *(f'  {name:<9} {text}' for name, text in lines.items() if text)])


def format_metrics(metrics: Mapping[str, float]) -> str:
    """Write metrics for people: 'val loss 0.4135, top-1 93.21%'."""
    return ', '.join(_SHOWN.get(name, f'{name} {{:.4f}}').format(value) for name, value in metrics.items())


def _numbers(path: Path) -> list[int]:
    return [int(digits) for digits in re.findall(r'\d+', path.name)]


def run_of_state(state: Path) -> Run:
    """The run that a state belongs to."""
    return Run(state.resolve().parent.parent)


def run_name(experiment: str, output: str, words: Sequence[str]) -> str:
    """Name a run's folder as the user does, unless that would leave `output`, or by time, model, data and mode."""
    if not experiment:
        return file_name('-'.join([datetime.now().strftime('%Y%m%d-%H%M%S'), *words]))
    if Path(experiment).is_absolute() or '..' in Path(experiment).parts:
        raise UserError(f'`experiment` {experiment}: must be a name inside `output` {output}')
    return experiment


def _lines(file: Path) -> list[bytes]:
    """A file's complete lines, with their ends; a kill may have cut the last one short."""
    content = file.read_bytes() if file.exists() else b''
    return [line for line in content.splitlines(keepends=True) if line.endswith(b'\n')]


def _write_lines(file: Path, lines: list[bytes]) -> None:
    temporary = file.with_name(file.name + '.tmp')
    temporary.write_bytes(b''.join(lines))
    atomic_rename(temporary, file)


def _parse(file: Path, parse: Callable[[bytes], T | None]) -> list[T]:
    """The values of a file's lines; one that can't be parsed, or gives None, raises a UserError."""
    rows = []
    for number, line in enumerate(_lines(file), 1):
        try:
            row = parse(line)
        except (ValueError, KeyError, TypeError, RecursionError, csv.Error):
            row = None
        if row is None:
            raise UserError(f'{file}: line {number} is damaged')
        rows.append(row)
    return rows


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value <= _LARGEST_EPOCH
