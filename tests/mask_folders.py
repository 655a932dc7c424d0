"""Small folders of images with semantic masks for tests."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image


def blocks(count: int, size: int = 32) -> list[tuple[np.ndarray, np.ndarray]]:
    """Images [S, S, 3] with a red and a green block, and their masks [S, S] of classes 0, 1, 2."""
    rng = np.random.default_rng(0)
    pairs = []
    for i in range(count):
        image = rng.integers(0, 40, (size, size, 3), dtype=np.uint8)
        mask = np.zeros((size, size), dtype=np.uint8)
        for label, (top, left) in ((1, (2 + i % 4, 2)), (2, (18, 16 + i % 4))):
            image[top : top + 12, left : left + 10, label - 1] = 220
            mask[top : top + 12, left : left + 10] = label
        pairs.append((image, mask))
    return pairs


def write_voc(folder: Path, train: int = 6, val: int = 3) -> Path:
    """Blocks in VOC's layout, a pixel of each mask ignored."""
    for part in ('JPEGImages', 'SegmentationClass', 'ImageSets/Segmentation'):
        (folder / part).mkdir(parents=True)
    for split, count in (('train', train), ('val', val)):
        for i, (image, mask) in enumerate(blocks(count)):
            mask[0, 0] = 255
            Image.fromarray(image).save(folder / 'JPEGImages' / f'{split}{i}.jpg', quality=95)
            Image.fromarray(mask).save(folder / 'SegmentationClass' / f'{split}{i}.png')
        names = ''.join(f'{split}{i}\n' for i in range(count))
        (folder / 'ImageSets' / 'Segmentation' / f'{split}.txt').write_text(names)
    return folder


def write_ade(folder: Path, train: int = 4, val: int = 2) -> Path:
    """Blocks in ADE's layout: classes count from 1, a pixel of each mask is unlabeled."""
    for part, count in (('training', train), ('validation', val)):
        (folder / 'images' / part).mkdir(parents=True)
        (folder / 'annotations' / part).mkdir(parents=True)
        for i, (image, mask) in enumerate(blocks(count)):
            values = mask + 1
            values[0, 0] = 0
            Image.fromarray(image).save(folder / 'images' / part / f'{i}.jpg')
            Image.fromarray(values).save(folder / 'annotations' / part / f'{i}.png')
    return folder
