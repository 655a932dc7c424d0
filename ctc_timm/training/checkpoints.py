"""A run's states: everything a resume needs, whole or not there at all.

epoch-0003              after epoch 3
epoch-0004-step-000120  within epoch 4, after the run's 120th optimizer step
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from accelerate import Accelerator
from accelerate.utils import RNG_STATE_NAME, gather_object
from accelerate.utils.other import load
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from timm.task import TrainingTask
from timm.utils import unwrap_model
from torch import Tensor, nn

from ..cli.arguments import non_negative_int, positive_int
from ..contrast.sharding import BankShard
from ..contrast.task import CTCTask
from ..runs import Run, plain
from ..utils.errors import RunError, UserError, one_line
from ..utils.files import appear, damage, write_manifest

PROGRESS = 'progress.json'
_SAME = ('model', 'source', 'checkpoint', 'dataset', 'data_dir', 'mode')  # of runs that one may continue by 'auto'
_NAME = re.compile(r'epoch-(\d+)(?:-step-(\d+))?')


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
        '--checkpoint-steps',
        type=non_negative_int,
        default=0,
        metavar='N',
        help='save the state every N optimizer steps, not only after each epoch',
    )
    group.add_argument(
        '--keep-every',
        type=non_negative_int,
        metavar='N',
        help='keep the weights of every N-th epoch, 0: none; about 20 over the run when not given',
    )
    group.add_argument('--log-interval', type=positive_int, default=50, metavar='N', help='batches between log lines')


class ResumePoint(NamedTuple):
    """The state to go on from, if any, and what is wrong with each newer one."""

    state: Path | None
    damaged: list[str]


def states_of(run: Run) -> list[Path]:
    """A run's states, the oldest first."""
    return sorted((p for p in run.states.glob('epoch-*') if _NAME.fullmatch(p.name)), key=_place)


def _place(state: Path) -> tuple[int, int]:
    """Where in the run a state stands, by its name: the epoch to go on with, and the step."""
    match = _NAME.fullmatch(state.name)
    assert match is not None
    epoch, step = int(match[1]), int(match[2] or 0)
    return (epoch, step) if match[2] else (epoch + 1, 0)


def _newest(run: Run) -> ResumePoint:
    """A run's newest state that is as it was written.

    Raises:
        UserError: There are states, but all of them are damaged.
    """
    damaged: list[str] = []
    for state in reversed(states_of(run)):
        wrong = damage(state)
        if wrong is None:
            return ResumePoint(state, damaged)
        damaged.append(f'{state} is damaged: {wrong}')
    if damaged:
        raise UserError(
            f'--resume {run.path}: every state in it is damaged; {"; ".join(damaged)}; start anew in another '
            f'--experiment, from {run.path / "last.safetensors"} by --initial-checkpoint if you like'
        )
    return ResumePoint(None, [])


def save_state(
    accelerator: Accelerator, task: TrainingTask, run: Run, progress: dict[str, Any], own: dict[str, Tensor]
) -> Path:
    """Save all that a resume needs; the folder gets its name when it is complete and on the disk.

    Accelerate saves the trained modules, the optimizer, the gradient scaler and the random states; beside
    them lie the information bank, each process's own numbers, each process's rows of split banks and the moving
    average. Every process writes into the folder, so that all machines must see it.

    Args:
        accelerator: With the prepared module and optimizer.
        task: The task.
        run: Its folder.
        progress: Where the run stands, plain numbers and texts; 'epoch' and 'batch' are the next ones.
        own: Of this process alone, by name.

    Returns:
        The state's folder.

    Raises:
        RunError: It could not be written; nothing of it is left, and older states are as they were.
    """
    within = f'epoch-{progress["epoch"]:04d}-step-{progress["updates"]:06d}'
    final = run.states / (within if progress['batch'] else f'epoch-{progress["epoch"] - 1:04d}')
    temporary = run.states / f'.{final.name}'
    with raise_on_all_ranks(accelerator, f'{final} could not be saved', temporary):
        if accelerator.is_main_process:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
    with raise_on_all_ranks(accelerator, f'{final} could not be saved', temporary):
        accelerator.save_state(str(temporary))
        numbers = {**own, **_own_buffers(accelerator, task)}
        if isinstance(task, CTCTask):
            numbers['generator'] = task.sampler.get_state()['generator']
            if task.split is not None:
                rows = {name: bank.cpu() for name, bank in task.banks().items()}
                save_file(rows, temporary / f'banks_{task.split.rank:05d}.safetensors')
        save_file(numbers, temporary / _own_file(accelerator))
        if accelerator.is_main_process:
            if isinstance(task, CTCTask) and task.information_bank is not None:
                save_file(_tensors(task.information_bank.model), temporary / 'information_bank.safetensors')
            if task.has_ema():
                save_file(_tensors(task.get_trainable_module(ema=True)), temporary / 'ema.safetensors')
            (temporary / PROGRESS).write_text(json.dumps(progress, indent=2), encoding='utf-8')
    with raise_on_all_ranks(accelerator, f'{final} could not be saved', temporary):
        if accelerator.is_main_process:
            write_manifest(temporary)
            appear(temporary, final)
    return final


