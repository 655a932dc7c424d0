"""States of a run: all that a resume needs, complete or not there at all.

epoch-0003              after epoch 3
epoch-0004-step-000120  within epoch 4, after the run's 120th optimizer step

Accelerate saves the trained modules, the optimizer, the gradient scaler and the random states. Beside its files lie
progress.json, process_00000.safetensors with the tensors of each rank, the files of the task (the information bank,
shards of the banks), ema.safetensors, and manifest.json with the SHA-256 of each file.
"""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import RNG_STATE_NAME, broadcast_object_list, gather_object
from accelerate.utils.other import load
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from timm.utils import unwrap_model
from torch import Tensor, nn

from ..runs import Run, run_name, run_of_state
from ..utils.errors import RunError, UserError, one_line
from ..utils.files import atomic_rename, verify, write_manifest
from ..utils.settings import flatten
from ..utils.tasks import TrainerTask
from .settings import FolderSettings

PROGRESS = 'progress.json'
_SAME = ('model', 'source', 'checkpoint', 'dataset', 'data_dir', 'mode')  # of runs that one may continue by 'auto'
_FIRST = ('loss', 'task_loss', 'ctc_loss')  # columns of summary.csv; others follow by name


class ResumePoint(NamedTuple):
    """The state to continue from, if any, and what is wrong with each newer one."""

    state: Path | None
    damaged: list[str]


@dataclass
class TrainState:
    """Where a run stands between two optimizer steps.

    Attributes:
        epoch: To go on with, from 0.
        batch: Of that epoch, to go on with, from 0.
        updates: Optimizer steps so far, discarded ones included.
        bad_in_a_row: Steps discarded since the last one that was taken.
        best: Best value of the evaluator's best metric so far, and its epoch.
        sums: Losses of this rank over the epoch so far, by name.
        batches: How many batches they are of.
        skipped: Images of this rank that could not be read in the epoch so far.
        bad_steps: Steps discarded in the epoch so far.
    """

    epoch: int = 0
    batch: int = 0
    updates: int = 0
    bad_in_a_row: int = 0
    best: tuple[float, int] | None = None
    sums: dict[str, Tensor] = field(default_factory=dict)
    batches: int = 0
    skipped: int = 0
    bad_steps: int = 0

    def next_epoch(self) -> None:
        """Go to the beginning of the next epoch."""
        self.epoch += 1
        self.batch = self.batches = self.skipped = self.bad_steps = 0
        self.sums = {}

    def add(self, losses: Mapping[str, Tensor], batches: int) -> None:
        """Add the losses of a step, each a sum over its batches."""
        for name, value in losses.items():
            self.sums[name] = self.sums.get(name, 0) + value
        self.batches += batches

    def means(self) -> dict[str, Tensor]:
        """Mean losses of this rank over the epoch so far, in an order that a resume does not change."""
        names = sorted(self.sums, key=lambda name: (_FIRST.index(name) if name in _FIRST else len(_FIRST), name))
        return {name: self.sums[name] / max(self.batches, 1) for name in names}

    def progress(self, step_size: list[int]) -> dict[str, Any]:
        """What is the same on all ranks, in plain values.

        Args:
            step_size: Images of a batch over all ranks, and batches of a step.
        """
        return {
            'epoch': self.epoch,
            'batch': self.batch,
            'step_size': step_size,
            'updates': self.updates,
            'bad_in_a_row': self.bad_in_a_row,
            'best_top1': self.best[0] if self.best else None,
            'best_epoch': self.best[1] if self.best else None,
        }

    def rank_state(self) -> dict[str, Tensor]:
        """What differs between ranks."""
        counts = torch.tensor([self.batches, self.skipped, self.bad_steps])
        return {'counts': counts, **{f'sum.{name}': value.detach().cpu() for name, value in self.sums.items()}}

    @classmethod
    def restore(
        cls, progress: dict[str, Any], rank_state: dict[str, Tensor], step_size: list[int], device: torch.device
    ) -> TrainState:
        """Read back what `progress` and `rank_state` gave.

        With steps of another size the epoch goes on at the nearest step before: no image of it is left out, some may
        be seen again.
        """
        batch = progress['batch']
        if progress['step_size'] != step_size:
            global_batch, accumulate = step_size
            batch = batch * progress['step_size'][0] // global_batch // accumulate * accumulate
        best = progress['best_epoch']
        batches, skipped, bad_steps = rank_state['counts'].tolist() if 'counts' in rank_state else (0, 0, 0)
        return cls(
            epoch=progress['epoch'],
            batch=batch,
            updates=progress['updates'],
            bad_in_a_row=progress['bad_in_a_row'],
            best=None if best is None else (progress['best_top1'], best),
            sums={name[4:]: value.to(device) for name, value in rank_state.items() if name.startswith('sum.')},
            batches=batches,
            skipped=skipped,
            bad_steps=bad_steps,
        )


