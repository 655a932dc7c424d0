"""A feature pyramid over any timm model: what detectors and segmentation heads stand on.

timm's `FeatureGetterNet`, the wrapper behind `features_only=True, feature_cls='getter'`, goes around the loaded model
itself, so that its weights keep their names and are those that were loaded. torchvision's `FeaturePyramidNetwork` goes
on top.

Of feature levels of equal stride the deepest is taken, and of the strides from 2 on the four largest. A model whose
maps all have one stride, as a plain vision transformer's, gives four levels evenly spaced in depth, which are
resampled by 4, 2, 1 and 1/2 (Li et al. 2021, Benchmarking Detection Transfer Learning with Vision Transformers).
Strides count as the nearest power of two, which torchvision's detectors take for granted, and maps of another size, as
of patches of 14 pixels, are interpolated to that of their stride.

B: batch. S: side of the images. D: channels of a map.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import timm
import torch
from timm.layers import LayerNorm2d
from timm.models import group_parameters
from timm.models._features import FeatureGetterNet
from timm.models._manipulate import group_with_matcher
from timm.optim._param_groups import auto_group_layers
from torch import Tensor, nn
from torch.nn.functional import interpolate
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock

from ..models.backbones import architecture
from ..models.loading import LoadedModel, load_model
from ..utils.errors import UserError, nearest, one_line
from ..utils.text import file_name

LEVELS = 4
FACTORS = (4, 2, 1, 0.5)  # of a level's sides over those of the only stride's maps


class Pyramid(nn.Module):
    """A timm model's maps at several strides, brought to one number of channels.

    torchvision's detectors take it as their backbone.

    Args:
        loaded: The model, as loaded; it is cut down to what the maps need.
        img_size: S.
        out_channels: Of every level.
        extra: One more level or two from the deepest, as torchvision's detectors have them.
        what: What to call the model in error messages.

    Attributes:
        body: timm's wrapper; `body.model` is the model, with the names of its weights as they were.
        strides: Of the levels, without the extra ones.
        channels: Of the body's maps.
        out_channels: Of the levels.

    Raises:
        UserError: The model gives no maps for such images.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        img_size: int,
        out_channels: int = 256,
        extra: ExtraFPNBlock | None = None,
        what: str = '--model',
    ) -> None:
        super().__init__()
        model = loaded.model
        self.name, self.weights = architecture(model), loaded.weights
        self._what = f'{what}: {self.name}'
        self.pretrained_cfg = model.pretrained_cfg
        self.in_chans = getattr(model, 'in_chans', 3)
        reductions = _reductions(model, self._what)
        indices, self.strides = _choose(reductions)
        if hasattr(model, 'set_input_size'):
            try:
                model.set_input_size(img_size=(img_size, img_size))
            except (AssertionError, ValueError, RuntimeError) as error:
                raise UserError(f'--img-size {img_size}: {self.name} cannot take it: {one_line(error)}') from None
        self.body = _wrapped(model, indices, self._what)
        self.channels = self._look(img_size)
        self.resample: nn.ModuleList | None = None
        if len(set(reductions)) == 1:
            self.channels = self.channels * LEVELS if len(self.channels) == 1 else self.channels
            self.resample = nn.ModuleList(map(_resampled, self.channels, FACTORS))
        self.fpn = FeaturePyramidNetwork(self.channels, out_channels, extra)
        self.out_channels = out_channels
        self._kept: list[nn.Module] = []

    def maps(self, images: Tensor) -> list[Tensor]:
        """The body's own maps.

        Args:
            images: [B, channels, S, S].

        Returns:
            [B, D, S / stride, S / stride] each, the finest first; before resampling.
        """
        return list(self.body(images))

    def forward(self, images: Tensor) -> OrderedDict[str, Tensor]:
        """The levels, by '0' for the finest, '1', ..., and the extra ones by torchvision's names for them.

        Args:
            images: [B, channels, S, S], normalized.

        Returns:
            [B, out_channels, S / stride, S / stride] each.
        """
        maps = self.maps(images)
        if self.resample is not None:
            maps = maps * LEVELS if len(maps) == 1 else maps
            maps = [change(level) for change, level in zip(self.resample, maps)]
        levels = OrderedDict()
        for i, (level, stride) in enumerate(zip(maps, self.strides)):
            size = [math.ceil(side / stride) for side in images.shape[-2:]]
            if list(level.shape[-2:]) != size:
                level = interpolate(level, size, mode='bilinear', align_corners=False)
            levels[str(i)] = level
        return self.fpn(levels)

    def freeze_stages(self, stages: int) -> None:
        """Keep the first stages of the body as they are: 1 is the stem, 2 the first stage of blocks too, ...

        Their parameters take no gradient, their batch norms keep their statistics.

        Raises:
            UserError: timm does not say what the stages are, or there are not so many.
        """
        if not stages:
            return
        model: Any = self.body.model
        names = [name for name, _ in [*model.named_parameters(), *model.named_buffers()]]
        try:
            groups = group_with_matcher(((name, None) for name in names), model.group_matcher(coarse=True))
        except (AttributeError, AssertionError):
            raise UserError(f'--freeze-stages {stages}: timm does not say what the stages of {self.name} are') from None
        known = {name for name, _ in model.named_parameters()}
        staged = [group for group in groups.values() if known.intersection(group)]
        if stages > len(staged):
            raise UserError(f'--freeze-stages {stages}: {self.name} has {len(staged)} stages, stem included')
        frozen = {name for group in staged[:stages] for name in group}
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(parameter.requires_grad and name not in frozen)
        self._keep(name for name in frozen)

    def freeze_norms(self) -> None:
        """Keep the body's batch norms as they are, statistics and scales."""
        for module in self.body.modules():
            if isinstance(module, _BatchNorm):
                self._kept.append(module.eval())
                for parameter in module.parameters():
                    parameter.requires_grad_(False)

    def freeze(self) -> None:
        """Keep the whole body as it is."""
        self.body.requires_grad_(False)
        self._kept.append(self.body.eval())

    def train(self, mode: bool = True) -> Pyramid:
        """Set training mode; what is frozen stays in evaluation mode."""
        super().train(mode)
        for module in self._kept:
            module.eval()
        return self

    def _keep(self, names: Any) -> None:
        """Keep modules in evaluation mode by the names of tensors in them."""
        model: Any = self.body.model
        owners = {name.rpartition('.')[0] for name in names}
        self._kept += [model.get_submodule(owner).eval() for owner in sorted(owners) if owner]

    @torch.no_grad()
    def _look(self, img_size: int) -> list[int]:
        """Show the body a blank image; the channels of its maps."""
        self.body.eval()
        try:
            maps = self.maps(torch.zeros(1, self.in_chans, img_size, img_size))
        except Exception as error:  # of any model of any family
            own = self.pretrained_cfg['input_size'][-1]
            raise UserError(
                f'--img-size {img_size}: {self.name} cannot take it: {one_line(error)}; its own is {own}'
            ) from None
        finally:
            self.body.train()
        sides = [tuple(level.shape[-2:]) for level in maps]
        if any(level.ndim != 4 for level in maps) or sides != sorted(sides, reverse=True):
            raise UserError(
                f'{self._what} gives no pyramid of feature maps, but {[tuple(level.shape[1:]) for level in maps]}; '
                f'choose a convolutional network or a vision transformer'
            )
        if min(sides[-1]) < 1:
            raise UserError(f'--img-size {img_size}: too small for {self.name}')
        return [level.shape[1] for level in maps]


