#!/usr/bin/env python3
"""Time and memory of the two losses alone, without a model.

    python benchmarks/contrast.py --threads 1 --output contrast.json
    python benchmarks/contrast.py --threads 1 --compare contrast.json

Three tables: the temporal loss against gathering K rows an image and a batched product; both losses as the number N of
training images grows; what rounding the banks changes. Every round takes one step of each kind; times and ratios are
medians over rounds. Extra memory is the peak of torch's allocations within a step, beyond banks, draws and inputs.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from itertools import product
from typing import Any

import psutil
import torch
from torch import Tensor

from ctc_timm import InstanceDiscriminationLoss, NegativeSampler, TemporalContrastLoss
from ctc_timm.contrast import blockwise
from ctc_timm.contrast.banks import momentum_update
from ctc_timm.contrast.losses import EPS, embed
from harness import Table, finish, read_flags, timing_table

D, CLASSES = 512, 100
Steps = dict[str, Callable[[], Any]]


def inputs(args: argparse.Namespace, num_instances: int) -> tuple[Tensor, Tensor, Tensor]:
    """Present and past features [B, D], and index [B]."""
    generator = torch.Generator().manual_seed(0)
    present, past = torch.randn(2, args.batch_size, D, generator=generator)
    index = torch.randint(num_instances, (args.batch_size,), generator=generator)
    return present.to(args.device).requires_grad_(), past.to(args.device), index.to(args.device)


def negative_sampler(args: argparse.Namespace, num_instances: int, mode: str) -> NegativeSampler:
    return NegativeSampler(torch.arange(num_instances) % CLASSES, args.num_negatives, mode, device=args.device)


def losses(args: argparse.Namespace, N: int, dtype: torch.dtype = torch.float32) -> tuple[Any, Any, Any, Any]:
    """The losses of both stages with banks of N rows, a sampler of shared negatives, and inputs."""
    one = InstanceDiscriminationLoss(D, N, args.embed_dim, bank_dtype=dtype).to(args.device)
    two = TemporalContrastLoss(D, N, args.embed_dim, args.num_negatives, bank_dtype=dtype).to(args.device)
    return one, two, negative_sampler(args, N, 'shared'), inputs(args, N)


def gathered_loss(loss: TemporalContrastLoss, present_BD: Tensor, past_BD: Tensor, index_B: Tensor, rows_BK: Tensor):
    """The baseline: the same loss by [B, 1 + K, E] of gathered rows, a batched product, and autograd."""
    rows, rate = torch.cat([index_B[:, None], rows_BK], dim=1), loss.num_negatives / loss.num_instances
    present_BE, past_BE = embed(present_BD, loss.present_projector), embed(past_BD, loss.past_projector)
    total = torch.zeros((), device=rows.device)
    for v_BE, bank, normalizer in (
        (present_BE, loss.past_bank, loss.present_normalizer),
        (past_BE, loss.present_bank, loss.past_normalizer),
    ):
        gathered = bank.index_select(0, rows.flatten()).unflatten(0, rows.shape)
        scores = torch.bmm(gathered, v_BE[:, :, None]).squeeze(2)
        out = torch.exp(scores / loss.temperature) / normalizer
        positive, negative = out[:, 0], out[:, 1:]
        total = total - (positive / (positive + rate + EPS)).log().sum() / len(out)
        total = total - (rate / (negative + rate + EPS)).log().sum() / len(out)
    momentum_update(loss.present_bank, index_B, present_BE, loss.momentum)
    momentum_update(loss.past_bank, index_B, past_BE, loss.momentum)
    return total


def temporal_table(args: argparse.Namespace) -> Table:
    """The temporal loss alone, forward and backward, with each kind of negatives against the baseline."""
    N, modes = args.instances, ('shared', 'sampled', 'all')
    loss = TemporalContrastLoss(D, N, args.embed_dim, args.num_negatives).to(args.device)
    present, past, index = inputs(args, N)
    samplers = {mode: negative_sampler(args, N, mode) for mode in modes}
    draws = {mode: sampler.draw(index) for mode, sampler in samplers.items()}
    loss(present, past, index, draws['all'])  # sets the normalizers
    rows_BK = torch.rand(len(index), N, device=args.device).topk(args.num_negatives).indices

    state = {name: value.clone() for name, value in loss.state_dict().items()}
    baseline = gathered_loss(loss, present, past, index, rows_BK).item()
    loss.load_state_dict(state)
    torch.testing.assert_close(loss(present, past, index, rows_BK).item(), baseline, rtol=1e-4, atol=0.0)

    steps: Steps = {'gathered': lambda: gathered_loss(loss, present, past, index, rows_BK).backward()}
    for mode in modes:
        steps[mode] = lambda mode=mode: loss(present, past, index, draws[mode]).backward()
        steps[f'{mode}, drawn'] = lambda mode=mode: loss(present, past, index, samplers[mode].draw(index)).backward()
    return timing_table(steps, args.rounds, 'temporal loss', memory=True)


def blocked_products(v_BE: Tensor, bank: Tensor) -> Tensor:
    """The two products of the instance loss as it takes them, in blocks that stay in cache, and nothing else."""
    v_EB = v_BE.T.contiguous()
    step = min(blockwise.rows_per_block(v_BE.shape[0], v_BE.device), len(bank))
    scratch, result = v_EB.new_empty(step, v_BE.shape[0]), torch.zeros_like(v_EB)
    for rows in bank.split(step):
        rows = rows.to(v_EB.dtype)
        result.addmm_(rows.T, torch.mm(rows, v_EB, out=scratch[: len(rows)]))
    return result


def size_steps(args: argparse.Namespace, N: int, dtype: torch.dtype) -> Steps:
    """The instance loss over N rows, its matrix products alone, and the temporal loss with its draw."""
    one, two, sampler, (present, past, index) = losses(args, N, dtype)
    v_BE = embed(present, one.projector).detach()
    steps: Steps = {
        'instance': lambda: one(present, index).backward(),
        'its two products in the same blocks': lambda: blocked_products(v_BE, one.bank),
        'temporal, shared, drawn': lambda: two(present, past, index, sampler.draw(index)).backward(),
    }
    if dtype == torch.float32:
        steps['its two products, whole'] = lambda: (v_BE @ one.bank.T) @ one.bank
    return steps


def size_table(args: argparse.Namespace) -> Table:
    """Both losses as N grows, where the banks fit into memory."""
    table: Table = {}
    for dtype, N in product((torch.float32, torch.bfloat16), args.sizes):
        name = f'N = {N:,}, {str(dtype).removeprefix("torch.")}'
        needed = N * (3 * args.embed_dim * dtype.itemsize + 4 * args.batch_size + 8) + 2**30
        cuda = args.device.startswith('cuda')
        free = torch.cuda.mem_get_info()[0] if cuda else psutil.virtual_memory().available
        if needed > free:
            print(f'{name}: left out, {needed / 2**30:.1f} GiB needed and {free / 2**30:.1f} GiB free')
            continue
        rounds = args.rounds if N <= 100_000 else max(2, args.rounds // 4)
        rows = timing_table(size_steps(args, N, dtype), rounds, name, memory=True)
        table |= {f'{name}: {step}': row for step, row in rows.items()}
    return table


def rounding_table(args: argparse.Namespace) -> Table:
    """Largest relative difference of the losses with banks in bfloat16, over ten steps in training."""
    values = []
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        one, two, sampler, (present, past, index) = losses(args, args.instances, dtype)
        steps = [(one(present, index), two(present, past, index, sampler.draw(index))) for _ in range(10)]
        values.append(torch.tensor(steps, dtype=torch.float64))
    instance, temporal = (values[1] / values[0] - 1).abs().amax(dim=0).tolist()
    return {'bfloat16': {'instance loss': instance, 'temporal loss': temporal}}


if __name__ == '__main__':
    args = read_flags(
        __doc__, batch_size=64, instances=50_000, num_negatives=16_384, embed_dim=128, rounds=10, threads=0,
        sizes=[50_000, 1_280_000, 14_000_000], device='cpu', output='', compare='',
    )  # fmt: skip
    torch.set_num_threads(args.threads or torch.get_num_threads())
    print(f'torch {torch.__version__}, {args.device}, {torch.get_num_threads()} threads, B = {args.batch_size}, '
          f'K = {args.num_negatives:,}, E = {args.embed_dim}, {args.rounds} rounds')  # fmt: skip
    tables = {f'Temporal loss alone, forward and backward, N = {args.instances:,}': temporal_table(args)}
    tables['Both losses as N grows'] = size_table(args)
    tables['Largest relative difference by rounding'] = rounding_table(args)
    finish(tables, args)
