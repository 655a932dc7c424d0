"""The loop of detection and segmentation: against a loop written out, and the same bits however a run is cut up."""

from __future__ import annotations

import argparse
import csv
import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from processes import run_processes
from runs import forget_processes
from safetensors.torch import load_file
from torch import Tensor, nn

from ctc_timm.cli.arguments import Parser, parse
from ctc_timm.dense import fitting_flags
from ctc_timm.dense.fitting import Fitting
from ctc_timm.dense.pyramid import Pyramid
from ctc_timm.utils.errors import Stopped, UserError

_WORDS = '--model test_resnet --from-scratch --img-size 32 -b 4 -j 0 --epochs 3 --fpn-channels 8 --log-interval 1'
_PLAIN = '--opt momentum --lr 0.05 --momentum 0 --weight-decay 0 --sched none --warmup-epochs 0 --freeze-bn'
WORDS, PLAIN = _WORDS.split(), _PLAIN.split()
COUNT = 18  # two are left out of each epoch


class Network(nn.Module):
    """A mean over the finest level, with dropout, which draws from the random state."""

    def __init__(self, pyramid: Pyramid, drop: float = 0.3) -> None:
        super().__init__()
        self.pyramid = pyramid
        self.drop = nn.Dropout(drop)
        self.head = nn.Conv2d(pyramid.out_channels, 1, 1)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.drop(self.pyramid(images)['0'])).mean((1, 2, 3))


class Noise(torch.utils.data.Dataset):
    """Images that go with their index, under a random brightness."""

    def __init__(self, random: bool = True) -> None:
        self.images = torch.randn(COUNT, 3, 32, 32, generator=torch.Generator().manual_seed(5))
        self.random = random

    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, index: int) -> tuple[Tensor, float]:
        bright = float(torch.rand(())) + float(np.random.rand()) if self.random else 1.0
        return self.images[index] * bright, index / COUNT


def collate(items: list[tuple[Tensor, float]]) -> tuple[Tensor, Tensor]:
    return torch.stack([image for image, _ in items]), torch.tensor([value for _, value in items])


