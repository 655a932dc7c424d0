"""Scenes of handwritten digits, the data of detection and segmentation where none are named.

scikit-learn's digits, enlarged to several sizes and painted in light colors on dark crops of scikit-learn's two
sample photographs, by a seed. Training scenes hold digits of the training split on the left part of the photographs,
validation scenes digits of the validation split on the right part. Digits don't touch, so each mask is whole, and a box
is that of its mask.

S: side of a scene in pixels. M: digits in a scene.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images

from ..data.digits import NUM_CLASSES, DigitsReader
from ..utils.errors import UserError
from .masks import voc_palette
from .settings import ScenesSettings

VERSION = 1  # of what a seed gives; the default folder is named after it
SPLITS = {'train': 'train', 'val': 'validation'}  # names of COCO and VOC, and of the digits
CLASSES = ('background', *(str(digit) for digit in range(NUM_CLASSES)))
_INK = 110  # of 255; from here on a pixel is of the digit
_TRIES = 30  # to place a digit


class Scene(NamedTuple):
    """An image [S, S, 3], masks [M, S, S] of bool, no two of which share a pixel, and M digits, 0 to 9."""

    image: np.ndarray
    masks: np.ndarray
    digits: tuple[int, ...]

    def classes(self) -> np.ndarray:
        """The semantic mask, [S, S], uint8: 0 is background, d + 1 the digit d."""
        labels = np.asarray(self.digits, dtype=np.uint8)[:, None, None] + 1
        return (self.masks * labels).max(axis=0, initial=0).astype(np.uint8)


def compose(split: str, index: int, size: int, seed: int = 0) -> Scene:
    """Make one scene of side `size`; one more scene of a split leaves those before it as they are."""
    rng = np.random.default_rng([seed, list(SPLITS).index(split), index])
    reader, photographs = _sources(split)
    photograph = photographs[int(rng.integers(len(photographs)))]
    side = int(rng.integers(64, min(photograph.size) + 1))
    left, top = (int(rng.integers(length - side + 1)) for length in photograph.size)
    crop = photograph.resize((size, size), Image.Resampling.BILINEAR, (left, top, left + side, top + side))
    canvas = np.asarray(crop, dtype=float) * rng.uniform(0.25, 0.47)
    taken = np.zeros((size, size), dtype=bool)
    masks, digits = [], []
    for _ in range(int(rng.integers(2, 7))):
        which = int(rng.integers(len(reader)))
        height = rng.uniform(0.2, 0.5) * size
        sides = max(8, round(height * rng.uniform(0.85, 1.15))), max(8, round(height))
        ink = np.asarray(Image.fromarray(reader.images[which]).resize(sides, Image.Resampling.BICUBIC))
        left, top, wide, high = _box(ink >= _INK)
        ink = ink[top : top + high, left : left + wide]
        place = _free_place(rng, taken, ink.shape)
        if place is None:
            continue
        taken[place] = True
        mask = np.zeros((size, size), dtype=bool)
        mask[place] = ink >= _INK
        masks.append(mask)
        digits.append(int(reader.labels[which]))
        opacity = np.clip((ink.astype(float) - _INK / 2) / _INK, 0, 1)[..., None]
        canvas[place] += opacity * (rng.uniform(150, 255, 3) - canvas[place])
    canvas += rng.normal(0, 4, canvas.shape)
    return Scene(canvas.round().clip(0, 255).astype(np.uint8), np.stack(masks), tuple(digits))


@lru_cache
def _sources(split: str) -> tuple[DigitsReader, list[Image.Image]]:
    """The digits and the parts of the photographs of a split."""
    cuts = [(pixels, round(0.7 * pixels.shape[1])) for pixels in load_sample_images().images]
    parts = [pixels[:, :cut] if split == 'train' else pixels[:, cut:] for pixels, cut in cuts]
    return DigitsReader(SPLITS[split]), [Image.fromarray(part) for part in parts]


def _free_place(rng: np.random.Generator, taken: np.ndarray, shape: tuple[int, ...]) -> tuple[slice, slice] | None:
    """Where a digit fits with a pixel's distance to all others; None where no place was found."""
    for _ in range(_TRIES):
        top, left = (int(rng.integers(length - side + 1)) for length, side in zip(taken.shape, shape))
        bottom, right = top + shape[0], left + shape[1]
        if not taken[max(top - 1, 0) : bottom + 1, max(left - 1, 0) : right + 1].any():
            return slice(top, bottom), slice(left, right)
    return None


