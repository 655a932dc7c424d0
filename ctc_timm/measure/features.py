"""Frozen features of a model on a split: computed once, in evaluation mode, without augmentation, and kept.

Letters: N images, D feature size, C classes of the model, P pixel values of an image.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d

from ..data.datasets import DatasetSplit
from ..data.loaders import create_eval_loader
from ..data.settings import LoaderSettings
from ..data.subsets import draw, part_of
from ..models.backbones import check_input, features_and_logits
from ..models.folding import fold_batch_norms
from ..models.layout import use_layout
from ..models.loading import LoadedModel
from ..utils.errors import UserError
from ..utils.progress import progress_bar
from ..utils.weights_files import HASH, read_weights, save_weights, tensors_hash

KEPT_BYTES = 2 * 2**30  # decoded images of a split that stay in memory for the next model


@dataclass(frozen=True)
class LabeledFeatures:
    """Pooled features [N, D] of images, the class of each, int64 [N] from 0, and where computed the logits [N, C]."""

    features_ND: Tensor
    labels_N: Tensor
    logits_NC: Tensor | None = None

    def __len__(self) -> int:
        return len(self.labels_N)

    def select(self, chosen: Tensor) -> LabeledFeatures:
        """Return the images at these positions, or where this mask is true, without logits."""
        return LabeledFeatures(self.features_ND[chosen], self.labels_N[chosen])

    def to(self, device: torch.device | str) -> LabeledFeatures:
        """Return features and labels on a device, without logits."""
        return LabeledFeatures(self.features_ND.to(device), self.labels_N.to(device))


def check_finite(features_ND: Tensor, what: str) -> None:
    """Refuse features with NaN or infinite entries by a UserError that begins with `what`."""
    if bad := int((~torch.isfinite(features_ND).all(dim=1)).sum()):
        images = f'{bad} of {len(features_ND)} images'
        raise UserError(f'{what} of {images} are NaN or infinite; take weights from before the training diverged')


class SplitImages:
    """A split's images as a model sees them, decoded once and kept in memory where they fit.

    `most` images are drawn, with the classes in proportion; all when None. `identity` says which images they are and
    how they are transformed, in plain values that a cache is keyed by, or is None where nothing does. A stream on
    several processes, or to be drawn from, is a UserError.
    """

    def __init__(
        self,
        source: DatasetSplit,
        loader: LoaderSettings,
        config: dict[str, Any],
        accelerator: Accelerator,
        most: int | None = None,
    ) -> None:
        several = accelerator.num_processes > 1
        if source.labels_N is None and (several or most):
            raise UserError(f'{source.name}: a stream is measured whole and by one process')
        if source.labels_N is not None and most and most < len(source.labels_N):
            source = part_of(source, draw(source.labels_N, most, seed=0))
        self.source, self.config, self.accelerator = source, config, accelerator
        content = _identity(source)
        values = {'data': source.name, 'identity': content, 'most': most, 'transform': config}
        self.identity: dict[str, Any] | None = None if content is None else values
        self._count = None if source.labels_N is None else len(source.labels_N)
        keep = self._count is not None and self._count * math.prod(config['input_size']) <= KEPT_BYTES
        self._loader = create_eval_loader(source.dataset, loader, config, accelerator.device, several, keep=keep)

    def batches(self, description: str) -> Any:
        """Iterate over batches of (images, targets) on the device, behind a progress bar."""
        return progress_bar(self._loader, description, self.accelerator)

    def gather(self, rows: list[Tensor]) -> Tensor:
        """Join the rows of all processes in the split's order, on the CPU."""
        return in_order(torch.cat(rows), self.accelerator)[: self._count].cpu()

    def pixels(self, side: int = 32) -> Tensor:
        """Return the images as vectors, [N, P], normalized as the model sees them, averaged down to this side."""
        rows = []
        for images, _ in self.batches('pixels'):
            height, width = (min(side, length) for length in images.shape[-2:])
            if (height, width) != images.shape[-2:]:
                images = adaptive_avg_pool2d(images, (height, width))
            rows.append(images.flatten(1).float())
        return self.gather(rows)


