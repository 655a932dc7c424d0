#!/usr/bin/env python3
"""Time and memory of the two losses alone, without a model.

    python benchmarks/contrast.py --threads 1 --output contrast.json
    python benchmarks/contrast.py --threads 1 --compare contrast.json

Three tables: the temporal loss against gathering K rows an image and a batched product; both losses as the
number N of training images grows; bytes and rounding of the banks. Every round takes one step of each kind in
turn, so that a busy machine slows them alike; times and ratios are medians over rounds. Extra memory is the
peak of what torch allocates within one step, beyond banks, draws and inputs: read off torch.profiler's record
of allocations on a CPU, and torch's own peak on a GPU.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault('KINETO_LOG_LEVEL', '99')  # the profiler announces itself otherwise

import torch
from tables import Tables, finish
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

from ctc_timm import InstanceDiscriminationLoss, NegativeSampler, TemporalContrastLoss
from ctc_timm.contrast import blockwise as streaming
from ctc_timm.contrast.banks import momentum_update
from ctc_timm.contrast.embeddings import embed
from ctc_timm.contrast.losses import EPS
from ctc_timm.contrast.sharding import BankShard

D, CLASSES, MIB = 512, 100, 2**20
Step = Callable[[], Any]


def peak_memory(step: Step, device: torch.device) -> float:
    """MiB that a step allocates at its peak, beyond what is there before."""
    if device.type == 'cuda':
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        return (torch.cuda.max_memory_allocated() - before) / MIB
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        step()
    events = [event for event in record.profiler.kineto_results.events() if event.name() == '[memory]']
    total = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        total += event.nbytes()
        peak = max(peak, total)
    return peak / MIB


def seconds(steps: dict[str, Step], rounds: int, device: torch.device, what: str) -> dict[str, list[float]]:
    """Times of each step, all of them once a round; the first round is not counted."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for i in tqdm(range(rounds + 1), what, leave=False, disable=None):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if device.type == 'cuda':
                torch.cuda.synchronize()
            if i > 0:
                times[name].append(time.perf_counter() - start)
    return times


def median_ratio(times: list[float], others: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(times, others))


