"""The 32x32 models against the published numbers, and against plain timm and torchvision nets."""

from __future__ import annotations

import pytest
import timm
import torch
from timm.models import group_parameters
from torch import nn
from torchvision.models import ShuffleNetV2

from ctc_timm.models import catalog

# Parameters at 100 classes, the maps after stem and stages as (C, size), pooled features: as published, but for the
# last row, whose count is that of the common WRN-16-2 and whose maps follow from its definition.
PUBLISHED = {
    'cifar_resnet20': (278_324, [(16, 32), (16, 32), (32, 16), (64, 8)], 64),
    'cifar_resnet18': (11_220_132, [(64, 32), (64, 32), (128, 16), (256, 8), (512, 4)], 512),
    'cifar_resnet34': (21_328_292, [(64, 32), (64, 32), (128, 16), (256, 8), (512, 4)], 512),
    'cifar_wrn_28_4': (5_872_180, [(16, 32), (64, 32), (128, 16), (256, 8)], 256),
    'cifar_resnext32_16x4d': (1_112_004, [(32, 32), (128, 32), (256, 16), (512, 8)], 512),
    'cifar_mobilenetv2_050': (812_836, [(16, 16), (12, 16), (16, 8), (48, 4), (160, 2)], 1280),
    'cifar_shufflenetv2': (1_355_528, [(24, 32), (116, 16), (232, 8), (464, 4)], 1024),
    'cifar_wrn_16_2': (703_284, [(16, 32), (32, 32), (64, 16), (128, 8)], 128),
}


def make(name: str, **kwargs: object) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, **kwargs)


def images(size: int = 32, channels: int = 3) -> torch.Tensor:
    return torch.randn(2, channels, size, size, generator=torch.Generator().manual_seed(1))


def test_list_is_complete():
    assert set(timm.list_models(module='cifar')) == set(PUBLISHED)
    shipped = {**catalog.load(catalog.SHIPPED), **catalog.load(catalog.BASELINES)}
    assert set(timm.list_pretrained('cifar_*')) == set(shipped)
    with pytest.raises(RuntimeError, match='No pretrained weights'):
        timm.create_model('cifar_shufflenetv2', pretrained=True)


@pytest.mark.parametrize('name', PUBLISHED)
def test_published_numbers_and_feature_levels(name):
    parameters, maps, features = PUBLISHED[name]
    model, levels = make(name).eval(), make(name, features_only=True).eval()  # of the same seed
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert model.num_features == model.head_hidden_size == features
    assert levels.feature_info.channels() == [channels for channels, _ in maps]
    assert levels.feature_info.reduction() == [32 // size for _, size in maps]
    config = timm.data.resolve_model_data_config(model)
    assert (config['input_size'], config['mean'], config['std'], config['crop_pct'], config['interpolation']) == (
        (3, 32, 32), (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761), 1.0, 'bicubic'
    )  # fmt: skip
    assert model.num_classes == 100 and timm.get_pretrained_cfg(name).pool_size == (maps[-1][1],) * 2
    with torch.no_grad():
        last, between = model.forward_intermediates(images())
        assert [(out.shape[1], out.shape[2]) for out in between] == maps
        for level, same in zip(levels(images()), between, strict=True):
            assert torch.equal(level, same)
        assert torch.equal(last, model.forward_features(images()))
        model.prune_intermediate_layers([1])
        (pruned,) = model.forward_intermediates(images(), [1], stop_early=True, intermediates_only=True)
        assert torch.equal(pruned, between[1])


@pytest.mark.parametrize('name', PUBLISHED)
def test_arguments_of_timm(name):
    model = make(name, num_classes=0, in_chans=1, global_pool='catavgmax', drop_rate=0.5)
    with torch.no_grad():
        assert model.eval()(images(16, channels=1)).shape == (2, 2 * PUBLISHED[name][2])  # 16x16 images too
        model.reset_classifier(7)
        assert model(images(channels=1)).shape == (2, 7)
        maps = model.train().forward_features(images(channels=1)).relu() + 1  # no zeros but those of the dropout
        assert (model.forward_head(maps, pre_logits=True) == 0).float().mean() > 0.3
    first, last = model.pretrained_cfg['first_conv'], model.pretrained_cfg['classifier']
    assert model.get_submodule(last) is model.get_classifier() and model.get_submodule(first).in_channels == 1
    groups = group_parameters(model, model.group_matcher(), reverse=True)  # layer decay follows depth
    assert set(groups) == {n for n, _ in model.named_parameters()}
    assert groups[f'{first}.weight'] == min(groups.values()) and groups[f'{last}.weight'] == max(groups.values())
    assert len(set(groups.values())) > len(PUBLISHED[name][1])
    if name != 'cifar_shufflenetv2':
        model = make(name, drop_path_rate=0.5)
        rates = [m.drop_prob for m in model.modules() if type(m).__name__ == 'DropPath']
        assert rates and max(rates) <= 0.5 and rates == sorted(rates)


@pytest.mark.parametrize('name', ['cifar_resnet20', 'cifar_wrn_16_2', 'cifar_shufflenetv2'])
def test_checkpointing_changes_no_gradient(name):
    gradients = []
    for enable in (False, True):
        model = make(name).train()
        model.set_grad_checkpointing(enable)
        model(images()).logsumexp(1).sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    torch.testing.assert_close(*gradients)
    assert gradients[0].abs().sum() > 0


def test_resnet18_is_timms_with_another_stem():
    ours, plain = make('cifar_resnet18').eval(), timm.create_model('resnet18', num_classes=100).eval()
    plain.conv1, plain.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
    plain.load_state_dict(ours.state_dict())  # the same names
    with torch.no_grad():
        assert torch.equal(ours(images()), plain(images()))


def test_shufflenet_is_torchvisions_with_another_stem():
    ours, plain = make('cifar_shufflenetv2').eval(), ShuffleNetV2([4, 8, 4], [24, 116, 232, 464, 1024], 100).eval()
    plain.conv1[0], plain.maxpool = nn.Conv2d(3, 24, 1, bias=False), nn.Identity()
    plain.load_state_dict(dict(zip(plain.state_dict(), ours.state_dict().values(), strict=True)))
    with torch.no_grad():
        torch.testing.assert_close(ours(images()), plain(images()))
