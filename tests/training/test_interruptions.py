"""Kills, signals and full disks at any moment: what was saved is whole, and the run goes on as if nothing had been."""

from __future__ import annotations

import multiprocessing
import os
import resource
import runpy
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ctc_timm.cli.main import main
from ctc_timm.data.loaders import RefreshLoader
from ctc_timm.runs import Run
from ctc_timm.training import checkpoints
from ctc_timm.training.build import SplitEvaluator, build_trainer
from ctc_timm.training.settings import TrainSettings
from ctc_timm.utils import files
from ctc_timm.utils.errors import RunError, UserError
from ctc_timm.utils.files import MANIFEST, verify
from ctc_timm.utils.settings import build

ROOT = Path(__file__).resolve().parents[2]
KILLS = SimpleNamespace(**runpy.run_path(str(ROOT / 'benchmarks' / 'kills.py')))
# Eight steps in each of four epochs, two a stage, with everything random there is.
SMALL = {**KILLS.SMALL, 'train_split': 'train[:128]', 'epochs': 4, 'temporal_start_epoch': 2}
OWNERS: dict[str, Any] = dict(
    checkpoints=checkpoints, evaluator=SplitEvaluator, files=files, refresh=RefreshLoader, run=Run
)


def train(**values: Any) -> None:
    build_trainer(build(TrainSettings, {**SMALL, **values})).fit()


def command(values: dict[str, Any]) -> list[str]:
    """The flags of `ctc-timm train` that mean these values."""
    words = []
    for name, value in {**SMALL, **values}.items():
        words += [f'--{name}'.replace('_', '-')] + [str(value)] * (value is not True)
    return words


