"""transfer/detect.py from the command line to its files, and dynamics' curve of detection."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from coco_folders import content, write_coco
from PIL import Image
from processes import run_processes
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from runs import ROOT, Ended, forget_processes
from safetensors.torch import load_file
from stops import stop_and_go_on

from ctc_timm.cli.arguments import Parser, parse
from ctc_timm.dense import coco_metrics, detection
from ctc_timm.dense.detection_flags import add_arguments
from ctc_timm.dense.detectors import create_detector, extra_levels
from ctc_timm.dense.fitting_flags import open_pyramid, presets
from ctc_timm.training.trainer import Trainer

Script = Callable[..., Ended]
_SMALL = """--img-size 32 -b 2 -j 0 --epochs 2 --fpn-channels 16 --head-channels 32 --hflip 0 --scale 1 1
--detector-kwargs rpn_pre_nms_top_n_train=50 rpn_post_nms_top_n_train=30 box_batch_size_per_image=16 box_score_thresh=0
"""
SMALL = _SMALL.split()
SCRATCH = ['--model', 'cifar_resnet20', '--from-scratch']


@pytest.fixture(scope='module')
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six training and three validation images."""
    return write_coco(tmp_path_factory.mktemp('data') / 'coco', {'train': content(6), 'val': content(3)})


@pytest.fixture(scope='module')
def source_run(tmp_path_factory: pytest.TempPathFactory, flags: Any, tiny: list[str]) -> Path:
    """A classifier's run of two epochs, both kept."""
    folder = tmp_path_factory.mktemp('runs')
    forget_processes()
    words = f'--mode vanilla --keep-every 1 --epochs 2 --output {folder} --experiment source'
    Trainer(flags(*tiny, words)).fit(quiet=True)
    return folder / 'source'


def picture_has_ink(file: Path) -> bool:
    return len(np.unique(np.asarray(Image.open(file).convert('L')))) > 20


def test_a_run_and_what_it_leaves(source_run: Path, data: Path, tmp_path: Path, script: Script) -> None:
    """Mask R-CNN on a run's weights: what it prints is what pycocotools says of the boxes that were found."""
    words = ['--data-dir', str(data), '--detector', 'maskrcnn', '--freeze-stages', '2', '--freeze-bn']
    words += ['--layer-decay', '0.8', '--clip-grad', '1', '--output', str(tmp_path), '--experiment', 'run']
    ended = script('transfer/detect.py', str(source_run), *SMALL, *words)
    assert ended.code == 0, ended.err
    assert 'training: 12 objects in 6 images\n' in ended.out and f'{source_run}/best.safetensors' in ended.out
    run = tmp_path / 'run'
    results = json.loads((run / 'results.json').read_text())
    with (run / 'summary.csv').open(newline='') as stream:
        rows = list(csv.DictReader(stream))
    assert [int(row['epoch']) for row in rows] == [0, 1]
    for name in ('box_ap', 'box_ap50', 'mask_ap', 'mask_ap50'):
        assert float(rows[-1][f'eval_{name}']) == pytest.approx(results['metrics'][name], abs=1e-6)
        assert 0 <= results['metrics'][name] <= 1
    assert rows[-1]['eval_box_ap_large'] == ''
    assert f'{100 * results["metrics"]["box_ap"]:.2f}' in ended.out
    assert picture_has_ink(run / 'plots' / 'training.png') and picture_has_ink(run / 'plots' / 'detections.png')

    before, after = load_file(source_run / 'best.safetensors'), load_file(run / 'last.safetensors')
    prefix = 'backbone.body.model.'
    same = {name: torch.equal(before[name], after[prefix + name]) for name in before if prefix + name in after}
    frozen = {name for name in same if name.startswith(('conv1', 'bn1', 'layer1'))}
    assert frozen and all(same[name] for name in frozen)
    assert not same['layer4.0.conv1.weight']


