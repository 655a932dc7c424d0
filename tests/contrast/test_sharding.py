"""Split banks: the rows of one bank, each with one process, and the losses of a whole bank."""

import copy
import warnings

import pytest
import timm
import torch
from equations import weights_of

from ctc_timm import CTCTask, InstanceDiscriminationLoss, NegativeSampler, TemporalContrastLoss
from ctc_timm.contrast import banks, negatives
from ctc_timm.contrast.banks import new_bank
from ctc_timm.contrast.sharding import BankShard, gather_rows
from processes import run_processes

N, B, D, E, K = 61, 8, 10, 6, 18
LABELS = torch.arange(N) % 5


def _gathered(rank, world):
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        return gather_rows(torch.arange(6).reshape(3, 2) + 10 * rank)


def test_rows_are_gathered_without_a_warning(tmp_path):
    """In the order of the ranks, by a function that PyTorch does not deprecate."""
    expected = torch.cat([torch.arange(6).reshape(3, 2) + 10 * rank for rank in range(2)])
    assert all(torch.equal(rows, expected) for rows in run_processes(_gathered, 2, tmp_path))


@pytest.mark.parametrize('world', [1, 3, 4])
def test_every_row_is_held_once(world, monkeypatch):
    monkeypatch.setattr(banks, '_BLOCK_ROWS', 7)
    whole = torch.nn.functional.normalize(torch.rand(N, E, generator=torch.Generator().manual_seed(3)) * 2 - 1, dim=1)
    for rank in range(world):
        split = BankShard(N, rank, world)
        part = new_bank(split, E, torch.Generator().manual_seed(3))
        assert torch.equal(part, whole[rank::world]) and split.num_rows == len(part)
        assert torch.equal(whole[split.rows()], part)
        mine, place = split.find(torch.arange(N))
        assert mine.equal(torch.arange(N) % world == rank) and torch.equal(part[place[mine]], whole[mine])


@pytest.mark.parametrize('mixed', [False, True])
@pytest.mark.parametrize('kind', ['shared', 'shared, few', 'mask', 'rows', 'repeated'])
def test_drawn_rows_stand_for_all_of_other_classes(kind, mixed, monkeypatch):
    """Summed over processes, a row of another class weighs K / M on average, whichever process holds it.

    As in test_negatives, five standard deviations of what was drawn bound the largest deviation.
    """
    monkeypatch.setattr(negatives, 'WHOLE_BANK_RATIO', 0 if kind == 'rows' else 10**9)
    labels = torch.cat([torch.full((size,), c) for c, size in enumerate((40, 3, 30, 27))])
    labels = labels[torch.randperm(100, generator=torch.Generator().manual_seed(1))]
    size, draws, world = {'shared': 60, 'shared, few': 12, 'repeated': 100}.get(kind, 14), 2000, 3
    index = torch.tensor([int((labels == c).nonzero()[0]) for c in range(4)])
    partner = index.flip(0) if mixed else None
    left_out = labels[index, None] == labels
    left_out = left_out | left_out.flip(0) if mixed else left_out
    expected = size / (~left_out).sum(dim=1, keepdim=True) * ~left_out
    for rank in range(world):
        split = BankShard(100, rank, world)
        mode = 'shared' if kind.startswith('shared') else 'sampled'
        sampler = NegativeSampler(labels, size, mode, seed=2, rank=rank, split=split)
        seen = torch.zeros(2, 4, split.num_rows, dtype=torch.float64)
        for _ in range(draws):
            draw = sampler.draw(index, partner)
            weight = weights_of(draw, split.num_rows) * draw.scale_B[:, None]
            seen += torch.stack([weight, weight.square()]) / draws
        deviation = (seen[1] - seen[0].square()).clamp_(min=0).div(draws).sqrt()
        assert ((seen[0] - expected[:, rank::world]).abs() <= 5 * deviation + 1e-6).all(), rank
        assert not seen[0][left_out[:, rank::world]].any() and draw.positives_B is index


def contrast(rank, world, split):
    """Three steps of training with every loss, then mixed images without training.

    Returns values and gradients for this process's images, then all that the losses remember.
    """
    torch.manual_seed(0)
    options = {'embed_dim': E, 'temperature': 0.3, 'split_banks': split}
    one = InstanceDiscriminationLoss(D, N, **options, generator=torch.Generator().manual_seed(1)).double()
    two = TemporalContrastLoss(D, N, num_negatives=K, **options, generator=torch.Generator().manual_seed(2)).double()
    sampler = NegativeSampler(LABELS, K, 'all', rank=rank, split=two.shard)
    values, slopes = [], []
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        index = torch.randperm(N, generator=generator)[:B]
        present, past = torch.randn(2, B, D, dtype=torch.float64, generator=generator)
        lam = torch.rand(B, dtype=torch.float64, generator=generator) if seed == 3 else None
        one.train(lam is None), two.train(lam is None)
        # A mixed image's partner is of the same process, so that one process takes the parts of two in turn.
        size = B // world if lam is None else B // 2
        for part in [slice(i, i + size) for i in range(0, B, size)]:
            if world > 1 and part.start // size != rank:
                continue
            own, x = index[part], present[part].clone().requires_grad_()
            share = None if lam is None else lam[part]
            draw = sampler.draw(own, None if lam is None else own.flip(0))
            for value in (one(x, own, share), two(x, past[part], own, draw, share), two(x, None, own, draw, share)):
                values.append(value.detach())
                slopes.append(torch.autograd.grad(value, x)[0])
    centered = TemporalContrastLoss(D, N, **options, projector='centered').double()
    centered.refresh(
        torch.randn(N, D, dtype=torch.float64, generator=torch.Generator().manual_seed(9)), torch.arange(N)
    )
    centered.finish_refresh()
    banks = [one.bank, two.present_bank, two.past_bank, centered.past_bank]
    return values, slopes, [two.present_normalizer, two.past_normalizer], banks


