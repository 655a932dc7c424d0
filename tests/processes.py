"""Several processes of a test, over gloo."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def _run(rank: int, world: int, port: int, function: Callable[..., Any], file: str) -> None:
    place = {'RANK': rank, 'LOCAL_RANK': rank, 'WORLD_SIZE': world, 'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': port}
    os.environ.update({key: str(value) for key, value in place.items()})
    torch.set_num_threads(1)
    dist.init_process_group('gloo', rank=rank, world_size=world)
    torch.save(function(rank, world), f'{file}-{rank}.pt')
    dist.destroy_process_group()


def run_processes(function: Callable[[int, int], Any], world: int, folder: Any) -> list[Any]:
    """Call a module-level function(rank, world) in so many processes and return what each gave."""
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        port = probe.getsockname()[1]
    file = f'{folder}/{world}'
    # Forked, as each would import everything anew otherwise.
    mp.start_processes(_run, (world, port, function, file), nprocs=world, start_method='fork')
    return [torch.load(f'{file}-{rank}.pt') for rank in range(world)]
