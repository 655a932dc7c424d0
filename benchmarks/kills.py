#!/usr/bin/env python3
"""Kill a training run at random instants, resume it each time, and compare with a run that was left alone.

All kept weights, summary.csv, metrics.jsonl and the last state, which holds the banks, the optimizer and the random
states, have to be bit-identical.

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
from safetensors.torch import load_file
from tqdm import tqdm

from ctc_timm.cli.flags import Parser, add_settings, read_flags
from ctc_timm.runs import Run, weights_metadata
from ctc_timm.training.build import build_trainer
from ctc_timm.training.settings import TrainSettings
from ctc_timm.utils.files import MANIFEST
from ctc_timm.utils.settings import build

# A small run with everything random there is.
SMALL: dict[str, Any] = dict(
    dataset='digits', train_split='train[:256]', val_split='validation[:70]', model='test_resnet', img_size=16,
    mean=0.3, std=0.4, batch_size=16, workers=0, num_negatives=16, lr=0.01, epochs=6, temporal_start_epoch=3,
    checkpoint_steps=3, drop=0.2, reprob=0.3, mixup=0.2, model_ema=True, model_ema_decay=0.9, keep_every=1,
    log_interval=5,
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
    return sorted(name for name in names if not _equal(_content(run / name), _content(other / name)))


def _content(file: Path) -> Any:
    """What a file holds; the libraries that write weights and pickles put the same things in any order."""
    if not file.is_file():
        return None
    if file.suffix == '.safetensors':
        return load_file(file), weights_metadata(file)
    return load(file) if file.suffix in ('.bin', '.pkl') else file.read_bytes()


def _equal(a: Any, b: Any) -> bool:
    """Whether two values are bit-identical."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(_equal, a, b))
    if isinstance(a, (torch.Tensor, np.ndarray)) and type(a) is type(b):
        a, b = torch.as_tensor(a), torch.as_tensor(b)
        return a.dtype == b.dtype and a.shape == b.shape and a.numpy().tobytes() == b.numpy().tobytes()
    return type(a) is type(b) and bool(a == b)


def kill_often(values: Mapping[str, Any], folder: Path, kills: int, seed: int, quiet: bool = False) -> dict[str, Any]:
    """Train once undisturbed and once with kills, and compare.

    Args:
        values: Settings by name.
        folder: Of the two runs, 'whole' and 'killed'.
        kills: How often.
        seed: Of the instants.
        quiet: Show no bar.

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


def main() -> None:
    parser = Parser(description=__doc__.split('\n')[0], epilog="all other flags are those of 'ctc-timm train'")
    parser.add_argument('--kills', type=int, default=20, metavar='N', help='how many')
    parser.add_argument('--kill-seed', type=int, default=0, metavar='S', help='of the instants')
    add_settings(parser, TrainSettings)
    given = read_flags(parser, TrainSettings)
    kills, seed = given.pop('kills'), given.pop('kill_seed')
    with tempfile.TemporaryDirectory() as folder:
        result = kill_often({**SMALL, **given}, Path(folder), kills, seed)
    print('killed after: ' + ', '.join(result['reached']))
    different = ', '.join(result['differences'])
    saving = f'{result["while_saving"]} of them while a file was being written'
    print(f'{len(result["reached"])} kills, {saving}: {different or "bit-identical"}')
    sys.exit(bool(different))


if __name__ == '__main__':
    main()
