"""Transforms that keep image, boxes and masks together, and batches in a seeded order whoever loads them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from torchvision.tv_tensors import Mask

from coco_folders import content, write_coco
from ctc_timm.data.settings import LoaderSettings
from ctc_timm.dense.coco import CocoSplit
from ctc_timm.dense.loading import IGNORE, FitCanvas, TrainLoader, collate, train_transform
from ctc_timm.dense.settings import CanvasSettings
from mask_folders import blocks

BLACK = (0.0, 0.0, 0.0)


def transform(size: int, hflip: float, scale: tuple[float, float], boxes: bool, mean: Any = BLACK) -> Any:
    return train_transform(CanvasSettings(img_size=size, hflip=hflip, scale=scale), mean, boxes=boxes)


@pytest.fixture
def split(tmp_path: Path) -> CocoSplit:
    """Four images of a red square and a green bar."""
    return CocoSplit(write_coco(tmp_path, {'train': content()}), 'train', masks=True)


def test_flip_by_hand(split: CocoSplit) -> None:
    """A flipped box begins where its right side was, counted from the other border; pixels and masks go along."""
    plain, flipped = (transform(32, p, (1.0, 1.0), True)(*copy.deepcopy(split[0])) for p in (0, 1))
    assert plain[1]['boxes'].tolist() == [[2, 4, 12, 14], [18, 2, 24, 22]]
    assert flipped[1]['boxes'].tolist() == [[32 - 12, 4, 32 - 2, 14], [32 - 24, 2, 32 - 18, 22]]
    assert torch.equal(flipped[0], plain[0].flip(-1)) and torch.equal(flipped[1]['masks'], plain[1]['masks'].flip(-1))
    pixels, mask = blocks(1)[0]
    image, target = transform(32, 1.0, (1.0, 1.0), False)(Image.fromarray(pixels), {'mask': Mask(mask)})
    assert np.array_equal(target['mask'].numpy(), mask[:, ::-1])
    assert np.allclose(image.numpy(), pixels[:, ::-1].transpose(2, 0, 1) / 255)


def test_scale_jitter_keeps_boxes_on_their_objects(split: CocoSplit) -> None:
    """After any draw the red pixels of the square are those within its box; labels go with the boxes that are left."""
    jitter, seen = transform(48, 0.5, (0.6, 2.0), True), set()
    for seed in range(12):
        torch.manual_seed(seed)
        image, target = jitter(*split[seed % 4])
        assert image.shape == (3, 48, 48) and len(target['boxes']) == len(target['labels']) == len(target['masks'])
        seen.add(len(target['boxes']))
        for box, label in zip(target['boxes'].tolist(), target['labels'].tolist()):
            rows, columns = (image[label - 1] > 0.5).nonzero().T
            edges = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            assert box == pytest.approx([float(edge) for edge in edges], abs=1.5)
    assert 2 in seen


@pytest.mark.parametrize('seed', range(8))
def test_image_and_semantic_mask_stay_together(seed: int) -> None:
    """A mask that is painted into the image is still there after flip, scale, crop and border, which doesn't count."""
    _, mask = blocks(1, 40)[0]
    painted = np.array([0, 100, 200], dtype=np.uint8)[mask]
    torch.manual_seed(seed)
    jitter = transform(48, 0.5, (0.6, 1.6), False, mean=[1.0] * 3)
    pixels, target = jitter(Image.fromarray(np.stack([painted] * 3, -1)), {'mask': Mask(mask)})
    assert pixels.shape == (3, 48, 48) and target['mask'].shape == (48, 48) and target['mask'].dtype == torch.uint8
    border = target['mask'] == IGNORE
    assert torch.all(pixels[:, border] == 1)
    wanted = torch.tensor([0, 100, 200])[target['mask'].long().clamp(max=2)] / 255
    assert ((pixels[0] - wanted).abs()[~border] > 0.1).float().mean() < 0.12  # at edges, which interpolation mixes


def test_fit_canvas_by_hand() -> None:
    """A 40x20 image on 32 pixels: 32x16 at the upper left, the mean below; masks keep their size."""
    mask = Mask(torch.zeros(20, 40))
    image = Image.new('RGB', (40, 20), (255, 0, 0))
    canvas, target = FitCanvas(32, (0.5, 0.25, 0.75))(image, {'image_id': 1, 'mask': mask})
    assert target['fitted'] == (16, 32) and target['image_id'] == 1 and target['mask'].shape == (20, 40)
    assert torch.equal(canvas[:, :16], torch.tensor([1.0, 0, 0])[:, None, None].expand(3, 16, 32))
    assert torch.equal(canvas[:, 16:], torch.tensor([0.5, 0.25, 0.75])[:, None, None].expand(3, 16, 32))


def test_batches_hold_plain_tensors(split: CocoSplit) -> None:
    """Subclasses would make every operation of the detector slow."""
    images, targets = collate([transform(32, 0, (1, 1), True)(*split[i]) for i in (0, 1)])
    assert {type(image) for image in images} == {torch.Tensor}
    assert {type(t[key]) for t in targets for key in ('boxes', 'labels', 'masks')} == {torch.Tensor}


def test_order_and_images_are_functions_of_seed_epoch_and_index(split: CocoSplit) -> None:
    """Whoever loads them, wherever the epoch begins, and without touching the program's random state."""
    jitter, accelerator = transform(32, 0.5, (0.6, 1.6), True), Accelerator(cpu=True)
    loaders = [TrainLoader(split, jitter, LoaderSettings(2, workers=n), 7, accelerator) for n in (0, 2)]
    loaded = []
    for loader, first in ((loaders[0], 0), (loaders[1], 0), (loaders[0], 1)):
        before = torch.get_rng_state()
        loader.set_epoch(3, first)
        loaded.append(list(loader))
        assert torch.equal(torch.get_rng_state(), before)
    assert len(loaders[0]) == len(loaded[0]) == len(loaded[1]) == 2 and len(loaded[2]) == 1
    order = np.random.default_rng([7, 3]).permutation(4)
    assert [name for batch in loaded[0] for name in loaders[0].image_names(batch)] == [f'{i}.png' for i in order]
    for one, other in (*zip(loaded[0], loaded[1]), (loaded[0][1], loaded[2][0])):
        assert all(torch.equal(a, b) for a, b in zip(one[0], other[0]))
        assert all(torch.equal(a['boxes'], b['boxes']) for a, b in zip(one[1], other[1]))
    loaders[0].set_epoch(4)
    assert not torch.equal(next(iter(loaders[0]))[0][0], loaded[0][0][0][0])
