"""Both losses against the published implementation's numbers and against brute force."""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open

from ctc_timm import InstanceDiscriminationLoss, TemporalContrastLoss
from ctc_timm.contrast import blockwise as streaming
from ctc_timm.contrast import losses, negatives

HERE = Path(__file__).resolve()
SMALL = HERE.parents[1] / 'golden' / 'small.safetensors'
# The wider set of numbers lies beside a development checkout; where it is, it is checked too.
WIDE = HERE.parents[3] / 'shared' / 'golden' / 'wide.safetensors'
GOLDEN = [SMALL, WIDE] if WIDE.exists() else [SMALL]
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}


class Golden:
    def __init__(self, path, dtype):
        self.dtype = dtype
        self.tensors = {}
        with safe_open(path, 'pt') as file:
            facts = file.metadata()
            for key in file.keys():  # noqa: SIM118  (a safetensors file is no dict)
                value = file.get_tensor(key).clone()
                self.tensors[key] = value.to(dtype) if value.is_floating_point() else value
        self.sizes = {k: int(facts[k]) for k in ('feature_dim', 'num_instances', 'embed_dim', 'num_negatives')}
        self.one = {k: float(facts[f'{k}_one']) for k in ('temperature', 'momentum')}
        self.two = {k: float(facts[f'{k}_two']) for k in ('temperature', 'momentum')}

    def __getitem__(self, key):
        return self.tensors[key].clone()

    def close(self, actual, key):
        expected = self[key].reshape(actual.shape)
        # Relative to each number's own size in float64; in float32 small entries of a vector carry the rounding
        # of the large ones, so there the vector's scale is what counts.
        atol = 0 if self.dtype == torch.float64 else TOLERANCE[self.dtype] * expected.abs().max().item()
        torch.testing.assert_close(actual, expected, rtol=TOLERANCE[self.dtype], atol=atol, msg=lambda m: f'{key}: {m}')


@pytest.fixture(params=[(p, d) for p in GOLDEN for d in TOLERANCE], ids=lambda p: f'{p[0].stem}-{p[1]}')
def golden(request):
    return Golden(*request.param)


def load_linear(module, golden, prefix):
    module.weight.data = golden[f'{prefix}.weight']
    module.bias.data = golden[f'{prefix}.bias']


def temporal_loss(golden, step=None):
    loss = TemporalContrastLoss(**golden.sizes, **golden.two).to(golden.dtype)
    for side in ('present', 'past'):
        load_linear(getattr(loss, f'{side}_projector'), golden, f'two.{side}_projector')
        bank = f'two.{side}_bank' if step is None else f'two.step{step}.{side}_bank_after'
        setattr(loss, f'{side}_bank', golden[bank])
    return loss


def test_instance_discrimination_golden(golden):
    sizes = {k: v for k, v in golden.sizes.items() if k != 'num_negatives'}
    loss = InstanceDiscriminationLoss(**sizes, **golden.one).to(golden.dtype)
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
    monkeypatch.setattr(losses, 'WHOLE_BANK_RATIO', ratio)
    loss = temporal_loss(golden)
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


def test_refresh_golden(golden):
    loss = temporal_loss(golden, step=2)
    loss.refresh(golden['refresh.features'], golden['refresh.index'])
    golden.close(loss.present_bank, 'refresh.present_bank_after')
    golden.close(loss.past_bank, 'refresh.past_bank_after')


def plain_temporal(loss, present, past, index, weights_BN, positives=None):
    """The equations written out over the whole bank, one weight a row, with autograd."""
    rate = loss.num_negatives / loss.present_bank.shape[0]
    positives = index if positives is None else positives
    total = 0
    for features, projector, bank, normalizer in (
        (present, loss.present_projector, loss.past_bank, loss.present_normalizer),
        (past, loss.past_projector, loss.present_bank, loss.past_normalizer),
    ):
        v = F.normalize(projector(features), dim=1)
        density = (v @ bank.T / loss.temperature).exp() / normalizer
        p = density.gather(1, positives[:, None])
        total = total - (p / (p + rate + losses.EPS)).log().sum() / len(index)
        total = total - (weights_BN * (rate / (density + rate + losses.EPS)).log()).sum() / len(index)
    return total


@pytest.fixture
def case():
    torch.manual_seed(0)
    N, B, D = 300, 10, 24
    labels = torch.arange(N) % 7
    loss = TemporalContrastLoss(D, N, embed_dim=16, num_negatives=40, temperature=0.2).double()
    loss.present_normalizer.fill_(300.0)
    loss.past_normalizer.fill_(250.0)
    present = torch.randn(B, D, dtype=torch.float64, requires_grad=True)
    past = torch.randn(B, D, dtype=torch.float64)
    return loss.eval(), labels, present, past, torch.randperm(N)[:B]