@pytest.fixture(scope='module')
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that is left alone."""
    folder = tmp_path_factory.mktemp('runs')
    train(output=folder, experiment='whole')
    return folder / 'whole'


def apart(function: Callable[..., None], *args: Any) -> int | None:
    """Call a function in a process of its own, which has everything imported; its exit code."""
    process = multiprocessing.get_context('fork').Process(target=function, args=args)
    process.start()
    process.join(240)
    assert process.exitcode is not None, 'it hangs'
    return process.exitcode


def signalled(values: dict[str, Any], owner: str, name: str, call: int, number: int = signal.SIGKILL) -> None:
    """Run `ctc-timm train`; the given call of a function sends this process a signal before it does its work."""
    inside, calls = getattr(OWNERS[owner], name), 0

    def counted(*args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            os.kill(os.getpid(), number)
        return inside(*args, **options)

    setattr(OWNERS[owner], name, counted)
    main('train', command(values))


@pytest.mark.parametrize(
    'owner, name, call',
    [
        ('refresh', '__iter__', 1),  # between the stages
        ('run', 'log', 5),  # within an epoch
        ('run', 'save_weights', 3),
        ('run', 'log_epoch', 4),
        ('checkpoints', 'write_manifest', 8),
        ('checkpoints', 'atomic_rename', 9),  # the state is complete and has no name yet
        ('files', '_flush', 60),
        ('checkpoints', 'prune_states', 10),
    ],
)
def test_killed_at_the_worst_moments(whole: Path, tmp_path: Path, owner: str, name: str, call: int) -> None:
    values, run = {'output': tmp_path, 'experiment': 'killed', 'resume': 'auto'}, Run(tmp_path / 'killed')
    assert apart(signalled, values, owner, name, call) == -signal.SIGKILL
    assert all(verify(state) is None for state in run.states())
    train(**values)
    assert KILLS.differences(whole, run.path) == [] and run.unfinished() == []


def test_killed_at_random_moments(tmp_path: Path) -> None:
    """The short form of benchmarks/kills.py, with a loader process."""
    result = KILLS.kill_often({**SMALL, 'workers': 1}, tmp_path, kills=4, seed=0, quiet=True)
    assert result['differences'] == [] and result['reached']


def test_killed_three_times(whole: Path, tmp_path: Path) -> None:
    """With dropout, decoded images in memory and a monitor: the same files, byte for byte."""
    values, run = {'output': tmp_path, 'experiment': 'killed', 'resume': 'auto'}, Run(tmp_path / 'killed')
    for owner, name, call in (('run', 'log', 4), ('refresh', '__iter__', 1), ('run', 'log_epoch', 2)):
        assert apart(signalled, values, owner, name, call) == -signal.SIGKILL
    train(**values)
    for file in (
        *whole.glob('*.safetensors'),
        *whole.glob('weights/*'),
        whole / 'summary.csv',
        whole / 'metrics.jsonl',
    ):
        assert file.read_bytes() == (run.path / file.relative_to(whole)).read_bytes(), file
    assert KILLS.differences(whole, run.path) == []


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize(
    'owner, name, call, state',
    [
        ('run', 'log', 4, 'epoch-0001-step-000014'),  # within an epoch
        ('run', 'log_epoch', 1, 'epoch-0001-step-000009'),  # after one: the next step is the one that ends
        ('refresh', '__iter__', 1, 'epoch-0001'),  # between the stages: at once, there is nothing to lose
        ('evaluator', '__call__', 2, 'epoch-0001-step-000016'),  # the epoch's steps are not taken again
    ],
)
def test_asked_to_stop(
    whole: Path, tmp_path: Path, number: int, owner: str, name: str, call: int, state: str, capfd: pytest.CaptureFixture
) -> None:
    """The step ends, the state is saved, the exit code is 75 with one line; a resume gives the same bits."""
    values = {'output': tmp_path, 'experiment': 'one', 'resume': 'auto', 'checkpoint_steps': 0}
    assert apart(signalled, values, owner, name, call, number) == 75
    error = capfd.readouterr().err.strip().splitlines()[-1]
    assert f'stopped by {signal.Signals(number).name}' in error and '--resume auto' in error and state in error
    assert Run(tmp_path / 'one').states()[-1].name == state
    train(**values)
    assert KILLS.differences(whole, tmp_path / 'one') == []


@pytest.mark.parametrize(
    'more, rows, step',
    [
        ('--log-interval 1', 5, 5),  # with the row of the first epoch: the step after it is the one that ends
        ('--log-interval 2 --max-bad-steps 0', 4, 8),  # without the check they ask each other when they log
    ],
)
def test_several_processes_asked_to_stop(tmp_path: Path, more: str, rows: int, step: int) -> None:
    """One of two gets the signal; both end the same step, save and leave, and go on to the same end."""
    words = [*command({'output': tmp_path, 'checkpoint_steps': 0, 'resume': 'auto'}), *more.split()]
    file = tmp_path / 'train.py'
    file.write_text(
        'import os, runpy, signal\n'
        'from ctc_timm.runs import Run\n'
        'log, calls = Run.log, []\n'
        'def counted(self, row):\n'
        '    calls.append(row)\n'
        '    if len(calls) == int(os.environ["STOP_AFTER"]):\n'
        '        os.kill(os.getpid(), signal.SIGTERM)\n'
        '    log(self, row)\n'
        'Run.log = counted\n'
        f'runpy.run_path({str(ROOT / "train.py")!r}, run_name="__main__")\n'
    )

    def launch(name: str, stop: int) -> subprocess.CompletedProcess:
        run = ['torch.distributed.run', '--nproc-per-node', '2', '--standalone', str(file)]
        environment = {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(ROOT), 'STOP_AFTER': str(stop)}
        command = [sys.executable, '-m', *run, *words, '--experiment', name]
        return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=240)

    assert launch('whole', 0).returncode == 0
    stopped = launch('stopped', rows)
    assert stopped.returncode and f'stopped by SIGTERM after step {step};' in stopped.stderr
    assert Run(tmp_path / 'stopped').states()[-1].name == f'epoch-0001-step-{step:06d}'
    assert launch('stopped', 0).returncode == 0
    assert KILLS.differences(tmp_path / 'whole', tmp_path / 'stopped') == []


def test_a_launcher_that_is_killed(tmp_path: Path) -> None:
    """Accelerate's launcher does not hand on a SIGTERM; the process that it leaves saves its state and ends."""
    words = command({'output': tmp_path, 'experiment': 'run', 'epochs': 10_000, 'log_interval': 1})
    words = ['-m', 'accelerate.commands.launch', '--num_processes', '1', str(ROOT / 'train.py'), *words]
    environment = {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(ROOT)}
    run, errors = Run(tmp_path / 'run'), tmp_path / 'errors'
    with errors.open('w') as stream:
        launcher = subprocess.Popen([sys.executable, *words], env=environment, stderr=stream, stdout=stream)
    wait_until(lambda: bool(run.log_rows()))
    launcher.terminate()
    launcher.wait()
    wait_until(lambda: 'stopped by the end of its launcher' in errors.read_text())
    assert verify(run.states()[-1]) is None


def wait_until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + 120
    while not true():
        assert time.monotonic() < end, 'it takes too long'
        time.sleep(0.1)


