"""Detection from a model's losses to a run's files."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from coco_folders import content, write_coco
from PIL import Image
from processes import run_processes
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from runs import Ended, forget_processes
from safetensors.torch import load_file
from stops import stop_and_go_on

import ctc_timm
from ctc_timm.data.settings import LoaderSettings
from ctc_timm.dense import detection
from ctc_timm.dense.coco import CocoSplit, open_coco
from ctc_timm.dense.detection import DetectionEvaluator, DetectionTask, create_detector, extra_levels
from ctc_timm.dense.loading import FitCanvas, collate, train_transform
from ctc_timm.dense.pyramid import open_pyramid
from ctc_timm.dense.settings import BackboneSettings, CanvasSettings, DetectorSettings, DetectSettings
from ctc_timm.models.settings import SourceSettings
from ctc_timm.runs import Run
from ctc_timm.training.build import train
from ctc_timm.utils.errors import UserError
from ctc_timm.utils.settings import build
from ctc_timm.utils.yaml_files import read_recipe

Script = Callable[..., Ended]
KINDS = ('fasterrcnn', 'maskrcnn', 'retinanet')
GRAY = [0.5, 0.5, 0.5]
_RCNN = {'loss_classifier', 'loss_box_reg', 'loss_objectness', 'loss_rpn_box_reg'}
LOSSES = {'fasterrcnn': _RCNN, 'maskrcnn': _RCNN | {'loss_mask'}, 'retinanet': {'classification', 'bbox_regression'}}
SMALL: dict[str, Any] = {
    **dict(img_size=32, batch_size=2, workers=0, epochs=2, fpn_channels=16, head_channels=32, hflip=0, scale=(1, 1)),
    'detector_kwargs': {
        **dict(rpn_pre_nms_top_n_train=50, rpn_post_nms_top_n_train=30, box_batch_size_per_image=16),
        'box_score_thresh': 0,
    },
}
SCRATCH: dict[str, Any] = {'model': 'cifar_resnet20', 'from_scratch': True}
_WORDS = """--model cifar_resnet20 --from-scratch --img-size 32 -b 2 -j 0 --epochs 2 --fpn-channels 16
--head-channels 32 --scale 0.8 1.2 --detector-kwargs rpn_pre_nms_top_n_train=50 box_batch_size_per_image=16"""


def detector_of(kind: str, size: int = 32, **options: Any) -> DetectionTask:
    torch.manual_seed(0)
    backbone = BackboneSettings(from_scratch=True, fpn_channels=32)
    pyramid = open_pyramid(SourceSettings(model='cifar_resnet20'), backbone, size, extra_levels(kind, 32))
    settings = build(DetectorSettings, {'detector': kind, 'head_channels': 64, **options})
    return DetectionTask(create_detector(settings, pyramid, 2, size, GRAY, GRAY), torch.device('cpu')).train()


@pytest.fixture(scope='module')
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six training and three validation images."""
    return write_coco(tmp_path_factory.mktemp('data') / 'coco', {'train': content(6), 'val': content(3)})


@pytest.fixture(scope='module')
def source(tmp_path_factory: pytest.TempPathFactory, flags: Any, tiny: list[str]) -> Run:
    """A classifier's run of an epoch."""
    forget_processes()
    words = f'--mode vanilla --epochs 1 --experiment source --output {tmp_path_factory.mktemp("runs")}'
    return train(flags(*tiny, words))


def has_ink(file: Path) -> bool:
    return len(np.unique(np.asarray(Image.open(file).convert('L')))) > 20


@pytest.mark.parametrize('kind', KINDS)
def test_two_images_are_memorized(kind: str, tmp_path: Path) -> None:
    """From losses that reach every parameter to the boxes, masks and picture of two images."""
    split = CocoSplit(write_coco(tmp_path, {'train': content(2)}), 'train', masks=kind == 'maskrcnn')
    still = train_transform(CanvasSettings(img_size=32, hflip=0, scale=(1, 1)), GRAY, boxes=True)
    batch, task = collate([still(*split[0]), still(*split[1])]), detector_of(kind)
    losses = task.run_batch(batch)
    assert set(losses) == {'loss'} | LOSSES[kind]
    assert losses['loss'].item() == pytest.approx(sum(losses[name].item() for name in LOSSES[kind]), rel=1e-5)
    losses['loss'].backward()
    assert not [name for name, p in task.named_parameters() if p.grad is None]
    optimizer = torch.optim.AdamW(task.parameters(), lr=2e-3)
    for _ in range(150 if kind == 'retinanet' else 45):
        optimizer.zero_grad()
        task.run_batch(batch)['loss'].backward()
        optimizer.step()
    evaluator = DetectionEvaluator(split, FitCanvas(32, GRAY), LoaderSettings(2, workers=0), Accelerator(cpu=True))
    metrics = evaluator(task.eval_model)
    assert min(value for name, value in metrics.items() if name.endswith('ap50')) > 0.9
    assert ('mask_ap50' in metrics) == (kind == 'maskrcnn')
    evaluator.draw(task.eval_model, Run(tmp_path), range(2))
    assert has_ink(tmp_path / 'plots' / 'detections.png')


