"""Pyramids over plain timm models: the maps are the model's own, wherever weights come from; what freezing keeps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.optim import param_groups_layer_decay
from torch import Tensor, nn
from torchvision.ops import FeaturePyramidNetwork

import ctc_timm  # noqa: F401  (registers the models)
from ctc_timm.dense.pyramid import Pyramid, open_pyramid
from ctc_timm.dense.settings import BackboneSettings, CanvasSettings
from ctc_timm.models.settings import SourceSettings
from ctc_timm.runs import Run
from ctc_timm.utils.errors import UserError

_RESNET = [('layer1', 4), ('layer2', 8), ('layer3', 16), ('layer4', 32)]
# What is asked of the plain model by a hook: module, stride.
HOOKED = [
    ('test_resnet', _RESNET),
    ('resnet18_ctc', _RESNET),
    ('test_convnext', [('stages.0', 4), ('stages.1', 8), ('stages.2', 16), ('stages.3', 32)]),
    ('cifar_resnet18', [('layer2', 2), ('layer3', 4), ('layer4', 8)]),
    ('cifar_resnet20', [('layer2', 2), ('layer3', 4)]),
    ('cifar_shufflenetv2', [('blocks.0', 2), ('blocks.1', 4), ('blocks.2', 8)]),
]


def scratch(name: str, size: int = 64, freeze_stages: int = 0, freeze_bn: bool = False, **options: Any) -> Pyramid:
    """With random weights."""
    backbone = BackboneSettings(True, 8, freeze_stages, freeze_bn)
    return open_pyramid(SourceSettings(model=name), backbone, size, **options)


def loaded(source: str, **options: Any) -> Pyramid:
    settings = SourceSettings(source=source, model=options.pop('model', ''))
    return open_pyramid(settings, BackboneSettings(fpn_channels=8), 64, **options).eval()


def stirred(model: nn.Module) -> nn.Module:
    """With statistics and scales that are not those of a fresh model."""
    generator = torch.Generator().manual_seed(3)
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            noise = torch.rand(tensor.shape, generator=generator)
            tensor.copy_(noise + 0.5 if name.endswith('running_var') else tensor + 0.1 * noise)
    return model


@pytest.mark.parametrize('name,levels', HOOKED, ids=[name for name, _ in HOOKED])
def test_maps_are_the_plain_models(name: str, levels: list[tuple[str, int]], tmp_path: Path) -> None:
    """From a weights file, against hooks in the model that was saved; the top is torchvision's own network."""
    plain = stirred(timm.create_model(name, num_classes=5))
    Run(tmp_path).save_weights('some', plain, {'num_classes': 5})
    pyramid = loaded(str(tmp_path / 'some.safetensors'), model=name, num_classes=5)
    images = torch.randn(2, 3, 64, 64)
    seen: dict[str, Tensor] = {}
    for module, _ in levels:
        hook: Any = lambda m, x, y, module=module: seen.update({module: y.clone()})  # noqa: E731
        plain.get_submodule(module).register_forward_hook(hook)
    top = FeaturePyramidNetwork(pyramid.channels, 8)
    top.load_state_dict(pyramid.fpn.state_dict())
    with torch.no_grad():
        plain.eval()(images)
        maps, levelled = pyramid.maps(images), pyramid(images)
        expected = top({str(i): level for i, level in enumerate(maps)})
    assert pyramid.strides == [stride for _, stride in levels]
    assert [tuple(m.shape[-2:]) for m in maps] == [(64 // stride,) * 2 for _, stride in levels]
    assert all(torch.equal(level, seen[module]) for level, (module, _) in zip(maps, levels, strict=True))
    assert all(torch.equal(level, expected[key]) for key, level in levelled.items())


def test_weights_from_a_run_a_file_and_a_folder(tmp_path: Path) -> None:
    """The same maps, those of timm's own features_only."""
    run = Run(tmp_path / 'run')
    run.path.mkdir()
    plain = stirred(timm.create_model('test_resnet', num_classes=7)).eval()
    run.write_config(plain, {}, {})
    run.save_weights('best', plain, {'architecture': 'test_resnet', 'num_classes': 7})
    images = torch.randn(1, 3, 64, 64)
    features = timm.create_model('test_resnet', features_only=True, out_indices=(1, 2, 3, 4)).eval()
    features.load_state_dict({k: v for k, v in plain.state_dict().items() if k in features.state_dict()})
    with torch.no_grad():
        expected = features(images)
        for source in (str(run), str(run.best_weights), f'local-dir:{run}'):
            maps = loaded(source).maps(images)
            assert all(torch.equal(level, known) for level, known in zip(maps, expected, strict=True))


TRANSFORMERS: list[tuple[str, int, dict[str, Any], list[int], list[int]]] = [
    ('vit_tiny_patch16_224', 64, {'depth': 8, 'embed_dim': 32, 'num_heads': 2}, [1, 3, 5, 7], [16, 8, 4, 2]),
    ('eva02_tiny_patch14_224', 112, {'depth': 4}, [0, 1, 2, 3], [28, 14, 7, 4]),
]


@pytest.mark.parametrize('name,size,options,blocks,sides', TRANSFORMERS, ids=['patch16', 'patch14'])
def test_a_vision_transformer_is_resampled(
    name: str, size: int, options: dict[str, Any], blocks: list[int], sides: list[int]
) -> None:
    """Maps of blocks evenly spaced in depth, brought to the powers of two that torchvision's detectors need."""
    plain = timm.create_model(name, img_size=size, **options).eval()
    pyramid = scratch(name, size, **options).eval()
    plain.load_state_dict(pyramid.body.model.state_dict(), strict=False)
    images = torch.randn(1, 3, size, size)
    with torch.no_grad():
        _, expected = plain.forward_intermediates(images, indices=blocks, output_fmt='NCHW')
        maps, levels = pyramid.maps(images), pyramid(images)
    for level, known in zip(maps, expected, strict=True):
        torch.testing.assert_close(level, known)
    assert [level.shape[-1] for level in levels.values()] == sides and pyramid.strides == [4, 8, 16, 32]


FROZEN = [
    ({'freeze_stages': 2}, lambda name, norms: name.startswith(('conv1', 'bn1', 'layer1'))),
    ({'freeze_bn': True}, lambda name, norms: name.startswith(norms)),
]


@pytest.mark.parametrize('settings,kept', FROZEN, ids=['stages', 'norms'])
def test_what_is_frozen_stays_bit_for_bit(settings: dict[str, Any], kept: Any) -> None:
    """After a step of training, statistics of batch norms too; all else moves."""
    torch.manual_seed(0)
    pyramid = scratch('test_resnet', **settings)
    model = stirred(pyramid.body.model)
    norms = tuple(f'{name}.' for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in pyramid.parameters() if p.requires_grad], lr=0.1)
    pyramid.train()
    torch.stack([level.square().mean() for level in pyramid(torch.randn(2, 3, 64, 64)).values()]).sum().backward()
    optimizer.step()
    same = {name for name, value in model.state_dict().items() if torch.equal(value, before[name])}
    assert same == {name for name in before if kept(name, norms)}


def test_layer_wise_rates_are_those_of_the_plain_model() -> None:
    """Ratios between the backbone's layers as timm has them for the classifier; new parts have the full rate."""

    def rates(module: nn.Module) -> dict[str, float]:
        names = {parameter: name for name, parameter in module.named_parameters()}
        groups = param_groups_layer_decay(module, layer_decay=0.5)
        return {names[parameter]: group['lr_scale'] for group in groups for parameter in group['params']}

    known = rates(timm.create_model('test_resnet', num_classes=3))
    pyramid = scratch('test_resnet')
    module = nn.ModuleDict({'pyramid': pyramid, 'head': nn.Conv2d(8, 1, 1)})
    pyramid.assign_layers(module)
    prefix, found = 'pyramid.body.model.', rates(module)
    ratio = found[f'{prefix}conv1.0.weight'] / known['conv1.0.weight']
    assert {n.removeprefix(prefix): scale for n, scale in found.items() if n.startswith(prefix)} == {
        name: scale * ratio for name, scale in known.items() if not name.startswith('fc')
    }
    assert {scale for name, scale in found.items() if not name.startswith(prefix)} == {1.0}
    assert max(scale for name, scale in found.items() if name.startswith(prefix)) < 1


MISTAKES = [
    (dict(name='test_resnett'), '`from_scratch`: needs `model` with a timm name, got test_resnett; nearest: test_res'),
    (dict(name='mixer_s32_224'), '`img_size` 64: mixer_s32_224, which is for 224, gives no feature maps: '),
    (dict(name='test_vit', output_stride=8), '`model` test_vit: .*output_stride'),
    (dict(name='test_resnet', freeze_stages=9), '`freeze_stages` 9: test_resnet has 5 stages, stem included'),
]


@pytest.mark.parametrize('words,message', MISTAKES)
def test_mistakes(words: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        scratch(**words)


def test_normalization() -> None:
    """The model's own, or what is set, once or for each channel."""
    pyramid = scratch('test_resnet')
    assert pyramid.normalization(CanvasSettings()) == tuple(
        list(pyramid.pretrained_cfg[key]) for key in ('mean', 'std')
    )
    assert pyramid.normalization(CanvasSettings(mean=(0.1,), std=(1, 2, 3))) == ([0.1] * 3, [1, 2, 3])
    with pytest.raises(UserError, match='`mean`: 2 values for 3 channels; give 3'):
        pyramid.normalization(CanvasSettings(mean=(0.1, 0.2)))
