"""The 32x32 models against the published numbers, and against plain timm and torchvision nets."""

from __future__ import annotations

import pytest
import timm
import torch
from timm.models import group_parameters
from torch import nn
from torchvision.models import ShuffleNetV2

import ctc_timm  # noqa: F401
from ctc_timm.models import catalog as catalog

# Parameters at 100 classes, the maps after stem and stages as (C, H, W), pooled features: as published, but
# for the last row, whose count is that of the common WRN-16-2 and whose maps follow from its definition.
PUBLISHED = {
    'cifar_resnet20': (278_324, [(16, 32, 32), (16, 32, 32), (32, 16, 16), (64, 8, 8)], 64),
    'cifar_resnet18': (
        11_220_132,
        [(64, 32, 32), (64, 32, 32), (128, 16, 16), (256, 8, 8), (512, 4, 4)],
        512,
    ),
    'cifar_resnet34': (
        21_328_292,
        [(64, 32, 32), (64, 32, 32), (128, 16, 16), (256, 8, 8), (512, 4, 4)],
        512,
    ),
    'cifar_wrn_28_4': (5_872_180, [(16, 32, 32), (64, 32, 32), (128, 16, 16), (256, 8, 8)], 256),
    'cifar_resnext32_16x4d': (1_112_004, [(32, 32, 32), (128, 32, 32), (256, 16, 16), (512, 8, 8)], 512),
    'cifar_mobilenetv2_050': (
        812_836,
        [(16, 16, 16), (12, 16, 16), (16, 8, 8), (48, 4, 4), (160, 2, 2)],
        1280,
    ),
    'cifar_shufflenetv2': (1_355_528, [(24, 32, 32), (116, 16, 16), (232, 8, 8), (464, 4, 4)], 1024),
    'cifar_wrn_16_2': (703_284, [(16, 32, 32), (32, 32, 32), (64, 16, 16), (128, 8, 8)], 128),
}
NAMES = list(PUBLISHED)


def make(name: str, **kwargs: object) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, **kwargs)


def images(size: int = 32, channels: int = 3, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, channels, size, size, generator=torch.Generator().manual_seed(1))


def copy_in_order(source: nn.Module, target: nn.Module) -> None:
    """Give `target` the tensors of `source`, matched by their order, whatever their names."""
    values, names = list(source.state_dict().values()), list(target.state_dict())
    assert len(values) == len(names)
    target.load_state_dict(dict(zip(names, values)))


def test_list_is_complete() -> None:
    assert set(timm.list_models(module='cifar')) == set(NAMES)