@pytest.mark.parametrize('kind', KINDS)
def test_images_without_objects(kind: str) -> None:
    """Negatives alone give finite losses."""
    target = {'boxes': torch.zeros(0, 4), 'labels': torch.zeros(0, dtype=torch.int64), 'masks': torch.zeros(0, 32, 32)}
    losses = detector_of(kind).run_batch(([torch.rand(3, 32, 32)] * 2, [target] * 2))
    assert all(loss.isfinite() for loss in losses.values())
    losses['loss'].backward()


def test_anchors_and_images() -> None:
    """Anchors are eight strides a side, at each level and the one on top; images are neither resized nor padded."""
    model: Any = detector_of('fasterrcnn', 40).eval_model
    assert model.rpn.anchor_generator.sizes == ((16,), (32,), (64,))
    smaller: Any = detector_of('fasterrcnn', anchor_scale=4).eval_model
    assert smaller.rpn.anchor_generator.sizes == ((8,), (16,), (32,))
    seen: list[torch.Tensor] = []
    model.backbone.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    images = [torch.rand(3, 40, 40), torch.rand(3, 40, 40)]
    target = {'boxes': torch.tensor([[4.0, 4.0, 20.0, 20.0]]), 'labels': torch.tensor([1])}
    for training in (True, False):
        model.train(training)(images, [target, target])
    for pixels in seen:
        torch.testing.assert_close(pixels, (torch.stack(images) - 0.5) / 0.5)


@pytest.mark.parametrize('kind', KINDS)
def test_every_detector_takes_the_recipe_of_the_scenes(kind: str) -> None:
    """But for RetinaNet's sizes of a second stage, which it has none of."""
    recipe = read_recipe('detect_digits')
    if kind == 'retinanet':
        del recipe['detector_kwargs']
    settings = build(DetectSettings, {**recipe, 'detector': kind})
    extra = extra_levels(kind, settings.backbone.fpn_channels)
    pyramid = open_pyramid(settings.source, settings.backbone, settings.canvas.img_size, extra)
    create_detector(settings.detector, pyramid, 10, 96, GRAY, GRAY)


def test_a_run_and_what_it_leaves(source: Run, data: Path, tmp_path: Path) -> None:
    """Mask R-CNN on a run's weights: all files say the same, and what is frozen keeps its bits."""
    run = ctc_timm.detect(
        source,
        **{**SMALL, 'data_dir': data, 'detector': 'maskrcnn', 'freeze_stages': 2, 'freeze_bn': True},
        **dict(layer_decay=0.8, clip_grad=1, output=tmp_path, experiment='run'),
    )
    results, rows = json.loads((run.path / 'results.json').read_text()), run.rows()
    assert run.path == tmp_path / 'run' and [int(row['epoch']) for row in rows] == [0, 1]
    for name in ('box_ap', 'box_ap50', 'mask_ap', 'mask_ap50'):
        assert float(rows[-1][f'eval_{name}']) == pytest.approx(results['metrics'][name], abs=1e-6)
        assert 0 <= results['metrics'][name] <= 1
    assert rows[-1]['eval_box_ap_large'] == ''
    assert results['weights'] == str(source.best_weights) and results['images'] == {'train': 6, 'val': 3}
    assert has_ink(run.plots / 'training.png') and has_ink(run.plots / 'detections.png')
    summary = run.summary()
    assert (summary.mode, summary.model, summary.epochs) == ('detect', 'test_resnet', 2)

    before, after = load_file(source.best_weights), load_file(run.last_weights)
    prefix = 'backbone.body.model.'
    same = {name: torch.equal(before[name], after[prefix + name]) for name in before if prefix + name in after}
    frozen = {name for name in same if name.startswith(('conv1', 'bn1', 'layer1'))}
    assert frozen and all(same[name] for name in frozen) and not same['layer4.0.conv1.weight']