def inputs(args: argparse.Namespace, num_instances: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    present, past = torch.randn(2, args.batch_size, D, generator=generator)
    index = torch.randint(num_instances, (args.batch_size,), generator=generator)
    return present.to(args.device).requires_grad_(), past.to(args.device), index.to(args.device)


def gathered_loss(loss: TemporalContrastLoss, present_BD: Tensor, past_BD: Tensor, index_B: Tensor, rows_BK: Tensor):
    """The baseline: the same loss by [B, 1 + K, E] of gathered rows, a batched product, and autograd."""
    rows = torch.cat([index_B[:, None], rows_BK], dim=1)
    rate, total = loss.num_negatives / loss.num_instances, 0
    embeddings = []
    for features, projector, bank, normalizer in (
        (present_BD, loss.present_projector, loss.past_bank, loss.present_normalizer),
        (past_BD, loss.past_projector, loss.present_bank, loss.past_normalizer),
    ):
        v_BE = embed(features, projector)
        embeddings.append(v_BE)
        gathered = bank.index_select(0, rows.view(-1)).view(*rows.shape, -1)
        out = torch.exp(torch.bmm(gathered, v_BE[:, :, None]).squeeze(2) / loss.temperature) / normalizer
        positive, negative = out[:, 0], out[:, 1:]
        total = total - (positive / (positive + rate + EPS)).log().sum() / len(out)
        total = total - (rate / (negative + rate + EPS)).log().sum() / len(out)
    momentum_update(loss.present_bank, index_B, embeddings[0], loss.momentum)
    momentum_update(loss.past_bank, index_B, embeddings[1], loss.momentum)
    return total


def temporal_table(args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """The temporal loss alone, forward and backward, each way of taking negatives against the baseline."""
    N, K = args.instances, args.num_negatives
    loss = TemporalContrastLoss(D, N, args.embed_dim, K).to(args.device)
    present, past, index = inputs(args, N)
    labels = torch.arange(N) % CLASSES
    modes = ('shared', 'sampled', 'all')
    samplers = {mode: NegativeSampler(labels, K, mode, device=args.device) for mode in modes}
    draws = {mode: sampler.draw(index) for mode, sampler in samplers.items()}
    loss(present, past, index, *draws['all'])  # sets the normalizers
    mask = draws['sampled']
    rows_BK = mask.negatives if mask.use_BR is None else mask.use_BR.nonzero()[:, 1].view(len(index), K)

    steps: dict[str, Step] = {'gathered': lambda: gathered_loss(loss, present, past, index, rows_BK).backward()}
    for mode in modes:
        steps[mode] = lambda mode=mode: loss(present, past, index, *draws[mode]).backward()
        steps[f'{mode}, drawn'] = lambda mode=mode: loss(present, past, index, *samplers[mode].draw(index)).backward()
    state = [bank.clone() for bank in (loss.present_bank, loss.past_bank)]
    values = []
    for value in (gathered_loss(loss, present, past, index, rows_BK), None):
        loss.present_bank.copy_(state[0]), loss.past_bank.copy_(state[1])
        values.append(float((loss(present, past, index, *mask) if value is None else value).detach()))
    assert abs(values[0] / values[1] - 1) < 1e-4, f'the baseline computes another loss: {values}'
    times = seconds(steps, args.rounds, args.device, 'temporal loss')
    base = peak_memory(steps['gathered'], args.device)
    table = {'gathered': {'ms': 1e3 * statistics.median(times['gathered']), 'MiB': base}}
    for mode in modes:
        memory = peak_memory(steps[mode], args.device)
        table[mode] = {
            'ms': 1e3 * statistics.median(times[mode]),
            'times as fast': median_ratio(times['gathered'], times[mode]),
            'MiB': memory,
            'of its memory, 1 /': base / memory,
            'ms with the draw': 1e3 * statistics.median(times[f'{mode}, drawn']),
            'times as fast with it': median_ratio(times['gathered'], times[f'{mode}, drawn']),
        }
    return table


def available_bytes(device: torch.device) -> int:
    if device.type == 'cuda':
        return torch.cuda.mem_get_info()[0]
    lines = Path('/proc/meminfo').read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith('MemAvailable'))


def filled_bank(num_instances: int, dtype: torch.dtype, args: argparse.Namespace) -> Tensor:
    """Unit rows, a few thousand over and over: times do not depend on their values, and N of them take long to make."""
    rows = torch.nn.functional.normalize(torch.randn(4096, args.embed_dim), dim=1).to(args.device, dtype)
    bank = torch.empty(num_instances, args.embed_dim, dtype=dtype, device=args.device)
    for part in bank.split(4096):
        part.copy_(rows[: len(part)])
    return bank


def whole_products(v_BE: Tensor, bank: Tensor) -> Tensor:
    scores_BN = v_BE @ bank.T
    return scores_BN @ bank


def blocked_products(v_BE: Tensor, bank: Tensor) -> Tensor:
    """The two products of the instance loss as it takes them, in blocks that stay in cache, and nothing else."""
    v_EB = v_BE.T.contiguous()
    step = min(streaming.rows_per_block(v_BE.shape[0], v_BE.device), len(bank))
    scratch, result = v_EB.new_empty(step, v_BE.shape[0]), torch.zeros_like(v_EB)
    for rows in bank.split(step):
        rows = rows.to(v_EB.dtype)
        result.addmm_(rows.T, torch.mm(rows, v_EB, out=scratch[: len(rows)]))
    return result


def instance_row(args: argparse.Namespace, N: int, dtype: torch.dtype, rounds: int) -> dict[str, float]:
    """The instance loss over N rows, against the matrix products in it alone."""
    present, _, index = inputs(args, N)
    loss = InstanceDiscriminationLoss(D, 1, args.embed_dim).to(args.device)
    loss.bank = filled_bank(N, dtype, args)
    v_BE = embed(present, loss.projector).detach()
    steps: dict[str, Step] = {
        'instance': lambda: loss(present, index).backward(),
        'blocks': lambda: blocked_products(v_BE, loss.bank),
    }
    if dtype == torch.float32:
        steps['whole'] = lambda: whole_products(v_BE, loss.bank)
    times = seconds(steps, rounds, args.device, f'instance loss, N = {N:,}')
    row = {
        'instance ms': 1e3 * statistics.median(times['instance']),
        'instance ns a row': 1e9 * statistics.median(times['instance']) / N,
        'over the same products in blocks': median_ratio(times['instance'], times['blocks']),
    }
    if 'whole' in times:
        row['over the two products'] = median_ratio(times['instance'], times['whole'])
    return row | {'instance extra MiB': peak_memory(steps['instance'], args.device)}


def temporal_row(args: argparse.Namespace, N: int, dtype: torch.dtype) -> dict[str, float]:
    """The temporal loss with `shared` negatives over N rows, the draw included."""
    present, past, index = inputs(args, N)
    loss = TemporalContrastLoss(D, 1, args.embed_dim, args.num_negatives).to(args.device)
    loss.num_instances = N
    loss.present_bank, loss.past_bank = filled_bank(N, dtype, args), filled_bank(N, dtype, args)
    sampler = NegativeSampler(torch.arange(N) % CLASSES, args.num_negatives, 'shared', device=args.device)
    steps: dict[str, Step] = {'shared': lambda: loss(present, past, index, *sampler.draw(index)).backward()}
    times = seconds(steps, args.rounds, args.device, f'temporal loss, N = {N:,}')
    return {
        'temporal `shared` ms': 1e3 * statistics.median(times['shared']),
        'temporal extra MiB': peak_memory(steps['shared'], args.device),
    }


def size_table(args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Time and memory as N grows; a size that does not fit into memory is left out, with a line that says so."""
    table = {}
    for dtype in (torch.float32, torch.bfloat16):
        for N in args.sizes:
            name = f'N = {N:,}, {str(dtype).removeprefix("torch.")}'
            scores = N * args.batch_size * 4 if dtype == torch.float32 else 0
            needed = N * (2 * args.embed_dim * dtype.itemsize + 8) + scores + 2**30
            free = available_bytes(args.device)
            if needed > free:
                print(f'{name}: left out, {needed / 2**30:.1f} GiB needed and {free / 2**30:.1f} GiB free')
            else:
                rounds = args.rounds if N <= 100_000 else max(2, args.rounds // 4)
                table[name] = instance_row(args, N, dtype, rounds) | temporal_row(args, N, dtype)
    return table


def bank_table(args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Bytes of one bank, whole and split, and what rounding does to the losses."""
    table = {}
    for N in args.sizes:
        for dtype in (torch.float32, torch.bfloat16):
            row = {}
            for world in (1, 8, 64):
                rows = max(BankShard(N, rank, world).num_rows for rank in range(world))
                row[f'MiB a process, P = {world}'] = rows * args.embed_dim * dtype.itemsize / MIB
            table[f'N = {N:,}, {str(dtype).removeprefix("torch.")}'] = row
    return table


def rounding_table(args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Relative difference of the losses with banks in bfloat16, over ten steps in training."""
    N, worst = args.instances, {'instance': 0.0, 'temporal': 0.0}
    values: dict[str, list[list[float]]] = {'instance': [], 'temporal': []}
    for dtype in (torch.float32, torch.bfloat16):
        generator = torch.Generator().manual_seed(0)
        torch.manual_seed(0)
        one = InstanceDiscriminationLoss(D, N, args.embed_dim, generator=generator, bank_dtype=dtype)
        two = TemporalContrastLoss(D, N, args.embed_dim, args.num_negatives, generator=generator, bank_dtype=dtype)
        one, two = one.to(args.device), two.to(args.device)
        sampler = NegativeSampler(torch.arange(N) % CLASSES, args.num_negatives, 'shared', device=args.device)
        present, past, index = inputs(args, N)
        values['instance'].append([float(one(present, index).detach()) for _ in range(10)])
        values['temporal'].append([float(two(present, past, index, *sampler.draw(index)).detach()) for _ in range(10)])
    for name, (exact, rounded) in values.items():
        worst[name] = max(abs(b / a - 1) for a, b in zip(exact, rounded))
    return {'bfloat16': {f'{name} loss, largest relative difference': value for name, value in worst.items()}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--batch-size', type=int, default=64, help='B')
    parser.add_argument('--instances', type=int, default=50_000, help='N of the temporal table')
    parser.add_argument('--num-negatives', type=int, default=16_384, help='K')
    parser.add_argument('--embed-dim', type=int, default=128, help='E')
    parser.add_argument('--sizes', type=int, nargs='*', default=[50_000, 1_280_000, 14_000_000], help='N that grows')
    parser.add_argument('--rounds', type=int, default=10)
    parser.add_argument('--threads', type=int, default=0, help='processor threads, 0 for all')
    parser.add_argument('--device', type=torch.device, default='cpu')
    parser.add_argument('--output', default='', help='JSON file for the numbers')
    parser.add_argument('--compare', default='', help='JSON file of an earlier --output')
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    print(f'torch {torch.__version__}, {args.device}, {torch.get_num_threads()} threads, B = {args.batch_size}, '
          f'K = {args.num_negatives:,}, E = {args.embed_dim}, {args.rounds} rounds')  # fmt: skip
    tables: Tables = {f'Temporal loss alone, forward and backward, N = {args.instances:,}': temporal_table(args)}
    tables['Both losses as N grows'] = size_table(args)
    tables['Bytes of one bank'] = bank_table(args)
    tables['Rounding'] = rounding_table(args)
    finish(tables, {**vars(args), 'device': str(args.device)}, args.output, args.compare)


if __name__ == '__main__':
    main()