def save_state(
    accelerator: Accelerator, task: TrainerTask, run: Run, progress: dict[str, Any], rank_state: dict[str, Tensor]
) -> Path:
    """Save all that a resume needs; the folder gets its name when it is complete and on the disk.

    Every rank writes into the folder, so that all machines must see it.

    Args:
        accelerator: With the prepared module and optimizer.
        task: The task.
        run: Its folder.
        progress: Where the run stands, in plain values; 'epoch' and 'batch' are the next ones.
        rank_state: Tensors of this rank, by name.

    Returns:
        The state's folder.

    Raises:
        RunError: It could not be written; nothing of it is left, and older states are as they were.
    """
    within = f'epoch-{progress["epoch"]:04d}-step-{progress["updates"]:06d}'
    final = run.state_folder / (within if progress['batch'] else f'epoch-{progress["epoch"] - 1:04d}')
    temporary = run.state_folder / f'.{final.name}'
    what = f'{final} could not be saved'
    with raise_on_all_ranks(accelerator, what, temporary):
        if accelerator.is_main_process:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
    with raise_on_all_ranks(accelerator, what, temporary):
        _save_accelerator(accelerator, temporary)
        tensors = {**rank_state, **_rank_buffers(accelerator, task), **task.rank_state()}
        save_file(tensors, temporary / _rank_file(accelerator))
        for name, content in task.state_files(accelerator.is_main_process).items():
            save_file(content, temporary / f'{name}.safetensors')
        if accelerator.is_main_process:
            if task.has_ema():
                save_file(_tensors(task.get_trainable_module(ema=True)), temporary / 'ema.safetensors')
            (temporary / PROGRESS).write_text(json.dumps(progress, indent=2), encoding='utf-8')
    with raise_on_all_ranks(accelerator, what, temporary):
        if accelerator.is_main_process:
            write_manifest(temporary)
            atomic_rename(temporary, final)
    return final


def _save_accelerator(accelerator: Accelerator, folder: Path) -> None:
    try:
        accelerator.save_state(str(folder))
    except RuntimeError as error:  # PyTorch's writer raises it on a full disk
        raise OSError(one_line(error)) from error


def prune_states(run: Run, newest: Path, keep: int) -> None:
    """Remove all but the latest states up to the newest, once the newest passes verification.

    Later ones are damaged, or of a run that was resumed before them.

    Args:
        run: The run.
        newest: State that was saved last.
        keep: How many stay.

    Raises:
        OSError: The newest differs from what was written.
    """
    damage = verify(newest)
    if damage is not None:
        raise OSError(f'{newest} is damaged: {damage}')
    states = run.states()
    kept = states[: states.index(newest) + 1][-keep:]
    for old in states:
        if old not in kept:
            shutil.rmtree(old)