def in_order(rows: Tensor, accelerator: Accelerator) -> Tensor:
    """Join as many rows of each process: timm's evaluation sampler deals image i to process i mod P, and pads."""
    if accelerator.num_processes == 1:
        return rows
    gathered: Any = accelerator.gather(rows)
    return gathered.view(accelerator.num_processes, -1, *rows.shape[1:]).transpose(0, 1).flatten(0, 1)


def features_of(
    loaded: LoadedModel, images: SplitImages, accelerator: Accelerator, cache: Path | None, logits: bool = False
) -> LabeledFeatures:
    """Compute the features of a model on a split, or read them from the cache's folder; None computes anew.

    A UserError: a model without a classification head, or one that cannot take images of this size.
    """
    cache = None if images.identity is None else cache
    values = {
        **(images.identity or {}),
        'weights': tensors_hash(loaded.model.state_dict()),
        'precision': accelerator.mixed_precision,
    }
    key = hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()[:32]
    file = cache / f'{key}.safetensors' if cache else None
    features = _read(file, logits) if accelerator.is_main_process else None
    if broadcast_object_list([features is not None])[0]:
        features = features or _read(file, logits)
        if features is None:
            raise UserError(f'{file}: not visible to all processes; `output` must be a shared folder')
        return features
    check_input(loaded.model.cpu(), images.config['input_size'])
    features = compute_features(loaded.model.to(accelerator.device), images, accelerator, logits)
    if file and accelerator.is_main_process:
        tensors = {'features': features.features_ND, 'labels': features.labels_N, 'logits': features.logits_NC}
        kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
        file.parent.mkdir(parents=True, exist_ok=True)
        save_weights(file.with_suffix('.tmp'), kept, {})
        os.replace(file.with_suffix('.tmp'), file)
    return features


@torch.no_grad()
def compute_features(
    model: nn.Module, images: SplitImages, accelerator: Accelerator, logits: bool = False
) -> LabeledFeatures:
    """Pass a split once through a model, which must have a head; features and logits are float32."""
    folded: nn.Module | None = None
    rows: list[tuple[Tensor, ...]] = []
    for batch, targets in images.batches(f'features of {images.source.name}'):
        if folded is None:
            folded = use_layout(fold_batch_norms(model, batch[:2]), None, batch.device)
        with accelerator.autocast():
            features_BD, logits_BC = features_and_logits(folded, batch)
        rows.append((features_BD.float(), targets, logits_BC.float())[: 2 + logits])
    return LabeledFeatures(*(images.gather(list(part)) for part in zip(*rows)))


def _identity(source: DatasetSplit) -> str | None:
    """Hash what shows whether the images of a split are still the same; None where nothing does.

    Those are the files, by name, size and time of change, `datasets`' fingerprint, or the images where memory holds
    them. A name alone would give one set the features of another that took its place.
    """
    reader: Any = getattr(source.dataset, 'reader', source.dataset)
    reader = getattr(reader, 'source', reader)
    held = next((part for name in ('images', 'data') if (part := getattr(reader, name, None)) is not None), None)
    fingerprint = getattr(getattr(reader, 'dataset', None), '_fingerprint', None)
    samples, root = getattr(reader, 'samples', None), str(getattr(reader, 'root', None) or '')
    files = {str(sample[0]) for sample in samples} if samples is not None else set()
    digest = hashlib.sha256(b'' if source.labels_N is None else source.labels_N.numpy().tobytes())
    if os.path.isfile(root):  # a tar file
        files = {root}
    if fingerprint is not None:
        digest.update(str(fingerprint).encode())
    elif isinstance(held, (bytes, np.ndarray, torch.Tensor)):
        digest.update(np.ascontiguousarray(held).tobytes())
    elif files and all(map(os.path.isfile, files)):
        for path in sorted(files):
            status = os.stat(path)
            facts = f'{os.path.abspath(path)} {status.st_size} {status.st_mtime_ns}\n'
            digest.update(facts.encode(errors='surrogateescape'))
    else:
        return None
    return digest.hexdigest()


def _read(file: Path | None, logits: bool) -> LabeledFeatures | None:
    """Read a cached file; None if it is missing, damaged, or without the logits needed."""
    if file is None or not file.is_file():
        return None
    try:
        held, metadata = read_weights(file)
        hashed = HASH in metadata
        return LabeledFeatures(held['features'], held['labels'], held['logits'] if logits else None) if hashed else None
    except (UserError, KeyError):
        return None
