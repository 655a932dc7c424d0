"""Both losses against the published implementation's numbers and against their equations written out.

Letters: B batch, D feature size, E embedding size, K negatives an image, N instances.
"""

from __future__ import annotations

import math
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from equations import embedding, instance_loss, same_value_and_slopes, temporal_loss, updated_bank, weights_of
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import Tensor

from ctc_timm import InstanceDiscriminationLoss, NegativeSampler, TemporalContrastLoss
from ctc_timm.contrast import blockwise, negatives
from ctc_timm.contrast.negatives import Negatives
from ctc_timm.utils.errors import UserError

HERE = Path(__file__).resolve()
SMALL = HERE.parents[1] / 'golden' / 'small.safetensors'
# The wider set of numbers lies beside a development checkout; where it is, it is checked too.
WIDE = HERE.parents[3] / 'shared' / 'golden' / 'wide.safetensors'
GOLDEN = [SMALL, WIDE] if WIDE.exists() else [SMALL]
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
DEVICES = ['cpu'] + (['cuda'] if torch.cuda.is_available() else [])
SEEDS = st.integers(0, 2**31 - 1)
EXTREMES = (0.0, -0.0, 1.0, -3.5, 1e30, -1e30, 1e-30, 1e-40, 1e-45, 65504.0, 1e-8)


class Golden:
    def __init__(self, path: Path, dtype: torch.dtype, device: str) -> None:
        self.dtype, self.device = dtype, device
        self.tensors = {}
        with safe_open(path, 'pt') as file:
            metadata = file.metadata()
            for key in file.keys():  # noqa: SIM118  (a safetensors file is no dict)
                value = file.get_tensor(key).clone()
                self.tensors[key] = value.to(device, dtype if value.is_floating_point() else None)
        self.sizes = {k: int(metadata[k]) for k in ('feature_dim', 'num_instances', 'embed_dim', 'num_negatives')}
        self.one = {k: float(metadata[f'{k}_one']) for k in ('temperature', 'momentum')}
        self.two = {k: float(metadata[f'{k}_two']) for k in ('temperature', 'momentum')}

    def __getitem__(self, key: str) -> Tensor:
        return self.tensors[key].clone()

    def close(self, actual: Tensor, key: str) -> None:
        expected = self[key].reshape(actual.shape)
        # Relative to each number's own size in float64; in float32 small entries of a vector carry the rounding
        # of the large ones, so there the vector's scale is what counts.
        atol = 0 if self.dtype == torch.float64 else TOLERANCE[self.dtype] * expected.abs().max().item()
        torch.testing.assert_close(actual, expected, rtol=TOLERANCE[self.dtype], atol=atol, msg=lambda m: f'{key}: {m}')


@pytest.fixture(params=list(product(GOLDEN, TOLERANCE, DEVICES)), ids=lambda p: f'{p[0].stem}-{p[1]}-{p[2]}')
def golden(request):
    return Golden(*request.param)


def load_linear(module, golden, prefix):
    module.weight.data = golden[f'{prefix}.weight']
    module.bias.data = golden[f'{prefix}.bias']


def golden_temporal_loss(golden, step=None):
    loss = TemporalContrastLoss(**golden.sizes, **golden.two).to(golden.device, golden.dtype)
    for side in ('present', 'past'):
        load_linear(getattr(loss, f'{side}_projector'), golden, f'two.{side}_projector')
        bank = f'two.{side}_bank' if step is None else f'two.step{step}.{side}_bank_after'
        setattr(loss, f'{side}_bank', golden[bank])
    return loss


def test_instance_discrimination_golden(golden):
    sizes = {k: v for k, v in golden.sizes.items() if k != 'num_negatives'}
    loss = InstanceDiscriminationLoss(**sizes, **golden.one).to(golden.device, golden.dtype)
    load_linear(loss.projector, golden, 'one.projector')
    loss.bank = golden['one.bank']
    features = golden['one.features'].requires_grad_()
    value = loss(features, golden['one.index'])
    value.backward()
    golden.close(value, 'one.loss')
    golden.close(features.grad, 'one.grad_features')
    golden.close(loss.projector.weight.grad, 'one.grad_projector_weight')
    golden.close(loss.bank, 'one.bank_after')


@pytest.mark.parametrize('ratio', [0, 10**9], ids=['gathered rows', 'whole bank'])
def test_temporal_contrast_golden(golden, ratio, monkeypatch):
    monkeypatch.setattr(negatives, 'WHOLE_BANK_RATIO', ratio)
    loss = golden_temporal_loss(golden)
    for step in ('two.step1', 'two.step2'):
        loss.zero_grad()
        features = golden[f'{step}.features'].requires_grad_()
        value = loss(features, golden[f'{step}.past_features'], golden[f'{step}.index'], golden[f'{step}.negatives'])
        value.backward()
        golden.close(value, f'{step}.loss')
        golden.close(features.grad, f'{step}.grad_features')
        for side in ('present', 'past'):
            golden.close(getattr(loss, f'{side}_normalizer'), f'{step}.normalizer_{side}')
            golden.close(getattr(loss, f'{side}_bank'), f'{step}.{side}_bank_after')
            golden.close(getattr(loss, f'{side}_projector').weight.grad, f'{step}.grad_{side}_projector_weight')


