"""A run's folder: its arguments, numbers, weights, pictures, and the state that a resume needs.

    runs/<name>/  args.yaml  config.json  summary.csv  metrics.jsonl
                  weights/epoch-0005.safetensors ...  best.safetensors  last.safetensors
                  state/epoch-0005/    plots/

Weights hold the backbone and its classifier under timm's own names. Files and state folders are written
beside their place and moved there once complete.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import shutil
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml
from accelerate import Accelerator
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from timm.models._hub import save_config_for_hf
from timm.task import TrainingTask
from timm.utils import update_summary
from torch import Tensor, nn

from ..arguments import non_negative_int, positive_int
from ..contrast.sharding import Split
from ..contrast.task import CTCTask
from ..errors import UserError

PROGRESS = 'progress.json'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags that say which folder a run has."""
    group = parser.add_argument_group('Run folder')
    group.add_argument('--output', default='runs', metavar='DIR', help='where runs go')
    group.add_argument(
        '--experiment',
        default='',
        metavar='NAME',
        help="the run's folder there; made of time, model and data when not given",
    )
    group.add_argument(
        '--resume',
        default='',
        metavar='auto|PATH',
        help='continue a run: its folder, one of its states, or the newest one that fits',
    )


def add_saving_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what goes into a run's folder, and how often."""
    group = parser.add_argument_group('Saving')
    group.add_argument('--checkpoint-hist', type=positive_int, default=2, metavar='N', help='states kept for a resume')
    group.add_argument(
        '--keep-every',
        type=non_negative_int,
        metavar='N',
        help='keep the weights of every N-th epoch, 0: none; about 20 over the run when not given',
    )
    group.add_argument('--log-interval', type=positive_int, default=50, metavar='N', help='batches between log lines')


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
        text = yaml.safe_dump({k: _plain(v) for k, v in vars(args).items()}, sort_keys=True, allow_unicode=True)
        _write_text(self.path / 'args.yaml', text)

    def args(self) -> dict[str, Any]:
        """The arguments that the run was started with."""
        return yaml.safe_load((self.path / 'args.yaml').read_text(encoding='utf-8'))

    def write_config(self, model: nn.Module, data_config: dict[str, Any]) -> None:
        """timm's config.json, with which `timm.create_model('local-dir:<run>', pretrained=True)` loads the run."""
        temporary = self.path / 'config.json.tmp'
        save_config_for_hf(model, str(temporary), data_config=data_config)
        os.replace(temporary, self.path / 'config.json')

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
        save_file(tensors, temporary, metadata={'format': 'pt', **{k: str(v) for k, v in facts.items()}})
        os.replace(temporary, file)

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
        with self.summary.open(encoding='utf-8', newline='') as file:
            return list(csv.DictReader(file))

    def forget_from(self, epoch: int) -> None:
        """Drop the numbers of this and later epochs, which a resume will write again."""
        rows = self.rows()
        kept = [row for row in rows if int(row['epoch']) < epoch]
        if rows and len(kept) < len(rows):
            lines = [','.join(rows[0])] + [','.join(row.values()) for row in kept]
            _write_text(self.summary, '\n'.join(lines) + '\n' if kept else '')
        if self.metrics.exists():
            lines = self.metrics.read_text(encoding='utf-8').splitlines()
            lines = [line for line in lines if json.loads(line)['epoch'] < epoch]
            _write_text(self.metrics, ''.join(f'{line}\n' for line in lines))

    def newest_state(self) -> Path | None:
        """The state of the latest epoch, if any."""
        states = sorted(p for p in self.states.glob('epoch-*') if (p / PROGRESS).is_file())
        return states[-1] if states else None

    def prune_states(self, keep: int) -> None:
        """Remove all but the latest so many states."""
        for old in sorted(self.states.glob('epoch-*'))[:-keep]:
            shutil.rmtree(old)


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
    words = [datetime.now().strftime('%Y%m%d-%H%M%S'), args.model, Path(where).name, args.mode]
    return '-'.join(''.join(c if c.isalnum() or c in '._-' else '_' for c in word) for word in words)


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


def save_state(
    accelerator: Accelerator, task: TrainingTask, run: RunFolder, progress: dict[str, Any], keep: int
) -> None:
    """Save all that a resume needs after an epoch, and drop the oldest states.

    Accelerate saves the trained modules, the optimiser, the gradient scaler and the random states; beside
    them lie the information bank, the negatives' generators, each process's rows of split banks and the moving
    average. Every process writes into the folder, so that all machines must see it.

    Args:
        accelerator: With the prepared module and optimiser.
        task: The task.
        run: Its folder.
        progress: Where the run stands, plain numbers and texts; 'epoch' is the next one.
        keep: How many states stay.
    """
    final = run.states / f'epoch-{progress["epoch"] - 1:04d}'
    temporary = run.states / f'.{final.name}'
    if accelerator.is_main_process:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(temporary))
    if isinstance(task, CTCTask):
        save_file(task.sampler.get_state(), temporary / f'negatives_{accelerator.process_index}.safetensors')
        if task.split is not None:
            rows = {name: bank.cpu() for name, bank in task.banks().items()}
            save_file(rows, temporary / f'banks_{task.split.rank:05d}.safetensors')
    if accelerator.is_main_process:
        if isinstance(task, CTCTask) and task.information_bank is not None:
            save_file(_tensors(task.information_bank.model), temporary / 'information_bank.safetensors')
        if task.has_ema():
            save_file(_tensors(task.get_trainable_module(ema=True)), temporary / 'ema.safetensors')
        _write_text(temporary / PROGRESS, json.dumps(progress, indent=2))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        shutil.rmtree(final, ignore_errors=True)
        os.replace(temporary, final)
        run.prune_states(keep)
    accelerator.wait_for_everyone()


