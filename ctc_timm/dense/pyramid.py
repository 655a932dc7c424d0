"""A feature pyramid over any timm model, as detectors and segmentation heads take it.

timm's `FeatureGetterNet` goes around the loaded model, so that its weights keep their names, and torchvision's
`FeaturePyramidNetwork` on top.

Of feature levels of equal stride the deepest is taken, and of the strides from 2 on the four largest. A model of one
stride, as a plain vision transformer, gives four levels evenly spaced in depth, which are resampled by 4, 2, 1 and 1/2
(Li et al. 2021, Benchmarking Detection Transfer Learning with Vision Transformers). Strides count as the nearest power
of two, which torchvision's detectors take for granted; other maps, as of patches of 14 pixels, are interpolated to it.

B: batch. C: channels of the images. S: their side. D: channels of a map.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import Any

import timm
import torch
from timm.layers import LayerNorm2d
from timm.models import group_parameters
from timm.models._features import FeatureGetterNet
from timm.optim._param_groups import auto_group_layers
from torch import Tensor, nn
from torch.nn.functional import interpolate
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock

from ..models.backbones import architecture
from ..models.loading import LoadedModel, load_model, named_source
from ..models.settings import SourceSettings
from ..training.freezing import stage_tensors
from ..utils.errors import UserError, nearest, one_line
from ..utils.text import file_name
from .settings import BackboneSettings, CanvasSettings

LEVELS = 4
FACTORS = (4, 2, 1, 0.5)  # of a level's sides over those of the only stride's maps


class Pyramid(nn.Module):
    """A timm model's maps at several strides, brought to `out_channels`.

    The model is cut down to what the maps need, and becomes `body.model`, by torchvision's name for it. `extra` makes
    one more level or two from the deepest.

    Raises:
        UserError: The model gives no maps for such images.
    """

    def __init__(
        self, loaded: LoadedModel, img_size: int, out_channels: int = 256, extra: ExtraFPNBlock | None = None
    ) -> None:
        super().__init__()
        model = loaded.model
        self.name, self.weights, self.pretrained_cfg = architecture(model), loaded.weights, model.pretrained_cfg
        self.in_chans = getattr(model, 'in_chans', 3)
        self.out_channels = out_channels
        info = getattr(model, 'feature_info', None)
        if not info or not hasattr(model, 'forward_intermediates'):
            raise UserError(f"{self.name} offers no feature maps (timm's features_only); choose a model that does")
        indices, self.strides, resampled = _choose([2 ** round(math.log2(level['reduction'])) for level in info])
        self.body, self.channels = self._wrap(model, indices, img_size)
        self.resample: nn.ModuleList | None = None
        if resampled:
            self.channels = self.channels * (LEVELS // len(self.channels))
            self.resample = nn.ModuleList(map(_resampled, self.channels, FACTORS))
        self.fpn = FeaturePyramidNetwork(self.channels, out_channels, extra)
        self._frozen: set[str] = set()  # modules of the body

    def maps(self, images: Tensor) -> list[Tensor]:
        """The backbone's own maps of images [B, C, S, S]: [B, D, S / stride, S / stride] each, the finest first."""
        return list(self.body(images))

    def forward(self, images: Tensor) -> OrderedDict[str, Tensor]:
        """The levels for normalized images [B, C, S, S]: [B, out_channels, S / stride, S / stride] of '0', '1', ..."""
        maps = self.maps(images)
        if self.resample is not None:
            maps = [resize(level) for resize, level in zip(self.resample, maps * (LEVELS // len(maps)))]
        levels = OrderedDict()
        for i, (level, stride) in enumerate(zip(maps, self.strides)):
            size = [math.ceil(side / stride) for side in images.shape[-2:]]
            if list(level.shape[-2:]) != size:
                level = interpolate(level, size, mode='bilinear', align_corners=False)
            levels[str(i)] = level
        return self.fpn(levels)

    def normalization(self, canvas: CanvasSettings) -> tuple[list[float], list[float]]:
        """Channel means and standard deviations: those that are set, or the model's."""
        found: list[list[float]] = []
        for name, chosen in (('mean', canvas.mean), ('std', canvas.std)):
            values = [float(value) for value in chosen or self.pretrained_cfg[name]]
            if len(values) not in (1, self.in_chans):
                raise UserError(f'`{name}`: {len(values)} values for {self.in_chans} channels; give {self.in_chans}')
            found.append(values * (self.in_chans // len(values)))
        return found[0], found[1]

    def freeze(self, stages: int, norms: bool) -> None:
        """Freeze parts of the backbone: they take no gradient, and their batch norms keep their statistics.

        Args:
            stages: The first ones: 1 is the stem, 2 the first stage of blocks too, ...
            norms: All batch norms.
        """
        for name, module in self.body.named_modules() if norms else ():
            if isinstance(module, _BatchNorm):
                module.requires_grad_(False)
                self._frozen.add(name)
        parameters = dict(self.body.named_parameters())
        for tensor in stage_tensors(self.body.model, stages, f'`freeze_stages` {stages}') if stages else ():
            self._frozen.add(f'model.{tensor}'.rpartition('.')[0])
            if f'model.{tensor}' in parameters:
                parameters[f'model.{tensor}'].requires_grad_(False)
        self.train(self.training)

    def train(self, mode: bool = True) -> Pyramid:
        """Set training mode; what is frozen stays in evaluation mode."""
        super().train(mode)
        for name in self._frozen:
            self.body.get_submodule(name).eval()
        return self

    def assign_layers(self, module: nn.Module) -> None:
        """Give a module that holds the pyramid the methods by which timm's optimizer factory groups layers.

        The backbone's are grouped as in the plain model; all others are one group with the full learning rate.
        """
        model: Any = self.body.model
        prefix = next(name for name, part in module.named_modules() if part is model) + '.'
        if hasattr(model, 'group_matcher'):
            layers = group_parameters(model, model.group_matcher(coarse=False), reverse=True)
        else:
            layers = auto_group_layers(model)
        last = max(layers.values()) + 1
        undecayed = {prefix + name for name in getattr(model, 'no_weight_decay', set)()}
        grouped: Any = module
        grouped.group_matcher = lambda coarse=False: lambda name: layers.get(name.removeprefix(prefix), last)
        grouped.no_weight_decay = lambda: undecayed

    @torch.no_grad()
    def _wrap(self, model: Any, indices: list[int], img_size: int) -> tuple[FeatureGetterNet, list[int]]:
        """timm's wrapper, and the channels of its maps, found with a blank image."""
        try:
            if hasattr(model, 'set_input_size'):
                model.set_input_size(img_size=(img_size, img_size))
            body = FeatureGetterNet(model, out_indices=tuple(indices)).eval()
            maps = list(body(torch.zeros(1, self.in_chans, img_size, img_size)))
        except Exception as error:  # of any model of any family
            size = self.pretrained_cfg['input_size'][-1]
            raise UserError(
                f'`img_size` {img_size}: {self.name}, which is for {size}, gives no feature maps: {one_line(error)}'
            ) from None
        shapes = [tuple(level.shape[1:]) for level in maps]
        sides = [shape[1:] for shape in shapes]
        if any(len(shape) != 3 or min(shape) < 1 for shape in shapes) or sides != sorted(sides, reverse=True):
            raise UserError(
                f'{self.name}: gives no pyramid of feature maps at `img_size` {img_size}, but {shapes}; choose larger '
                f'images, a convolutional network or a vision transformer'
            )
        return body.train(), [level.shape[1] for level in maps]


def open_pyramid(
    source: SourceSettings,
    backbone: BackboneSettings,
    img_size: int,
    extra: ExtraFPNBlock | None = None,
    **options: Any,
) -> Pyramid:
    """Make the pyramid over a model from wherever its weights are, frozen as the settings say.

    See `Pyramid` for `extra`; `options` are for `timm.create_model`.
    """
    named = named_source(source)
    name = named['source']
    if not backbone.from_scratch:
        loaded = load_model(**named, head=False, **options)
    elif name != source.model or not timm.is_model(name):
        raise UserError(
            f'`from_scratch`: needs `model` with a timm name, got {name}{nearest(name, timm.list_models())}'
        )
    else:
        try:
            loaded = LoadedModel(timm.create_model(name, **options), file_name(name), 'random')
        except Exception as error:  # of any model of any family
            raise UserError(f'`model` {name}: {one_line(error)}') from None
    pyramid = Pyramid(loaded, img_size, backbone.fpn_channels, extra)
    pyramid.freeze(backbone.freeze_stages, backbone.freeze_bn)
    return pyramid


def _choose(reductions: list[int]) -> tuple[list[int], list[int], bool]:
    """Which maps to take of those with these strides, the strides of the levels, and whether maps are resampled."""
    deepest = {stride: index for index, stride in enumerate(reductions)}
    if len(deepest) == 1:
        depth, stride = len(reductions), reductions[0]
        indices = [(depth * (i + 1)) // LEVELS - 1 for i in range(LEVELS)] if depth >= LEVELS else [depth - 1]
        return indices, [max(1, int(stride / factor)) for factor in FACTORS], True
    strides = sorted(stride for stride in deepest if stride >= 2)[-LEVELS:]
    return [deepest[stride] for stride in strides], strides, False


def _resampled(channels: int, factor: float) -> nn.Module:
    """A map's change of size: transposed convolutions up, a maximum down, nothing."""
    up = [nn.ConvTranspose2d(channels, channels, 2, 2) for _ in range({4: 2, 2: 1}.get(int(factor), 0))]
    if factor == 4:
        return nn.Sequential(up[0], LayerNorm2d(channels), nn.GELU(), up[1])
    return up[0] if up else nn.Identity() if factor == 1 else nn.MaxPool2d(2, ceil_mode=True)
