"""States of a run: all that a resume needs, complete or not there at all. `Run` says how their folders are named.

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
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import RNG_STATE_NAME, broadcast_object_list, gather_object
from accelerate.utils.other import load
from safetensors import SafetensorError
from safetensors.torch import save_file
from timm.utils import unwrap_model
from torch import Tensor

from ..runs import Run, run_name, run_of_state
from ..utils.errors import RunError, UserError, one_line
from ..utils.files import atomic_rename, verify, write_manifest
from ..utils.settings import flatten
from ..utils.tasks import StateReader, TrainerTask
from .settings import CommandSettings

PROGRESS, IMAGES, _RANK_FILE = 'progress.json', 'training_images', 'process_{:05d}'
_SAME = ('model', 'source', 'checkpoint', 'dataset', 'data_dir', 'mode')  # of runs that one may continue by 'auto'
_FIRST = ('loss', 'task_loss', 'ctc_loss')  # columns of summary.csv; others follow by name
# Settings of the optimizer whose effect lies in its state, where another value would count for nothing.
_OPTIMIZER = ('opt', 'momentum', 'opt_eps', 'opt_betas', 'opt_kwargs', 'filter_bias_and_bn', 'layer_decay')
_PLACE = ('epoch', 'batch', 'updates', 'bad_in_a_row')
_UNREADABLE = (OSError, RuntimeError, ValueError, KeyError, EOFError, SafetensorError, pickle.UnpicklingError)


@dataclass
class TrainState:
    """Where a run stands between two optimizer steps."""

    epoch: int = 0  # to go on with, from 0
    batch: int = 0  # of that epoch, to go on with, from 0
    updates: int = 0  # optimizer steps so far, discarded ones included
    bad_in_a_row: int = 0  # steps discarded since the last one that was taken
    best: tuple[float, int] | None = None  # value of the evaluator's best metric, and its epoch
    metrics: list[float | None] = field(default_factory=list)  # of each epoch before, the evaluator's best metric
    sums: dict[str, Tensor] = field(default_factory=dict)  # losses of this rank over the epoch so far
    batches: int = 0  # how many they are sums of
    skipped: int = 0  # images of this rank that could not be read in the epoch so far
    bad_steps: int = 0  # steps discarded in the epoch so far

    def next_epoch(self) -> None:
        """Go to the beginning of the next epoch."""
        self.epoch, self.sums = self.epoch + 1, {}
        self.batch = self.batches = self.skipped = self.bad_steps = 0

    def add(self, losses: Mapping[str, Tensor], batches: int) -> None:
        """Add the losses of a step, each a sum over its batches."""
        for name, value in losses.items():
            self.sums[name] = self.sums.get(name, 0) + value
        self.batches += batches

    def means(self) -> dict[str, Tensor]:
        """Mean losses of this rank over the epoch so far, in an order that a resume does not change."""
        names = sorted(self.sums, key=lambda name: (_FIRST.index(name) if name in _FIRST else len(_FIRST), name))
        return {name: self.sums[name] / max(self.batches, 1) for name in names}

    def progress(self) -> dict[str, Any]:
        """What is the same on all ranks, in plain values."""
        best = dict(zip(('best_top1', 'best_epoch'), self.best or (None, None)))
        return {name: getattr(self, name) for name in _PLACE} | best | {'metrics': self.metrics}

    def rank_state(self) -> dict[str, Tensor]:
        """What differs between ranks."""
        counts = torch.tensor([self.batches, self.skipped, self.bad_steps])
        return {'counts': counts, **{f'sum.{name}': value.detach().cpu() for name, value in self.sums.items()}}

    @classmethod
    def restore(cls, progress: dict[str, Any], rank_state: dict[str, Tensor], device: torch.device) -> TrainState:
        """Read back what `progress` and `rank_state` gave; the latter is empty on a rank that was not there."""
        state = cls(**{name: progress[name] for name in _PLACE})
        state.metrics = progress.get('metrics', [None] * state.epoch)
        if progress['best_epoch'] is not None:
            state.best = (progress['best_top1'], progress['best_epoch'])
        if 'counts' in rank_state:
            state.batches, state.skipped, state.bad_steps = rank_state['counts'].tolist()
        state.sums = {name[4:]: value.to(device) for name, value in rank_state.items() if name.startswith('sum.')}
        return state


def save_state(
    accelerator: Accelerator, task: TrainerTask, run: Run, state: TrainState, checked: Mapping[str, Any], keep: int
) -> None:
    """Save all that a resume needs, with what it checks; the folder gets its name when it is complete and on the disk.

    Every rank writes into the folder, so that all machines must see it. The latest `keep` states stay.

    Raises:
        RunError: It could not be written; nothing of it is left, and older states are as they were.
    """
    final = run.state(state.epoch, state.batch, state.updates)
    temporary, main = final.with_name(f'.{final.name}'), accelerator.is_main_process
    failing = partial(raise_on_all_ranks, accelerator, f'{final} could not be saved', temporary)
    with failing():
        if main:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
    with failing():
        try:
            accelerator.save_state(str(temporary))
        except RuntimeError as error:  # PyTorch's writer raises it on a full disk
            raise OSError(one_line(error)) from error
        tensors = {**state.rank_state(), **_rank_buffers(accelerator, task), **task.rank_state()}
        files = {_RANK_FILE.format(accelerator.process_index): tensors, **task.state_files(main)}
        if main:
            (temporary / PROGRESS).write_text(json.dumps({**checked, **state.progress()}, indent=2), encoding='utf-8')
            if (average := task.get_trainable_module(ema=True)) is not None:
                files['ema'] = {k: v.detach().cpu().contiguous().clone() for k, v in average.state_dict().items()}
        for name, content in files.items():
            save_file(content, temporary / f'{name}.safetensors')
    with failing():
        if main:
            write_manifest(temporary)
            atomic_rename(temporary, final)
            prune_states(run, final, keep)


def prune_states(run: Run, newest: Path, keep: int) -> None:
    """Remove all but the latest states up to the newest, or raise an OSError where that differs from what was written.

    Later ones are damaged, or of a run that was resumed before them.
    """
    if damage := verify(newest):
        raise OSError(f'{newest} is damaged: {damage}')
    states = run.states()
    kept = states[: states.index(newest) + 1][-keep:]
    for old in set(states).difference(kept):
        shutil.rmtree(old)


@contextmanager
def raise_on_all_ranks(accelerator: Accelerator, what: str, leftover: Path | None = None) -> Iterator[None]:
    """Raise a RunError on all ranks where work on files fails on one: a rank that went on alone would wait for ever.

    The message begins with `what`; the folder `leftover` is removed.
    """
    reasons: list[str | None] = [None]
    try:
        yield
    except (OSError, SafetensorError) as error:
        reasons = [one_line(error)]
    if accelerator.num_processes > 1:
        reasons = gather_object(reasons)
    if failed := [reason for reason in reasons if reason]:
        if leftover is not None and accelerator.is_main_process:
            shutil.rmtree(leftover, ignore_errors=True)
        raise RunError(f"{what}: {failed[0]}; make room or repair it, then continue with `resume='auto'`")


def load_state(
    accelerator: Accelerator, task: TrainerTask, state: Path, expected: Mapping[str, Any], settled: Mapping[str, Any]
) -> tuple[dict[str, Any], TrainState]:
    """Continue from a state that agrees with what is expected: architecture, num_instances, ...; return progress.json.

    It must also agree with what is `settled`, see `settled_facts`, where it says that; older ones do not.

    Raises:
        UserError: A state of another model, data set, optimizer or mode, or one that can't be read.
    """
    progress = json.loads((state / PROGRESS).read_text(encoding='utf-8'))
    progress.setdefault('model_ema', (state / 'ema.safetensors').is_file())  # as older states show it
    for key, value in {**expected, **{key: value for key, value in settled.items() if key in progress}}.items():
        if progress.get(key) != value and key == IMAGES:
            fault = 'was trained on other images: their labels, file names or contents differ'
            raise UserError(f"`resume` {state}: {fault}; give the run's own, or start another run")
        if progress.get(key) != value:
            name = f'`{key}`' if key in (*_OPTIMIZER, 'model_ema', 'eval_metric') else key.replace('_', ' ')
            was = f'{name} {progress.get(key)!r}'
            raise UserError(f'`resume` {state}: was saved with {was}, this run has {value!r}')
    files, name = StateReader(state), _RANK_FILE.format(accelerator.process_index)
    try:
        rank_state = files.read(name) if name in files.names else {}
        task.load_state_files(progress.get('stage', task.stage), rank_state, files)
        if (average := task.get_trainable_module(ema=True)) is not None:
            average.load_state_dict(files.read('ema'))
        random_states = state / f'{RNG_STATE_NAME}_{accelerator.process_index}.pkl'
        if random_states.is_file():
            load(random_states)  # Accelerate would go on without a word where it can't read them
        accelerator.load_state(str(state))
        for name, buffer in _rank_buffers(accelerator, task).items():
            if name in rank_state:
                buffer.copy_(rank_state[name])
    except _UNREADABLE as error:
        raise UserError(f'`resume` {state}: {one_line(error)}') from None
    return progress, TrainState.restore(progress, rank_state, accelerator.device)


def settled_facts(
    settings: CommandSettings, task: TrainerTask, optimizer: Any, accelerator: Accelerator, images: str
) -> dict[str, Any]:
    """Collect what a run cannot change on its way, as JSON holds it; `images` tells training sets apart."""
    values = {name: getattr(settings.optimizer, name) for name in _OPTIMIZER}
    values |= {'opt': settings.optimizer.opt.lower(), IMAGES: images}
    values['parameter_groups'] = [len(group['params']) for group in optimizer.param_groups]
    values |= {'model_ema': task.has_ema(), 'loss_scaling': accelerator.scaler is not None}
    return json.loads(json.dumps(values, default=str))


class ResumePoint(NamedTuple):
    """The state to continue from, if any, and what is wrong with each newer one."""

    state: Path | None = None
    damaged: tuple[str, ...] = ()


def values_of(settings: CommandSettings) -> dict[str, Any]:
    """All settings by name, as args.yaml holds them, with the `mode` of a command that has no such setting."""
    return {'mode': getattr(settings, 'mode', ''), **flatten(settings)}


def locate_run(settings: CommandSettings) -> tuple[Run, ResumePoint]:
    """Decide which folder a run has, the same on all ranks, and which state it continues from.

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
        what = f'`experiment` {folder.experiment}: {run} holds a run already'
        raise UserError(f"{what}; continue it with `resume='auto'`, or choose another name")
    return run, point


