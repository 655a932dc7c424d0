"""What a frozen backbone is worth to a detector: heads trained on it briefly, then COCO's metrics.

For comparing backbones, so that everything else is fixed: a small Faster R-CNN, its pyramid and heads new, a few epochs
over a draw of the training images, no augmentation. Nothing is written.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from timm.data import resolve_data_config
from torch.utils.data import DataLoader, Subset

from ..data.settings import LoaderSettings
from ..models.loading import LoadedModel
from ..utils.progress import progress_bar
from .coco import CocoSplit, evaluate_results, metric_names, open_coco
from .detection import DetectionEvaluator, DetectionTask
from .detectors import create_detector, extra_levels
from .loading import FitCanvas, Transformed, collate, train_transform
from .pyramid import Pyramid
from .settings import CanvasSettings, DetectorSettings

VERSION = 1  # of what the settings below mean
CHANNELS, HEAD_CHANNELS, BATCH_SIZE, LR = 64, 256, 8, 1e-3
SAMPLES = {
    'box_batch_size_per_image': 64,
    'rpn_pre_nms_top_n_train': 300,
    'rpn_post_nms_top_n_train': 150,
    'rpn_pre_nms_top_n_test': 200,
    'rpn_post_nms_top_n_test': 100,
}
MOST_PIXELS = 512


def open_detection(folder: str, epochs: int, images: int, seed: int) -> FrozenDetection:
    """Open a COCO-format folder; the canvas is as large as half of its images are, in steps of 32 pixels, up to 512.

    Args:
        folder: In COCO's layout.
        epochs: Of training heads.
        images: Drawn of the training images.
        seed: Of the draw, the heads and the order.

    Raises:
        UserError: See `coco.open_coco`.
    """
    train, val = open_coco(folder)
    middle = float(np.median([max(image['width'], image['height']) for image in train.coco.imgs.values()]))
    size = min(MOST_PIXELS, 32 * round(max(middle, 32) / 32 + 0.49))
    return FrozenDetection(train, val, epochs, min(images, len(train)), size, seed)


@dataclass
class FrozenDetection:
    """Measures frozen backbones on a COCO-format folder, see `open_detection`."""

    train: CocoSplit
    val: CocoSplit
    epochs: int
    images: int
    img_size: int
    seed: int

    def facts(self) -> dict[str, Any]:
        """All that the numbers depend on beside the weights, for a cache."""
        files = {
            split.file.name: hashlib.sha256(split.file.read_bytes()).hexdigest() for split in (self.train, self.val)
        }
        return {
            'version': VERSION,
            'detector': 'fasterrcnn',
            'fpn_channels': CHANNELS,
            'head_channels': HEAD_CHANNELS,
            'batch_size': BATCH_SIZE,
            'lr': LR,
            **SAMPLES,
            'epochs': self.epochs,
            'images': self.images,
            'img_size': self.img_size,
            'seed': self.seed,
            'folder': str(self.train.root.resolve()),
            **files,
        }

    def measure(self, loaded: LoadedModel, accelerator: Accelerator) -> dict[str, Any]:
        """Train heads on a backbone by AdamW along half a cosine, over the same draw and order for every backbone.

        Args:
            loaded: Its model is cut down and frozen.
            accelerator: Device and precision; several processes each do the same.

        Returns:
            box_ap, box_ap50, ... as percentages, num_train and num_test.

        Raises:
            UserError: A model without a pyramid.
        """
        config = resolve_data_config({}, model=loaded.model)
        mean, std = list(config['mean']), list(config['std'])
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            pyramid = Pyramid(loaded, self.img_size, CHANNELS, extra_levels('fasterrcnn', CHANNELS))
            pyramid.freeze()
            settings = DetectorSettings(head_channels=HEAD_CHANNELS, detector_kwargs=SAMPLES)
            model = create_detector(settings, pyramid, len(self.train.names), self.img_size, mean, std)
            task = DetectionTask(model, accelerator.device)
            self._fit(task, mean, accelerator)
            loader = LoaderSettings(batch_size=BATCH_SIZE, workers=0)
            evaluator = DetectionEvaluator(self.val, FitCanvas(self.img_size, mean), loader, accelerator)
            detections = list(evaluator.detections(model.eval(), range(len(self.val))))
        metrics = evaluate_results(self.val, [row for rows in detections for row in rows])
        percent = {name: 100 * metrics[name] for name in metric_names(masks=False) if name in metrics}
        return {'num_train': self.images, 'num_test': len(self.val), **percent}

    def _fit(self, task: DetectionTask, mean: list[float], accelerator: Accelerator) -> None:
        draw = torch.Generator().manual_seed(self.seed)
        chosen = torch.randperm(len(self.train), generator=draw)[: self.images].tolist()
        canvas = CanvasSettings(img_size=self.img_size, hflip=0.0, scale=(1.0, 1.0))
        dataset = Subset(Transformed(self.train, train_transform(canvas, mean, boxes=True)), chosen)
        loader: Any = DataLoader(dataset, BATCH_SIZE, shuffle=True, collate_fn=collate, generator=draw)
        parameters = [p for p in task.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=LR)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.epochs * len(loader))
        task.train()
        for epoch in range(self.epochs):
            for batch in progress_bar(loader, f'detector, epoch {epoch} of {self.epochs}', accelerator):
                with accelerator.autocast():
                    loss = task.run_batch(send_to_device(batch, accelerator.device))['loss']
                optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(parameters, 5.0)
                optimizer.step()
                schedule.step()
