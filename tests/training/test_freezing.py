"""What is frozen, against what timm's own configs call the first layer and the classifier."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from ctc_timm.training.freezing import freeze
from ctc_timm.training.tasks import SupervisedTask
from ctc_timm.utils.errors import UserError
from families import on_meta, small_of_each_module

# heads with more than the one layer that timm's config names as the classifier
WIDER = {'caformer_s18': ['head.fc'], 'iformer_t': ['head.head'], 'levit_384_s8': ['head', 'head_dist']}
WIDER['repvit_m0_9'] = ['head.head', 'head.head_dist']
WITHOUT_GROUPS = ('caformer', 'csatv2', 'pit_', 'rdnet')  # timm 1.0.31 does not say how to cut these


def names(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else list(value)


def inside(name: str, modules: list[str]) -> bool:
    return any(name == module or name.startswith(f'{module}.') for module in modules)


@pytest.mark.parametrize('name', small_of_each_module()[::2])
def test_parts_by_family(name: str) -> None:
    """Of every second family: the stem holds the first layer and no classifier, the body all but the classifier."""
    model: Any = on_meta(name, num_classes=3)
    first, classifier = names(model.pretrained_cfg['first_conv']), names(model.pretrained_cfg['classifier'])
    if name.startswith(WITHOUT_GROUPS):
        with pytest.raises(UserError, match='`freeze` stem: timm does not say what the stages of'):
            freeze(model, 'stem')
    else:
        modules = freeze(model, 'stem')
        fixed = {n for n, p in model.named_parameters() if not p.requires_grad}
        assert all(n in fixed for n, _ in model.named_parameters() if inside(n, first))
        assert not any(inside(n, classifier) for n in fixed)
        assert sum(model.get_parameter(n).numel() for n in fixed) < sum(p.numel() for p in model.parameters()) * 0.6
        assert not any(p.requires_grad for module in modules for p in model.get_submodule(module).parameters())
        assert any(inside(f, modules) for f in first)
    model.requires_grad_(True)
    freeze(model, 'body')
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained and all(inside(n, WIDER.get(name, classifier)) for n in trained)
    assert all(n in trained for n, _ in model.named_parameters() if inside(n, classifier[:1]))


def test_nothing_or_all() -> None:
    """Without a classifier all would be body."""
    model = on_meta('test_resnet', num_classes=0)
    assert freeze(model, 'none') == [] and all(p.requires_grad for p in model.parameters())
    with pytest.raises(UserError, match='`freeze` body: that is all of test_resnet'):
        freeze(model, 'body')


def test_batch_norms_without_parameters() -> None:
    """They count too, though timm's optimizer factory never sees them."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Linear(4, 4)
            self.norm = nn.BatchNorm1d(4, affine=False)
            self.drop = nn.Dropout(0.5)
            self.fc = nn.Linear(4, 2)

        def get_classifier(self) -> nn.Module:
            return self.fc

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(self.drop(self.norm(self.stem(x))))

    model = Model()
    task = SupervisedTask(model, criterion=nn.CrossEntropyLoss(), verbose=False)
    task.frozen = tuple(freeze(model, 'body'))
    task.train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    task(torch.randn(8, 4), torch.arange(8) % 2)['loss'].backward()
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert model.training and model.drop.training and not model.norm.training and not model.stem.training
    assert model.fc.weight.grad is not None and model.stem.weight.grad is None
    assert not any(module.training for module in task.eval().modules())
