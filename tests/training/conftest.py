"""The run that tests of fine-tuning start from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ctc_timm.training.build import train


@pytest.fixture(scope='module')
def base(flags: Callable[..., Any], tiny: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of test_resnet on digits as pixels of one channel, with weights of both its epochs."""
    output = tmp_path_factory.mktemp('runs')
    words = f'--mode vanilla --epochs 2 --keep-every 1 --in-chans 1 --output {output} --experiment base'
    train(flags(*tiny, words))
    return output / 'base'