def load_state(accelerator: Accelerator, task: TrainingTask, state: Path, expected: dict[str, Any]) -> dict[str, Any]:
    """Continue from a state.

    Args:
        accelerator: With the prepared module and optimiser.
        task: The task, as it is at the start of a run.
        state: Folder of `save_state`.
        expected: What must agree with the state: architecture, num_instances, ...

    Returns:
        The `progress` that was saved.

    Raises:
        UserError: A state of another model, data set or mode, or one that can't be read.
    """
    progress = read_progress(state, expected)
    try:
        if isinstance(task, CTCTask):
            extra: dict[str, Any] = {
                'stage': progress['stage'],
                'instance': task.instance.state_dict(),
                'temporal': task.temporal.state_dict(),
                'sampler': task.sampler.get_state(),
            }
            negatives = state / f'negatives_{accelerator.process_index}.safetensors'
            if negatives.is_file():
                extra['sampler'] = load_file(negatives)
            if progress['stage'] == 'temporal':
                extra['information_bank'] = load_file(state / 'information_bank.safetensors')
            task.load_task_state(extra)
            _load_split_banks(task, state)
        if task.has_ema():
            module = task.get_trainable_module(ema=True)
            assert module is not None
            module.load_state_dict(load_file(state / 'ema.safetensors'))
        accelerator.load_state(str(state))
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        raise UserError(f'--resume {state}: {" ".join(str(error).split())[:300]}') from None
    return progress


def _load_split_banks(task: CTCTask, state: Path) -> None:
    """Read this process's rows of split banks from the files of the processes that saved them, however many.

    Raises:
        ValueError: The state has whole banks and the task split ones, or the other way round.
    """
    files = sorted(state.glob('banks_*.safetensors'))
    if bool(files) != (task.split is not None):
        raise ValueError(f'was saved {"with" if files else "without"} --split-banks; go on in the same way')
    for rank, file in enumerate(files):
        held = Split(task.sampler.num_instances, rank, len(files))
        if task.split is None or (task.split.world == held.world and task.split.rank != rank):
            continue
        with safe_open(file, framework='pt') as rows:
            for name in task.banks():
                task.load_rows(name, rows.get_tensor(name), held)


def read_progress(state: Path, expected: dict[str, Any]) -> dict[str, Any]:
    """Where a state's run stood, checked against what is to be continued.

    Raises:
        UserError: They do not agree.
    """
    progress = json.loads((state / PROGRESS).read_text(encoding='utf-8'))
    for key, value in expected.items():
        if progress.get(key) != value:
            raise UserError(
                f'--resume {state}: was saved with {key.replace("_", " ")} {progress.get(key)!r}, '
                f'this run has {value!r}'
            )
    return progress


def find_resume(args: argparse.Namespace) -> Path | None:
    """The state that `--resume` means, or None to start afresh (only with 'auto').

    Raises:
        UserError: A path that is neither a run's folder nor one of its states.
    """
    if not args.resume:
        return None
    if args.resume == 'auto':
        return _newest_fitting(args)
    path = Path(args.resume)
    if (path / PROGRESS).is_file():
        return path
    state = RunFolder(path).newest_state() if path.is_dir() else None
    if state is None:
        raise UserError(f'--resume {path}: no run with a saved state there; give a folder such as {args.output}/NAME')
    return state


def _newest_fitting(args: argparse.Namespace) -> Path | None:
    """With `--experiment` that run's newest state, else the newest among runs of the same model, data and mode."""
    if args.experiment:
        return RunFolder(Path(args.output) / args.experiment).newest_state()
    found = []
    for file in Path(args.output).glob('*/args.yaml'):
        run = RunFolder(file.parent)
        state = run.newest_state()
        if state is None:
            continue
        same = run.args()
        if all(same.get(key) == _plain(getattr(args, key)) for key in ('model', 'dataset', 'data_dir', 'mode')):
            found.append((state.stat().st_mtime, state))
    return max(found)[1] if found else None


def run_of_state(state: Path) -> RunFolder:
    """The run that a state belongs to."""
    return RunFolder(state.resolve().parent.parent)


def weights_metadata(file: str | os.PathLike) -> dict[str, str]:
    """The facts written into a weights file."""
    with safe_open(file, framework='pt') as weights:
        return weights.metadata() or {}


def keep_interval(args: argparse.Namespace, num_epochs: int) -> int:
    """Every how many epochs weights are kept for good; 0 for never."""
    return max(1, round(num_epochs / 20)) if args.keep_every is None else args.keep_every


def _tensors(module: nn.Module | None) -> dict[str, Tensor]:
    assert module is not None
    return {k: v.detach().cpu().contiguous().clone() for k, v in module.state_dict().items()}


def _plain(value: Any) -> Any:
    """A value that YAML's safe writer can write."""
    if isinstance(value, (tuple, list)):
        return [_plain(v) for v in value]
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


def _write_text(file: Path, text: str) -> None:
    temporary = file.with_name(file.name + '.tmp')
    temporary.write_text(text, encoding='utf-8')
    os.replace(temporary, file)