def prune_states(run: Run, newest: Path, keep: int) -> None:
    """Remove all but the latest so many states up to the newest, once that one is seen to be whole.

    Later ones are of a run that was taken up again before them, or damaged.

    Raises:
        OSError: The newest reads otherwise than it was written.
    """
    wrong = damage(newest)
    if wrong is not None:
        raise OSError(f'{newest} is damaged: {wrong}')
    states = states_of(run)
    kept = states[: states.index(newest) + 1][-keep:]
    for old in states:
        if old not in kept:
            shutil.rmtree(old)


@contextmanager
def raise_on_all_ranks(accelerator: Accelerator, what: str, leftover: Path | None = None) -> Iterator[None]:
    """Do something with files in every process, and fail in all of them where one fails.

    A process that went on alone would wait for the others for ever.

    Args:
        accelerator: Whose processes.
        what: Beginning of the message.
        leftover: A file or folder to remove where it fails.

    Raises:
        RunError: With the reason of the first process that failed.
    """
    reasons: list[str | None] = [None]
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if isinstance(error, RuntimeError) and not _is_about_files(error):
            raise
        reasons = [_reason(error)]
    if accelerator.num_processes > 1:
        reasons = gather_object(reasons)
    failed = [reason for reason in reasons if reason]
    if not failed:
        return
    if leftover is not None and accelerator.is_main_process:
        shutil.rmtree(leftover, ignore_errors=True)
    raise RunError(f'{what}: {failed[0]}; make room or mend it, then go on with --resume auto')


def _is_about_files(error: RuntimeError) -> bool:
    return 'PytorchStreamWriter' in str(error) or 'inline_container' in str(error) or 'write' in str(error)


def _reason(error: Exception) -> str:
    """Why a file could not be written; PyTorch's own words say only that it could not."""
    if isinstance(error, OSError):
        return f'{error.strerror or one_line(error)}{f" ({error.filename})" if error.filename else ""}'
    return one_line(error)