@contextmanager
def raise_on_all_ranks(accelerator: Accelerator, what: str, leftover: Path | None = None) -> Iterator[None]:
    """Work on files on every rank, and fail on all of them where one fails.

    A rank that went on alone would wait for the others for ever.

    Args:
        accelerator: Whose ranks.
        what: Beginning of the message.
        leftover: A file or folder to remove where it fails.

    Raises:
        RunError: With the reason of the first rank that failed.
    """
    reasons: list[str | None] = [None]
    try:
        yield
    except (OSError, SafetensorError) as error:
        reasons = [describe(error)]
    if accelerator.num_processes > 1:
        reasons = gather_object(reasons)
    failed = [reason for reason in reasons if reason]
    if not failed:
        return
    if leftover is not None and accelerator.is_main_process:
        shutil.rmtree(leftover, ignore_errors=True)
    raise RunError(f"{what}: {failed[0]}; make room or repair it, then continue with `resume='auto'`")


def describe(error: Exception) -> str:
    """Say why a file could not be written, with its name where it is known."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror + (f' ({error.filename})' if error.filename else '')
    return one_line(error)


class _StateFiles:
    """The files of a state, for `TrainerTask.load_state_files`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.names = [file.stem for file in sorted(folder.glob('*.safetensors'))]

    def read(self, name: str) -> dict[str, Tensor]:
        return load_file(self.folder / f'{name}.safetensors')


