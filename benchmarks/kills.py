#!/usr/bin/env python3
"""Kill a training run at random instants, resume it each time, and compare with the run that was left alone.

What has to be the same to the last bit: all weights that were kept, summary.csv, metrics.jsonl, and the last state, in
which are the banks, the optimizer and the random states.

    python benchmarks/kills.py                                    # 20 kills of a small run on the digits
    python benchmarks/kills.py --kills 50 --kill-seed 1 --save kills.json --mode vanilla
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils.other import load
from safetensors.torch import load_file
from tqdm import tqdm

import ctc_timm  # noqa: F401  (registers the models)
from ctc_timm.cli.arguments import Parser, parse, positive_int, run_script
from ctc_timm.cli.training_flags import add_arguments
from ctc_timm.runs import Run, weights_metadata
from ctc_timm.training.checkpoints import states_of
from ctc_timm.training.trainer import Trainer
from ctc_timm.utils.files import MANIFEST

FLAGS = """
--dataset digits --train-split train[:256] --val-split validation[:70] --model test_resnet --img-size 16 --mean 0.3
--std 0.4 -b 16 -j 0 --num-negatives 16 --lr 0.01 --epochs 6 --temporal-start-epoch 3 --checkpoint-steps 3 --drop 0.2
--reprob 0.3 --mixup 0.2 --model-ema --model-ema-decay 0.9 --keep-every 1 --log-interval 5
"""
SMALL = FLAGS.split()


def train(words: Sequence[str], folder: Path, name: str, ready: Any) -> None:
    """Train, in this process, from the newest state if there is one; `ready` is set when the first step is next."""
    torch.set_num_threads(1)
    parser = Parser()
    add_arguments(parser)
    words = [*words, '--output', str(folder), '--experiment', name, '--resume', 'auto']
    args = parse(parser, words)
    with open(os.devnull, 'w') as quiet, contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
        trainer = Trainer(args)
        ready.set()
        trainer.fit()


def start(words: Sequence[str], folder: Path, name: str) -> Any:
    """Train in a process of its own, which has everything imported; returns when the first step is next."""
    forked = multiprocessing.get_context('fork')
    ready = forked.Event()
    process = forked.Process(target=train, args=(words, folder, name, ready))
    process.start()
    while process.is_alive() and not ready.wait(0.1):
        pass
    return process


def differences(run: Path, other: Path) -> list[str]:
    """What is not the same in two finished runs, or is in one of them alone."""
    last, others = (states_of(Run(folder))[-1] for folder in (run, other))
    if last.name != others.name:
        return [f'the last states are {last.name} and {others.name}']
    names = {
        path.relative_to(folder).as_posix()
        for folder in (run, other)
        for pattern in ('*.safetensors', 'weights/*', 'summary.csv', 'metrics.jsonl', f'state/{last.name}/*')
        for path in folder.glob(pattern)
        if path.name != MANIFEST
    }
    return sorted(name for name in names if not _equal(_content(run / name), _content(other / name)))


def _content(file: Path) -> Any:
    """What a file says; the libraries that write weights and pickles put the same things in any order."""
    if not file.is_file():
        return None
    if file.suffix == '.safetensors':
        return load_file(file), weights_metadata(file)
    return load(file) if file.suffix in ('.bin', '.pkl') else file.read_bytes()


def _equal(a: Any, b: Any) -> bool:
    """To the last bit."""
    if type(a) is not type(b):
        return False
    if isinstance(a, (torch.Tensor, np.ndarray)):
        a, b = torch.as_tensor(a), torch.as_tensor(b)
        return a.dtype == b.dtype and a.shape == b.shape and a.numpy().tobytes() == b.numpy().tobytes()
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(_equal, a, b))
    return bool(a == b)


def kill_often(words: Sequence[str], folder: Path, kills: int, seed: int, quiet: bool = False) -> dict[str, Any]:
    """Train once in peace and once with kills, and compare.

    Args:
        words: Flags.
        folder: Of the two runs, 'whole' and 'killed'.
        kills: How often.
        seed: Of the instants.
        quiet: Show no bar.

    Returns:
        'kills', 'differences', the newest state at each kill ('reached'), how many kills left something half-written
        ('while_saving'), and seconds.
    """
    began = time.monotonic()
    whole = start(words, folder, 'whole')
    ready = time.monotonic()
    whole.join()
    seconds = time.monotonic() - ready
    if whole.exitcode:
        raise RuntimeError(f'the run that was left alone ended with {whole.exitcode}')
    instants = random.Random(seed)
    run, reached, saving = Run(folder / 'killed'), [], 0
    bar = tqdm(total=kills, desc='kills', disable=quiet)
    while len(reached) < kills:
        process = start(words, folder, 'killed')
        process.join(instants.uniform(0, 2 * seconds / (kills + 1)))
        if process.exitcode is None:
            os.kill(process.pid, signal.SIGKILL)
        process.join()
        if process.exitcode == 0:
            break  # it finished before its time
        if process.exitcode != -signal.SIGKILL:
            raise RuntimeError(f'after {len(reached)} kills the run ended with {process.exitcode}')
        states = states_of(run)
        reached.append(states[-1].name if states else 'start')
        saving += bool(run.unfinished())
        bar.update()
    bar.close()
    last = start(words, folder, 'killed')
    last.join()
    if last.exitcode:
        raise RuntimeError(f'after {len(reached)} kills the run ended with {last.exitcode}')
    return {
        'kills': len(reached),
        'reached': reached,
        'while_saving': saving,
        'differences': differences(folder / 'whole', folder / 'killed'),
        'seconds': time.monotonic() - began,
    }


def main() -> None:
    parser = Parser(description=__doc__.split('\n')[0], epilog="all other flags are train.py's")
    parser.add_argument('--kills', type=positive_int, default=20, metavar='N', help='how many')
    parser.add_argument('--kill-seed', type=int, default=0, metavar='S', help='of the instants')
    parser.add_argument('--save', default='', metavar='FILE.json', help='keep the numbers')
    args, words = parser.parse_known_args()
    words = [*SMALL, *words]
    with tempfile.TemporaryDirectory() as folder:
        result = kill_often(words, Path(folder), args.kills, args.kill_seed)
    print('killed after: ' + ', '.join(result['reached']))
    print(
        f'{result["kills"]} kills, {result["while_saving"]} of them while a file was being written: '
        f'{"the same to the last bit" if not result["differences"] else ", ".join(result["differences"])}'
    )
    if args.save:
        Path(args.save).write_text(json.dumps({'flags': words, **result}, indent=1) + '\n')
    sys.exit(bool(result['differences']))


if __name__ == '__main__':
    run_script(main)
