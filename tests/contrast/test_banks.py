"""Bank updates against their equation, and the same banks on every rank."""

from __future__ import annotations

import math

import torch
from equations import updated_bank
from hypothesis import given
from hypothesis import strategies as st
from processes import run_processes

from ctc_timm.contrast.banks import momentum_update, new_bank
from ctc_timm.contrast.sharding import BankShard

SEEDS = st.integers(0, 2**31 - 1)


def test_rows_are_unit_vectors_in_all_directions():
    bank = new_bank(BankShard(2000), 16, torch.Generator().manual_seed(0))
    torch.testing.assert_close(bank.norm(dim=1), torch.ones(2000))
    assert bank.mean(dim=0).abs().max() < 0.05


@given(st.integers(1, 40), st.integers(1, 40), st.integers(2, 8), st.floats(0, 0.999), SEEDS)
def test_updates_are_their_equation(N: int, B: int, E: int, momentum: float, seed: int) -> None:
    """Also of batches larger than the bank, in which images appear again and again."""
    generator = torch.Generator().manual_seed(seed)
    bank = new_bank(BankShard(N), E, generator).double()
    index_B = torch.randint(N, (B,), generator=generator)
    embedding_BE = torch.nn.functional.normalize(torch.randn(B, E, generator=generator, dtype=torch.float64))
    expected = updated_bank(bank, index_B, embedding_BE, momentum)
    untouched = [n for n in range(N) if n not in index_B.tolist()]
    before = bank.clone()
    momentum_update(bank, index_B, embedding_BE, momentum)
    torch.testing.assert_close(bank, expected, rtol=1e-12, atol=1e-14)
    assert torch.equal(bank[untouched], before[untouched])


@given(
    st.lists(st.sampled_from(['zero', 'opposite', 'nan', 'inf', 'tiny', 'huge', 'unit']), min_size=1, max_size=8),
    st.sampled_from([0.0, 0.5, 0.9]),
    st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_rows_stay_unit_or_untouched(kinds: list[str], momentum: float, dtype: torch.dtype) -> None:
    """Whatever an embedding is, and also where it cancels the old row."""
    bank = new_bank(BankShard(8), 4, torch.Generator().manual_seed(3), dtype)
    before = bank.clone()
    made = {
        'zero': lambda row: torch.zeros(4),
        'opposite': lambda row: -row.float() * momentum / (1 - momentum),
        'nan': lambda row: torch.tensor([math.nan, 0, 0, 1]),
        'inf': lambda row: torch.tensor([math.inf, 0, 0, 1]),
        'tiny': lambda row: torch.full((4,), 1e-30),
        'huge': lambda row: torch.full((4,), 1e15),
        'unit': lambda row: torch.full((4,), 0.5),
    }
    embedding_BE = torch.stack([made[kind](bank[i]) for i, kind in enumerate(kinds)])
    momentum_update(bank, torch.arange(len(kinds)), embedding_BE, momentum)
    assert bank.isfinite().all()
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(bank.float().norm(dim=1), torch.ones(8), rtol=tolerance, atol=0)
    for i, kind in enumerate(kinds):
        if kind in ('nan', 'inf'):
            assert torch.equal(bank[i], before[i])
        if kind == 'unit' and momentum == 0:
            torch.testing.assert_close(bank[i].float(), torch.full((4,), 0.5), rtol=tolerance, atol=0)
    assert torch.equal(bank[len(kinds) :], before[len(kinds) :])


def _updates(rank, world):
    generator = torch.Generator().manual_seed(7)
    bank = new_bank(BankShard(40), 6, generator)
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
