"""The run folder: every file in it is named, written and read here, and nowhere else.

runs/NAME/
  args.yaml          the settings
  config.json        architecture, classes and image transform, as timm reads them
  summary.csv        a row an epoch
  metrics.jsonl      log rows
  best.safetensors   last.safetensors   weights/epoch-0005.safetensors
  state/             what a resume needs: epoch-0003, or within epoch 4 epoch-0004-step-000120
  plots/             pictures
  validation/  linear_probe/  features/  dynamics/  finetune/    measurements
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from timm.models._hub import save_config_for_hf
from timm.utils import update_summary
from torch import Tensor, nn

from .utils.errors import UserError, one_line
from .utils.files import atomic_rename, write_text
from .utils.text import file_name
from .utils.yaml_files import read_mapping

HASH = 'tensors_sha256'  # of a weights file's metadata
_STATE = re.compile(r'epoch-(\d+)(?:-step-(\d+))?')
_WEIGHTS = re.compile(r'epoch-(\d+)\.safetensors')
_LARGEST_EPOCH = 10**9


class Run:
    """Reads and writes one run. It is accepted wherever a path is.

    Args:
        path: The folder; made by `create`.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.args_file = self.path / 'args.yaml'
        self.config_file = self.path / 'config.json'
        self.summary_file = self.path / 'summary.csv'
        self.metrics_file = self.path / 'metrics.jsonl'
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

    def __str__(self) -> str:
        return str(self.path)

    def __repr__(self) -> str:
        return f'Run({str(self.path)!r})'

    @property
    def best_weights(self) -> Path:
        """Weights of the best epoch; of the last one where none was evaluated."""
        best = self.path / 'best.safetensors'
        return self.last_weights if self.last_weights.is_file() and not best.is_file() else best

    def kept_weights(self) -> dict[int, Path]:
        """Weights files that were kept, by epoch."""
        found = {_WEIGHTS.fullmatch(path.name): path for path in sorted(self.weights_folder.glob('*'))}
        return {int(match[1]): path for match, path in found.items() if match is not None}

    def states(self) -> list[Path]:
        """States for a resume, the oldest first."""
        return sorted((p for p in self.state_folder.glob('epoch-*') if _STATE.fullmatch(p.name)), key=_place)

    def unfinished(self) -> list[Path]:
        """Files and folders that an interruption left half-written."""
        return [*self.path.glob('*.tmp'), *self.weights_folder.glob('*.tmp'), *self.state_folder.glob('.epoch-*')]

    def create(self, values: Mapping[str, Any]) -> None:
        """Make the folder and write args.yaml."""
        for folder in (self.path, self.weights_folder, self.state_folder, self.plots):
            folder.mkdir(parents=True, exist_ok=True)
        plain_values = {key: plain(value) for key, value in values.items()}
        write_text(self.args_file, yaml.safe_dump(plain_values, sort_keys=True, allow_unicode=True))

    def args(self) -> dict[str, Any]:
        """Read the settings that the run was started with.

        Raises:
            UserError: args.yaml is not there or can't be read.
        """
        return read_mapping(self.args_file)

    def write_config(self, model: nn.Module, data_config: dict[str, Any]) -> None:
        """Write config.json, by which `timm.create_model('local-dir:<run>', pretrained=True)` loads the run."""
        temporary = self.path / 'config.json.tmp'
        save_config_for_hf(model, str(temporary), data_config=data_config)
        atomic_rename(temporary, self.config_file)

    def save_weights(self, name: str, model: nn.Module, metadata: Mapping[str, Any]) -> None:
        """Write `<name>.safetensors`.

        Args:
            name: 'best', 'last' or 'weights/epoch-0005'.
            model: Whose state dict is written.
            metadata: Of the file, beside the hash of its tensors.
        """
        file = self.path / f'{name}.safetensors'
        temporary = file.with_suffix('.tmp')
        tensors = {k: v.detach().cpu().contiguous().clone() for k, v in model.state_dict().items()}
        facts = {'format': 'pt', HASH: tensors_hash(tensors), **{k: str(v) for k, v in metadata.items()}}
        save_file(tensors, temporary, metadata=facts)
        atomic_rename(temporary, file)

    def log(self, row: Mapping[str, Any]) -> None:
        """Append a row to metrics.jsonl."""
        with self.metrics_file.open('a', encoding='utf-8') as file:
            file.write(json.dumps(row) + '\n')

    def log_epoch(self, epoch: int, train: dict[str, Any], evaluation: dict[str, Any], lr: float | None) -> None:
        """Append a row to summary.csv, by timm's column names."""
        update_summary(epoch, train, evaluation, filename=str(self.summary_file), lr=lr)

    def rows(self) -> list[dict[str, str]]:
        """Rows of summary.csv, none before the first epoch."""
        return read_summary(self.summary_file) if self.summary_file.exists() else []

    def log_rows(self) -> list[dict[str, Any]]:
        """Rows of metrics.jsonl."""
        return read_metrics(self.metrics_file) if self.metrics_file.exists() else []

    def clean_up(self, epoch: int, batch: int = 0) -> None:
        """Remove half-written files, and log rows after the resume point.

        Args:
            epoch: Where training goes on, from 0.
            batch: Batches of that epoch that are done.
        """
        for path in self.unfinished():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        # A kill may have cut the last line of a file short. It is dropped too.
        if self.summary_file.exists():
            header, *lines = whole_lines(self.summary_file) or [b'']
            kept = [line for row, line in zip(self.rows(), lines) if int(row['epoch']) < epoch]
            _write_lines(self.summary_file, [header, *kept] if kept else [])
        if self.metrics_file.exists():
            rows = zip(self.log_rows(), whole_lines(self.metrics_file))
            seen = [line for row, line in rows if (row['epoch'], row.get('batch', float('inf'))) <= (epoch, batch)]
            _write_lines(self.metrics_file, seen)

    def summary(self) -> RunSummary:
        """Collect what the run reached and where its files are.

        Raises:
            UserError: Its files are damaged, or it is no run.
        """
        args, rows = self.args(), self.rows()
        best = weights_metadata(self.best_weights) if self.best_weights.is_file() else {}
        best_epoch = int(best['epoch']) if best.get('epoch', '').isdigit() else None
        return RunSummary(
            path=self.path,
            model=str(best.get('architecture') or best.get('body') or args.get('model') or ''),
            mode=str(best.get('mode') or args.get('mode') or ''),
            epochs=len(rows),
            best_epoch=best_epoch,
            best=next((_evaluation(row) for row in rows if int(row['epoch']) == best_epoch), {}),
            last=_evaluation(rows[-1]) if rows else {},
            weights=[file for file in (self.path / 'best.safetensors', self.last_weights) if file.is_file()],
            kept=len(self.kept_weights()),
            pictures=sorted(self.plots.glob('*.png')),
        )


