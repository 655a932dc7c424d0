"""Settings of detection and segmentation. Nothing here imports torch or timm."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from ..data.settings import LARGEST_SIDE, LoaderSettings
from ..models.settings import BatchNormSettings, SourceSettings
from ..training.settings import FolderSettings, OptimizerSettings, RunSettings, ScheduleSettings
from ..utils.precision import PrecisionSettings
from ..utils.settings import group, setting


@dataclass(frozen=True)
class BackboneSettings:
    """The backbone that heads stand on, and its feature pyramid."""

    from_scratch: bool = setting(False, 'random weights for the timm name of the model')
    fpn_channels: int = setting(256, 'of the pyramid', low=1, high=4096, metavar='N')
    freeze_stages: int = setting(0, 'freeze the first N stages of the backbone; 1 is the stem', low=0, metavar='N')
    freeze_bn: bool = setting(False, "freeze the backbone's batch norms")
    grad_checkpointing: bool = setting(False, 'trade time for memory')


@dataclass(frozen=True)
class CanvasSettings:
    """Where dense data lie, and the canvas that images are fitted to."""

    data_dir: str | None = setting(None, 'folder with the data; scenes of digits when not given', metavar='DIR')
    img_size: int = setting(512, 'side of the square canvas', low=1, high=LARGEST_SIDE, metavar='S')
    mean: tuple[float, ...] | None = setting(None, 'channel means, of 1', low=-1e6, high=1e6, metavar='M')
    std: tuple[float, ...] | None = setting(None, 'channel standard deviations', low=1e-6, high=1e6, metavar='S')
    hflip: float = setting(0.5, 'probability of a horizontal flip', low=0, high=1, metavar='P')
    scale: tuple[float, float] = setting((0.5, 1.5), 'random size, over that which fits', above=0, metavar='F')


@dataclass(frozen=True)
class DetectorSettings:
    """torchvision's detectors."""

    detector: Literal['fasterrcnn', 'maskrcnn', 'retinanet'] = setting('fasterrcnn', 'maskrcnn measures masks too')
    anchor_scale: float | None = setting(None, 'anchors over their stride; 8, retinanet 4', above=0, metavar='X')
    head_channels: int = setting(1024, "of R-CNN's box head", low=1, high=65536, metavar='N')
    detector_kwargs: dict[str, Any] = setting({}, "more for torchvision's class", metavar='KEY=VALUE')
    drawn_images: int = setting(6, 'in the picture of detections', low=1, metavar='N')


@dataclass(frozen=True)
class SegmenterSettings:
    """The segmentation head and its masks."""

    head: Literal['fpn', 'deeplabv3'] = setting('fpn', 'on all levels, or on the last map of the backbone')
    head_channels: int = setting(128, 'of the fpn head', low=4, high=65536, metavar='N')
    output_stride: Literal[8, 16, 32] | None = setting(None, "of the backbone's last map, where timm can change it")
    drawn_images: int = setting(6, 'in the picture of masks', low=1, metavar='N')
    layout: Literal['auto', 'voc', 'ade'] = setting('auto', 'of the folder')
    train_split: str = setting('train', "'train' is ADE's 'training'", metavar='NAME')
    val_split: str = setting('val', "'val' is ADE's 'validation'", metavar='NAME')
    num_classes: int | None = setting(None, 'by classes.txt or the masks when not given', low=2, high=255, metavar='K')
    ignore_index: int = setting(255, 'value of pixels that do not count', low=0, metavar='V')
    reduce_zero_label: bool = setting(False, '0 does not count either, and 1 is the first class (ADE20K)')


@dataclass(frozen=True)
class DenseSettings:
    """What detection and segmentation share."""

    mode: ClassVar[str]
    source: SourceSettings = group('Model', SourceSettings)
    backbone: BackboneSettings = group('Backbone', BackboneSettings)
    canvas: CanvasSettings = group('Data', CanvasSettings)
    loader: LoaderSettings = group('Loading', LoaderSettings, batch_size=8)
    schedule: ScheduleSettings = group('Schedule', ScheduleSettings, epochs=12, warmup_epochs=1, sched_on_updates=True)
    optimizer: OptimizerSettings = group(
        'Optimizer', OptimizerSettings, opt='adamw', lr_base=2e-4, lr_base_size=16, weight_decay=0.05
    )
    batch_norm: BatchNormSettings = group('Batch norm with several processes', BatchNormSettings)
    precision: PrecisionSettings = group('Mixed precision', PrecisionSettings)
    folder: FolderSettings = group('Run folder', FolderSettings)
    run: RunSettings = group('Run', RunSettings, seed=0, keep_every=0, checkpoint_hist=1)


@dataclass(frozen=True)
class DetectSettings(DenseSettings):
    """All settings of `ctc_timm.detect`."""

    mode: ClassVar[str] = 'detect'
    detector: DetectorSettings = group('Detector', DetectorSettings)


@dataclass(frozen=True)
class SegmentSettings(DenseSettings):
    """All settings of `ctc_timm.segment`."""

    mode: ClassVar[str] = 'segment'
    canvas: CanvasSettings = group('Data', CanvasSettings, scale=(0.5, 2.0))
    segmenter: SegmenterSettings = group('Segmenter', SegmenterSettings)


@dataclass(frozen=True)
class ScenesSettings:
    """All settings of `ctc-timm digit-scenes`."""

    output: str = setting('', 'folder to write, which must not exist or be empty', positional='', metavar='OUT')
    train_images: int = setting(600, 'training scenes', low=1, metavar='N')
    val_images: int = setting(150, 'validation scenes', low=1, metavar='N')
    img_size: int = setting(96, 'sides in pixels', low=32, high=2048, metavar='S')
    seed: int = setting(0, 'of everything random', low=0, metavar='S')
    layouts: tuple[Literal['coco', 'voc', 'ade'], ...] = setting(('coco', 'voc'), 'what to write', metavar='LAYOUT')
