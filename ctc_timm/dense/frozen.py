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
from .detection import DetectionEvaluator, DetectionTask, create_detector, extra_levels
from .loading import FitCanvas, Transformed, collate, train_transform
from .pyramid import Pyramid
from .settings import CanvasSettings, DetectorSettings

SAMPLES = {
    'box_batch_size_per_image': 64,
    'rpn_pre_nms_top_n_train': 300,
    'rpn_post_nms_top_n_train': 150,
    'rpn_pre_nms_top_n_test': 200,
    'rpn_post_nms_top_n_test': 100,
}
FIXED: dict[str, Any] = {
    'detector': 'fasterrcnn',
    'fpn_channels': 64,
    'head_channels': 256,
    'batch_size': 8,
    'lr': 1e-3,
    **SAMPLES,
}
VERSION = 1  # of what these mean


@dataclass
class FrozenDetection:
    """Measures frozen backbones on a COCO-format folder, with heads trained for `epochs` on so many `images` of it.

    `img_size` is the side of the canvas, `seed` that of the draw, the heads and the order.
    """

    train: CocoSplit
    val: CocoSplit
    epochs: int
    images: int
    img_size: int
    seed: int

    def facts(self) -> dict[str, Any]:
        """All that the numbers depend on beside the weights, for a cache."""
        folder = {'folder': str(self.train.root.resolve())}
        files = {part.file.name: hashlib.sha256(part.file.read_bytes()).hexdigest() for part in (self.train, self.val)}
        chosen = {name: getattr(self, name) for name in ('epochs', 'images', 'img_size', 'seed')}
        return {'version': VERSION, **FIXED, **chosen, **folder, **files}

    def measure(self, loaded: LoadedModel, accelerator: Accelerator) -> dict[str, Any]:
        """Train heads on a backbone, which is cut down and frozen, by AdamW along half a cosine; the same on all ranks.

        Returns:
            box_ap, box_ap50, ... as percentages, num_train and num_test.
        """
        config, size = resolve_data_config({}, model=loaded.model), self.img_size
        mean, std = list(config['mean']), list(config['std'])
        settings = DetectorSettings(head_channels=FIXED['head_channels'], detector_kwargs=SAMPLES)
        loader = LoaderSettings(batch_size=FIXED['batch_size'], workers=0)
        evaluator = DetectionEvaluator(self.val, FitCanvas(size, mean), loader, accelerator)
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            extra = extra_levels('fasterrcnn', FIXED['fpn_channels'])
            pyramid = Pyramid(loaded, size, FIXED['fpn_channels'], extra)
            pyramid.freeze()
            model = create_detector(settings, pyramid, len(self.train.names), size, mean, std)
            self._fit(DetectionTask(model, accelerator.device), mean, accelerator)
            rows = [row for rows in evaluator.detections(model, range(len(self.val))) for row in rows]
        metrics = evaluate_results(self.val, rows)
        percent = {name: 100 * metrics[name] for name in metric_names(masks=False) if name in metrics}
        return {'num_train': self.images, 'num_test': len(self.val), **percent}

    def _fit(self, task: DetectionTask, mean: list[float], accelerator: Accelerator) -> None:
        draw = torch.Generator().manual_seed(self.seed)  # the same draw and order for every backbone
        chosen = torch.randperm(len(self.train), generator=draw)[: self.images].tolist()
        canvas = CanvasSettings(img_size=self.img_size, hflip=0.0, scale=(1.0, 1.0))
        dataset = Subset(Transformed(self.train, train_transform(canvas, mean, boxes=True)), chosen)
        loader: Any = DataLoader(dataset, FIXED['batch_size'], shuffle=True, collate_fn=collate, generator=draw)
        parameters = [p for p in task.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=FIXED['lr'])
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


def open_detection(folder: str, epochs: int, images: int, seed: int) -> FrozenDetection:
    """Open a folder; the canvas is as large as half of its images are, in steps of 32 pixels and up to 512."""
    train, val = open_coco(folder)
    middle = float(np.median([max(image['width'], image['height']) for image in train.coco.imgs.values()]))
    size = min(512, 32 * round(max(middle, 32) / 32 + 0.49))
    return FrozenDetection(train, val, epochs, min(images, len(train)), size, seed)
