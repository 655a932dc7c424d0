"""transfer/segment.py from the command line to its files."""

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
from mask_folders import write_ade, write_voc
from PIL import Image
from processes import run_processes
from runs import ROOT, Ended, forget_processes
from safetensors.torch import load_file
from sklearn.metrics import jaccard_score
from stops import stop_and_go_on

from ctc_timm.cli.arguments import Parser, parse
from ctc_timm.dense import segmentation
from ctc_timm.dense.fitting_flags import open_accelerator
from ctc_timm.dense.segmentation_flags import add_arguments
from ctc_timm.training.trainer import Trainer

Script = Callable[..., Ended]
_SMALL = '--img-size 32 -b 2 -j 0 --epochs 2 --fpn-channels 16 --head-channels 16 --hflip 0 --scale 0.8 1.2'
SMALL = _SMALL.split()
SCRATCH = ['--model', 'cifar_resnet20', '--from-scratch']


@pytest.fixture(scope='module')
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six training and three validation images in VOC's layout."""
    return write_voc(tmp_path_factory.mktemp('data') / 'voc')


@pytest.fixture(scope='module')
def source_run(tmp_path_factory: pytest.TempPathFactory, flags: Any, tiny: list[str]) -> Path:
    """A classifier's run of one epoch on digits of one channel."""
    folder = tmp_path_factory.mktemp('runs')
    forget_processes()
    words = f'--mode vanilla --epochs 1 --in-chans 1 --output {folder} --experiment source'
    Trainer(flags(*tiny, words)).fit(quiet=True)
    return folder / 'source'


def read(data: Path, *words: str) -> Any:
    parser = Parser()
    add_arguments(parser)
    return parse(parser, [*SCRATCH, *SMALL, '--data-dir', str(data), *words])


def table(file: Path) -> list[dict[str, str]]:
    with file.open(newline='') as lines:
        return list(csv.DictReader(lines))


def test_a_run_and_what_it_leaves(source_run: Path, data: Path, tmp_path: Path, script: Script) -> None:
    """On a run's weights of one channel: numbers agree in all places, and what is frozen keeps its bits."""
    words = ['--data-dir', str(data), '--freeze-stages', '2', '--freeze-bn', '--layer-decay', '0.8']
    words += ['--clip-grad', '1', '--output', str(tmp_path), '--experiment', 'run']
    ended = script('transfer/segment.py', str(source_run), *SMALL, *words)
    assert ended.code == 0, ended.err
    assert 'training: 6 images, 3 classes\n' in ended.out and f'{source_run}/best.safetensors' in ended.out
    run = tmp_path / 'run'
    results, rows = json.loads((run / 'results.json').read_text()), table(run / 'summary.csv')
    assert [int(row['epoch']) for row in rows] == [0, 1]
    for name in ('miou', 'pixel_accuracy', 'mean_accuracy'):
        assert float(rows[-1][f'eval_{name}']) == pytest.approx(results['metrics'][name], abs=1e-6)
    assert f'mean   {100 * results["metrics"]["miou"]:.2f}\n' in ended.out.replace('  ', ' ').replace('mean ', 'mean  ')
    for picture in ('training.png', 'masks.png'):
        assert len(np.unique(np.asarray(Image.open(run / 'plots' / picture).convert('L')))) > 20

    before, after = load_file(source_run / 'best.safetensors'), load_file(run / 'last.safetensors')
    prefix = 'backbone.body.model.'
    same = {name: torch.equal(before[name], after[prefix + name]) for name in before if prefix + name in after}
    frozen = {name for name in same if name.startswith(('conv1', 'bn1', 'layer1')) or 'running' in name}
    assert len(frozen) > 5 and all(same[name] for name in frozen)
    assert not same['layer4.0.conv1.weight']