@pytest.mark.parametrize('block', [64, 1 << 19])
def test_shared_negatives_against_the_written_out_sum(case, block, monkeypatch):
    monkeypatch.setattr(streaming, 'BLOCK_SCORES', block)
    loss, labels, present, past, index = case
    draw = negatives.NegativeSampler(labels, 40, mode='shared').draw(index)
    weights_BN = torch.zeros(len(index), len(labels), dtype=torch.float64)
    weights_BN[:, draw.negatives] = draw.use_BR * draw.scale_B[:, None].double()
    expected = plain_temporal(loss, present, past, index, weights_BN)
    (slope,) = torch.autograd.grad(expected, present)
    value = loss(present, past, index, *draw[:3])
    torch.testing.assert_close(value, expected, rtol=1e-7, atol=0)
    torch.testing.assert_close(torch.autograd.grad(value, present)[0], slope, rtol=1e-7, atol=1e-12)


def test_relaxed_positives_and_mixed_images_against_the_written_out_sum(case):
    loss, labels, present, past, index = case
    draw = negatives.NegativeSampler(labels, 40, positives='relaxed').draw(index)
    weights_BN = draw.use_BR.double()
    lam = torch.linspace(0.2, 1.0, len(index), dtype=torch.float64)
    zero = torch.zeros_like(weights_BN)

    def each(positives):  # one image's loss a row
        rows = []
        for b in range(len(index)):
            one = slice(b, b + 1)
            rows.append(plain_temporal(loss, present[one], past[one], index[one], zero[one], positives[one]))
        return torch.stack(rows)

    mixed = (lam * each(draw.positives_B) + (1 - lam) * each(draw.positives_B.flip(0))).mean()
    only_negatives = plain_temporal(loss, present, past, index, weights_BN) - plain_temporal(
        loss, present, past, index, zero
    )
    value = loss(present, past, index, *draw, lam)
    torch.testing.assert_close(value, mixed + only_negatives, rtol=1e-7, atol=0)


def test_mixed_images_in_instance_discrimination():
    # With lambda of its own the loss is the lambda-weighted sum of two cross-entropies.
    torch.manual_seed(1)
    loss = InstanceDiscriminationLoss(8, 50, embed_dim=6, temperature=0.3).double().eval()
    features = torch.randn(4, 8, dtype=torch.float64)
    index, lam = torch.tensor([3, 9, 20, 49]), torch.tensor([0.7, 1.0, 0.4, 0.0], dtype=torch.float64)
    scores = F.normalize(loss.projector(features), dim=1) @ loss.bank.T / 0.3
    own = F.cross_entropy(scores, index, reduction='none')
    partner = F.cross_entropy(scores, index.flip(0), reduction='none')
    expected = (lam * own + (1 - lam) * partner).mean()
    torch.testing.assert_close(loss(features, index, lam), expected, rtol=1e-10, atol=0)


@pytest.mark.parametrize('block', [64, 1 << 19])
def test_logsumexp_and_its_gradient_against_torch(block, monkeypatch):
    monkeypatch.setattr(streaming, 'BLOCK_SCORES', block)
    torch.manual_seed(2)
    v = F.normalize(torch.randn(5, 12, dtype=torch.float64), dim=1).requires_grad_()
    bank = F.normalize(torch.randn(1111, 12, dtype=torch.float64), dim=1)
    upstream = torch.randn(5, dtype=torch.float64)
    expected = torch.logsumexp(v @ bank.T / 0.01, dim=1)
    value = streaming.logsumexp_scores(v, bank, 0.01)
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)
    slopes = [torch.autograd.grad(x, v, upstream)[0] for x in (value, expected)]
    torch.testing.assert_close(slopes[0], slopes[1], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16])
def test_zero_features_stay_finite(dtype):
    # A dead feature vector has no direction: the embedding of a projector without bias is zero, never NaN.
    instance, temporal = InstanceDiscriminationLoss(6, 20, 4), TemporalContrastLoss(6, 20, 4, num_negatives=5)
    for projector in (instance.projector, temporal.present_projector, temporal.past_projector):
        torch.nn.init.zeros_(projector.bias)
    features = torch.zeros(3, 6, dtype=dtype, requires_grad=True)
    index = torch.tensor([0, 1, 2])
    negatives_BK = torch.randint(3, 20, (3, 5))
    total = instance(features, index) + temporal(features, features.detach(), index, negatives_BK)
    total.backward()
    assert total.isfinite() and not features.grad.any()
    for bank in (instance.bank, temporal.present_bank, temporal.past_bank):
        assert bank.isfinite().all()


