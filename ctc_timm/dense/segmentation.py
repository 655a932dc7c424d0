"""`transfer/segment.py`: semantic segmentation on any body, from a folder of masks to mean intersection over union.

B: batch. S: side of the canvas. K: classes. H, W: of an image.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate
from torch.utils.data import DataLoader, Subset

from ..data import decoding as workers
from ..data.transforms import worker_count
from ..measure.results import table, write_json
from ..utils.errors import UserError
from ..utils.progress import progress_bar
from . import fitting_flags, mask_metrics
from .augment import FitCanvas, collate
from .fitting import Fitting
from .mask_drawing import draw_masks
from .masks import IGNORE, Coding, MaskDataset, MaskSplit, mask_transform, open_masks
from .segmenters import Segmenter, open_body


def segment(args: argparse.Namespace) -> dict[str, Any]:
    """Train, measure, print, write and draw.

    Returns:
        What results.json holds.

    Raises:
        UserError: A model or data that cannot be had, or that do not fit each other.
    """
    accelerator = fitting_flags.open_accelerator(args)
    with accelerator.main_process_first():
        train, val = open_splits(args, accelerator)
    segmentation = Segmentation(args, train, val, accelerator)
    fitting = segmentation.fitting
    if accelerator.is_main_process:
        size = sum(p.numel() for p in segmentation.model.parameters()) / 1e6
        pyramid = segmentation.pyramid
        print(
            f'training: {train.told()}\nvalidation: {val.told()}\n{args.head} on {pyramid.name} ({pyramid.weights}; '
            f'{size:.2f}M parameters), {args.img_size} pixels, to {fitting.run.path}',
            flush=True,
        )
    metrics = fitting.fit()
    results = {
        'head': args.head,
        'body': segmentation.pyramid.name,
        'weights': segmentation.pyramid.weights,
        'data': str(train.folder),
        'images': {'train': len(train.pairs), 'val': len(val.pairs)},
        'unlabeled': {'train': train.unlabeled, 'val': val.unlabeled},
        'classes': val.names,
        'epoch': fitting.at.epoch - 1,
        'best': fitting.at.best,
        'metrics': metrics or dict(segmentation.measure(fitting.module.eval())),
    }
    segmentation.draw(args.drawn_images)
    if accelerator.is_main_process:
        write_json(fitting.run.path / 'results.json', results)
        print(_summary(results, fitting))
    accelerator.wait_for_everyone()
    return results


def open_splits(args: argparse.Namespace, accelerator: Accelerator) -> list[MaskSplit]:
    """Training and validation split of `--data-dir`, or of the digits' scenes, which are written where they are not.

    Raises:
        UserError: See `open_masks`.
    """
    if not args.data_dir:
        from .scenes import default_scenes

        args.data_dir = str(default_scenes())
    return open_masks(
        args.data_dir,
        (args.train_split, args.val_split),
        args.layout,
        args.num_classes,
        Coding(args.ignore_index, args.reduce_zero_label),
        lambda todo: progress_bar(todo, 'read masks', accelerator),
    )


class Segmentation:
    """A segmenter with its data, and the run that trains it.

    Args:
        args: Of `segmentation_flags.add_arguments`.
        train: Training split.
        val: Validation split.
        accelerator: Device, precision and processes.

    Attributes:
        pyramid: What the head stands on.
        model: The segmenter.
        fitting: Its run.
    """

    def __init__(self, args: argparse.Namespace, train: MaskSplit, val: MaskSplit, accelerator: Accelerator) -> None:
        self.args, self.val, self.accelerator = args, val, accelerator
        if args.scale[0] > args.scale[1]:
            raise UserError(f'--scale {args.scale[0]:g} {args.scale[1]:g}: the first must not be above the second')
        if args.head == 'deeplabv3' and args.batch_size < 2:
            raise UserError('--batch-size 1: the batch norm of deeplabv3 needs two images at least')
        torch.manual_seed(args.seed)
        self.pyramid = open_body(args)
        if self.pyramid.in_chans not in (1, 3):
            raise UserError(f'--model: takes images of {self.pyramid.in_chans} channels; use one of 1 or 3')
        self.mode = 'RGB' if self.pyramid.in_chans == 3 else 'L'
        self.mean, std = fitting_flags.normalization(args, self.pyramid)
        self.model = Segmenter(args.head, self.pyramid, len(train.names), self.mean, std, args.head_channels)
        transform = mask_transform(args.img_size, args.hflip, tuple(args.scale), self.mean)
        self.fitting = Fitting(
            args,
            accelerator=accelerator,
            module=self.model,
            pyramid=self.pyramid,
            train=MaskDataset(train, transform, self.mode),
            collate=collate,
            loss=segmentation_loss,
            evaluate=self.measure,
            columns=mask_metrics.METRICS,
            facts={'head': args.head, 'num_classes': len(train.names), 'img_size': args.img_size},
        )

    def measure(self, model: nn.Module) -> Mapping[str, float]:
        """The metrics on the validation split; all processes share the work and get the numbers."""
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        classes = len(self.val.names)
        matrix_KK = torch.zeros(classes, classes, dtype=torch.int64, device=self.accelerator.device)
        for predicted_HW, truth_HW in self._predict(model, range(len(self.val.pairs))[rank::world]):
            matrix_KK += mask_metrics.confusion(predicted_HW, truth_HW, classes)
        matrix_KK = self.accelerator.reduce(matrix_KK, 'sum')
        return mask_metrics.scores(matrix_KK, self.val.names)

    @torch.no_grad()
    def _predict(self, model: nn.Module, indices: Sequence[int]) -> Iterator[tuple[Tensor, Tensor]]:
        """Predicted and true classes of validation images, [H, W] at the images' own sizes."""
        args, device = self.args, self.accelerator.device
        dataset = MaskDataset(self.val, FitCanvas(args.img_size, self.mean), self.mode)
        loader: Any = DataLoader(
            Subset(dataset, list(indices)),
            batch_size=args.validation_batch_size or args.batch_size,
            num_workers=worker_count(args),
            pin_memory=args.pin_mem,
            collate_fn=collate,
            generator=torch.Generator(),  # workers' seeds must not draw from the program's random state
        )
        with workers.translate_errors():
            for images, targets in progress_bar(loader, 'validation', self.accelerator):
                with self.accelerator.autocast():
                    scores_BKSS = model(torch.stack(images).to(device))
                for scores_KSS, target in zip(scores_BKSS.float(), targets):
                    high, wide = target['fitted']
                    truth_HW = target['mask'].to(device)
                    scores = scores_KSS[None, :, :high, :wide]
                    if truth_HW.shape != (high, wide):
                        scores = interpolate(scores, size=truth_HW.shape, mode='bilinear', align_corners=False)
                    yield scores[0].argmax(0), truth_HW

    def draw(self, count: int) -> None:
        """Draw the first validation images with their masks and the predicted ones, to plots/masks.png."""
        if not self.accelerator.is_main_process:
            return
        dataset = MaskDataset(self.val, mode=self.mode)
        shown = range(min(count, len(dataset)))
        found = [(p.cpu().numpy(), t.cpu().numpy()) for p, t in self._predict(self.model.eval(), shown)]
        predicted, truths = ([pair[i].astype(np.uint8) for pair in found] for i in (0, 1))
        images = [dataset[i][0] for i in shown]
        draw_masks(images, truths, predicted, self.val.names, self.fitting.run.plots / 'masks.png')


