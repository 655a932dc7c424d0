#!/usr/bin/env python3
"""Kill a training run at random instants, resume it each time, and compare with a run that was left alone.

All kept weights, summary.csv and metrics.jsonl have to be the same bytes; so has the last state, which holds the banks,
the optimizer and the random states, but for the pickles in it, whose values are compared bit by bit.

    python benchmarks/kills.py                                    # 20 kills of a small run on the digits
    python benchmarks/kills.py --kills 50 --kill-seed 1 --mode vanilla
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils.other import load
from torch.utils._pytree import tree_flatten_with_path
from tqdm import tqdm

from ctc_timm.runs import Run
from ctc_timm.training.build import build_trainer
from ctc_timm.training.settings import TrainSettings
from ctc_timm.utils.files import MANIFEST
from ctc_timm.utils.settings import build

# A small run with everything random there is.
SMALL: dict[str, Any] = dict(
    dataset='digits', train_split='train[:256]', val_split='validation[:70]', model='test_resnet', img_size=16,
    mean=0.3, std=0.4, batch_size=16, workers=0, num_negatives=16, lr=0.01, epochs=6, temporal_start_epoch=3,
    checkpoint_steps=3, drop=0.2, reprob=0.3, mixup=0.2, model_ema=True, model_ema_decay=0.9, keep_every=1,
    log_interval=5, cache_dataset=True, monitor_target='digits', monitor_every=2, monitor_images=60,
)  # fmt: skip


def train(values: Mapping[str, Any], folder: Path, name: str, ready: Any) -> None:
    """Train in this process, from the newest state if there is one; `ready` is set when the first step is next."""
    torch.set_num_threads(1)
    place = {'output': str(folder), 'experiment': name, 'resume': 'auto'}
    with open(os.devnull, 'w') as quiet, contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
        trainer = build_trainer(build(TrainSettings, {**values, **place}))
        ready.set()
        trainer.fit()


def start(values: Mapping[str, Any], folder: Path, name: str) -> Any:
    """Train in a process that has everything imported; return when its first step is next."""
    forked = multiprocessing.get_context('fork')
    ready = forked.Event()
    process = forked.Process(target=train, args=(values, folder, name, ready))
    process.start()
    while process.is_alive() and not ready.wait(0.1):
        pass
    return process


def differences(run: Path, other: Path) -> list[str]:
    """Names of the files that differ between two finished runs, or are in one of them alone."""
    last, others = (Run(folder).states()[-1].name for folder in (run, other))
    if last != others:
        return [f'the last states are {last} and {others}']
    names = {
        path.relative_to(folder).as_posix()
        for folder in (run, other)
        for pattern in ('*.safetensors', 'weights/*', 'summary.csv', 'metrics.jsonl', f'state/{last}/*')
        for path in folder.glob(pattern)
        if path.name != MANIFEST
    }
    return sorted(name for name in names if _content(run / name) != _content(other / name))


def _content(file: Path) -> Any:
    """A file's bytes, or the values of a pickle by path within it, as they come in any order."""
    if file.suffix not in ('.bin', '.pkl') or not file.is_file():
        return file.read_bytes() if file.is_file() else None
    return {str(path): _bits(leaf) for path, leaf in tree_flatten_with_path(load(file))[0]}


def _bits(leaf: Any) -> Any:
    if not isinstance(leaf, (torch.Tensor, np.ndarray)):
        return repr(leaf)
    return str(leaf.dtype), tuple(leaf.shape), torch.as_tensor(leaf).numpy().tobytes()


def kill_often(values: Mapping[str, Any], folder: Path, kills: int, seed: int, quiet: bool = False) -> dict[str, Any]:
    """Train once undisturbed and once with kills at instants drawn by the seed, and compare.

    Returns:
        'reached', the newest state at each kill, 'while_saving', how many kills left something half-written, and
        'differences'.
    """

    def finish(process: Any) -> None:
        process.join()
        if process.exitcode:
            raise RuntimeError(f'after {len(reached)} kills the run ended with {process.exitcode}')

    run, reached, saving = Run(folder / 'killed'), [], 0
    whole = start(values, folder, 'whole')
    ready = time.monotonic()
    finish(whole)
    seconds, instants = time.monotonic() - ready, random.Random(seed)
    for _ in tqdm(range(kills), 'kills', disable=quiet):
        process = start(values, folder, 'killed')
        process.join(instants.uniform(0, 2 * seconds / (kills + 1)))
        if process.exitcode is not None:  # it finished before its time
            finish(process)
            break
        process.kill()
        process.join()
        reached.append(run.states()[-1].name if run.states() else 'start')
        saving += bool(run.unfinished())
    finish(start(values, folder, 'killed'))
    different = differences(folder / 'whole', folder / 'killed')
    return {'reached': reached, 'while_saving': saving, 'differences': different}


if __name__ == '__main__':
    from harness import read_flags  # not there for those that import this file by its path

    args = read_flags(__doc__, settings=TrainSettings, kills=20, kill_seed=0)
    with tempfile.TemporaryDirectory() as folder:
        result = kill_often({**SMALL, **args.values}, Path(folder), args.kills, args.kill_seed)
    print('killed after: ' + ', '.join(result['reached']))
    different = ', '.join(result['differences'])
    saving = f'{result["while_saving"]} of them while a file was being written'
    print(f'{len(result["reached"])} kills, {saving}: {different or "bit-identical"}')
    sys.exit(bool(different))
