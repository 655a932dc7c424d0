"""Memory of large tensors on Linux, which glibc gives back to the kernel at each free unless it is told otherwise."""

from __future__ import annotations

import ctypes
import os
import sys

VARIABLE = 'CTC_TIMM_MALLOC'
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # glibc's malloc.h
_NEVER, _LARGEST = -1, 2**31 - 1
_kept = False


def keep_freed_memory() -> bool:
    """Let the process keep the memory that it frees, so that the kernel need not clear and map it anew for each tensor.

    Peak memory is the same, but memory stays with the process until it ends. Worker processes inherit this.

    Returns:
        Whether it does: not with another allocator than glibc's, with glibc's own variables (`MALLOC_...`), or with
        `CTC_TIMM_MALLOC=system`.
    """
    chosen = any(name.startswith('MALLOC_') for name in os.environ) or 'malloc' in os.environ.get('LD_PRELOAD', '')
    if sys.platform != 'linux' or chosen or os.environ.get(VARIABLE) == 'system':
        return False
    libc = ctypes.CDLL(None)
    if not hasattr(libc, 'gnu_get_libc_version'):
        return False
    global _kept
    _kept = bool(libc.mallopt(_TRIM_THRESHOLD, _NEVER) and libc.mallopt(_MMAP_THRESHOLD, _LARGEST))
    return _kept


def note() -> str:
    """What a command's first line adds."""
    return ', keeps freed memory' if _kept else ''