def squared(module: nn.Module, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    out = module(batch[0])
    return {'loss': (out - batch[1]).square().mean(), 'mean': out.mean()}


def read(words: list[str]) -> argparse.Namespace:
    parser = Parser()
    fitting_flags.add_arguments(parser, 'segment')
    return parse(parser, words)


def prepare(words: list[str], loss: Any = squared, drop: float = 0.3, random: bool = True) -> Fitting:
    forget_processes()
    args = read([*WORDS, *words])
    accelerator = fitting_flags.open_accelerator(args)
    torch.manual_seed(1)
    network = Network(fitting_flags.open_pyramid(args), drop)
    return Fitting(
        args,
        accelerator=accelerator,
        module=network,
        pyramid=network.pyramid,
        train=Noise(random),
        collate=collate,
        loss=loss,
        evaluate=lambda module: {'score': float(module(torch.ones(1, 3, 32, 32))), 'of/one': 1.0},
        columns=['score'],
        facts={'num_classes': 1},
    )


def weights(fitting: Fitting) -> dict[str, Tensor]:
    return load_file(fitting.run.path / 'last.safetensors')


def in_runs(folder: Path, name: str, *words: str) -> list[str]:
    return ['--output', str(folder), '--experiment', name, *words]


def test_it_is_the_loop_written_out(tmp_path: Path) -> None:
    """Plain gradient steps over the seeded order: the same weights, and the mean loss in summary.csv."""
    fitting = prepare(in_runs(tmp_path, 'run', *PLAIN), drop=0.0, random=False)
    before = {name: value.clone() for name, value in fitting.module.state_dict().items()}
    fitting.fit()

    torch.manual_seed(1)
    network: Any = Network(fitting_flags.open_pyramid(read([*WORDS, *PLAIN])), 0.0)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    network.train()
    data, losses = Noise(False), []
    parameters = [p for p in network.parameters() if p.requires_grad]
    for epoch in range(3):
        order = np.random.default_rng([0, epoch]).permutation(COUNT)
        for i in range(COUNT // 4):
            images, targets = collate([data[int(n)] for n in order[4 * i : 4 * i + 4]])
            loss = (network(images) - targets).square().mean()
            losses.append(float(loss.detach()))
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
            with torch.no_grad():
                for parameter, gradient in zip(parameters, gradients):
                    if gradient is not None:
                        parameter -= 0.05 * gradient
    found = weights(fitting)
    for name, value in network.state_dict().items():
        torch.testing.assert_close(found[name], value, atol=1e-6, rtol=1e-5)
    with fitting.run.summary.open(newline='') as stream:
        rows = list(csv.DictReader(stream))
    means = np.mean(np.reshape(losses, (3, -1)), axis=1)
    assert [float(row['train_loss']) for row in rows] == pytest.approx(means, rel=1e-4)
    assert [float(row['lr']) for row in rows] == pytest.approx([0.05] * 3)
    network.eval()
    with torch.no_grad():
        assert float(rows[-1]['eval_score']) == pytest.approx(float(network(torch.ones(1, 3, 32, 32))), abs=1e-5)


@pytest.fixture(scope='module')
def whole(tmp_path_factory: pytest.TempPathFactory) -> Fitting:
    """A run that nothing interrupted, with dropout, random images, warm-up, decay of layers, clipping."""
    fitting = prepare(in_runs(tmp_path_factory.mktemp('runs'), 'whole', '--layer-decay', '0.7', '--clip-grad', '1'))
    fitting.fit()
    return fitting


@pytest.mark.parametrize('step', [1, 4, 6, 11])
def test_stopped_and_resumed_is_the_same_to_the_bit(whole: Fitting, tmp_path: Path, step: int) -> None:
    """By SIGTERM within an epoch or at its end: exit code 75, then the same weights and the same numbers."""
    words = in_runs(tmp_path, 'cut', '--layer-decay', '0.7', '--clip-grad', '1')
    calls = 0

    def told_to_stop(module: nn.Module, batch: Any) -> dict[str, Tensor]:
        nonlocal calls
        calls += 1
        if calls == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return squared(module, batch)

    with pytest.raises(Stopped, match=f'stopped by SIGTERM after step {step}') as stopped:
        prepare(words, told_to_stop).fit()
    assert stopped.value.exit_code == 75
    torch.manual_seed(77)  # nothing of the process before may be needed
    resumed = prepare([*words, '--resume', 'auto'])
    assert resumed.at.updates == step
    resumed.fit()
    expected, found = weights(whole), weights(resumed)
    assert expected.keys() == found.keys()
    assert all(torch.equal(value, found[name]) for name, value in expected.items())
    assert resumed.run.summary.read_text() == whole.run.summary.read_text()
    lines = [json.loads(line) for line in resumed.run.metrics.read_text().splitlines()]
    assert lines == [json.loads(line) for line in whole.run.metrics.read_text().splitlines()]


def test_workers_change_nothing(whole: Fitting, tmp_path: Path) -> None:
    """Random images are a function of seed, epoch and index, whoever draws them."""
    words = in_runs(tmp_path, 'workers', '--layer-decay', '0.7', '--clip-grad', '1', '-j', '2')
    fitting = prepare(words)
    fitting.fit()
    assert all(torch.equal(value, weights(fitting)[name]) for name, value in weights(whole).items())


def test_accumulated_batches_are_one_batch(tmp_path: Path) -> None:
    """Two of 4 images a step, or one of 8: the same weights but for rounding."""
    words = [*PLAIN, '--epochs', '2']
    found = []
    for name, own in (('one', ['-b', '8']), ('two', ['-b', '4', '--grad-accum-steps', '2'])):
        fitting = prepare(in_runs(tmp_path, name, *words, *own), drop=0.0, random=False)
        fitting.fit()
        found.append(weights(fitting))
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, atol=1e-5, rtol=1e-4)


class _InProcesses:
    """A function of (rank, world) that can be sent to other processes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, rank: int, world: int) -> Any:
        fitting = prepare(
            in_runs(self.folder, f'of{world}', *PLAIN, '--epochs', '2', '-b', str(4 // world)), drop=0, random=False
        )
        metrics = fitting.fit()
        return metrics, {name: value.clone() for name, value in fitting.module.state_dict().items()}


def test_two_processes_are_one(tmp_path: Path) -> None:
    """The same global batch: the same weights but for rounding, and bitwise the same in both."""
    alone = prepare(in_runs(tmp_path, 'one', *PLAIN, '--epochs', '2'), drop=0, random=False)
    metrics = alone.fit()
    (first, state), (second, other) = run_processes(_InProcesses(tmp_path), 2, tmp_path)
    assert first == second and first['score'] == pytest.approx(metrics['score'], abs=1e-5)
    for name, value in weights(alone).items():
        torch.testing.assert_close(state[name], value, atol=1e-5, rtol=1e-4)
        assert torch.equal(state[name], other[name])


def test_what_a_run_leaves(whole: Fitting) -> None:
    """Best weights of the best epoch, a curve, numbers beside the columns in metrics.jsonl alone."""
    run = whole.run
    with run.summary.open(newline='') as stream:
        rows = list(csv.DictReader(stream))
    scores = [float(row['eval_score']) for row in rows]
    assert whole.at.best == (pytest.approx(max(scores)), int(np.argmax(scores)))
    assert 'eval_of/one' not in rows[0]
    last = json.loads(run.metrics.read_text().splitlines()[-1])
    assert last['epoch'] == 2 and last['eval/of/one'] == 1.0
    assert len(np.unique(np.asarray(Image.open(run.plots / 'training.png').convert('L')))) > 20
    best = load_file(run.path / 'best.safetensors')
    assert best.keys() == whole.module.state_dict().keys()


def test_a_bad_step_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Weights and statistics are as if the step had not been; too many in a row end the run."""
    seen: list[dict[str, Tensor]] = []
    holder: dict[str, Fitting] = {}

    def sometimes_nan(module: nn.Module, batch: Any) -> dict[str, Tensor]:
        seen.append({name: value.clone() for name, value in holder['it'].module.state_dict().items()})
        losses = squared(module, batch)
        return {**losses, 'loss': losses['loss'] * float('nan')} if len(seen) == 2 else losses

    holder['it'] = prepare(in_runs(tmp_path, 'bad', '--epochs', '1'), sometimes_nan)
    holder['it'].fit()
    assert all(torch.equal(value, seen[2][name]) for name, value in seen[1].items())
    assert not all(torch.equal(value, seen[3][name]) for name, value in seen[2].items())
    assert 'step 2 (epoch 0, batch 1): loss or gradient not finite; left out' in capsys.readouterr().out

    def always_nan(module: nn.Module, batch: Any) -> dict[str, Tensor]:
        return {'loss': squared(module, batch)['loss'] * float('nan')}

    with pytest.raises(UserError, match='--max-bad-steps 3: .*') as ended:
        prepare(in_runs(tmp_path, 'nan', '--max-bad-steps', '3'), always_nan).fit()
    assert ended.value.exit_code == 1


def test_mistakes(tmp_path: Path, whole: Fitting) -> None:
    with pytest.raises(UserError, match='--batch-size 32 times 1 process.*use at most 18'):
        prepare(in_runs(tmp_path, 'a', '-b', '32'))
    with pytest.raises(UserError, match='holds a run already'):
        prepare(['--output', str(whole.run.path.parent), '--experiment', 'whole'])
    with pytest.raises(UserError, match="was saved with body 'test_resnet', this run has 'test_convnext'"):
        prepare(['--resume', str(whole.run.path), '--model', 'test_convnext'])
    assert not list(tmp_path.iterdir())
