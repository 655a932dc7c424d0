"""timm models with stems for 32x32 images.

The networks of the CTC paper's CIFAR experiments, put together from timm's own nets: each keeps its parent's blocks,
head and interface, and only the stem is changed, so that a 32x32 image isn't shrunk to nothing. They are registered
like timm's own: `timm.create_model('cifar_resnet18', num_classes=10)`.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, TypeAlias

import torch
from timm.layers import create_classifier, create_conv2d, get_norm_act_layer
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._efficientnet_builder import decode_arch_def, efficientnet_init_weights
from timm.models._features import feature_take_indices
from timm.models.efficientnet import EfficientNet
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from timm.models.resnetv2 import ResNetV2
from torch import nn
from torchvision.models.shufflenetv2 import InvertedResidual

from . import catalog

__all__ = ['CifarResNet', 'CifarResNetV2', 'CifarMobileNetV2', 'CifarShuffleNetV2']

Indices: TypeAlias = 'int | list[int] | None'


def _stem(in_chs: int, out_chs: int, device: Any = None, dtype: Any = None, **_: Any) -> nn.Conv2d:
    """A 3x3 convolution that keeps the image's size, initialized as timm's ResNets initialize theirs."""
    conv = nn.Conv2d(in_chs, out_chs, 3, padding=1, bias=False, device=device, dtype=dtype)
    nn.init.kaiming_normal_(conv.weight, mode='fan_out', nonlinearity='relu')
    return conv


class _FullResolution:
    """Corrects what a timm ResNet states when its stem keeps the image's size and its stages may be three."""

    feature_info: list[dict[str, Any]]

    def _correct_reductions(self) -> None:
        """Take the factor 4 of the parent's stem out of the strides that the parent states."""
        for info in self.feature_info:
            info['reduction'] = max(info['reduction'] // 4, 1)

    # The parents of these two take five feature levels for granted.
    def forward_intermediates(self, x: torch.Tensor, indices: Indices = None, *args: Any, **kwargs: Any) -> Any:
        taken, _ = feature_take_indices(len(self.feature_info), indices)
        return super().forward_intermediates(x, taken, *args, **kwargs)  # type: ignore[misc]

    def prune_intermediate_layers(self, indices: Indices = 1, *args: Any, **kwargs: Any) -> list[int]:
        taken, _ = feature_take_indices(len(self.feature_info), indices)
        return super().prune_intermediate_layers(taken, *args, **kwargs)  # type: ignore[misc]


class CifarResNet(_FullResolution, ResNet):
    """timm's ResNet with one 3x3 convolution of stride 1 as its stem, and three or four stages.

    No block starts as an identity, as in the ResNets for CIFAR that are published.
    """

    def __init__(self, stem_chs: int = 64, in_chans: int = 3, zero_init_last: bool = False, **kwargs: Any) -> None:
        # The parent's width of a plain stem is fixed at 64; only its deep stem can be asked for another one.
        arguments = dict(kwargs, stem_type='deep', stem_width=stem_chs // 2, zero_init_last=zero_init_last)
        super().__init__(in_chans=in_chans, **arguments)
        self.conv1 = _stem(in_chans, stem_chs, **kwargs)  # type: ignore[assignment]
        self.maxpool = nn.Identity()  # type: ignore[assignment]
        if not hasattr(self, 'layer4'):
            self.layer4 = nn.Sequential()  # empty, not Identity: checkpointing iterates over it
        self._correct_reductions()


class CifarResNetV2(_FullResolution, ResNetV2):
    """timm's pre-activation ResNet with one 3x3 convolution of stride 1 as its stem: a wide ResNet."""

    def __init__(self, stem_chs: int = 16, in_chans: int = 3, **kwargs: Any) -> None:
        super().__init__(in_chans=in_chans, stem_chs=stem_chs, **kwargs)
        self.stem = nn.Sequential(OrderedDict(conv=_stem(in_chans, stem_chs, **kwargs)))
        self._correct_reductions()


class CifarMobileNetV2(EfficientNet):
    """MobileNetV2 of half width: timm's EfficientNet with its stem among the feature levels.

    The parent lists the last block before each stride; for 32x32 images the stem's output is wanted too.
    """

    def __init__(self, **kwargs: Any) -> None:
        blocks = [
            ['ir_r1_k3_s1_e1_c16'],  # ir, not timm's ds: the published first block has its 1x1 expansion
            ['ir_r2_k3_s1_e6_c24'],  # stride 1, not 2: the map is 16x16 already
            ['ir_r3_k3_s2_e6_c32'],
            ['ir_r4_k3_s2_e6_c64'],
            ['ir_r3_k3_s1_e6_c96'],
            ['ir_r3_k3_s2_e6_c160'],
            ['ir_r1_k3_s1_e6_c320'],
        ]
        # Halved exactly: timm's rounding to multiples of 8 would turn 12 into 16.
        sizes = dict(num_features=1280, stem_size=32, round_chs_fn=lambda channels: int(channels * 0.5))
        super().__init__(**{'block_args': decode_arch_def(blocks), **sizes, **kwargs})
        stem = dict(module='bn1', num_chs=self.conv_stem.out_channels, stage=0, reduction=2)
        self.feature_info = [stem, *self.feature_info]
        self.stage_ends = [0, *self.stage_ends]


class CifarShuffleNetV2(EfficientNet):
    """ShuffleNetV2 for 32x32 images: torchvision's blocks between EfficientNet's stem and head.

    timm has no ShuffleNet, but an EfficientNet has the same skeleton (stem, stages of blocks, 1x1 convolution, pooled
    linear head), so all of its methods serve; only what they run over is built here.
    """

    def __init__(
        self,
        num_classes: int = 100,
        in_chans: int = 3,
        drop_rate: float = 0.0,
        global_pool: str = 'avg',
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        nn.Module.__init__(self)  # not the parent's: it would build EfficientNet's blocks
        norm_act = get_norm_act_layer(nn.BatchNorm2d, nn.ReLU)
        self.num_classes, self.num_features, self.in_chans = num_classes, 1024, in_chans
        self.drop_rate, self.grad_checkpointing = drop_rate, False

        self.conv_stem = create_conv2d(in_chans, 24, 1)
        self.bn1 = norm_act(24, inplace=True)
        self.blocks = nn.Sequential()
        self.feature_info = [dict(module='bn1', num_chs=24, stage=0, reduction=1)]
        for i, (depth, before, after) in enumerate(((4, 24, 116), (8, 116, 232), (4, 232, 464))):
            first = InvertedResidual(before, after, stride=2)  # halves the map
            self.blocks.append(nn.Sequential(first, *(InvertedResidual(after, after, 1) for _ in range(depth - 1))))
            self.feature_info.append(dict(module=f'blocks.{i}', num_chs=after, stage=i + 1, reduction=2 ** (i + 1)))
        self.stage_ends = [info['stage'] for info in self.feature_info]

        self.conv_head = create_conv2d(464, self.num_features, 1)
        self.bn2 = norm_act(self.num_features, inplace=True)
        self.global_pool, self.classifier = create_classifier(self.num_features, num_classes, global_pool)
        self.head_hidden_size = self.num_features * self.global_pool.feat_mult()
        efficientnet_init_weights(self)
        self.to(device=device, dtype=dtype)  # torchvision's blocks don't take these two


def _wide(depth: int, width: int) -> dict[str, Any]:
    """A wide ResNet: three stages of (depth - 4) / 6 pre-activation blocks, `width` times as wide."""
    sizes = dict(layers=((depth - 4) // 6,) * 3, channels=(16 * width, 32 * width, 64 * width))
    return dict(**sizes, basic=True, bottle_ratio=1.0, norm_layer=nn.BatchNorm2d, conv_layer=create_conv2d)


# First and last layer, by which timm adapts weights to other channels and classes.
_ENDS = {CifarResNet: ('conv1', 'fc'), CifarResNetV2: ('stem.conv', 'head.fc')}
_RESNEXT = dict(block=Bottleneck, layers=(5, 5, 5), channels=(32, 64, 128), stem_chs=32, cardinality=16, base_width=4)
# By name: the class, the size of the last map, the number of feature levels, and arguments of the class.
_VARIANTS: dict[str, tuple[type[nn.Module], int, int, dict[str, Any]]] = {
    'cifar_resnet20': (CifarResNet, 8, 4, dict(block=BasicBlock, layers=(3, 3, 3), channels=(16, 32, 64), stem_chs=16)),
    'cifar_resnet18': (CifarResNet, 4, 5, dict(block=BasicBlock, layers=(2, 2, 2, 2))),
    'cifar_resnet34': (CifarResNet, 4, 5, dict(block=BasicBlock, layers=(3, 4, 6, 3))),
    'cifar_wrn_16_2': (CifarResNetV2, 8, 4, _wide(16, 2)),
    'cifar_wrn_28_4': (CifarResNetV2, 8, 4, _wide(28, 4)),
    'cifar_resnext32_16x4d': (CifarResNet, 8, 4, _RESNEXT),
    'cifar_mobilenetv2_050': (CifarMobileNetV2, 2, 5, {}),
    'cifar_shufflenetv2': (CifarShuffleNetV2, 4, 4, {}),
}


def _cfg(cls: type[nn.Module], pool_size: int) -> dict[str, Any]:
    """timm's config of a model: CIFAR-100's numbers, and names of its first and last layer."""
    first_conv, classifier = _ENDS.get(cls, ('conv_stem', 'classifier'))
    return dict(
        num_classes=100,
        input_size=(3, 32, 32),
        pool_size=(pool_size, pool_size),
        crop_pct=1.0,
        interpolation='bicubic',
        mean=(0.5071, 0.4867, 0.4408),
        std=(0.2675, 0.2565, 0.2761),
        first_conv=first_conv,
        classifier=classifier,
    )


def _make_entrypoint(variant: str, cls: type[nn.Module], levels: int, arguments: dict[str, Any]) -> Any:
    """Make the function that timm calls to build a variant; what the caller gives wins over its own arguments."""

    def entrypoint(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        feature_cfg = dict(out_indices=tuple(range(levels)), flatten_sequential=cls is not CifarResNet)
        return build_model_with_cfg(cls, variant, pretrained, feature_cfg=feature_cfg, **{**arguments, **kwargs})

    entrypoint.__name__ = entrypoint.__qualname__ = variant
    return entrypoint


default_cfgs = generate_default_cfgs({name: _cfg(cls, size) for name, (cls, size, _, _) in _VARIANTS.items()})
# Weights to compare CTC with have tags of their own, so that an untagged name keeps the input size of CIFAR.
for _entry in catalog.load(catalog.BASELINES).values():
    default_cfgs[_entry.architecture].tags.append(_entry.tag)
    default_cfgs[_entry.architecture].cfgs[_entry.tag] = _entry.to_timm()
for _name, (_cls, _, _levels, _arguments) in _VARIANTS.items():
    globals()[_name] = register_model(_make_entrypoint(_name, _cls, _levels, _arguments))
