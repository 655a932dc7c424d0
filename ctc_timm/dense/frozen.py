"""What a frozen body is worth to a detector: heads trained on it briefly, then COCO's metrics.

For comparing bodies, so that everything else is fixed: a small Faster R-CNN, its pyramid and heads new, a few epochs
over a draw of the training images, no augmentation. Nothing is written.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from timm.data import resolve_data_config
from torch.utils.data import DataLoader, Subset

from ..models.loading import LoadedModel
from ..utils.progress import progress_bar
from . import coco_metrics
from .augment import collate, train_transform
from .coco import CocoDataset, CocoSplit, open_coco, require_objects, same_categories
from .detection import detector_loss, find
from .detectors import create_detector, extra_levels
from .pyramid import Pyramid

VERSION = 1  # of what the settings below mean
SETTINGS: dict[str, Any] = {
    'detector': 'fasterrcnn',
    'fpn_channels': 64,
    'head_channels': 256,
    'batch_size': 8,
    'lr': 1e-3,
}
SAMPLES = {
    'box_batch_size_per_image': 64,
    'rpn_pre_nms_top_n_train': 300,
    'rpn_post_nms_top_n_train': 150,
    'rpn_pre_nms_top_n_test': 200,
    'rpn_post_nms_top_n_test': 100,
}
MOST_PIXELS = 512


@dataclass
class FrozenDetection:
    """A COCO-format folder to measure frozen bodies on.

    Attributes:
        train: Heads are trained on it.
        val: They are measured on it.
        epochs: Of training.
        images: Drawn of the training images.
        img_size: Side of the canvas.
        seed: Of the draw, the heads and the order.
    """

    train: CocoSplit
    val: CocoSplit
    epochs: int
    images: int
    img_size: int
    seed: int

    @classmethod
    def open(cls, folder: str, flag: str, epochs: int, images: int, seed: int) -> FrozenDetection:
        """Open a folder; the canvas is as large as half of its images are, in steps of 32 pixels and up to 512.

        Raises:
            UserError: See `coco.open_coco`; pycocotools is not installed.
        """
        coco_metrics.check_installed()
        train, val = open_coco(folder, 'train', flag), open_coco(folder, 'val', flag)
        same_categories(train, val)
        require_objects(train, val)
        middle = float(np.median([max(image['width'], image['height']) for image in train.images]))
        size = min(MOST_PIXELS, 32 * round(max(middle, 32) / 32 + 0.49))
        return cls(train, val, epochs, min(images, len(train.images)), size, seed)

    def facts(self) -> dict[str, Any]:
        """All that the numbers depend on beside the weights, for a cache."""
        files = {
            split.file.name: hashlib.sha256(split.file.read_bytes()).hexdigest() for split in (self.train, self.val)
        }
        own = {'epochs': self.epochs, 'images': self.images, 'img_size': self.img_size, 'seed': self.seed}
        return {
            'version': VERSION,
            **SETTINGS,
            **SAMPLES,
            **own,
            'folder': str(Path(self.train.folder).resolve()),
            **files,
        }

    def measure(self, loaded: LoadedModel, accelerator: Accelerator) -> dict[str, Any]:
        """Train heads on a body, and measure.

        Args:
            loaded: Its model is cut down and frozen.
            accelerator: Device and precision; several processes each do the same.

        Returns:
            box_ap, box_ap50, ... as percentages, num_train and num_test.

        Raises:
            UserError: A model without a pyramid.
        """
        device, channels = accelerator.device, SETTINGS['fpn_channels']
        config = resolve_data_config({}, model=loaded.model)
        mean, std = list(config['mean']), list(config['std'])
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            pyramid = Pyramid(loaded, self.img_size, channels, extra_levels('fasterrcnn', channels), 'RUN')
            pyramid.freeze()
            model = create_detector(
                'fasterrcnn',
                pyramid,
                len(self.train.categories),
                self.img_size,
                mean,
                std,
                head_channels=SETTINGS['head_channels'],
                **SAMPLES,
            ).to(device)
            self._fit(model, mean, accelerator)
            dataset = CocoDataset(self.val)
            rows = [row for found in find(model.eval(), dataset, mean, self.img_size, accelerator) for row in found]
        shares = coco_metrics.measure(self.val, rows)
        numbers = {name: 100 * shares[name] for name in coco_metrics.metric_names(False) if name in shares}
        return {'num_train': self.images, 'num_test': len(self.val.images), **numbers}

    def _fit(self, model: Any, mean: list[float], accelerator: Accelerator) -> None:
        """AdamW along half a cosine, over the same draw and order for every body."""
        draw = torch.Generator().manual_seed(self.seed)
        chosen = torch.randperm(len(self.train.images), generator=draw)[: self.images].tolist()
        dataset = Subset(CocoDataset(self.train, train_transform(self.img_size, 0.0, (1.0, 1.0), mean)), chosen)
        loader: Any = DataLoader(dataset, SETTINGS['batch_size'], shuffle=True, collate_fn=collate, generator=draw)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=SETTINGS['lr'])
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.epochs * len(loader))
        model.train()
        for epoch in range(self.epochs):
            for images, targets in progress_bar(loader, f'detector, epoch {epoch} of {self.epochs}', accelerator):
                on_device = [{k: v.to(accelerator.device) for k, v in t.items() if hasattr(v, 'to')} for t in targets]
                with accelerator.autocast():
                    loss = detector_loss(model, ([image.to(accelerator.device) for image in images], on_device))['loss']
                optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
                optimizer.step()
                schedule.step()