@pytest.mark.parametrize('resume', ['', 'auto'])
def test_two_at_once_in_one_folder(whole: Path, tmp_path: Path, resume: str, capfd: pytest.CaptureFixture) -> None:
    """The second leaves with one line, and the first is not disturbed."""
    run = Run(tmp_path / 'run')
    if resume:
        shutil.copytree(whole, run)
    values = {'output': tmp_path, 'experiment': 'run', 'resume': resume, 'epochs': 6}
    lock = run.lock()
    before = sorted(run.path.rglob('*'))
    assert lock is not None and apart(main, 'train', command(values)) == 2
    error = capfd.readouterr().err.strip().splitlines()[-1]
    assert f'{run}: is in use by another training process' in error
    assert sorted(run.path.rglob('*')) == before
    lock.close()
    assert apart(main, 'train', command(values)) == 0


def damaged(state: Path, how: str) -> None:
    file = state / 'model.safetensors'
    if how == 'flipped':
        content = file.read_bytes()
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif how == 'truncated':
        file.write_bytes(file.read_bytes()[:-100])
    elif how == 'more':
        (state / 'more.bin').write_bytes(b'?')
    else:
        (state / {'missing': 'model.safetensors', 'no manifest': MANIFEST}[how]).unlink()


@pytest.mark.parametrize('how', ['flipped', 'truncated', 'missing', 'no manifest', 'more'])
def test_a_damaged_state_is_named_and_passed_over(
    whole: Path, tmp_path: Path, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    run, values = Run(tmp_path / 'run'), {'output': tmp_path, 'resume': str(tmp_path / 'run')}
    shutil.copytree(whole, run)
    before, newest = run.states()
    damaged(newest, how)
    with pytest.raises(UserError, match=f'{newest}.*damaged'):
        checkpoints.find_resume(build(TrainSettings, {**SMALL, 'resume': str(newest)}))
    with caplog.at_level('INFO', 'ctc_timm'):
        resumed = build_trainer(build(TrainSettings, {**SMALL, **values}))
    assert f'{newest} is damaged: ' in caplog.text and 'going on from the state before' in caplog.text
    resumed.fit()
    assert KILLS.differences(whole, run.path) == []
    assert run.states() == [before, newest]
    for state in run.states():
        damaged(state, how)
    left = sorted(run.path.rglob('*'))
    for more in ({}, {'experiment': 'run', 'resume': 'auto'}):
        with pytest.raises(UserError, match='every state in it is damaged'):
            train(**{**values, **more})
    assert sorted(run.path.rglob('*')) == left


def on_a_small_disk(values: dict[str, Any], room: int) -> None:
    """Train where no file may be larger than this; of a full disk's kinds the one that needs no rights to make."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
    main('train', command(values))


def test_no_room_for_a_state(whole: Path, tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    """One line, no half-written folder, the states before untouched, and the run goes on when there is room."""
    values = {'output': tmp_path, 'experiment': 'run', 'resume': 'auto', 'checkpoint_steps': 0}
    run = Run(tmp_path / 'run')
    # In the temporal stage a state holds the largest file, as momentum is there for the new projectors.
    sizes = [file.stat().st_size for state in Run(whole).states() for file in state.iterdir()]
    assert apart(signalled, values, 'refresh', '__iter__', 1) == -signal.SIGKILL
    kept = {file: file.read_bytes() for state in run.states() for file in state.iterdir()}
    capfd.readouterr()
    assert apart(on_a_small_disk, values, max(sizes) - 1) == 1
    error = capfd.readouterr().err.strip().splitlines()
    assert 'could not be saved: ' in error[-1] and '--resume auto' in error[-1]
    assert 'Traceback' not in ' '.join(error)
    assert {file: file.read_bytes() for state in run.states() for file in state.iterdir()} == kept
    assert run.unfinished() == []
    train(**values)
    assert KILLS.differences(whole, run.path) == []


def test_only_a_verified_state_replaces_older_ones(whole: Path, tmp_path: Path) -> None:
    """The oldest states go once the newest is read back; if that fails, none goes."""
    run = Run(tmp_path / 'run')
    shutil.copytree(whole, run)
    before, newest = run.states()
    damaged(newest, 'flipped')
    with pytest.raises(OSError, match='is damaged: model.safetensors was changed'):
        checkpoints.prune_states(run, newest, 1)
    assert run.states() == [before, newest]
    checkpoints.prune_states(run, before, 5)
    assert run.states() == [before]


def test_errors_that_are_not_about_files_are_kept() -> None:
    accelerator: Any = SimpleNamespace(num_processes=1, is_main_process=True)
    with pytest.raises(RuntimeError, match='cannot write'), checkpoints.raise_on_all_ranks(accelerator, 'x'):
        raise RuntimeError('cannot write')
    with pytest.raises(RunError, match='x: .*No space left'), checkpoints.raise_on_all_ranks(accelerator, 'x'):
        raise OSError(28, 'No space left on device')
