"""The temporal term's projectors: each is its equation, and a fixed one is orthonormal."""

from __future__ import annotations

import pytest
import torch
from equations import same_value_and_slopes, temporal_loss

from ctc_timm import TemporalContrastLoss
from ctc_timm.contrast.negatives import Negatives
from ctc_timm.utils.errors import UserError


@pytest.mark.parametrize('projector', ['separate', 'shared', 'fixed', 'centered', 'none'])
@pytest.mark.parametrize('stored', [False, True])
def test_every_projector_is_its_equation(projector: str, stored: bool) -> None:
    """Value and slopes of features and of what is trained; a fixed projector keeps angles as they are."""
    torch.manual_seed(0)
    N, D, E, B = 11, 6, 4, 5
    loss = TemporalContrastLoss(D, N, E, num_negatives=7, temperature=0.3, projector=projector).double()
    trained = {'separate': 4, 'shared': 2}.get(projector, 0)
    assert sum(p.requires_grad for p in loss.parameters()) == trained
    assert loss.past_bank.shape == loss.present_bank.shape == (N, D if projector in ('centered', 'none') else E)
    loss.refresh(torch.randn(N, D, dtype=torch.float64), torch.arange(N))
    loss.finish_refresh()
    assert torch.equal(loss.present_bank, loss.past_bank) == (projector != 'separate')
    for normalizer in (loss.log_present_normalizer, loss.log_past_normalizer):
        normalizer.fill_(2.5)
    loss.eval()
    present_BD, past_BD = (torch.randn(B, D, dtype=torch.float64).requires_grad_() for _ in range(2))
    index_B, weight_BN = torch.arange(B), torch.ones(B, N, dtype=torch.float64)
    drawn = Negatives(torch.full((B,), float(N)).double(), torch.ones(B).double(), index_B)
    past = loss.past_bank[index_B] if stored else past_BD
    expected = temporal_loss(loss, present_BD, past, index_B, weight_BN, embedded=stored)
    value = loss(present_BD, None if stored else past_BD, index_B, drawn)
    used = list(loss.present_projector.parameters()) if stored else list(loss.parameters())
    wrt = [present_BD, *([] if stored else [past_BD]), *(p for p in used if p.requires_grad)]
    same_value_and_slopes(value, expected, wrt)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_centered_rows_are_unit_features_less_their_mean(dtype: torch.dtype) -> None:
    """Whatever the features have in common; a second time about the mean of all rows, not of a batch."""
    torch.manual_seed(0)
    features_ND = torch.rand(9, 6) + 2
    loss = TemporalContrastLoss(6, 9, projector='centered', bank_dtype=dtype)
    for index_B in torch.arange(9).split(4):
        loss.refresh(features_ND[index_B], index_B)
    loss.finish_refresh()
    unit_ND = (features_ND / features_ND.norm(dim=1, keepdim=True)).to(dtype).float()
    center_D = unit_ND.mean(dim=0)
    torch.testing.assert_close(loss.present_projector.center, center_D)
    rows_ND = unit_ND - center_D
    rows_ND = (rows_ND / rows_ND.norm(dim=1, keepdim=True)).to(dtype)
    for bank in (loss.past_bank, loss.present_bank):
        torch.testing.assert_close(bank, rows_ND)
    assert 'present_projector.center' in loss.state_dict()


def test_a_fixed_projector_is_orthonormal_and_seeded() -> None:
    """However large E is: its rows, or its columns, are orthonormal, so that distances keep their order."""
    for E in (3, 8, 20):
        made = [
            TemporalContrastLoss(8, 5, E, projector='fixed', generator=torch.Generator().manual_seed(seed))
            for seed in (1, 1, 2)
        ]
        weights = [loss.present_projector.weight for loss in made]
        gram = weights[0] @ weights[0].T if E <= 8 else weights[0].T @ weights[0]
        torch.testing.assert_close(gram, torch.eye(min(E, 8)), atol=1e-5, rtol=0)
        assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
        assert not made[0].present_projector.bias.any()
    with pytest.raises(
        UserError, match="`temporal_projector` 'mine': must be one of separate, shared, fixed, centered, none"
    ):
        TemporalContrastLoss(8, 5, projector='mine')
