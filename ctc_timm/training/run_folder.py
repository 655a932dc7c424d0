"""A run's folder: its arguments, numbers and weights, by the names that DESIGN gives them."""

from __future__ import annotations

import argparse
import json
import os
import shutil
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml
from safetensors import safe_open
from safetensors.torch import save_file
from timm.models._hub import save_config_for_hf
from timm.utils import update_summary
from torch import nn

from ..errors import UserError
from ..outside import file_name
from ..plain_yaml import read_mapping
from ..run_numbers import read_metrics, read_summary, whole_lines
from ..weights_file import HASH, tensors_hash
from .durable import appear, write_text


class RunFolder:
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


def refuse_overwriting(run: RunFolder, args: argparse.Namespace, resume: Path | None) -> None:
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
