"""Runs of detection and segmentation, from a command's settings to what is left in a folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from safetensors.torch import load_file
from sklearn.metrics import jaccard_score

import ctc_timm
from coco_folders import content, write_coco
from ctc_timm.dense import detection, segmentation
from ctc_timm.runs import Run
from ctc_timm.training.build import train
from ctc_timm.utils.errors import UserError
from mask_folders import write_ade, write_voc
from processes import run_processes
from runs import Ended, forget_processes
from stops import stop_and_go_on

_SMALL: dict[str, Any] = dict(img_size=32, batch_size=2, workers=0, epochs=2, fpn_channels=16, hflip=0)
_FEW = dict(rpn_pre_nms_top_n_train=50, rpn_post_nms_top_n_train=30, box_batch_size_per_image=16, box_score_thresh=0)
SMALL: dict[str, dict[str, Any]] = {
    'detect': {**_SMALL, 'head_channels': 32, 'scale': (1, 1), 'detector_kwargs': _FEW},
    'segment': {**_SMALL, 'head_channels': 16, 'scale': (0.8, 1.2)},
}
SCRATCH: dict[str, Any] = {'model': 'cifar_resnet20', 'from_scratch': True}
COMMANDS = pytest.mark.parametrize('command', SMALL)
WORDS = '--model cifar_resnet20 --from-scratch --img-size 32 -b 2 -j 0 --epochs 2 --fpn-channels 16 --scale 0.8 1.2 '
STOPPED = {
    'detect': '--head-channels 32 --detector-kwargs rpn_pre_nms_top_n_train=50 box_batch_size_per_image=16',
    'segment': '--head deeplabv3 --layer-decay 0.7 --clip-grad 1 --hflip 0',
}


def start(command: str, **values: Any) -> Run:
    forget_processes()
    return getattr(ctc_timm, command)(**values)


def results_of(run: Run) -> dict[str, Any]:
    return json.loads((run.path / 'results.json').read_text())


@pytest.fixture(scope='module')
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Six training and three validation images for each command."""
    folder = tmp_path_factory.mktemp('data')
    coco = write_coco(folder / 'coco', {'train': content(6), 'val': content(3)})
    return {'detect': coco, 'segment': write_voc(folder / 'voc')}


@pytest.fixture(scope='module')
def sources(tmp_path_factory: pytest.TempPathFactory, flags: Any, tiny: list[str]) -> dict[str, Run]:
    """A classifier's run of an epoch for each command, of one channel for segmentation."""
    folder, runs = tmp_path_factory.mktemp('runs'), {}
    for command, channels in (('detect', 3), ('segment', 1)):
        forget_processes()
        words = f'--mode vanilla --epochs 1 --in-chans {channels} --output {folder} --experiment {command}'
        runs[command] = train(flags(*tiny, words))
    return runs


@COMMANDS
def test_a_run_and_what_it_leaves(
    sources: dict[str, Run], data: dict[str, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str], command: str
) -> None:
    """On a run's weights: all files and the output say the same, and what is frozen keeps its bits."""
    source, names, picture = sources[command], ['miou', 'pixel_accuracy', 'mean_accuracy'], 'masks.png'
    options = {**SMALL[command], 'freeze_stages': 2, 'freeze_bn': True, 'layer_decay': 0.8, 'clip_grad': 1}
    if command == 'detect':
        names, picture = ['box_ap', 'box_ap50', 'mask_ap', 'mask_ap50'], 'detections.png'
        options['detector'] = 'maskrcnn'
    run = start(command, source=source, data_dir=data[command], output=tmp_path, experiment='run', **options)
    results, rows, out = results_of(run), run.rows(), capfd.readouterr().out
    metrics = results['metrics']
    assert run.path == tmp_path / 'run' and [int(row['epoch']) for row in rows] == [0, 1]
    for name in names:
        assert float(rows[-1][f'eval_{name}']) == pytest.approx(metrics[name], abs=1e-6) and 0 <= metrics[name] <= 1
    assert results['weights'] == str(source.best_weights) and results['images'] == {'train': 6, 'val': 3}
    assert f'{source}/best.safetensors' in out and '6 images' in out and f'{100 * metrics[names[0]]:.2f}' in out
    assert rows[-1].get('eval_box_ap_large', '') == ''
    for file in (run.plots / 'training.png', run.plots / picture):
        assert len(np.unique(np.asarray(Image.open(file).convert('L')))) > 20
    summary = run.summary()
    assert (summary.mode, summary.model, summary.epochs) == (command, 'test_resnet', 2)

    before, after = load_file(source.best_weights), load_file(run.last_weights)
    prefix = 'backbone.body.model.'
    same = {name: torch.equal(before[name], after[prefix + name]) for name in before if prefix + name in after}
    frozen = {name for name in same if name.startswith(('conv1', 'bn1', 'layer1'))}
    assert frozen and all(same[name] for name in frozen) and not same['layer4.0.conv1.weight']