@dataclass(frozen=True)
class RunSummary:
    """What a run reached, readable by `print`.

    Attributes:
        path: Its folder.
        model: Architecture.
        mode: 'ctc', 'vanilla', or the name of another task.
        epochs: That are done.
        best_epoch: From 0; None before the first evaluation.
        best: Validation metrics of that epoch, by name; accuracies in percent.
        last: Validation metrics of the last epoch; empty where it was not evaluated.
        weights: Files of the best and the last epoch.
        kept: How many epochs' weights are kept in weights/.
        pictures: Files in plots/.
    """

    path: Path
    model: str
    mode: str
    epochs: int
    best_epoch: int | None
    best: dict[str, float]
    last: dict[str, float]
    weights: list[Path]
    kept: int
    pictures: list[Path]

    def __str__(self) -> str:
        lines = [f'{self.path}: {self.model}, {self.mode}, {self.epochs} epochs']
        if self.best:
            lines.append(f'  best      {format_metrics(self.best)} at epoch {self.best_epoch}')
        if self.last and self.best_epoch != self.epochs - 1:
            lines.append(f'  last      {format_metrics(self.last)}')
        files = [str(file) for file in self.weights] + [f'{self.path / "weights"}/ ({self.kept} epochs)'] * bool(
            self.kept
        )
        for name, paths in (('weights', files), ('pictures', map(str, self.pictures))):
            if text := ', '.join(paths):
                lines.append(f'  {name:<9} {text}')
        return '\n'.join(lines)


def format_metrics(metrics: Mapping[str, float]) -> str:
    """Validation metrics as a person reads them: 'val loss 0.4135, top-1 93.21%'."""
    known = {'loss': 'val loss {:.4f}', 'top1': 'top-1 {:.2f}%', 'top5': 'top-5 {:.2f}%'}
    known['monitor_ridge_top1'] = 'target {:.2f}%'
    return ', '.join(known.get(name, f'{name} {{:.4f}}').format(value) for name, value in metrics.items())


def _evaluation(row: Mapping[str, str]) -> dict[str, float]:
    return {key.removeprefix('eval_'): float(row[key]) for key in row if key.startswith('eval_') and row[key]}


