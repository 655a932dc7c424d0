"""Pyramids over plain timm models: the maps are the model's own, wherever weights come from; what freezing keeps."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from timm.optim import param_groups_layer_decay
from torch import Tensor, nn
from torchvision.ops import FeaturePyramidNetwork

import ctc_timm  # noqa: F401  (registers the models)
from ctc_timm.dense.pyramid import Pyramid, create_pyramid, tell_layers
from ctc_timm.runs import Run
from ctc_timm.utils.errors import UserError

# What is asked of the plain model by a hook: module, stride.
HOOKED = [
    ('test_resnet', [('layer1', 4), ('layer2', 8), ('layer3', 16), ('layer4', 32)]),
    ('resnet18_ctc', [('layer1', 4), ('layer2', 8), ('layer3', 16), ('layer4', 32)]),
    ('test_convnext', [('stages.0', 4), ('stages.1', 8), ('stages.2', 16), ('stages.3', 32)]),
    ('cifar_resnet18', [('layer2', 2), ('layer3', 4), ('layer4', 8)]),
    ('cifar_resnet20', [('layer2', 2), ('layer3', 4)]),
    ('cifar_shufflenetv2', [('blocks.0', 2), ('blocks.1', 4), ('blocks.2', 8)]),
]


def hooked(model: nn.Module, names: list[str], images: Tensor) -> list[Tensor]:
    """What modules of a plain model give in its own forward."""
    seen: dict[str, Tensor] = {}
    for name in names:
        model.get_submodule(name).register_forward_hook(lambda m, x, y, name=name: seen.update({name: y.clone()}))
    with torch.no_grad():
        model.eval()(images)
    return [seen[name] for name in names]


def stirred(model: nn.Module) -> nn.Module:
    """With statistics and scales that are not those of a fresh model."""
    generator = torch.Generator().manual_seed(3)
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            noise = torch.rand(tensor.shape, generator=generator)
            tensor.copy_(noise + 0.5 if name.endswith('running_var') else tensor + 0.1 * noise)
    return model


@pytest.fixture(scope='module')
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, nn.Module]:
    """A run's folder with weights of test_resnet, and the model."""
    torch.manual_seed(0)
    model = stirred(timm.create_model('test_resnet', num_classes=7))
    folder = Run(tmp_path_factory.mktemp('runs') / 'one')
    folder.path.mkdir()
    folder.write_config(model, {})
    folder.save_weights('best', model, {'architecture': 'test_resnet', 'num_classes': 7})
    return folder.path, model.eval()


@pytest.mark.parametrize('name,levels', HOOKED, ids=[name for name, _ in HOOKED])
def test_maps_are_the_plain_models(name: str, levels: list[tuple[str, int]], tmp_path: Path) -> None:
    """From a weights file, against hooks in a model that timm loads from the same file."""
    plain = stirred(timm.create_model(name, num_classes=5))
    folder = Run(tmp_path)
    folder.save_weights('some', plain, {'num_classes': 5})
    torch.manual_seed(1)
    pyramid = create_pyramid(str(tmp_path / 'some.safetensors'), 64, model=name, out_channels=8, num_classes=5).eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        maps, levelled = pyramid.maps(images), pyramid(images)
    expected = hooked(plain, [module for module, _ in levels], images)
    assert pyramid.strides == [stride for _, stride in levels]
    assert [tuple(m.shape[-2:]) for m in maps] == [(64 // stride,) * 2 for _, stride in levels]
    for given, known in zip(maps, expected, strict=True):
        torch.testing.assert_close(given, known)
    assert list(levelled) == [str(i) for i in range(len(levels))]
    assert {level.shape[1] for level in levelled.values()} == {8}


def test_all_ways_to_a_runs_weights_are_one(run: tuple[Path, nn.Module]) -> None:
    """Folder, file and timm's local-dir: give the same maps, those of timm's own features_only."""
    folder, plain = run
    images = torch.randn(1, 3, 64, 64)
    own = timm.create_model('test_resnet', features_only=True, out_indices=(1, 2, 3, 4)).eval()
    own.load_state_dict({k: v for k, v in plain.state_dict().items() if k in own.state_dict()})
    with torch.no_grad():
        expected = own(images)
        for source in (str(folder), str(folder / 'best.safetensors'), f'local-dir:{folder}'):
            maps = create_pyramid(source, 64, out_channels=8).eval().maps(images)
            for given, known in zip(maps, expected, strict=True):
                assert torch.equal(given, known)


def test_a_vision_transformer_is_resampled() -> None:
    """Four blocks evenly spaced in depth, brought to strides 4 to 32; the maps are forward_intermediates' own."""
    plain = timm.create_model('vit_tiny_patch16_224', depth=8, embed_dim=32, num_heads=2, img_size=64).eval()
    torch.manual_seed(0)
    options = {'depth': 8, 'embed_dim': 32, 'num_heads': 2}
    pyramid = create_pyramid('vit_tiny_patch16_224', 64, from_scratch=True, out_channels=8, **options).eval()
    plain.load_state_dict(pyramid.body.model.state_dict(), strict=False)
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        _, expected = plain.forward_intermediates(images, indices=[1, 3, 5, 7], output_fmt='NCHW')
        maps, levels = pyramid.maps(images), pyramid(images)
    for given, known in zip(maps, expected, strict=True):
        torch.testing.assert_close(given, known)
    assert [level.shape[-1] for level in levels.values()] == [16, 8, 4, 2]
    assert pyramid.strides == [4, 8, 16, 32]


def test_patches_of_14_pixels_are_brought_to_powers_of_two() -> None:
    """Detectors of torchvision take strides for powers of two: levels of 112 pixels have 28, 14, 7 and 4 a side."""
    pyramid = create_pyramid('eva02_tiny_patch14_224', 112, from_scratch=True, out_channels=8, depth=4).eval()
    with torch.no_grad():
        assert pyramid.maps(torch.zeros(1, 3, 112, 112))[0].shape[-1] == 8
        assert [level.shape[-1] for level in pyramid(torch.zeros(1, 3, 112, 112)).values()] == [28, 14, 7, 4]
    assert pyramid.strides == [4, 8, 16, 32]


def test_the_top_is_torchvisions() -> None:
    """Its own network, given the body's maps, gives the same levels."""
    pyramid = create_pyramid('test_resnet', 64, from_scratch=True, out_channels=8).eval()
    top = FeaturePyramidNetwork(pyramid.channels, 8)
    top.load_state_dict(pyramid.fpn.state_dict())
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = top({str(i): m for i, m in enumerate(pyramid.maps(images))})
        for name, level in pyramid(images).items():
            assert torch.equal(level, expected[name])


def stepped(pyramid: Pyramid) -> set[str]:
    """Names of the body's tensors that a step of training leaves bit for bit as they were."""
    model = pyramid.body.model
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in pyramid.parameters() if p.requires_grad], lr=0.1)
    pyramid.train()
    torch.stack([level.square().mean() for level in pyramid(torch.randn(2, 3, 64, 64)).values()]).sum().backward()
    optimizer.step()
    return {name for name, value in model.state_dict().items() if torch.equal(value, before[name])}


