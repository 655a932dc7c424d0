"""Bank updates against a loop, and the same banks in every process."""

import torch
from processes import run_processes

from ctc_timm.contrast.banks import momentum_update, new_bank


def test_rows_are_unit_vectors_in_all_directions():
    bank = new_bank(2000, 16, torch.Generator().manual_seed(0))
    torch.testing.assert_close(bank.norm(dim=1), torch.ones(2000))
    assert bank.mean(dim=0).abs().max() < 0.05


def test_update_against_a_loop():
    torch.manual_seed(0)
    bank = new_bank(30, 5).double()
    expected = bank.clone()
    index, embedding = torch.tensor([4, 0, 29, 7]), torch.randn(4, 5, dtype=torch.float64)
    for i, row in zip(index.tolist(), embedding):
        mixed = 0.8 * expected[i] + 0.2 * row
        expected[i] = mixed / mixed.pow(2).sum().sqrt()
    momentum_update(bank, index, embedding, 0.8)
    torch.testing.assert_close(bank, expected, rtol=1e-12, atol=1e-14)


def test_an_image_twice_in_a_batch_counts_once():
    torch.manual_seed(0)
    bank = new_bank(10, 5)
    expected = bank.clone()
    embedding = torch.nn.functional.normalize(torch.randn(4, 5), dim=1)
    momentum_update(expected, torch.tensor([3, 1]), embedding[:2], 0.5)
    momentum_update(bank, torch.tensor([3, 1, 3, 3]), embedding, 0.5)
    assert torch.equal(bank, expected)


def _updates(rank, world):
    generator = torch.Generator().manual_seed(7)
    bank = new_bank(40, 6, generator)
    for _ in range(5):
        index = torch.randperm(40, generator=generator)[:8]
        embedding = torch.nn.functional.normalize(torch.randn(8, 6, generator=generator), dim=1)
        mine = slice(rank * 8 // world, (rank + 1) * 8 // world)
        momentum_update(bank, index[mine], embedding[mine], 0.9)
    return bank


def test_two_processes_hold_the_bank_that_one_would(tmp_path):
    (one,) = run_processes(_updates, 1, tmp_path)
    first, second = run_processes(_updates, 2, tmp_path)
    assert torch.equal(one, first) and torch.equal(one, second)