def create_pyramid(
    source: str,
    img_size: int,
    *,
    model: str = '',
    flag: str = '--model',
    from_scratch: bool = False,
    out_channels: int = 256,
    extra: ExtraFPNBlock | None = None,
    **options: Any,
) -> Pyramid:
    """A pyramid over a model from wherever its weights are.

    Args:
        source: A run's folder, a weights file, any timm name, `hf-hub:REPO` or `local-dir:FOLDER`.
        img_size: S.
        model: Architecture of a weights file that does not say it.
        flag: What to call the source in error messages.
        from_scratch: Random weights for a timm name.
        out_channels: Of every level.
        extra: See `Pyramid`.
        **options: For `timm.create_model`.

    Raises:
        UserError: Nothing there, or a model without a pyramid.
    """
    if from_scratch:
        options = {k: v for k, v in options.items() if v is not None}
        if not timm.is_model(source):
            near = nearest(source, timm.list_models())
            raise UserError(f'{flag} {source}: --from-scratch takes a timm name{near}')
        try:
            loaded = LoadedModel(timm.create_model(source, **options), file_name(source), 'random', None, {})
        except Exception as error:
            raise UserError(f'{flag} {source}: {one_line(error)}') from None
    else:
        loaded = load_model(source, model, flag, **options)
    return Pyramid(loaded, img_size, out_channels, extra, flag)


