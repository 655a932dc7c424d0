"""`transfer/detect.py`: a detector on any body, from a COCO-format folder to COCO's metrics."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from ..data import decoding as workers
from ..data.transforms import worker_count
from ..measure.results import table, write_json
from ..utils.errors import UserError
from ..utils.progress import progress_bar
from . import coco_metrics, fitting_flags
from .augment import FitCanvas, collate, train_transform
from .coco import CocoDataset, CocoSplit, decode_mask, open_coco, require_objects, same_categories
from .detectors import create_detector, extra_levels
from .drawing import draw_detections
from .fitting import Fitting


def detect(args: argparse.Namespace) -> dict[str, Any]:
    """Train, measure, print, write and draw.

    Returns:
        What results.json holds.

    Raises:
        UserError: A model or data that cannot be had, or that do not fit each other.
    """
    coco_metrics.check_installed()
    accelerator = fitting_flags.open_accelerator(args)
    with accelerator.main_process_first():
        train, val = open_splits(args)
    detection = Detection(args, train, val, accelerator)
    fitting = detection.fitting
    if accelerator.is_main_process:
        print(f'training: {train.told()}\nvalidation: {val.told()}')
        size = sum(p.numel() for p in detection.model.parameters()) / 1e6
        print(
            f'{args.detector} on {detection.pyramid.name} ({detection.pyramid.weights}; {size:.2f}M parameters), '
            f'{len(train.categories)} categories, {args.img_size} pixels, to {fitting.run.path}',
            flush=True,
        )
    metrics = fitting.fit()
    results = {
        'detector': args.detector,
        'body': detection.pyramid.name,
        'weights': detection.pyramid.weights,
        'data': str(train.file.parent.parent),
        'images': {'train': len(train.images), 'val': len(val.images)},
        'put_in_order': {'train': train.counts, 'val': val.counts},
        'epoch': fitting.at.epoch - 1,
        'best': fitting.at.best,
        'metrics': metrics or detection.measure(fitting.module.eval()),
    }
    detection.draw(args.drawn_images)
    if accelerator.is_main_process:
        write_json(fitting.run.path / 'results.json', results)
        print(_summary(results, fitting))
    accelerator.wait_for_everyone()
    return results


def open_splits(args: argparse.Namespace) -> tuple[CocoSplit, CocoSplit]:
    """Training and validation split of `--data-dir`, or of the digits' scenes, which are written where they are not.

    Raises:
        UserError: See `open_coco`; nothing to train on; masks that Mask R-CNN can't have.
    """
    if not args.data_dir:
        from .scenes import default_scenes

        args.data_dir = str(default_scenes())
    train, val = open_coco(args.data_dir, 'train'), open_coco(args.data_dir, 'val')
    same_categories(train, val)
    require_objects(train, val)
    for split in (train, val) if args.detector == 'maskrcnn' else ():
        sizes = {image['id']: (image['height'], image['width']) for image in split.images}
        for image, objects in split.annotations.items():
            for annotation in objects:
                decode_mask(split.file, annotation, *sizes[image])
    return train, val


class Detection:
    """A detector with its data, and the run that trains it.

    Args:
        args: Of `detection_flags.add_arguments`.
        train: Training split.
        val: Validation split.
        accelerator: Device, precision and processes.

    Attributes:
        pyramid: What the detector stands on.
        model: The detector.
        fitting: Its run.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        train: CocoSplit,
        val: CocoSplit,
        accelerator: Accelerator,
    ) -> None:
        self.args, self.val, self.accelerator = args, val, accelerator
        self.masks = args.detector == 'maskrcnn'
        torch.manual_seed(args.seed)
        self.pyramid = fitting_flags.open_pyramid(args, extra_levels(args.detector, args.fpn_channels))
        if self.pyramid.in_chans != 3:
            raise UserError(f'--model: takes images of {self.pyramid.in_chans} channels, detection has color images')
        mean, std = fitting_flags.normalization(args, self.pyramid)
        self.model = create_detector(
            args.detector,
            self.pyramid,
            len(train.categories),
            args.img_size,
            mean,
            std,
            anchor_scale=args.anchor_scale,
            head_channels=args.head_channels,
            **args.detector_kwargs,
        )
        if args.scale[0] > args.scale[1]:
            raise UserError(f'--scale {args.scale[0]:g} {args.scale[1]:g}: the first must not be above the second')
        transform = train_transform(args.img_size, args.hflip, args.scale, mean)
        self._mean = mean
        self.fitting = Fitting(
            args,
            accelerator=accelerator,
            module=self.model,
            pyramid=self.pyramid,
            train=CocoDataset(train, transform, self.masks),
            collate=collate,
            loss=detector_loss,
            evaluate=self.measure,
            columns=coco_metrics.metric_names(self.masks),
            facts={'detector': args.detector, 'categories': len(train.categories), 'img_size': args.img_size},
        )

    def measure(self, model: nn.Module) -> Mapping[str, float]:
        """COCO's metrics on the validation split; all processes share the work and get the numbers."""
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        share = range(len(self.val.images))[rank::world]
        rows = [row for found in self._find(model, share) for row in found]
        return coco_metrics.measure(self.val, gather_object(rows) if world > 1 else rows, self.masks)

    def _find(self, model: nn.Module, indices: Sequence[int]) -> Iterator[list[dict[str, Any]]]:
        args = self.args
        return find(
            model,
            CocoDataset(self.val),
            self._mean,
            args.img_size,
            self.accelerator,
            indices,
            batch_size=args.validation_batch_size or args.batch_size,
            num_workers=worker_count(args),
            pin_memory=args.pin_mem,
        )

    def draw(self, count: int) -> None:
        """Draw what the detector finds in the first validation images, to plots/detections.png."""
        if not self.accelerator.is_main_process:
            return
        shown = self.val.images[:count]
        dataset = CocoDataset(self.val)
        draw_detections(
            [dataset.image(i) for i in range(len(shown))],
            [self.val.annotations[image['id']] for image in shown],
            list(self._find(self.model.eval(), range(len(shown)))),
            {category['id']: str(category['name']) for category in self.val.categories},
            self.fitting.run.plots / 'detections.png',
        )