def write_scenes(settings: ScenesSettings) -> Path:
    """Write scenes as a folder that appears complete or not at all; the same seed gives the same bytes.

    Layouts share the folder. In that of ADE background is class 1. `classes.txt` names the classes of semantic masks.

    Raises:
        UserError: The folder holds something.
    """
    folder = Path(settings.output)
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UserError(f'{folder}: exists already; name a new folder for the scenes')
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f'.{folder.name}-{uuid.uuid4().hex[:8]}')
    writers = {'coco': _write_coco, 'voc': _write_voc, 'ade': _write_ade}
    try:
        for split, count in (('train', settings.train_images), ('val', settings.val_images)):
            scenes = [compose(split, i, settings.img_size, settings.seed) for i in range(count)]
            for layout in settings.layouts:
                writers[layout](temporary, split, scenes)
        if set(settings.layouts) - {'coco'}:
            _write(temporary / 'classes.txt', ''.join(f'{name}\n' for name in CLASSES))
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def default_scenes() -> str:
    """The folder of scenes in the user's cache, `ctc_timm/digit-scenes-VERSION`, written when it is not there."""
    cache = Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache')
    folder = cache / 'ctc_timm' / f'digit-scenes-{VERSION}'
    if not folder.is_dir():
        try:
            write_scenes(ScenesSettings(str(folder)))
        except (UserError, OSError):  # another process may have been faster
            if not folder.is_dir():
                raise
    return str(folder)


def _write_coco(folder: Path, split: str, scenes: list[Scene]) -> None:
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number, scene in enumerate(scenes, 1):
        height, width = scene.image.shape[:2]
        images.append({'id': number, 'file_name': f'{number:04d}.png', 'width': width, 'height': height})
        _write(folder / split / images[-1]['file_name'], scene.image)
        for mask, digit in zip(scene.masks, scene.digits):
            row = {'id': len(annotations) + 1, 'image_id': number, 'category_id': digit + 1, 'bbox': _box(mask)}
            row |= {'area': int(mask.sum()), 'iscrowd': 0, 'segmentation': _run_lengths(mask)}
            annotations.append(row)
    categories = [{'id': i, 'name': name, 'supercategory': 'digit'} for i, name in enumerate(CLASSES) if i]
    info = {'description': "Scenes of scikit-learn's handwritten digits", 'version': str(VERSION)}
    content = {'info': info, 'images': images, 'annotations': annotations, 'categories': categories}
    _write(folder / 'annotations' / f'instances_{split}.json', json.dumps(content))


def _run_lengths(mask: np.ndarray) -> dict[str, Any]:
    """A mask as COCO's uncompressed run-length code: lengths of runs down the columns, the first of zeros."""
    flat = mask.flatten(order='F')
    ends = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    counts = np.diff([0, *ends, flat.size]).tolist()
    return {'size': list(mask.shape), 'counts': [0, *counts] if flat[0] else counts}


def _box(mask: np.ndarray) -> list[int]:
    """The box of a mask in COCO's format: left, top, width, height."""
    rows, columns = (mask.any(axis=axis).nonzero()[0] for axis in (1, 0))
    left, top = int(columns[0]), int(rows[0])
    return [left, top, int(columns[-1]) + 1 - left, int(rows[-1]) + 1 - top]


def _write_voc(folder: Path, split: str, scenes: list[Scene]) -> None:
    for number, scene in enumerate(scenes, 1):
        _write(folder / 'JPEGImages' / f'{split}_{number:04d}.jpg', scene.image)
        _write(folder / 'SegmentationClass' / f'{split}_{number:04d}.png', scene.classes(), voc_palette())
    names = ''.join(f'{split}_{number:04d}\n' for number in range(1, len(scenes) + 1))
    _write(folder / 'ImageSets' / 'Segmentation' / f'{split}.txt', names)


def _write_ade(folder: Path, split: str, scenes: list[Scene]) -> None:
    part = {'train': 'training', 'val': 'validation'}[split]
    for number, scene in enumerate(scenes, 1):
        _write(folder / 'images' / part / f'ADE_{split}_{number:08d}.jpg', scene.image)
        _write(folder / 'annotations' / part / f'ADE_{split}_{number:08d}.png', scene.classes() + 1)


def _write(file: Path, content: str | np.ndarray, palette: np.ndarray | None = None) -> None:
    """Write a text or an image."""
    file.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, str):
        file.write_text(content, encoding='utf-8')
        return
    image = Image.fromarray(content)
    if palette is not None:
        image.putpalette(palette.tobytes())
    image.save(file, quality=95)  # of JPEG
