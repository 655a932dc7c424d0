"""A run that is told to stop in the middle of an epoch, and goes on."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from runs import Ended, forget_processes

STEP = 4


def stop_and_go_on(
    script: Callable[..., Ended], name: str, words: list[str], folder: Path, owner: Any, loss: str, step: int = STEP
) -> None:
    """Run a script whole, and another time with SIGTERM in this step; the second must end in the bits of the first.

    `owner` is the module or class that holds the function, named `loss`, that each step calls.
    """
    words = [*words, '--output', str(folder)]
    assert script(name, *words, '--experiment', 'whole').code == 0
    calls, of_a_step = 0, getattr(owner, loss)

    def stopping(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return of_a_step(*args)

    forget_processes()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, loss, stopping)
        ended = script(name, *words, '--experiment', 'cut')
    assert ended.code == 75 and f'stopped by SIGTERM after step {step}' in ended.err
    forget_processes()
    ended = script(name, '--resume', str(folder / 'cut'))
    assert ended.code == 0, ended.err
    whole, cut = (load_file(folder / run / 'last.safetensors') for run in ('whole', 'cut'))
    assert all(torch.equal(value, cut[key]) for key, value in whole.items())
    assert (folder / 'cut' / 'summary.csv').read_text() == (folder / 'whole' / 'summary.csv').read_text()
