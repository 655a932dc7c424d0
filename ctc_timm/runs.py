"""A run's folder: its arguments, numbers and weights, by the names that DESIGN gives them."""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import os
import shutil
from collections.abc import Mapping
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
from .utils.files import appear, write_text
from .utils.text import file_name
from .utils.yaml_files import read_mapping

HASH = 'tensors_sha256'


class Run:
    """Reads and writes one run.

    Args:
        path: The folder; made by `create`.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = Path(path)
        self.weights = self.path / 'weights'
        self.states = self.path / 'state'
        self.plots = self.path / 'plots'
        self.summary = self.path / 'summary.csv'
        self.metrics = self.path / 'metrics.jsonl'

    def create(self, args: argparse.Namespace) -> None:
        """Make the folder and write the arguments into it."""
        for folder in (self.path, self.weights, self.states, self.plots):
            folder.mkdir(parents=True, exist_ok=True)
        text = yaml.safe_dump({k: plain(v) for k, v in vars(args).items()}, sort_keys=True, allow_unicode=True)
        write_text(self.path / 'args.yaml', text)

    def args(self) -> dict[str, Any]:
        """The arguments that the run was started with."""
        return read_mapping(self.path / 'args.yaml')

    def write_config(self, model: nn.Module, data_config: dict[str, Any]) -> None:
        """timm's config.json, with which `timm.create_model('local-dir:<run>', pretrained=True)` loads the run."""
        temporary = self.path / 'config.json.tmp'
        save_config_for_hf(model, str(temporary), data_config=data_config)
        appear(temporary, self.path / 'config.json')

    def save_weights(self, name: str, model: nn.Module, facts: dict[str, Any]) -> None:
        """Write `<name>.safetensors`.

        Args:
            name: 'best', 'last' or 'weights/epoch-0005'.
            model: Backbone with classifier.
            facts: For the file's metadata.
        """
        file = self.path / f'{name}.safetensors'
        temporary = file.with_suffix('.tmp')
        tensors = {k: v.detach().cpu().contiguous().clone() for k, v in model.state_dict().items()}
        noted = {'format': 'pt', HASH: tensors_hash(tensors), **{k: str(v) for k, v in facts.items()}}
        save_file(tensors, temporary, metadata=noted)
        appear(temporary, file)

    def log(self, row: dict[str, Any]) -> None:
        """Append a line to metrics.jsonl."""
        with self.metrics.open('a', encoding='utf-8') as file:
            file.write(json.dumps(row) + '\n')

    def log_epoch(self, epoch: int, train: dict[str, Any], evaluation: dict[str, Any], lr: float) -> None:
        """Append a row to summary.csv, by timm's column names."""
        update_summary(epoch, train, evaluation, filename=str(self.summary), lr=lr)

    def rows(self) -> list[dict[str, str]]:
        """The rows of summary.csv."""
        if not self.summary.exists():
            return []
        return read_summary(self.summary)

    def clear_up(self, epoch: int, batch: int = 0) -> None:
        """Remove what an interruption left: files half-written, and numbers beyond where the run goes on."""
        for path in self.unfinished():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        self.forget_from(epoch, batch)

    def forget_from(self, epoch: int, batch: int = 0) -> None:
        """Drop the numbers of this and later epochs, or batches of it, which a resume will write again.

        A line that a kill cut short is the last of its file, and is dropped too.
        """
        if self.summary.exists():
            header, *lines = whole_lines(self.summary) or [b'']
            kept = [line for row, line in zip(read_summary(self.summary), lines) if int(row['epoch']) < epoch]
            _write_lines(self.summary, [header, *kept] if kept else [])
        if self.metrics.exists():
            rows = zip(read_metrics(self.metrics), whole_lines(self.metrics))
            seen = [line for row, line in rows if (row['epoch'], row.get('batch', float('inf'))) <= (epoch, batch)]
            _write_lines(self.metrics, seen)

    def unfinished(self) -> list[Path]:
        """What an interruption left half-written."""
        return [*self.path.glob('*.tmp'), *self.weights.glob('*.tmp'), *self.states.glob('.epoch-*')]


