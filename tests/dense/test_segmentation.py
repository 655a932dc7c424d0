"""Segmentation from the heads to a run's files."""

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
from mask_folders import write_ade, write_voc
from PIL import Image
from processes import run_processes
from runs import Ended, forget_processes
from safetensors.torch import load_file
from sklearn.metrics import jaccard_score
from stops import stop_and_go_on
from torch.nn.functional import conv2d, interpolate

import ctc_timm
from ctc_timm.data.settings import LoaderSettings
from ctc_timm.dense.loading import FitCanvas
from ctc_timm.dense.masks import open_masks
from ctc_timm.dense.pyramid import open_pyramid
from ctc_timm.dense.segmentation import SegmentationEvaluator, SegmentationTask, Segmenter, SemanticFPN
from ctc_timm.dense.settings import BackboneSettings, CanvasSettings, SegmenterSettings
from ctc_timm.models.settings import SourceSettings
from ctc_timm.runs import Run
from ctc_timm.training.build import train
from ctc_timm.utils.errors import UserError

MEAN, STD = [0.5, 0.4, 0.3], [0.2, 0.25, 0.3]
SMALL: dict[str, Any] = dict(
    img_size=32, batch_size=2, workers=0, epochs=2, fpn_channels=16, head_channels=16, hflip=0, scale=(0.8, 1.2)
)
SCRATCH: dict[str, Any] = {'model': 'cifar_resnet20', 'from_scratch': True}
_WORDS = """--model cifar_resnet20 --from-scratch --img-size 32 -b 2 -j 0 --epochs 2 --fpn-channels 16 --hflip 0
--scale 0.8 1.2 --head deeplabv3 --layer-decay 0.7 --clip-grad 1"""


def segmenter(head: str, name: str = 'test_resnet', size: int = 64, classes: int = 5, **options: Any) -> Segmenter:
    torch.manual_seed(0)
    pyramid = open_pyramid(SourceSettings(model=name), BackboneSettings(True, 16), size, **options)
    return Segmenter(head, pyramid, classes, MEAN, STD, head_channels=16)


def evaluator(data: Path, mean: list[float]) -> SegmentationEvaluator:
    val = open_masks(str(data), SegmenterSettings())[1]
    return SegmentationEvaluator(val, FitCanvas(32, mean), LoaderSettings(3, workers=0), Accelerator(cpu=True))


def trained(run: Path) -> tuple[Segmenter, list[float]]:
    """The model of a run with `SCRATCH` and `SMALL`, and its mean."""
    pyramid = open_pyramid(SourceSettings(model='cifar_resnet20'), BackboneSettings(True, 16), 32)
    mean, std = pyramid.normalization(CanvasSettings())
    model = Segmenter('fpn', pyramid, 3, mean, std, head_channels=16)
    model.load_state_dict(load_file(run / 'last.safetensors'))
    return model, mean


@pytest.fixture(scope='module')
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six training and three validation images in VOC's layout."""
    return write_voc(tmp_path_factory.mktemp('data') / 'voc')


@pytest.fixture(scope='module')
def source(tmp_path_factory: pytest.TempPathFactory, flags: Any, tiny: list[str]) -> Run:
    """A classifier's run of one epoch on digits of one channel."""
    forget_processes()
    words = f'--mode vanilla --epochs 1 --in-chans 1 --experiment source --output {tmp_path_factory.mktemp("runs")}'
    return train(flags(*tiny, words))


@pytest.mark.parametrize('head', ['fpn', 'deeplabv3'])
@pytest.mark.parametrize(
    'name,size', [('test_resnet', 64), ('test_resnet', 76), ('test_convnext', 64), ('test_vit', 64)]
)
def test_scores_have_the_size_of_the_images(head: str, name: str, size: int) -> None:
    """For backbones of four strides and of one, of sizes that no stride divides; every parameter takes part."""
    model = segmenter(head, name, size).train()
    scores = model([torch.rand(3, size, size)] * 2)
    assert scores.shape == (2, 5, size, size)
    scores.square().mean().backward()
    idle = [key for key, value in model.named_parameters() if value.grad is None]
    assert not [key for key in idle if key.startswith('head') or 'fpn' in key], idle


def test_the_fpn_head_is_the_sum_of_its_levels() -> None:
    """By its weights written out: blocks, doubling, sum, classifier."""
    torch.manual_seed(0)
    head = SemanticFPN(6, 3, 4, channels=8).eval()
    levels = [torch.randn(2, 6, side, side) for side in (16, 8, 4)]

    def block(x: torch.Tensor, part: Any) -> torch.Tensor:
        x = conv2d(x, part[0].weight, padding=1)
        x = x.reshape(2, 2, 4, *x.shape[-2:])  # two groups of four channels
        mean, deviation = x.mean((2, 3, 4), keepdim=True), x.var((2, 3, 4), unbiased=False, keepdim=True)
        return ((x - mean) / (deviation + 1e-5).sqrt()).flatten(1, 2).relu()

    def doubled(x: torch.Tensor) -> torch.Tensor:
        return interpolate(x, scale_factor=2, mode='bilinear', align_corners=False)

    first, second, third = head.branches
    total = block(levels[0], first[0]) + doubled(block(levels[1], second[0]))
    total = total + doubled(block(doubled(block(levels[2], third[0])), third[1]))
    assert torch.allclose(head(levels), conv2d(total, head.classifier.weight, head.classifier.bias), atol=1e-5)