@pytest.mark.parametrize('device', DEVICES)
def test_losses_with_banks_in_bfloat16_golden(device):
    """To the rounding of bfloat16, 2^-9 of a row, over the temperature."""
    golden = Golden(SMALL, torch.float32, device)
    loss = golden_temporal_loss(golden)
    loss.present_bank, loss.past_bank = loss.present_bank.bfloat16(), loss.past_bank.bfloat16()
    inputs = [golden[f'two.step1.{name}'] for name in ('features', 'past_features', 'index', 'negatives')]
    torch.testing.assert_close(loss(*inputs), golden['two.step1.loss'].reshape(()), rtol=2e-3, atol=0)


def test_refresh_golden(golden):
    loss = golden_temporal_loss(golden, step=2)
    loss.refresh(golden['refresh.features'], golden['refresh.index'])
    golden.close(loss.present_bank, 'refresh.present_bank_after')
    golden.close(loss.past_bank, 'refresh.past_bank_after')


@st.composite
def sizes(draw: Any) -> dict[str, int]:
    return {name: draw(st.integers(*limits)) for name, limits in dict(B=(1, 5), D=(1, 6), E=(2, 6), N=(2, 24)).items()}


@given(sizes(), SEEDS, st.floats(0.012, 20), st.sampled_from([1e-3, 1.0, 1e4]), st.booleans())
def test_instance_loss_is_its_equation(size: dict[str, int], seed: int, T: float, scale: float, mixed: bool) -> None:
    torch.manual_seed(seed)
    loss = InstanceDiscriminationLoss(size['D'], size['N'], size['E'], temperature=T).double().eval()
    features_BD = (torch.randn(size['B'], size['D'], dtype=torch.float64) * scale).requires_grad_()
    index_B = torch.randint(size['N'], (size['B'],))
    lam_B = torch.rand(size['B'], dtype=torch.float64) if mixed else None
    expected = instance_loss(loss, features_BD, index_B, lam_B)
    same_value_and_slopes(loss(features_BD, index_B, lam_B), expected, [features_BD, loss.projector.weight])


FORMS = ('each image', 'shared', 'shared, weighted', 'mask', 'numbers', 'all', 'other classes')