def test_it_learns_and_the_score_is_scikit_learns(data: Path, tmp_path: Path) -> None:
    """Blocks of two colors are found; jaccard_score over all counted pixels says the same."""
    words = ['--output', str(tmp_path), '--experiment', 'run', '--epochs', '14', '--lr', '5e-3', '--scale', '1', '1']
    results = segmentation.segment(read(data, *words))
    assert results['metrics']['miou'] > 0.8
    forget_processes()
    args = read(data, '--output', str(tmp_path), '--experiment', 'other', '-vb', '3')
    accelerator = open_accelerator(args)
    again = segmentation.Segmentation(args, *segmentation.open_splits(args, accelerator), accelerator)
    again.model.load_state_dict(load_file(tmp_path / 'run' / 'last.safetensors'))
    pairs = list(again._predict(again.model.eval(), range(3)))
    predicted, truth = (torch.cat([pair[i].flatten() for pair in pairs]).numpy() for i in (0, 1))
    counted = truth != 255
    assert (~counted).sum() == 3
    wanted = jaccard_score(truth[counted], predicted[counted], average='macro')
    assert results['metrics']['miou'] == pytest.approx(wanted, abs=1e-6)


def test_masks_are_measured_at_their_own_size(data: Path, tmp_path: Path) -> None:
    """Images of other shapes than the canvas: predictions have the masks' shapes."""
    folder = write_voc(tmp_path / 'voc')
    for name, shape in (('val0', (24, 50)), ('val1', (61, 17))):
        for part, suffix in (('JPEGImages', 'jpg'), ('SegmentationClass', 'png')):
            file = folder / part / f'{name}.{suffix}'
            with Image.open(file) as opened:
                resized = opened.resize(shape[::-1], Image.Resampling.NEAREST)
            resized.save(file)
    args = read(folder, '--output', str(tmp_path / 'runs'))
    accelerator = open_accelerator(args)
    built = segmentation.Segmentation(args, *segmentation.open_splits(args, accelerator), accelerator)
    found = [(tuple(p.shape), tuple(t.shape)) for p, t in built._predict(built.model.eval(), range(3))]
    assert found == [((24, 50),) * 2, ((61, 17),) * 2, ((32, 32),) * 2]
    assert 0 <= built.measure(built.model.eval())['miou'] <= 1


class _InProcesses:
    """A function of (rank, world) that can be sent to other processes."""

    def __init__(self, data: Path, folder: Path) -> None:
        self.data, self.folder = data, folder

    def __call__(self, rank: int, world: int) -> Any:
        forget_processes()
        return segmentation.segment(read(self.data, '--output', str(self.folder), '--experiment', 'two'))['metrics']


def test_processes_share_the_measuring(data: Path, tmp_path: Path) -> None:
    """Two processes get the same numbers, those that one process gets from the weights that they leave."""
    first, second = run_processes(_InProcesses(data, tmp_path), 2, tmp_path)
    assert first == second
    forget_processes()
    args = read(data, '--output', str(tmp_path), '--experiment', 'alone')
    accelerator = open_accelerator(args)
    alone = segmentation.Segmentation(args, *segmentation.open_splits(args, accelerator), accelerator)
    alone.model.load_state_dict(load_file(tmp_path / 'two' / 'last.safetensors'))
    assert dict(alone.measure(alone.model.eval())) == pytest.approx(first, abs=1e-9)


def test_a_killed_run_goes_on_with_no_flag_typed_again(data: Path, tmp_path: Path, script: Script) -> None:
    """Exit code 75; then the same bits as without the stop, from the run's own arguments."""
    words = [*SCRATCH, *SMALL, '--head', 'deeplabv3', '--data-dir', str(data)]
    stop_and_go_on(script, 'transfer/segment.py', words, tmp_path, segmentation, 'segmentation_loss')


def test_ade_with_its_zero_left_out(tmp_path: Path, script: Script) -> None:
    """Three classes of the values 1, 2, 3."""
    folder = write_ade(tmp_path / 'ade')
    words = ['--data-dir', str(folder), '--reduce-zero-label', '--output', str(tmp_path / 'runs'), '--experiment', 'a']
    ended = script('transfer/segment.py', *SCRATCH, *SMALL, *words, '--epochs', '1')
    assert ended.code == 0, ended.err
    results = json.loads((tmp_path / 'runs' / 'a' / 'results.json').read_text())
    assert results['classes'] == ['0', '1', '2'] and results['images'] == {'train': 4, 'val': 2}