def test_images_are_normalized() -> None:
    model = segmenter('fpn').eval()
    seen: list[torch.Tensor] = []
    model.backbone.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    image = torch.rand(3, 64, 64)
    model([image])
    for channel in range(3):
        assert torch.allclose(seen[0][0, channel], (image[channel] - MEAN[channel]) / STD[channel], atol=1e-6)


@pytest.mark.parametrize('stride', [8, 16, 32])
def test_deeplab_on_a_finer_map(stride: int) -> None:
    """With timm's output_stride the last map is as large as was asked for."""
    model = segmenter('deeplabv3', 'resnet18', output_stride=stride)
    assert model.backbone.maps(torch.zeros(1, 3, 64, 64))[-1].shape == (1, 512, 64 // stride, 64 // stride)
    assert not any('fpn' in name for name, _ in model.named_parameters())


def test_the_loss_is_the_mean_over_pixels_that_count() -> None:
    """By hand; 0 with gradient where none counts."""
    task = SegmentationTask(torch.nn.Identity(), torch.device('cpu'))
    scores = torch.randn(2, 3, 4, 4, requires_grad=True)
    task.trainable_module.forward = lambda images: scores  # type: ignore[method-assign]
    truth = torch.randint(3, (2, 4, 4), dtype=torch.uint8)
    truth[0, :2] = 255
    loss = task.run_batch(([], [{'mask': mask} for mask in truth]))['loss']
    places = (truth != 255).nonzero().tolist()
    picked = [-scores.log_softmax(1)[b, int(truth[b, y, x]), y, x] for b, y, x in places]
    assert len(picked) == 24 and torch.allclose(loss, torch.stack(picked).mean())
    loss = task.run_batch(([], [{'mask': torch.full_like(mask, 255)} for mask in truth]))['loss']
    loss.backward()
    assert loss == 0 and torch.all(scores.grad == 0)


def test_a_run_and_what_it_leaves(source: Run, data: Path, tmp_path: Path, script: Callable[..., Ended]) -> None:
    """On a run's weights of one channel: numbers agree in all places."""
    words = ['--img-size', '32', '-b', '2', '-j', '0', '--epochs', '2', '--fpn-channels', '16', '--head-channels', '16']
    words += ['--data-dir', str(data), '--freeze-stages', '2', '--freeze-bn', '--layer-decay', '0.8']
    words += ['--clip-grad', '1', '--output', str(tmp_path), '--experiment', 'run']
    ended = script('transfer/segment.py', str(source), *words)
    assert ended.code == 0, ended.err
    assert 'training: 6 images, 3 classes\n' in ended.out and f'{source}/best.safetensors' in ended.out
    run = Run(tmp_path / 'run')
    results, rows = json.loads((run.path / 'results.json').read_text()), run.rows()
    assert [int(row['epoch']) for row in rows] == [0, 1] and results['images'] == {'train': 6, 'val': 3}
    for name in ('miou', 'pixel_accuracy', 'mean_accuracy'):
        assert float(rows[-1][f'eval_{name}']) == pytest.approx(results['metrics'][name], abs=1e-6)
    assert f'{100 * results["metrics"]["miou"]:.2f}\npixel accuracy' in ended.out
    for picture in ('training.png', 'masks.png'):
        assert len(np.unique(np.asarray(Image.open(run.plots / picture).convert('L')))) > 20


def test_it_learns_and_the_score_is_scikit_learns(data: Path, tmp_path: Path) -> None:
    """Blocks of two colors are found; jaccard_score over all counted pixels says the same."""
    words = {**SCRATCH, **SMALL, 'epochs': 14, 'lr': 5e-3, 'scale': (1, 1)}
    run = ctc_timm.segment(**words, data_dir=data, output=tmp_path)
    metrics = json.loads((run.path / 'results.json').read_text())['metrics']
    assert metrics['miou'] > 0.8
    model, mean = trained(run.path)
    pairs = list(evaluator(data, mean).predictions(model))
    predicted, truth = (torch.cat([pair[i].flatten() for pair in pairs]).numpy() for i in (0, 1))
    counted = truth != 255
    assert (~counted).sum() == 3
    assert metrics['miou'] == pytest.approx(
        jaccard_score(truth[counted], predicted[counted], average='macro'), abs=1e-6
    )


def test_masks_are_measured_at_their_own_size(tmp_path: Path) -> None:
    """Images of other shapes than the canvas: predictions have the masks' shapes."""
    folder = write_voc(tmp_path / 'voc')
    for name, shape in (('val0', (24, 50)), ('val1', (61, 17))):
        for file in (folder / 'JPEGImages' / f'{name}.jpg', folder / 'SegmentationClass' / f'{name}.png'):
            with Image.open(file) as opened:
                resized = opened.resize(shape[::-1], Image.Resampling.NEAREST)
            resized.save(file)
    model, evaluated = segmenter('fpn', 'cifar_resnet20', 32, 3), evaluator(folder, MEAN)
    shapes = [(tuple(p.shape), tuple(t.shape)) for p, t in evaluated.predictions(model)]
    assert shapes == [((24, 50),) * 2, ((61, 17),) * 2, ((32, 32),) * 2]
    assert 0 <= evaluated(model)['miou'] <= 1


def segment_in_process(words: dict[str, Any], rank: int, world: int) -> str:
    forget_processes()
    return str(ctc_timm.segment(**words))


def test_processes_share_the_evaluation(data: Path, tmp_path: Path) -> None:
    """Two processes get the numbers that one process gets from the weights that they leave."""
    words = {**SCRATCH, **SMALL, 'data_dir': data, 'output': tmp_path, 'experiment': 'two'}
    assert run_processes(partial(segment_in_process, words), 2, tmp_path) == [str(tmp_path / 'two')] * 2
    forget_processes()
    model, mean = trained(tmp_path / 'two')
    metrics = json.loads((tmp_path / 'two' / 'results.json').read_text())['metrics']
    assert evaluator(data, mean)(model) == pytest.approx(metrics, abs=1e-9)


def test_a_killed_run_goes_on_with_no_flag_typed_again(
    data: Path, tmp_path: Path, script: Callable[..., Ended]
) -> None:
    """Exit code 75; then the same bits as without the stop, from the run's own arguments."""
    words = [*_WORDS.split(), '--data-dir', str(data)]
    stop_and_go_on(script, 'transfer/segment.py', words, tmp_path, SegmentationTask, 'run_batch')


MISTAKES: list[tuple[dict[str, Any], str]] = [
    ({'model': ''}, 'name a model: a run folder'),
    ({'head': 'deeplabv3', 'batch_size': 1}, '`batch_size` 1: the batch norm of deeplabv3 needs two images'),
    ({'output_stride': 8}, '`output_stride` 8: the last map of cifar_resnet20 has stride 2 with it'),
    ({'scale': (2, 1)}, '`scale` 2 1: the first must not be above the second'),
    ({'num_classes': 2}, 'holds the value 2, which is no class; classes are 0 to 1, 255 is ignored'),
    ({'layout': 'ade'}, 'images/training: split .train. has no images'),
    ({'train_split': 'trainval'}, 'trainval.txt: not a list of names: .*No such file'),
    ({'data_dir': 'nowhere'}, '`data_dir` nowhere: no such folder'),
    ({'batch_size': 7}, '`batch_size` 7 times 1 process.* is more than the 6 training images'),
]


@pytest.mark.parametrize('words,message', MISTAKES, ids=[next(iter(words)) for words, _ in MISTAKES])
def test_mistakes(data: Path, tmp_path: Path, words: dict[str, Any], message: str) -> None:
    """No run is left."""
    with pytest.raises(UserError, match=message):
        ctc_timm.segment(**{**SCRATCH, **SMALL, 'data_dir': data, 'output': tmp_path / 'runs', **words})
    assert not (tmp_path / 'runs').exists()


def test_ade_and_its_resume(tmp_path: Path) -> None:
    """Three classes of the values 1, 2, 3; a state goes on with its own backbone only."""
    words = {**SCRATCH, **SMALL, 'epochs': 1, 'reduce_zero_label': True}
    run = ctc_timm.segment(**words, data_dir=write_ade(tmp_path / 'ade'), output=tmp_path / 'runs')
    results = json.loads((run.path / 'results.json').read_text())
    assert results['classes'] == ['0', '1', '2'] and results['images'] == {'train': 4, 'val': 2}
    forget_processes()
    with pytest.raises(UserError, match="was saved with body 'cifar_resnet20', this run has 'test_convnext'"):
        ctc_timm.segment(resume=str(run), model='test_convnext')


def test_an_image_cut_off_is_named_while_training(tmp_path: Path) -> None:
    """Its header is sound, so that only reading it tells."""
    file = write_voc(tmp_path / 'voc') / 'JPEGImages' / 'train3.jpg'
    file.write_bytes(file.read_bytes()[:700])
    with pytest.raises(UserError, match='train3.jpg: not an image that can be read: '):
        ctc_timm.segment(**{**SCRATCH, **SMALL}, data_dir=tmp_path / 'voc', output=tmp_path / 'runs')