@pytest.fixture
def pyramid() -> Pyramid:
    """Over a model all of whose parameters get a gradient."""
    torch.manual_seed(0)
    made = create_pyramid('test_resnet', 64, from_scratch=True, out_channels=8)
    stirred(made.body.model)
    return made


def test_frozen_stages_stay_bit_for_bit(pyramid: Pyramid) -> None:
    """Stem and first stage after a step of training, statistics of batch norms too; all else moves."""
    pyramid.freeze_stages(2)
    assert stepped(pyramid) == {n for n in pyramid.body.model.state_dict() if n.startswith(('conv1', 'bn1', 'layer1'))}


def test_frozen_norms_stay_and_their_convolutions_train(pyramid: Pyramid) -> None:
    """All of the body's batch norms, and nothing but them."""
    norms = tuple(f'{name}.' for name, m in pyramid.body.model.named_modules() if isinstance(m, nn.BatchNorm2d))
    pyramid.freeze_norms()
    assert stepped(pyramid) == {name for name in pyramid.body.model.state_dict() if name.startswith(norms)}


def test_a_frozen_body_stays(pyramid: Pyramid) -> None:
    pyramid.freeze()
    assert stepped(pyramid) == set(pyramid.body.model.state_dict())


def test_layer_wise_rates_are_those_of_the_plain_model() -> None:
    """Ratios between the body's layers as timm has them for the classifier; new parts have the full rate."""
    plain = timm.create_model('test_resnet', num_classes=3)
    known: dict[str, float] = {}
    for group in param_groups_layer_decay(plain, layer_decay=0.5):
        for parameter in group['params']:
            name = next(n for n, p in plain.named_parameters() if p is parameter)
            known[name] = group['lr_scale']
    pyramid = create_pyramid('test_resnet', 64, from_scratch=True, out_channels=8)
    module = nn.ModuleDict({'pyramid': pyramid, 'head': nn.Conv2d(8, 1, 1)})
    tell_layers(module, pyramid)
    found: dict[str, float] = {}
    for group in param_groups_layer_decay(module, layer_decay=0.5):
        for parameter in group['params']:
            found[next(n for n, p in module.named_parameters() if p is parameter)] = group['lr_scale']
    prefix = 'pyramid.body.model.'
    ratio = found[prefix + 'conv1.0.weight'] / known['conv1.0.weight']
    body = {name: scale for name, scale in known.items() if not name.startswith('fc')}
    assert {n.removeprefix(prefix): s for n, s in found.items() if n.startswith(prefix)} == {
        name: scale * ratio for name, scale in body.items()
    }
    assert {scale for name, scale in found.items() if not name.startswith(prefix)} == {1.0}
    assert max(s for n, s in found.items() if n.startswith(prefix)) < 1


@pytest.mark.parametrize(
    'words,message',
    [
        (dict(source='test_resnett', from_scratch=True), 'takes a timm name; nearest: test_resnet'),
        (dict(source='nowhere/best.safetensors'), 'no such file'),
        (
            dict(source='mixer_s32_224', from_scratch=True),
            '--img-size 64: mixer_s32_224 cannot take it: .*; its own is 224',
        ),
    ],
)
def test_mistakes(words: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        create_pyramid(img_size=64, **words)  # type: ignore[arg-type]


def test_too_many_stages(pyramid: Pyramid) -> None:
    with pytest.raises(UserError, match='--freeze-stages 9: test_resnet has 5 stages, stem included'):
        pyramid.freeze_stages(9)