def test_the_score_is_that_of_the_annotations_file(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """COCO's tools, given the file itself and the detections, say the same."""
    seen: list[list[dict[str, Any]]] = []
    evaluate = detection.evaluate_results
    monkeypatch.setattr(detection, 'evaluate_results', lambda split, rows: seen.append(rows) or evaluate(split, rows))
    run = ctc_timm.detect(**{**SCRATCH, **SMALL, 'epochs': 12, 'lr': 2e-3}, data_dir=data, output=tmp_path)
    truth = COCO(str(data / 'annotations' / 'instances_val.json'))
    evaluation = COCOeval(truth, truth.loadRes(seen[-1]), 'bbox')
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    assert evaluation.stats[0] > 0.1 and {row['category_id'] for row in seen[-1]} == {3, 11}
    assert json.loads((run.path / 'results.json').read_text())['metrics']['box_ap'] == pytest.approx(
        evaluation.stats[0]
    )


def detect_in_process(words: dict[str, Any], rank: int, world: int) -> str:
    forget_processes()
    return str(ctc_timm.detect(**words))


def test_processes_share_the_evaluation(data: Path, tmp_path: Path) -> None:
    """Two processes get the numbers that one process gets from the weights that they leave."""
    words = {**SCRATCH, **SMALL, 'data_dir': data, 'output': tmp_path, 'experiment': 'two'}
    assert run_processes(partial(detect_in_process, words), 2, tmp_path) == [str(tmp_path / 'two')] * 2
    forget_processes()
    settings = build(DetectSettings, {**SCRATCH, **SMALL})
    pyramid = open_pyramid(settings.source, settings.backbone, 32, extra_levels('fasterrcnn', 16))
    mean, std = pyramid.normalization(settings.canvas)
    model = create_detector(settings.detector, pyramid, 2, 32, mean, std)
    model.load_state_dict(load_file(tmp_path / 'two' / 'last.safetensors'))
    evaluator = DetectionEvaluator(open_coco(data)[1], FitCanvas(32, mean), settings.loader, Accelerator(cpu=True))
    metrics = json.loads((tmp_path / 'two' / 'results.json').read_text())['metrics']
    assert evaluator(model) == pytest.approx(metrics, abs=1e-6)


def test_a_killed_run_goes_on_with_no_flag_typed_again(data: Path, tmp_path: Path, script: Script) -> None:
    """Exit code 75; then the same bits as without the stop, from the run's own arguments."""
    words = [*_WORDS.split(), '--data-dir', str(data)]
    stop_and_go_on(script, 'transfer/detect.py', words, tmp_path, DetectionTask, 'run_batch')


MISTAKES: list[tuple[dict[str, Any], str]] = [
    ({'model': ''}, 'name a model: a run folder'),
    ({'detector_kwargs': {'box_bach': 3}}, "`detector_kwargs`: torchvision's FasterRCNN has no box_bach"),
    ({'freeze_stages': 9}, '`freeze_stages` 9: cifar_resnet20 has 4 stages, stem included'),
    ({'batch_size': 7}, '`batch_size` 7 times 1 process.* is more than the 6 training images'),
    ({'source': '{run}'}, '`from_scratch`: needs `model` with a timm name, got .*source'),
    ({'data_dir': '{}/nowhere'}, 'nowhere: no annotations'),
    ({'data_dir': '{}/nomasks', 'detector': 'maskrcnn'}, 'the segmentation of annotation 1: '),
    ({'data_dir': '{}/other'}, 'instances_val.json: has no category 11, which instances_train.json has'),
    ({'resume': '{}/other'}, 'no run with a saved state there'),
]


@pytest.mark.parametrize('words,message', MISTAKES, ids=[next(iter(words)) for words, _ in MISTAKES])
def test_mistakes(source: Run, data: Path, tmp_path: Path, words: dict[str, Any], message: str) -> None:
    """No run is left."""
    unmasked = content(3)
    unmasked['annotations'][0]['segmentation'] = []
    write_coco(tmp_path / 'nomasks', {'train': unmasked, 'val': content(2)})
    other = {**content(2), 'categories': content()['categories'][:1], 'annotations': content()['annotations'][:1]}
    write_coco(tmp_path / 'other', {'train': content(2), 'val': other})
    filled = {
        k: v.replace('{run}', str(source)).format(tmp_path) if isinstance(v, str) else v for k, v in words.items()
    }
    with pytest.raises(UserError, match=message):
        ctc_timm.detect(**{**SCRATCH, **SMALL, 'data_dir': data, 'output': tmp_path / 'runs', **filled})
    assert not (tmp_path / 'runs').exists()