def segmentation_loss(module: nn.Module, batch: tuple[list[Tensor], list[dict[str, Tensor]]]) -> dict[str, Tensor]:
    """Mean cross-entropy over the pixels that count; 0 where none does."""
    images, targets = batch
    truth_BSS = torch.stack([target['mask'] for target in targets]).long()
    scores_BKSS = module(torch.stack(images))
    total = cross_entropy(scores_BKSS.float(), truth_BSS, ignore_index=IGNORE, reduction='sum')
    return {'loss': total / (truth_BSS != IGNORE).sum().clamp(min=1)}


def _summary(results: dict[str, Any], fitting: Fitting) -> str:
    """The last epoch's metrics as a table, and where everything is."""
    metrics = {name: 100 * value for name, value in results['metrics'].items()}
    rows = [{'class': name, 'iou': metrics.get(f'iou/{name}')} for name in results['classes']]
    rows.append({'class': 'mean', 'iou': metrics['miou']})
    path = fitting.run.path
    return (
        f'\n{results["images"]["val"]:,} validation images, epoch {results["epoch"]}\n'
        f'{table(rows, {"class": "class", "iou": "IoU %"})}\n'
        f'pixel accuracy {metrics["pixel_accuracy"]:.2f}%, mean over classes {metrics["mean_accuracy"]:.2f}%\n'
        f'written to {path / "results.json"}, {fitting.run.plots / "masks.png"}'
    )