def find_resume(settings: CommandSettings) -> ResumePoint:
    """Find the state that `resume` of a command's settings means, or none to start afresh (only with 'auto').

    Raises:
        UserError: A path that is neither a run's folder nor one of its states; a damaged state.
    """
    folder, output, path = settings.folder, Path(settings.folder.output), Path(settings.folder.resume)
    if not folder.resume:
        return ResumePoint()
    if folder.resume == 'auto' and folder.experiment:
        return _newest_state(Run(output / folder.experiment))
    if folder.resume == 'auto':
        values = {key: value for key, value in values_of(settings).items() if key in _SAME}
        runs = [run for run in map(Run, output.glob('*')) if run.args_file.is_file() and run.states()]
        fitting = [run for run in runs if values.items() <= run.args().items()]
        run = max(fitting, key=lambda run: run.states()[-1].stat().st_mtime, default=None)
        return _newest_state(run) if run else ResumePoint()
    if (path / PROGRESS).is_file():
        if damage := verify(path):
            name = str(run_of_state(path))
            raise UserError(f'`resume` {path}: is damaged: {damage}; `resume={name!r}` takes the newest good one')
        return ResumePoint(path)
    point = _newest_state(Run(path))
    if point.state is None:
        raise UserError(f'`resume` {path}: no run with a saved state there; name a folder such as {output}/NAME')
    return point


def _newest_state(run: Run) -> ResumePoint:
    """The newest state that passes verification; raises a UserError where there are states, but only damaged ones."""
    damaged: list[str] = []
    for state in reversed(run.states()):
        if (damage := verify(state)) is None:
            return ResumePoint(state, tuple(damaged))
        damaged.append(f'{state} is damaged: {damage}')
    if damaged:
        what = f'`resume` {run}: every state in it is damaged; {"; ".join(damaged)}'
        raise UserError(f'{what}; start anew with another `experiment`, from {run.last_weights} if you like')
    return ResumePoint()


def _rank_buffers(accelerator: Accelerator, task: TrainerTask) -> dict[str, Tensor]:
    """Running statistics of the model and of its average, which differ between several ranks."""
    if accelerator.num_processes == 1:
        return {}
    models = {'model': task.get_eval_model(), 'ema': task.get_eval_model(ema=True)}
    named = {kind: unwrap_model(model).named_buffers() for kind, model in models.items() if model is not None}
    return {f'{kind}.{name}': buffer for kind, buffers in named.items() for name, buffer in buffers}
