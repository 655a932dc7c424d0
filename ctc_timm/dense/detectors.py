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

DETECTORS = ('fasterrcnn', 'maskrcnn', 'retinanet')
RATIOS = (0.5, 1.0, 2.0)


def extra_levels(detector: str, channels: int) -> ExtraFPNBlock:
    """The levels that a detector adds to the pyramid: one by a maximum for R-CNN, two by convolutions for RetinaNet.

    Args:
        detector: Of `DETECTORS`.
        channels: Of the pyramid.
    """
    return LastLevelP6P7(channels, channels) if detector == 'retinanet' else LastLevelMaxPool()


def create_detector(
    detector: str,
    pyramid: Pyramid,
    num_classes: int,
    img_size: int,
    mean: list[float],
    std: list[float],
    *,
    anchor_scale: float | None = None,
    head_channels: int = 1024,
    **options: Any,
) -> Any:
    """A detector with new heads.

    Args:
        detector: Of `DETECTORS`.
        pyramid: With the detector's `extra_levels`.
        num_classes: C, without background.
        img_size: Side of the images.
        mean: Of the channels, of 1.
        std: Of the channels.
        anchor_scale: Anchors' size over their level's stride; the detector's own when None.
        head_channels: Of the box head's two layers; for R-CNN.
        **options: For torchvision's class: box_batch_size_per_image, rpn_pre_nms_top_n_train, ...

    Returns:
        In training mode detector(images, targets) gives losses by name; in evaluation mode detector(images) gives
        `boxes`, `labels`, `scores` and, of Mask R-CNN, `masks` of each image.

    Raises:
        UserError: Options that torchvision's class refuses.
    """
    kind: Any = {'fasterrcnn': FasterRCNN, 'maskrcnn': MaskRCNN, 'retinanet': RetinaNet}[detector]
    known = list(inspect.signature(kind).parameters)
    for name in options:
        if name not in known:  # or its transform would take it without a word
            raise UserError(f"--detector-kwargs: torchvision's {kind.__name__} has no {name}{nearest(name, known)}")
    common: dict[str, Any] = dict(
        min_size=img_size, max_size=img_size, image_mean=mean, image_std=std, size_divisible=1, _skip_resize=True
    )
    levels = len(pyramid.strides)
    try:
        if detector == 'retinanet':
            strides = [*pyramid.strides, pyramid.strides[-1] * 2, pyramid.strides[-1] * 4]
            scale = anchor_scale or 4
            sizes = tuple(tuple(scale * stride * 2 ** (i / 3) for i in range(3)) for stride in strides)
            anchors = AnchorGenerator(sizes, (RATIOS,) * len(sizes))
            return kind(pyramid, num_classes + 1, anchor_generator=anchors, **common, **options)
        scale = anchor_scale or 8
        strides = [*pyramid.strides, pyramid.strides[-1] * 2]
        anchors = AnchorGenerator(tuple((scale * s,) for s in strides), (RATIOS,) * len(strides))
        names, channels = [str(i) for i in range(levels)], pyramid.out_channels
        options = {
            'rpn_anchor_generator': anchors,
            'box_roi_pool': MultiScaleRoIAlign(names, output_size=7, sampling_ratio=2),
            'box_head': TwoMLPHead(channels * 7 * 7, head_channels),
            'box_predictor': FastRCNNPredictor(head_channels, num_classes + 1),
            **options,
        }
        if detector == 'fasterrcnn':
            return kind(pyramid, **common, **options)
        inner = min(256, channels)
        options = {
            'mask_roi_pool': MultiScaleRoIAlign(names, output_size=14, sampling_ratio=2),
            'mask_head': MaskRCNNHeads(channels, (inner,) * 4, 1),
            'mask_predictor': MaskRCNNPredictor(inner, inner, num_classes + 1),
            **options,
        }
        return kind(pyramid, **common, **options)
    except (TypeError, ValueError) as error:
        raise UserError(f'--detector-kwargs: {one_line(error)}') from None