def test_evaluation_mode_changes_nothing(case):
    loss, labels, present, past, index = case
    before = {k: v.clone() for k, v in loss.state_dict().items()}
    loss(present, past, index, torch.randint(0, 300, (len(index), 40)))
    for key, value in loss.state_dict().items():
        assert torch.equal(value, before[key]), key


@pytest.mark.parametrize(
    'bad, words',
    [
        ({'temperature': 0.0}, 'temperature'),
        ({'temperature': -0.1}, '-0.1'),
        ({'temperature': math.inf}, 'inf'),
        ({'momentum': 1.0}, 'momentum'),
        ({'momentum': -0.5}, '-0.5'),
        ({'embed_dim': 0}, 'embed_dim'),
        ({'num_instances': 0}, 'num_instances'),
    ],
)
def test_settings_that_cannot_work(bad, words):
    for kind in (InstanceDiscriminationLoss, TemporalContrastLoss):
        with pytest.raises(ValueError, match=words):
            kind(**{'feature_dim': 4, 'num_instances': 9, **bad})


def test_more_settings_that_cannot_work(case):
    with pytest.raises(ValueError, match='num_negatives.*0'):
        TemporalContrastLoss(4, 9, num_negatives=0)
    with pytest.raises(ValueError, match='0.005'):
        TemporalContrastLoss(4, 9, temperature=0.005)
    loss, _, present, past, index = case
    with pytest.raises(ValueError, match='shape'):
        loss(present, past, index, torch.zeros(3, 40, dtype=torch.long))


def test_all_rows_are_the_expectation_of_drawn_ones():
    """`all` equals K times the mean term over other-class rows, by a plain loop, value and gradient."""
    torch.manual_seed(0)
    labels = torch.arange(60) % 5
    loss = TemporalContrastLoss(7, 60, 6, num_negatives=12, temperature=0.4).double().eval()
    with torch.no_grad():
        loss.present_normalizer.fill_(900.0)
        loss.past_normalizer.fill_(700.0)
    sampler = negatives.NegativeSampler(labels, 12, mode='all')
    index = torch.tensor([4, 11, 40])
    present, past = torch.randn(2, 3, 7, dtype=torch.float64)
    present.requires_grad_()
    draw = sampler.draw(index)
    value = loss(present, past, index, *draw)
    (gradient,) = torch.autograd.grad(value, present)

    v1 = F.normalize(loss.present_projector(present))
    v2 = F.normalize(loss.past_projector(past))
    rate, expected = 12 / 60, 0.0
    for v, bank, z in ((v1, loss.past_bank, 900.0), (v2, loss.present_bank, 700.0)):
        for b, image in enumerate(index.tolist()):
            out = (bank @ v[b] / 0.4).exp() / z
            others = out[labels != labels[image]]
            mean = (rate / (others + rate + 1e-7)).log().mean()
            expected = expected - ((out[image] / (out[image] + rate + 1e-7)).log() + 12 * mean) / 3
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, present)[0], rtol=1e-9, atol=1e-14)


def test_stored_past_replaces_the_second_pass():
    """Without past features the loss is that of past embeddings equal to the bank's rows, which stay as they are."""
    torch.manual_seed(1)
    loss = TemporalContrastLoss(7, 20, 6, num_negatives=4, temperature=0.3).double()
    with torch.no_grad():
        loss.present_normalizer.fill_(300.0)
        loss.past_normalizer.fill_(300.0)
    index, rows = torch.tensor([2, 9]), torch.tensor([[5, 6, 7, 8], [1, 3, 5, 7]])
    present = torch.randn(2, 7, dtype=torch.float64)
    before = loss.past_bank.clone(), loss.present_bank.clone()
    value = loss(present, None, index, rows)

    rate, expected = 4 / 20, 0.0
    v1 = F.normalize(loss.present_projector(present))
    for v, bank in ((v1, before[0]), (before[0][index], before[1])):
        for b, image in enumerate(index.tolist()):
            out = (bank @ v[b] / 0.3).exp() / 300.0
            expected = expected - (out[image] / (out[image] + rate + 1e-7)).log() / 2
            expected = expected - (rate / (out[rows[b]] + rate + 1e-7)).log().sum() / 2
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)
    assert torch.equal(loss.past_bank, before[0]) and not torch.equal(loss.present_bank, before[1])