@given(sizes(), st.integers(1, 12), SEEDS, st.floats(0.02, 5), st.sampled_from(FORMS), st.booleans(), st.booleans())
@settings(max_examples=150)
def test_temporal_loss_is_its_equation(
    size: dict[str, int], K: int, seed: int, T: float, form: str, mixed: bool, stored: bool
) -> None:
    """Whatever form the negatives have, positives of any rows, and with the past's stored rows for its embeddings."""
    torch.manual_seed(seed)
    B, N = size['B'], size['N']
    loss = TemporalContrastLoss(size['D'], N, size['E'], num_negatives=K, temperature=T).double().eval()
    loss.log_present_normalizer.copy_((torch.rand(()) * 10 * N + 0.1).log())
    loss.log_past_normalizer.copy_((torch.rand(()) * 10 * N + 0.1).log())
    present_BD, past_BD = (torch.randn(B, size['D'], dtype=torch.float64).requires_grad_() for _ in range(2))
    index_B, labels_N = torch.randint(N, (B,)), torch.arange(N) % 2
    rows, weights, classes = None, None, (None, None)
    if form == 'each image':
        rows = torch.randint(N, (B, K))
    elif form.startswith('shared'):
        rows = torch.randperm(N)[: max(1, N // 2)]
    elif form == 'other classes':
        classes = (labels_N[index_B][:, None], labels_N)
    if form in ('mask', 'numbers', 'shared', 'shared, weighted'):
        weights = torch.rand(B, N if rows is None else len(rows)) < 0.7
    if form in ('numbers', 'shared, weighted'):
        weights = weights * torch.randint(1, 4, weights.shape).double()
    drawn = Negatives(torch.zeros(B), torch.rand(B).double() * 3, torch.randint(N, (B,)), rows, weights, *classes)
    weight_BN = weights_of(drawn, N)
    drawn = drawn._replace(count_B=weight_BN.sum(dim=1))
    lam_B = torch.rand(B, dtype=torch.float64) if mixed else None
    scaled_BN = weight_BN * drawn.scale_B[:, None]
    past = loss.past_bank[index_B] if stored else past_BD
    expected = temporal_loss(loss, present_BD, past, drawn.positives_B, scaled_BN, lam_B, embedded=stored)
    value = loss(present_BD, None if stored else past_BD, index_B, drawn, lam_B)
    same_value_and_slopes(value, expected, [present_BD, loss.present_projector.weight] + [past_BD] * (not stored))


@pytest.mark.parametrize('T, N, K', [(0.012, 50_000, 4096), (0.0129, 1_000, 900), (0.04, 50_000, 40_000)])
def test_aligned_features_at_low_temperatures(T: float, N: int, K: int) -> None:
    """All scores one: out is 1 / N, so the loss has a closed form, whatever the normalizer, N exp(1 / T), overflows."""
    generator = torch.Generator().manual_seed(0)
    loss = TemporalContrastLoss(4, N, embed_dim=3, num_negatives=K, temperature=T, generator=generator)
    features_BD = torch.ones(6, 4)
    loss.past_projector.load_state_dict(loss.present_projector.state_dict())
    loss.refresh(torch.ones(N, 4), torch.arange(N))
    negatives = NegativeSampler(torch.arange(N) % 2, K, 'all').draw(torch.arange(6))
    q, c = K / N, K / N + 1e-7
    expected = 2 * (math.log1p(N * c) + K * math.log((1 / N + c) / q))
    for _ in range(2):  # the normalizers are set by the first and used by the second
        value = loss(features_BD, features_BD, torch.arange(6), negatives)
        assert float(value.detach()) == pytest.approx(expected, rel=1e-4)
    for normalizer in (loss.log_present_normalizer, loss.log_past_normalizer):
        assert float(normalizer) == pytest.approx(math.log(N) + 1 / T, rel=1e-5)


def test_states_with_plain_normalizers_load() -> None:
    """Version 0.1 stored Z; zero meant that it was not set yet."""
    for Z in (0.0, 2.5e7):
        loss = TemporalContrastLoss(4, 9, embed_dim=3)
        state = loss.state_dict()
        for side in ('present', 'past'):
            del state[f'log_{side}_normalizer']
            state[f'{side}_normalizer'] = torch.tensor(Z)
        loss.load_state_dict(state)
        assert float(loss.present_normalizer) == pytest.approx(Z, rel=1e-6) == float(loss.past_normalizer)


@pytest.mark.parametrize('block', [64, 1 << 19])
@pytest.mark.parametrize('form', ['all', 'shared', 'sampled', 'repeated'])
def test_many_blocks_against_the_written_out_sum(form, block, monkeypatch):
    monkeypatch.setattr(blockwise, 'BLOCK_SCORES', block)  # 256 rows a block at the least
    torch.manual_seed(2)
    N, B, K = 1111, 5, {'repeated': 1500}.get(form, 900)
    loss = TemporalContrastLoss(8, N, embed_dim=6, num_negatives=K, temperature=0.2).double().eval()
    loss.log_present_normalizer.fill_(math.log(300)), loss.log_past_normalizer.fill_(math.log(250))
    present, past = torch.randn(2, B, 8, dtype=torch.float64)
    present.requires_grad_()
    index = torch.randperm(N)[:B]
    drawn = NegativeSampler(torch.arange(N) % 7, K, form.replace('repeated', 'sampled')).draw(index)
    drawn = drawn._replace(scale_B=drawn.scale_B.double())
    assert (form == 'shared') == (drawn.rows is not None)
    before = {name: value.clone() for name, value in loss.state_dict().items()}
    expected = temporal_loss(loss, present, past, index, weights_of(drawn, N) * drawn.scale_B[:, None])
    same_value_and_slopes(loss(present, past, index, drawn), expected, [present])
    assert all(torch.equal(value, before[name]) for name, value in loss.state_dict().items())  # in evaluation mode

    v = F.normalize(torch.randn(B, 6, dtype=torch.float64), dim=1).requires_grad_()
    spread = blockwise.logsumexp_scores(v, loss.past_bank, 0.01, loss.shard)
    same_value_and_slopes(spread.sum(), torch.logsumexp(v @ loss.past_bank.T / 0.01, dim=1).sum(), [v])


@given(sizes(), st.integers(1, 9), SEEDS, st.floats(0.02, 5), st.floats(0, 0.99))
def test_first_temporal_step_sets_normalizers_and_banks(
    size: dict[str, int], K: int, seed: int, T: float, momentum: float
) -> None:
    """Each normalizer is N times the mean of all unnormalized terms; each bank row moves towards its embedding."""
    torch.manual_seed(seed)
    B, N = size['B'], size['N']
    loss = TemporalContrastLoss(size['D'], N, size['E'], num_negatives=K, temperature=T, momentum=momentum).double()
    present_BD, past_BD = torch.randn(2, B, size['D'], dtype=torch.float64)
    index_B, rows_BK = torch.randint(N, (B,)), torch.randint(N, (B, K))
    wanted = {}
    for side, features_BD, other in (('present', present_BD, 'past'), ('past', past_BD, 'present')):
        projector, bank = getattr(loss, f'{side}_projector'), getattr(loss, f'{other}_bank').clone()
        v_BE = [embedding(projector, feature_D) for feature_D in features_BD]
        terms = [(bank[n] @ v_BE[b] / T).exp() for b in range(B) for n in [int(index_B[b]), *rows_BK[b].tolist()]]
        wanted[f'{side}_normalizer'] = torch.stack(terms).mean() * N
        wanted[f'{side}_bank'] = updated_bank(getattr(loss, f'{side}_bank'), index_B, torch.stack(v_BE), momentum)
    loss(present_BD, past_BD, index_B, rows_BK)
    for name, value in wanted.items():
        torch.testing.assert_close(getattr(loss, name), value.detach(), rtol=1e-9, atol=1e-12)


@given(
    st.lists(st.lists(st.sampled_from(EXTREMES), min_size=4, max_size=4), min_size=1, max_size=4),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.sampled_from([0.012, 0.1, 1.0, 50.0]),
    st.booleans(),
    SEEDS,
)
@settings(max_examples=200)
def test_losses_are_finite_for_all_finite_features(
    rows: list[list[float]], dtype: torch.dtype, T: float, without_bias: bool, seed: int
) -> None:
    """Zeros, 1e30 and subnormal numbers: every loss, gradient, normalizer and bank row is finite.

    Features of zero have no direction without a bias: their gradient is zero.
    """
    torch.manual_seed(seed)
    features_BD = torch.tensor(rows).clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max).to(dtype).requires_grad_()
    other_BD = features_BD.detach().flip(0)
    B, N, K = len(rows), 12, 3
    instance = InstanceDiscriminationLoss(4, N, 5, temperature=T)
    temporal = TemporalContrastLoss(4, N, 5, num_negatives=K, temperature=T)
    if without_bias:
        for projector in (instance.projector, temporal.present_projector, temporal.past_projector):
            torch.nn.init.zeros_(projector.bias)
    index_B = torch.randint(N, (B,))
    for _ in range(2):
        total = instance(features_BD, index_B) + temporal(features_BD, other_BD, index_B, torch.randint(N, (B, K)))
        parameters = [*instance.parameters(), *temporal.parameters()]
        slope_BD, *slopes = torch.autograd.grad(total, [features_BD, *parameters])
        assert total.isfinite() and all(slope.isfinite().all() for slope in (slope_BD, *slopes))
        assert not (without_bias and slope_BD[(features_BD == 0).all(dim=1)].any())
    assert 0 < temporal.present_normalizer < math.inf and 0 < temporal.past_normalizer < math.inf
    for bank in (instance.bank, temporal.present_bank, temporal.past_bank):
        torch.testing.assert_close(bank.norm(dim=1), torch.ones(N), rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    'name, value, words',
    [
        ('temperature', 0.005, 'must be at least 0.012'),
        ('temperature', math.inf, 'must be at least 0.012 and finite'),
        ('temperature', math.nan, 'must be at least 0.012'),
        ('momentum', 1.0, 'must be at least 0 and below 1'),
        ('momentum', -0.5, 'must be at least 0'),
        ('embed_dim', 0, 'must be at least 1'),
        ('num_instances', 0, 'must be at least 1'),
        ('bank_dtype', torch.float16, 'must be one of torch.float32, torch.bfloat16'),
        ('num_negatives', 0, 'must be at least 1'),
    ],
)
def test_settings_that_cannot_work(name, value, words):
    kinds = (TemporalContrastLoss, InstanceDiscriminationLoss)
    for kind in kinds[:1] if name == 'num_negatives' or value == 0.005 else kinds:
        with pytest.raises(UserError, match=f'`{name}` {value}: {words}'):
            kind(**{'feature_dim': 4, 'num_instances': 9, name: value})


def test_plain_rows_are_negatives_too():
    loss = TemporalContrastLoss(7, 20, 6, num_negatives=4).eval()
    (present, past), index, shared = torch.randn(2, 2, 7), torch.tensor([2, 9]), torch.tensor([3, 7, 9])
    for rows, each in ((shared, shared.expand(2, -1)), (None, torch.arange(20).expand(2, -1))):
        torch.testing.assert_close(loss(present, past, index, rows), loss(present, past, index, each))
    with pytest.raises(UserError, match=r'negatives must be .* got shape \(3, 40\)'):
        loss(present, past, index, torch.zeros(3, 40, dtype=torch.long))
