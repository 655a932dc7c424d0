"""Freed memory stays with the process: counted in page faults, by the kernel."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

CODE = """
import resource, sys
from ctc_timm.utils.memory import keep_freed_memory
kept = keep_freed_memory()
import numpy as np
def fill():
    for _ in range(20):
        np.ones(1 << 22)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
before = fill()
print(int(kept), fill() - before)
"""


@pytest.mark.skipif(sys.platform != 'linux', reason='glibc')
@pytest.mark.parametrize(
    'name, value, kept', [('X', '', 1), ('CTC_TIMM_MALLOC', 'system', 0), ('MALLOC_ARENA_MAX', '4', 0)]
)
def test_freed_memory_is_kept_unless_the_user_chose(name: str, value: str, kept: int) -> None:
    """Arrays of 32 MiB fault 8,192 pages each when the kernel has taken them back."""
    environment = {key: text for key, text in os.environ.items() if 'MALLOC' not in key}
    done = subprocess.run(
        [sys.executable, '-c', CODE], env={**environment, name: value}, capture_output=True, text=True, check=True
    )
    found, faults = map(int, done.stdout.split())
    assert found == kept and (faults < 100) == bool(kept)
