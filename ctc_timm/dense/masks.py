"""Folders of images with semantic masks, in the layouts of VOC and ADE, and the metrics of predicted masks.

VOC: `ImageSets/Segmentation/SPLIT.txt` names the images of a split, `JPEGImages/NAME.jpg` are the images and
`SegmentationClass/NAME.png` their masks. ADE: `images/training/NAME.jpg` and `annotations/training/NAME.png`,
likewise `validation`. A mask holds a class for every pixel, in a PNG of gray values or with a palette, whose colors
don't matter. A file `classes.txt` beside them may name the classes, a line each.

H, W: of an image. K: classes. Rows of a confusion matrix are the true classes, columns the predicted ones.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.tv_tensors import Mask

from ..utils.errors import UserError, one_line
from .loading import IGNORE, open_image
from .settings import SegmenterSettings

METRICS = ('miou', 'pixel_accuracy', 'mean_accuracy')
_MOST_CLASSES = 255
_ADE_SPLITS = {'train': 'training', 'val': 'validation'}
_SUFFIXES = ('.jpg', '.jpeg', '.png', '.JPG', '.JPEG', '.PNG')
_DAMAGE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)


@dataclass
class MaskSplit(Dataset):
    """A split: pairs of image and mask files, K names of classes, and how many images have no pixel that counts.

    An item is (image, target): the image has the PIL mode `mode`, the target `mask`, [H, W], uint8, `IGNORE` where a
    pixel doesn't count, and `name`.
    """

    pairs: list[tuple[Path, Path]]
    settings: SegmenterSettings
    names: list[str]
    unlabeled: int = 0
    mode: str = 'RGB'

    def __str__(self) -> str:
        unlabeled = f', {self.unlabeled} without a pixel that counts' if self.unlabeled else ''
        return f'{len(self):,} images, {len(self.names)} classes{unlabeled}'

    def __len__(self) -> int:
        return len(self.pairs)

    @property
    def identity(self) -> str:
        """What tells the split from others: all names, and some masks."""
        digest = hashlib.sha256('\0'.join(image.name for image, _ in self.pairs).encode(errors='surrogateescape'))
        for _, mask in self.pairs[:: max(1, len(self.pairs) // 32)]:
            digest.update(mask.read_bytes())
        return digest.hexdigest()

    def __getitem__(self, index: int) -> tuple[Any, dict[str, Any]]:
        path, mask = self.pairs[index]
        classes = read_classes(mask, self.settings, len(self.names))
        classes = np.where(classes < 0, IGNORE, classes).astype(np.uint8)
        return open_image(path, self.mode), {'mask': Mask(torch.from_numpy(classes)), 'name': path.name}


def read_classes(path: Path, settings: SegmenterSettings, num_classes: int = _MOST_CLASSES) -> np.ndarray:
    """Read the classes in a mask's file, [H, W], int32, -1 for pixels that don't count, or raise a `UserError`."""
    try:
        with Image.open(path) as opened:
            mode, values = opened.mode, np.asarray(opened).astype(np.int32)
    except _DAMAGE as error:
        raise UserError(f'{path}: not a mask that can be read: {one_line(error)}') from None
    if mode not in ('1', 'L', 'P', 'I', 'I;16'):
        raise UserError(f'{path}: has colors ({mode}), not a class for each pixel (L or P)')
    first, counted = int(settings.reduce_zero_label), values != settings.ignore_index
    counted &= values >= first
    if (values[counted] >= num_classes + first).any():
        hint = '' if first else "; `reduce_zero_label` is for ADE20K's, which count from 1"
        raise UserError(
            f'{path}: holds the value {values[counted].max()}, which is no class; classes are {first} to '
            f'{num_classes - 1 + first}, {settings.ignore_index} is ignored{hint}'
        )
    return np.where(counted, values - first, -1)


def open_masks(
    folder: str, settings: SegmenterSettings, progress: Callable[[list[Any]], Iterable[Any]] = iter
) -> tuple[MaskSplit, MaskSplit]:
    """Open the training and the validation split of a folder, and read all of their masks once, within `progress`.

    Raises:
        UserError: Anything in the files that can't be used.
    """
    root, num_classes, file = Path(folder), settings.num_classes, Path(folder) / 'classes.txt'
    layout = _layout(root, settings.layout)
    splits = [_pairs(root, layout, name) for name in (settings.train_split, settings.val_split)]
    names = _read_lines(file) if file.is_file() else []
    if names and not (2 <= len(set(names)) == len(names) <= _MOST_CLASSES):
        raise UserError(f'{file}: must name 2 to {_MOST_CLASSES} classes, each once')
    if names and num_classes not in (None, len(names)):
        raise UserError(f'`num_classes` {num_classes}: {file} names {len(names)} classes')
    known, highest = num_classes or len(names), []
    for image, mask in progress([pair for pairs in splits for pair in pairs]):
        classes = read_classes(mask, settings, known or _MOST_CLASSES)
        try:
            with Image.open(image) as opened:
                width, height = opened.size
        except _DAMAGE as error:
            raise UserError(f'{image}: not an image that can be read: {one_line(error)}') from None
        if classes.shape != (height, width):
            sides = f'{classes.shape[1]}x{classes.shape[0]}'
            raise UserError(f'{mask}: is {sides}, but its image {image} is {width}x{height}')
        highest.append(int(classes.max()))
    names = names or [str(i) for i in range(known or max(highest) + 1)]
    if len(names) < 2:
        raise UserError(f'`data_dir` {folder}: the masks show {len(names)} class; segmentation needs two')
    opened_splits = []
    for pairs in splits:
        unlabeled, highest = highest[: len(pairs)].count(-1), highest[len(pairs) :]
        if unlabeled == len(pairs):
            raise UserError(f'{pairs[0][1].parent}: no mask of the split has a pixel that counts')
        opened_splits.append(MaskSplit(pairs, settings, names, unlabeled))
    return opened_splits[0], opened_splits[1]


def _layout(root: Path, wanted: str) -> str:
    if not root.is_dir():
        raise UserError(f'`data_dir` {root}: no such folder')
    marks = {'voc': root / 'ImageSets' / 'Segmentation', 'ade': root / 'images'}
    found = [layout for layout, mark in marks.items() if mark.is_dir()] if wanted == 'auto' else [wanted]
    if len(found) != 1:
        what = 'both' if found else 'none'
        raise UserError(
            f"`data_dir` {root}: holds {what} of ImageSets/Segmentation/, `layout='voc'`, and images/, 'ade'"
        )
    return found[0]


def _pairs(root: Path, layout: str, split: str) -> list[tuple[Path, Path]]:
    """Image and mask files of a split."""
    if layout == 'voc':
        images, masks = root / 'JPEGImages', root / 'SegmentationClass'
        names = _read_lines(root / 'ImageSets' / 'Segmentation' / f'{split}.txt')
    else:
        part = _ADE_SPLITS.get(split, split)
        images, masks = root / 'images' / part, root / 'annotations' / part
        names = sorted({path.stem for path in images.glob('*') if path.suffix in _SUFFIXES})
    if not names:
        raise UserError(f'{images}: split {split!r} has no images (.jpg or .png) there')
    pairs = []
    for name in names:
        found = [images / f'{name}{suffix}' for suffix in _SUFFIXES if (images / f'{name}{suffix}').is_file()]
        if not found or '..' in Path(name).parts or Path(name).is_absolute():
            raise UserError(f'{split}.txt of {root}: names {name}, but {images / name}.jpg is not there')
        pairs.append((found[0], masks / f'{name}.png'))
        if not pairs[-1][1].is_file():
            raise UserError(f'{found[0]}: has no mask, {pairs[-1][1]} is not there')
    return pairs


def _read_lines(file: Path) -> list[str]:
    """Read the names in a file, a line each."""
    try:
        return [line.strip() for line in file.read_text(encoding='utf-8').splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f'{file}: not a list of names: {one_line(error)}') from None


def voc_palette() -> np.ndarray:
    """The colors of VOC's masks by class, [256, 3], uint8: the bits of a class go round red, green and blue."""
    classes = np.arange(256)
    colors = np.zeros((256, 3), dtype=np.uint8)
    for bit in range(8):
        colors[:, bit % 3] |= ((classes >> bit & 1) << (7 - bit // 3)).astype(np.uint8)
    return colors


def confusion(predicted: Tensor, truth: Tensor, num_classes: int) -> Tensor:
    """Count pixels by true and predicted class, [K, K], int64; those whose truth is `IGNORE` don't count."""
    counted = truth != IGNORE
    pairs = truth[counted].long() * num_classes + predicted[counted].long()
    return torch.bincount(pairs, minlength=num_classes**2).reshape(num_classes, num_classes)


def scores(matrix_KK: Tensor, names: Sequence[str]) -> dict[str, float]:
    """Compute the metrics of a confusion matrix, 0 to 1: miou, pixel_accuracy, mean_accuracy, and `iou/NAME`.

    Intersection over union of a class is its hits over all pixels that are of it or predicted to be (Everingham et al.
    2010, section 4.4). A class that neither is nor is predicted anywhere has none, and does not count in the mean;
    a class without true pixels does not count in the mean accuracy.
    """
    matrix_KK = matrix_KK.double().cpu()
    hits_K, true_K = matrix_KK.diagonal(), matrix_KK.sum(1)
    union_K = true_K + matrix_KK.sum(0) - hits_K
    iou_K = hits_K / union_K
    return {
        'miou': float(iou_K[union_K > 0].mean()),
        'pixel_accuracy': float(hits_K.sum() / true_K.sum()),
        'mean_accuracy': float((hits_K / true_K)[true_K > 0].mean()),
        **{f'iou/{name}': float(iou_K[i]) for i, name in enumerate(names) if union_K[i] > 0},
    }