def test_the_score_is_that_of_the_annotations_file(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """COCO's tools, given the file itself and what the detector found, say the same."""
    seen: list[list[dict[str, Any]]] = []
    measure = coco_metrics.measure
    monkeypatch.setattr(
        coco_metrics, 'measure', lambda split, rows, masks: seen.append(rows) or measure(split, rows, masks)
    )
    results = detection.detect(
        read(data, '--output', str(tmp_path), '--experiment', 'run', '--epochs', '12', '--lr', '2e-3')
    )
    truth = COCO(str(data / 'annotations' / 'instances_val.json'))
    evaluation = COCOeval(truth, truth.loadRes(seen[-1]), 'bbox')
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    assert evaluation.stats[0] > 0.1
    assert results['metrics']['box_ap'] == pytest.approx(evaluation.stats[0])
    assert {row['category_id'] for row in seen[-1]} == {3, 11}


def read(data: Path, *words: str) -> Any:
    parser = Parser()
    add_arguments(parser)
    return parse(parser, [*SCRATCH, *SMALL, '--data-dir', str(data), *words])


class _InProcesses:
    """A function of (rank, world) that can be sent to other processes."""

    def __init__(self, data: Path, folder: Path) -> None:
        self.data, self.folder = data, folder

    def __call__(self, rank: int, world: int) -> Any:
        forget_processes()
        return detection.detect(read(self.data, '--output', str(self.folder), '--experiment', 'two'))['metrics']


def test_processes_share_the_measuring(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes get the same numbers, those that one process gets from the weights that they leave."""
    first, second = run_processes(_InProcesses(data, tmp_path), 2, tmp_path)
    assert first == second
    forget_processes()
    args = read(data, '--output', str(tmp_path), '--experiment', 'alone')
    train, val = detection.open_splits(args)
    from ctc_timm.dense.fitting_flags import open_accelerator

    alone = detection.Detection(args, train, val, open_accelerator(args))
    alone.model.load_state_dict(load_file(tmp_path / 'two' / 'last.safetensors'))
    assert dict(alone.measure(alone.model.eval())) == pytest.approx(first, abs=1e-6)


def test_a_killed_run_goes_on_with_no_flag_typed_again(data: Path, tmp_path: Path, script: Script) -> None:
    """Exit code 75; then the same bits as without the stop, from the run's own arguments."""
    words = [*SCRATCH, *SMALL, '--data-dir', str(data)]
    stop_and_go_on(script, 'transfer/detect.py', words, tmp_path, detection, 'detector_loss')


def test_the_recipe_of_the_scenes() -> None:
    """Every key is a flag of the script, and arrives as it is written."""
    file = ROOT / 'recipes' / 'detect_digits.yaml'
    parser = Parser()
    add_arguments(parser)
    args = parse(parser, ['-c', str(file)])
    for key, value in yaml.safe_load(file.read_text()).items():
        assert getattr(args, key) == value, key


@pytest.mark.parametrize('kind', ['fasterrcnn', 'maskrcnn', 'retinanet'])
def test_every_detector_takes_the_recipe_of_the_scenes(kind: str) -> None:
    parser = Parser()
    add_arguments(parser)
    recipe = ROOT / 'recipes' / 'detect_digits.yaml'
    args = parse(parser, ['--detector', kind], presets=presets(parser, recipe))
    assert (args.model, args.img_size) == ('cifar_resnet20', 96)
    pyramid = open_pyramid(args, extra_levels(kind, args.fpn_channels))
    create_detector(kind, pyramid, 10, 96, (0.5,) * 3, (0.5,) * 3, **args.detector_kwargs)


def change(**changes: Any) -> dict[str, Any]:
    told = content(3)
    for key, value in changes.items():
        told['annotations'][0][key] = value
    return told


MISTAKES = [
    ('', 'name a model: a run folder'),
    ('test_resnett', 'MODEL test_resnett: no run folder, weights file or timm model'),
    ('{scratch} --detector fastercnn', 'invalid choice'),
    ('{scratch} --detector-kwargs box_bach=3', "--detector-kwargs: torchvision's FasterRCNN has no box_bach"),
    ('{scratch} --freeze-stages 9', '--freeze-stages 9: cifar_resnet20 has 4 stages, stem included'),
    ('{scratch} --scale 2 1', '--scale 2 1: the first must not be above the second'),
    ('{scratch} -b 7', '--batch-size 7 times 1 process(es) is more than the 6 training images'),
    ('{scratch} --mean 0.1 0.2', '--mean: 2 values for 3 channels'),
    ('{run} --from-scratch', '--from-scratch: goes with the timm name of --model'),
    ('{scratch} --data-dir {}/nowhere', '--data-dir {}/nowhere: no such folder'),
    ('{scratch} --data-dir {}/category', 'annotation 1 names category 4, which is not there'),
    ('{scratch} --data-dir {}/nomasks --detector maskrcnn', 'the segmentation of annotation 1: is not there'),
    ('{scratch} --data-dir {}/other', 'instances_val.json: has no category 11, which instances_train.json has'),
    ('{scratch} --data-dir {}/nothing', 'instances_train.json: holds no object to find'),
    ('{scratch} --resume {}/category', 'no run with a saved state there'),
]


@pytest.mark.parametrize('words,message', MISTAKES, ids=[words for words, _ in MISTAKES])
def test_mistakes_are_told_in_a_line(
    source_run: Path, data: Path, tmp_path: Path, script: Script, words: str, message: str
) -> None:
    """Exit code 2, one line, no run."""
    val = content(2)
    write_coco(tmp_path / 'category', {'train': change(category_id=4), 'val': val})
    write_coco(tmp_path / 'nomasks', {'train': change(segmentation=[]), 'val': val})
    other = {**val, 'categories': val['categories'][:1], 'annotations': val['annotations'][:1]}
    write_coco(tmp_path / 'other', {'train': content(2), 'val': other})
    write_coco(tmp_path / 'nothing', {'train': {**val, 'annotations': []}, 'val': val})
    typed = words.replace('{scratch}', ' '.join(SCRATCH)).replace('{run}', str(source_run)).format(tmp_path).split()
    given = [*SMALL, '--data-dir', str(data), '--output', str(tmp_path / 'runs'), *typed]
    ended = script('transfer/detect.py', *given)
    assert ended.code == 2
    assert re.fullmatch(r'detect\.py: error: .*', ended.err.strip().splitlines()[-1])
    assert message.format(tmp_path) in ended.err and 'Traceback' not in ended.err
    assert not (tmp_path / 'runs').exists()


def test_dynamics_have_a_curve_of_detection(source_run: Path, data: Path, tmp_path: Path, script: Script) -> None:
    """A row a kept epoch, which differs between epochs, is kept, and is measured again for other settings only."""
    words = [str(source_run), '--target', f'coco:{data}', '--information', 'none', '-j', '0']
    words += ['--detection-epochs', '4', '--detection-images', '5', '--output', str(tmp_path)]
    ended = script('transfer/dynamics.py', *words)
    assert ended.code == 0, ended.err
    results = json.loads((tmp_path / 'results.json').read_text())
    rows = [row for row in results['rows'] if row['set'] == 'detection']
    assert [row['epoch'] for row in rows] == [0, 1] and results['targets'] == []
    assert all(0 <= row['box_ap'] <= row['box_ap50'] <= 100 for row in rows)
    assert (rows[0]['num_train'], rows[0]['num_test']) == (5, 3)
    assert results['detection'][f'coco:{data}']['img_size'] == 32
    assert picture_has_ink(tmp_path / 'tradeoff.png') and f'detection coco:{data}' in ended.out
    store = source_run / 'dynamics' / 'rows.jsonl'
    lines = store.read_text().splitlines()
    forget_processes()
    assert script('transfer/dynamics.py', *words).code == 0
    assert store.read_text().splitlines() == lines
    assert json.loads((tmp_path / 'results.json').read_text()) == results
    store.write_text('\n'.join(lines[:-1]) + '\n')
    forget_processes()
    assert script('transfer/dynamics.py', *words).code == 0
    assert json.loads((tmp_path / 'results.json').read_text())['rows'] == results['rows']

    forget_processes()
    ended = script('transfer/dynamics.py', str(source_run), '--target', f'coco:{tmp_path}')
    assert ended.code == 2 and f'--target coco: {tmp_path}: no annotations/instances_train.json' in ended.err
