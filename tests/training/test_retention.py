"""Rivals of the temporal term: each is what its paper's equation says, and goes on after an interruption."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ctc_timm import CTCTask
from ctc_timm.contrast.distillation import FeatureDistillationLoss
from ctc_timm.runs import Run
from ctc_timm.training.build import build_trainer, train
from ctc_timm.training.freezing import freeze
from ctc_timm.training.retention import (
    average_with_start,
    body_of,
    pull_to_start,
    scale_body_lr,
    set_classifier,
)
from ctc_timm.utils.errors import UserError

Flags = Callable[..., Any]


class Net(nn.Module):
    """A body and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.fc = nn.Linear(4, 3), nn.Linear(3, 2)

    def get_classifier(self) -> nn.Module:
        return self.fc

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.body(x).tanh())


def trained(model: nn.Module, optimizer: torch.optim.Optimizer, penalty: Callable[[], Any] = lambda: 0) -> nn.Module:
    """A few steps on fixed data; the loss has a penalty more."""
    x, y = torch.randn(8, 4, generator=torch.Generator().manual_seed(1)), torch.arange(8) % 2
    for _ in range(5):
        optimizer.zero_grad()
        (F.cross_entropy(model(x), y) + penalty()).backward()
        optimizer.step()
    return model


@pytest.mark.parametrize('momentum', [0.0, 0.9])
def test_l2_sp_is_its_penalty(momentum: float) -> None:
    """The same steps as with strength / 2 * |body - start|^2 in the loss, differentiated by autograd."""
    torch.manual_seed(0)
    mine = Net()
    plain, start = copy.deepcopy(mine), copy.deepcopy(mine.body)
    optimizer = torch.optim.SGD(mine.parameters(), lr=0.5, momentum=momentum)
    pull_to_start(optimizer, body_of(mine), 0.7)
    trained(mine, optimizer)

    def penalty() -> Tensor:
        pairs = zip(plain.body.parameters(), start.parameters())
        return 0.35 * sum((p - at_start.detach()).square().sum() for p, at_start in pairs)

    trained(plain, torch.optim.SGD(plain.parameters(), lr=0.5, momentum=momentum), penalty)
    for one, two in zip(mine.parameters(), plain.parameters()):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)


def test_the_body_has_a_learning_rate_of_its_own() -> None:
    """timm's schedules set it to the scaled one, and groups keep their weight decay; the classifier's comes last."""
    torch.manual_seed(0)
    model = Net()
    optimizer = timm.optim.create_optimizer_v2(model, 'momentum', lr=0.4, weight_decay=0.1, momentum=0.0)
    before = {id(p): group['weight_decay'] for group in optimizer.param_groups for p in group['params']}
    scale_body_lr(optimizer, body_of(model), 0.25)
    scheduler = timm.scheduler.create_scheduler_v2(optimizer, 'cosine', num_epochs=10)[0]
    for epoch in (0, 3, 7):
        scheduler.step(epoch)
        rates = {id(p): group['lr'] for group in optimizer.param_groups for p in group['params']}
        top = rates[id(model.fc.weight)]
        assert all(rates[id(p)] == pytest.approx(top / 4) for p in model.body.parameters())
        assert rates[id(model.fc.bias)] == top == optimizer.param_groups[-1]['lr']
    assert {id(p): group['weight_decay'] for group in optimizer.param_groups for p in group['params']} == before


def test_distillation_is_its_equation() -> None:
    """Of the features of the frozen copy, over several steps; no negative is drawn, and no bank is there."""
    torch.manual_seed(0)
    model = timm.create_model('test_resnet', num_classes=4)
    labels = torch.arange(12) % 4
    options: dict[str, Any] = {'num_negatives': 1, 'temporal_term': 'cosine', 'verbose': False}
    task = CTCTask(model, labels, temporal_weight=3.0, **options)
    start = copy.deepcopy(model).eval()
    images, targets, index = torch.randn(6, 3, 32, 32), torch.arange(6) % 4, torch.arange(6)
    task.start_temporal_stage([])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(3):
        result = task.train()(images, targets, index)
        with torch.no_grad():
            past = start.forward_head(start.forward_features(images), pre_logits=True)
        probe = copy.deepcopy(model).train()
        features = probe.forward_head(probe.forward_features(images), pre_logits=True)
        expected = (1 - (features * past).sum(dim=1) / (features.norm(dim=1) * past.norm(dim=1))).mean()
        torch.testing.assert_close(result['ctc_loss'], expected.detach(), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(result['loss'], result['task_loss'] + 3 * expected, rtol=1e-4, atol=1e-6)
        optimizer.zero_grad()
        result['loss'].backward()
        optimizer.step()
    assert not task.temporal.bank_names and not list(task.temporal.parameters())


@pytest.mark.parametrize('lam', [None, (1.0, 0.7, 0.2, 0.5)])
def test_distillation_from_stored_features_is_its_equation(lam: tuple[float, ...] | None) -> None:
    """Of the rows of the images as they were stored; with mixed images of both, by their shares."""
    torch.manual_seed(0)
    loss, features_ND, index_B = (
        FeatureDistillationLoss(5, 7, stored=True),
        torch.randn(7, 5),
        torch.tensor([6, 0, 3, 2]),
    )
    loss.refresh(features_ND, torch.arange(7))
    present_BD, lam_B = torch.randn(4, 5), torch.tensor(lam or (1.0,) * 4)
    cosine_BN = torch.nn.functional.cosine_similarity(present_BD[:, None], features_ND[None], dim=2)
    terms = [1 - lam_B[b] * cosine_BN[b, index_B[b]] - (1 - lam_B[b]) * cosine_BN[b, index_B[3 - b]] for b in range(4)]
    value = loss(present_BD, None, index_B, None, lam_B if lam else None)
    torch.testing.assert_close(value, torch.stack(terms).mean())
    assert not list(loss.parameters())


def test_batch_norms_alone_are_frozen() -> None:
    model = timm.create_model('test_resnet', num_classes=4)
    norms = [name for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)]
    assert freeze(model, 'batch_norm') == norms and norms
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen == {f'{norm}.{name}' for norm in norms for name in ('weight', 'bias')}
    with pytest.raises(UserError, match='`freeze` batch_norm: that is none of test_vit'):
        freeze(timm.create_model('test_vit', num_classes=4), 'batch_norm')