def _write_lines(file: Path, lines: list[bytes]) -> None:
    temporary = file.with_name(file.name + '.tmp')
    temporary.write_bytes(b''.join(lines))
    appear(temporary, file)


def run_name(args: argparse.Namespace) -> str:
    """The run's folder under `--output`.

    Raises:
        UserError: A name that would leave the output folder.
    """
    if args.experiment:
        name = Path(args.experiment)
        if name.is_absolute() or '..' in name.parts:
            raise UserError(f'--experiment {args.experiment}: must be a name inside --output {args.output}')
        return str(name)
    where = args.dataset or args.data_dir or args.data or 'digits'
    model = args.model or Path(args.source or args.checkpoint).name
    words = [datetime.now().strftime('%Y%m%d-%H%M%S'), model, Path(where).name, args.mode]
    return file_name('-'.join(words))


def refuse_overwriting(run: Run, args: argparse.Namespace, resume: Path | None) -> None:
    """Refuse to start a run in the folder of another.

    Raises:
        UserError: The folder holds a run already, and it is not to be continued.
    """
    if resume is None and args.resume != 'auto' and (run.path / 'args.yaml').exists():
        raise UserError(
            f'--experiment {args.experiment}: {run.path} holds a run already; '
            f'continue it with --resume auto, or choose another name'
        )


def weights_metadata(file: str | os.PathLike) -> dict[str, str]:
    """The facts written into a weights file."""
    with safe_open(file, framework='pt') as weights:
        return weights.metadata() or {}


def keep_interval(args: argparse.Namespace, num_epochs: int) -> int:
    """Every how many epochs weights are kept for good; 0 for never."""
    return max(1, round(num_epochs / 20)) if args.keep_every is None else args.keep_every


def plain(value: Any) -> Any:
    """A value that YAML's safe writer can write."""
    if isinstance(value, (tuple, list)):
        return [plain(v) for v in value]
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


_LARGEST_EPOCH = 10**9


def whole_lines(file: Path) -> list[bytes]:
    """The lines of a file that end as lines do, with their ends."""
    return [line for line in file.read_bytes().splitlines(keepends=True) if line.endswith(b'\n')]


def read_summary(file: Path) -> list[dict[str, str]]:
    """The rows of a summary.csv, one an epoch.

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
    """The rows of a metrics.jsonl, one a whole line.

    Raises:
        UserError: A line that is no mapping with an epoch.
    """
    rows = []
    for number, line in enumerate(whole_lines(file), 1):
        try:
            row = json.loads(line)
            sound = isinstance(row, dict) and _is_count(row.get('epoch')) and _is_count(row.get('batch', 0))
        except (ValueError, RecursionError):
            sound = False
        if not sound:
            raise UserError(f'{file}: line {number} is damaged')
        rows.append(row)
    return rows


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value <= _LARGEST_EPOCH


def tensors_hash(tensors: Mapping[str, Tensor]) -> str:
    """sha256 over the names, types, shapes and bytes of tensors, in the order of their names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f'{name} {tensor.dtype} {tuple(tensor.shape)}\n'.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def check_hash(file: str | os.PathLike) -> None:
    """See that a safetensors file holds what was written into it, if it says what that was.

    Raises:
        UserError: It holds something else, or is no safetensors file.
    """
    try:
        with safe_open(file, framework='pt') as stored:
            wanted = (stored.metadata() or {}).get(HASH)
            if wanted is None:
                return
            found = tensors_hash({name: stored.get_tensor(name) for name in stored.keys()})  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, TypeError, RuntimeError) as error:
        raise UserError(f'{os.fspath(file)}: not a sound safetensors file: {one_line(error)}') from None
    if found != wanted:
        raise UserError(f'{os.fspath(file)}: was changed after it was written (its hash differs); take another one')
