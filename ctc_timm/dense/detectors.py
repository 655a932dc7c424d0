"""torchvision's detectors on a pyramid: Faster R-CNN, Mask R-CNN, RetinaNet.

Images come as squares of one size, so that the detectors resize and pad nothing. Each level has anchors of one size a
stride: `anchor_scale` times the stride, 8 for R-CNN (32 pixels at stride 4, as published) and 4 for RetinaNet (32 at
stride 8), which adds sizes between.
"""

from __future__ import annotations

import inspect
from typing import Any

from torchvision.models.detection import FasterRCNN, MaskRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.ops import MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock, LastLevelMaxPool, LastLevelP6P7

from ..utils.errors import UserError, nearest, one_line
from .pyramid import Pyramid
from .settings import DetectorSettings

_CLASSES: dict[str, Any] = {'fasterrcnn': FasterRCNN, 'maskrcnn': MaskRCNN, 'retinanet': RetinaNet}


def extra_levels(detector: str, channels: int) -> ExtraFPNBlock:
    """The levels that a detector adds to the pyramid: one by a maximum for R-CNN, two by convolutions for RetinaNet.

    Args:
        detector: fasterrcnn, maskrcnn or retinanet.
        channels: Of the pyramid.
    """
    return LastLevelP6P7(channels, channels) if detector == 'retinanet' else LastLevelMaxPool()


def create_detector(
    settings: DetectorSettings, pyramid: Pyramid, num_classes: int, img_size: int, mean: list[float], std: list[float]
) -> Any:
    """A detector with new heads.

    Args:
        settings: Which detector, and how its heads are.
        pyramid: With the detector's `extra_levels`.
        num_classes: Without background.
        img_size: Side of the images.
        mean: Of the channels, of 1.
        std: Of the channels.

    Returns:
        In training mode detector(images, targets) gives losses by name; in evaluation mode detector(images) gives
        `boxes`, `labels`, `scores` and, of Mask R-CNN, `masks` of each image.

    Raises:
        UserError: Options that torchvision's class refuses.
    """
    detector = _CLASSES[settings.detector]
    known = list(inspect.signature(detector).parameters)
    unknown = next((name for name in settings.detector_kwargs if name not in known), None)
    if unknown:  # or its transform would take it without a word
        raise UserError(
            f"`detector_kwargs`: torchvision's {detector.__name__} has no {unknown}{nearest(unknown, known)}"
        )
    strides, channels = pyramid.strides, pyramid.out_channels
    strides = [*strides, strides[-1] * 2, strides[-1] * 4]  # with the extra levels
    if settings.detector == 'retinanet':
        scale = settings.anchor_scale or 4
        sizes = tuple(tuple(scale * stride * 2 ** (i / 3) for i in range(3)) for stride in strides)
        options: dict[str, Any] = {'num_classes': num_classes + 1, 'anchor_generator': _anchors(sizes)}
    else:
        names, width = [str(i) for i in range(len(pyramid.strides))], settings.head_channels
        options = {
            'rpn_anchor_generator': _anchors(tuple(((settings.anchor_scale or 8) * s,) for s in strides[:-1])),
            'box_roi_pool': MultiScaleRoIAlign(names, output_size=7, sampling_ratio=2),
            'box_head': TwoMLPHead(channels * 7 * 7, width),
            'box_predictor': FastRCNNPredictor(width, num_classes + 1),
        }
    if settings.detector == 'maskrcnn':
        inner = min(256, channels)
        options |= {
            'mask_roi_pool': MultiScaleRoIAlign(names, output_size=14, sampling_ratio=2),
            'mask_head': MaskRCNNHeads(channels, (inner,) * 4, 1),
            'mask_predictor': MaskRCNNPredictor(inner, inner, num_classes + 1),
        }
    try:
        return detector(
            pyramid,
            min_size=img_size,
            max_size=img_size,
            image_mean=mean,
            image_std=std,
            size_divisible=1,
            _skip_resize=True,
            **{**options, **settings.detector_kwargs},
        )
    except (TypeError, ValueError) as error:
        raise UserError(f'`detector_kwargs`: {one_line(error)}') from None


def _anchors(sizes: tuple[tuple[float, ...], ...]) -> AnchorGenerator:
    return AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * len(sizes))