def load_state(
    accelerator: Accelerator, task: TrainingTask, state: Path, expected: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Continue from a state.

    Args:
        accelerator: With the prepared module and optimizer.
        task: The task, as it is at the start of a run.
        state: Folder of `save_state`.
        expected: What must agree with the state: architecture, num_instances, ...

    Returns:
        The `progress` that was saved, and this process's own numbers, empty for one that was not there.

    Raises:
        UserError: A state of another model, data set or mode, or one that can't be read.
    """
    progress = read_progress(state, expected)
    try:
        own = load_file(state / _own_file(accelerator)) if (state / _own_file(accelerator)).is_file() else {}
        generator = own.pop('generator', None)
        if isinstance(task, CTCTask):
            extra: dict[str, Any] = {
                'stage': progress['stage'],
                'instance': task.instance.state_dict(),
                'temporal': task.temporal.state_dict(),
                'sampler': task.sampler.get_state() if generator is None else {'generator': generator},
            }
            if progress['stage'] == 'temporal':
                extra['information_bank'] = load_file(state / 'information_bank.safetensors')
            task.load_task_state(extra)
            _load_split_banks(task, state)
        if task.has_ema():
            module = task.get_trainable_module(ema=True)
            assert module is not None
            module.load_state_dict(load_file(state / 'ema.safetensors'))
        random_states = state / f'{RNG_STATE_NAME}_{accelerator.process_index}.pkl'
        if random_states.is_file():
            load(random_states)  # Accelerate goes on without a word where it can't read them
        accelerator.load_state(str(state))
        for name, buffer in _own_buffers(accelerator, task).items():
            if name in own:
                buffer.copy_(own.pop(name))
    except (OSError, RuntimeError, ValueError, KeyError, EOFError, SafetensorError, pickle_error()) as error:
        raise UserError(f'--resume {state}: {one_line(error)}') from None
    return progress, own


def pickle_error() -> type[Exception]:
    """What PyTorch raises on a file that holds more than tensors and plain values."""
    from pickle import UnpicklingError

    return UnpicklingError


def _load_split_banks(task: CTCTask, state: Path) -> None:
    """Read this process's rows of split banks from the files of the processes that saved them, however many.

    Raises:
        ValueError: The state has whole banks and the task split ones, or the other way round.
    """
    files = sorted(state.glob('banks_*.safetensors'))
    if bool(files) != (task.split is not None):
        raise ValueError(f'was saved {"with" if files else "without"} --split-banks; go on in the same way')
    for rank, file in enumerate(files):
        held = BankShard(task.sampler.num_instances, rank, len(files))
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


def find_resume(args: argparse.Namespace) -> ResumePoint:
    """The state that `--resume` means, or none to start afresh (only with 'auto').

    Raises:
        UserError: A path that is neither a run's folder nor one of its states; a damaged state.
    """
    if not args.resume:
        return ResumePoint(None, [])
    if args.resume == 'auto':
        return _newest_fitting(args)
    path = Path(args.resume)
    if (path / PROGRESS).is_file():
        wrong = damage(path)
        if wrong is not None:
            run = run_of_state(path).path
            raise UserError(f'--resume {path}: is damaged: {wrong}; --resume {run} takes the newest good one')
        return ResumePoint(path, [])
    found = _newest(Run(path)) if path.is_dir() else ResumePoint(None, [])
    if found.state is None:
        raise UserError(f'--resume {path}: no run with a saved state there; give a folder such as {args.output}/NAME')
    return found


def _newest_fitting(args: argparse.Namespace) -> ResumePoint:
    """With `--experiment` that run's newest state, else the newest among runs of the same model, data and mode."""
    if args.experiment:
        return _newest(Run(Path(args.output) / args.experiment))
    fitting = []
    for file in Path(args.output).glob('*/args.yaml'):
        run = Run(file.parent)
        states = states_of(run)
        if not states:
            continue
        same = run.args()
        if all(same.get(key) == plain(getattr(args, key, None)) for key in _SAME):
            fitting.append((states[-1].stat().st_mtime, run.path))
    return _newest(Run(max(fitting)[1])) if fitting else ResumePoint(None, [])


def run_of_state(state: Path) -> Run:
    """The run that a state belongs to."""
    return Run(state.resolve().parent.parent)


def _own_buffers(accelerator: Accelerator, task: TrainingTask) -> dict[str, Tensor]:
    """Running statistics of the model and of its average, of which each of several processes has its own."""
    if accelerator.num_processes == 1:
        return {}
    models = {'model': task.get_eval_model(), 'ema': task.get_eval_model(ema=True) if task.has_ema() else None}
    return {
        f'{kind}.{name}': buffer
        for kind, model in models.items()
        if model is not None
        for name, buffer in unwrap_model(model).named_buffers()
    }


def _own_file(accelerator: Accelerator) -> str:
    return f'process_{accelerator.process_index:05d}.safetensors'


def _tensors(module: nn.Module | None) -> dict[str, Tensor]:
    assert module is not None
    return {k: v.detach().cpu().contiguous().clone() for k, v in module.state_dict().items()}