def find(
    model: nn.Module,
    dataset: CocoDataset,
    mean: Sequence[float],
    img_size: int,
    accelerator: Accelerator,
    indices: Sequence[int] | None = None,
    **options: Any,
) -> Iterator[list[dict[str, Any]]]:
    """What a detector finds in images.

    Args:
        model: In evaluation mode.
        dataset: Without a transform.
        mean: Of the channels, of 1.
        img_size: Side of the canvas.
        accelerator: Device and precision.
        indices: Of the images; all when None.
        **options: For PyTorch's loader.

    Yields:
        The rows of each image, see `coco_metrics.to_results`.
    """
    dataset.transform = FitCanvas(img_size, mean)
    chosen = range(len(dataset)) if indices is None else indices
    loader: Any = DataLoader(
        Subset(dataset, list(chosen)),
        **{'batch_size': 8, **options},
        collate_fn=collate,
        generator=torch.Generator(),  # workers' seeds must not draw from the program's random state
    )
    by_id = {image['id']: image for image in dataset.split.images}
    category_ids = [category['id'] for category in dataset.split.categories]
    with workers.translate_errors(), torch.no_grad():
        for images, targets in progress_bar(loader, 'validation', accelerator):
            with accelerator.autocast():
                outputs = model([image.to(accelerator.device) for image in images])
            for output, target in zip(outputs, targets):
                yield coco_metrics.to_results(output, target, by_id[target['image_id']], category_ids)


def detector_loss(module: nn.Module, batch: tuple[list[Tensor], list[dict[str, Tensor]]]) -> dict[str, Tensor]:
    """The sum of a torchvision detector's losses, and each of them."""
    images, targets = batch
    losses: dict[str, Tensor] = module(images, targets)
    return {'loss': torch.stack(list(losses.values())).sum(), **losses}


def _summary(results: dict[str, Any], fitting: Fitting) -> str:
    """The last epoch's metrics as a table, and where everything is."""
    metrics = results['metrics']
    rows = []
    for kind in ('box', 'mask'):
        shares = {name: metrics.get(f'{kind}_{name}') for name in coco_metrics.METRICS}
        if f'{kind}_ap' in metrics:
            rows.append({'what': kind, **{k: None if v is None else 100 * v for k, v in shares.items()}})
    headings = {'what': '%', 'ap': 'AP', 'ap50': 'AP50', 'ap75': 'AP75'}
    headings |= {'ap_small': 'small', 'ap_medium': 'medium', 'ap_large': 'large'}
    path = fitting.run.path
    return (
        f'\n{results["images"]["val"]:,} validation images, epoch {results["epoch"]}\n{table(rows, headings)}\n'
        f'written to {path / "results.json"}, {fitting.run.plots / "detections.png"}'
    )
