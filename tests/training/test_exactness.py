"""The same numbers however a run is cut up: into processes, micro-batches, loader workers; and from the same seed."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.utils import gather_object
from processes import run_processes
from runs import TINY, forget_processes
from safetensors.torch import load_file

from ctc_timm import CTCTask
from ctc_timm.cli.arguments import Parser, parse
from ctc_timm.cli.training_flags import add_arguments
from ctc_timm.training.trainer import Trainer

# Ten steps in each of two epochs of 160 images; `all` draws nothing that could differ.
WORDS = [*TINY, '--train-split', 'train[:160]', '--epochs', '2', '--temporal-start-epoch', '1', '--negatives', 'all']


def read(words: list[str]) -> argparse.Namespace:
    parser = Parser()
    add_arguments(parser)
    return parse(parser, words)


def train(words: list[str]) -> tuple[list[float], dict[str, torch.Tensor]]:
    """The loss of each step over all processes, and what the run ends with."""
    forget_processes()
    trainer = Trainer(read(words))
    steps: list[float] = []
    update = trainer.steps.update

    def noted(*args: Any) -> Any:
        step = update(*args)
        steps.append(float(step.losses['loss']) / trainer.args.grad_accum_steps)
        return step

    trainer.steps.update = noted  # type: ignore[method-assign]
    trainer.fit(quiet=True)
    mean = torch.tensor(gather_object([steps])).mean(dim=0).tolist()
    task: Any = trainer.task
    state = {name: value.detach().clone() for name, value in task.model.state_dict().items()}
    return mean, {**state, **{name: bank.clone() for name, bank in task.banks().items()}}


def in_processes(rank: int, world: int, folder: str) -> Any:
    words = [*WORDS, '--sync-bn', '-b', str(16 // world), '--output', f'{folder}/runs', '--experiment', f'of{world}']
    return train(words)


@pytest.fixture(scope='module')
def alone(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """One process with the whole batch and timm's own batch norm."""
    return train([*WORDS, '-b', '16', '--output', str(tmp_path_factory.mktemp('runs')), '--experiment', 'one'])


class _InProcesses:
    """A function of (rank, world) that can be sent to other processes."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)

    def __call__(self, rank: int, world: int) -> Any:
        return in_processes(rank, world, self.folder)


@pytest.mark.parametrize('world', [2, 4])
def test_processes(alone: Any, tmp_path: Path, world: int) -> None:
    """The same global batch over 2 and 4: the losses of 20 steps, and banks that are bitwise equal between them."""
    losses, state = alone
    found = run_processes(_InProcesses(tmp_path), world, tmp_path)
    assert len(losses) == 20
    for theirs, values in found:
        assert theirs == pytest.approx(losses, abs=1e-5)
        for name, value in values.items():
            torch.testing.assert_close(value, state[name], atol=1e-4, rtol=1e-4, msg=name)
        for name in ('instance.bank', 'temporal.present_bank', 'temporal.past_bank'):
            assert torch.equal(values[name], found[0][1][name])
            assert float((values[name] - state[name]).abs().max()) < 1e-5


def test_accumulation(tmp_path: Path) -> None:
    """Four batches of 16 are one of 64, for weights and banks alike; with layer norm, as batch norm sees the parts."""
    words = [
        *WORDS,
        '--train-split',
        'train[:640]',
        '--model',
        'test_vit',
        '--img-size',
        '32',
        '--model-kwargs',
        'img_size=32',
    ]
    words += ['--temporal-weight', '0', '--output', str(tmp_path)]
    whole, state = train([*words, '-b', '64', '--experiment', 'whole'])
    parts, values = train([*words, '-b', '16', '--grad-accum-steps', '4', '--experiment', 'parts'])
    assert len(whole) == 20 and parts == pytest.approx(whole, abs=1e-5)
    for name, value in values.items():
        assert float((value - state[name]).abs().max()) < 1e-5, name


def test_accumulation_of_the_temporal_term() -> None:
    """As above with the normalizers set, which a stage's first batch sets: its gradient and both banks."""
    import timm

    labels = torch.arange(64) % 4

    def step(parts: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        torch.manual_seed(0)
        model = timm.create_model('test_vit', num_classes=4)
        task = CTCTask(model, labels, num_negatives=32, negatives='all', verbose=False)
        images = torch.randn(64, 3, 160, 160, generator=torch.Generator().manual_seed(1))
        task.start_temporal_stage([(images, labels, torch.arange(64))])
        task.temporal.present_normalizer.fill_(50.0)
        task.temporal.past_normalizer.fill_(60.0)
        task.train().start_training()
        for index in torch.randperm(64, generator=torch.Generator().manual_seed(2)).split(64 // parts):
            (task(images[index], labels[index], index)['loss'] / parts).backward()
        task.step_taken(1)
        gradients = [p.grad.flatten() for p in task.trainable_module.parameters() if p.grad is not None]
        return torch.cat(gradients), {name: bank.clone() for name, bank in task.banks().items()}

    (whole, banks), (parts, theirs) = step(1), step(4)
    torch.testing.assert_close(parts, whole, atol=1e-6, rtol=1e-4)
    for name, bank in banks.items():
        torch.testing.assert_close(theirs[name], bank, atol=1e-6, rtol=0)


@pytest.mark.parametrize('workers', [0, 2])
def test_the_same_seed_is_the_same_run(tmp_path_factory: pytest.TempPathFactory, workers: int) -> None:
    """Bit for bit, with dropout, erasing and mixing, whatever the number of workers; another seed differs."""
    words = [*WORDS, '--drop', '0.2', '--reprob', '0.3', '--mixup', '0.2', '--negatives', 'sampled']

    def run(*more: str) -> dict[str, torch.Tensor]:
        folder = tmp_path_factory.mktemp('runs')
        train([*words, '--output', str(folder), '--experiment', 'x', *more])
        return load_file(folder / 'x' / 'last.safetensors')

    first, second = run(), run('-j', str(workers))
    assert all(torch.equal(first[name], second[name]) for name in first)
    if not workers:
        other = run('--seed', '7')
        assert not torch.equal(first['fc.weight'], other['fc.weight'])


def test_fewer_processes_go_on_within_an_epoch(
    flags: Callable[..., argparse.Namespace], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """With batches of another size no image of the epoch is left out: the run goes on at the batch before."""
    words = [*WORDS, '--output', str(tmp_path), '--experiment', 'x', '--checkpoint-steps', '3', '--epochs', '2']
    trainer = Trainer(read([*words, '-b', '16']))
    save = trainer._save_state

    def stop() -> None:
        save()
        raise KeyboardInterrupt

    trainer._save_state = stop  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        trainer.fit()
    forget_processes()
    resumed = Trainer(read([*words, '-b', '32', '--resume', 'auto']))
    assert (resumed.at.epoch, resumed.at.batch) == (0, 1)  # 48 images are one batch of 32 and a half
    resumed.loader.set_epoch(0, resumed.at.batch)
    seen = {int(i) for _, _, index in resumed.loader for i in index}
    trainer.loader.set_epoch(0)
    order = [int(i) for batch in trainer.loader.batches for _, i in batch]
    assert set(order[32:]) == seen