@pytest.mark.parametrize('name', NAMES)
def test_published_numbers(name: str) -> None:
    parameters, maps, features = PUBLISHED[name]
    model = make(name, features_only=True).eval()
    with torch.no_grad():
        assert [tuple(out.shape[1:]) for out in model(images())] == maps
    assert model.feature_info.channels() == [channels for channels, _, _ in maps]
    assert model.feature_info.reduction() == [32 // size for _, size, _ in maps]

    with torch.device('meta'):
        model = timm.create_model(name)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert model.num_classes == 100
    assert model.num_features == model.head_hidden_size == features


@pytest.mark.parametrize('name', NAMES)
def test_feature_levels_are_those_of_the_model(name: str) -> None:
    model = make(name).eval()
    levels = make(name, features_only=True).eval()  # built with the same seed
    with torch.no_grad():
        last, between = model.forward_intermediates(images())
        for level, same in zip(levels(images()), between, strict=True):
            torch.testing.assert_close(level, same, rtol=0, atol=0)
        torch.testing.assert_close(last, model.forward_features(images()), rtol=0, atol=0)
        model.prune_intermediate_layers([1])
        pruned = model.forward_intermediates(images(), [1], stop_early=True, intermediates_only=True)
        torch.testing.assert_close(pruned[0], between[1], rtol=0, atol=0)


@pytest.mark.parametrize('name', NAMES)
def test_arguments_of_timm(name: str) -> None:
    model = make(name, num_classes=0, in_chans=1, global_pool='catavgmax', drop_rate=0.5)
    with torch.no_grad():
        assert model.eval()(images(16, channels=1)).shape == (2, 2 * PUBLISHED[name][2])  # 16x16 images too
        model.reset_classifier(7)
        assert model(images(channels=1)).shape == (2, 7)
        model.train()
        body = model.forward_features(images(channels=1)).relu() + 1  # no zeros but those of the dropout
        assert (model.forward_head(body, pre_logits=True) == 0).float().mean() > 0.3
    name_of_classifier = model.pretrained_cfg['classifier']
    assert model.get_submodule(name_of_classifier) is model.get_classifier()
    assert model.get_submodule(model.pretrained_cfg['first_conv']).in_channels == 1


@pytest.mark.parametrize('name', [n for n in NAMES if n != 'cifar_shufflenetv2'])
def test_drop_path_drops(name: str) -> None:
    model = make(name, drop_path_rate=0.5)
    rates = [m.drop_prob for m in model.modules() if type(m).__name__ == 'DropPath']
    assert rates and max(rates) <= 0.5 and rates == sorted(rates)


@pytest.mark.parametrize('name', ['cifar_resnet20', 'cifar_wrn_16_2', 'cifar_shufflenetv2'])
def test_checkpointing_changes_no_gradient(name: str) -> None:
    gradients = []
    for enable in (False, True):
        model = make(name).train()
        model.set_grad_checkpointing(enable)
        model(images()).logsumexp(1).sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    torch.testing.assert_close(*gradients)
    assert gradients[0].abs().sum() > 0


@pytest.mark.parametrize('name', NAMES)
def test_parameter_groups_follow_depth(name: str) -> None:
    model = make(name)
    groups = group_parameters(model, model.group_matcher(), reverse=True)
    stem = model.pretrained_cfg['first_conv'] + '.weight'
    assert set(groups) == {n for n, _ in model.named_parameters()}
    assert groups[stem] == min(groups.values())
    assert groups[model.pretrained_cfg['classifier'] + '.weight'] == max(groups.values())
    assert len(set(groups.values())) > len(PUBLISHED[name][1])


def test_resnet18_is_timms_with_another_stem() -> None:
    ours = make('cifar_resnet18').eval()
    plain = timm.create_model('resnet18', num_classes=100).eval()
    plain.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    plain.maxpool = nn.Identity()
    plain.load_state_dict(ours.state_dict())  # the same names
    with torch.no_grad():
        torch.testing.assert_close(ours(images()), plain(images()), rtol=0, atol=0)


def test_shufflenet_is_torchvisions_with_another_stem() -> None:
    ours = make('cifar_shufflenetv2').eval()
    plain = ShuffleNetV2([4, 8, 4], [24, 116, 232, 464, 1024], num_classes=100).eval()
    plain.conv1[0] = nn.Conv2d(3, 24, 1, bias=False)
    plain.maxpool = nn.Identity()
    copy_in_order(ours, plain)
    with torch.no_grad():
        torch.testing.assert_close(ours(images()), plain(images()))


@pytest.mark.parametrize('name', NAMES)
def test_data_config_is_cifar_100s(name: str) -> None:
    config = timm.data.resolve_model_data_config(make(name))
    assert config['input_size'] == (3, 32, 32)
    assert config['mean'] == (0.5071, 0.4867, 0.4408)
    assert config['std'] == (0.2675, 0.2565, 0.2761)
    assert config['crop_pct'] == 1.0 and config['interpolation'] == 'bicubic'
    assert timm.get_pretrained_cfg(name).pool_size == PUBLISHED[name][1][-1][1:]


def test_only_names_with_weights_are_listed() -> None:
    shipped = {**catalog.load(catalog.SHIPPED), **catalog.load(catalog.BASELINES)}
    assert set(timm.list_pretrained('cifar_*')) == set(shipped)
    with pytest.raises(RuntimeError, match='No pretrained weights'):
        timm.create_model('cifar_shufflenetv2', pretrained=True)
