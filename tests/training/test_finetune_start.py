"""Fine-tuning that holds on to its start: by the temporal term, by a probe first, by averaged weights."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from timm.data import create_transform, resolve_model_data_config

from ctc_timm.measure.features import SplitImages, compute_features
from ctc_timm.measure.probes import probe
from ctc_timm.training.finetune import FineTuning
from finetuning import STEM, TARGET, read, results


def embedded(model: Any, task: Any, images: torch.Tensor) -> torch.Tensor:
    """Unit embeddings of images by a model, through the task's projector."""
    projector = task.temporal.present_projector
    with torch.no_grad():
        features = model.eval().forward_head(model.forward_features(images), pre_logits=True)
        return torch.nn.functional.normalize(projector(features), dim=1)


@pytest.mark.parametrize('form', ['fixed --past-features model', 'centered', 'none'])
def test_contrast_with_the_start(base: Path, tmp_path: Path, form: str) -> None:
    """The past is what the model was; the banks hold its features of these very images, also where some come twice."""
    words = (base, *TARGET, '--mode', 'ctc', '--seeds', '1', '--train-fraction', '0.2', '--min-updates', '6')
    words = (*words, '--embed-dim', '16', '--freeze', 'stem', '--output', tmp_path / 'out')
    words = (*words, '--temporal-projector', *form.split())
    tuning = FineTuning(read(*words))
    (plan,) = tuning.plans
    trainer = tuning.trainer(plan)
    task: Any = trainer.task
    task.prepare_epoch('temporal', trainer.training_images)
    assert plan.passes > 1 and task.stage == 'temporal' and trainer.schedule.stage(0) == 'temporal'
    start = timm.create_model(f'local-dir:{base}', pretrained=True)
    before, past = start.state_dict(), task.information_bank.model.state_dict()
    assert all(torch.equal(past[name], tensor) for name, tensor in before.items() if not name.startswith('fc.'))

    digits = load_digits()
    split = train_test_split(digits.images, digits.target, test_size=0.2, stratify=digits.target, random_state=0)
    pixels = np.rint(split[0][:128] * (255 / 16)).astype(np.uint8)[plan.index_n.repeat(plan.passes)]
    transform = create_transform(**resolve_model_data_config(start))
    rows = embedded(start, task, torch.stack([transform(Image.fromarray(image)) for image in pixels]))
    if form == 'centered':
        assert rows.mean(dim=0).abs().max() < 0.1 < task.temporal.present_projector.center.abs().max()
    for bank in (task.temporal.past_bank, task.temporal.present_bank):
        torch.testing.assert_close(bank, rows, atol=1e-4, rtol=0)
    trainer.fit()
    now = task.model.state_dict()
    assert all(torch.equal(now[name], before[name]) == name.startswith(STEM) for name in before if 'weight' in name)
    assert not torch.equal(task.temporal.present_bank, task.temporal.past_bank)
    assert not any(p.requires_grad for p in task.temporal.present_projector.parameters())


@pytest.mark.parametrize('past', ['model', 'bank'])
def test_distillation_of_the_start(base: Path, tmp_path: Path, past: str) -> None:
    """The term of a model that is the start still is zero."""
    words = (
        base,
        *TARGET,
        '--mode',
        'distill',
        '--past-features',
        past,
        '--seeds',
        '1',
        '--drop',
        '0',
        '--output',
        tmp_path / 'out',
    )
    tuning = FineTuning(read(*words))
    trainer = tuning.trainer(tuning.plans[0])
    task: Any = trainer.task
    task.prepare_epoch('temporal', trainer.training_images)
    images, targets, index = next(iter(trainer.training_images()))
    losses = task.eval()(images, targets, index)
    assert float(losses['ctc_loss']) == pytest.approx(0, abs=1e-5)
    run = tuning.run()
    assert results(run.path.parent)['rows'][0]['method'] == 'finetune-distill'


def test_contrast_with_the_start_goes_on_after_an_interruption(base: Path, tmp_path: Path) -> None:
    """From the state after its first epoch, to the same bits; its rows are of a method of their own."""
    words = (base, *TARGET, '--mode', 'ctc', '--seeds', '1', '--checkpoint-hist', '3')
    FineTuning(read(*words, '--output', tmp_path / 'whole')).run()
    shutil.copytree(tmp_path / 'whole', tmp_path / 'cut')
    run = tmp_path / 'cut' / 'fraction-1-seed-0'
    (run / 'results.json').unlink()
    shutil.rmtree(run / 'state' / 'epoch-0001')
    FineTuning(read(*words, '--output', tmp_path / 'cut')).run()
    whole, cut = (
        folder / 'fraction-1-seed-0' / 'last.safetensors' for folder in (tmp_path / 'whole', tmp_path / 'cut')
    )
    assert whole.read_bytes() == cut.read_bytes()
    assert results(tmp_path / 'cut')['rows'] == results(tmp_path / 'whole')['rows']
    assert results(tmp_path / 'cut')['rows'][0]['method'] == 'finetune-ctc'


def test_linear_probe_first_and_the_start_averaged_in(base: Path, tmp_path: Path) -> None:
    """The start answers as a logistic probe of its features; the run's weights are the average, which is measured."""
    words = (base, *TARGET, '--seeds', '1', '--probe-first', '--start-share', '0.5', '--output', tmp_path / 'out')
    tuning = FineTuning(read(*words))
    (plan,) = tuning.plans
    start = tuning._start(plan)
    parts = (
        SplitImages(split, tuning.settings.loader, tuning.config, tuning.accelerator)
        for split in (tuning.train, tuning.test)
    )
    trained, tested = (compute_features(start, images, tuning.accelerator, logits=True) for images in parts)
    (expected,) = probe('logistic', trained, tested, 10, plan.seed)
    assert tested.logits_NC is not None
    assert 100 * (tested.logits_NC.argmax(dim=1) == tested.labels_N).double().mean() == pytest.approx(expected['top1'])
    run = tuning.run()
    best, last = (load_file(run.path / f'{name}.safetensors') for name in ('best', 'last'))
    assert all(torch.equal(best[name], tensor) for name, tensor in last.items())
    trainer = tuning.trainer(plan)  # which holds the weights of the last step
    for name, tensor in trainer.eval_model().named_parameters():
        torch.testing.assert_close(
            last[name], (tensor + dict(start.named_parameters())[name]) / 2, rtol=1e-5, atol=1e-6
        )
    model = timm.create_model('test_resnet', num_classes=10, in_chans=1).eval()
    model.load_state_dict(last)
    again = compute_features(model, tuning.test_images, tuning.accelerator, logits=True)
    assert again.logits_NC is not None
    hits = (again.logits_NC.argmax(dim=1) == again.labels_N).double().mean()
    assert results(tmp_path / 'out')['rows'][0]['top1'] == pytest.approx(100 * float(hits))