def tell_layers(module: nn.Module, pyramid: Pyramid) -> None:
    """Give a module the body's layers, by the methods that timm's optimizer factory asks a model for.

    The body's parameters are grouped as timm groups those of the plain model; all others, which are new, are one
    group after them, with the full learning rate.

    Args:
        module: Holds the pyramid somewhere.
        pyramid: The pyramid.
    """
    body: Any = pyramid.body.model
    prefix = next(name for name, part in module.named_modules() if part is body) + '.'
    if hasattr(body, 'group_matcher'):
        layers = group_parameters(body, body.group_matcher(coarse=False), reverse=True)
    else:
        layers = auto_group_layers(body)
    last = max(layers.values()) + 1
    undecayed = {prefix + name for name in getattr(body, 'no_weight_decay', set)()}
    told: Any = module
    told.group_matcher = lambda coarse=False: lambda name: layers.get(name.removeprefix(prefix), last)
    told.no_weight_decay = lambda: undecayed


def _reductions(model: Any, what: str) -> list[int]:
    """The stride of each of a model's feature levels, as the nearest power of two."""
    info = getattr(model, 'feature_info', None)
    if not info or not hasattr(model, 'forward_intermediates'):
        raise UserError(f"{what} offers no feature maps (timm's features_only); choose a model that does")
    return [2 ** round(math.log2(level['reduction'])) for level in info]


def _choose(reductions: Sequence[int]) -> tuple[list[int], list[int]]:
    """Which levels to take, and the strides that the pyramid's levels have."""
    deepest = {stride: index for index, stride in enumerate(reductions)}
    if len(deepest) == 1:
        depth, stride = len(reductions), reductions[0]
        indices = [(depth * (i + 1)) // LEVELS - 1 for i in range(LEVELS)] if depth >= LEVELS else [depth - 1]
        return indices, [max(1, int(stride / factor)) for factor in FACTORS]
    strides = sorted(stride for stride in deepest if stride >= 2)[-LEVELS:]
    return [deepest[stride] for stride in strides], strides


def _wrapped(model: Any, indices: list[int], what: str) -> FeatureGetterNet:
    try:
        return FeatureGetterNet(model, out_indices=tuple(indices))
    except Exception as error:  # of any model of any family
        raise UserError(f'{what} offers no feature maps: {one_line(error)}; choose another model') from None


def _resampled(channels: int, factor: float) -> nn.Module:
    """A map's change of size: transposed convolutions up, a maximum down, nothing."""
    if factor == 4:
        return nn.Sequential(
            nn.ConvTranspose2d(channels, channels, 2, 2),
            LayerNorm2d(channels),
            nn.GELU(),
            nn.ConvTranspose2d(channels, channels, 2, 2),
        )
    if factor == 2:
        return nn.ConvTranspose2d(channels, channels, 2, 2)
    return nn.Identity() if factor == 1 else nn.MaxPool2d(2, ceil_mode=True)