def test_the_recipe_of_the_scenes() -> None:
    """Every key is a flag of the script, and arrives as it is written."""
    file = ROOT / 'recipes' / 'segment_digits.yaml'
    parser = Parser()
    add_arguments(parser)
    args = parse(parser, ['-c', str(file)])
    for key, value in yaml.safe_load(file.read_text()).items():
        assert getattr(args, key) == value, key


MISTAKES = [
    ('', 'name a model: a run folder'),
    ('{scratch} --head deeplab', 'invalid choice'),
    ('{scratch} --head deeplabv3 -b 1', '--batch-size 1: the batch norm of deeplabv3 needs two images'),
    ('{scratch} --output-stride 8', '--output-stride 8: the last map of cifar_resnet20 has stride 2 with it'),
    ('--model test_vit --from-scratch --output-stride 8', '--output-stride 8: test_vit has no other stride than its'),
    ('{scratch} --scale 2 1', '--scale 2 1: the first must not be above the second'),
    ('{scratch} --num-classes 2', 'holds the value 2, which is no class; classes are 0 to 1, 255 is ignored'),
    ('{scratch} --layout ade', 'images/training: no such folder'),
    ('{scratch} --train-split trainval', 'trainval.txt: no such file; splits there: train, val'),
    ('{scratch} --data-dir {}/nowhere', '--data-dir {}/nowhere: no such folder'),
    ('{scratch} --data-dir {}/size', 'val0.png: is 16x16, but its image {}/size/JPEGImages/val0.jpg is 32x32'),
    ('{scratch} --data-dir {}/missing', 'train1.jpg: has no mask'),
    ('{scratch} --data-dir {}/broken', 'train1.png: not a mask that can be read'),
    ('{scratch} -b 7', '--batch-size 7 times 1 process(es) is more than the 6 training images'),
]


@pytest.mark.parametrize('words,message', MISTAKES, ids=[words for words, _ in MISTAKES])
def test_mistakes_are_told_in_a_line(data: Path, tmp_path: Path, script: Script, words: str, message: str) -> None:
    """Exit code 2, one line, no run."""
    for name in ('size', 'missing', 'broken'):
        if f'/{name}' in words:
            folder = write_voc(tmp_path / name)
            if name == 'size':
                Image.new('L', (16, 16)).save(folder / 'SegmentationClass' / 'val0.png')
            elif name == 'missing':
                (folder / 'SegmentationClass' / 'train1.png').unlink()
            else:
                (folder / 'SegmentationClass' / 'train1.png').write_bytes(b'\x89PNG')
    typed = words.replace('{scratch}', ' '.join(SCRATCH)).format(tmp_path).split()
    ended = script('transfer/segment.py', *SMALL, '--data-dir', str(data), '--output', str(tmp_path / 'runs'), *typed)
    assert ended.code == 2
    assert re.fullmatch(r'segment\.py: error: .*', ended.err.strip().splitlines()[-1])
    assert message.format(tmp_path) in ended.err and 'Traceback' not in ended.err
    assert not (tmp_path / 'runs').exists()


def test_an_image_cut_off_is_named_while_training(tmp_path: Path, script: Script) -> None:
    """Its header is sound, so that only reading it tells."""
    folder = write_voc(tmp_path / 'voc')
    file = folder / 'JPEGImages' / 'train3.jpg'
    file.write_bytes(file.read_bytes()[:700])
    words = ['--data-dir', str(folder), '--output', str(tmp_path / 'runs')]
    ended = script('transfer/segment.py', *SCRATCH, *SMALL, *words)
    assert ended.code == 2 and f'{file}: not an image that can be read: ' in ended.err and 'Traceback' not in ended.err