def _two_processes(rank, world):
    task = CTCTask(timm.create_model('test_resnet', num_classes=5), LABELS, split_banks=True, num_negatives=K)
    fetched = task.shard.fetch(new_bank(task.shard, E, torch.Generator().manual_seed(4)), torch.arange(N))
    shard = copy.deepcopy(task.get_checkpoint_state())['task_state']['banks']
    return contrast(rank, world, split=True), contrast(rank, world, split=False)[3], fetched, shard


def test_two_processes_with_split_banks_are_one_with_whole_ones(tmp_path):
    """Losses, their gradients and the banks, exactly; beside them whole banks stay the same bits everywhere."""
    values, slopes, normalizers, whole = contrast(0, 1, split=False)
    parts = run_processes(_two_processes, 2, tmp_path)
    unmixed = 9  # three losses in three steps; a process's mean is over half of the images
    for step in range(unmixed):
        both = [part[0] for part in parts]
        torch.testing.assert_close(sum(p[0][step] for p in both) / 2, values[step], rtol=1e-10, atol=0)
        torch.testing.assert_close(torch.cat([p[1][step] for p in both]) / 2, slopes[step], rtol=1e-9, atol=1e-14)
    for rank, ((mine, grads, scales, shards), copies, fetched, shard) in enumerate(parts):
        mixed = slice(unmixed + 3 * rank, unmixed + 3 * rank + 3)
        torch.testing.assert_close(mine[unmixed:], values[mixed], rtol=1e-10, atol=0)
        torch.testing.assert_close(grads[unmixed:], slopes[mixed], rtol=1e-9, atol=1e-14)
        torch.testing.assert_close(scales, normalizers, rtol=1e-12, atol=0)
        for held, all_rows, copied, first in zip(shards, whole, copies, parts[0][1]):
            torch.testing.assert_close(held, all_rows[rank::2], rtol=1e-10, atol=1e-14)
            torch.testing.assert_close(copied, all_rows, rtol=1e-10, atol=1e-14)
            assert torch.equal(copied, first)
        assert torch.equal(fetched, new_bank(BankShard(N), E, torch.Generator().manual_seed(4)))
        assert all(rows.shape == (31 - rank, 128) for rows in shard.values())


def test_rows_go_to_another_number_of_processes():
    """Saved by three, continued by one or two, in another precision: every row of every bank, where it belongs."""
    torch.manual_seed(0)
    saved = {name: torch.randn(N, 16) for name in ('instance.bank', 'temporal.present_bank', 'temporal.past_bank')}
    model = timm.create_model('test_resnet', num_classes=5)
    for rank, world in ((0, 1), (0, 2), (1, 2)):
        task = CTCTask(model, LABELS, embed_dim=16, bank_dtype=torch.bfloat16, verbose=False)
        task.shard = BankShard(N, rank, world)
        for bank in task.banks().values():
            bank.resize_(task.shard.num_rows, 16)
        for old in range(3):
            task.load_rows({name: rows[old::3] for name, rows in saved.items()}, BankShard(N, old, 3))
        for name, rows in saved.items():
            assert torch.equal(task.banks()[name], rows[rank::world].bfloat16())
    with pytest.raises(RuntimeError, match='instance.bank is'):
        task.load_rows({name: rows[::3] for name, rows in saved.items()}, BankShard(N, 1, 3))


def test_what_cannot_be_split():
    with pytest.raises(ValueError, match='3 rows cannot be split over 4'):
        BankShard(3, 0, 4)
    with pytest.raises(ValueError, match='`num_negatives` 3: must be at least 4, one a process'):
        NegativeSampler(LABELS, 3, split=BankShard(N, 0, 4))


@pytest.mark.parametrize('mode', ['shared', 'sampled', 'all'])
def test_banks_in_bfloat16(mode):
    """Half the bytes, losses and gradients within a hundredth, rows still of length one to bfloat16's precision."""
    given = []
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        generator = torch.Generator().manual_seed(0)
        one = InstanceDiscriminationLoss(16, 600, 32, bank_dtype=dtype, generator=generator)
        two = TemporalContrastLoss(16, 600, 32, num_negatives=90, bank_dtype=dtype, generator=generator)
        sampler = NegativeSampler(torch.arange(600) % 9, 90, mode)
        for present, past in torch.randn(5, 2, 12, 16):
            index = torch.randperm(600)[:12]
            present.requires_grad_()
            pair = one(present, index), two(present, past, index, sampler.draw(index))
            given.append((torch.stack(pair).detach(), torch.autograd.grad(sum(pair), present)[0]))
        for bank in (one.bank, two.present_bank, two.past_bank):
            assert bank.dtype == dtype and bank.numel() * bank.element_size() == 600 * 32 * dtype.itemsize
            torch.testing.assert_close(bank.float().norm(dim=1), torch.ones(600), rtol=0, atol=5e-3)
    for (exact, slope), (rounded, near) in zip(given[:5], given[5:]):
        torch.testing.assert_close(rounded, exact, rtol=1e-2, atol=0)
        assert (near - slope).norm() < 1e-2 * slope.norm()