def test_the_score_is_that_of_the_annotations_file(
    data: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """COCO's tools, given the file itself and the detections, say the same."""
    seen: list[list[dict[str, Any]]] = []
    evaluate = detection.evaluate_results
    monkeypatch.setattr(detection, 'evaluate_results', lambda split, rows: seen.append(rows) or evaluate(split, rows))
    options = {**SCRATCH, **SMALL['detect'], 'epochs': 12, 'lr': 2e-3}
    run = start('detect', **options, data_dir=data['detect'], output=tmp_path)
    truth = COCO(str(data['detect'] / 'annotations' / 'instances_val.json'))
    evaluation = COCOeval(truth, truth.loadRes(seen[-1]), 'bbox')
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    assert evaluation.stats[0] > 0.1 and {row['category_id'] for row in seen[-1]} == {3, 11}
    assert results_of(run)['metrics']['box_ap'] == pytest.approx(evaluation.stats[0])


def test_it_learns_and_the_score_is_scikit_learns(
    data: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks of two colors are found; jaccard_score over all counted pixels says the same."""
    seen: list[tuple[torch.Tensor, ...]] = []
    count = segmentation.confusion
    monkeypatch.setattr(segmentation, 'confusion', lambda *args: seen.append(args[:2]) or count(*args))
    options = {**SCRATCH, **SMALL['segment'], 'epochs': 14, 'lr': 5e-3, 'scale': (1, 1)}
    miou = results_of(start('segment', **options, data_dir=data['segment'], output=tmp_path))['metrics']['miou']
    predicted, truth = (torch.cat([pair[i].flatten() for pair in seen[-3:]]).numpy() for i in (0, 1))
    counted = truth != 255
    assert (~counted).sum() == 3 and miou > 0.8
    assert miou == pytest.approx(jaccard_score(truth[counted], predicted[counted], average='macro'), abs=1e-6)


def start_in_process(command: str, values: dict[str, Any], rank: int, world: int) -> str:
    return str(start(command, **values))


@COMMANDS
def test_processes_share_the_evaluation(data: dict[str, Path], tmp_path: Path, command: str) -> None:
    """Two processes get the numbers that one process gets from the weights that they leave."""
    values = {**SCRATCH, **SMALL[command], 'data_dir': data[command], 'output': tmp_path, 'experiment': 'two'}
    run = Run(tmp_path / 'two')
    assert run_processes(partial(start_in_process, command, values), 2, tmp_path) == [str(run)] * 2
    shared = results_of(run)['metrics']
    (run.path / 'results.json').unlink()
    start(command, resume=run)  # which has nothing left to train
    assert results_of(run)['metrics'] == pytest.approx(shared, abs=1e-6)


@COMMANDS
def test_a_killed_run_goes_on_with_no_flag_typed_again(
    data: dict[str, Path], tmp_path: Path, script: Callable[..., Ended], command: str
) -> None:
    """Exit code 75; then the same bits as without the stop, from the run's own arguments."""
    words = [*(WORDS + STOPPED[command]).split(), '--data-dir', str(data[command])]
    task = detection.DetectionTask if command == 'detect' else segmentation.SegmentationTask
    stop_and_go_on(script, f'transfer/{command}.py', words, tmp_path, task, 'run_batch')


MISTAKES: list[tuple[str, dict[str, Any], str]] = [
    ('detect', {'model': ''}, 'name a model: a run folder'),
    ('detect', {'detector_kwargs': {'box_bach': 3}}, "`detector_kwargs`: torchvision's FasterRCNN has no box_bach"),
    ('detect', {'batch_size': 7}, '`batch_size` 7 times 1 process.* is more than the 6 training images'),
    ('detect', {'source': '{run}'}, '`from_scratch`: needs `model` with a timm name, got .*detect'),
    ('detect', {'data_dir': '{}/nowhere'}, 'nowhere: no annotations'),
    ('detect', {'data_dir': '{}/other'}, 'instances_val.json: has no category 11, which instances_train.json has'),
    ('detect', {'resume': '{}/other'}, 'no run with a saved state there'),
    ('segment', {'head': 'deeplabv3', 'batch_size': 1}, '`batch_size` 1: the batch norm of deeplabv3 needs two images'),
    ('segment', {'output_stride': 8}, '`output_stride` 8: the last map of cifar_resnet20 has stride 2 with it'),
    ('segment', {'scale': (2, 1)}, '`scale` 2 1: the first must not be above the second'),
    ('segment', {'num_classes': 2}, 'holds the value 2, which is no class; classes are 0 to 1, 255 is ignored'),
    ('segment', {'layout': 'ade'}, 'images/training: split .train. has no images'),
    ('segment', {'data_dir': 'nowhere'}, '`data_dir` nowhere: no such folder'),
]


@pytest.mark.parametrize('command,values,message', MISTAKES, ids=[f'{m[0]}-{next(iter(m[1]))}' for m in MISTAKES])
def test_mistakes(
    sources: dict[str, Run], data: dict[str, Path], tmp_path: Path, command: str, values: dict[str, Any], message: str
) -> None:
    """No run is left."""
    other = content(2)
    other |= {'categories': other['categories'][:1], 'annotations': other['annotations'][:1]}
    write_coco(tmp_path / 'other', {'train': content(2), 'val': other})
    values = {k: v.format(tmp_path, run=sources['detect']) if isinstance(v, str) else v for k, v in values.items()}
    defaults = {**SCRATCH, **SMALL[command], 'data_dir': data[command], 'output': tmp_path / 'runs'}
    with pytest.raises(UserError, match=message):
        start(command, **{**defaults, **values})
    assert not (tmp_path / 'runs').exists()


def test_ade_and_its_resume(tmp_path: Path) -> None:
    """Three classes of the values 1, 2, 3; a state goes on with its own backbone only."""
    values = {**SCRATCH, **SMALL['segment'], 'epochs': 1, 'reduce_zero_label': True}
    run = start('segment', **values, data_dir=write_ade(tmp_path / 'ade'), output=tmp_path / 'runs')
    results = results_of(run)
    assert results['classes'] == ['0', '1', '2'] and results['images'] == {'train': 4, 'val': 2}
    with pytest.raises(UserError, match="was saved with body 'cifar_resnet20', this run has 'test_convnext'"):
        start('segment', resume=str(run), model='test_convnext')


def test_an_image_cut_off_is_named_while_training(tmp_path: Path) -> None:
    """Its header is sound, so that only reading it tells."""
    file = write_voc(tmp_path / 'voc') / 'JPEGImages' / 'train3.jpg'
    file.write_bytes(file.read_bytes()[:700])
    with pytest.raises(UserError, match='train3.jpg: not an image that can be read: '):
        start('segment', **SCRATCH, **SMALL['segment'], data_dir=tmp_path / 'voc', output=tmp_path / 'runs')
