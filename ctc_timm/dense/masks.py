"""Folders of images with semantic masks, as VOC and ADE lay them out.

VOC: `ImageSets/Segmentation/SPLIT.txt` names the images of a split, `JPEGImages/NAME.jpg` are the images and
`SegmentationClass/NAME.png` their masks. ADE: `images/training/NAME.jpg` and `annotations/training/NAME.png`,
likewise `validation`. A mask holds a class for every pixel, in a PNG of gray values or with a palette, whose colors
don't matter. A file `classes.txt` beside them may name the classes, a line each.

H, W: of an image. K: classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset
from torchvision.transforms import v2
from torchvision.tv_tensors import Image as ImageTensor
from torchvision.tv_tensors import Mask

from ..data.decoding import read_image
from ..utils.errors import UserError, one_line

IGNORE = 255  # in the masks that datasets give
MOST_CLASSES = 255
LAYOUTS = ('voc', 'ade')
_ADE_SPLITS = {'train': 'training', 'val': 'validation'}
_SUFFIXES = ('.jpg', '.jpeg', '.png', '.JPG', '.JPEG', '.PNG')
_DAMAGE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)


@dataclass(frozen=True)
class Coding:
    """What the values of mask files mean.

    Attributes:
        ignore_index: The value of pixels that don't count.
        reduce_zero: Whether 0 doesn't count either, and 1 is the first class, as in ADE20K.
    """

    ignore_index: int = 255
    reduce_zero: bool = False

    def read(self, path: Path) -> np.ndarray:
        """The classes in a mask's file, [H, W], int32, -1 for pixels that don't count.

        Raises:
            UserError: Not an image, or one of colors.
        """
        try:
            with Image.open(path) as opened:
                if opened.mode not in ('1', 'L', 'P', 'I', 'I;16'):
                    raise UserError(f'{path}: has colors ({opened.mode}), not a class for each pixel (L or P)')
                values = np.asarray(opened).astype(np.int32)
        except UserError:
            raise
        except _DAMAGE as error:
            raise UserError(f'{path}: not a mask that can be read: {one_line(error)}') from None
        counted = values != self.ignore_index
        if self.reduce_zero:
            counted &= values != 0
            values = values - 1
        return np.where(counted, values, -1)

    def check(self, classes: np.ndarray, num_classes: int, path: Path) -> None:
        """Refuse a value without a class.

        Raises:
            UserError: Naming the value as it stands in the file.
        """
        highest, lowest = int(classes.max()), int(classes.min())
        if highest < num_classes and lowest >= -1:
            return
        value = (highest if highest >= num_classes else lowest) + self.reduce_zero
        first = int(self.reduce_zero)
        hint = '' if self.reduce_zero else "; --reduce-zero-label is for ADE20K's, which count from 1"
        raise UserError(
            f'{path}: holds the value {value}, which is no class; classes are {first} to {num_classes - 1 + first}, '
            f'{self.ignore_index} is ignored{hint}'
        )


@dataclass(frozen=True)
class MaskSplit:
    """A split, checked.

    Attributes:
        folder: Of the data set.
        pairs: Image and mask.
        names: Of the K classes.
        coding: Of the mask files.
        unlabeled: Images without a pixel that counts; they are kept.
    """

    folder: Path
    pairs: list[tuple[Path, Path]]
    names: list[str]
    coding: Coding
    unlabeled: int

    def told(self) -> str:
        """The split in a line."""
        more = f', {self.unlabeled} without a pixel that counts' if self.unlabeled else ''
        return f'{len(self.pairs):,} images, {len(self.names)} classes{more}'


def open_masks(
    folder: str,
    splits: Iterable[str],
    layout: str = 'auto',
    num_classes: int | None = None,
    coding: Coding | None = None,
    progress: Callable[[list[Any]], Iterable[Any]] = iter,
) -> list[MaskSplit]:
    """Open splits of a folder and read all of their masks once.

    Args:
        folder: Of the data set.
        splits: Names as VOC has them; 'train' is ADE's 'training', and 'val' its 'validation'.
        layout: Of `LAYOUTS`, or 'auto' for the one that is there.
        num_classes: K; when None as many as `classes.txt` names, or else as the masks show.
        coding: Of the mask files.
        progress: Goes around what is read.

    Raises:
        UserError: Nothing there, an image without a mask, a mask of another size or with a value without a class, a
            file that can't be read.
    """
    root, coding = Path(folder), coding or Coding()
    if not root.is_dir():
        raise UserError(f'--data-dir {folder}: no such folder')
    layout = _layout(root) if layout == 'auto' else layout
    find = _voc_pairs if layout == 'voc' else _ade_pairs
    found = [find(root, split) for split in splits]
    names = _names(root)
    if num_classes is not None and names and len(names) != num_classes:
        raise UserError(f'--num-classes {num_classes}: {root / "classes.txt"} names {len(names)} classes')
    known = num_classes or len(names) or None
    highest, unlabeled = -1, []
    todo = [(i, *pair) for i, pairs in enumerate(found) for pair in pairs]
    empty = [0] * len(found)
    for which, image, mask in progress(todo):
        classes = coding.read(mask)
        _check_size(image, mask, classes.shape)
        coding.check(classes, known or MOST_CLASSES, mask)
        highest = max(highest, int(classes.max()))
        empty[which] += int(classes.max() < 0)
    for pairs, none in zip(found, empty):
        if none == len(pairs):
            raise UserError(f'{pairs[0][1].parent}: no mask of the split has a pixel that counts')
        unlabeled.append(none)
    names = names or [str(i) for i in range(known or highest + 1)]
    if len(names) < 2:
        raise UserError(f'--data-dir {folder}: the masks show {len(names)} class; segmentation needs two')
    return [MaskSplit(root, pairs, names, coding, none) for pairs, none in zip(found, unlabeled)]


def _layout(root: Path) -> str:
    voc, ade = (root / 'ImageSets' / 'Segmentation').is_dir(), (root / 'images').is_dir()
    if voc and ade:
        raise UserError(f'--data-dir {root}: holds the layouts of VOC and of ADE; say which by --layout')
    if not voc and not ade:
        raise UserError(f'--data-dir {root}: neither ImageSets/Segmentation/ (VOC) nor images/training/ (ADE) is in it')
    return 'voc' if voc else 'ade'


def _voc_pairs(root: Path, split: str) -> list[tuple[Path, Path]]:
    file = root / 'ImageSets' / 'Segmentation' / f'{split}.txt'
    try:
        names = [line.strip() for line in file.read_text(encoding='utf-8').splitlines() if line.strip()]
    except FileNotFoundError:
        there = ', '.join(sorted(path.stem for path in file.parent.glob('*.txt'))) or 'none'
        raise UserError(f'{file}: no such file; splits there: {there}') from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f'{file}: not a list of names: {one_line(error)}') from None
    if not names:
        raise UserError(f'{file}: names no image')
    pairs = []
    for name in names:
        if Path(name).is_absolute() or '..' in Path(name).parts:
            raise UserError(f'{file}: names {name}, which lies outside of {root}')
        image = next((p for p in (root / 'JPEGImages' / f'{name}{s}' for s in _SUFFIXES) if p.is_file()), None)
        if image is None:
            raise UserError(f'{file}: names {name}, but {root / "JPEGImages" / name}.jpg is not there')
        pairs.append((image, _mask_of(image, root / 'SegmentationClass' / f'{name}.png')))
    return pairs


def _ade_pairs(root: Path, split: str) -> list[tuple[Path, Path]]:
    part = _ADE_SPLITS.get(split, split)
    folder = root / 'images' / part
    if not folder.is_dir():
        raise UserError(f'{folder}: no such folder')
    images = sorted(path for path in folder.iterdir() if path.suffix in _SUFFIXES)
    if not images:
        raise UserError(f'{folder}: holds no image (.jpg or .png)')
    return [(image, _mask_of(image, root / 'annotations' / part / f'{image.stem}.png')) for image in images]


def _mask_of(image: Path, mask: Path) -> Path:
    if not mask.is_file():
        raise UserError(f'{image}: has no mask, {mask} is not there')
    return mask


def _check_size(image: Path, mask: Path, shape: tuple[int, ...]) -> None:
    try:
        with Image.open(image) as opened:
            width, height = opened.size
    except _DAMAGE as error:
        raise UserError(f'{image}: not an image that can be read: {one_line(error)}') from None
    if (height, width) != shape:
        raise UserError(f'{mask}: is {shape[1]}x{shape[0]}, but its image {image} is {width}x{height}')


def _names(root: Path) -> list[str]:
    file = root / 'classes.txt'
    if not file.is_file():
        return []
    try:
        names = [line.strip() for line in file.read_text(encoding='utf-8').splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f'{file}: not a list of names: {one_line(error)}') from None
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None or not 2 <= len(names) <= MOST_CLASSES:
        what = f'names {twice} twice' if twice is not None else f'names {len(names)} classes'
        raise UserError(f'{file}: {what}; it must give 2 to {MOST_CLASSES} classes names of their own')
    return names


class MaskDataset(Dataset):
    """Images with their masks.

    An item is (image, target): the target has `mask`, [H, W], uint8, `IGNORE` where a pixel doesn't count.

    Args:
        split: What is in it.
        transform: transform(image, target), as torchvision.transforms.v2 has them.
        mode: PIL mode of the images.
    """

    def __init__(self, split: MaskSplit, transform: Callable[[Any, Any], Any] | None = None, mode: str = 'RGB') -> None:
        self.split = split
        self.transform = transform
        self.mode = mode

    def __len__(self) -> int:
        return len(self.split.pairs)

    def __getitem__(self, index: int) -> tuple[Any, dict[str, Any]]:
        path, mask = self.split.pairs[index]
        coding = self.split.coding
        classes = coding.read(mask)
        coding.check(classes, len(self.split.names), mask)
        target = {'mask': Mask(torch.from_numpy(np.where(classes < 0, IGNORE, classes).astype(np.uint8)))}
        try:
            image = read_image(path.open('rb'), self.mode)
        except OSError as error:
            raise UserError(f'{path}: not an image that can be read: {one_line(error)}') from None
        return self.transform(image, target) if self.transform else (image, target)


def mask_transform(img_size: int, hflip: float, scale: tuple[float, float], mean: list[float]) -> v2.Compose:
    """The training transform of (image, target): flip, random scale, crop or border, the same for image and mask.

    Args:
        img_size: Side of the canvas.
        hflip: Probability of a flip.
        scale: Range of the image's size over that which fits the canvas.
        mean: Of the channels, of 1; the border's color. The border doesn't count.

    Returns:
        To a float image in 0 to 1 and a mask of the same size.
    """
    size = (img_size, img_size)
    fill: dict[Any, Any] = {ImageTensor: [round(255 * value) for value in mean], Mask: IGNORE}
    steps: list[Any] = [v2.ToImage(), v2.RandomHorizontalFlip(hflip), v2.ScaleJitter(size, scale)]
    steps += [v2.RandomCrop(size, pad_if_needed=True, fill=fill), v2.ToDtype(torch.float32, scale=True)]
    return v2.Compose(steps)


def voc_palette() -> np.ndarray:
    """The colors of VOC's masks by class, [256, 3], uint8: the bits of a class go round red, green and blue."""
    classes = np.arange(256)
    colors = np.zeros((256, 3), dtype=np.uint8)
    for bit in range(8):
        colors[:, bit % 3] |= ((classes >> bit & 1) << (7 - bit // 3)).astype(np.uint8)
    return colors
