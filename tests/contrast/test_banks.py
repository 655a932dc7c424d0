"""Bank updates against their equation."""

from __future__ import annotations

import math

import torch
from equations import updated_bank
from hypothesis import given
from hypothesis import strategies as st

from ctc_timm.contrast.banks import momentum_update, new_bank
from ctc_timm.contrast.sharding import BankShard

SEEDS = st.integers(0, 2**31 - 1)


@given(st.integers(1, 40), st.integers(1, 40), st.integers(2, 8), st.floats(0, 0.999), SEEDS)
def test_updates_are_their_equation(N: int, B: int, E: int, momentum: float, seed: int) -> None:
    """Also of batches larger than the bank, in which images appear again and again, and for the rows of each rank."""
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
    world = min(N, 4)
    for rank in range(world):
        part = before[rank::world].clone()
        momentum_update(part, index_B, embedding_BE, momentum, BankShard(N, rank, world))
        assert torch.equal(part, bank[rank::world])


@given(
    st.lists(st.sampled_from(['zero', 'opposite', 'nan', 'inf', 'tiny', 'huge', 'unit']), min_size=1, max_size=8),
    st.sampled_from([0.0, 0.5, 0.9]),
    st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_rows_stay_unit_or_untouched(kinds: list[str], momentum: float, dtype: torch.dtype) -> None:
    """Whatever an embedding is, and also where it cancels the old row."""
    bank = new_bank(BankShard(8), 4, torch.Generator().manual_seed(3), dtype)
    before = bank.clone()
    rows = {'zero': [0.0] * 4, 'tiny': [1e-30] * 4, 'huge': [1e15] * 4, 'unit': [0.5] * 4}
    rows |= {'nan': [math.nan, 0, 0, 1], 'inf': [math.inf, 0, 0, 1]}
    opposite_NE = -bank.float() * momentum / (1 - momentum)
    embedding_BE = torch.stack(
        [opposite_NE[i] if kind == 'opposite' else torch.tensor(rows[kind]) for i, kind in enumerate(kinds)]
    )
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