OPTIONS = (
    '--l2-sp 0.1',
    '--body-lr-scale 0.1',
    '--mode distill --temporal-from-start',
    '--mode distill --temporal-from-start --past-features bank',
    '--mode ctc --temporal-from-start --temporal-projector centered',
    '--l2-sp 0.1 --mode ctc',
)


@pytest.mark.parametrize('option', OPTIONS)
def test_each_goes_on_after_an_interruption(flags: Flags, tiny: list[str], tmp_path: Path, option: str) -> None:
    """From the state after its first epoch, to the same bytes; and it does something."""
    mode = [] if '--mode' in option else ['--mode vanilla']
    words = [*tiny, '--epochs 2 --checkpoint-hist 9', *mode, option]
    whole = train(flags(*words, f'--output {tmp_path} --experiment whole'))
    shutil.copytree(whole.path, tmp_path / 'cut')
    shutil.rmtree(tmp_path / 'cut' / 'state' / 'epoch-0001')
    trainer = build_trainer(flags(*words, f'--resume {tmp_path / "cut"}'))
    assert trainer.state.epoch == 1
    trainer.fit()
    cut = Run(tmp_path / 'cut')
    assert cut.last_weights.read_bytes() == whole.last_weights.read_bytes()
    without = train(flags(*tiny, '--epochs 2 --mode vanilla', f'--output {tmp_path} --experiment without'))
    assert without.last_weights.read_bytes() != whole.last_weights.read_bytes()


@pytest.mark.parametrize('share, classifier', [(0.25, True), (0.25, False), (1.0, False)])
def test_weights_averaged_with_the_start(share: float, classifier: bool) -> None:
    """Each parameter is the mean that it should be, and batch norms have the statistics of these very weights."""
    torch.manual_seed(0)
    start, model = (timm.create_model('test_resnet', num_classes=4) for _ in range(2))
    before = copy.deepcopy(model)
    batches = [(torch.randn(6, 3, 32, 32), None, None) for _ in range(3)]
    left = copy.deepcopy(model)
    average_with_start(left, start, share, None, torch.device('cpu'), classifier)
    assert all(torch.equal(b, dict(before.named_buffers())[name]) for name, b in left.named_buffers())
    average_with_start(model, start, share, batches, torch.device('cpu'), classifier)
    theirs, old = dict(start.named_parameters()), dict(before.named_parameters())
    for name, parameter in model.named_parameters():
        part = share if classifier or not name.startswith('fc.') else 0.0
        torch.testing.assert_close(parameter, (1 - part) * old[name] + part * theirs[name], rtol=1e-5, atol=1e-6)
    seen: list[Tensor] = []
    norm = next(module for module in model.modules() if isinstance(module, nn.BatchNorm2d))
    norm.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    with torch.no_grad():
        for images, *_ in batches:
            model.eval()(images)
    means = torch.stack([output.mean(dim=(0, 2, 3)) for output in seen])
    torch.testing.assert_close(norm.running_mean, means.mean(dim=0), rtol=1e-4, atol=1e-5)


def test_a_classifier_from_a_probe() -> None:
    """Logits are those of the probe, also of a class without images; others than linear ones are refused."""
    torch.manual_seed(0)
    model = timm.create_model('test_resnet', num_classes=3).eval()
    weights_DC, bias_C = torch.randn(model.num_features, 3).double(), torch.tensor([0.5, -torch.inf, -1.0]).double()
    set_classifier(model, weights_DC, bias_C)
    images = torch.randn(5, 3, 32, 32)
    features = model.forward_head(model.forward_features(images), pre_logits=True)
    expected = features @ weights_DC.float() + torch.tensor([0.5, -1.0, -1.0])
    torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(UserError, match='`probe_first`: the classifier of test_vit is no linear layer'):
        vit = timm.create_model('test_vit', num_classes=3)
        vit.head = nn.Sequential(vit.head)
        set_classifier(vit, weights_DC, bias_C)