def load_state(
    accelerator: Accelerator, task: TrainerTask, state: Path, expected: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Continue from a state.

    Args:
        accelerator: With the prepared module and optimizer.
        task: As it is at the start of a run.
        state: Folder of `save_state`.
        expected: What must agree with the state: architecture, num_instances, ...

    Returns:
        The `progress` and the `rank_state` that were saved, the latter empty for a rank that was not there.

    Raises:
        UserError: A state of another model, data set or mode, or one that can't be read.
    """
    progress = read_progress(state, expected)
    try:
        file = state / _rank_file(accelerator)
        rank_state = load_file(file) if file.is_file() else {}
        task.load_state_files(progress.get('stage', task.stage), rank_state, _StateFiles(state))
        if task.has_ema():
            module = task.get_trainable_module(ema=True)
            assert module is not None
            module.load_state_dict(load_file(state / 'ema.safetensors'))
        random_states = state / f'{RNG_STATE_NAME}_{accelerator.process_index}.pkl'
        if random_states.is_file():
            load(random_states)  # Accelerate would go on without a word where it can't read them
        accelerator.load_state(str(state))
        for name, buffer in _rank_buffers(accelerator, task).items():
            if name in rank_state:
                buffer.copy_(rank_state[name])
    except (OSError, RuntimeError, ValueError, KeyError, EOFError, SafetensorError, pickle.UnpicklingError) as error:
        raise UserError(f'`resume` {state}: {one_line(error)}') from None
    return progress, rank_state


def read_progress(state: Path, expected: Mapping[str, Any]) -> dict[str, Any]:
    """Read where a state's run stood, and check it against what is to be continued.

    Raises:
        UserError: They do not agree.
    """
    progress = json.loads((state / PROGRESS).read_text(encoding='utf-8'))
    for key, value in expected.items():
        if progress.get(key) != value:
            raise UserError(
                f'`resume` {state}: was saved with {key.replace("_", " ")} {progress.get(key)!r}, '
                f'this run has {value!r}'
            )
    return progress


def values_of(settings: Any) -> dict[str, Any]:
    """All settings by name, as args.yaml holds them, with the `mode` of a command that has no such setting."""
    return {'mode': getattr(settings, 'mode', ''), **flatten(settings)}


def locate_run(settings: Any) -> tuple[Run, ResumePoint]:
    """Decide which folder a run has and which state it continues from; the same folder on all ranks.

    Args:
        settings: Of a command that trains, with the group `folder`. A new folder is named after time, model, data and
            mode.

    Raises:
        UserError: See `find_resume`; a folder that holds a run already, which is not to be continued.
    """
    point, folder, values = find_resume(settings), settings.folder, values_of(settings)
    if point.state is not None:
        return run_of_state(point.state), point
    data = values.get('dataset') or values.get('data_dir') or 'digits'
    model = values['model'] or Path(values.get('source') or values.get('checkpoint') or '').name
    name = run_name(folder.experiment, folder.output, [model, Path(data).name, values['mode']])
    run = Run(broadcast_object_list([str(Path(folder.output) / name)])[0])  # its name holds the time
    if folder.resume != 'auto' and run.args_file.exists():
        raise UserError(
            f"`experiment` {folder.experiment}: {run} holds a run already; continue it with `resume='auto'`, or choose "
            f'another name'
        )
    return run, point


def find_resume(settings: Any) -> ResumePoint:
    """Find the state that `resume` means, or none to start afresh (only with 'auto').

    Args:
        settings: Of a command that trains, with the group `folder`.

    Raises:
        UserError: A path that is neither a run's folder nor one of its states; a damaged state.
    """
    folder: FolderSettings = settings.folder
    if not folder.resume:
        return ResumePoint(None, [])
    if folder.resume == 'auto' and folder.experiment:
        return _newest(Run(Path(folder.output) / folder.experiment))
    if folder.resume == 'auto':
        return _newest_fitting(Path(folder.output), values_of(settings))
    path = Path(folder.resume)
    if (path / PROGRESS).is_file():
        damage = verify(path)
        if damage is not None:
            run = run_of_state(path)
            raise UserError(f'`resume` {path}: is damaged: {damage}; `resume={str(run)!r}` takes the newest good one')
        return ResumePoint(path, [])
    point = _newest(Run(path)) if path.is_dir() else ResumePoint(None, [])
    if point.state is None:
        raise UserError(f'`resume` {path}: no run with a saved state there; name a folder such as {folder.output}/NAME')
    return point


def _newest_fitting(output: Path, values: dict[str, Any]) -> ResumePoint:
    """The newest state among runs of the same model, data and mode."""
    fitting = []
    for file in output.glob('*/args.yaml'):
        run = Run(file.parent)
        states = run.states()
        if states and all(run.args().get(key) == values[key] for key in _SAME if key in values):
            fitting.append((states[-1].stat().st_mtime, run.path))
    return _newest(Run(max(fitting)[1])) if fitting else ResumePoint(None, [])


def _newest(run: Run) -> ResumePoint:
    """The newest state that passes verification.

    Raises:
        UserError: There are states, but all of them are damaged.
    """
    damaged: list[str] = []
    for state in reversed(run.states()):
        damage = verify(state)
        if damage is None:
            return ResumePoint(state, damaged)
        damaged.append(f'{state} is damaged: {damage}')
    if damaged:
        raise UserError(
            f'`resume` {run}: every state in it is damaged; {"; ".join(damaged)}; start anew with another '
            f'`experiment`, from {run.last_weights} by `initial_checkpoint` if you like'
        )
    return ResumePoint(None, [])


def _rank_buffers(accelerator: Accelerator, task: TrainerTask) -> dict[str, Tensor]:
    """Running statistics of the model and of its average, which differ between several ranks."""
    if accelerator.num_processes == 1:
        return {}
    models = {'model': task.get_eval_model(), 'ema': task.get_eval_model(ema=True) if task.has_ema() else None}
    return {
        f'{kind}.{name}': buffer
        for kind, model in models.items()
        if model is not None
        for name, buffer in unwrap_model(model).named_buffers()
    }


def _rank_file(accelerator: Accelerator) -> str:
    return f'process_{accelerator.process_index:05d}.safetensors'


def _tensors(module: nn.Module | None) -> dict[str, Tensor]:
    assert module is not None
    return {k: v.detach().cpu().contiguous().clone() for k, v in module.state_dict().items()}
