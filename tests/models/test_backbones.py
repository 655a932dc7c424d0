"""`features_and_logits` and `feature_dim` against plain timm, on one architecture of every timm module."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from timm.models._efficientnet_builder import decode_arch_def
from timm.models.mobilenetv3 import MobileNetV3
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import ctc_timm
from ctc_timm.models.backbones import check_input, feature_dim, features_and_logits, has_classification_head
from families import HEADLESS, on_meta, small_of_each_module

# A head with a BatchNorm before its classifier, one that averages two classifiers, one whose classifier is a
# convolution, and some of what timm keeps for tests: small enough to compare real numbers.
REAL = ['mobilenetv4_conv_small_035', 'deit_tiny_distilled_patch16_224', 'cifar_wrn_16_2']
REAL += timm.list_models('test_*', exclude_filters='*_ctc')[::3]


class Kernels(TorchDispatchMode):
    """Records every kernel that runs, with the shape of its output: what a model computes, without the sums."""

    def __init__(self) -> None:
        super().__init__()
        self.ran: list[tuple[str, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.ran.append((str(func), getattr(out, 'shape', None)))
        return out


def kernels(call: Callable[[], Any]) -> tuple[Any, list[tuple[str, Any]]]:
    with torch.no_grad(), Kernels() as mode:
        out = call()
    return out, mode.ran


def make(name: str, **kwargs: Any) -> tuple[nn.Module, torch.Tensor]:
    """A seeded model of 10 classes and a batch of images for it."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10, **kwargs)
    return model, torch.randn(2, *model.pretrained_cfg['input_size'])


@pytest.mark.parametrize('name', small_of_each_module())
def test_every_module_of_timm(name):
    model = on_meta(name, num_classes=10).eval()
    images = torch.zeros(2, *model.pretrained_cfg['input_size'], device='meta')
    with torch.no_grad():
        maps = model.forward_features(images)
    calls = []
    # The backbone has been run; what is compared is everything after it, and how often it is asked for.
    model.forward_features = lambda x, **_: calls.append(x) or maps

    plain, after_backbone = kernels(lambda: model(images))
    assert len(calls) == 1, 'timm itself'
    wanted, to_features = kernels(lambda: model.forward_head(maps, pre_logits=True))
    state = maps._version if isinstance(maps, torch.Tensor) else None

    (features, logits), ran = kernels(lambda: features_and_logits(model, images))
    assert len(calls) == 2
    assert ran[: len(after_backbone)] == after_backbone, 'logits as model(images) computes them'
    # flatten(1) of two dimensions runs no kernel
    assert ran[len(after_backbone) :] == to_features, 'features as forward_head computes them'
    assert logits.shape == plain.shape == (2, 10)
    assert features.shape == wanted.shape == (2, feature_dim(model))
    assert state is None or maps._version == state, 'the head changed its input'
    assert has_classification_head(model)


@pytest.mark.parametrize('name', REAL)
def test_numbers(name):
    """In eval mode the numbers of plain timm; in training also its dropout, and its state after the step."""
    model, images = make(name, drop_rate=0.5)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        results = []
        for call in (lambda: twin.train()(images), lambda: features_and_logits(model.train(), images)[1]):
            torch.manual_seed(1)
            results.append(call())
        assert torch.equal(*results)
        for (key, value), wanted in zip(model.named_buffers(), twin.buffers(), strict=True):
            assert torch.equal(value, wanted), key
        norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        assert all(norm.track_running_stats for norm in norms)

        features, logits = features_and_logits(model.eval(), images)
        assert torch.equal(logits, twin.eval()(images))
        assert torch.equal(features, twin.forward_head(twin.forward_features(images), pre_logits=True))
        assert features.std() > 0 and logits.std() > 0


def test_features_of_a_normalizing_head_are_those_of_the_batch():
    """The second look normalizes by the batch, not by running statistics, and passes gradients."""
    model, images = make('mobilenetv4_conv_small_035')
    model.train()
    features, _ = features_and_logits(model, images)
    (twin, _), seen = make('mobilenetv4_conv_small_035'), []
    twin.train().norm_head.register_forward_hook(lambda _, __, out: seen.append(out))
    twin(images)
    torch.testing.assert_close(features, twin.act2(seen[0]).flatten(1), rtol=0, atol=0)
    features.square().sum().backward()
    assert model.conv_stem.weight.grad.abs().sum() > 0
    assert model.classifier.weight.grad is None


def test_compiles_into_one_graph():
    torch.manual_seed(0)
    blocks = decode_arch_def([['cn_r1_k3_s2_c8']])
    model = MobileNetV3(
        blocks, num_classes=10, num_features=8, head_norm=True
    ).train()  # batch norms around the pooling
    images = torch.randn(4, 3, 16, 16)
    twin = copy.deepcopy(model)
    compiled = torch.compile(features_and_logits, backend='eager', fullgraph=True)
    for _ in range(2):
        for got, wanted in zip(compiled(model, images), features_and_logits(twin, images)):
            torch.testing.assert_close(got, wanted)
    for (key, value), wanted in zip(model.named_buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(value, wanted, msg=key)
    assert model.norm_head.num_batches_tracked == model.bn1.num_batches_tracked == 2


@pytest.mark.parametrize('name', [*HEADLESS, 'num_classes', 'features_only', 'Linear'])
def test_models_without_a_head(name):
    options: dict[str, Any] = {'num_classes': dict(num_classes=0), 'features_only': dict(features_only=True)}
    if name in HEADLESS:
        model = on_meta(name)
    else:
        model = timm.create_model('cifar_resnet20', **options[name]) if name in options else nn.Linear(2, 2)
    assert not has_classification_head(model)
    for call in (lambda: features_and_logits(model, torch.zeros(1, 3, 32, 32)), lambda: feature_dim(model)):
        with pytest.raises(ctc_timm.UserError, match='has no classification head') as caught:
            call()
        assert '\n' not in str(caught.value) and (name in options or f"'{name}'" in str(caught.value))


def test_dimension_of_a_model_that_states_none():
    model, images = make('cifar_resnet20', global_pool='catavgmax')
    assert feature_dim(model) == 128
    del model.head_hidden_size
    model.train()
    model.layer1.eval()
    modes = [module.training for module in model.modules()]
    before = {key: value.clone() for key, value in model.state_dict().items()}
    assert feature_dim(model) == 128 == features_and_logits(copy.deepcopy(model).eval(), images)[0].shape[1]
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_size_that_a_model_cannot_take():
    model, _ = make('test_vit', img_size=32)
    check_input(model, (3, 32, 32))
    with pytest.raises(ctc_timm.UserError, match='`img_size`: test_vit cannot take 1x32x32 images: '):
        check_input(model, (1, 32, 32))
    assert model.training