def _place(state: Path) -> tuple[int, int]:
    """Where in the run a state stands, by its name: the epoch to go on with, and the step."""
    match = _STATE.fullmatch(state.name)
    assert match is not None
    epoch, step = int(match[1]), int(match[2] or 0)
    return (epoch, step) if match[2] else (epoch + 1, 0)


def run_of_state(state: Path) -> Run:
    """The run that a state belongs to."""
    return Run(state.resolve().parent.parent)


def run_name(experiment: str, output: str, words: Sequence[str]) -> str:
    """Name a run's folder inside `output`.

    Args:
        experiment: The user's name for it, or empty.
        output: Where runs go, for messages.
        words: Of the name that is made where the user gives none, after the time: model, data, mode.

    Raises:
        UserError: A name that would leave the output folder.
    """
    if not experiment:
        return file_name('-'.join([datetime.now().strftime('%Y%m%d-%H%M%S'), *words]))
    name = Path(experiment)
    if name.is_absolute() or '..' in name.parts:
        raise UserError(f'`experiment` {experiment}: must be a name inside `output` {output}')
    return str(name)


def plain(value: Any) -> Any:
    """A value as YAML's safe writer and reader hold it."""
    if isinstance(value, (tuple, list)):
        return [plain(v) for v in value]
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


def whole_lines(file: Path) -> list[bytes]:
    """The lines of a file that end as lines do, with their ends."""
    return [line for line in file.read_bytes().splitlines(keepends=True) if line.endswith(b'\n')]


def _write_lines(file: Path, lines: list[bytes]) -> None:
    temporary = file.with_name(file.name + '.tmp')
    temporary.write_bytes(b''.join(lines))
    atomic_rename(temporary, file)


def read_summary(file: Path) -> list[dict[str, str]]:
    """Read the rows of a summary.csv, one an epoch.

    Raises:
        UserError: A line that is no row of numbers.
    """
    rows: list[dict[str, str]] = []
    columns: list[str] = []
    for number, line in enumerate(whole_lines(file), 1):
        try:
            (cells,) = csv.reader([line.decode('utf-8')], strict=True)
            if not columns:
                if 'epoch' not in cells or len(set(cells)) < len(cells):
                    raise ValueError('no header')
                columns = cells
                continue
            row = dict(zip(columns, cells, strict=True))
            if not 0 <= int(row['epoch']) <= _LARGEST_EPOCH:
                raise ValueError('no epoch')
            for cell in cells:
                float(cell or 0)
        except (ValueError, csv.Error):
            raise UserError(f'{file}: line {number} is damaged') from None
        rows.append(row)
    return rows


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """Read the rows of a metrics.jsonl, one a whole line.

    Raises:
        UserError: A line that is no mapping with an epoch.
    """

    def is_count(value: Any) -> bool:
        return type(value) is int and 0 <= value <= _LARGEST_EPOCH

    rows = []
    for number, line in enumerate(whole_lines(file), 1):
        try:
            row = json.loads(line)
            sound = isinstance(row, dict) and is_count(row.get('epoch')) and is_count(row.get('batch', 0))
        except (ValueError, RecursionError):
            sound = False
        if not sound:
            raise UserError(f'{file}: line {number} is damaged')
        rows.append(row)
    return rows


def weights_metadata(file: str | os.PathLike[str]) -> dict[str, str]:
    """Read the metadata of a weights file.

    Raises:
        UserError: It can't be read.
    """
    try:
        with safe_open(file, framework='pt') as weights:
            return weights.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise UserError(f'{os.fspath(file)}: not a sound safetensors file: {one_line(error)}') from None


def tensors_hash(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over the names, types, shapes and bytes of tensors, in the order of their names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f'{name} {tensor.dtype} {tuple(tensor.shape)}\n'.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def check_hash(file: str | os.PathLike[str]) -> None:
    """Verify the hash of a weights file, where its metadata have one.

    Raises:
        UserError: The tensors differ, or it is no safetensors file.
    """
    try:
        with safe_open(file, framework='pt') as stored:
            expected = (stored.metadata() or {}).get(HASH)
            if expected is None:
                return
            actual = tensors_hash({name: stored.get_tensor(name) for name in stored.keys()})  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, TypeError, RuntimeError) as error:
        raise UserError(f'{os.fspath(file)}: not a sound safetensors file: {one_line(error)}') from None
    if actual != expected:
        raise UserError(f'{os.fspath(file)}: was changed after it was written (its hash differs); take another one')
